//! The reference's gradients against differences of the reference's outputs.

use selective_scan::scan;

use super::case::{Case, Flags, Shape};
use crate::support::draw::seeded;

/// `Σ out·d_out + Σ final_state·d_final_state`, whose gradient the backward pass gives.
fn loss(case: &Case<f32>) -> f64 {
    let output = scan::reference::forward(&case.inputs()).expect("the case is valid");
    let dot = |x: &[f64], y: &[f32]| x.iter().zip(y).map(|(x, &y)| x * f64::from(y)).sum::<f64>();
    let d_out = case.d_out.dense();
    let of_states = if case.flags.d_final_state { dot(&output.final_state, &case.d_final_state) } else { 0.0 };
    dot(&output.out, d_out.values()) + of_states
}

/// Compares one element's derivative with the fourth-order difference over `±h` and `±2h`.
///
/// With h = 2^-8 and inputs of order 1 the difference is off by about h^4·f⁗/30, 1e-11 of a fifth derivative that A = -3
/// makes a few hundred, and by rounding 1e-16/h: 1e-6 of the largest gradient leaves room for both.
fn check(case: &Case<f32>, name: &str, scale: f64, index: usize, derivative: f64, set: impl Fn(&mut Case<f32>, f32)) {
    let h = 2f32.powi(-8);
    let at = |steps: f32| {
        let mut moved = case.clone();
        set(&mut moved, steps * h);
        loss(&moved)
    };
    let difference = (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * f64::from(h));
    let error = (difference - derivative).abs();
    assert!(error <= 1e-6 * scale, "{name}[{index}]: {derivative} by the chain rule, {difference} by differences");
}

#[test]
fn reference_gradients() {
    let (mut rng, seed) = seeded();
    println!("SEED={seed}");
    for row in 0..16 {
        // The grouped layouts have 6 channels in 3 groups.
        let shape = Shape { batch: 2, len: 5, d_inner: 6, d_state: 3 };
        let mut case = Case::<f32>::new(&mut rng, shape, Flags::pairwise(row));
        // Inputs on a grid of 2^-12, so that moving them by multiples of 2^-8 is exact in f32.
        case.for_each(|x| *x = (*x * 4096.0).round() / 4096.0);
        let gradients = case.reference();
        for tensor in &gradients.0[2..] {
            let scale = tensor.values.iter().fold(1e-3f64, |largest, x| largest.max(x.abs()));
            for (i, &derivative) in tensor.values.iter().enumerate() {
                check(&case, tensor.name, scale, i, derivative, |case, step| *case.element(tensor.name, i) += step);
            }
        }
    }
}
