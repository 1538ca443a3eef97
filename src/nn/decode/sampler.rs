//! Choosing the next token.

use candle_core::{DType, Result, Tensor};

use crate::View;
use crate::nn::argument;
use crate::sampling::{self, Settings};

/// How tokens are chosen. The default takes each with the probability that the model gives it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// What logits are divided by: below 1 the likely become likelier, and 0 takes the likeliest token (of several, the
    /// first).
    pub temperature: f64,
    /// Sample from the `k` most likely tokens only.
    pub top_k: Option<usize>,
    /// Only the likeliest tokens that reach this probability together (Holtzman et al. 2020, arXiv 1904.09751), of those
    /// that `top_k` leaves.
    pub top_p: Option<f64>,
    /// Only tokens below this: the vocabulary of a model whose logits are wider, see
    /// [`LanguageModelConfig::padded_vocab_size`](crate::nn::LanguageModelConfig::padded_vocab_size).
    pub vocab_size: Option<usize>,
    /// Where the random numbers begin.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: None, vocab_size: None, seed: 0 }
    }
}

impl Sampling {
    /// The likeliest token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }
}

/// Chooses tokens from logits on the host, as [`sampling`] does. One with the same seed makes the same
/// choices from the same logits.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    /// Random numbers that have been taken.
    taken: u64,
}

impl Sampler {
    /// # Errors
    /// A temperature that is below 0 or not finite, a `top_k` or `vocab_size` of 0, a `top_p` that is not above 0 and at
    /// most 1.
    pub fn new(sampling: Sampling) -> Result<Self> {
        let Sampling { temperature, top_k, top_p, vocab_size, .. } = sampling;
        if !(temperature >= 0.0 && temperature.is_finite()) {
            return Err(argument("temperature", "a finite number, 0 or more", temperature));
        }
        if top_k == Some(0) {
            return Err(argument("top_k", "at least 1", 0));
        }
        if vocab_size == Some(0) {
            return Err(argument("vocab_size", "at least 1", 0));
        }
        if let Some(p) = top_p
            && !(p > 0.0 && p <= 1.0)
        {
            return Err(argument("top_p", "above 0 and at most 1", p));
        }
        Ok(Self { sampling, taken: 0 })
    }

    /// The next token of each row of `logits`, `(batch, vocab_size)`. A row takes one random number, whatever it holds, or
    /// none if the temperature is 0.
    ///
    /// # Errors
    /// Logits that are NaN or positive infinity, or all negative infinity: they say nothing of what is likely. No random
    /// number is taken then.
    pub fn sample(&mut self, logits: &Tensor) -> Result<Vec<u32>> {
        let &[rows, vocab_size] = logits.dims() else {
            return Err(argument("logits", "shape (batch, vocab_size)", format_args!("{:?}", logits.dims())));
        };
        if rows == 0 {
            return Ok(Vec::new());
        }
        if vocab_size == 0 {
            return Err(argument("logits", "a token that is possible", "none"));
        }
        // Columns of padding stand last, and are no tokens.
        let tokens = self.sampling.vocab_size.unwrap_or(vocab_size).min(vocab_size);
        let logits = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        logits.chunks_exact(vocab_size).try_for_each(|row| check(&row[..tokens]))?;
        let Sampling { temperature, top_k, top_p, seed, .. } = self.sampling;
        let of_row = |row: usize| Settings {
            seed,
            position: self.taken + row as u64,
            // What is more than an f32 makes all tokens equally likely, and so does its greatest.
            temperature: temperature.min(f32::MAX.into()) as f32,
            top_k: top_k.map_or(0, |k| k as u64),
            top_p: top_p.map_or(1.0, |p| (p as f32).max(f32::MIN_POSITIVE)),
            ..Settings::default()
        };
        let (mut settings, mut chosen): (Vec<_>, _) = ((0..rows).map(of_row).collect(), vec![0; rows]);
        let inputs =
            sampling::Inputs { vocab_size: tokens, ..sampling::Inputs::new(View::new(&logits, [rows, vocab_size])) };
        inputs.sample(sampling::StateMut::new(&mut settings, &mut chosen))?;
        if temperature > 0.0 {
            self.taken += rows as u64;
        }
        Ok(chosen)
    }
}

/// Checks that a token can be chosen from a row.
fn check(logits: &[f32]) -> Result<()> {
    if let Some(logit) = logits.iter().find(|logit| logit.is_nan() || **logit == f32::INFINITY) {
        return Err(argument("logits", "finite numbers or negative infinity", logit));
    }
    match logits.iter().any(|logit| *logit > f32::NEG_INFINITY) {
        true => Ok(()),
        false => Err(argument("logits", "a token that is possible", "none")),
    }
}
