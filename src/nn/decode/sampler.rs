//! Choosing the next token.

use candle_core::{DType, Result, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::nn::argument;

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

/// Chooses tokens from logits. One with the same seed makes the same choices from the same logits.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    random: StdRng,
}

impl Sampler {
    /// # Errors
    /// A temperature that is below 0 or not finite, a `top_k` or `vocab_size` of 0, a `top_p` that is not above 0 and at
    /// most 1.
    pub fn new(sampling: Sampling) -> Result<Self> {
        let Sampling { temperature, top_k, top_p, vocab_size, seed } = sampling;
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
        Ok(Self { sampling, random: StdRng::seed_from_u64(seed) })
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
        let rows = logits.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        // Rows of padding stand last, and are no tokens.
        let tokens = self.sampling.vocab_size.unwrap_or(vocab_size).min(vocab_size);
        let rows: Vec<_> = rows.iter().map(|row| &row[..tokens]).collect();
        let likeliest: Vec<_> = rows.iter().map(|row| likeliest(row)).collect::<Result<_>>()?;
        Ok(rows.iter().zip(likeliest).map(|(row, best)| self.choose(row, best)).collect())
    }

    /// A token of one row, of which `best` is the likeliest.
    fn choose(&mut self, logits: &[f32], best: usize) -> u32 {
        let Sampling { temperature, top_k, top_p, .. } = self.sampling;
        if temperature == 0.0 {
            return best as u32;
        }
        let highest = logits[best];
        // exp of the distance to the highest: a token of that weight is 1, and none overflows.
        let weight = |logit: f32| ((f64::from(logit) - f64::from(highest)) / temperature).exp();
        let mut tokens: Vec<_> = logits.iter().enumerate().map(|(token, &logit)| (token, weight(logit))).collect();
        if top_k.is_some() || top_p.is_some() {
            // By logits, as a high temperature makes weights equal that are not. Of equally likely tokens the first comes
            // first, here too; -0 and 0 are equally likely, which `total_cmp` alone would not say.
            let key = |token: usize| logits[token] + 0.0;
            tokens.sort_by(|&(a, _), &(b, _)| key(b).total_cmp(&key(a)));
            tokens.truncate(top_k.unwrap_or(usize::MAX));
        }
        let mut total: f64 = tokens.iter().map(|(_, weight)| weight).sum();
        if let Some(p) = top_p {
            let (mut kept, mut sum) = (0, 0.0);
            while kept < tokens.len() && (kept == 0 || sum < p * total) {
                sum += tokens[kept].1;
                kept += 1;
            }
            tokens.truncate(kept);
            total = sum;
        }
        let mut remaining = self.random.random::<f64>() * total;
        for &(token, weight) in &tokens {
            remaining -= weight;
            if remaining < 0.0 {
                return token as u32;
            }
        }
        // Rounding has left a little over.
        best as u32
    }
}

/// The likeliest token of a row, of several the first.
fn likeliest(logits: &[f32]) -> Result<usize> {
    let (mut best, mut highest) = (0, f32::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        if logit.is_nan() || logit == f32::INFINITY {
            return Err(argument("logits", "finite numbers or negative infinity", logit));
        }
        if logit > highest {
            (best, highest) = (token, logit);
        }
    }
    if highest == f32::NEG_INFINITY {
        return Err(argument("logits", "a token that is possible", "none"));
    }
    Ok(best)
}
