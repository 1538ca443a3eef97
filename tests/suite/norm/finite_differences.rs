//! The reference's gradients against differences of the reference's outputs.

use selective_scan::norm::{Options, reference};

use super::{Case, matrix};
use crate::support::draw::{Draw, seeded};
use crate::support::strided::Strided;

type Plain = Case<f32, f32, f32>;

/// `Σ out·d_out + Σ residual_out·d_residual_out`, whose gradient the backward pass gives.
fn loss(case: &Plain) -> f64 {
    let output = reference::forward(&case.inputs()).expect("the case is valid");
    let dot =
        |x: &[f64], y: &Strided<f32>| x.iter().zip(y.dense().values()).map(|(x, &y)| x * f64::from(y)).sum::<f64>();
    let of_sum = case.d_residual_out.as_ref().map_or(0.0, |d| dot(&output.residual_out, d));
    dot(&output.out, &case.d_out) + of_sum
}

/// Compares derivatives with the fourth-order difference over `±h` and `±2h`.
///
/// The sum is kept away from zero by an eps of 0.1, so that a fifth derivative is at most some 0.1^-3 of the value; with
/// h = 2^-8 the difference is off by h^4/30 of that, 1e-8, and by rounding 1e-16/h. 1e-6 of the largest gradient leaves room
/// for both.
fn check(case: &Plain, name: &str, derivatives: &[f64], element: impl Fn(&mut Plain, usize) -> &mut f32) {
    let h = 2f32.powi(-8);
    let scale = derivatives.iter().fold(1e-3f64, |largest, x| largest.max(x.abs()));
    for (i, derivative) in derivatives.iter().enumerate() {
        let at = |steps: f32| {
            let mut moved = case.clone();
            *element(&mut moved, i) += steps * h;
            loss(&moved)
        };
        let difference = (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * f64::from(h));
        let error = (difference - derivative).abs();
        assert!(error <= 1e-6 * scale, "{name}[{i}]: {derivative} by the chain rule, {difference} by differences");
    }
}

#[test]
fn reference_gradients() {
    let (rows, width) = (3, 6);
    let (_, seed) = seeded();
    println!("SEED={seed}");
    let draw = &mut Draw::new(seed);
    let (mut gates, mut residuals) = (0, 0);
    for round in 0..48 {
        let mut case = Plain::draw(draw, rows, width);
        // All combinations of a gate, its place and groups.
        let has = |bit: usize| round >> bit & 1 == 1;
        case.options = Options { eps: 0.1, group_size: has(0).then_some(2), norm_before_gate: has(1) };
        case.z = case.z.filter(|_| has(2));
        // On a grid of 2^-12, so that moving by multiples of 2^-8 is exact in f32.
        let on_grid = |tensor: &Strided<f32>| {
            let mut tensor = tensor.dense();
            tensor.data.iter_mut().for_each(|x| *x = (*x * 4096.0).round() / 4096.0);
            tensor
        };
        let x = on_grid(&case.x);
        case.x = x;
        case.residual = case.residual.as_ref().map(on_grid);
        case.z = case.z.as_ref().map(on_grid);
        if let Some(weight) = &mut case.weight {
            weight.iter_mut().for_each(|x| *x = (*x * 4096.0).round() / 4096.0);
        }
        // The sums are exact in f32 too.
        let inputs = case.inputs();
        let sums: Vec<f32> = (0..rows * width)
            .map(|i| {
                let at = |tensor: &Strided<f32>| tensor.values()[i];
                at(&case.x) + case.residual.as_ref().map_or(0.0, at)
            })
            .collect();
        assert_eq!(inputs.x.shape, matrix(&case.x).shape);
        let gradients = reference::backward(&case.backward_inputs(&sums)).expect("the case is valid");
        check(&case, "x", &gradients.x, |case, i| &mut case.x.data[i]);
        if case.residual.is_some() {
            residuals += 1;
            check(&case, "residual", &gradients.residual, |case, i| {
                &mut case.residual.as_mut().expect("it is").data[i]
            });
        }
        if case.weight.is_some() {
            check(&case, "weight", &gradients.weight, |case, i| &mut case.weight.as_mut().expect("it is")[i]);
        }
        if let Some(z) = &gradients.z {
            gates += 1;
            check(&case, "z", z, |case, i| &mut case.z.as_mut().expect("it is").data[i]);
        }
    }
    // One round in four and in two; less than one in a million runs has none.
    assert!(gates > 0 && residuals > 0);
}
