//! How a call is divided over the device.

use crate::cuda::params::s4d::TILE;

/// How a call's work is divided; what is `None` is chosen by shape and device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Plan {
    /// The steps in each segment of a sequence, rounded up to a multiple of 256. Sequences of no more steps are not split;
    /// with `usize::MAX` none is.
    ///
    /// Packed sequences are divided each as if it were alone, so that it gets the same bits.
    pub segment_steps: Option<usize>,
    /// Has the backward pass of bf16 multiply in TF32, as that of f16 does. That leaves out 2^-21 of the terms of a gradient's sums where
    /// else it is 2^-17 (of split sequences, the states before segments stay as they are), takes more registers and less shared
    /// memory. Devices whose blocks have no room for the other way (8.6, 8.9 and 12.0) do it anyway.
    pub tf32: bool,
}

/// Tiles that a segment has at least.
const LEAST_TILES: usize = 4;

impl Plan {
    /// The steps in each segment of a sequence of `len` steps, of which `rows` are worked on at once, each by `columns` blocks.
    pub(super) fn steps(&self, rows: usize, len: usize, columns: usize, processors: usize) -> usize {
        let steps = self.segment_steps.unwrap_or_else(|| {
            let blocks = rows.saturating_mul(columns).max(1);
            // A block on each processor is what there is room for: splitting costs a third more.
            let segments = if blocks >= processors { 1 } else { 2 * processors / blocks };
            let segments = segments.min(len / (LEAST_TILES * TILE));
            if segments < 2 { usize::MAX } else { len.div_ceil(segments) }
        });
        let longest = isize::MAX as usize / TILE * TILE;
        steps.clamp(1, longest).next_multiple_of(TILE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Segments are whole tiles, four at least, and no more than two blocks of them for each processor.
    #[test]
    fn segments_fill_the_device_and_no_more() {
        for (rows, columns) in [(1, 1), (1, 96), (3, 96), (64, 96), (1, 200)] {
            for len in [0, 1, 256, 2047, 2048, 16_384, 1 << 20] {
                let steps = Plan::default().steps(rows, len, columns, 132);
                let segments = len.div_ceil(steps);
                assert!(steps.is_multiple_of(TILE) && steps >= LEAST_TILES * TILE, "{rows} {columns} {len}: {steps}");
                assert!(segments <= 1 || segments * rows * columns <= 2 * 132, "{rows} {columns} {len}: {steps}");
                let fills =
                    rows * columns >= 132 || 2 * segments * rows * columns >= 132 || steps < 8 * TILE || len < 2048;
                assert!(fills, "{rows} {columns} {len}: {steps}");
            }
        }
    }

    #[test]
    fn what_is_asked_for_is_rounded_up() {
        for (asked, steps) in [(0, 256), (1, 256), (256, 256), (257, 512)] {
            assert_eq!(Plan { segment_steps: Some(asked), ..Plan::default() }.steps(1, 1 << 20, 96, 132), steps);
        }
        assert!(Plan { segment_steps: Some(usize::MAX), ..Plan::default() }.steps(1, 1 << 40, 1, 132) > 1 << 40);
    }
}
