//! The arithmetic that processors and GPUs share, bit for bit. `kernels/sampling/weights.cuh` is the same in C++; what
//! one changes, the other must.
//!
//! Products and sums are rounded one by one here (no fused ones, which not all processors have), and weights are whole
//! numbers, whose sums are the same in any order.

/// The weight of the likeliest token. All of [`MAX_VOCAB_SIZE`](super::MAX_VOCAB_SIZE) tokens together stay below 2^64.
pub(super) const ONE: u64 = 1 << 40;

/// 1.5·2^23: adding it leaves no bits for a fraction.
const MAGIC: f32 = 12_582_912.0;

/// (2^f - 1)/f on [-0.5, 0.5], see `simd::math`.
const POWERS: [f32; 5] = [std::f32::consts::LN_2, 0.240_222_9, 0.055_505_637, 0.009_669_283, 0.001_329_834_7];

/// 2^t·[`ONE`] for a t that is at most 0: within a relative 2^-20, and rounded down.
#[inline(always)]
pub(super) fn weight(t: f32) -> u64 {
    // From 2^-41 on all are zero.
    let t = t.max(-60.0);
    let shifted = t + MAGIC;
    let whole = shifted - MAGIC;
    let f = t - whole;
    let mut sum = POWERS[4];
    for i in (0..4).rev() {
        sum = sum * f + POWERS[i];
    }
    let power = 1.0 + sum * f;
    // From 0.7 to 1.42, so that the product fits 31 bits.
    let fixed = (power * (1u32 << 30) as f32) as i32;
    let down = MAGIC.to_bits().wrapping_sub(shifted.to_bits());
    (fixed as u64) << 10 >> (down & 63)
}

/// What distances from the highest logit are multiplied by: log2(e) over the temperature.
#[inline(always)]
pub(super) fn scale(temperature: f32) -> f32 {
    // Finite, so that a distance of zero stays zero.
    (std::f32::consts::LOG2_E / temperature).min(f32::MAX)
}

/// A logit after the penalty of a token that has occurred. What is finite stays so.
#[inline(always)]
pub(super) fn penalised(x: f32, penalty: f32) -> f32 {
    let y = if x > 0.0 { x / penalty } else { x * penalty };
    if x == f32::NEG_INFINITY { x } else { y.clamp(-f32::MAX, f32::MAX) }
}

/// A number that is greater for a greater logit, and the same for 0 and -0.
#[inline(always)]
pub(super) fn key(y: f32) -> u32 {
    let bits = (y + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// The least sum of weights that the likeliest tokens must have by `top_p`, of `total` for all.
pub(super) fn nucleus(top_p: f32, total: u64) -> u64 {
    let part = (top_p * 4_294_967_296.0) as u64;
    (((u128::from(part) * u128::from(total)) >> 32) as u64).max(1)
}

/// The least weight of a token by `min_p`.
pub(super) fn least_weight(min_p: f32) -> u64 {
    (min_p * ONE as f32) as u64
}

/// Where the cumulative sum of weights must pass, of `total` for all.
pub(super) fn target(random: u64, total: u64) -> u64 {
    ((u128::from(random) * u128::from(total)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The error of the polynomial, 2^-20 of its part beside 1, and a rounding of the power and of the product.
    #[test]
    fn weights_are_powers_of_two() {
        for i in 0..2_000_000 {
            let t = -(i as f32) * 2.1e-5;
            let exact = f64::from(t).exp2() * ONE as f64;
            let error = (weight(t) as f64 - exact).abs();
            assert!(error <= exact * 2f64.powi(-20) + 1.0, "{} for {exact} at {t}", weight(t));
        }
        assert_eq!([0.0, -0.0, -1.0, -40.0].map(weight), [ONE, ONE, ONE / 2, 1]);
        assert_eq!([-41.5, -1e9, f32::MIN, f32::NEG_INFINITY].map(weight), [0; 4]);
    }

    #[test]
    fn keys_have_the_order_of_logits() {
        let logits = [f32::NEG_INFINITY, f32::MIN, -1.0, -1e-45, 0.0, 1e-45, 1.0, f32::MAX];
        assert!(logits.map(key).is_sorted_by(|a, b| a < b));
        assert_eq!(key(-0.0), key(0.0));
    }

    #[test]
    fn penalties_keep_what_is_finite() {
        let of = |x| [penalised(x, 2.0), penalised(x, 1e-30)];
        assert_eq!(of(3.0), [1.5, 3.0 / 1e-30]);
        assert_eq!(of(-3.0), [-6.0, -3.0 * 1e-30]);
        assert_eq!(of(3e38), [1.5e38, f32::MAX]);
        assert_eq!(of(-3e38)[0], f32::MIN);
        assert_eq!(of(f32::NEG_INFINITY), [f32::NEG_INFINITY; 2]);
    }
}
