//! Choosing the next token of each row of logits: greedy, or by probabilities that a temperature, top-k, top-p, min-p
//! and a penalty of repetitions have changed.
//!
//! # Meaning
//! For a row `x` of logits, of which the first `vocab_size` are tokens (columns from there on pad the vocabulary and are
//! never chosen), and the [`Settings`] of its sequence:
//!
//! ```text
//! y_v = x_v / ρ if x_v > 0, else x_v ρ        for tokens that have occurred (Keskar et al. 2019, arXiv 1909.05858)
//! y_v = x_v                                   for others
//! w_v = exp((y_v - max y) / τ)                τ the temperature
//! ```
//!
//! With a temperature of 0 the token is the one of the highest `y`, of several the first. Else tokens are put in order,
//! those of higher `y` first and of equal ones that of the lower index, and these are kept:
//!
//! 1. `top_k`: the first `k` of that order (Fan et al. 2018, arXiv 1805.04833);
//! 2. `top_p`: of what is left, the fewest, from the first on, whose weights come to at least `p` of the sum of all that
//!    is left (Holtzman et al. 2020, arXiv 1904.09751);
//! 3. `min_p`: of what is left, those with `w_v ≥ min_p`, that is, of at least `min_p` times the probability of the
//!    likeliest (Nguyen et al. 2024, arXiv 2407.01082).
//!
//! The order of the filters is that of Hugging Face's transformers. Of those that are kept a token is chosen with the
//! probability of its weight: the first, by index, at which the cumulative sum of weights passes `u` times their sum.
//! The uniform number `u` is [`random::uniform`] of the sequence's seed and position, so that a token does not depend
//! on who shares the batch.
//!
//! `y` is rounded to `f32`, and kept within the finite numbers where `x` is finite. Weights are whole multiples of
//! 2^-40, within a relative 2^-20 and the rounding of their exponent; a token of less than that is never chosen. They
//! are computed by the same roundings on processors and on GPUs, and summed exactly: **all devices choose the same
//! token**, in every run, however rows are batched.
//!
//! # What changes
//! The token is written, the position of its sequence goes up by one, and the token's bit is set among those that have
//! occurred, where there are any. [`mark`] sets the bits of a prompt. The logarithm of the token's probability, if it is
//! wanted, is that of the softmax of `x` over the vocabulary, which neither temperature, filters nor penalty have touched,
//! within 1e-5 (and a rounding of the result).
//!
//! A row of a negative slot is padding: nothing of it is read or written. A row with a logit that is NaN or +infinity,
//! with none that is above -infinity, or with settings that [`Settings::check`] refuses gets the token [`INVALID`] and
//! a log-probability of NaN, and nothing else of it changes. (Settings may lie on a device, where nobody has looked at
//! them.)
//!
//! ```
//! use selective_scan::View;
//! use selective_scan::sampling::{Inputs, Settings, StateMut};
//!
//! let logits = [0.0f32, 3.0, 1.0, 2.0, 2.0, 0.5];
//! let mut settings = [Settings::greedy(), Settings { top_k: 1, seed: 7, ..Settings::default() }];
//! let (mut tokens, mut log_probs) = ([0; 2], [0.0; 2]);
//! let state = StateMut { log_probs: Some(&mut log_probs), ..StateMut::new(&mut settings, &mut tokens) };
//! Inputs::new(View::new(&logits, [2, 3])).sample(state)?;
//! assert_eq!(tokens, [1, 0]);
//! assert_eq!(settings[1].position, 1);
//! // Softmax of 2, 2 and 0.5.
//! assert!((log_probs[1] + (2.0 + (-1.5f32).exp()).ln()).abs() < 1e-5);
//! # Ok::<(), selective_scan::Error>(())
//! ```
//!
//! [`cpu`] runs it on slices, [`reference`](mod@reference) is the same written plainly in `f64`.

#[cfg(feature = "candle")]
pub(crate) mod candle;
mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod random;
pub mod reference;
mod weights;

use bytemuck::{Pod, Zeroable};

use crate::{DeviceSlots, Error, Host, Memory, Result, Slots, View};

/// The token of a row that has none.
pub const INVALID: u32 = u32::MAX;

/// The most tokens that a vocabulary can have: the weights of as many stay below 2^64.
pub const MAX_VOCAB_SIZE: usize = 1 << 22;

/// How the tokens of a sequence are chosen. It is plain data: in device memory an array of these, one for each slot.
///
/// The default takes each token with the probability that the model gives it.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Settings {
    /// What the sequence's random numbers depend on, together with the position.
    pub seed: u64,
    /// The number of tokens chosen so far, which goes up by one with each.
    pub position: u64,
    /// Only the `k` likeliest tokens; 0 for all.
    pub top_k: u64,
    /// What logits are divided by, 0 or more: below 1 the likely become likelier, and 0 takes the likeliest.
    pub temperature: f32,
    /// Only the likeliest tokens that have this probability together: above 0 and at most 1, which is all.
    pub top_p: f32,
    /// Only tokens of at least this times the probability of the likeliest: from 0, which is all, to 1.
    pub min_p: f32,
    /// What the logits of tokens that have occurred are divided by (multiplied, if negative): above 0; 1 changes none.
    pub repetition_penalty: f32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { seed: 0, position: 0, top_k: 0, temperature: 1.0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

impl Settings {
    /// The likeliest token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks that tokens can be chosen by these numbers.
    ///
    /// # Errors
    /// A number that is out of its range or not finite, which the message names.
    pub fn check(&self) -> Result<()> {
        let &Self { temperature, top_p, min_p, repetition_penalty, .. } = self;
        if !(0.0..f32::INFINITY).contains(&temperature) {
            return Err(Error::argument("temperature", "a finite number, 0 or more", temperature));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::argument("top_p", "above 0 and at most 1", top_p));
        }
        if !(0.0..=1.0).contains(&min_p) {
            return Err(Error::argument("min_p", "from 0 to 1", min_p));
        }
        if !(repetition_penalty > 0.0 && repetition_penalty < f32::INFINITY) {
            return Err(Error::argument("repetition_penalty", "a finite number above 0", repetition_penalty));
        }
        Ok(())
    }
}

/// What tokens are chosen from.
pub struct Inputs<'a, M: Memory = Host> {
    /// `(rows, vocab)`. The logits of a row are neighbours in memory.
    pub logits: View<'a, f32, 2, M>,
    /// The tokens of the vocabulary, the first columns of the logits; columns from there on are padding.
    pub vocab_size: usize,
    /// The sequence of each row: where in the settings and among the bits what belongs to it lies. A negative one is
    /// padding.
    pub slots: Slots<'a, DeviceSlots<'a, M>>,
}

impl<M: Memory> Clone for Inputs<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M: Memory> Copy for Inputs<'_, M> {}

impl<'a, M: Memory> Inputs<'a, M> {
    /// All columns are tokens, and row `i` is of sequence `i`. Add what differs with struct update syntax:
    /// `Inputs { vocab_size: 50_277, ..Inputs::new(logits) }`.
    pub fn new(logits: View<'a, f32, 2, M>) -> Self {
        Self { logits, vocab_size: logits.shape[1], slots: Slots::Rows }
    }
}

/// What is read and brought up to date for each sequence, and where tokens are written.
#[derive(Debug)]
pub struct StateMut<'a> {
    /// `(sequences)`.
    pub settings: &'a mut [Settings],
    /// Bit `v % 32` of word `v / 32` of a sequence is set if token `v` has occurred: `(sequences, ⌈vocab / 32⌉)`.
    /// Without it none has, and penalties change nothing.
    pub occurred: Option<&'a mut [u32]>,
    /// `(sequences)`. Those that no row is of are left as they are.
    pub tokens: &'a mut [u32],
    /// `(sequences)`. Those that no row is of are left as they are.
    pub log_probs: Option<&'a mut [f32]>,
}

impl<'a> StateMut<'a> {
    /// Neither bits nor log-probabilities.
    pub fn new(settings: &'a mut [Settings], tokens: &'a mut [u32]) -> Self {
        Self { settings, occurred: None, tokens, log_probs: None }
    }
}

impl Inputs<'_> {
    /// Chooses the token of each row, on the CPU.
    ///
    /// # Errors
    /// An argument that does not fit. Nothing is written then.
    pub fn sample(&self, state: StateMut) -> Result<()> {
        cpu::sample(self, state)
    }
}

/// The words of bits that a sequence has, for logits of `vocab` columns.
pub const fn words(vocab: usize) -> usize {
    vocab.div_ceil(32)
}

/// Marks tokens of one sequence as such that have occurred, those of a prompt for instance. `occurred` are the bits of
/// that sequence.
///
/// # Errors
/// A token that there is no bit for. Nothing is written then.
pub fn mark(occurred: &mut [u32], tokens: &[u32]) -> Result<()> {
    if let Some(token) = tokens.iter().find(|&&token| token as usize / 32 >= occurred.len()) {
        let expected = format_args!("tokens below {}, of which there are bits", 32 * occurred.len()).to_string();
        return Err(Error::argument("tokens", expected, token));
    }
    for token in tokens {
        occurred[*token as usize / 32] |= 1 << (token % 32);
    }
    Ok(())
}
