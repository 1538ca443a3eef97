//! Against the reference in `f64`, and the reference against differences.
//!
//! An output is a sum of up to `2 N + 16` products in `f32`, each rounded to 2^-24 of the sum so far, of factors that
//! are rounded as often: 1e-6 of the terms for 8 pairs, 2e-6 for 32, of which the crate's promise of 1e-5 leaves room.
//! The terms may cancel, so that the scale is not the sum alone.

use half::{bf16, f16};
use selective_scan::lti::s4d::reference;
use selective_scan::{Element, Isa};

use super::case::{Case, Shape};
use super::device::{On, backward, forward};
use crate::support::draw::{Draw, seeded};
use crate::support::tolerance::assert_close_to;
use crate::support::vectors::{FORWARD, GRADIENTS};
use rand::Rng;

/// All results of the reference by name.
fn reference<T: Element>(case: &Case<T>) -> Vec<(&'static str, Vec<f64>)> {
    let output = reference::forward(&case.inputs()).unwrap();
    let gradients = reference::backward(&case.inputs(), case.d_outputs()).unwrap();
    let mut all = vec![("final_state", output.final_state), ("log_delta", gradients.log_delta)];
    all.extend([("a", gradients.a), ("b", gradients.b), ("c", gradients.c)]);
    all.extend(gradients.d.map(|d| ("d", d)));
    all.extend(gradients.initial_state.map(|state| ("initial_state", state)));
    all.extend([("out", output.out), ("u", gradients.u)]);
    all
}

/// Holds the fast path to the reference. The scale of each result is its norm, or that of the same problem with other
/// signs.
pub fn hold<T: Element>(on: On, case: &Case<T>, draw: &mut Draw, what: &str) {
    let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
    let want = reference(case);
    // Below 2^-126 an f32 has fewer digits, and none below 2^-149.
    let mut sizes = vec![1e-30f64; want.len()];
    // Of long sequences the many results do not all cancel.
    for _ in 0..if case.shape.length > 2000 { 0 } else { 3 } {
        for (size, (_, other)) in sizes.iter_mut().zip(reference(&case.with_other_signs(draw))) {
            *size = size.max(norm(&other));
        }
    }
    // A step size enters as ΔA and ΔB alone: the slope by its logarithm is the real part of a sum over the pairs of A times the
    // slope by A, which is large where memory is long, and B times the slope by B, which is of the size of the square root of the
    // number of steps.
    let complex = |x: &[f64]| x.as_chunks().0.iter().map(|[re, im]| re.hypot(*im)).collect::<Vec<f64>>();
    let mut terms = Vec::new();
    for (name, values) in [("a", &case.a), ("b", &case.b)] {
        let slopes = want.iter().find(|(of, _)| *of == name).map_or(Vec::new(), |(_, slopes)| complex(slopes));
        let values = complex(&values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>());
        terms.extend(values.iter().zip(slopes).map(|(x, slope)| x * slope));
    }
    for (size, (name, _)) in sizes.iter_mut().zip(&want) {
        if *name == "log_delta" {
            *size = size.max(norm(&terms));
        }
    }
    let (output, gradients) = (forward(on, case), backward(on, case));
    let mut got: Vec<&[f32]> =
        vec![&output.final_state, &gradients.log_delta, &gradients.a, &gradients.b, &gradients.c];
    got.extend(gradients.d.as_deref());
    got.extend(gradients.initial_state.as_deref());
    for (i, (name, want)) in want.iter().enumerate() {
        let what = format!("{what}, {on:?}, {:?}: {name}", case.shape);
        match *name {
            "out" => assert_close_to(&output.out, want, FORWARD, sizes[i], &what),
            "u" => assert_close_to(&gradients.u, want, GRADIENTS, sizes[i], &what),
            "final_state" => assert_close_to(got[i], want, on.state_tolerance(T::DTYPE), sizes[i], &what),
            _ => assert_close_to(got[i], want, GRADIENTS, sizes[i], &what),
        }
    }
}

#[test]
fn small_problems_are_exact() {
    let (mut rng, seed) = seeded();
    for _ in 0..40 {
        let mut draw = Draw::new(rng.random());
        let shape = Shape::draw(&mut draw);
        for isa in Isa::available() {
            let case = Case::<f32>::new(shape.clone(), &mut draw);
            hold(On::Processor(isa), &case, &mut draw, &format!("SEED={seed}"));
        }
        let isa = draw.isa();
        let case = Case::<bf16>::new(shape.clone(), &mut draw);
        hold(On::Processor(isa), &case, &mut draw, &format!("SEED={seed}"));
        let case = Case::<f16>::new(shape, &mut draw);
        hold(On::Processor(isa), &case, &mut draw, &format!("SEED={seed}"));
    }
}

/// As in training: S4D's step sizes, 32 pairs.
#[test]
fn a_usual_problem_is_exact() {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let shape = Shape { length: 1024, d_inner: 16, d_state: 32, fastest: 100.0, ..Shape::default() };
    for isa in Isa::available() {
        let case = Case::<f32>::new(shape.clone(), &mut draw);
        hold(On::Processor(isa), &case, &mut draw, &format!("SEED={seed}"));
    }
}

/// States that forget 1e-6 of themselves at a step, and angles that come to 1e5 turns: 65,536 steps of them.
#[test]
fn long_memory_loses_nothing() {
    let (mut rng, seed) = seeded();
    for fastest in [0.0, 10.0, 300.0] {
        let mut draw = Draw::new(rng.random());
        let shape = Shape {
            batch: 1,
            length: 65_536,
            d_inner: 2,
            d_state: 3,
            delta: [0.05, 0.1],
            decay: [1e-5, 2e-5],
            fastest: fastest + 1e-9,
            ..Shape::default()
        };
        let case = Case::<f32>::new(shape, &mut draw);
        hold(On::best(), &case, &mut draw, &format!("SEED={seed}"));
    }
}

#[test]
fn a_million_steps_lose_nothing() {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let shape = Shape {
        batch: 1,
        length: 1 << 20,
        d_inner: 1,
        d_state: 2,
        delta: [0.05, 0.1],
        decay: [1e-6, 1e-5],
        fastest: 100.0,
        ..Shape::default()
    };
    let case = Case::<f32>::new(shape, &mut draw);
    hold(On::best(), &case, &mut draw, &format!("SEED={seed}"));
}

/// What decays to nothing within a step, by ZOH and by the bilinear rule, which turns it over instead.
#[test]
fn strong_decay_is_exact() {
    let (mut rng, seed) = seeded();
    for rule in [selective_scan::lti::Rule::ZeroOrderHold, selective_scan::lti::Rule::Bilinear] {
        let mut draw = Draw::new(rng.random());
        let mut shape = Shape { length: 70, delta: [0.5, 1.0], decay: [200.0, 1e4], ..Shape::default() };
        shape.options.rule = rule;
        let case = Case::<f32>::new(shape, &mut draw);
        hold(On::best(), &case, &mut draw, &format!("SEED={seed}"));
    }
}

/// The reference's slopes against differences of its results: a loss is linear in the outputs, with the slopes that
/// flow in.
#[test]
fn the_reference_is_differentiated_rightly() {
    let (mut rng, seed) = seeded();
    for rule in [selective_scan::lti::Rule::ZeroOrderHold, selective_scan::lti::Rule::Bilinear] {
        let mut draw = Draw::new(rng.random());
        let mut shape = Shape { batch: 1, length: 9, d_inner: 2, d_state: 2, fastest: 20.0, ..Shape::default() };
        shape.options.rule = rule;
        shape.options.reverse = draw.flag();
        let mut case = Case::<f32>::new(shape, &mut draw);
        let want = reference::backward(&case.inputs(), case.d_outputs()).unwrap();
        let loss = |case: &Case<f32>| {
            let output = reference::forward(&case.inputs()).unwrap();
            let of =
                |values: &[f64], slopes: &[f32]| values.iter().zip(slopes).map(|(x, d)| x * f64::from(*d)).sum::<f64>();
            of(&output.out, &case.d_out.data) + of(&output.final_state, &case.d_state)
        };
        type Of = fn(&mut Case<f32>) -> &mut Vec<f32>;
        let checked: [(&str, Of, &[f64]); 7] = [
            ("u", |case| &mut case.u.data, &want.u),
            ("log_delta", |case| &mut case.log_delta, &want.log_delta),
            ("a", |case| &mut case.a, &want.a),
            ("b", |case| &mut case.b, &want.b),
            ("c", |case| &mut case.c, &want.c),
            ("d", |case| &mut case.d, want.d.as_deref().unwrap()),
            ("initial_state", |case| &mut case.state, want.initial_state.as_deref().unwrap()),
        ];
        for (name, of, want) in checked {
            for (i, want) in want.iter().enumerate() {
                let at = of(&mut case)[i];
                // The parameters are f32: the difference is what they have become, about 2^-11.
                let (high, low) = (at + 4.9e-4, at - 4.9e-4);
                of(&mut case)[i] = high;
                let above = loss(&case);
                of(&mut case)[i] = low;
                let below = loss(&case);
                of(&mut case)[i] = at;
                let got = (above - below) / (f64::from(high) - f64::from(low));
                // A third derivative of up to (9 steps · 2 rad)³ times 2^-22/6.
                assert!(
                    (got - want).abs() <= 1e-3 * (1.0 + want.abs()),
                    "{rule:?}, {name} {i}: {want} {got}, SEED={seed}"
                );
            }
        }
    }
}
