//! Exponentials and the functions made of them, on vectors.
//!
//! The coefficients are minimax polynomials found by Remez' exchange (`tests/vectors/minimax.py` prints them). The
//! errors stated here are swept over the whole range of `f32` by the tests below.

use super::Lanes;

/// A decay `2^y = (1 + w)·2^k` in parts, with `k` an integer.
///
/// Multiplying by it as `(x + w·x)·2^k` rounds once. A decay rounded to one `f32` is as exact in a single step but not in
/// many: near 1 its own rounding, up to 2^-25 and always the same for a constant step size, is multiplied in at every step,
/// and after 65,536 of them the state is wrong in the third digit.
#[derive(Clone, Copy)]
pub(crate) struct Decay<V> {
    pub w: V,
    pub k: V,
}

impl<V: Copy> Decay<V> {
    /// `2^y` for any `y`. The error of `w` is at most 2^-23 beside 1 and 2^-20 beside `w`, and vanishes with `y`.
    #[inline(always)]
    pub fn exp2<S: Lanes<f32s = V>>(simd: S, y: V) -> Self {
        let (k, f) = simd.split(y);
        let w =
            simd.mul_f32s(f, polynomial(simd, f, [LN_2, 0.240_222_9, 0.055_505_637, 0.009_669_283, 0.001_329_834_7]));
        Self { w, k }
    }

    /// `2^y·x`, however small `2^y`: beside a decay near zero, `1 + (2^y - 1)` would be off by 2^-25 of `x`.
    #[inline(always)]
    pub fn apply<S: Lanes<f32s = V>>(self, simd: S, x: V) -> V {
        simd.scale(simd.fma(self.w, x, x), self.k)
    }

    /// `2^y`, rounded once.
    #[inline(always)]
    pub fn value<S: Lanes<f32s = V>>(self, simd: S) -> V {
        simd.scale(simd.add_f32s(self.w, simd.splat_f32s(1.0)), self.k)
    }

    /// `2^y - 1` without cancellation for small `y`; not a number where `2^y` is infinite.
    #[inline(always)]
    pub fn minus_one<S: Lanes<f32s = V>>(self, simd: S) -> V {
        let power = self.power(simd);
        simd.fma(power, self.w, simd.sub_f32s(power, simd.splat_f32s(1.0)))
    }

    /// `2^k`.
    #[inline(always)]
    pub fn power<S: Lanes<f32s = V>>(self, simd: S) -> V {
        simd.exp2_integer(self.k)
    }
}

const LN_2: f32 = std::f32::consts::LN_2;

/// `1/a` for [`hold_weight`]: zero where `a` is too small to divide by, and never zero where it is not.
#[inline(always)]
pub(crate) fn hold_inverse(a: f32) -> f32 {
    // Below this, (exp(Δa) - 1)/a is Δ to more digits than an f32 has.
    const TINY: f32 = 1e-30;
    match a.abs() {
        size if size < TINY => 0.0,
        f32::INFINITY => f32::MIN_POSITIVE.copysign(a),
        _ => 1.0 / a,
    }
}

/// `(exp(Δa) - 1)/a`, what zero-order hold multiplies the input by; Δ where `a` is as good as zero.
#[inline(always)]
pub(crate) fn hold_weight<S: Lanes>(simd: S, decay_minus_one: S::f32s, inverse_a: S::f32s, delta: S::f32s) -> S::f32s {
    let vanishes = simd.equal_f32s(inverse_a, simd.splat_f32s(0.0));
    simd.select_f32s(vanishes, delta, simd.mul_f32s(decay_minus_one, inverse_a))
}

/// Horner's scheme, the constant coefficient first.
#[inline(always)]
pub(crate) fn polynomial<S: Lanes, const K: usize>(simd: S, x: S::f32s, c: [f32; K]) -> S::f32s {
    let mut sum = simd.splat_f32s(c[K - 1]);
    for i in (0..K - 1).rev() {
        sum = simd.fma(sum, x, simd.splat_f32s(c[i]));
    }
    sum
}

/// The same polynomial in a shorter chain of dependent operations, for code that waits for results rather than for units.
#[inline(always)]
fn polynomial_by_pairs<S: Lanes, const K: usize>(simd: S, x: S::f32s, c: [f32; K]) -> S::f32s {
    let square = simd.mul_f32s(x, x);
    let pair = |i: usize| match c.get(i + 1) {
        Some(&next) => simd.fma(simd.splat_f32s(next), x, simd.splat_f32s(c[i])),
        None => simd.splat_f32s(c[i]),
    };
    let mut sum = pair((K - 1) / 2 * 2);
    for i in (0..(K - 1) / 2).rev() {
        sum = simd.fma(sum, square, pair(2 * i));
    }
    sum
}

/// `e^x` within a relative 2^-22; zero (with AVX-512, subnormal) below e^-87.3, infinite above e^88.3.
#[inline(always)]
pub(crate) fn exp<S: Lanes>(simd: S, x: S::f32s) -> S::f32s {
    // ln(2) = HIGH + LOW, where HIGH has so few digits that its product with any k is exact (Cody and Waite).
    const HIGH: f32 = 355.0 / 512.0;
    const LOW: f32 = -2.121_944_4e-4;
    let x = simd.clamp(x, -104.0, 89.0);
    let (k, _) = simd.split(simd.mul_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E)));
    let minus_k = simd.neg_f32s(k);
    let r = simd.fma(minus_k, simd.splat_f32s(HIGH), x);
    let r = simd.fma(minus_k, simd.splat_f32s(LOW), r);
    let c = [1.0, 1.0, 0.49999994, 0.166_665_23, 0.041_668_35, 0.008_368_578, 0.001_381_579_1];
    simd.scale(polynomial_by_pairs(simd, r, c), k)
}

/// `ln(1 + e)` for `e` from 0 to 1 within a relative 2^-22, by `2 atanh(e/(2 + e))`.
#[inline(always)]
fn ln_1p<S: Lanes>(simd: S, e: S::f32s) -> S::f32s {
    let s = simd.mul_f32s(e, simd.reciprocal(simd.add_f32s(e, simd.splat_f32s(2.0))));
    let square = simd.mul_f32s(s, s);
    let c = [2.0, 0.666_663_17, 0.400_249_1, 0.279_606, 0.281_783_34];
    simd.mul_f32s(s, polynomial_by_pairs(simd, square, c))
}

/// `ln(1 + e^x)` within a relative 2^-21. Above 20 this is the identity to the last bit, as Mamba has it,
/// because what is added there is less than half a unit in the last place.
#[inline(always)]
pub(crate) fn softplus<S: Lanes>(simd: S, x: S::f32s) -> S::f32s {
    let rest = ln_1p(simd, exp(simd, simd.neg_f32s(simd.abs_f32s(x))));
    simd.add_f32s(simd.max_f32s(simd.splat_f32s(0.0), x), rest)
}

/// `1/(1 + e^-x)` within a relative 2^-21 where `x > -88`, and zero below.
#[inline(always)]
pub(crate) fn sigmoid<S: Lanes>(simd: S, x: S::f32s) -> S::f32s {
    // e^87 keeps the reciprocal normal; beyond, the result would be below 2^-125.
    let x = simd.clamp(x, -87.0, f32::INFINITY);
    simd.reciprocal(simd.add_f32s(simd.splat_f32s(1.0), exp(simd, simd.neg_f32s(x))))
}

/// `x·sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu<S: Lanes>(simd: S, x: S::f32s) -> S::f32s {
    simd.mul_f32s(x, sigmoid(simd, x))
}

/// `(silu(x), silu'(x))`, where `silu'(x) = s·(1 + x·(1 - s))` with `s = sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu_grad<S: Lanes>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let one = simd.splat_f32s(1.0);
    let s = sigmoid(simd, x);
    let slope = simd.fma(x, simd.sub_f32s(one, s), one);
    (simd.mul_f32s(x, s), simd.mul_f32s(s, slope))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use crate::simd::{BLOCK, Isa, Kernel, Row};

    /// One function applied to a row.
    struct Apply<'t>(&'t mut Row, Function);

    #[derive(Clone, Copy, Debug)]
    enum Function {
        Exp,
        Softplus,
        Sigmoid,
        Silu,
        SiluSlope,
        /// `2^y` applied to 1.
        Decay,
        DecayMinusOne,
    }

    impl Kernel for Apply<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) {
            for x in self.0.vectors_mut::<S>() {
                *x = match self.1 {
                    Function::Exp => exp(simd, *x),
                    Function::Softplus => softplus(simd, *x),
                    Function::Sigmoid => sigmoid(simd, *x),
                    Function::Silu => silu(simd, *x),
                    Function::SiluSlope => silu_grad(simd, *x).1,
                    Function::Decay => Decay::exp2(simd, *x).apply(simd, simd.splat_f32s(1.0)),
                    Function::DecayMinusOne => Decay::exp2(simd, *x).minus_one(simd),
                };
            }
        }
    }

    /// The largest error over floats of every exponent and sign, about 17 million of them, beside `scale(exact)`.
    fn sweep(function: Function, exact: impl Fn(f64) -> f64, scale: impl Fn(f64, f64) -> f64) -> f64 {
        // A prime, so that the low bits of the mantissa take all values too.
        const STEP: usize = if cfg!(miri) { 16_777_213 } else { 251 };
        let (mut worst, mut place) = (0.0f64, String::new());
        for isa in Isa::available() {
            let mut bits = (0..=u32::MAX).step_by(STEP);
            loop {
                let inputs: Vec<f32> = bits.by_ref().take(BLOCK).map(f32::from_bits).collect();
                let Some(&last) = inputs.last() else { break };
                let mut row = Row([last; BLOCK]);
                row.0[..inputs.len()].copy_from_slice(&inputs);
                isa.run(Apply(&mut row, function));
                for (x, got) in inputs.into_iter().zip(row.0) {
                    let exact = exact(x.into());
                    if exact.is_nan() {
                        assert!(got.is_nan() || !x.is_nan(), "{isa:?} {function:?}({x}) = {got}");
                    } else if exact.abs() > f64::from(f32::MAX) * 0.5 {
                        // Near the end of the range the result may already be infinite.
                        assert!(got.abs() >= f32::MAX * 0.5, "{isa:?} {function:?}({x}) = {got}");
                    } else {
                        // Below the normal numbers some instruction sets give zero.
                        let error = (f64::from(got) - exact).abs() - f64::from(f32::MIN_POSITIVE);
                        let error = error.max(0.0) / scale(x.into(), exact);
                        assert!(!got.is_nan(), "{isa:?} {function:?}({x}) is {exact}");
                        if error > worst {
                            (worst, place) = (error, format!("{isa:?} at {x}: {got} for {exact}"));
                        }
                    }
                }
            }
        }
        println!("{function:?}: 2^{:.2}, {place}", worst.log2());
        worst
    }

    fn relative(_: f64, exact: f64) -> f64 {
        exact.abs()
    }

    const fn ulps(n: u32) -> f64 {
        n as f64 / (1u64 << 24) as f64
    }

    #[test]
    fn exponential() {
        assert!(sweep(Function::Exp, f64::exp, relative) <= ulps(4));
    }

    #[test]
    fn softplus_and_its_identity_above_20() {
        let exact = |x: f64| if x > 20.0 { x } else { x.exp().ln_1p() };
        assert!(sweep(Function::Softplus, exact, relative) <= ulps(8));
    }

    #[test]
    fn sigmoid_and_silu() {
        // Below -87 the exponential is held where its reciprocal is normal, and what is left is below 2^-119.
        let held = |exact: f64| exact.abs().max(2f64.powi(-119) / ulps(8));
        let scale = |x: f64, exact: f64| if x < -87.0 { held(exact) } else { exact.abs() };
        assert!(sweep(Function::Sigmoid, reference::sigmoid, scale) <= ulps(8));
        // x·sigmoid(x), so x times that; an x without bound is not held to anything.
        let scale = |x: f64, exact: f64| if x < -87.0 { held(exact) * x.abs() } else { exact.abs() };
        assert!(sweep(Function::Silu, reference::silu, scale) <= ulps(10));
        // The slope is zero near -1.28, where the error can only be small beside the terms that cancel.
        let scale = |x: f64, exact: f64| if x < -87.0 { held(exact) * x.abs() } else { exact.abs().max(0.1) };
        assert!(sweep(Function::SiluSlope, reference::silu_slope, scale) <= ulps(32));
    }

    #[test]
    fn decays() {
        assert!(sweep(Function::Decay, f64::exp2, relative) <= ulps(4));
        // Beside itself however small: this is what long memory rests on.
        let exact = |y: f64| if y > 127.0 { f64::NAN } else { (y * std::f64::consts::LN_2).exp_m1() };
        assert!(sweep(Function::DecayMinusOne, exact, relative) <= ulps(16));
    }
}
