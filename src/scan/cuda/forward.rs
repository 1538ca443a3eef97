//! Launching the forward pass.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::launch::{Launcher, Undivided};
use super::recipe::Recipe;
use super::{Inputs, OutputMut, Plan, Problem};
use crate::arguments::Dims;
use crate::cuda::params::scan as kernels;
use crate::cuda::{Arguments, Cuda, Device, is_vectorizable};
use crate::{Element, Result};

/// Runs the scan on the stream's device.
///
/// # Errors
/// An argument that does not fit, or lies on another device; nothing is written then. What the driver refuses.
pub fn forward<T: Element>(
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    outputs: OutputMut<T, Cuda>,
) -> Result<()> {
    forward_with(Plan::default(), stream, inputs, outputs)
}

/// [`forward`] divided as `plan` says.
pub fn forward_with<T: Element>(
    plan: Plan,
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    outputs: OutputMut<T, Cuda>,
) -> Result<()> {
    forward_checked(plan, stream, &inputs.check()?, outputs)
}

/// [`forward_with`] of inputs that have been checked.
pub(crate) fn forward_checked<T: Element>(
    plan: Plan,
    stream: &Arc<CudaStream>,
    problem: &Problem<T, Cuda>,
    outputs: OutputMut<T, Cuda>,
) -> Result<()> {
    problem.check_outputs(&outputs)?;
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let mut undivided = Undivided::new(problem, &mut arguments)?;
    let out = arguments.write("out", outputs.out)?;
    let final_state = arguments.write_optional("final_state", outputs.final_state)?;
    let checkpoints = arguments.write_optional("checkpoints", outputs.checkpoints)?;
    let Dims { len, d_inner, .. } = problem.dims;
    if problem.sequences.count() == 0 || len == 0 && final_state == 0 {
        return Ok(());
    }
    undivided.is_fast &= !undivided.compensates
        && is_vectorizable::<f32>(checkpoints, &[], 4)
        && undivided.is_aligned::<T>(&[(out, &[d_inner as i64])]);
    let shape = undivided.shape(problem);
    let recipe = Recipe::forward(&shape, device.properties(), &plan);
    let launcher = Launcher::new(&device, &recipe, &shape)?;
    let params = kernels::Forward { inputs: undivided.inputs, out, final_state, checkpoints };
    for launch in &recipe.launches {
        // SAFETY: every address and extent has been checked by `Inputs::check` and `check_outputs`, and the workspace has an
        // element for each that the chunk states' kernel writes and the kernel after it reads.
        unsafe { launcher.launch(launch, params) }?;
    }
    Ok(())
}
