//! Launching the forward pass.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::launch::Launcher;
use super::{Inputs, OutputMut, Problem};
use crate::complex_scan::tensors::Sizes;
use crate::cuda::params::complex_scan::{self as kernels, THREADS};
use crate::cuda::{Arguments, Cuda, Device, Kernel, Module, suffix};
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
    forward_checked(stream, &inputs.check()?, outputs)
}

/// [`forward`] of inputs that have been checked.
pub(crate) fn forward_checked<T: Element>(
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
    let sequences = problem.sequences.count();
    // Without an output there may be more channels, and more rows, than anything can be made of.
    if sequences == 0 || d_inner == 0 || length == 0 && final_state == 0 {
        return Ok(());
    }
    let launcher = Launcher::new(&device, problem, &mut arguments, sequences, false)?;
    let params = kernels::Forward { inputs: launcher.inputs, out, final_state };
    let kernel = Kernel::new(Module::COMPLEX_SCAN_FORWARD, ["complex_scan_forward", suffix(T::DTYPE)]);
    // SAFETY: every address and extent has been checked by `Inputs::check` and `check_outputs`.
    unsafe { device.launch(&kernel, launcher.grid, THREADS, 0, &params) }
}
