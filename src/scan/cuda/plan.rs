//! How a call is divided over the device.

use cudarc::driver::CudaSlice;

use crate::arguments::Dims;
use crate::cuda::{Device, params};
use crate::sequences::{CHECKPOINT_STEPS, Sequence, Sequences};
use crate::{Element, Memory, Result};

use super::Problem;

/// How a call's work is divided; what is `None` is chosen by shape and device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Plan {
    /// The steps in each segment of a sequence, rounded up to a multiple of 64. Sequences of no more steps are not split;
    /// with `usize::MAX` none is.
    ///
    /// Packed sequences are divided each as if it were alone, so that it gets the same bits, and so more finely than a
    /// large pack of them needs: `Some(usize::MAX)` is faster then.
    pub segment_steps: Option<usize>,
    /// The channels of which a lane carries states, where the fast kernels apply. The bits do not depend on it.
    pub per_lane: Option<PerLane>,
}

/// The channels of which a lane carries 4 states each; 4 lanes hold the 16 states of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PerLane {
    /// For sequences of dozens of steps and more: tiles of 32 steps.
    One,
    /// For shorter ones: tiles of 8 steps, and the fewest instructions.
    Four,
}

/// Steps that a segment has at least. (Halves of it were slower at every length: the way in through the segments before
/// grows with their number.)
const LEAST_SEGMENT: usize = CHECKPOINT_STEPS;

/// Segments of up to so many steps waste too much of a tile of 32 steps.
const SHORT_SEGMENT: usize = 128;

/// The pass that is divided.
#[derive(Debug, Clone, Copy)]
pub(super) enum Pass {
    Forward,
    Backward,
}

impl Pass {
    /// Groups of 8 channels that a processor's blocks carry at a time.
    fn groups(self) -> usize {
        match self {
            // 20 warps of 8 channels.
            Self::Forward => 20,
            // 8 warps of 16.
            Self::Backward => 16,
        }
    }
}

impl Plan {
    /// The steps in each segment of a sequence of `len` steps, of which `rows` are worked on at once.
    pub(super) fn steps(&self, pass: Pass, rows: usize, len: usize, d_inner: usize, processors: usize) -> usize {
        let slots = pass.groups() * processors;
        let steps = self.segment_steps.unwrap_or_else(|| {
            let groups = rows.saturating_mul(d_inner.div_ceil(8)).max(1);
            // As many as fill the processors once, or more often where they are long: blocks that work in turns wait less
            // than those that work in step. Measured, see benches/tuning.md.
            let waves = match len / (slots / groups).max(1) {
                0..768 => 1,
                768..4096 => 2,
                _ => 4,
            };
            // Splitting costs nearly as much again, so it must make far more warps.
            let segments = (waves * slots / groups).min(len / LEAST_SEGMENT);
            let segments = if segments < 3 { 1 } else { segments };
            if segments == 1 { usize::MAX } else { len.div_ceil(segments) }
        });
        let longest = (isize::MAX as usize) / CHECKPOINT_STEPS * CHECKPOINT_STEPS;
        steps.clamp(1, longest).next_multiple_of(CHECKPOINT_STEPS)
    }

    /// For segments of so many steps on average, of which `rows` are worked on at once.
    pub(super) fn per_lane(&self, steps: usize, rows: usize, d_inner: usize, processors: usize) -> PerLane {
        self.per_lane.unwrap_or({
            let has_enough = rows.saturating_mul(d_inner.div_ceil(8)) >= 2 * Pass::Forward.groups() * processors;
            if steps <= SHORT_SEGMENT && has_enough { PerLane::Four } else { PerLane::One }
        })
    }
}

/// The segments of a problem as kernels take them.
pub(super) struct Segments {
    pub params: params::Segments,
    /// Whether any sequence has more than one.
    pub split: bool,
    /// The table that `params` points at for packed sequences.
    _table: Option<CudaSlice<u64>>,
}

impl Segments {
    pub fn new<T: Element, M: Memory>(
        device: &Device,
        problem: &Problem<T, M>,
        plan: &Plan,
        pass: Pass,
    ) -> Result<Self> {
        let Dims { batch, len, d_inner, .. } = problem.dims;
        match problem.sequences {
            Sequences::Dense { .. } => {
                let steps = plan.steps(pass, batch, len, d_inner, device.processors);
                // An empty sequence has one empty segment, which hands its state on.
                let per_row = len.div_ceil(steps).max(1);
                let params = params::Segments {
                    packed: 0,
                    count: (batch * per_row) as i64,
                    len: len as i64,
                    per_row: per_row as i64,
                    steps: steps as i64,
                };
                Ok(Self { params, split: per_row > 1, _table: None })
            }
            Sequences::Packed(_) => {
                let (mut entries, mut split) = (Vec::new(), false);
                for sequence in problem.sequences.iter() {
                    let steps = plan.steps(pass, 1, sequence.len, d_inner, device.processors);
                    split |= sequence.len > steps;
                    let count = sequence.len.div_ceil(steps).max(1);
                    for rank in 0..count {
                        let first = rank * steps;
                        let steps = steps.min(sequence.len - first);
                        let behind = count - 1 - rank;
                        let Sequence { index, start, len, .. } = sequence;
                        entries.extend([index, start, len, first, steps, rank, behind].map(|x| x as u64));
                    }
                }
                let table = device.upload("the segments of packed sequences", &entries)?;
                let params = params::Segments {
                    packed: device.address(&table),
                    count: (entries.len() / 7) as i64,
                    len: len as i64,
                    per_row: 1,
                    steps: 0,
                };
                Ok(Self { params, split, _table: Some(table) })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the shape, segments are whole parts between checkpoints, and splitting makes at least three of them and no
    /// more than four waves of what a pass carries.
    #[test]
    fn segments_fill_the_device_and_no_more() {
        for (pass, groups) in [(Pass::Forward, 20), (Pass::Backward, 16)] {
            for (rows, d_inner) in [(1, 64), (1, 1024), (1, 2048), (3, 1536), (8, 2048), (64, 1536)] {
                for len in [1, 64, 191, 192, 512, 2048, 10_000, 65_536, 524_288] {
                    let steps = Plan::default().steps(pass, rows, len, d_inner, 132);
                    let what = format!("{pass:?}: {rows} rows of {len} steps, {d_inner} channels: {steps}");
                    assert!(steps.is_multiple_of(CHECKPOINT_STEPS), "{what}");
                    let (segments, carried) = (len.div_ceil(steps), groups * 132);
                    let work = segments * rows * (d_inner / 8);
                    assert!(segments == 1 || work <= 4 * carried, "{what}");
                    assert!(segments != 2 && (len >= 192 || segments == 1), "{what}");
                    // Unsplit, it is too short, or fills a third of the device by itself.
                    assert!(segments > 1 || len < 192 || 3 * work > carried, "{what}");
                }
            }
        }
    }

    #[test]
    fn what_is_asked_for_is_rounded_up() {
        for (asked, steps) in [(0, 64), (1, 64), (64, 64), (65, 128)] {
            let plan = Plan { segment_steps: Some(asked), ..Plan::default() };
            assert_eq!(plan.steps(Pass::Forward, 1, 1 << 20, 1024, 132), steps);
        }
        let whole = Plan { segment_steps: Some(usize::MAX), ..Plan::default() };
        assert!(whole.steps(Pass::Backward, 1, 1 << 40, 8, 132) > 1 << 40);
    }
}
