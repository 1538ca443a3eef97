//! The likeliest texts, searched for with beams.

use candle_core::Result;

use super::{Decoder, check_tokens};
use crate::nn::argument;

/// How texts are searched for, see [`Decoder::search`].
#[derive(Debug, Clone, PartialEq)]
pub struct SearchOptions {
    /// How many texts are followed at a time; each takes a slot.
    pub beams: usize,
    /// The most tokens of a text; at least one.
    pub max_tokens: usize,
    /// Tokens at which a text ends. They are no part of it.
    pub stop_tokens: Vec<u32>,
    /// Scores are divided by the length of the text, its stop token included, to this power: 0 compares probabilities, above 0 longer
    /// texts gain.
    pub length_penalty: f64,
}

impl Default for SearchOptions {
    /// 4 beams, at most 256 tokens, scores of a token on average.
    fn default() -> Self {
        Self { beams: 4, max_tokens: 256, stop_tokens: Vec::new(), length_penalty: 1.0 }
    }
}

/// A text that a search has found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// What goes on with the prompt.
    pub tokens: Vec<u32>,
    /// The sum of the logarithms of its tokens' probabilities, by the length as [`SearchOptions::length_penalty`] says.
    pub score: f64,
}

/// A text that is followed.
#[derive(Debug, Clone)]
struct Beam {
    tokens: Vec<u32>,
    /// The sum of the logarithms of its tokens' probabilities.
    log_prob: f64,
}

impl Decoder {
    /// Searches for the likeliest texts that go on with a prompt: of all that follow from `beams` texts by one more token the likeliest
    /// `beams` are followed on, and those that end are kept. Gives at most `beams` of them, the best first.
    ///
    /// It takes the slots from 0 on, whatever is in them. States go from slot to slot on the device; the logits of each step come to
    /// the host.
    ///
    /// # Errors
    /// A prompt without tokens or with one beyond the vocabulary; no beams, or more than there are slots; no tokens to write. Nothing
    /// is written then. Logits that are no numbers. What the device refuses.
    pub fn search(&mut self, prompt: &[u32], options: &SearchOptions) -> Result<Vec<Found>> {
        let beams = options.beams;
        if !(1..=self.slots()).contains(&beams) {
            return Err(argument("beams", format_args!("1 to {}, the number of slots", self.slots()), beams));
        }
        if options.max_tokens == 0 {
            return Err(argument("max_tokens", "at least 1", 0));
        }
        if prompt.is_empty() {
            return Err(argument("prompt", "at least one token", "none"));
        }
        check_tokens("prompt", prompt, self.model().config().padded_vocab_size())?;
        let slots: Vec<i32> = (0..beams as i32).collect();
        self.cache().reset(Some(&slots[..1]))?;
        let mut logits = self.prefill(&[prompt], &slots[..1])?;
        let mut followed = vec![Beam { tokens: Vec::new(), log_prob: 0.0 }];
        let mut found: Vec<Found> = Vec::new();
        loop {
            let candidates = self.candidates(&followed, &logits.to_vec2::<f32>()?, 2 * beams)?;
            let length = followed[0].tokens.len() + 1;
            let score = |log_prob: f64| log_prob / (length as f64).powf(options.length_penalty);
            let (mut next, mut parents) = (Vec::new(), Vec::new());
            for (rank, Candidate { parent, token, log_prob }) in candidates.into_iter().enumerate() {
                if options.stop_tokens.contains(&token) {
                    // One that is behind as many others as are followed would not have been followed either.
                    if rank < beams {
                        found.push(Found { tokens: followed[parent].tokens.clone(), score: score(log_prob) });
                    }
                } else if next.len() < beams {
                    let tokens = followed[parent].tokens.iter().copied().chain([token]).collect();
                    next.push(Beam { tokens, log_prob });
                    parents.push(parent as i32);
                }
            }
            found.sort_by(|a, b| b.score.total_cmp(&a.score));
            found.truncate(beams);
            let worst = found.get(beams - 1).map(|found| found.score);
            let is_over = next.first().is_none_or(|best| worst.is_some_and(|worst| score(best.log_prob) <= worst));
            if length == options.max_tokens || is_over {
                found.extend(next.into_iter().map(|beam| Found { score: score(beam.log_prob), tokens: beam.tokens }));
                found.sort_by(|a, b| b.score.total_cmp(&a.score));
                found.truncate(beams);
                return Ok(found);
            }
            let slots = &slots[..next.len()];
            self.cache().copy_slots(&parents, slots)?;
            let tokens: Vec<_> = next.iter().map(|beam| beam.tokens[length - 1]).collect();
            logits = self.step(&tokens, slots)?;
            followed = next;
        }
    }

    /// The likeliest texts by one more token, the likeliest first; of equal ones those of the earlier beam and the lower token.
    fn candidates(&self, followed: &[Beam], logits: &[Vec<f32>], count: usize) -> Result<Vec<Candidate>> {
        let vocab = self.model().config().vocab_size;
        let mut best: Vec<Candidate> = Vec::new();
        for (parent, (beam, logits)) in followed.iter().zip(logits).enumerate() {
            let logits = &logits[..vocab];
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            if !most.is_finite() || logits.iter().any(|logit| logit.is_nan()) {
                return Err(argument("logits", "numbers, one of them finite", "logits by which nothing can be chosen"));
            }
            let sum: f64 = logits.iter().map(|&logit| f64::from(logit - most).exp()).sum();
            let base = beam.log_prob - f64::from(most) - sum.ln();
            for (token, &logit) in logits.iter().enumerate() {
                let log_prob = base + f64::from(logit);
                if best.len() == count && best[count - 1].log_prob >= log_prob {
                    continue;
                }
                let at = best.partition_point(|other| other.log_prob >= log_prob);
                best.insert(at, Candidate { parent, token: token as u32, log_prob });
                best.truncate(count);
            }
        }
        Ok(best)
    }
}

/// A text that is followed, and one more token.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    parent: usize,
    token: u32,
    log_prob: f64,
}
