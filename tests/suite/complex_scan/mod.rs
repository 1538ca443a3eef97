//! The scan with complex states.

#[cfg(feature = "candle")]
mod candle;
mod case;
mod vectors;

use half::{bf16, f16};
use rand::Rng;
use selective_scan::complex_scan::{Inputs, OutputGradients, UpdateInputs, UpdateMut, cpu, reference, rollback};
use selective_scan::{Element, Error, Isa, ProjectionOf, Slots, View, ViewMut, scan};

use self::case::{Case, Shape, backward, forward};
use crate::support::draw::{Draw, seeded};
use crate::support::tolerance::{assert_close, assert_close_to, bits};
use crate::support::vectors::{FORWARD, GRADIENTS};

/// Holds the fast path to the reference, whose arithmetic it shares: what differs is the rounding of results to `f32`, and
/// their terms, which cancel in a few of them, are of the size of the larger ones.
fn hold<T: Element>(isa: Isa, case: &Case<T>, what: &str) {
    let (inputs, d_outputs) = (case.inputs(), case.d_outputs());
    let output = forward(isa, &inputs, case.state.len());
    let want = reference::forward(&inputs).unwrap();
    let what = format!("{what}, {isa:?}, {:?}", case.shape);
    assert_close_to(&output.out, &want.out, FORWARD, 1e-3, &format!("{what}: out"));
    assert_close_to(&output.final_state, &want.final_state, FORWARD, 1e-3, &format!("{what}: final_state"));
    let got = backward(isa, &inputs, d_outputs);
    let want = reference::backward(&inputs, d_outputs).unwrap();
    for (name, got, want) in [("u", &got.u, &want.u), ("delta", &got.delta, &want.delta)] {
        assert_close_to(got, want, GRADIENTS, 1e-3, &format!("{what}: {name}"));
    }
    for (name, got, want) in [("b", &got.b, &want.b), ("c", &got.c, &want.c)] {
        let what = format!("{what}: {name}");
        match (got, want) {
            (ProjectionOf::Varying(got), ProjectionOf::Varying(want)) => {
                assert_close_to(got, want, GRADIENTS, 1e-3, &what);
            }
            (ProjectionOf::Constant(got), ProjectionOf::Constant(want)) => {
                assert_close_to(got, want, GRADIENTS, 1e-3, &what);
            }
            _ => panic!("{what}: another kind of projection"),
        }
    }
    assert_close_to(&got.a, &want.a, GRADIENTS, 1e-3, &format!("{what}: a"));
    for (name, got, want) in [
        ("d", &got.d, &want.d),
        ("delta_bias", &got.delta_bias, &want.delta_bias),
        ("initial_state", &got.initial_state, &want.initial_state),
    ] {
        assert_eq!(got.is_some(), want.is_some(), "{what}: {name}");
        if let (Some(got), Some(want)) = (got, want) {
            assert_close_to(got, want, GRADIENTS, 1e-3, &format!("{what}: {name}"));
        }
    }
    if let (Some(got), Some(want)) = (&got.z, &want.z) {
        assert_close_to(got, want, GRADIENTS, 1e-3, &format!("{what}: z"));
    }
}

#[test]
fn small_problems_are_exact() {
    let (mut rng, seed) = seeded();
    for _ in 0..40 {
        let mut draw = Draw::new(rng.random());
        let shape = Shape::draw(&mut draw);
        for isa in Isa::available() {
            hold(isa, &Case::<f32>::new(shape.clone(), &mut draw), &format!("SEED={seed}"));
        }
        let isa = draw.isa();
        hold(isa, &Case::<bf16>::new(shape.clone(), &mut draw), &format!("SEED={seed}"));
        hold(isa, &Case::<f16>::new(shape, &mut draw), &format!("SEED={seed}"));
    }
}

/// Rounding does not add up where nothing is forgotten.
#[test]
fn long_memory_loses_nothing() {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let shape = Shape { batch: 1, length: 20_000, d_inner: 2, d_state: 2, decay: [1e-5, 2e-5], ..Shape::default() };
    hold(Isa::best(), &Case::<f32>::new(shape, &mut draw), &format!("SEED={seed}"));
}

/// With real numbers for A, B and C it is twice the real scan, before the skip connection. The real scan's error is 1e-6.
#[test]
fn real_numbers_give_twice_the_real_scan() {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let shape = Shape { with: [true, false, true, true], ..Shape::default() };
    let mut case = Case::<f32>::new(shape, &mut draw);
    let every_second = |values: &mut [f32]| values.iter_mut().skip(1).step_by(2).for_each(|x| *x = 0.0);
    every_second(&mut case.a);
    every_second(&mut case.state);
    case.varying.iter_mut().for_each(|values| every_second(values));
    let real = |values: &[f32]| values.iter().copied().step_by(2).collect::<Vec<f32>>();
    let (a, b, c, state) = (real(&case.a), real(&case.varying[0]), real(&case.varying[1]), real(&case.state));
    let inputs = case.inputs();
    let projection = |values| View::new(values, [2, 37, 1, 5]);
    let of_real = scan::Inputs {
        z: inputs.z,
        delta_bias: inputs.delta_bias,
        initial_state: Some(View::new(&state, [2, 19, 5])),
        ..scan::Inputs::new(inputs.u, inputs.delta, View::new(&a, [19, 5]), projection(&b), projection(&c))
    };
    let want = of_real.forward().unwrap();
    let got = inputs.forward().unwrap();
    let twice: Vec<f64> = want.out.iter().map(|x| 2.0 * f64::from(*x)).collect();
    assert_close(&got.out, &twice, 1e-5, &format!("SEED={seed}"));
    let states: Vec<f64> = want.final_state.iter().flat_map(|x| [f64::from(*x), 0.0]).collect();
    assert_close(&got.final_state, &states, 1e-5, &format!("SEED={seed}"));
}

/// The reference's slopes against differences of its results: a loss is linear in the outputs, with the slopes that flow
/// in. Steps of 2^-11 in `f32` leave 1e-6 of third derivatives of up to 100.
#[test]
fn the_reference_is_differentiated_rightly() {
    let (mut rng, seed) = seeded();
    for varying in [[true, true], [false, false]] {
        let mut draw = Draw::new(rng.random());
        let mut shape = Shape { batch: 1, length: 5, d_inner: 2, d_state: 2, varying, ..Shape::default() };
        shape.options.delta_softplus = draw.flag();
        shape.options.reverse = draw.flag();
        let mut case = Case::<f32>::new(shape, &mut draw);
        (case.u, case.delta, case.z, case.d_out) =
            (case.u.dense(), case.delta.dense(), case.z.dense(), case.d_out.dense());
        let want = reference::backward(&case.inputs(), case.d_outputs()).unwrap();
        let loss = |case: &Case<f32>| {
            let output = reference::forward(&case.inputs()).unwrap();
            let of =
                |values: &[f64], slopes: &[f32]| values.iter().zip(slopes).map(|(x, d)| x * f64::from(*d)).sum::<f64>();
            of(&output.out, &case.d_out.data) + of(&output.final_state, &case.d_state)
        };
        type Of = fn(&mut Case<f32>) -> &mut Vec<f32>;
        let [of_b, of_c]: [Of; 2] = match varying[0] {
            true => [|case| &mut case.varying[0], |case| &mut case.varying[1]],
            false => [|case| &mut case.constant[0], |case| &mut case.constant[1]],
        };
        let checked: [(&str, Of, &[f64]); 9] = [
            ("u", |case| &mut case.u.data, &want.u),
            ("delta", |case| &mut case.delta.data, &want.delta),
            ("a", |case| &mut case.a, &want.a),
            ("b", of_b, want.b.as_slice()),
            ("c", of_c, want.c.as_slice()),
            ("z", |case| &mut case.z.data, want.z.as_deref().unwrap()),
            ("d", |case| &mut case.d, want.d.as_deref().unwrap()),
            ("delta_bias", |case| &mut case.bias, want.delta_bias.as_deref().unwrap()),
            ("initial_state", |case| &mut case.state, want.initial_state.as_deref().unwrap()),
        ];
        for (name, of, want) in checked {
            for (i, want) in want.iter().enumerate() {
                let at = of(&mut case)[i];
                let (high, low) = (at + 4.9e-4, at - 4.9e-4);
                of(&mut case)[i] = high;
                let above = loss(&case);
                of(&mut case)[i] = low;
                let below = loss(&case);
                of(&mut case)[i] = at;
                let got = (above - below) / (f64::from(high) - f64::from(low));
                assert!((got - want).abs() < 1e-3 * want.abs().max(1.0), "{name} {i}: {got} {want}, SEED={seed}");
            }
        }
    }
}

/// A packed sequence gives the bits of the same alone, and so does a batch row; any number of threads the same bits.
#[test]
fn company_changes_no_bit() {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let cuts = vec![0, 17, 17, 90, 100];
    let shape = Shape {
        batch: 1,
        length: 100,
        cu_seqlens: Some(cuts.clone()),
        with: [true, true, true, false],
        ..Shape::default()
    };
    let case = Case::<f32>::new(shape, &mut draw);
    let inputs = case.inputs();
    let all = forward(Isa::best(), &inputs, case.state.len());
    for (i, ends) in cuts.windows(2).enumerate() {
        let part = |tensor: &crate::support::strided::Strided<f32>| tensor.steps(ends[0]..ends[1]);
        let (u, delta, z) = (part(&case.u), part(&case.delta), part(&case.z));
        let projection = |values: &'_ Vec<f32>| values[ends[0] * 10..ends[1] * 10].to_vec();
        let [b, c] = [projection(&case.varying[0]), projection(&case.varying[1])];
        let view = |values| View::new(values, [1, ends[1] - ends[0], 1, 10]).into();
        let one = Inputs {
            u: u.view(),
            delta: delta.view(),
            z: Some(z.view()),
            b: view(&b),
            c: view(&c),
            cu_seqlens: None,
            ..inputs
        };
        let one = forward(Isa::best(), &one, 190);
        assert_eq!(bits(&one.out), bits(&all.out[ends[0] * 19..ends[1] * 19]), "sequence {i}, SEED={seed}");
        assert_eq!(bits(&one.final_state), bits(&all.final_state[i * 190..(i + 1) * 190]), "sequence {i}, SEED={seed}");
    }
    let case = Case::<f32>::new(Shape { batch: 9, length: 70, d_inner: 50, ..Shape::default() }, &mut draw);
    let results = [1, 3].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            (
                forward(Isa::best(), &case.inputs(), case.state.len()),
                backward(Isa::best(), &case.inputs(), case.d_outputs()),
            )
        })
    });
    assert!(results[0] == results[1]);
}

/// What is not finite reaches later steps of its channel and sequence, and nothing else.
#[test]
fn what_is_not_finite_stays_where_it_belongs() {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let mut case = Case::<f32>::new(Shape { length: 80, ..Shape::default() }, &mut draw);
    let clean = forward(Isa::best(), &case.inputs(), case.state.len());
    let (step, channel) = (rng.random_range(0..80), rng.random_range(0..19));
    for value in [f32::NAN, f32::INFINITY] {
        case.u.set([1, step, channel], value);
        let got = forward(Isa::best(), &case.inputs(), case.state.len());
        for (i, (got, clean)) in got.out.iter().zip(&clean.out).enumerate() {
            let reached = i / (80 * 19) == 1 && i / 19 % 80 >= step && i % 19 == channel;
            let what = format!("{i} of {value} at {step}, channel {channel}, SEED={seed}");
            assert!(if reached { !got.is_finite() } else { got.to_bits() == clean.to_bits() }, "{what}: {got} {clean}");
        }
    }
}

#[test]
fn empty_problems_keep_their_state() {
    let (mut rng, _) = seeded();
    let mut draw = Draw::new(rng.random());
    let case = Case::<f32>::new(Shape { length: 0, ..Shape::default() }, &mut draw);
    let output = forward(Isa::best(), &case.inputs(), case.state.len());
    assert_eq!((output.out.len(), &output.final_state), (0, &case.state));
    let gradients = backward(Isa::best(), &case.inputs(), case.d_outputs());
    assert_eq!(gradients.initial_state.as_ref(), Some(&case.d_state));
    assert!(gradients.a.iter().all(|x| *x == 0.0));
    // More rows than can be gone through.
    let u = View::new(&[0.0f32], [usize::MAX >> 8, 0, 19]);
    let none = View::new(&[0.0f32], [usize::MAX >> 8, 0, 1, 10]);
    let inputs = Inputs { u, delta: u, z: None, b: none.into(), c: none.into(), initial_state: None, ..case.inputs() };
    cpu::forward(&inputs, selective_scan::complex_scan::OutputMut::new(&mut [][..])).unwrap();
    let mut gradients = selective_scan::complex_scan::Gradients::zeroed(&inputs).unwrap();
    cpu::backward(&inputs, OutputGradients::from(u), gradients.as_mut()).unwrap();
}

/// What `inputs` is refused for.
fn refused(inputs: &Inputs<f32>) -> String {
    let Err(Error::Argument { argument, .. }) = inputs.forward() else { panic!("not refused") };
    argument.to_string()
}

#[test]
fn bad_arguments_are_named() {
    let (mut rng, _) = seeded();
    let case = Case::<f32>::new(Shape::default(), &mut Draw::new(rng.random()));
    let (good, numbers) = (case.inputs(), vec![0.0f32; 40_000]);
    let wide = |shape| View::new(&numbers, shape);
    assert_eq!(refused(&Inputs { a: View::new(&numbers, [19, 9]), ..good }), "a");
    assert_eq!(refused(&Inputs { delta: View::new(&numbers, [2, 36, 19]), ..good }), "delta");
    assert_eq!(refused(&Inputs { b: wide([2, 37, 1, 5]).into(), ..good }), "b");
    assert_eq!(refused(&Inputs { b: wide([2, 37, 2, 10]).into(), ..good }), "b");
    assert_eq!(refused(&Inputs { c: wide([2, 37, 19, 10]).into(), ..good }), "c");
    assert_eq!(refused(&Inputs { d: Some(View::new(&numbers, [18])), ..good }), "d");
    assert_eq!(refused(&Inputs { initial_state: Some(View::new(&numbers, [2, 19, 5])), ..good }), "initial_state");
    assert_eq!(refused(&Inputs { cu_seqlens: Some(&[0, 37]), ..good }), "cu_seqlens");
}

/// An arithmetic of `f64` leaves one rounding of the result, and one of a state for each token.
#[test]
fn an_update_is_the_references() {
    let (mut rng, seed) = seeded();
    for _ in 0..20 {
        let mut draw = Draw::new(rng.random());
        let shape = Shape {
            batch: 3,
            length: draw.one_of(&[1, 2, 5]),
            varying: [draw.flag(), draw.flag()],
            with: [draw.flag(), draw.flag(), draw.flag(), true],
            ..Shape::default()
        };
        let case = Case::<f32>::new(shape, &mut draw);
        // A row of padding among them, and slots in another order.
        let slots = [2, -1, 0];
        let inputs = UpdateInputs { slots: Slots::Host(&slots), ..case.update_inputs() };
        let shape = case.state_shape();
        let want = reference::update(&inputs, View::new(&case.state, shape)).unwrap();
        let mut state = case.state.clone();
        let got = inputs.update_with_token_states(ViewMut::new(&mut state, shape)).unwrap();
        let what = format!("SEED={seed}");
        assert_close(&got.out, &want.out, 1e-6, &what);
        assert_close(&got.token_states, &want.token_states, 1e-6, &what);
        let last = |row: usize| &got.token_states[((row + 1) * case.shape.length - 1) * 190..][..190];
        assert_eq!(bits(&state[380..]), bits(last(0)), "{what}: slot 2");
        assert_eq!(bits(&state[..190]), bits(last(2)), "{what}: slot 0");
        assert_eq!(bits(&state[190..380]), bits(&case.state[190..380]), "{what}: slot 1");
    }
}

/// Several tokens at once give the bits of one after another, in a pool of halves too; a rejected draft is rolled back;
/// and a sequence of updates is the sequence, but for the rounding of its states.
#[test]
fn tokens_at_once_are_tokens_one_by_one() {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let case = Case::<bf16>::new(Shape { length: 4, varying: [false; 2], ..Shape::default() }, &mut draw);
    let (shape, inputs) = (case.state_shape(), case.update_inputs());
    let pool: Vec<bf16> = case.state.iter().map(|x| bf16::from_f32(*x)).collect();
    let (mut at_once, mut one_by_one) = (pool.clone(), pool);
    let all = inputs.update_with_token_states(ViewMut::new(&mut at_once, shape)).unwrap();
    for token in 0..4 {
        let part = |tensor: &crate::support::strided::Strided<bf16>| tensor.steps(token..token + 1);
        let (u, delta, z) = (part(&case.u), part(&case.delta), part(&case.z));
        let one = UpdateInputs { u: u.view(), delta: delta.view(), z: Some(z.view()), ..inputs };
        let mut out = [bf16::ZERO; 2 * 19];
        cpu::update(&one, UpdateMut::new(ViewMut::new(&mut one_by_one, shape), &mut out[..])).unwrap();
        for row in 0..2 {
            let of_all = &all.out[(row * 4 + token) * 19..][..19];
            assert_eq!(bits(&out[row * 19..][..19]), bits(of_all), "token {token}, SEED={seed}");
        }
        if token == 2 {
            let mut back = at_once.clone();
            let states = View::new(&all.token_states, [2, 4, shape[1], shape[2]]);
            rollback(ViewMut::new(&mut back, shape), states, None, &[3, 3]).unwrap();
            assert_eq!(bits(&back), bits(&one_by_one), "rolled back, SEED={seed}");
        }
    }
    assert_eq!(bits(&at_once), bits(&one_by_one), "SEED={seed}");
    let case = Case::<f32>::new(Shape { length: 50, ..Shape::default() }, &mut draw);
    let mut state = case.state.clone();
    let out = case.update_inputs().update(ViewMut::new(&mut state, shape)).unwrap();
    let want = reference::forward(&case.inputs()).unwrap();
    assert_close(&out, &want.out, 1e-5, &format!("SEED={seed}"));
    assert_close(&state, &want.final_state, 1e-5, &format!("SEED={seed}"));
}
