//! The only checks of the arguments, on any memory.

use super::{Inputs, MAX_VOCAB_SIZE, words};
use crate::pool::check_pool_size;
use crate::view::check_len;
use crate::{Error, Memory, Result, Slots, View};

/// The sizes of arguments that have been checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem {
    /// The tokens of the vocabulary, and the words of bits of a sequence.
    pub vocab_size: usize,
    pub words: usize,
    pub rows: usize,
    /// Where the first row starts, and the distance from one to the next.
    pub offset: usize,
    pub stride: usize,
}

/// The lengths of what is read and written beside the logits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lens {
    pub settings: usize,
    pub occurred: Option<usize>,
    pub tokens: usize,
    pub log_probs: Option<usize>,
}

impl<M: Memory> Inputs<'_, M> {
    /// Checks every argument.
    pub(crate) fn check(&self, lens: &Lens) -> Result<Problem> {
        let View { offset, shape: [rows, vocab], strides, .. } = self.logits;
        self.logits.check("logits", "(rows, vocab)", [rows, vocab])?;
        if strides[1] != 1 && vocab > 1 && rows > 0 {
            let got = format_args!("strides {strides:?}").to_string();
            return Err(Error::argument("logits", "logits of a row that are neighbours in memory", got));
        }
        if self.vocab_size == 0 || self.vocab_size > vocab.min(MAX_VOCAB_SIZE) {
            let most = vocab.min(MAX_VOCAB_SIZE);
            let expected = format_args!("from 1 to {most}, for logits of {vocab} columns").to_string();
            return Err(Error::argument("vocab_size", expected, self.vocab_size));
        }
        let sequences = lens.settings;
        match &self.slots {
            Slots::Rows => check_pool_size("settings", rows, sequences)?,
            slots => slots.check(rows, sequences)?,
        }
        if let Some(len) = lens.occurred {
            check_len("occurred", "(sequences, ⌈vocab / 32⌉)", &[sequences, words(vocab)], len)?;
        }
        check_len("tokens", "(sequences)", &[sequences], lens.tokens)?;
        if let Some(len) = lens.log_probs {
            check_len("log_probs", "(sequences)", &[sequences], len)?;
        }
        Ok(Problem { rows, vocab_size: self.vocab_size, words: words(vocab), offset, stride: strides[0] })
    }
}
