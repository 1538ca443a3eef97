//! How the steps of an input are divided into sequences.

use crate::{Error, Result};

/// The steps between two kept state checkpoints of one sequence, where they are not asked for closer together.
pub(crate) const CHECKPOINT_STEPS: usize = 64;

/// The sequences of a checked problem: one per batch row, or those that `cu_seqlens` packs into a single row.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Sequences<'a> {
    /// `batch` rows of `len` steps each.
    Dense { batch: usize, len: usize },
    /// Sequence `i` takes the steps from `cu_seqlens[i]` to `cu_seqlens[i + 1]` of the one row.
    Packed(&'a [usize]),
}

/// The number of sequences in an input of `batch` rows of `length` steps: one for each row, or those that `cu_seqlens` packs
/// into a single row.
///
/// # Errors
/// A `cu_seqlens` that does not fit the input, as in the operators.
pub fn count_sequences(batch: usize, length: usize, cu_seqlens: Option<&[usize]>) -> Result<usize> {
    Ok(Sequences::check(batch, length, cu_seqlens)?.count())
}

/// One sequence: `len` steps of batch row `batch` from step `start` on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sequence {
    /// Its place among the sequences, which is also its place in the initial and final states.
    pub index: usize,
    pub batch: usize,
    pub start: usize,
    pub len: usize,
    /// Its first step when all batch rows are laid end to end.
    pub flat_start: usize,
}

impl<'a> Sequences<'a> {
    /// Checks `cu_seqlens` against an input of `batch` rows of `len` steps.
    pub fn check(batch: usize, len: usize, cu_seqlens: Option<&'a [usize]>) -> Result<Self> {
        let Some(offsets) = cu_seqlens else {
            return Ok(Self::Dense { batch, len });
        };
        let err = |expected: String, got: String| Err(Error::argument("cu_seqlens", expected, got));
        if batch != 1 {
            return err("a batch of 1 beside it".into(), format!("a batch of {batch}"));
        }
        match offsets {
            [] => return err("at least one offset, the first 0".into(), "none".into()),
            [first, ..] if *first != 0 => return err("0 as its first offset".into(), first.to_string()),
            _ => {}
        }
        if let Some(i) = offsets.windows(2).position(|pair| pair[0] > pair[1]) {
            return err(
                "offsets that never decrease".into(),
                format!("{} before {} at {}", offsets[i], offsets[i + 1], i + 1),
            );
        }
        match offsets.last() {
            Some(&last) if last == len => Ok(Self::Packed(offsets)),
            last => err(format!("the length {len} as its last offset"), format!("{}", last.unwrap_or(&0))),
        }
    }

    /// The number of sequences.
    pub fn count(&self) -> usize {
        match self {
            Self::Dense { batch, .. } => *batch,
            Self::Packed(offsets) => offsets.len() - 1,
        }
    }

    /// Sequence number `index`.
    pub fn get(&self, index: usize) -> Sequence {
        match *self {
            Self::Dense { len, .. } => Sequence { index, batch: index, start: 0, len, flat_start: index * len },
            Self::Packed(offsets) => {
                let (start, end) = (offsets[index], offsets[index + 1]);
                Sequence { index, batch: 0, start, len: end - start, flat_start: start }
            }
        }
    }

    /// All sequences in order.
    pub fn iter(&self) -> impl Iterator<Item = Sequence> + '_ {
        (0..self.count()).map(|i| self.get(i))
    }
}

impl Sequence {
    /// The slot of this sequence's checkpoint before its step `i`, a multiple of `every` other than zero, where one is kept for
    /// `every` so many steps.
    ///
    /// A sequence of `n` steps needs `ceil(n/every) - 1` slots and gets those from `floor(flat_start/every)` on, which never
    /// reach into the next sequence's, so `floor(steps/every)` slots hold the checkpoints of everything.
    pub fn checkpoint_slot(&self, i: usize, every: usize) -> usize {
        self.flat_start / every + i / every - 1
    }

    /// The step of the batch row that is the sequence's `i`-th in the direction of the scan.
    #[inline(always)]
    pub fn step(&self, i: usize, reverse: bool) -> usize {
        if reverse { self.start + self.len - 1 - i } else { self.start + i }
    }
}

/// Cuts a list of parts of sequences into ranges of neighbours with at least `least` steps each, the last excepted. An
/// empty part counts as a step, for handing its state on is some work.
pub(crate) fn runs<P>(parts: &[P], steps: impl Fn(&P) -> usize, least: usize) -> Vec<&[P]> {
    let mut runs = Vec::new();
    let (mut start, mut total) = (0, 0);
    for (i, part) in parts.iter().enumerate() {
        total += steps(part).max(1);
        if total >= least || i + 1 == parts.len() {
            runs.push(&parts[start..=i]);
            (start, total) = (i + 1, 0);
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn checkpoint_slots_never_collide(lens in prop::collection::vec(0usize..300, 0..40), every in 4u32..7) {
            let every = 1 << every;
            let mut offsets = vec![0];
            for len in lens {
                offsets.push(offsets.last().unwrap() + len);
            }
            let total = *offsets.last().unwrap();
            let sequences = Sequences::check(1, total, Some(&offsets)).unwrap();
            let mut used = vec![false; total / every];
            for sequence in sequences.iter() {
                for index in 1..sequence.len.div_ceil(every) {
                    let slot = sequence.checkpoint_slot(index * every, every);
                    prop_assert!(!std::mem::replace(&mut used[slot], true), "slot {slot} is given twice");
                }
            }
        }
    }
}
