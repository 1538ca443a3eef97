//! What the launches of both passes have in common.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::CudaSlice;

use super::{Plan, Problem, Tensors};
use crate::cuda::params::s4d::{self as kernels, CHUNK, PAIRS, THREADS, WARPS};
use crate::cuda::params::{self, QUAD};
use crate::cuda::{
    Arguments, Cuda, Device, DeviceViews, GRID_COLUMNS, GRID_ROWS, Kernel, Module, blocks, is_vectorizable,
    packed_segments,
};
use crate::lti::Rule;
use crate::lti::s4d::tensors::Sizes;
use crate::sequences::Sequences;
use crate::{Element, Result};

/// The most blocks for each processor: few, as backward's sum up each for itself.
const WAVES: usize = 8;

/// The inputs of a pass, the tables that are made of them, and how the work is divided.
pub(super) struct Launcher<'d> {
    device: &'d Device<'d>,
    pub inputs: kernels::Inputs,
    /// Blocks that cover the channels.
    columns: usize,
    pub segments: usize,
    pub is_split: bool,
    _tables: (CudaSlice<f32>, CudaSlice<f64>),
    _segments: Option<Arc<CudaSlice<u64>>>,
    _chunk_states: Option<CudaSlice<f32>>,
}

impl<'d> Launcher<'d> {
    /// Fills in what the kernels take of `problem`, and enqueues the kernel that makes the tables. `others` are the
    /// activations beside `u`, by address and strides of rows and steps.
    pub fn new<'a, T: Element>(
        device: &'d Device,
        plan: &Plan,
        problem: &Problem<'a, T, Cuda>,
        arguments: &mut Arguments<'a>,
        others: &[(u64, &[i64])],
    ) -> Result<Self> {
        let Sizes { length, d_inner, d_state, .. } = problem.sizes;
        let tensors: Tensors<DeviceViews> = problem.inputs.tensors().map(arguments)?;
        let padded = d_state.next_multiple_of(PAIRS);
        let pair_blocks = padded / PAIRS;
        let channels = WARPS / pair_blocks;
        let columns = blocks(d_inner, channels);
        let options = problem.inputs.options;
        let u = tensors.u;
        let are_vectors = |count: usize| {
            let whole = |address: u64, strides: &[i64]| is_vectorizable::<T>(address, strides, count);
            u.strides[2] == 1
                && whole(u.data, &u.strides[..2])
                && others.iter().all(|(address, strides)| whole(*address, strides))
        };
        let come_in = |count: usize| channels.is_multiple_of(count) && d_inner.is_multiple_of(count);
        let numbers = d_inner * padded * 2 * CHUNK;
        let table = device.workspace::<f32>("the matrices of S4D", 2 * numbers + d_inner * CHUNK)?;
        let powers = device.workspace::<f64>("the powers of S4D", d_inner * padded * 4)?;
        let read = device.address(&table);
        let enter = read + (numbers * size_of::<f32>()) as u64;
        let mut inputs = tensors.params(kernels::Inputs {
            read,
            enter,
            kernel: enter + (numbers * size_of::<f32>()) as u64,
            powers: device.address(&powers),
            d_inner: d_inner as i64,
            d_state: d_state as i64,
            padded: padded as i64,
            pair_blocks: pair_blocks as i64,
            rule: number_of(options.rule),
            flags: params::flags([
                (options.reverse, kernels::FLAG_REVERSE),
                (come_in(QUAD) && are_vectors(QUAD), kernels::FLAG_VECTOR),
                (come_in(WARPS) && are_vectors(16 / size_of::<T>()), kernels::FLAG_ROW),
            ]),
            ..kernels::Inputs::zeroed()
        });
        let division = divide(device, plan, problem.sequences, columns, length)?;
        let chunk_states = match division.is_split {
            true => Some(device.workspace("chunk states", division.params.count as usize * d_inner * 2 * d_state)?),
            false => None,
        };
        inputs.segments = division.params;
        inputs.chunk_states = chunk_states.as_ref().map_or(0, |states| device.address(states));
        let kernel = Kernel::new(Module::S4D_TABLES, ["s4d_tables"]);
        // SAFETY: the parameters have been checked by `Inputs::check`, and the tables have an element for each that the
        // kernel writes.
        unsafe { device.launch(&kernel, [d_inner.min(GRID_COLUMNS), 1], THREADS, 0, &inputs) }?;
        Ok(Self {
            device,
            inputs,
            columns,
            segments: division.params.count as usize,
            is_split: division.is_split,
            _tables: (table, powers),
            _segments: division.table,
            _chunk_states: chunk_states,
        })
    }

    /// Whether the channels of a block are read and written at once.
    pub fn are_rows(&self) -> bool {
        self.inputs.flags & kernels::FLAG_ROW != 0
    }

    /// The grid whose blocks, each of which takes some segments and `shared` bytes of shared memory, are done first if every segment takes
    /// as long. `by_registers`: the blocks that a processor has registers for.
    pub fn grid(&self, by_registers: usize, shared: usize) -> [usize; 2] {
        let properties = self.device.properties();
        let at_a_time = by_registers.min(properties.blocks_by_shared_memory(shared));
        let room = WAVES * properties.processors;
        [self.columns, even_rows(self.columns, self.segments, room, at_a_time * properties.processors)]
    }

    /// A kernel over segments, launched with `shared` bytes of shared memory for each block.
    pub fn kernel(module: Module, name: [&'static str; 2], shared: usize) -> Kernel {
        Kernel { most_shared: shared, ..Kernel::new(module, name) }
    }

    /// Enqueues a kernel over segments, with `shared` bytes of shared memory for each block.
    ///
    /// # Safety
    /// As [`Device::launch`].
    pub unsafe fn launch<P: Pod>(
        &self,
        module: Module,
        name: [&'static str; 2],
        grid: [usize; 2],
        shared: usize,
        params: &P,
    ) -> Result<()> {
        let kernel = Self::kernel(module, name, shared);
        // SAFETY: as the caller promises.
        unsafe { self.device.launch(&kernel, grid, THREADS, shared, params) }
    }
}

/// The rows of a grid of `columns` columns, of `room` blocks at most if that is a row or more, over which `segments` are divided so that
/// blocks, `slots` at a time, are done first. Of grids that are done at the same time the one with the fewest.
fn even_rows(columns: usize, segments: usize, room: usize, slots: usize) -> usize {
    let most = room.div_ceil(columns).min(segments).clamp(1, GRID_ROWS);
    let time = |rows: usize| (columns * rows).div_ceil(slots) * segments.div_ceil(rows);
    (1..=most).min_by_key(|&rows| (time(rows), rows)).unwrap_or(1)
}

/// The number of a rule.
pub(super) fn number_of(rule: Rule) -> i64 {
    match rule {
        Rule::ZeroOrderHold => kernels::RULE_HOLD,
        Rule::Bilinear => kernels::RULE_BILINEAR,
        Rule::Euler => kernels::RULE_EULER,
    }
}

/// How sequences are divided into segments.
struct Division {
    params: params::Segments,
    is_split: bool,
    table: Option<Arc<CudaSlice<u64>>>,
}

fn divide(device: &Device, plan: &Plan, sequences: Sequences, columns: usize, length: usize) -> Result<Division> {
    let processors = device.properties().processors;
    let mut params = params::Segments { len: length as i64, per_row: 1, ..params::Segments::zeroed() };
    match sequences {
        Sequences::Dense { batch, len } => {
            let steps = plan.steps(batch, len, columns, processors);
            // An empty sequence has one empty segment, which hands its state on.
            let per_row = len.div_ceil(steps).max(1);
            (params.per_row, params.steps, params.count) = (per_row as i64, steps as i64, (batch * per_row) as i64);
            Ok(Division { params, is_split: per_row > 1, table: None })
        }
        Sequences::Packed(_) => {
            // Each as if it were alone.
            let (mut entries, mut is_split) = (Vec::new(), false);
            for sequence in sequences.iter() {
                let steps = plan.steps(1, sequence.len, columns, processors);
                is_split |= sequence.len > steps;
                entries.extend(packed_segments(&sequence, steps));
            }
            let table = device.table("the segments of packed sequences", bytemuck::cast_slice(&entries))?;
            (params.count, params.packed) = (entries.len() as i64, device.address(&table));
            Ok(Division { params, is_split, table: Some(table) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::even_rows;

    /// On 132 processors with two blocks each.
    #[test]
    fn blocks_are_done_together() {
        // 8 rows of 8 segments are 3 blocks after another in each place, all but filled; 6 rows of 11 are 3, the last in 48 places.
        assert_eq!(even_rows(96, 64, 8 * 132, 264), 8);
        assert_eq!(even_rows(96, 64, 8 * 132, 132), 4);
        assert_eq!(even_rows(96, 1, 8 * 132, 264), 1);
        assert_eq!(even_rows(96, 0, 8 * 132, 264), 1);
        assert_eq!(even_rows(5_000, 7, 8 * 132, 264), 1);
        // One place after another is filled.
        assert_eq!(even_rows(1, 264, 8 * 132, 264), 264);
    }
}
