//! How a call is divided over the device.

use crate::cuda::params::scan::forward_few_channels as few;
use crate::sequences::CHECKPOINT_STEPS;

/// How a call's work is divided; what is `None` is chosen by shape and device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Plan {
    /// The steps in each segment of a sequence, rounded up to a multiple of 64. Sequences of no more steps are not split;
    /// with `usize::MAX` none is.
    ///
    /// Packed sequences are divided each as if it were alone, so that it gets the same bits, and so more finely than a
    /// large pack of them needs: `Some(usize::MAX)` is faster then.
    pub segment_steps: Option<usize>,
    /// What a lane of the forward pass carries, where the fast kernels apply, there are at most 16 states and no sequence is
    /// split. (Of more states a lane carries four of one channel at a time.) The bits of [`PerLane::One`] and
    /// [`PerLane::Four`] are the same.
    pub per_lane: Option<PerLane>,
    /// Whether a lane of the fast backward kernel has one channel rather than two, where sequences are not split and there are
    /// at most 16 states: twice as many warps, each with more than half the work. Chosen where blocks of 64 channels would be
    /// between one and one and a half for each of the device's processors. The gradients of B and C, which sum over channels, have
    /// other last bits.
    pub narrow: Option<bool>,
}

/// What a lane carries: 4 states each of this many channels, or a part of 4 states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PerLane {
    /// One state: so few channels fill a device that sequences need not be split for it, and they are not, whatever
    /// [`Plan::segment_steps`] says. It takes 91 to 102 kB of shared memory; on a device whose blocks cannot have that,
    /// whole channels are carried instead.
    Quarter,
    /// Two states, likewise, in 102 to 117 kB.
    Half,
    /// For many channels or batches, and sequences of dozens of steps and more: tiles of 32 steps.
    One,
    /// For shorter ones: tiles of 8 steps, and the fewest instructions.
    Four,
}

impl PerLane {
    /// Bytes of dynamic shared memory that a block has, where an activation's elements have `element` bytes.
    pub(super) fn shared_memory(self, element: usize) -> usize {
        match self {
            Self::Quarter => few::ONE_SMEM + few::ONE_SMEM_PER_BYTE * element,
            Self::Half => few::TWO_SMEM + few::TWO_SMEM_PER_BYTE * element,
            Self::One | Self::Four => 0,
        }
    }
}

/// Steps that a segment has at least. (Halves of it were slower at every length: the way in through the segments before
/// grows with their number.)
const LEAST_SEGMENT: usize = CHECKPOINT_STEPS;

/// Segments of up to this many steps waste too much of a tile of 32 steps.
const SHORT_SEGMENT: usize = 128;

/// The pass that is divided.
#[derive(Debug, Clone, Copy)]
pub(super) enum Pass {
    Forward,
    Backward,
}

impl Pass {
    /// Groups of 8 channels that a block of the forward pass carries.
    const BLOCK_GROUPS: usize = 4;

    /// Groups of 8 channels that a processor's blocks carry at a time, of the fast kernels in halves: others carry fewer, but
    /// are divided the same way, so that they give the same bits.
    fn channel_groups(self) -> usize {
        match self {
            // 20 warps of 8 channels.
            Self::Forward => 20,
            // 8 warps of 16.
            Self::Backward => 16,
        }
    }
}

impl Plan {
    /// The part of a channel that a lane carries: what the plan says; else, if the plan leaves it open, a part where blocks of
    /// so few channels fill the device about once or twice, or the sequences are short, so that not splitting them is faster.
    /// `None`: whole channels. `rows` sequences of `len` steps are worked on at once.
    pub(super) fn part_of_channel(
        &self,
        rows: usize,
        len: usize,
        d_inner: usize,
        processors: usize,
    ) -> Option<PerLane> {
        match (self.segment_steps, self.per_lane) {
            (None, None) => {}
            (_, Some(part @ (PerLane::Quarter | PerLane::Half))) => return Some(part),
            _ => return None,
        }
        // How far blocks of that many channels fill the device, one to a processor.
        let fill = |channels| rows.saturating_mul(d_inner.div_ceil(channels)) as f64 / processors as f64;
        // Unsplit, the time of a step does not depend on how many blocks run; split, it is proportional to the channels, and
        // the whole takes some microseconds more. The numbers are measured, see benches/tuning.md.
        let len = len as f64;
        match (fill(few::ONE_CHANNELS), fill(few::TWO_CHANNELS)) {
            (quarter, _) if quarter <= 1.0 => (len * (1.0 - 0.87 * quarter) <= 400.0).then_some(PerLane::Quarter),
            (_, half) if half <= 1.0 => (len * (1.0 - 1.22 * half) <= 200.0).then_some(PerLane::Half),
            (_, half) if (1.8..=2.0).contains(&half) => (len >= 192.0).then_some(PerLane::Half),
            _ => None,
        }
    }

    /// The steps in each segment of a sequence of `len` steps, of which `rows` are worked on at once.
    pub(super) fn steps(&self, pass: Pass, rows: usize, len: usize, d_inner: usize, processors: usize) -> usize {
        let capacity = pass.channel_groups() * processors;
        let steps = self.segment_steps.unwrap_or_else(|| {
            let groups = rows.saturating_mul(d_inner.div_ceil(8)).max(1);
            // A block of the forward pass on each processor: splitting, which costs nearly as much again, was slower than that
            // at every length. Measured, see benches/tuning.md.
            if matches!(pass, Pass::Forward) && groups >= Pass::BLOCK_GROUPS * processors {
                return usize::MAX;
            }
            // As many as fill the processors once, or more often where they are long: blocks that work in turns wait less
            // than those that work in step. Measured, see benches/tuning.md.
            let waves = match len / (capacity / groups).max(1) {
                0..768 => 1,
                768..4096 => 2,
                _ => 4,
            };
            // Splitting costs nearly as much again, so it must make far more warps.
            let segments = (waves * capacity / groups).min(len / LEAST_SEGMENT);
            let segments = if segments < 3 { 1 } else { segments };
            if segments == 1 { usize::MAX } else { len.div_ceil(segments) }
        });
        let longest = (isize::MAX as usize) / CHECKPOINT_STEPS * CHECKPOINT_STEPS;
        steps.clamp(1, longest).next_multiple_of(CHECKPOINT_STEPS)
    }

    /// What a lane carries of whole channels, in segments of `steps` steps on average, of which `rows` are worked on at once.
    pub(super) fn per_lane(&self, steps: usize, rows: usize, d_inner: usize, processors: usize) -> PerLane {
        let has_enough = || rows.saturating_mul(d_inner.div_ceil(8)) >= 2 * Pass::Forward.channel_groups() * processors;
        match self.per_lane {
            Some(whole @ (PerLane::One | PerLane::Four)) => whole,
            _ if steps <= SHORT_SEGMENT && has_enough() => PerLane::Four,
            _ => PerLane::One,
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
                    // Unsplit, it is too short, or fills a good part of the device by itself: forward a block of each
                    // processor, which can carry five.
                    let part = if matches!(pass, Pass::Forward) { 5 } else { 3 };
                    assert!(segments > 1 || len < 192 || part * work >= carried, "{what}");
                }
            }
        }
    }

    /// Lanes carry parts of a channel only where that fills the device about once or twice, or the sequence is short.
    #[test]
    fn parts_are_for_few_channels() {
        let part = |rows, len, d_inner| Plan::default().part_of_channel(rows, len, d_inner, 132);
        for (rows, len, d_inner, expected) in [
            (1, 1, 8, Some(PerLane::Quarter)),
            (1, 2048, 1024, Some(PerLane::Quarter)),
            (1, 4096, 1024, None),
            (1, 512, 768, Some(PerLane::Quarter)),
            (1, 1024, 512, None),
            (1, 512, 1536, Some(PerLane::Half)),
            (1, 4096, 1536, None),
            (1, 1 << 20, 2048, Some(PerLane::Half)),
            (1, 64, 2560, None),
            (1, 64, 4096, None),
            (1, 256, 4096, Some(PerLane::Half)),
            (8, 512, 2048, None),
            (2, 65_536, 1024, Some(PerLane::Half)),
        ] {
            assert_eq!(part(rows, len, d_inner), expected, "{rows} rows of {len} steps, {d_inner} channels");
        }
        // What the plan says is what happens.
        let split = Plan { segment_steps: Some(64), ..Plan::default() };
        assert_eq!(split.part_of_channel(1, 512, 1024, 132), None);
        let half = Plan { per_lane: Some(PerLane::Half), ..Plan::default() };
        assert_eq!(half.part_of_channel(64, 512, 1536, 132), Some(PerLane::Half));
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
