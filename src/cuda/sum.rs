//! Sums of what the blocks of a kernel leave.

use bytemuck::Zeroable;

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

/// A sum of `parts` rows of `m` f32, `stride` apart from the address `from` on, to the `m` elements at `to`. No parts give
/// zeros.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sum {
    pub from: u64,
    pub parts: usize,
    pub m: usize,
    pub stride: usize,
    pub to: u64,
    /// Whether the sums are f32, or else rounded to the type of the launch.
    pub is_full: bool,
}

impl Device<'_> {
    /// Forms all these sums, up to five, in fixed orders.
    ///
    /// # Safety
    /// Each `from` and `to` must be addresses of memory that is valid for that, and `to` of elements that nothing else uses.
    pub unsafe fn sum<T: Element>(&self, sums: &[Sum]) -> Result<()> {
        let mut sums: Vec<_> = sums.iter().copied().filter(|sum| sum.m > 0).collect();
        let (mut workspaces, mut sliced) = (Vec::new(), Vec::new());
        for sum in &mut sums {
            let slices = Plan::new(sum.parts, sum.m).slices;
            if slices == 1 {
                continue;
            }
            let workspace = self.workspace::<f32>("sums of slices", slices * sum.m)?;
            let to = self.address(&workspace);
            sliced.push((Sum { to, is_full: true, ..*sum }, slices));
            *sum = Sum { from: to, parts: slices, stride: sum.m, ..*sum };
            workspaces.push(workspace);
        }
        let whole: Vec<_> = sums.into_iter().map(|sum| (sum, 1)).collect();
        for sums in [sliced, whole] {
            if !sums.is_empty() {
                // SAFETY: as the caller promises; the workspaces hold m sums for each slice.
                unsafe { self.sum_slices::<T>(&sums) }?;
            }
        }
        Ok(())
    }

    unsafe fn sum_slices<T: Element>(&self, sums: &[(Sum, usize)]) -> Result<()> {
        let mut params = params::Sums { count: sums.len() as i64, ..params::Sums::zeroed() };
        let mut grid = 0;
        for (to, (sum, slices)) in params.sums.iter_mut().zip(sums) {
            let rows = Plan::new(sum.parts, sum.m).rows;
            let columns = blocks(sum.m.div_ceil(QUAD), THREADS / rows).min(GRID_COLUMNS / params::MOST_SUMS / slices);
            let size = if sum.is_full { size_of::<f32>() } else { size_of::<T>() };
            let is_whole = sum.m.is_multiple_of(QUAD)
                && lies_whole::<f32>(sum.from, &[sum.stride as i64], QUAD)
                && sum.to.is_multiple_of((QUAD * size) as u64);
            *to = params::Sum {
                from: sum.from,
                to: sum.to,
                parts: sum.parts as i64,
                m: sum.m as i64,
                stride: sum.stride as i64,
                slice: sum.parts.div_ceil(*slices) as i64,
                row_shift: rows.ilog2().into(),
                first_block: grid as i64,
                columns: columns as i64,
                flags: u64::from(is_whole) | u64::from(sum.is_full) << 1,
            };
            grid += columns * slices;
        }
        let name = format!("sums_{}", suffix(T::DTYPE));
        // SAFETY: as the caller promises.
        unsafe { self.launch(Module::SUM, &name, [grid, 1], THREADS, [0, 0], &params) }
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
