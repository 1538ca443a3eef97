//! The choice on the CPU: rows in parallel, each vectorised over its logits.
//!
//! Weights are whole numbers, so that neither the instruction set nor the number of threads changes a token. Where
//! top-k or top-p are on, the likeliest tokens are found by partial sorts, as few as they need.

use rayon::prelude::*;

use super::check::{Lens, Problem};
use super::{INVALID, Inputs, Settings, StateMut, random, weights};
use crate::Result;
use crate::shared::Shared;
use crate::simd::{Isa, Kernel, Lanes};

/// Chooses the token of each row, with the widest instructions of this processor, on the threads of the current rayon
/// pool.
///
/// # Errors
/// An argument that does not fit, see [`Inputs`] and [`StateMut`]. Nothing is written then.
pub fn sample(inputs: &Inputs, state: StateMut) -> Result<()> {
    sample_with(Isa::best(), inputs, state)
}

/// [`sample`] with the instruction set given (plain code if this processor does not have it).
///
/// # Errors
/// As [`sample`].
pub fn sample_with(isa: Isa, inputs: &Inputs, state: StateMut) -> Result<()> {
    let StateMut { settings, occurred, tokens, log_probs } = state;
    let lens = Lens {
        settings: settings.len(),
        occurred: occurred.as_ref().map(|words| words.len()),
        tokens: tokens.len(),
        log_probs: log_probs.as_ref().map(|values| values.len()),
    };
    let Problem { rows, vocab_size, words, offset, stride } = inputs.check(&lens)?;
    let (settings, occurred) = (Shared::new(settings), occurred.map(Shared::new));
    let (tokens, log_probs) = (Shared::new(tokens), log_probs.map(Shared::new));
    (0..rows).into_par_iter().for_each_init(Scratch::default, |scratch, row| {
        let Some(slot) = inputs.slots.get(row) else { return };
        let logits = &inputs.logits.data[offset + row * stride..][..vocab_size];
        // SAFETY (all): slots have been checked to differ, and this task alone has this one's.
        let settings = &mut unsafe { settings.part(slot..slot + 1) }[0];
        let mut bits = occurred.as_ref().map(|all| unsafe { all.part(slot * words..(slot + 1) * words) });
        let with_log_prob = log_probs.is_some();
        let chosen = isa.run(Choice { logits, settings, occurred: bits.as_deref(), with_log_prob, scratch });
        let to = unsafe { tokens.part(slot..slot + 1) };
        to[0] = chosen.map_or(INVALID, |(token, _)| token);
        if let Some(all) = &log_probs {
            let to = unsafe { all.part(slot..slot + 1) };
            to[0] = chosen.map_or(f32::NAN, |(_, log_prob)| log_prob);
        }
        if let Some((token, _)) = chosen {
            settings.position = settings.position.wrapping_add(1);
            if let Some(bits) = &mut bits {
                bits[token as usize / 32] |= 1 << (token % 32);
            }
        }
    });
    Ok(())
}

/// What a thread works on.
#[derive(Default)]
struct Scratch {
    /// Penalised logits, and their weights.
    y: Vec<f32>,
    weights: Vec<u64>,
    order: Vec<u64>,
}

/// One row, which gives its token with its log-probability (zero unless it is wanted), or nothing.
struct Choice<'a> {
    logits: &'a [f32],
    settings: &'a Settings,
    /// The bits of the sequence.
    occurred: Option<&'a [u32]>,
    with_log_prob: bool,
    scratch: &'a mut Scratch,
}

impl Kernel for Choice<'_> {
    type Output = Option<(u32, f32)>;

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) -> Self::Output {
        let Self { logits, settings, occurred, with_log_prob, scratch: Scratch { y, weights, order } } = self;
        let most = highest(logits);
        if settings.check().is_err() || !most.is_finite() {
            return None;
        }
        y.clear();
        y.extend_from_slice(logits);
        if let Some(words) = occurred.filter(|_| settings.repetition_penalty != 1.0) {
            penalise(y, words, settings.repetition_penalty);
        }
        let highest_y = highest(y);
        let token = if settings.temperature == 0.0 {
            y.iter().position(|y| *y == highest_y)?
        } else {
            weigh(y, highest_y, weights::scale(settings.temperature), weights);
            choose(y, weights, settings, order)?
        };
        let mut log_prob = 0.0;
        if with_log_prob {
            weigh(logits, most, std::f32::consts::LOG2_E, weights);
            let total = sum(weights) as f64 / weights::ONE as f64;
            log_prob = (f64::from(logits[token]) - f64::from(most) - total.ln()) as f32;
        }
        Some((token as u32, log_prob))
    }
}

/// The highest logit; not finite if there is one that is NaN or infinite, or if all are negative infinity.
#[inline(always)]
fn highest(logits: &[f32]) -> f32 {
    // In lanes of their own, so that the compiler need not keep an order.
    let (mut most, mut odd) = ([f32::NEG_INFINITY; 16], [false; 16]);
    let (blocks, rest) = logits.as_chunks::<16>();
    for block in blocks {
        for i in 0..16 {
            most[i] = if block[i] > most[i] { block[i] } else { most[i] };
            odd[i] |= block[i].is_nan();
        }
    }
    for (i, &x) in rest.iter().enumerate() {
        most[i] = if x > most[i] { x } else { most[i] };
        odd[i] |= x.is_nan();
    }
    if odd.contains(&true) { f32::NAN } else { most.iter().copied().fold(f32::NEG_INFINITY, f32::max) }
}

/// Penalises the logits of tokens whose bits are set.
fn penalise(y: &mut [f32], words: &[u32], penalty: f32) {
    for (y, &word) in y.chunks_mut(32).zip(words) {
        let mut left = word;
        while left != 0 {
            if let Some(y) = y.get_mut(left.trailing_zeros() as usize) {
                *y = weights::penalised(*y, penalty);
            }
            left &= left - 1;
        }
    }
}

/// The weights of logits, by their distance from the highest.
#[inline(always)]
fn weigh(y: &[f32], highest: f32, scale: f32, weights: &mut Vec<u64>) {
    weights.resize(y.len(), 0);
    for (weight, y) in weights.iter_mut().zip(y) {
        *weight = weights::weight((y - highest) * scale);
    }
}

#[inline(always)]
fn sum(weights: &[u64]) -> u64 {
    weights.iter().sum()
}

/// The token that the sequence's random number falls on.
#[inline(always)]
fn choose(y: &[f32], weights: &[u64], settings: &Settings, order: &mut Vec<u64>) -> Option<usize> {
    let last = last_kept(y, weights, settings, order);
    let least = weights::least_weight(settings.min_p);
    let kept = |v: usize| if weights[v] >= least && place(y, v) <= last { weights[v] } else { 0 };
    let total = if last == u64::MAX && least == 0 { sum(weights) } else { (0..y.len()).map(kept).sum() };
    let target = weights::target(random::uniform(settings.seed, settings.position), total);
    let mut sum = 0;
    (0..y.len()).find(|&v| {
        sum += kept(v);
        sum > target
    })
}

/// A number that is lower for what comes first: tokens of higher logits and, of equal ones, that of the lower index.
#[inline(always)]
fn place(y: &[f32], v: usize) -> u64 {
    u64::from(!weights::key(y[v])) << 32 | v as u64
}

/// The place of the last token that top-k and top-p keep; the greatest number if neither is on.
fn last_kept(y: &[f32], weights: &[u64], settings: &Settings, order: &mut Vec<u64>) -> u64 {
    let count = usize::try_from(settings.top_k).unwrap_or(usize::MAX);
    let (with_k, with_p) = (count > 0 && count < y.len(), settings.top_p < 1.0);
    if !with_k && !with_p {
        return u64::MAX;
    }
    order.clear();
    order.extend((0..y.len()).map(|v| place(y, v)));
    if with_k {
        order.select_nth_unstable(count - 1);
        order.truncate(count);
    }
    if !with_p {
        return order[count - 1];
    }
    let weight = |place: u64| weights[place as u32 as usize];
    let least = weights::nucleus(settings.top_p, order.iter().map(|&place| weight(place)).sum());
    // As many as have the weight together, or up to four times as many, are put in order.
    let (mut sorted, mut before, mut count) = (0, 0, 64);
    loop {
        let part = &mut order[sorted..];
        let most = count.min(part.len());
        if most < part.len() {
            part.select_nth_unstable(most - 1);
        }
        let part = &mut part[..most];
        let sum: u64 = part.iter().map(|&place| weight(place)).sum();
        if before + sum >= least {
            part.sort_unstable();
            for &place in &*part {
                before += weight(place);
                if before >= least {
                    return place;
                }
            }
        }
        (sorted, before, count) = (sorted + most, before + sum, 4 * count);
    }
}
