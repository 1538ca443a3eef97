//! Sums of what the blocks of a kernel leave.

use bytemuck::Zeroable;

use super::params::reduce_partials::{AHEAD, FLAG_F32, FLAG_VECTOR, THREADS};
use super::params::{MAX_SUMS, QUAD};
use super::{Device, GRID_COLUMNS, Kernel, Module, blocks, is_vectorizable, params, suffix};
use crate::{Element, Result};

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
    /// Forms all these sums, however many, in fixed orders.
    ///
    /// # Safety
    /// Each `from` and `to` must be addresses of memory that is valid for that, and `to` of elements that nothing else uses.
    pub unsafe fn sum<T: Element>(&self, sums: &[Sum]) -> Result<()> {
        let kernel = Kernel::new(Module::REDUCE_PARTIALS, ["reduce_partials", suffix(T::DTYPE)]);
        for (params, grid) in launches(sums, size_of::<T>()) {
            // SAFETY: as the caller promises.
            unsafe { self.launch(&kernel, [grid, 1], THREADS, 0, &params) }?;
        }
        Ok(())
    }
}

/// What each launch takes, and its blocks: as few launches as there is room for all sums in. Those of no elements are left
/// out. `size` is that of an element of the launch's type.
fn launches(sums: &[Sum], size: usize) -> Vec<(params::Sums, usize)> {
    let sums: Vec<_> = sums.iter().filter(|sum| sum.m > 0).collect();
    let launch = |sums: &[&Sum]| {
        let mut params = params::Sums::zeroed();
        params.count = sums.len() as i64;
        let mut grid = 0;
        for (to, sum) in params.sums.iter_mut().zip(sums) {
            let rows = rows(sum.parts, sum.m);
            let blocks = blocks(sum.m.div_ceil(QUAD), THREADS / rows).min(GRID_COLUMNS / MAX_SUMS);
            let size = if sum.is_full { size_of::<f32>() } else { size };
            let is_whole = sum.m.is_multiple_of(QUAD)
                && is_vectorizable::<f32>(sum.from, &[sum.stride as i64], QUAD)
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
                flags: params::flags([(is_whole, FLAG_VECTOR), (sum.is_full, FLAG_F32)]),
            };
            grid += blocks;
        }
        (params, grid)
    };
    sums.chunks(MAX_SUMS).map(launch).collect()
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

    /// Every sum with elements is in one launch, in order, and the blocks of a launch are dealt out without a gap.
    #[test]
    fn any_number_of_sums() {
        for count in [0, 1, 4, 5, 6, 10, 11, 23] {
            // One in four has no elements.
            let m = |i: usize| if i % 4 == 2 { 0 } else { 1000 * i + 1 };
            let sum = |i| Sum { from: 256 * i as u64, parts: i, m: m(i), stride: m(i), to: i as u64, is_full: true };
            let sums: Vec<_> = (0..count).map(sum).collect();
            let launches = launches(&sums, 2);
            let wanted: Vec<_> = (0..count).filter(|&i| m(i) > 0).collect();
            assert_eq!(launches.len(), wanted.len().div_ceil(MAX_SUMS), "{count}");
            let mut found = Vec::new();
            for (params, grid) in launches {
                let used = &params.sums[..params.count as usize];
                let mut block = 0;
                for sum in used {
                    assert_eq!(sum.first_block, block, "{count}");
                    assert!(sum.blocks > 0, "{count}");
                    block += sum.blocks;
                }
                assert_eq!(block, grid as i64, "{count}");
                found.extend(used.iter().map(|sum| (sum.to as usize, sum.m as usize, sum.parts as usize)));
            }
            let wanted: Vec<_> = wanted.into_iter().map(|i| (i, m(i), i)).collect();
            assert_eq!(found, wanted, "{count}");
        }
    }

    mod gpu {
        use cudarc::driver::{DevicePtr, DevicePtrMut};

        use super::super::*;

        /// Twelve sums in one call, which take three launches; skipped, and said so, where there is no device.
        #[test]
        fn more_sums_than_a_launch_takes() {
            let context = match crate::cuda::context(0) {
                Ok(context) => context,
                Err(error) => return eprintln!("no GPU, and none simulated ({error}): skipped"),
            };
            let stream = context.default_stream();
            let device = Device::new(&stream).expect("a device");
            // Small whole numbers, which f32 adds exactly in any order.
            let data: Vec<f32> = (0..4000).map(|i| (i % 13) as f32).collect();
            let from = stream.clone_htod(&data).expect("room");
            let mut to = stream.clone_htod(&vec![-1f32; 12 * 64]).expect("room");
            let shape = |i: usize| (i * 3 % 7, 5 * i + 1);
            {
                let (from, _read) = from.device_ptr(&stream);
                let (to, _written) = to.device_ptr_mut(&stream);
                let place = |i: usize| (i * 64 * size_of::<f32>()) as u64;
                let sum = |i: usize| {
                    let (parts, m) = shape(i);
                    Sum {
                        from: from + place(i),
                        parts,
                        m,
                        stride: m + 1,
                        to: to + place(i),
                        is_full: i.is_multiple_of(2),
                    }
                };
                let sums: Vec<_> = (0..12).map(sum).collect();
                // SAFETY: sum `i` reads up to 6·57 elements from `64·i` on, at most 704 + 342 of 4,000, and writes up to 56
                // of its own 64.
                unsafe { device.sum::<f32>(&sums) }.expect("the launches are valid");
            }
            let results = stream.clone_dtoh(&to).expect("results");
            for (i, results) in results.chunks(64).enumerate() {
                let (parts, m) = shape(i);
                let sum = |k: usize| (0..parts).map(|part| data[i * 64 + part * (m + 1) + k]).sum::<f32>();
                let expected: Vec<f32> = (0..64).map(|k| if k < m { sum(k) } else { -1.0 }).collect();
                assert_eq!(results, expected, "sum {i}");
            }
        }
    }
}
