//! What the launches of both passes have in common.

use std::sync::Arc;

use bytemuck::Zeroable;
use cudarc::driver::CudaSlice;

use super::{Problem, Tensors};
use crate::complex_scan::tensors::Sizes;
use crate::cuda::params::complex_scan::{self as kernels, CHANNELS, LEAST_LANE_SHIFT, THREADS_SHIFT};
use crate::cuda::params::{self, Segments};
use crate::cuda::{Arguments, Cuda, Device, DeviceViews, GRID_COLUMNS, grid_rows, packed_segments};
use crate::sequences::Sequences;
use crate::{Element, Result};

/// Blocks for each processor that a grid has, if there are as many.
const WAVES: usize = 2;

/// How channels are divided over blocks: by their number and that of the states alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Division {
    /// Threads of a channel, as a shift.
    pub lane_shift: usize,
    /// How often a block takes as many channels as it has threads for.
    pub rounds: usize,
    /// Parts of a group.
    pub group_blocks: usize,
}

impl Division {
    /// For a pass that sums up over channels in its blocks, each has `CHANNELS` of them; else as many as at a time.
    pub fn new(sizes: &Sizes, sums_channels: bool) -> Self {
        let lane_shift = (sizes.d_state.next_power_of_two().ilog2() as usize).max(LEAST_LANE_SHIFT);
        let at_a_time = 1 << (THREADS_SHIFT - lane_shift);
        let rounds = if sums_channels { CHANNELS / at_a_time } else { 1 };
        Self { lane_shift, rounds, group_blocks: sizes.group_channels().div_ceil(at_a_time * rounds) }
    }
}

/// The inputs of a pass, and how the work is divided.
pub(super) struct Launcher {
    pub inputs: kernels::Inputs,
    pub division: Division,
    /// Blocks along both axes of the grid.
    pub grid: [usize; 2],
    /// The steps of the longest sequence.
    pub longest: usize,
    _segments: Option<Arc<CudaSlice<u64>>>,
}

impl Launcher {
    /// Fills in what the kernels take of `problem`, of which `sequences` sequences are worked on.
    pub fn new<'a, T: Element>(
        device: &Device,
        problem: &Problem<'a, T, Cuda>,
        arguments: &mut Arguments<'a>,
        sequences: usize,
        sums_channels: bool,
    ) -> Result<Self> {
        let Sizes { length, d_inner, d_state, groups, .. } = problem.sizes;
        let tensors: Tensors<DeviceViews> = problem.inputs.tensors().map(arguments)?;
        let division = Division::new(&problem.sizes, sums_channels);
        let columns = groups * division.group_blocks;
        let options = problem.inputs.options;
        let mut segments = Segments {
            count: sequences as i64,
            len: length as i64,
            per_row: 1,
            steps: length as i64,
            ..Segments::zeroed()
        };
        let (mut table, mut longest) = (None, length);
        if matches!(problem.sequences, Sequences::Packed(_)) && sequences > 0 {
            // Each is one segment.
            let whole = |sequence| packed_segments(&sequence, usize::MAX).next();
            let entries: Vec<_> = problem.sequences.iter().filter_map(whole).collect();
            longest = problem.sequences.iter().map(|sequence| sequence.len).max().unwrap_or(0);
            let entries = device.table("packed sequences", bytemuck::cast_slice(&entries))?;
            segments.packed = device.address(&entries);
            table = Some(entries);
        }
        let inputs = tensors.params(kernels::Inputs {
            segments,
            d_inner: d_inner as i64,
            d_state: d_state as i64,
            group_channels: problem.sizes.group_channels() as i64,
            group_blocks: division.group_blocks as i64,
            rounds: division.rounds as i64,
            columns: columns as i64,
            lane_shift: division.lane_shift as i64,
            flags: params::flags([
                (options.reverse, kernels::FLAG_REVERSE),
                (options.delta_softplus, kernels::FLAG_SOFTPLUS),
            ]),
            ..kernels::Inputs::zeroed()
        });
        let columns = columns.clamp(1, GRID_COLUMNS);
        let grid = [columns, grid_rows(columns, sequences, WAVES * device.properties().processors)];
        Ok(Self { inputs, division, grid, longest, _segments: table })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every channel is in one block, whose threads have a state each, and in backward no part but a group's last has fewer
    /// than 32 channels, whatever d_state is.
    #[test]
    fn channels_are_divided_by_shape() {
        for d_state in 1..=256 {
            for (d_inner, groups) in [(1, 1), (768, 1), (40, 8), (99, 3)] {
                let sizes = Sizes { batch: 1, length: 1, d_inner, d_state, groups, sequences: 1 };
                for sums_channels in [false, true] {
                    let division = Division::new(&sizes, sums_channels);
                    let at_a_time = 256 >> division.lane_shift;
                    let channels = at_a_time * division.rounds;
                    assert!(1 << division.lane_shift >= d_state && at_a_time <= CHANNELS, "{d_state}");
                    let covered = division.group_blocks * channels;
                    assert!(covered >= d_inner / groups && covered < d_inner / groups + channels, "{d_state}");
                    assert_eq!(channels, if sums_channels { 32 } else { at_a_time }, "{d_state}");
                }
            }
        }
    }
}
