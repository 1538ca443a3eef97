//! Exponentials and the functions made of them, on vectors.
//!
//! The coefficients are minimax polynomials found by Remez' exchange (`tests/vectors/minimax.py` prints them). The
//! errors stated here are swept over the whole range of `f32` by the tests below.

use super::Lanes;

/// A decay `2^y = (1 + w)·2^k` in parts, with `k` an integer.
///
/// Multiplying by it as `(x + w·x)·2^k` rounds once. A decay rounded to one `f32` would be as exact in a single step but
/// not in many: near 1 its own rounding, up to 2^-25 and always the same for a constant step size, is multiplied in at
/// every step, and after 65,536 of them the state is wrong in the third digit.
#[derive(Clone, Copy)]
pub(crate) struct Decay<V> {
    pub w: V,
    pub k: V,
}

impl<V: Copy> Decay<V> {
    /// `2^y` for any `y`. The error of `w` is at most 2^-23 beside 1, and 2^-22 beside `w` for tiny `y`.
    #[inline(always)]
    pub fn exp2<S: Lanes<f32s = V>>(simd: S, y: V) -> Self {
        let (k, f) = simd.split(y);
        let w =
            simd.mul_f32s(f, polynomial(simd, f, [LN_2, 0.240_222_9, 0.055_505_637, 0.009_669_283, 0.001_329_834_7]));
        Self { w, k }
    }

    /// `2^y·x`.
    #[inline(always)]
    pub fn apply<S: Lanes<f32s = V>>(self, simd: S, x: V) -> V {
        simd.scale(simd.fma(self.w, x, x), self.k)
    }

    /// `2^y - 1` without cancellation for small `y`.
    #[inline(always)]
    pub fn minus_one<S: Lanes<f32s = V>>(self, simd: S) -> V {
        let power = simd.exp2_integer(self.k);
        simd.fma(power, self.w, simd.sub_f32s(power, simd.splat_f32s(1.0)))
    }
}

const LN_2: f32 = std::f32::consts::LN_2;

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
    // log2(e) = LOG2_E + LOW: one rounded factor would cost as many bits of the fraction as x has before the point.
    const LOW: f32 = 1.925_963e-8;
    let x = simd.clamp(x, -104.0, 89.0);
    let log2_e = simd.splat_f32s(std::f32::consts::LOG2_E);
    let (k, _) = simd.split(simd.mul_f32s(x, log2_e));
    let f = simd.fma(x, log2_e, simd.neg_f32s(k));
    let f = simd.fma(x, simd.splat_f32s(LOW), f);
    let c = [1.0, LN_2, 0.240_226_48, 0.055_503_63, 0.009_618_518, 0.001_338_995, 0.000_153_224_61];
    simd.scale(polynomial_by_pairs(simd, f, c), k)
}

/// `ln(1 + e)` for `e` from 0 to 1 within a relative 2^-22, by `2 atanh(e/(2 + e))`.
#[inline(always)]
fn ln_1p<S: Lanes>(simd: S, e: S::f32s) -> S::f32s {
    let s = simd.mul_f32s(e, simd.reciprocal(simd.add_f32s(e, simd.splat_f32s(2.0))));
    let square = simd.mul_f32s(s, s);
    let c = [2.0, 0.666_663_17, 0.400_249_1, 0.279_606, 0.281_783_34];
    simd.mul_f32s(s, polynomial_by_pairs(simd, square, c))
}

/// `ln(1 + e^x)` within a relative 2^-21. Above 20 this is the identity to the last bit, as §2.1 of Mamba's reference
/// code asks, because what is added there is less than half a unit in the last place.
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
