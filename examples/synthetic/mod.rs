//! What the two synthetic tasks of the paper share: Gu and Dao, *Mamba* (2023), arXiv 2312.00752, section 4.1.
//!
//! Sequences are drawn again for every step of training, so there is no training set to learn by heart. A model is asked
//! at the last steps of a sequence alone; the other steps have no loss.
#![allow(dead_code, reason = "each program uses a part")]

mod model;
mod options;
#[path = "../common/table.rs"]
mod table;
mod training;

use candle_core::{Device, Error, Result, Tensor};
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

pub use model::{Kind, Model};
pub use options::{Options, Settings};
pub use table::{percent, table};
#[allow(unused_imports, reason = "one program names the type")]
pub use training::Trained;
pub use training::train;

/// A task whose sequences are drawn at random.
pub trait Task {
    /// At how many of the last steps the model is asked.
    fn answers(&self) -> usize;

    /// Appends a sequence of a length to `ids`, and what is to be answered to `targets`.
    fn draw(&self, length: usize, random: &mut StdRng, ids: &mut Vec<u32>, targets: &mut Vec<u32>);

    /// A number of sequences of a length.
    fn batch(&self, [sequences, length]: [usize; 2], random: &mut StdRng, device: &Device) -> Result<Batch> {
        let mut ids = room("--batch, --length", [sequences, length, self.answers()])?;
        let mut targets = Vec::new();
        for _ in 0..sequences {
            self.draw(length, random, &mut ids, &mut targets);
        }
        // With the steps that ask, where these come on top.
        let length = ids.len() / sequences;
        Ok(Batch {
            ids: Tensor::from_vec(ids, (sequences, length), device)?,
            targets: Tensor::from_vec(targets, (sequences, self.answers()), device)?,
        })
    }
}

/// An empty list that has room for that many sequences of `length` and the steps that ask; an error names the flags that
/// want more than there is.
pub fn room(flags: &str, [sequences, length, answers]: [usize; 3]) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    let count = length.checked_add(answers).and_then(|length| length.checked_mul(sequences));
    match count {
        Some(count) if ids.try_reserve_exact(count).is_ok() => Ok(ids),
        _ => Err(Error::msg(format_args!(
            "{flags}: expected sequences that fit in memory, got {sequences} of {length} tokens"
        ))),
    }
}

/// Sequences and their answers.
pub struct Batch {
    /// `(sequences, length)`.
    pub ids: Tensor,
    /// `(sequences, answers)`.
    pub targets: Tensor,
}

/// Sources of random sequences that do not overlap, the same for every model that is trained with a seed.
pub struct Streams {
    pub training: StdRng,
    pub validation: StdRng,
    pub test: StdRng,
}

impl Streams {
    pub fn new(seed: u64) -> Self {
        let mut source = StdRng::seed_from_u64(seed);
        let mut stream = || StdRng::seed_from_u64(source.next_u64());
        Self { training: stream(), validation: stream(), test: stream() }
    }
}
