//! Sums of what the blocks of a kernel leave.

use super::{Device, GRID_COLUMNS, Module, blocks, lies_whole, params, suffix};
use crate::{Element, Result};

/// As in the kernel.
const THREADS: usize = 256;
const QUAD: usize = 4;
const AHEAD: usize = 4;

/// How a sum is divided, by its shape alone, so that it is the same bits on any device.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    /// Threads of a block that share a column.
    rows: usize,
    /// Slices of the parts, each summed by blocks of its own.
    slices: usize,
}

impl Plan {
    fn new(parts: usize, m: usize) -> Self {
        let quads = m.div_ceil(QUAD).max(1);
        // Few columns leave the threads of a block to share each.
        let most = THREADS.checked_div(quads.min(THREADS).next_power_of_two()).map_or(8, |rows| rows.max(8));
        let rows = parts.div_ceil(AHEAD).clamp(1, most).next_power_of_two().min(most);
        let in_flight = rows * AHEAD;
        let few = blocks(quads, THREADS / rows) < 64;
        let slices = if few && parts > 8 * in_flight { parts.div_ceil(4 * in_flight).min(64) } else { 1 };
        Self { rows, slices }
    }
}

impl Device<'_> {
    /// Sums `parts` rows of `m` f32, `stride` apart from `from` on, in a fixed order, and rounds the `m` sums to `to`.
    /// No parts give zeros.
    ///
    /// # Safety
    /// `from` and `to` must be addresses of memory that is valid for that, and `to` of elements that nothing else uses.
    pub unsafe fn sum<T: Element>(&self, from: u64, [parts, m]: [usize; 2], stride: usize, to: u64) -> Result<()> {
        if m == 0 {
            return Ok(());
        }
        let Plan { rows, slices } = Plan::new(parts, m);
        if slices == 1 {
            // SAFETY: as the caller promises.
            return unsafe { self.sum_slices::<T>(from, [parts, m], stride, to, rows, 1) };
        }
        let workspace = self.workspace::<f32>("sums of slices", slices * m)?;
        let between = self.address(&workspace);
        // SAFETY: as the caller promises; the workspace holds m sums for each slice.
        unsafe {
            self.sum_slices::<f32>(from, [parts, m], stride, between, rows, slices)?;
            self.sum_slices::<T>(between, [slices, m], m, to, Plan::new(slices, m).rows, 1)
        }
    }

    unsafe fn sum_slices<T: Element>(
        &self,
        from: u64,
        [parts, m]: [usize; 2],
        stride: usize,
        to: u64,
        rows: usize,
        slices: usize,
    ) -> Result<()> {
        let params = params::Sum {
            from,
            to,
            parts: parts as i64,
            m: m as i64,
            stride: stride as i64,
            slice: parts.div_ceil(slices) as i64,
            row_shift: rows.ilog2().into(),
        };
        let whole = m.is_multiple_of(QUAD)
            && lies_whole::<f32>(from, &[params.stride], QUAD)
            && lies_whole::<T>(to, &[params.m], QUAD);
        let name = format!("sum_{}_{}", if whole { "whole" } else { "strided" }, suffix(T::DTYPE));
        let columns = blocks(m.div_ceil(QUAD), THREADS / rows).min(GRID_COLUMNS);
        // SAFETY: as the caller promises.
        unsafe { self.launch(Module::SUM, &name, [columns, slices], THREADS, [0, 0], &params) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_outputs_get_many_threads() {
        assert_eq!(Plan::new(4, 1 << 20), Plan { rows: 1, slices: 1 });
        assert_eq!(Plan::new(66, 10_240), Plan { rows: 8, slices: 1 });
        assert_eq!(Plan::new(1056, 15), Plan { rows: 64, slices: 1 });
        assert_eq!(Plan::new(100_000, 15), Plan { rows: 64, slices: 64 });
        assert_eq!(Plan::new(0, 3), Plan { rows: 1, slices: 1 });
    }
}
