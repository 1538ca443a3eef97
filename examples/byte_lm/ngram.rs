//! The baseline: an n-gram model of bytes with interpolated Kneser-Ney smoothing (Chen and Goodman 1998, section 2.7).

use std::collections::HashMap;

use crate::data::MARK;

/// A model of the next byte given the `order` bytes before it.
///
/// With h the last k bytes and b the next one,
///
/// ```text
/// p(b | h) = max(c(h b) - D, 0) / c(h) + D t(h) / c(h) · p(b | h without its first byte)
/// ```
///
/// where c counts, t(h) is the number of different bytes seen after h, and D is the discount of k, n1 / (n1 + 2 n2) with
/// n1 and n2 the numbers of h b that were counted once and twice. For k = `order`, c counts occurrences; below, the
/// different bytes before h b. Behind a history that was never seen, the shorter one decides alone; below the empty history
/// all 256 bytes are equally likely.
pub struct Ngram {
    /// From the empty history to the longest.
    levels: Vec<Level>,
}

/// Histories of one length. The bytes of a key are those of the history, the oldest first; a history that begins before its
/// piece has marks there.
#[derive(Default)]
struct Level {
    /// c(h b), by h b.
    counts: HashMap<u64, u32>,
    /// c(h) and t(h), by h.
    histories: HashMap<u64, (u32, u32)>,
    discount: f64,
}

/// The last `length` bytes.
fn last(bytes: u64, length: usize) -> u64 {
    bytes & ((1 << (8 * length)) - 1)
}

impl Ngram {
    /// Longer histories would not fit the keys.
    pub const HIGHEST_ORDER: usize = 6;

    /// A model of pieces of text that lie one after another with a mark before each.
    pub fn new(text: &[u8], order: usize) -> Self {
        assert!(order <= Self::HIGHEST_ORDER, "histories of {order} bytes");
        let mut counts: HashMap<u64, u32> = HashMap::new();
        each_byte(text, |history, byte| {
            *counts.entry(last(history << 8 | u64::from(byte), order + 1)).or_default() += 1;
        });
        let mut levels = Vec::new();
        for length in (0..=order).rev() {
            let mut shorter: HashMap<u64, u32> = HashMap::new();
            for &key in counts.keys() {
                *shorter.entry(last(key, length)).or_default() += 1;
            }
            levels.push(Level::new(counts));
            counts = shorter;
        }
        levels.reverse();
        Self { levels }
    }

    /// The probability of `byte` after the bytes of `history`, the last of which is the lowest.
    pub fn probability(&self, history: u64, byte: u8) -> f64 {
        self.levels.iter().enumerate().fold(1.0 / 256.0, |shorter, (length, level)| {
            let history = last(history, length);
            let Some(&(total, types)) = level.histories.get(&history) else {
                return shorter;
            };
            let count = level.counts.get(&(history << 8 | u64::from(byte))).map_or(0.0, |&count| f64::from(count));
            let left_over = level.discount * f64::from(types);
            ((count - level.discount).max(0.0) + left_over * shorter) / f64::from(total)
        })
    }

    /// Bits per byte of pieces of text, each of which begins with a mark.
    pub fn bits_per_byte(&self, pieces: &[Vec<u8>]) -> f64 {
        let (mut bits, mut bytes) = (0.0, 0);
        for piece in pieces {
            each_byte(piece, |history, byte| {
                bits -= self.probability(history, byte).log2();
                bytes += 1;
            });
        }
        bits / f64::from(bytes)
    }
}

impl Level {
    fn new(counts: HashMap<u64, u32>) -> Self {
        let mut histories: HashMap<u64, (u32, u32)> = HashMap::new();
        let (mut once, mut twice) = (0.0, 0.0);
        for (key, &count) in &counts {
            let (total, types) = histories.entry(key >> 8).or_default();
            *total += count;
            *types += 1;
            once += f64::from(u8::from(count == 1));
            twice += f64::from(u8::from(count == 2));
        }
        // Where nothing was seen once, as in a text of few bytes, something must be left for the unseen nonetheless.
        let discount = if once > 0.0 { once / (once + 2.0 * twice) } else { 0.5 };
        Self { counts, histories, discount }
    }
}

/// Calls `f` with each byte of text and the seven before it, marks where the piece has not begun.
fn each_byte(text: &[u8], mut f: impl FnMut(u64, u8)) {
    let mut history = 0;
    for &byte in text {
        if byte == MARK {
            history = 0;
        } else {
            f(history, byte);
            history = history << 8 | u64::from(byte);
        }
    }
}
