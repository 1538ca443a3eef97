//! How results are compared.

use selective_scan::{DType, Element};

/// `‖ours - exact‖ / ‖exact‖`; infinite where that is not a number.
pub fn error(ours: &[f64], exact: &[f64]) -> f64 {
    assert_eq!(ours.len(), exact.len());
    let difference: f64 = ours.iter().zip(exact).map(|(x, y)| (x - y) * (x - y)).sum();
    let norm: f64 = exact.iter().map(|x| x * x).sum();
    match (difference / norm).sqrt() {
        _ if difference == 0.0 => 0.0,
        ratio if ratio.is_finite() => ratio,
        _ => f64::INFINITY,
    }
}

/// Asserts that the norm of the error is at most `tolerance` times the norm of what is wanted, and for a half type twice
/// what rounding the wanted values to it gives besides.
#[track_caller]
pub fn assert_close<T: Element>(got: &[T], want: &[f64], tolerance: f64, what: &str) {
    assert_close_to(got, want, tolerance, 0.0, what);
}

/// The same for sums that may cancel: where what is wanted is smaller than `terms`, the norm of what is summed, the error may
/// be `tolerance` times that.
#[track_caller]
pub fn assert_close_to<T: Element>(got: &[T], want: &[f64], tolerance: f64, terms: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: the number of elements");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(want).map(|(got, want)| f64::from(got.to_f32()) - want));
    let rounding = match T::DTYPE {
        DType::F32 => 0.0,
        _ => norm(&mut want.iter().map(|want| f64::from(T::from_f32(*want as f32).to_f32()) - want)),
    };
    let size = norm(&mut want.iter().copied()).max(terms);
    assert!(
        error <= tolerance * size + 2.0 * rounding,
        "{what}: error {error:e}, rounding {rounding:e}, norm {size:e}"
    );
}

/// The bits of a tensor, which unlike its values compare equal for NaN.
pub fn bits<T: Element>(values: &[T]) -> Vec<u32> {
    values.iter().map(|x| x.to_f32().to_bits()).collect()
}
