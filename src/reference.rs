//! The functions that the `f64` references share.

use crate::Discretization;

/// What multiplies `B u` in one step of the discretized system.
pub(crate) fn input_weight(discretization: Discretization, delta: f64, a: f64) -> f64 {
    match discretization {
        Discretization::Euler => delta,
        // The limit for A → 0 is Δ.
        Discretization::ZeroOrderHold if a == 0.0 => delta,
        Discretization::ZeroOrderHold => (delta * a).exp_m1() / a,
    }
}

/// `ln(1 + e^x)`, the identity above 20, and its derivative.
pub(crate) fn softplus(x: f64) -> (f64, f64) {
    if x > 20.0 { (x, 1.0) } else { (x.exp().ln_1p(), sigmoid(x)) }
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub(crate) fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

/// The derivative of [`silu`].
pub(crate) fn silu_slope(x: f64) -> f64 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}
