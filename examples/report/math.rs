//! Exponential, softplus and SiLU for the plain code that the operators are compared with, written so that compilers
//! vectorise them: a comparison with scalar library calls would flatter the operators.

use std::f32::consts::{LN_2, LOG2_E};

/// `e^x` within some 2^-22, at least 2^-126.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // x log2(e) = k + f with |f| <= 1/2: adding 1.5·2^23 leaves no bits for a fraction.
    const MAGIC: f32 = 12_582_912.0;
    let y = (x * LOG2_E).clamp(-126.0, 127.0);
    let k = (y + MAGIC) - MAGIC;
    let f = (y - k) * LN_2;
    let taylor = [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let power = taylor.into_iter().fold(1.0 / 720.0, |sum, coefficient| sum * f + coefficient);
    power * f32::from_bits((k + (MAGIC + 127.0)).to_bits() << 23)
}

/// `ln(1 + e^x)`.
#[inline(always)]
pub fn softplus(x: f32) -> f32 {
    let e = exp(x);
    // 1 + e = m 2^k with m in [3/4, 3/2). While k is 0, m - 1 is e itself, which keeps the digits of a small e.
    let bits = (1.0 + e).to_bits();
    let exponent = bits.wrapping_sub(0.75f32.to_bits()) & 0xff80_0000;
    let k = (exponent as i32 >> 23) as f32;
    let excess = if exponent == 0 { e } else { f32::from_bits(bits.wrapping_sub(exponent)) - 1.0 };
    // ln m = 2 artanh(s), s = (m - 1)/(m + 1)
    let s = excess / (2.0 + excess);
    let s2 = s * s;
    let series = [1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0].into_iter().fold(1.0 / 9.0, |sum, term| sum * s2 + term);
    let log = k * LN_2 + 2.0 * s * series;
    if x > 20.0 { x } else { log }
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}
