//! Bad arguments to the scan: an error that names the argument, and nothing written; never a panic, whatever they are.

use proptest::prelude::*;
use rand::Rng;
use selective_scan::scan::{self, CheckpointSteps, Gradients, Inputs, OutputGradients, OutputMut, cpu};
use selective_scan::{Discretization, Error, ProjectionOf, View};

use super::case::{Case, Flags, Shape};
use crate::support::draw::seeded;
use crate::support::wild::{size, view3};

const SHAPE: Shape = Shape { batch: 2, len: 70, d_inner: 6, d_state: 4 };

fn case(flags: Flags) -> Case<f32> {
    // Buffers are of the sizes that these give.
    Case { checkpoint_steps: CheckpointSteps::Every64, ..Case::new(&mut seeded().0, SHAPE, flags) }
}

fn all() -> Flags {
    Flags { initial_state: true, d_final_state: true, ..Flags::mamba() }
}

/// Runs forward and backward; both must name `argument`, and no buffer may have been touched.
fn assert_names(inputs: &Inputs<f32>, argument: &str) {
    const UNTOUCHED: f32 = 123.0;
    let case = case(all());
    let (_, kept) = case.inputs().forward_with_checkpoints().expect("valid");
    let mut out = vec![UNTOUCHED; 2 * 70 * 6];
    let mut checkpoints = vec![UNTOUCHED; 2 * 70 / 64 * 6 * 4];
    let to = OutputMut { out: &mut out[..], final_state: None, checkpoints: Some(&mut checkpoints[..]) };
    for error in [
        cpu::forward(inputs, to).expect_err("forward accepts it"),
        scan::reference::forward(inputs).expect_err("the reference accepts it"),
        scan::reference::backward(inputs, case.d_outputs()).expect_err("the reference's backward accepts it"),
        inputs.backward(&kept, case.d_outputs()).expect_err("backward accepts it"),
    ] {
        let Error::Argument { argument: named, expected, got } = &error else { panic!("{error}") };
        assert_eq!(*named, argument, "{error}");
        assert!(!expected.is_empty() && !got.is_empty());
    }
    assert!(out.iter().chain(&checkpoints).all(|&x| x == UNTOUCHED), "{argument}: something was written");
}

#[test]
fn shapes() {
    let case = case(all());
    let good = case.inputs();
    let data = vec![0.0f32; 10_000];
    let three = |shape| View::new(&data, shape);
    assert_names(&Inputs { delta: three([2, 70, 5]), ..good }, "delta");
    assert_names(&Inputs { delta: three([2, 69, 6]), ..good }, "delta");
    assert_names(&Inputs { delta: three([1, 70, 6]), ..good }, "delta");
    assert_names(&Inputs { z: Some(three([2, 70, 7])), ..good }, "z");
    assert_names(&Inputs { u: three([2, 70, 0]), ..good }, "u");
    assert_names(&Inputs { a: View::new(&data, [5, 4]), ..good }, "a");
    assert_names(&Inputs { a: View::new(&data, [6, 0]), ..good }, "a");
    assert_names(&Inputs { a: View::new(&data, [6, 257]), ..good }, "a");
    assert_names(&Inputs { b: View::new(&data, [2, 70, 1, 5]).into(), ..good }, "b");
    assert_names(&Inputs { b: View::new(&data, [2, 70, 4, 4]).into(), ..good }, "b");
    assert_names(&Inputs { b: View::new(&data, [2, 70, 0, 4]).into(), ..good }, "b");
    assert_names(&Inputs { b: View::new(&data, [6, 5]).into(), ..good }, "b");
    assert_names(&Inputs { c: View::new(&data, [2, 70, 2, 4]).into(), ..good }, "c");
    assert_names(&Inputs { c: View::new(&data, [7, 4]).into(), ..good }, "c");
    assert_names(&Inputs { d: Some(View::new(&data, [7])), ..good }, "d");
    assert_names(&Inputs { delta_bias: Some(View::new(&data, [5])), ..good }, "delta_bias");
    assert_names(&Inputs { initial_state: Some(three([1, 6, 4])), ..good }, "initial_state");
    assert_names(&Inputs { initial_state: Some(three([2, 4, 6])), ..good }, "initial_state");
}

#[test]
fn strides_against_storage() {
    let case = case(all());
    let good = case.inputs();
    let short = vec![0.0f32; 2 * 70 * 6 - 1];
    let view = View::new(&short, [2, 70, 6]);
    assert_names(&Inputs { u: view, ..good }, "u");
    assert_names(&Inputs { delta: view, ..good }, "delta");
    assert_names(&Inputs { z: Some(view), ..good }, "z");
    assert_names(&Inputs { u: good.u.with_layout(1, [420, 6, 1]), ..good }, "u");
    assert_names(&Inputs { u: good.u.with_layout(0, [421, 6, 1]), ..good }, "u");
    assert_names(&Inputs { u: good.u.with_layout(usize::MAX, [420, 6, 1]), ..good }, "u");
    assert_names(&Inputs { u: good.u.with_layout(0, [usize::MAX, 6, 1]), ..good }, "u");
    assert_names(&Inputs { u: good.u.with_layout(0, [420, usize::MAX / 2, 1]), ..good }, "u");
    assert_names(&Inputs { a: good.a.with_layout(0, [5, 1]), ..good }, "a");
    assert_names(&Inputs { u: View::new(&[], [usize::MAX, 2, 6]), ..good }, "u");
}

#[test]
fn cu_seqlens() {
    let case = Case::<f32>::new(&mut seeded().0, SHAPE, Flags { packed: true, ..Flags::mamba() });
    let good = case.inputs();
    for bad in [&[] as &[usize], &[0], &[1, 140], &[0, 139], &[0, 141], &[0, 80, 70, 140], &[0, usize::MAX, 140]] {
        let inputs = Inputs { cu_seqlens: Some(bad), ..good };
        let Err(Error::Argument { argument, .. }) = inputs.forward() else { panic!("{bad:?} is accepted") };
        assert_eq!(argument, "cu_seqlens");
    }
    let batched = self::case(all());
    assert_names(&Inputs { cu_seqlens: Some(&[0, 70]), ..batched.inputs() }, "cu_seqlens");
}

#[test]
fn output_buffers() {
    let case = case(all());
    let inputs = case.inputs();
    let (len, states, checkpoints) = (2 * 70 * 6, 2 * 6 * 4, inputs.checkpoint_len().expect("valid"));
    let run = |out: usize, state: usize, kept: usize| {
        let (mut out, mut state, mut kept) = (vec![0.0; out], vec![0.0; state], vec![0.0; kept]);
        let to = OutputMut { out: &mut out[..], final_state: Some(&mut state[..]), checkpoints: Some(&mut kept[..]) };
        cpu::forward(&inputs, to)
    };
    assert!(run(len, states, checkpoints).is_ok());
    for (sizes, name) in [
        ((len - 1, states, checkpoints), "out"),
        ((len + 1, states, checkpoints), "out"),
        ((len, states - 1, checkpoints), "final_state"),
        ((len, states, checkpoints + 1), "checkpoints"),
        ((len, states, 0), "checkpoints"),
    ] {
        let Err(Error::Argument { argument, .. }) = run(sizes.0, sizes.1, sizes.2) else { panic!("{sizes:?}") };
        assert_eq!(argument, name);
    }
}

#[test]
fn gradient_buffers() {
    let case = case(all());
    let inputs = case.inputs();
    let (_, kept) = inputs.forward_with_checkpoints().expect("valid");
    let checkpoints = kept.as_slice();
    let run = |change: &dyn Fn(&mut Gradients<f32>)| {
        let mut gradients = Gradients::zeroed(&inputs).expect("valid");
        change(&mut gradients);
        match cpu::backward(&inputs, checkpoints, case.d_outputs(), gradients.as_mut()) {
            Err(Error::Argument { argument, .. }) => argument,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(run(&|g| g.u.truncate(1)), "gradients.u");
    assert_eq!(run(&|g| g.delta.push(0.0)), "gradients.delta");
    assert_eq!(run(&|g| g.a.push(0.0)), "gradients.a");
    assert_eq!(run(&|g| g.z = None), "gradients.z");
    assert_eq!(run(&|g| g.d = Some(vec![0.0; 7])), "gradients.d");
    assert_eq!(run(&|g| g.delta_bias = None), "gradients.delta_bias");
    assert_eq!(run(&|g| g.initial_state = Some(vec![])), "gradients.initial_state");
    assert_eq!(run(&|g| g.b = scan::ProjectionGradient::Constant(vec![0.0; 24])), "gradients.b");
    assert_eq!(run(&|g| g.c = scan::ProjectionGradient::Varying(vec![0.0; 3])), "gradients.c");

    let without = Inputs { z: None, ..inputs };
    let mut gradients = Gradients::zeroed(&inputs).expect("valid");
    let error = cpu::backward(&without, checkpoints, case.d_outputs(), gradients.as_mut());
    assert!(matches!(error, Err(Error::Argument { argument: "gradients.z", .. })));
    let error = cpu::backward(&inputs, &checkpoints[1..], case.d_outputs(), gradients.as_mut());
    assert!(matches!(error, Err(Error::Argument { argument: "checkpoints", .. })));
    let d_out = View::new(&case.a, [2, 70, 5]);
    let error = inputs.backward(&kept, OutputGradients { d_out, ..case.d_outputs() });
    assert!(matches!(error, Err(Error::Argument { argument: "d_out", .. })));
    let d_final_state = Some(View::new(&case.a, [2, 4, 6]));
    let error = inputs.backward(&kept, OutputGradients { d_final_state, ..case.d_outputs() });
    assert!(matches!(error, Err(Error::Argument { argument: "d_final_state", .. })));
}

/// Checkpoints of another forward pass are refused, whatever it is that differs; what the states do not depend on may.
#[test]
fn checkpoints_of_others() {
    let (mut rng, seed) = seeded();
    let mut draw = || Case::<f32> { checkpoint_steps: CheckpointSteps::Every64, ..Case::new(&mut rng, SHAPE, all()) };
    let (case, other) = (draw(), draw());
    let inputs = case.inputs();
    let (_, checkpoints) = inputs.forward_with_checkpoints().expect("valid");
    let right = inputs.backward(&checkpoints, case.d_outputs()).expect("these are their own");
    let refused = |inputs: &Inputs<f32>, got: &str| {
        let error = inputs.backward(&checkpoints, case.d_outputs()).expect_err(got).to_string();
        let expected =
            "`checkpoints`: expected those of a forward pass over the same inputs with the same options, got those of";
        assert_eq!(error, format!("{expected} {got}"), "SEED={seed}");
    };
    // The case that was found: all other values of the same shape.
    let others = other.inputs();
    let error = others.backward(&checkpoints, case.d_outputs()).expect_err("others").to_string();
    assert!(error.ends_with("got those of other values of `u`"), "{error}");
    refused(&Inputs { u: others.u, ..inputs }, "other values of `u`");
    refused(&Inputs { delta: others.delta, ..inputs }, "other values of `delta`");
    refused(&Inputs { a: others.a, ..inputs }, "other values of `a`");
    refused(&Inputs { b: others.b, ..inputs }, "other values of `b`");
    refused(&Inputs { delta_bias: others.delta_bias, ..inputs }, "other values of `delta_bias`");
    refused(&Inputs { initial_state: others.initial_state, ..inputs }, "other values of `initial_state`");
    refused(&Inputs { initial_state: None, ..inputs }, "inputs with `initial_state`");
    let bare = Inputs { delta_bias: None, ..inputs };
    let (_, without) = bare.forward_with_checkpoints().expect("valid");
    let error = inputs.backward(&without, case.d_outputs()).expect_err("others").to_string();
    assert!(error.ends_with("got those of inputs without `delta_bias`"), "{error}");
    for options in [
        scan::Options { delta_softplus: false, ..inputs.options },
        scan::Options { reverse: true, ..inputs.options },
        scan::Options { checkpoint_steps: CheckpointSteps::Every32, ..inputs.options },
        scan::Options { discretization: Discretization::ZeroOrderHold, ..inputs.options },
    ] {
        let got = format!("{:?}, where the inputs have {options:?}", inputs.options);
        refused(&Inputs { options, ..inputs }, &got);
    }
    // One token of one row, as an embedding has another one for it: every channel of a step.
    for _ in 0..20 {
        let (batch, step) = (rng.random_range(0..2), rng.random_range(0..70));
        let mut changed = case.clone();
        (0..6).for_each(|d| changed.u.set([batch, step, d], rng.random_range(3.0..4.0)));
        refused(&Inputs { u: changed.u.view(), ..inputs }, "other values of `u`");
    }
    // As many checkpoints of other shapes.
    let flat = Inputs { initial_state: None, ..inputs };
    let (_, dense) = flat.forward_with_checkpoints().expect("valid");
    let data = vec![0.25f32; 4096];
    let three = |shape: [usize; 3]| View::new(&data, shape);
    let projection = View::new(&data, [1, 140, 1, 4]);
    let bare = Inputs::new(three([1, 140, 6]), three([1, 140, 6]), inputs.a, projection, projection);
    assert_eq!(bare.checkpoint_len(), flat.checkpoint_len());
    let error = bare.backward(&dense, three([1, 140, 6])).expect_err("another shape").to_string();
    let got = "(batch, length, d_inner, d_state) = [2, 70, 6, 4], where the inputs have [1, 140, 6, 4]";
    assert!(error.contains(got), "{error}");
    let packed = Inputs { cu_seqlens: Some(&[0, 70, 140]), ..bare };
    let (_, checkpoints_of_packed) = packed.forward_with_checkpoints().expect("valid");
    let moved = Inputs { cu_seqlens: Some(&[0, 71, 140]), ..bare };
    let error = moved.backward(&checkpoints_of_packed, three([1, 140, 6])).expect_err("other sequences").to_string();
    assert!(error.ends_with("got those of other `cu_seqlens`"), "{error}");

    // The same values lie elsewhere in another order, and C, D and z are others: the states are the same.
    let time_contiguous = |view: View<f32, 3>| -> Vec<f32> {
        let at = |i: usize| view.data[view.offset + i / 420 * view.strides[0] + i % 70 * view.strides[1] + i / 70 % 6];
        (0..840).map(at).collect()
    };
    let u = time_contiguous(inputs.u);
    let moved = Inputs { u: three_of(&u, [2, 6, 70]).permuted([0, 2, 1]).expect("an order"), ..inputs };
    assert_eq!(moved.backward(&checkpoints, case.d_outputs()).as_ref(), Ok(&right), "SEED={seed}");
    let changed = Inputs { c: others.c, d: others.d, z: others.z, ..inputs };
    let (_, own) = changed.forward_with_checkpoints().expect("valid");
    let gradients = changed.backward(&checkpoints, case.d_outputs()).expect("the states do not depend on these");
    assert_eq!(gradients, changed.backward(&own, case.d_outputs()).expect("their own"), "SEED={seed}");
    assert_eq!(own, checkpoints);
}

fn three_of(data: &[f32], shape: [usize; 3]) -> View<'_, f32, 3> {
    View::new(data, shape)
}

/// A view's dimensions in another order, and orders that are none.
#[test]
fn permutations() {
    let data: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let view = View::new(&data, [2, 3, 4]).with_layout(0, [12, 4, 1]);
    let permuted = view.permuted([2, 0, 1]).expect("an order");
    assert_eq!((permuted.offset, permuted.shape, permuted.strides), (0, [4, 2, 3], [1, 12, 4]));
    for order in [[0, 1, 1], [0, 1, 3], [1, 2, usize::MAX]] {
        let error = view.permuted(order).expect_err("not an order").to_string();
        assert_eq!(error, format!("`order`: expected each dimension from 0 to 2 once, got {order:?}"));
    }
}

/// mamba_ssm's order, (batch, d_inner, length): the error names what is in it, not `a`.
#[test]
fn another_order() {
    let data = vec![0.5f32; 2 * 32 * 37];
    let (x, a) = (View::new(&data, [2, 32, 37]), View::new(&data, [32, 16]));
    let b = View::new(&data, [2, 37, 1, 16]);
    let error = Inputs::new(x, x, a, b, b).forward().expect_err("another order").to_string();
    assert_eq!(
        error,
        "`u`: expected shape (batch, length, d_inner) with d_inner = 32, as `a` has it, got [2, 32, 37], which fits with its \
         last two dimensions exchanged (without a copy, by `permuted([0, 2, 1])` of a view or `transpose(1, 2)` of a tensor)"
    );
    let permuted = x.permuted([0, 2, 1]).expect("an order");
    let right = Inputs::new(permuted, permuted, a, b, b);
    right.forward().expect("as the message says");
    for error in [
        Inputs { delta: x, ..right }.forward().expect_err("delta is not transposed"),
        Inputs { z: Some(x), ..right }.forward().expect_err("z is not transposed"),
    ] {
        assert!(
            error.to_string().contains("[2, 32, 37], which fits with its last two dimensions exchanged"),
            "{error}"
        );
    }
    let state = Inputs { initial_state: Some(View::new(&data, [2, 16, 32])), ..right };
    let error = state.forward().expect_err("the state is transposed").to_string();
    assert!(error.starts_with("`initial_state`: ") && error.contains("its last two dimensions exchanged"), "{error}");
    // What fits neither way is not guessed at.
    let error = Inputs { a: View::new(&data, [31, 16]), ..right }.forward().expect_err("a does not fit").to_string();
    assert_eq!(error, "`a`: expected shape (d_inner, d_state) = [32, 16], got [31, 16]");
}

/// A batch of any size is no work if it has no steps.
#[test]
fn endless_empty_batch() {
    let data = [0.0f32; 6];
    let activation = View::new(&data, [usize::MAX / 2, 0, 6]);
    let projection = View::new(&data, [usize::MAX / 2, 0, 1, 1]);
    let inputs = Inputs::new(activation, activation, View::new(&data, [6, 1]), projection, projection);
    let to = OutputMut { out: &mut [][..], final_state: None, checkpoints: None };
    assert_eq!(cpu::forward(&inputs, to), Ok(()));
    let mut gradients = Gradients::zeroed(&inputs).expect("six channels");
    assert_eq!(cpu::backward(&inputs, &[], OutputGradients::from(activation), gradients.as_mut()), Ok(()));
    assert_eq!(gradients.a, [0.0; 6]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    /// Wild shapes, strides, offsets and buffers: an answer or an error, never a panic and never a read or write outside
    /// (which the bounds checks of slices would turn into a panic).
    #[test]
    fn wild_arguments(
        shape in [size(), size(), size()],
        same_shape in any::<bool>(),
        views in [view3(), view3(), view3(), view3()],
        n in size(),
        groups in size(),
        constant in any::<[bool; 2]>(),
        given in any::<[bool; 4]>(),
        cu_seqlens in prop::option::of(prop::collection::vec(size(), 0..5)),
        lens in [0usize..300, 0usize..300, 0usize..300, 0usize..300],
        dense in any::<bool>(),
    ) {
        let storage: Vec<Vec<f32>> = lens.iter().map(|&len| vec![0.5; len]).collect();
        let view = |i: usize| {
            let (offset, own, strides) = views[i];
            let view = View::new(&storage[i], if same_shape { shape } else { own });
            if dense { view } else { view.with_layout(offset, strides) }
        };
        let projection = |i: usize| -> selective_scan::Projection<'_, f32> {
            match constant[i] {
                true => View::new(&storage[i + 1], [shape[2], n]).into(),
                false => View::new(&storage[i + 1], [shape[0], shape[1], groups, n]).into(),
            }
        };
        let inputs = Inputs {
            z: given[0].then(|| view(2)),
            d: given[1].then(|| View::new(&storage[0], [shape[2]])),
            initial_state: given[2].then(|| view(3)),
            cu_seqlens: cu_seqlens.as_deref(),
            ..Inputs::new(view(0), view(1), View::new(&storage[3], [shape[2], n]), projection(0), projection(1))
        };
        let (mut out, mut state, mut kept) = (vec![0.0; lens[0]], vec![0.0; lens[1]], vec![0.0; lens[2]]);
        let to = OutputMut {
            out: &mut out[..],
            final_state: given[3].then_some(&mut state[..]),
            checkpoints: None,
        };
        let _ = cpu::forward(&inputs, to);
        // What allocates its results may be asked for more than there is; what is valid must also run.
        if shape.iter().all(|&n| n < 100) && n < 300 && inputs.cu_seqlens.is_none() {
            if let Ok((output, checkpoints)) = inputs.forward_with_checkpoints() {
                let d_out = View::new(&output.out, shape);
                prop_assert!(inputs.backward(&checkpoints, d_out).is_ok());
                prop_assert!(scan::reference::forward(&inputs).is_ok());
            }
        } else {
            let _ = inputs.checkpoint_len();
        }
        let mut buffers: Vec<Vec<f32>> = (0..7).map(|i| vec![0.0; lens[i % 4]]).collect();
        let mut buffer = buffers.iter_mut();
        let mut next = || &mut buffer.next().expect("seven")[..];
        let gradients = scan::GradientsMut {
            u: next(),
            delta: next(),
            a: next(),
            b: ProjectionOf::Varying(next()),
            c: ProjectionOf::Constant(next()),
            z: given[0].then(&mut next),
            d: given[1].then(&mut next),
            delta_bias: None,
            initial_state: None,
        };
        let _ = cpu::backward(&inputs, &kept, OutputGradients::from(view(3)), gradients);
        kept.clear();
    }
}
