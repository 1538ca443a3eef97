//! Sums of what the blocks of a kernel leave.

use bytemuck::Zeroable;

use super::{Device, GRID_COLUMNS, Module, blocks, lies_whole, params, suffix};
use crate::{Element, Result};

/// As in the kernel.
const THREADS: usize = 256;
const QUAD: usize = 4;
const AHEAD: usize = 4;

/// Threads of a block that share a column, by the shape alone, so that a sum is the same bits on any device: few columns
/// leave the threads of a block to share each.
fn rows(parts: usize, m: usize) -> usize {
    let quads = m.div_ceil(QUAD).clamp(1, THREADS);
    let most = (THREADS / quads.next_power_of_two()).max(8);
    parts.div_ceil(AHEAD).clamp(1, most).next_power_of_two().min(most)
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
        debug_assert!(sums.len() <= params::MOST_SUMS, "{sums:?}");
        let mut params = params::Sums::zeroed();
        let (mut count, mut grid) = (0, 0);
        for (to, sum) in params.sums.iter_mut().zip(sums.iter().filter(|sum| sum.m > 0)) {
            let rows = rows(sum.parts, sum.m);
            let blocks = blocks(sum.m.div_ceil(QUAD), THREADS / rows).min(GRID_COLUMNS / params::MOST_SUMS);
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
                row_shift: rows.ilog2().into(),
                first_block: grid as i64,
                blocks: blocks as i64,
                flags: u64::from(is_whole) | u64::from(sum.is_full) << 1,
            };
            count += 1;
            grid += blocks;
        }
        if count == 0 {
            return Ok(());
        }
        params.count = count;
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
        assert_eq!(rows(4, 1 << 20), 1);
        assert_eq!(rows(66, 10_240), 8);
        assert_eq!(rows(1056, 15), 64);
        assert_eq!(rows(0, 3), 1);
    }
}
