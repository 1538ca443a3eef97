//! What both passes ask of the device: tiles, tables and the parameters that all kernels read.

use std::sync::Arc;

use cudarc::driver::CudaSlice;

use super::plan::{Tiles, grid};
use crate::attention::check::Problem;
use crate::attention::tensors::{Sizes, Tensors};
use crate::cuda::params::{self, attention as kernels};
use crate::cuda::{Arguments, Cuda, Device, DeviceViews, Kernel, Module, Strided, is_vectorizable, suffix};
use crate::{DType, Element, Result};
use bytemuck::{Pod, Zeroable};

/// What a kernel is made for: a width that `d_head` is filled up to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub width: &'static str,
    /// Of a tile.
    pub rows: usize,
    pub threads: usize,
    /// Bytes of shared memory.
    pub shared: usize,
}

/// Makes a [`Shape`] of the constants of kernels/attention/params.cuh for an element type and a `d_head`.
macro_rules! shape {
    ($kernel:ident, $T:ty, $d_head:expr, $threads:ident, |$of:ident| $rows:expr) => {{
        use crate::cuda::params::attention::$kernel as kernel;
        macro_rules! of {
            ($width:literal, $name:ident) => {{
                use kernel::$name as $of;
                $crate::attention::cuda::launch::Shape {
                    width: $width,
                    rows: $rows,
                    threads: $of::$threads,
                    shared: $of::SMEM,
                }
            }};
        }
        match (<$T as $crate::Element>::DTYPE == $crate::DType::F32, $d_head) {
            (false, 0..=32) => of!("32", half_32),
            (false, ..=64) => of!("64", half_64),
            (false, ..=128) => of!("128", half_128),
            (false, _) => of!("256", half_256),
            (true, 0..=32) => of!("32", full_32),
            (true, ..=64) => of!("64", full_64),
            (true, ..=128) => of!("128", full_128),
            (true, _) => of!("256", full_256),
        }
    }};
}

pub(super) use shape;

/// A tensor as kernels take it.
pub(super) fn heads<T: Element>(tensor: Strided<4>, d_head: usize) -> kernels::Heads {
    let [batch, step, head, column] = tensor.strides;
    let per_chunk = 16 / size_of::<T>();
    let vector = column == 1
        && d_head.is_multiple_of(per_chunk)
        && is_vectorizable::<T>(tensor.data, &[batch, step, head], per_chunk);
    kernels::Heads { data: tensor.data, batch, step, head, column, vector: vector.into() }
}

/// What all kernels read but the sequences, with results at `written`.
pub(super) fn inputs<'a, T: Element>(
    problem: &Problem<'a, T, Cuda>,
    arguments: &mut Arguments<'a>,
    written: &[u64],
) -> Result<kernels::Inputs> {
    let Tensors { q, k, v }: Tensors<DeviceViews> = problem.inputs.tensors().map(arguments)?;
    let Sizes { length, steps, kv_heads, d_head, .. } = problem.sizes;
    let scale = problem.scale;
    let pairs = d_head.is_multiple_of(2) && written.iter().all(|&at| is_vectorizable::<T>(at, &[], 2));
    Ok(kernels::Inputs {
        q: heads::<T>(q, d_head),
        k: heads::<T>(k, d_head),
        v: heads::<T>(v, d_head),
        parts: kernels::Parts::zeroed(),
        length: length as i64,
        steps: steps as i64,
        kv_heads: kv_heads as i64,
        group: problem.sizes.group() as i64,
        d_head: d_head as i64,
        flags: params::flags([
            (problem.inputs.causal, kernels::FLAG_CAUSAL),
            (scale < 0.0, kernels::FLAG_NEGATIVE),
            (scale == 0.0, kernels::FLAG_ZERO),
            (pairs, kernels::FLAG_PAIRS),
        ]),
        scale,
        exponent: (f64::from(scale) * std::f64::consts::LOG2_E) as f32,
    })
}

/// Puts the sequences into what kernels read; the table must be there until they have been launched.
pub(super) fn set_parts(
    device: &Device,
    tiles: &Tiles,
    inputs: &mut kernels::Inputs,
) -> Result<Option<Arc<CudaSlice<u64>>>> {
    match tiles {
        &Tiles::Rows { count, length, tiles } => {
            let [count, length, tiles] = [count, length, tiles].map(|n| n as i64);
            inputs.parts = kernels::Parts { listed: 0, count, length, tiles };
            Ok(None)
        }
        Tiles::Listed { parts, .. } => {
            let listed: Vec<kernels::Part> = parts.iter().copied().map(kernels::Part::from).collect();
            let table = device.table("the sequences of attention", bytemuck::cast_slice(&listed))?;
            let listed = device.address(&table);
            inputs.parts = kernels::Parts { listed, count: parts.len() as i64, length: 0, tiles: 0 };
            Ok(Some(table))
        }
    }
}

/// Enqueues a kernel over tiles, a block for each of these and each head of keys.
///
/// # Safety
/// As [`Device::launch`].
pub(super) unsafe fn launch<T: Element, P: Pod>(
    device: &Device,
    module: Module,
    name: &'static str,
    shape: Shape,
    blocks: [usize; 2],
    params: &P,
) -> Result<()> {
    let kernel = Kernel { most_shared: shape.shared, ..Kernel::new(module, [name, shape.width, suffix(T::DTYPE)]) };
    // SAFETY: as the caller promises.
    unsafe { device.launch(&kernel, grid(blocks[0], blocks[1])?, shape.threads, shape.shared, params) }
}

/// Whether the kernels read the outputs of a forward pass.
pub(super) fn reads_out<T: Element>() -> bool {
    T::DTYPE == DType::F32
}
