//! The norm on NVIDIA GPUs; see [`cuda`](crate::cuda) for how tensors are passed.
//!
//! A team of threads holds a group of a row in registers, so that every operand is read once. That is as fast as memory is
//! where columns are contiguous, their number and the distance of rows are multiples of 4, and rows start at such multiples,
//! for groups of up to 8,192 columns. Everything else gets the same bits from loads of single
//! elements or from a second reading, and slower.
//!
//! What a row gets does not depend on the others; only the gradient of the weight sums over rows, in an order that follows
//! from the shape and the device.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::check::{BackwardProblem, Problem, Sizes};
use super::{BackwardInputs, GradientsMut, Inputs, Options, OutputMut};
use crate::cuda::params::Rows;
use crate::cuda::params::rms_norm::{self as kernels, MOST_THREADS, THREADS};
use crate::cuda::params::{self, QUAD, Vector};
use crate::cuda::{
    Arguments, Cuda, Device, GRID_COLUMNS, Kernel, Module, Sum, blocks, grid_rows, is_vectorizable, or_null,
};
use crate::{DType, Element, Error, Result};

/// Runs the norm on the stream's device, asynchronously.
///
/// # Errors
/// An argument that does not fit, see [`Inputs`] and [`OutputMut`], or that lies on another device; nothing is written
/// then. What the driver refuses.
pub fn forward<X: Element, S: Element, O: Element>(
    stream: &Arc<CudaStream>,
    inputs: &Inputs<X, S, Cuda>,
    outputs: OutputMut<S, O, Cuda>,
) -> Result<()> {
    forward_checked(stream, &inputs.check::<O>()?, outputs)
}

/// [`forward`] of inputs that have been checked.
pub(crate) fn forward_checked<X: Element, S: Element, O: Element>(
    stream: &Arc<CudaStream>,
    problem: &Problem<X, S, Cuda>,
    outputs: OutputMut<S, O, Cuda>,
) -> Result<()> {
    problem.check_outputs(&outputs)?;
    let (device, mut arguments) = (Device::new(stream)?, Arguments::new(stream));
    let inputs = &problem.inputs;
    let x = Rows::from(arguments.view("x", &inputs.x)?);
    let residual: Rows = or_null(arguments.optional_view("residual", &inputs.residual)?);
    let weight: Vector = or_null(arguments.optional_view("weight", &inputs.weight)?);
    let z: Rows = or_null(arguments.optional_view("z", &inputs.z)?);
    let out = arguments.write("out", outputs.out)?;
    let residual_out = arguments.write_optional("residual_out", outputs.residual_out)?;
    if problem.sizes.rows == 0 {
        return Ok(());
    }
    let layout = Layout::new(problem.sizes, kernels::forward::QUADS);
    let is_fast = layout.fits_registers()
        && is_whole::<X>(&x)
        && is_whole::<S>(&residual)
        && is_whole::<X>(&z)
        && is_whole_vector(&weight)
        && layout.is_whole::<O>(out)
        && layout.is_whole::<S>(residual_out);
    let variant = variant(is_fast, inputs.z.is_some());
    let params = kernels::Forward { inputs: layout.params(&inputs.options, z, weight), x, residual, out, residual_out };
    let kernel = Kernel::new(Module::NORM_FORWARD, ["rms_norm_forward", variant, types::<X, S, O>()?]);
    // A block to each team's row: what there is to do beside one is little.
    let grid = layout.grid(GRID_COLUMNS);
    // SAFETY: every address and extent has been checked by `Inputs::check` and `check_outputs`, and each element of the
    // outputs is written by one thread.
    unsafe { device.launch(&kernel, grid, layout.threads(), 0, &params) }
}

/// Computes the gradients that there are buffers for, asynchronously.
///
/// # Errors
/// An argument that does not fit, see [`BackwardInputs`] and [`GradientsMut`], or that lies on another device; nothing is
/// written then. What the driver refuses.
pub fn backward<X: Element, S: Element, O: Element>(
    stream: &Arc<CudaStream>,
    inputs: &BackwardInputs<X, S, O, Cuda>,
    gradients: GradientsMut<X, S, Cuda>,
) -> Result<()> {
    backward_checked(stream, &inputs.check()?, gradients)
}

/// [`backward`] of inputs that have been checked.
pub(crate) fn backward_checked<X: Element, S: Element, O: Element>(
    stream: &Arc<CudaStream>,
    problem: &BackwardProblem<X, S, O, Cuda>,
    gradients: GradientsMut<X, S, Cuda>,
) -> Result<()> {
    problem.check_gradients(&gradients)?;
    let (device, mut arguments) = (Device::new(stream)?, Arguments::new(stream));
    let (inputs, sizes) = (&problem.inputs, problem.sizes);
    let s = Rows::from(arguments.view("s", &inputs.s)?);
    let weight: Vector = or_null(arguments.optional_view("weight", &inputs.weight)?);
    let z: Rows = or_null(arguments.optional_view("z", &inputs.z)?);
    let d_out = Rows::from(arguments.view("d_out", &inputs.d_out)?);
    let d_residual_out: Rows = or_null(arguments.optional_view("d_residual_out", &inputs.d_residual_out)?);
    let d_x = arguments.write_optional("gradients.x", gradients.x)?;
    let d_residual = arguments.write_optional("gradients.residual", gradients.residual)?;
    let d_weight = gradients.weight.map(|d_weight| arguments.write("gradients.weight", d_weight)).transpose()?;
    let d_z = arguments.write_optional("gradients.z", gradients.z)?;
    if d_x == 0 && d_residual == 0 && d_weight.is_none() && d_z == 0 {
        return Ok(());
    }
    let layout = Layout::new(sizes, kernels::backward::QUADS);
    let is_fast = layout.fits_registers()
        && [s, d_residual_out].iter().all(is_whole::<S>)
        && is_whole::<O>(&d_out)
        && is_whole::<X>(&z)
        && is_whole_vector(&weight)
        && [d_x, d_z].into_iter().all(|to| layout.is_whole::<X>(to))
        && layout.is_whole::<S>(d_residual);
    // As many blocks as the device runs at a time, so that each leaves one part of the gradient of the weight.
    let grid = layout.grid(BACKWARD_BLOCKS * device.properties().processors);
    let parts = if sizes.rows == 0 || d_weight.is_none() { 0 } else { grid[1] };
    // The general kernel's teams have parts of their own, of which the first is the block's.
    let per_block = if is_fast { 1 } else { layout.teams() };
    let Some(stride) = sizes.width.checked_mul(per_block).filter(|stride| stride.checked_mul(parts.max(1)).is_some())
    else {
        return Err(Error::argument("s", "a width that fits in memory", sizes.width));
    };
    let workspace = device.workspace::<f32>("sums of the gradient of the weight", parts * stride)?;
    let partials = if parts > 0 { device.address(&workspace) } else { 0 };
    if sizes.rows > 0 {
        let params = kernels::Backward {
            inputs: layout.params(&inputs.options, z, weight),
            s,
            d_residual_out,
            d_out,
            d_x,
            d_residual,
            d_z,
            partials,
        };
        let variant = variant(is_fast, inputs.z.is_some());
        let kernel = Kernel::new(Module::NORM_BACKWARD, ["rms_norm_backward", variant, types::<X, S, O>()?]);
        // SAFETY: every address and extent has been checked by `BackwardInputs::check` and `check_gradients`, each element
        // of the gradients is written by one thread, and the workspace has room for what each row of blocks leaves.
        unsafe { device.launch(&kernel, grid, layout.threads(), 0, &params) }?;
    }
    let sum = |to| Sum { from: partials, parts, m: sizes.width, stride, to, is_full: true };
    // SAFETY: the parts are in the workspace, and the gradient has been checked to be as wide.
    unsafe { device.sum::<f32>(&d_weight.map(sum).into_iter().collect::<Vec<_>>()) }
}

/// Blocks of the backward pass that a processor has room for, by their registers.
const BACKWARD_BLOCKS: usize = 2;

/// How a pass divides its work.
#[derive(Clone, Copy)]
struct Layout {
    sizes: Sizes,
    /// The vectors of a row that a thread can hold.
    quads: usize,
    /// Threads that share a row, a power of two.
    lanes: usize,
}

impl Layout {
    /// As few threads to a row as can hold it, so that sums need few steps, but where it is narrow as many as read 128
    /// contiguous bytes at a time.
    fn new(sizes: Sizes, quads: usize) -> Self {
        let all = sizes.group_size.div_ceil(QUAD);
        // (A group of more columns than memory has bytes has rows without any.)
        let least = all.min(8).next_power_of_two();
        let lanes = all.div_ceil(quads).min(MOST_THREADS).next_power_of_two().max(least);
        Self { sizes, quads, lanes }
    }

    fn fits_registers(&self) -> bool {
        self.sizes.group_size <= self.lanes * self.quads * QUAD && self.sizes.group_size.is_multiple_of(QUAD)
    }

    fn threads(&self) -> usize {
        self.lanes.max(THREADS)
    }

    fn teams(&self) -> usize {
        self.threads() / self.lanes
    }

    /// Blocks along the groups, and along the rows.
    fn grid(&self, room: usize) -> [usize; 2] {
        let columns = self.sizes.groups().min(GRID_COLUMNS);
        [columns, grid_rows(columns, blocks(self.sizes.rows, self.teams()), room)]
    }

    fn params(&self, options: &Options, z: Rows, weight: Vector) -> kernels::Inputs {
        kernels::Inputs {
            z,
            weight,
            rows: self.sizes.rows as i64,
            groups: self.sizes.groups() as i64,
            group_size: self.sizes.group_size as i64,
            lane_shift: self.lanes.ilog2().into(),
            flags: params::flags([(options.norm_before_gate, kernels::FLAG_NORM_FIRST)]),
            eps: options.eps as f32,
            count: self.sizes.group_size as f32,
        }
    }

    /// Whether the columns of a dense buffer can be written as vectors.
    fn is_whole<T>(&self, address: u64) -> bool {
        is_vectorizable::<T>(address, &[self.sizes.width as i64], QUAD)
    }
}

/// Whether the columns of rows can be read as vectors. Absent ones qualify.
fn is_whole<T>(rows: &Rows) -> bool {
    rows.data == 0 || (rows.column == 1 && is_vectorizable::<T>(rows.data, &[rows.row], QUAD))
}

fn is_whole_vector(vector: &Vector) -> bool {
    vector.data == 0 || (vector.channel == 1 && is_vectorizable::<f32>(vector.data, &[], QUAD))
}

fn variant(is_fast: bool, is_gated: bool) -> &'static str {
    match (is_fast, is_gated) {
        (true, false) => "fast",
        (true, true) => "gated",
        (false, _) => "general",
    }
}

/// How the instances of a kernel for the types of the input, of the residual and of the output are named.
fn types<X: Element, S: Element, O: Element>() -> Result<&'static str> {
    use DType::{Bf16, F16, F32};
    Ok(match (X::DTYPE, S::DTYPE, O::DTYPE) {
        (F32, F32, F32) => "f32_f32_f32",
        (F32, F32, F16) => "f32_f32_f16",
        (F32, F32, Bf16) => "f32_f32_bf16",
        (F16, F16, F16) => "f16_f16_f16",
        (Bf16, Bf16, Bf16) => "bf16_bf16_bf16",
        (F16, F32, F16) => "f16_f32_f16",
        (Bf16, F32, Bf16) => "bf16_f32_bf16",
        // `check` has refused all others.
        (x, s, o) => return Err(Error::argument("x", "types that go together", format_args!("{x:?}, {s:?}, {o:?}"))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(group_size: usize, quads: usize) -> (usize, bool) {
        let layout = Layout::new(Sizes { rows: 1, width: group_size, group_size }, quads);
        (layout.lanes, layout.fits_registers())
    }

    /// Threads to a row, and whether it fits them.
    #[test]
    fn threads_of_a_row() {
        let of = [1, 4, 7, 16, 100, 768, 2048, 5000, 8192, 8196, usize::MAX / 2].map(|width| layout(width, 4));
        let expected = [
            (1, false),
            (1, true),
            (2, false),
            (4, true),
            (8, true),
            (64, true),
            (128, true),
            (512, true),
            (512, true),
            (512, false),
            (512, false),
        ];
        assert_eq!(of, expected);
    }
}
