//! The scan with complex states.

#[cfg(feature = "candle")]
mod candle;
pub mod case;
pub mod device;
#[cfg(feature = "cuda")]
mod gpu;
mod vectors;

use half::{bf16, f16};
use rand::Rng;
use selective_scan::complex_scan::{
    Inputs, Options, OutputGradients, UpdateInputs, UpdateMut, cpu, reference, rollback,
};
use selective_scan::{Element, Error, Isa, ProjectionOf, Slots, View, ViewMut, scan};

use self::case::{Case, Shape};
use self::device::{On, backward, forward};
use crate::support::draw::{Draw, seeded};
use crate::support::tolerance::{assert_close, assert_close_to, bits};
use crate::support::vectors::{FORWARD, GRADIENTS};

/// Holds the fast path to the reference, whose arithmetic it shares: what differs is the rounding of results to `f32`, and
/// their terms, which cancel in a few of them, are of the size of the larger ones.
pub fn hold<T: Element>(on: On, case: &Case<T>, what: &str) {
    let (inputs, d_outputs) = (case.inputs(), case.d_outputs());
    let output = forward(on, &inputs);
    let want = reference::forward(&inputs).unwrap();
    let what = format!("{what}, {on:?}, {:?}", case.shape);
    assert_close_to(&output.out, &want.out, FORWARD, 1e-3, &format!("{what}: out"));
    assert_close_to(&output.final_state, &want.final_state, FORWARD, 1e-3, &format!("{what}: final_state"));
    let got = backward(on, &inputs, d_outputs);
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
            hold(On::Processor(isa), &Case::<f32>::new(shape.clone(), &mut draw), &format!("SEED={seed}"));
        }
        let on = On::Processor(draw.isa());
        hold(on, &Case::<bf16>::new(shape.clone(), &mut draw), &format!("SEED={seed}"));
        hold(on, &Case::<f16>::new(shape, &mut draw), &format!("SEED={seed}"));
    }
}

/// Rounding does not add up where nothing is forgotten.
#[test]
fn long_memory_loses_nothing() {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let shape = Shape { batch: 1, length: 20_000, d_inner: 2, d_state: 2, decay: [1e-5, 2e-5], ..Shape::default() };
    hold(On::best(), &Case::<f32>::new(shape, &mut draw), &format!("SEED={seed}"));
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
        // Of turns of up to 20 a third derivative by Δ would be 8000 of a term.
        case.a.iter_mut().skip(1).step_by(2).for_each(|turn| *turn /= 5.0);
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

/// A packed sequence gives the bits of the same alone, forward and by its inputs, its projections and its state backward.
#[test]
fn a_packed_sequence_gives_the_bits_of_the_same_alone() {
    packed_alone(On::best());
}

pub fn packed_alone(on: On) {
    let (mut rng, seed) = seeded();
    for groups in [1, 19] {
        let mut draw = Draw::new(rng.random());
        let cuts = vec![0, 17, 17, 90, 100];
        let options = Options { reverse: draw.flag(), delta_softplus: draw.flag() };
        let shape =
            Shape { batch: 1, length: 100, groups, cu_seqlens: Some(cuts.clone()), options, ..Shape::default() };
        let case = Case::<f32>::new(shape, &mut draw);
        let all = forward(on, &case.inputs());
        let d_all = backward(on, &case.inputs(), case.d_outputs());
        for (i, ends) in cuts.windows(2).enumerate() {
            let part = |tensor: &crate::support::strided::Strided<f32>| tensor.steps(ends[0]..ends[1]);
            let (steps, numbers) = (ends[0] * 19..ends[1] * 19, ends[0] * 10 * groups..ends[1] * 10 * groups);
            let of_state = i * 190..(i + 1) * 190;
            let alone = Case::<f32> {
                u: part(&case.u),
                delta: part(&case.delta),
                z: part(&case.z),
                d_out: part(&case.d_out),
                varying: [0, 1].map(|which| case.varying[which][numbers.clone()].to_vec()),
                constant: case.constant.clone(),
                a: case.a.clone(),
                d: case.d.clone(),
                bias: case.bias.clone(),
                state: case.state[of_state.clone()].to_vec(),
                d_state: case.d_state[of_state.clone()].to_vec(),
                shape: Shape { length: ends[1] - ends[0], cu_seqlens: None, ..case.shape.clone() },
            };
            let one = forward(on, &alone.inputs());
            let d_one = backward(on, &alone.inputs(), alone.d_outputs());
            let what = format!("sequence {i}, {on:?}, {options:?}, SEED={seed}");
            assert_eq!(bits(&one.out), bits(&all.out[steps.clone()]), "{what}");
            assert_eq!(bits(&one.final_state), bits(&all.final_state[of_state.clone()]), "{what}");
            assert_eq!(bits(&d_one.u), bits(&d_all.u[steps.clone()]), "{what}: u");
            assert_eq!(bits(&d_one.delta), bits(&d_all.delta[steps.clone()]), "{what}: delta");
            assert_eq!(bits(&d_one.z.unwrap()), bits(&d_all.z.as_ref().unwrap()[steps]), "{what}: z");
            for (name, one, all) in [("b", &d_one.b, &d_all.b), ("c", &d_one.c, &d_all.c)] {
                let (ProjectionOf::Varying(one), ProjectionOf::Varying(all)) = (one, all) else { panic!("{name}") };
                assert_eq!(bits(one), bits(&all[numbers.clone()]), "{what}: {name}");
            }
            let (one, all) = (d_one.initial_state.unwrap(), d_all.initial_state.as_ref().unwrap());
            assert_eq!(bits(&one), bits(&all[of_state]), "{what}: state");
        }
    }
}

/// A batch row gives the bits of the same alone.
#[test]
fn a_batch_row_gives_the_bits_of_the_same_alone() {
    batched_alone(On::best());
}

pub fn batched_alone(on: On) {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let case = Case::<bf16>::new(
        Shape { batch: 5, length: 30, varying: [false; 2], with: [true, true, true, false], ..Shape::default() },
        &mut draw,
    );
    let all = forward(on, &case.inputs());
    for row in 0..5 {
        let (u, delta, z) = (case.u.row(row), case.delta.row(row), case.z.row(row));
        let one = Inputs { u: u.view(), delta: delta.view(), z: Some(z.view()), ..case.inputs() };
        let one = forward(on, &one);
        assert_eq!(
            bits(&one.out),
            bits(&all.out[row * 30 * 19..(row + 1) * 30 * 19]),
            "row {row}, {on:?}, SEED={seed}"
        );
    }
}

/// Splitting anywhere is the whole, but for the rounding of the state to `f32`, with gradients too: a gradient of the second
/// part's initial state that flows into the first part's final state.
#[test]
fn parts_are_the_whole() {
    parts_whole(On::best(), 6);
}

pub fn parts_whole(on: On, count: usize) {
    let (mut rng, seed) = seeded();
    for _ in 0..count {
        let mut draw = Draw::new(rng.random());
        let reverse = draw.flag();
        let options = Options { reverse, delta_softplus: draw.flag() };
        let shape = Shape { batch: 1, length: 100, options, ..Shape::default() };
        let whole = Case::<f32>::new(shape, &mut draw);
        let at = rng.random_range(0..=100);
        // In the direction of the scan.
        let [first, second] = if reverse { [at..100, 0..at] } else { [0..at, at..100] };
        let part = |steps: &std::ops::Range<usize>, state: &[f32], d_state: &[f32]| Case::<f32> {
            u: whole.u.steps(steps.clone()),
            delta: whole.delta.steps(steps.clone()),
            z: whole.z.steps(steps.clone()),
            d_out: whole.d_out.steps(steps.clone()),
            varying: [0, 1].map(|which| whole.varying[which][steps.start * 10..steps.end * 10].to_vec()),
            constant: whole.constant.clone(),
            a: whole.a.clone(),
            d: whole.d.clone(),
            bias: whole.bias.clone(),
            state: state.to_vec(),
            d_state: d_state.to_vec(),
            shape: Shape { length: steps.len(), ..whole.shape.clone() },
        };
        let want = (forward(on, &whole.inputs()), backward(on, &whole.inputs(), whole.d_outputs()));
        let mut one = part(&first, &whole.state, &[0.0; 190]);
        let of_one = forward(on, &one.inputs());
        let two = part(&second, &of_one.final_state, &whole.d_state);
        let of_two = forward(on, &two.inputs());
        let d_two = backward(on, &two.inputs(), two.d_outputs());
        one.d_state = d_two.initial_state.clone().unwrap();
        let d_one = backward(on, &one.inputs(), one.d_outputs());
        let what = format!("cut at {at}, {on:?}, {options:?}, SEED={seed}");
        let joined = |one: &[f32], two: &[f32]| if reverse { [two, one].concat() } else { [one, two].concat() };
        let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        // A state is rounded by 2^-24 of itself, and so are results.
        let same = |got: &[f32], want: &[f32], name: &str| {
            assert_close_to(got, &wide(want), 1e-6, 0.0, &format!("{what}: {name}"));
        };
        same(&joined(&of_one.out, &of_two.out), &want.0.out, "out");
        same(&of_two.final_state, &want.0.final_state, "final_state");
        same(&joined(&d_one.u, &d_two.u), &want.1.u, "u");
        same(&joined(&d_one.delta, &d_two.delta), &want.1.delta, "delta");
        same(&d_one.initial_state.unwrap(), &want.1.initial_state.unwrap(), "initial_state");
        let sum: Vec<f32> = d_one.a.iter().zip(&d_two.a).map(|(x, y)| x + y).collect();
        same(&sum, &want.1.a, "a");
    }
}

/// Any number of threads gives the same bits.
#[test]
fn threads_do_not_matter() {
    let (mut rng, _) = seeded();
    let mut draw = Draw::new(rng.random());
    let case = Case::<f32>::new(Shape { batch: 9, length: 70, d_inner: 50, ..Shape::default() }, &mut draw);
    let results = [1, 3].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| (forward(On::best(), &case.inputs()), backward(On::best(), &case.inputs(), case.d_outputs())))
    });
    assert!(results[0] == results[1]);
}

/// What is not finite reaches later steps of its channel and sequence, and nothing else.
#[test]
fn what_is_not_finite_stays_where_it_belongs() {
    not_finite(On::best());
}

pub fn not_finite(on: On) {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let mut case = Case::<f32>::new(Shape { length: 80, ..Shape::default() }, &mut draw);
    let clean = forward(on, &case.inputs());
    let (step, channel) = (rng.random_range(0..80), rng.random_range(0..19));
    for value in [f32::NAN, f32::INFINITY] {
        case.u.set([1, step, channel], value);
        let got = forward(on, &case.inputs());
        for (i, (got, clean)) in got.out.iter().zip(&clean.out).enumerate() {
            let reached = i / (80 * 19) == 1 && i / 19 % 80 >= step && i % 19 == channel;
            let what = format!("{i} of {value} at {step}, channel {channel}, SEED={seed}");
            assert!(if reached { !got.is_finite() } else { got.to_bits() == clean.to_bits() }, "{what}: {got} {clean}");
        }
    }
}

#[test]
fn empty_problems_keep_their_state() {
    empty(On::best());
    let (mut rng, _) = seeded();
    let case = Case::<f32>::new(Shape { length: 0, ..Shape::default() }, &mut Draw::new(rng.random()));
    // More rows than can be gone through.
    let u = View::new(&[0.0f32], [usize::MAX >> 8, 0, 19]);
    let none = View::new(&[0.0f32], [usize::MAX >> 8, 0, 1, 10]);
    let inputs = Inputs { u, delta: u, z: None, b: none.into(), c: none.into(), initial_state: None, ..case.inputs() };
    cpu::forward(&inputs, selective_scan::complex_scan::OutputMut::new(&mut [][..])).unwrap();
    let mut gradients = selective_scan::complex_scan::Gradients::zeroed(&inputs).unwrap();
    cpu::backward(&inputs, OutputGradients::from(u), gradients.as_mut()).unwrap();
}

pub fn empty(on: On) {
    let (mut rng, _) = seeded();
    let mut draw = Draw::new(rng.random());
    let zero = |values: &[f32]| values.iter().all(|x| *x == 0.0);
    for varying in [[true; 2], [false; 2]] {
        let case = Case::<f32>::new(Shape { length: 0, varying, ..Shape::default() }, &mut draw);
        let output = forward(on, &case.inputs());
        assert_eq!((output.out.len(), &output.final_state), (0, &case.state));
        let gradients = backward(on, &case.inputs(), case.d_outputs());
        assert_eq!(gradients.initial_state.as_ref(), Some(&case.d_state));
        assert!(zero(&gradients.a) && zero(&gradients.d.unwrap()) && zero(&gradients.delta_bias.unwrap()));
        let none = Case::<f32>::new(Shape { batch: 0, varying, ..Shape::default() }, &mut draw);
        assert!(forward(on, &none.inputs()).out.is_empty());
        let gradients = backward(on, &none.inputs(), none.d_outputs());
        assert!(zero(&gradients.a) && zero(gradients.c.as_slice()));
    }
    let shape = Shape { batch: 1, length: 0, cu_seqlens: Some(vec![0]), ..Shape::default() };
    let none = Case::<f32>::new(shape, &mut draw);
    assert!(forward(on, &none.inputs()).final_state.is_empty());
    assert!(zero(&backward(on, &none.inputs(), none.d_outputs()).a));
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
    as_the_reference(&[On::best()], 20);
}

pub fn as_the_reference(all: &[On], count: usize) {
    let (mut rng, seed) = seeded();
    for _ in 0..count {
        let mut draw = Draw::new(rng.random());
        let shape = Shape {
            batch: 3,
            length: draw.one_of(&[1, 2, 5]),
            d_state: draw.one_of(&[1, 5, 8, 40]),
            options: Options { delta_softplus: draw.flag(), reverse: false },
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
        for &on in all {
            let mut state = case.state.clone();
            let got = on.update(&inputs, ViewMut::new(&mut state, shape));
            let what = format!("{on:?}, {:?}, SEED={seed}", case.shape);
            assert_close(&got.out, &want.out, 1e-6, &what);
            assert_close(&got.token_states, &want.token_states, 1e-6, &what);
            let of_slot = shape[1] * shape[2];
            let last = |row: usize| &got.token_states[((row + 1) * case.shape.length - 1) * of_slot..][..of_slot];
            assert_eq!(bits(&state[2 * of_slot..]), bits(last(0)), "{what}: slot 2");
            assert_eq!(bits(&state[..of_slot]), bits(last(2)), "{what}: slot 0");
            assert_eq!(bits(&state[of_slot..2 * of_slot]), bits(&case.state[of_slot..2 * of_slot]), "{what}: slot 1");
        }
    }
}

/// Several tokens at once give the bits of one after another, in a pool of halves too; a rejected draft is rolled back;
/// and a sequence of updates is the sequence, but for the rounding of its states.
#[test]
fn tokens_at_once_are_tokens_one_by_one() {
    one_by_one(On::best());
}

pub fn one_by_one(on: On) {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let case = Case::<bf16>::new(Shape { length: 4, varying: [false; 2], ..Shape::default() }, &mut draw);
    let (shape, inputs) = (case.state_shape(), case.update_inputs());
    let pool: Vec<bf16> = case.state.iter().map(|x| bf16::from_f32(*x)).collect();
    let (mut at_once, mut one_by_one) = (pool.clone(), pool);
    let all = on.update(&inputs, ViewMut::new(&mut at_once, shape));
    for token in 0..4 {
        let part = |tensor: &crate::support::strided::Strided<bf16>| tensor.steps(token..token + 1);
        let (u, delta, z) = (part(&case.u), part(&case.delta), part(&case.z));
        let one = UpdateInputs { u: u.view(), delta: delta.view(), z: Some(z.view()), ..inputs };
        let mut out = [bf16::ZERO; 2 * 19];
        on.run_update(&one, UpdateMut::new(ViewMut::new(&mut one_by_one, shape), &mut out[..]));
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
    let out = on.update(&case.update_inputs(), ViewMut::new(&mut state, shape)).out;
    let want = reference::forward(&case.inputs()).unwrap();
    assert_close(&out, &want.out, 1e-5, &format!("SEED={seed}"));
    assert_close(&state, &want.final_state, 1e-5, &format!("SEED={seed}"));
}
