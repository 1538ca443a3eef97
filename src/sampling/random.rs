//! Random numbers by counting: Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
//!
//! The generator has no state: a number is a function of a key and a counter. A sequence therefore has the same numbers
//! whatever else is drawn beside it, and its text can be taken up at any position.

/// What the words of a counter are multiplied by, and what is added to those of the key from one round to the next.
const MULTIPLIERS: [u64; 2] = [0xd251_1f53, 0xcd9e_8d57];
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];
const ROUNDS: usize = 10;

/// Four random words of a counter and a key.
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut a, mut b, mut c, mut d], mut key) = (counter, key);
    for round in 0..ROUNDS {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let products = [MULTIPLIERS[0] * u64::from(a), MULTIPLIERS[1] * u64::from(c)];
        let [high0, high1] = products.map(|product| (product >> 32) as u32);
        let [low0, low1] = products.map(|product| product as u32);
        [a, b, c, d] = [high1 ^ b ^ key[0], low1, high0 ^ d ^ key[1], low0];
    }
    [a, b, c, d]
}

/// The random number with which a sequence of this seed chooses its token at this position, as 64 bits: over 2^64 it is
/// uniform from 0 to 1. It is the first two words (the lower first) of the counter `(position, 0)` under the key
/// `seed`.
pub fn uniform(seed: u64, position: u64) -> u64 {
    let words = |x: u64| [x as u32, (x >> 32) as u32];
    let [low, high] = words(position);
    let [a, b, ..] = philox4x32_10([low, high, 0, 0], words(seed));
    u64::from(b) << 32 | u64::from(a)
}
