//! Launching the backward pass.

use std::sync::Arc;

use bytemuck::Zeroable;
use cudarc::driver::{CudaSlice, CudaStream};

use super::launch::Launcher;
use super::{GradientsMut, Inputs, OutputGradients, Problem, Tensors};
use crate::complex_scan::tensors::Sizes;
use crate::cuda::params::complex_scan::{self as kernels, CHECKPOINT_STEPS, THREADS, backward::SMEM};
use crate::cuda::{Arguments, Cuda, Device, DeviceBuffers, Kernel, Module, Sum, or_null, suffix};
use crate::kinds::{Field, Map, Shaped};
use crate::{Element, Error, ProjectionOf, Result};

/// Computes the gradient of every input that was given on the stream's device. It needs nothing from a forward pass.
///
/// # Errors
/// An argument that does not fit, or lies on another device; nothing is written then. What the driver refuses.
pub fn backward<T: Element>(
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    d_outputs: OutputGradients<T, Cuda>,
    gradients: GradientsMut<T, Cuda>,
) -> Result<()> {
    backward_checked(stream, &inputs.check()?, d_outputs, gradients)
}

/// [`backward`] of inputs that have been checked.
pub(crate) fn backward_checked<T: Element>(
    stream: &Arc<CudaStream>,
    problem: &Problem<T, Cuda>,
    d_outputs: OutputGradients<T, Cuda>,
    gradients: GradientsMut<T, Cuda>,
) -> Result<()> {
    problem.check_backward(&d_outputs, &gradients)?;
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let Sizes { batch, length, d_inner, d_state, groups, .. } = problem.sizes;
    let gradients: Tensors<DeviceBuffers> = gradients.map(&mut arguments)?;
    let d_out = arguments.view("d_out", &d_outputs.d_out)?.into();
    let d_final_state = or_null(arguments.optional_view("d_final_state", &d_outputs.d_final_state)?);
    // Batch rows without a step could be more than can be counted through.
    let is_empty = d_inner == 0 || length == 0 && gradients.initial_state.is_none();
    let sequences = if is_empty { 0 } else { problem.sequences.count() };
    let launcher = Launcher::new(&device, problem, &mut arguments, sequences, true)?;
    let (steps, [columns, rows]) = (batch * length, launcher.grid);
    let rows = if sequences == 0 { 0 } else { rows };

    let mut sums = Sums { device: &device, rows, workspaces: Vec::new(), sums: Vec::new() };
    let written: Tensors<DeviceBuffers> = gradients.shaped(problem.sizes).map(&mut sums)?;
    let chunks = launcher.longest.div_ceil(CHECKPOINT_STEPS).saturating_sub(1);
    let checkpoints = device.workspace::<f64>("states", rows * columns * chunks * THREADS * 2)?;
    let parts = launcher.division.group_blocks;
    let m = steps * groups * 2 * d_state;
    let mut params = kernels::Backward {
        inputs: launcher.inputs,
        d_out,
        d_final_state,
        d_u: written.u,
        d_delta: written.delta,
        d_z: written.z.unwrap_or(0),
        d_initial_state: written.initial_state.unwrap_or(0),
        checkpoints: device.address(&checkpoints),
        chunks: chunks as i64,
        d_a: written.a,
        d_d: written.d.unwrap_or(0),
        d_bias: written.delta_bias.unwrap_or(0),
        steps: steps as i64,
        groups: groups as i64,
        ..kernels::Backward::zeroed()
    };
    let mut of_parts = |name, projection, constant: &mut u64, varying: &mut u64| -> Result<()> {
        match projection {
            ProjectionOf::Constant(address) => *constant = address,
            ProjectionOf::Varying(to) => {
                let workspace = device.workspace(name, parts * m)?;
                *varying = device.address(&workspace);
                sums.sums.push(Sum { from: *varying, parts, m, stride: m, to, is_full: false });
                sums.workspaces.push(workspace);
            }
        }
        Ok(())
    };
    of_parts("the gradient of b", written.b, &mut params.d_b, &mut params.of_b)?;
    of_parts("the gradient of c", written.c, &mut params.d_c, &mut params.of_c)?;
    if rows > 0 {
        let name = ["complex_scan_backward", suffix(T::DTYPE)];
        let kernel = Kernel { most_shared: SMEM, ..Kernel::new(Module::COMPLEX_SCAN_BACKWARD, name) };
        // SAFETY: every address and extent has been checked by `Inputs::check` and `check_backward`, and the workspaces have
        // an element for each that the kernel writes.
        unsafe { device.launch(&kernel, [columns, rows], THREADS, SMEM, &params) }?;
    }
    // SAFETY: the kernel has written `rows` rows of sums for each parameter, none if there are no sequences, and where there are
    // steps all parts of those by B and C.
    unsafe { device.sum::<T>(&sums.sums) }
}

/// Gradients that each row of blocks sums up for itself, and where the sums over the rows go.
struct Sums<'d> {
    device: &'d Device<'d>,
    rows: usize,
    workspaces: Vec<CudaSlice<f32>>,
    sums: Vec<Sum>,
}

/// Where the kernel writes what becomes a gradient: a parameter's is summed over rows of blocks.
impl Map<Shaped<DeviceBuffers>, DeviceBuffers> for Sums<'_> {
    type Error = Error;

    fn activation<const R: usize>(&mut self, _: Field, (to, _): (u64, [usize; R])) -> Result<u64> {
        Ok(to)
    }

    fn parameter<const R: usize>(&mut self, _: Field, (to, shape): (u64, [usize; R])) -> Result<u64> {
        // Of each state one block finds the gradient. (States have three dimensions.)
        if R == 3 {
            return Ok(to);
        }
        let m = shape.iter().product();
        let workspace = self.device.workspace("the gradients of parameters", self.rows * m)?;
        let from = self.device.address(&workspace);
        self.workspaces.push(workspace);
        self.sums.push(Sum { from, parts: self.rows, m, stride: m, to, is_full: true });
        Ok(from)
    }
}
