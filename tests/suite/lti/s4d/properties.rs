//! What holds of one problem beside another.

use half::bf16;
use rand::Rng;
use selective_scan::lti::s4d::{Inputs, Options, OutputGradients, OutputMut, cpu};
use selective_scan::{Element, View};

use super::case::{Case, Shape};
use super::device::{On, backward, forward, outputs};
use crate::support::draw::{Draw, seeded};
use crate::support::tolerance::{assert_close_to, bits};

/// Channels that are none of anything, and such that a GPU reads and writes eight at once.
const ANY_AND_WHOLE: [usize; 2] = [19, 16];

/// A packed sequence gives the bits of the same alone, forward and by its inputs and its state backward.
#[test]
fn packed_is_alone() {
    let (mut rng, _) = seeded();
    for _ in 0..10 {
        let isa = Draw::new(rng.random()).isa();
        packed_alone::<f32>(On::Processor(isa), 200);
    }
}

pub fn packed_alone<T: Element>(on: On, longest: usize) {
    let (mut rng, seed) = seeded();
    for d_inner in ANY_AND_WHOLE {
        let mut draw = Draw::new(rng.random());
        let cuts = vec![0, 17, 17, 18, 18 + longest, 151 + longest, 158 + longest];
        let options = Options { reverse: draw.flag(), ..Options::default() };
        let shape = Shape {
            batch: 1,
            length: 158 + longest,
            d_inner,
            cu_seqlens: Some(cuts.clone()),
            options,
            ..Shape::default()
        };
        let case = Case::<T>::new(shape, &mut draw);
        let (all, d_all) = (forward(on, &case), backward(on, &case));
        let states = 2 * case.shape.d_state * d_inner;
        for (i, pair) in cuts.windows(2).enumerate() {
            let part = Case::<T> {
                u: case.u.steps(pair[0]..pair[1]),
                d_out: case.d_out.steps(pair[0]..pair[1]),
                state: case.state[i * states..(i + 1) * states].to_vec(),
                d_state: case.d_state[i * states..(i + 1) * states].to_vec(),
                log_delta: case.log_delta.clone(),
                a: case.a.clone(),
                b: case.b.clone(),
                c: case.c.clone(),
                d: case.d.clone(),
                shape: Shape { length: pair[1] - pair[0], cu_seqlens: None, ..case.shape.clone() },
            };
            let (one, d_one) = (forward(on, &part), backward(on, &part));
            let steps = pair[0] * d_inner..pair[1] * d_inner;
            let state = i * states..(i + 1) * states;
            let what = format!("sequence {i}, {on:?}, SEED={seed}");
            assert_eq!(bits(&one.out), bits(&all.out[steps.clone()]), "{what}: out");
            assert_eq!(bits(&one.final_state), bits(&all.final_state[state.clone()]), "{what}: state");
            assert_eq!(bits(&d_one.u), bits(&d_all.u[steps]), "{what}: slope by u");
            let (one, all) = (d_one.initial_state.unwrap(), d_all.initial_state.as_ref().unwrap());
            assert_eq!(bits(&one), bits(&all[state]), "{what}: slope by the state");
        }
    }
}

/// A batch row gives the bits of the same alone.
#[test]
fn batched_is_alone() {
    batched_alone(On::best());
}

pub fn batched_alone(on: On) {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let case = Case::<bf16>::new(Shape { batch: 5, length: 150, with_state: false, ..Shape::default() }, &mut draw);
    let all = forward(on, &case);
    let size = case.shape.length * case.shape.d_inner;
    for row in 0..5 {
        let one = outputs(on, &Inputs { u: case.u.row(row).view(), ..case.inputs() });
        assert_eq!(bits(&one.out), bits(&all.out[row * size..(row + 1) * size]), "row {row}, SEED={seed}");
    }
}

/// Splitting anywhere is the whole: chunks of 16 steps begin elsewhere then, so that sums round elsewhere, by 1e-7 of
/// them.
#[test]
fn parts_are_the_whole() {
    parts_whole(On::best(), 10);
}

pub fn parts_whole(on: On, count: usize) {
    let (mut rng, seed) = seeded();
    for _ in 0..count {
        let mut draw = Draw::new(rng.random());
        let case = Case::<f32>::new(Shape { length: 400, ..Shape::default() }, &mut draw);
        let whole = forward(on, &case);
        let at = rng.random_range(0..=400);
        let inputs = case.inputs();
        let (first, second) = (case.u.steps(0..at), case.u.steps(at..400));
        let one = outputs(on, &Inputs { u: first.view(), ..inputs });
        let state = View::new(&one.final_state, [2, case.shape.d_inner, 2 * case.shape.d_state]);
        let two = outputs(on, &Inputs { u: second.view(), initial_state: Some(state), ..inputs });
        let d_inner = case.shape.d_inner;
        let mut out = Vec::new();
        for row in 0..2 {
            out.extend_from_slice(&one.out[row * at * d_inner..(row + 1) * at * d_inner]);
            out.extend_from_slice(&two.out[row * (400 - at) * d_inner..(row + 1) * (400 - at) * d_inner]);
        }
        let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        let what = format!("cut at {at}, SEED={seed}");
        // Both are within 1e-6 of the same; an output may be smaller than its terms, whose size is that of all outputs.
        assert_close_to(&out, &wide(&whole.out), 2e-6, 0.0, &what);
        assert_close_to(&two.final_state, &wide(&whole.final_state), 2e-6, 0.0, &what);
    }
}

/// Any number of threads gives the same bits, gradients of parameters too.
#[test]
fn threads_do_not_matter() {
    let (mut rng, _) = seeded();
    let mut draw = Draw::new(rng.random());
    let case = Case::<f32>::new(Shape { batch: 9, length: 700, d_inner: 50, ..Shape::default() }, &mut draw);
    let on = On::best();
    let results = [1, 3].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| (forward(on, &case), backward(on, &case)))
    });
    assert!(results[0] == results[1]);
}

/// What is not finite reaches later steps of its channel and sequence, and nothing else.
#[test]
fn what_is_not_finite_stays_where_it_belongs() {
    not_finite::<f32>(On::best(), 50);
}

/// Of a few steps, or of several tiles.
pub fn not_finite<T: Element>(on: On, length: usize) {
    let (mut rng, seed) = seeded();
    for (reverse, d_inner) in
        [false, true].into_iter().flat_map(|reverse| ANY_AND_WHOLE.map(|d_inner| (reverse, d_inner)))
    {
        let mut draw = Draw::new(rng.random());
        let options = Options { reverse, ..Options::default() };
        let shape = Shape { batch: 2, length, d_inner, options, ..Shape::default() };
        let mut case = Case::<T>::new(shape, &mut draw);
        let clean = (forward(on, &case), backward(on, &case));
        let (row, step, channel) = (1, rng.random_range(0..length), rng.random_range(0..d_inner));
        case.u.set([row, step, channel], f32::NAN);
        let got = forward(on, &case);
        for (i, (got, clean)) in got.out.iter().zip(&clean.0.out).enumerate() {
            let at = [i / (length * d_inner), i / d_inner % length, i % d_inner];
            let after = if reverse { at[1] <= step } else { at[1] >= step };
            let reached = at[0] == row && after && at[2] == channel;
            let what = format!("{at:?} of a NaN at {step}, reverse {reverse}, SEED={seed}");
            let (got, clean) = (got.to_f32(), clean.to_f32());
            assert!(if reached { got.is_nan() } else { got.to_bits() == clean.to_bits() }, "{what}: {got} {clean}");
        }
        case.u.set([row, step, channel], 0.5);
        case.d_out.set([row, step, channel], f32::NAN);
        let got = backward(on, &case);
        for (i, (got, clean)) in got.u.iter().zip(&clean.1.u).enumerate() {
            let at = [i / (length * d_inner), i / d_inner % length, i % d_inner];
            let before = if reverse { at[1] >= step } else { at[1] <= step };
            let reached = at[0] == row && before && at[2] == channel;
            let what = format!("{at:?} of a NaN slope at {step}, reverse {reverse}, SEED={seed}");
            let (got, clean) = (got.to_f32(), clean.to_f32());
            assert!(if reached { got.is_nan() } else { got.to_bits() == clean.to_bits() }, "{what}: {got} {clean}");
        }
    }
}

/// Nothing to do gives nothing, and the state as it was.
#[test]
fn empty_problems_keep_their_state() {
    empty(On::best());
    let (mut rng, _) = seeded();
    let case = Case::<f32>::new(Shape { length: 0, ..Shape::default() }, &mut Draw::new(rng.random()));
    // More rows than can be gone through.
    let u = View::new(&[0.0f32], [usize::MAX >> 8, 0, 19]);
    let inputs = Inputs { u, initial_state: None, ..case.inputs() };
    cpu::forward(&inputs, OutputMut::new(&mut [][..])).unwrap();
    // More channels than can be listed.
    let (one, many) = ([0.0f32], usize::MAX >> 8);
    let complex = View::new(&one, [many, 2]).with_layout(0, [0, 0]);
    let log_delta = View::new(&one, [many]).with_layout(0, [0]);
    let channels = Inputs::<f32>::new(View::new(&one, [2, 0, many]), log_delta, complex, complex, complex);
    cpu::forward(&channels, OutputMut::new(&mut [][..])).unwrap();
    let mut gradients = selective_scan::lti::s4d::Gradients::zeroed(&inputs).unwrap();
    cpu::backward(&inputs, OutputGradients::from(u), gradients.as_mut()).unwrap();
}

pub fn empty(on: On) {
    let (mut rng, _) = seeded();
    let mut draw = Draw::new(rng.random());
    let case = Case::<f32>::new(Shape { length: 0, ..Shape::default() }, &mut draw);
    let output = forward(on, &case);
    assert_eq!((output.out.len(), &output.final_state), (0, &case.state));
    let gradients = backward(on, &case);
    assert_eq!(gradients.initial_state.as_ref(), Some(&case.d_state));
    assert!(gradients.a.iter().chain(&gradients.log_delta).all(|x| *x == 0.0));
    let none = Case::<f32>::new(Shape { batch: 0, ..Shape::default() }, &mut draw);
    assert!(forward(on, &none).out.is_empty());
    assert!(backward(on, &none).c.iter().all(|x| *x == 0.0));
}
