//! What is timed, as text.

use std::fmt;

use crate::Result;

/// One operator on one shape: `scan forward bf16 8 2048 2048 16 packed`.
#[derive(Clone, PartialEq)]
pub struct Case {
    pub operator: String,
    pub direction: String,
    pub dtype: String,
    pub batch: usize,
    pub len: usize,
    pub d_inner: usize,
    /// d_state, the width of a convolution, the size of a norm's groups or of an embedding's vocabulary.
    pub last: usize,
    /// Words for variants; each operator knows its own.
    pub variant: Vec<String>,
}

impl Case {
    /// The case of a text without commas.
    pub fn parse(text: &str) -> Result<Self> {
        let words: Vec<_> = text.split_whitespace().collect();
        let [operator, direction, dtype, batch, len, d_inner, last, variant @ ..] = &words[..] else {
            return Err(format!(
                "expected operator, direction, type, batch, length, d_inner and d_state or width, got `{text}`"
            )
            .into());
        };
        let number = |word: &str| word.parse().map_err(|_| format!("expected a number, got `{word}` in `{text}`"));
        Ok(Self {
            operator: operator.to_string(),
            direction: direction.to_string(),
            dtype: dtype.to_string(),
            batch: number(batch)?,
            len: number(len)?,
            d_inner: number(d_inner)?,
            last: number(last)?,
            variant: variant.iter().map(|word| word.to_string()).collect(),
        })
    }

    /// The cases of a text: each value between commas with each of the other words.
    pub fn expand(text: &str) -> Result<Vec<Self>> {
        let mut texts = vec![String::new()];
        // From the last word on, so that the first ones change slowest.
        for word in text.split_whitespace().rev() {
            texts = word.split(',').flat_map(|value| texts.iter().map(move |rest| format!("{value} {rest}"))).collect();
        }
        texts.iter().map(|text| Self::parse(text)).collect()
    }

    /// Whether the variant has this word; taken out, so that `finish` finds what nobody knows.
    pub fn take(&mut self, word: &str) -> bool {
        let before = self.variant.len();
        self.variant.retain(|known| known != word);
        self.variant.len() < before
    }

    /// The number after `prefix` in one of the variant's words; taken out.
    pub fn take_number(&mut self, prefix: &str) -> Result<Option<usize>> {
        let Some(at) = self.variant.iter().position(|word| word.starts_with(prefix)) else { return Ok(None) };
        let word = self.variant.remove(at);
        match word[prefix.len()..].parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(format!("expected a number after `{prefix}`, got `{word}`").into()),
        }
    }

    /// An error if words are left that the operator has not taken.
    pub fn finish(&self) -> Result<()> {
        match &self.variant[..] {
            [] => Ok(()),
            [word, ..] => Err(format!("{} {} has no variant `{word}`", self.operator, self.direction).into()),
        }
    }

    /// Elements of an activation.
    pub fn count(&self) -> usize {
        self.batch * self.len * self.d_inner
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { operator, direction, dtype, batch, len, d_inner, last, variant } = self;
        write!(f, "{operator} {direction} {dtype} {batch} {len} {d_inner} {last}")?;
        variant.iter().try_for_each(|word| write!(f, " {word}"))
    }
}

/// Offsets of packed sequences of mixed lengths, `len` steps in all.
pub fn mixed_lengths(len: usize) -> Vec<usize> {
    let lengths = [37, 512, 1024, 77, 2048, 300, 16, 900, 4096, 131, 1, 640];
    let mut offsets = vec![0];
    for length in lengths.into_iter().cycle() {
        let start = offsets[offsets.len() - 1];
        if start == len {
            break;
        }
        offsets.push((start + length).min(len));
    }
    offsets
}
