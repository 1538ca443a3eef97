//! Launching the forward pass.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::launch::{inputs, launch, set_parts, shape};
use super::plan::{Forward, grid};
use crate::attention::check::Problem;
use crate::attention::{Inputs, OutputMut};
use crate::cuda::params::attention::{self as kernels, split};
use crate::cuda::{Arguments, Cuda, Device, Kernel, Module, suffix};
use crate::{Element, Result};

/// Runs attention on the stream's device, asynchronously.
///
/// # Errors
/// An argument that does not fit, see [`Inputs`] and [`OutputMut`], or that lies on another device; a sequence of more than 2^30
/// keys, or of more queries of the heads that read one head of keys. Nothing is written then. What the driver refuses.
pub fn forward<T: Element>(
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    outputs: OutputMut<T, Cuda>,
) -> Result<()> {
    forward_checked(stream, &inputs.check()?, outputs)
}

/// [`forward`] of inputs that have been checked.
pub(crate) fn forward_checked<T: Element>(
    stream: &Arc<CudaStream>,
    problem: &Problem<T, Cuda>,
    outputs: OutputMut<T, Cuda>,
) -> Result<()> {
    problem.check_output(&outputs)?;
    let (d_head, kv_heads) = (problem.sizes.d_head, problem.sizes.kv_heads);
    let of_whole = shape!(forward, T, d_head, THREADS, |of| of::ROWS);
    let of_split = shape!(split, T, d_head, THREADS, |of| split::ROWS);
    let plan = Forward::of(problem, of_whole.rows)?;
    // Before anything is launched.
    for tiles in [&plan.whole, &plan.split].into_iter().flatten() {
        grid(tiles.count(), kv_heads)?;
        grid(tiles.joined(), kv_heads * split::ROWS)?;
    }
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let (out, lse) = (arguments.write("out", outputs.out)?, arguments.write("lse", outputs.lse)?);
    let mut inputs = inputs(problem, &mut arguments, &[out])?;
    // The greatest score is the greatest product: the kernels exchange the sign of the queries, or make them zero.
    inputs.exponent = if problem.scale == 0.0 { 1.0 } else { inputs.exponent.abs() };
    let mut params = kernels::Forward { inputs, out, lse, sums: 0, weights: 0, kept: 0 };
    if let Some(tiles) = &plan.whole {
        let _table = set_parts(&device, tiles, &mut params.inputs)?;
        // SAFETY: every address and extent has been checked by `Inputs::check` and `check_output`, and each element of the
        // results is written by one block.
        unsafe {
            launch::<T, _>(
                &device,
                Module::ATTENTION_FORWARD,
                "attention_forward",
                of_whole,
                [tiles.count(), kv_heads],
                &params,
            )
        }?;
    }
    let Some(tiles) = &plan.split else { return Ok(()) };
    let _table = set_parts(&device, tiles, &mut params.inputs)?;
    // What several pieces leave.
    let kept = tiles.most_queries().saturating_mul(problem.sizes.group()).min(split::ROWS);
    let rows = if tiles.joined() > 0 { tiles.count() * kv_heads * kept } else { 0 };
    params.kept = kept as i64;
    let sums = device.workspace::<f32>("the sums of pieces", rows * d_head)?;
    let weights = device.workspace::<f32>("the weights of pieces", 2 * rows)?;
    (params.sums, params.weights) = (device.address(&sums), device.address(&weights));
    // SAFETY (both): as above; the workspaces have room for what each block leaves, where there are several pieces, and what is
    // joined is what these left.
    unsafe {
        launch::<T, _>(
            &device,
            Module::ATTENTION_SPLIT,
            "attention_split",
            of_split,
            [tiles.count(), kv_heads],
            &params,
        )?;
        if tiles.joined() > 0 {
            let kernel = Kernel::new(Module::ATTENTION_SPLIT, ["attention_join", suffix(T::DTYPE)]);
            let blocks = grid(tiles.joined(), kv_heads * split::ROWS)?;
            device.launch(&kernel, blocks, split::JOIN_THREADS, 0, &params)?;
        }
    }
    Ok(())
}
