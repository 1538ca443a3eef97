//! The lookup and the gradient on NVIDIA GPUs; see [`cuda`](crate::cuda) for how tensors are passed.
//!
//! For the gradient the positions are sorted by token first. Then a few threads go through the rows of each token in order; tokens of many
//! rows are cut into parts, and their sums added up in a third pass. Rows of contiguous columns that are a multiple of 4,
//! start at such multiples and lie such multiples apart are read and written as vectors; others get the same bits, slower.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use super::{check, check_lookup};
use crate::cuda::params::QUAD;
use crate::cuda::params::embedding::{self as kernels, SORT_THREADS, THREADS, TILE};
use crate::cuda::{
    Arguments, Cuda, Device, GRID_COLUMNS, GRID_ROWS, Kernel, Module, Slots, blocks, is_vectorizable, params, suffix,
};
use crate::pool::cuda::SlotList;
use crate::{Element, Error, Result, View};

/// The least positions of a part, and about how many parts there are at most.
const LEAST_PART: usize = 64;
const MOST_PARTS: usize = 512;

/// Writes the gradient of a matrix of `vocab_size` rows, `d_table`, `(vocab_size, width)`, from that of the rows that `ids`
/// name, `d_out`, `(ids, width)`, asynchronously. It is summed in `f32`: 64 rows and then the sums, so that the error grows
/// as the roundings of these.
///
/// # Errors
/// A gradient of another number of rows than there are ids, or a buffer of another length, or one that lies on another
/// device; nothing is written then. What the driver refuses.
pub fn backward<T: Element>(
    stream: &Arc<CudaStream>,
    ids: &CudaSlice<u32>,
    d_out: &View<T, 2, Cuda>,
    vocab_size: usize,
    d_table: &mut CudaSlice<f32>,
) -> Result<()> {
    backward_of_range(stream, (ids, 0..ids.len()), d_out, vocab_size, d_table)
}

/// [`backward`] of a range of ids, which the caller has seen to lie in the buffer.
pub(crate) fn backward_of_range<T: Element>(
    stream: &Arc<CudaStream>,
    (ids, range): (&CudaSlice<u32>, Range<usize>),
    d_out: &View<T, 2, Cuda>,
    vocab_size: usize,
    d_table: &mut CudaSlice<f32>,
) -> Result<()> {
    assert!(range.end <= ids.len(), "ids {range:?} of {}", ids.len());
    let (count, width) = (range.len(), d_out.shape[1]);
    check(count, d_out, vocab_size, d_table.len())?;
    let (device, mut arguments) = (Device::new(stream)?, Arguments::new(stream));
    let ids = arguments.read("ids", ids, range.start)?;
    let rows = arguments.view("d_out", d_out)?;
    let is_empty = d_table.is_empty();
    let d_table = arguments.write("d_table", d_table)?;
    if is_empty {
        return Ok(());
    }

    let order = device.workspace::<i64>("positions in order", count)?;
    let starts = device.workspace::<i64>("where tokens begin", vocab_size + 1)?;
    let (order_at, starts_at) = (device.address(&order), device.address(&starts));
    let sort = kernels::Sort { ids, order: order_at, starts: starts_at, count: count as i64, vocab: vocab_size as i64 };
    let kernel = Kernel::new(Module::EMBEDDING_SORT, ["embedding_sort"]);
    // SAFETY: the ids are `count`, the workspaces have room for a position of each and a place of each token and one more.
    unsafe { device.launch(&kernel, [blocks(vocab_size, TILE), 1], SORT_THREADS, 0, &sort) }?;

    let layout = Layout::new(count, width);
    let stride = width.next_multiple_of(QUAD);
    let Some(len) = layout.parts.checked_mul(2 * stride) else {
        return Err(Error::argument("d_out", "a width that fits in memory", width));
    };
    let part_blocks = layout.blocks(layout.parts) * layout.columns;
    let partials = device.workspace::<f32>("sums of parts of tokens", len)?;
    let [row, column] = rows.strides;
    let is_whole = width.is_multiple_of(QUAD)
        && column == 1
        && is_vectorizable::<T>(rows.data, &[row], QUAD)
        && is_vectorizable::<f32>(d_table, &[], QUAD);
    let sum = kernels::Sum {
        ids,
        order: order_at,
        starts: starts_at,
        d_out: rows.data,
        row,
        column,
        d_table,
        partials: device.address(&partials),
        stride: stride as i64,
        part: layout.part as i64,
        parts: layout.parts as i64,
        vocab: vocab_size as i64,
        width: width as i64,
        lane_shift: layout.lane_shift.into(),
        part_blocks: part_blocks as i64,
        columns: layout.columns as i64,
        flags: params::flags([(is_whole, kernels::FLAG_VECTOR)]),
    };
    let grid = [part_blocks + layout.blocks(vocab_size), 1];
    let kernel = Kernel::new(Module::EMBEDDING_SUM, ["embedding_sum", suffix(T::DTYPE)]);
    // SAFETY: the sort before it has written the positions, all below `count`, and the places of all tokens; the rows of
    // `d_out` have been checked to be as many, each row of the matrix is written by one thread a column, here or in the pass
    // after it, and the workspace has room for two sums of each part.
    unsafe { device.launch(&kernel, grid, THREADS, 0, &sum) }?;
    if count <= layout.part {
        // No token has more.
        return Ok(());
    }
    let kernel = Kernel::new(Module::EMBEDDING_SUM, ["embedding_finish"]);
    // SAFETY: as before.
    unsafe { device.launch(&kernel, [part_blocks, 1], THREADS, 0, &sum) }
}

/// [`cpu::lookup`](super::cpu::lookup) on the stream's device, asynchronously.
///
/// # Errors
/// As there, and an argument that lies on another device; nothing is written then. What the driver refuses.
pub fn lookup<T: Element, O: Element>(
    stream: &Arc<CudaStream>,
    ids: &CudaSlice<u32>,
    slots: Slots,
    table: &View<T, 2, Cuda>,
    out: &mut CudaSlice<O>,
) -> Result<()> {
    let count = check_lookup::<T, O, _>(ids.len(), &slots, table, out.len())?;
    let (device, mut arguments) = (Device::new(stream)?, Arguments::new(stream));
    let ([vocab, width], is_empty) = (table.shape, out.is_empty());
    let list = SlotList::new(&device, &mut arguments, slots, ids.len())?;
    let rows = arguments.view("table", table)?;
    let params = kernels::Lookup {
        ids: arguments.read("ids", ids, 0)?,
        table: rows.data,
        row: rows.strides[0],
        column: rows.strides[1],
        out: arguments.write("out", out)?,
        count: count as i64,
        vocab: vocab as i64,
        width: width as i64,
        slots: list.params,
    };
    if is_empty {
        return Ok(());
    }
    let grid = [blocks(width, THREADS).min(GRID_COLUMNS), count.min(GRID_ROWS)];
    let kernel = Kernel::new(Module::EMBEDDING_LOOKUP, ["embedding_lookup", suffix(T::DTYPE), suffix(O::DTYPE)]);
    // SAFETY: every address and extent has been checked, ids by the kernel, and each element of the result is written by one
    // thread.
    unsafe { device.launch(&kernel, grid, THREADS, 0, &params) }
}

/// How the sums are divided, by the shape alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    /// Positions of a part, and how many parts there are.
    part: usize,
    parts: usize,
    /// Threads that share a row, a power of two, as a shift.
    lane_shift: u32,
    /// Blocks that share the columns of a part.
    columns: usize,
}

impl Layout {
    fn new(count: usize, width: usize) -> Self {
        let quads = width.div_ceil(QUAD).max(1);
        let lane_shift = quads.min(32).next_power_of_two().ilog2();
        let part = count.div_ceil(MOST_PARTS).max(LEAST_PART);
        let columns = blocks(quads, 1 << lane_shift).min(GRID_ROWS);
        Self { part, parts: count.div_ceil(part), lane_shift, columns }
    }

    /// Blocks for so many rows.
    fn blocks(&self, rows: usize) -> usize {
        blocks(rows, THREADS >> self.lane_shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_threads() {
        let layout = |count, width| {
            let Layout { part, parts, lane_shift, columns } = Layout::new(count, width);
            (part, parts, lane_shift, columns)
        };
        assert_eq!(layout(16_384, 768), (64, 256, 5, 6));
        assert_eq!(layout(1 << 20, 2048), (2048, 512, 5, 16));
        assert_eq!(layout(0, 7), (64, 0, 1, 1));
        assert_eq!(layout(65, 1), (64, 2, 0, 1));
    }
}
