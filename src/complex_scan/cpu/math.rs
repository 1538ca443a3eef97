//! Exponentials of complex numbers for the channels of a block, in `f64`.
//!
//! There is no branch in the loops over channels, so that the compiler makes vectors of them.

// The reductions and polynomials are those that are in use since fdlibm: a multiple of ln 2 or of π/2 is taken off in two or
// three parts whose products with it are exact, and what is left is at most ln 2/2 or π/4.

/// Channels in a block.
pub(super) const LANES: usize = 8;

/// One number for each channel of a block.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Wide(pub [f64; LANES]);

impl Wide {
    pub const ZERO: Self = Self([0.0; LANES]);
}

/// A complex number for each channel of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct WideNumber {
    pub re: Wide,
    pub im: Wide,
}

impl WideNumber {
    pub const ZERO: Self = Self { re: Wide::ZERO, im: Wide::ZERO };
}

/// Adding it leaves no bits for a fraction, and the integer in the lowest ones.
const ROUND: f64 = 6_755_399_441_055_744.0;

/// `e^x`.
#[inline(always)]
pub(super) fn exp(x: &Wide) -> Wide {
    const LN_2: [f64; 2] = [6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10];
    Wide(x.0.map(|x| {
        // Beyond these it is infinite or zero. NaN stays.
        let x = if x > 720.0 { 720.0 } else { x };
        let x = if x < -760.0 { -760.0 } else { x };
        let rounded = x * std::f64::consts::LOG2_E + ROUND;
        let k = rounded - ROUND;
        let r = (x - k * LN_2[0]) - k * LN_2[1];
        // Σ r^n/n! to n = 13: the next term is 2^-58.
        let mut sum = 1.0 / 6_227_020_800.0;
        for factorial in
            [479_001_600.0, 39_916_800.0, 3_628_800.0, 362_880.0, 40_320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0]
        {
            sum = sum * r + 1.0 / factorial;
        }
        let sum = (sum * r + 1.0) * r + 1.0;
        // 2^k in two halves, each of which is normal.
        let k = (rounded.to_bits() as i64).wrapping_sub(ROUND.to_bits() as i64);
        let half = k >> 1;
        let power = |k: i64| f64::from_bits((k.wrapping_add(1023) as u64) << 52);
        sum * power(half) * power(k.wrapping_sub(half))
    }))
}

/// The angle below which a sine needs no more than three parts of π/2.
const LARGEST: f64 = 5e5;

/// `sin x` and `cos x`.
#[inline(always)]
pub(super) fn sin_cos(x: &Wide) -> (Wide, Wide) {
    if x.0.iter().any(|x| x.abs() > LARGEST || x.is_nan()) {
        return (Wide(x.0.map(f64::sin)), Wide(x.0.map(f64::cos)));
    }
    // π/2 in parts of 33 bits each, and the rest.
    const PARTS: [f64; 3] = [1.570_796_326_734_125_6, 6.077_100_506_303_966e-11, 2.022_266_248_795_950_6e-21];
    let (mut sines, mut cosines) = (Wide::ZERO, Wide::ZERO);
    for ((x, sine), cosine) in x.0.iter().zip(&mut sines.0).zip(&mut cosines.0) {
        let rounded = x * std::f64::consts::FRAC_2_PI + ROUND;
        let n = rounded - ROUND;
        let r = ((x - n * PARTS[0]) - n * PARTS[1]) - n * PARTS[2];
        let z = r * r;
        let mut sin = 1.589_690_995_211_55e-10;
        for c in [
            -2.505_076_025_340_686_3e-8,
            2.755_731_370_707_006_8e-6,
            -1.984_126_982_985_795e-4,
            8.333_333_333_322_49e-3,
            -1.666_666_666_666_663_2e-1,
        ] {
            sin = sin * z + c;
        }
        let sin = r + r * z * sin;
        let mut cos = -1.135_964_755_778_819_5e-11;
        for c in [
            2.087_572_321_298_175e-9,
            -2.755_731_435_139_066_3e-7,
            2.480_158_728_947_673e-5,
            -1.388_888_888_887_411e-3,
            4.166_666_666_666_66e-2,
        ] {
            cos = cos * z + c;
        }
        let cos = 1.0 - 0.5 * z + z * z * cos;
        let quarter = rounded.to_bits();
        let (first, second) = if quarter & 1 == 0 { (sin, cos) } else { (cos, sin) };
        *sine = if quarter & 2 == 0 { first } else { -first };
        *cosine = if quarter.wrapping_add(1) & 2 == 0 { second } else { -second };
    }
    (sines, cosines)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Within a few of the last digits of the library's, which are within one of the truth.
    #[test]
    fn as_the_library() {
        let mut x = -800.0;
        while x < 800.0 {
            let got = exp(&Wide([x; LANES])).0[0];
            let want = x.exp();
            let close = (got - want).abs() <= 4e-16 * want || (want < 1e-300 && got < 1e-299);
            assert!(close || got == want, "e^{x}: {got} {want}");
            let angle = x * 613.7;
            let (sin, cos) = sin_cos(&Wide([angle; LANES]));
            assert!((sin.0[0] - angle.sin()).abs() < 4e-16, "sin {angle}: {} {}", sin.0[0], angle.sin());
            assert!((cos.0[0] - angle.cos()).abs() < 4e-16, "cos {angle}: {} {}", cos.0[0], angle.cos());
            x += 0.0371;
        }
        for (x, want) in [(f64::INFINITY, f64::INFINITY), (f64::NEG_INFINITY, 0.0), (0.0, 1.0)] {
            assert_eq!(exp(&Wide([x; LANES])).0[0], want);
        }
        assert!(exp(&Wide([f64::NAN; LANES])).0[0].is_nan());
        assert!(sin_cos(&Wide([f64::INFINITY; LANES])).0.0[0].is_nan());
        assert_eq!(sin_cos(&Wide([1e9; LANES])).0.0[0], 1e9f64.sin());
    }
}
