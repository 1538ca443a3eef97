//! Launching the forward pass.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::launch::Launcher;
use super::{Inputs, OutputMut, Plan, Problem};
use crate::cuda::params::s4d::{self as kernels, forward::SMEM};
use crate::cuda::{Arguments, Cuda, Device, Module, suffix};
use crate::lti::s4d::tensors::Sizes;
use crate::{DType, Element, Result};

/// Runs S4D on the stream's device.
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
    let out = arguments.write("out", outputs.out)?;
    let final_state = arguments.write_optional("final_state", outputs.final_state)?;
    let Sizes { length, d_inner, .. } = problem.sizes;
    // Without an output there may be more channels than anything can be made of.
    if problem.sequences.count() == 0 || d_inner == 0 || length == 0 && final_state == 0 {
        return Ok(());
    }
    let launcher = Launcher::new(&device, &plan, problem, &mut arguments, &[(out, &[d_inner as i64])])?;
    let params = kernels::Forward { inputs: launcher.inputs, out, final_state };
    // As the kernels' launch bounds say.
    let grid = launcher.grid(if T::DTYPE == DType::Bf16 { 2 } else { 1 }, SMEM);
    // SAFETY (both): every address and extent has been checked by `Inputs::check` and `check_outputs`, and the workspaces
    // have an element for each that the kernels write.
    if launcher.is_split {
        unsafe { launcher.launch(Module::S4D_FORWARD, ["s4d_chunk_state", suffix(T::DTYPE)], grid, SMEM, &params) }?;
    }
    unsafe { launcher.launch(Module::S4D_FORWARD, ["s4d_forward", suffix(T::DTYPE)], grid, SMEM, &params) }
}
