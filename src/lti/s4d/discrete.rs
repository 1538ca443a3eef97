//! One channel's parameters and what becomes of them with its step size, in `f64`, and the way back.

use num_complex::Complex64;

use super::check::Problem;
use crate::lti::Rule;
use crate::lti::complex::{exp_m1_over, exp_m1_over_slope};
use crate::lti::system::discretize_number;
use crate::{Element, View};

/// A pair's parameters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    pub a: Complex64,
    pub b: Complex64,
    pub c: Complex64,
}

/// What becomes of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Discrete {
    /// `Ā`.
    pub a: Complex64,
    /// `B̄`.
    pub b: Complex64,
    pub c: Complex64,
}

/// Slopes of a loss by complex numbers, as `∂/∂Re + i ∂/∂Im`: where `y = w x`, the slope by `x` is that by `y` times
/// `w̄`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Slopes {
    pub a: Complex64,
    pub b: Complex64,
    pub c: Complex64,
    /// By the logarithm of the step size.
    pub log_delta: f64,
}

/// The number of two neighbours.
pub(super) fn complex(view: &View<f32, 2>, channel: usize, n: usize) -> Complex64 {
    Complex64::new(view.at([channel, 2 * n]).into(), view.at([channel, 2 * n + 1]).into())
}

impl<T: Element> Problem<'_, T> {
    /// The step size of a channel.
    pub(super) fn delta(&self, channel: usize) -> f64 {
        f64::from(self.inputs.log_delta.at([channel])).exp()
    }

    pub(super) fn pair(&self, channel: usize, n: usize) -> Pair {
        let read = |view| complex(view, channel, n);
        Pair { a: read(&self.inputs.a), b: read(&self.inputs.b), c: read(&self.inputs.c) }
    }
}

impl Pair {
    pub fn discretize(&self, delta: f64, rule: Rule) -> Discrete {
        let (a, weight) = discretize_number(self.a, delta, rule);
        Discrete { a, b: weight * self.b, c: self.c }
    }

    /// The slopes by the parameters, from those by what becomes of them.
    pub fn backward(&self, delta: f64, rule: Rule, d: &Slopes) -> Slopes {
        let z = self.a * delta;
        // Of Ā and of the weight of B: the slopes by A and by Δ.
        let (weight, a_by_a, a_by_delta, weight_by_a, weight_by_delta) = match rule {
            Rule::ZeroOrderHold => {
                let power = z.exp();
                let by_a = exp_m1_over_slope(z) * delta * delta;
                (exp_m1_over(z) * delta, power * delta, power * self.a, by_a, power)
            }
            Rule::Bilinear => {
                let inverse = (Complex64::ONE - z * 0.5).inv();
                let square = inverse * inverse;
                (inverse * delta, square * delta, square * self.a, square * (0.5 * delta * delta), square)
            }
            Rule::Euler => (Complex64::from(delta), Complex64::from(delta), self.a, Complex64::ZERO, Complex64::ONE),
        };
        let d_weight = d.b * self.b.conj();
        let d_delta = d.a * a_by_delta.conj() + d_weight * weight_by_delta.conj();
        Slopes {
            a: d.a * a_by_a.conj() + d_weight * weight_by_a.conj(),
            b: d.b * weight.conj(),
            c: d.c,
            // Δ is real, and the slope by its logarithm is Δ times that by itself.
            log_delta: d_delta.re * delta,
        }
    }
}
