//! Launching the backward pass.

use std::sync::Arc;

use bytemuck::Zeroable;
use cudarc::driver::{CudaSlice, CudaStream};

use super::launch::{Kernel, LaunchShape, Undivided};
use super::plan::Pass;
use super::{GradientsMut, Inputs, OutputGradients, Plan};
use crate::ProjectionOf;
use crate::arguments::Dims;
use crate::cuda::params::scan::{
    self as kernels, STATE_BLOCK, backward as fast, backward_chunk_state, backward_general,
};
use crate::cuda::{Arguments, Cuda, Device, GRID_ROWS, Module, Sum, lies_whole};
use crate::{Element, Result};

/// Computes the gradient of every input that was given on the stream's device. `checkpoints` are those that a forward pass
/// on a GPU kept.
///
/// The caller must see to it that they are those of the same inputs and options: of a bare buffer nothing but its length can
/// be checked, and with other states in it the gradients are wrong without an error.
///
/// # Errors
/// An argument that does not fit, or lies on another device; nothing is written then. What the driver refuses.
pub fn backward<T: Element>(
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    checkpoints: &CudaSlice<f32>,
    d_outputs: OutputGradients<T, Cuda>,
    gradients: GradientsMut<T, Cuda>,
) -> Result<()> {
    backward_with(Plan::default(), stream, inputs, checkpoints, d_outputs, gradients)
}

/// [`backward`] divided as `plan` says.
pub fn backward_with<T: Element>(
    plan: Plan,
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    checkpoints: &CudaSlice<f32>,
    d_outputs: OutputGradients<T, Cuda>,
    gradients: GradientsMut<T, Cuda>,
) -> Result<()> {
    let problem = inputs.check()?;
    problem.check_backward(checkpoints, &d_outputs, &gradients)?;
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let mut undivided = Undivided::new(&problem, &mut arguments)?;
    let Dims { batch, len, d_inner, d_state, groups, .. } = problem.dims;
    let steps = batch * len;

    let mut projection = |name, gradient| -> Result<_> {
        Ok(match gradient {
            ProjectionOf::Varying(data) => (arguments.write(name, data)?, 0),
            ProjectionOf::Constant(data) => (0, arguments.write(name, data)?),
        })
    };
    let [(b, constant_b), (c, constant_c)] =
        [projection("gradients.b", gradients.b)?, projection("gradients.c", gradients.c)?];
    let mut params = kernels::Backward {
        inputs: undivided.inputs,
        d_out: arguments.activation("d_out", &d_outputs.d_out)?,
        d_final_state: arguments.states("d_final_state", &d_outputs.d_final_state)?,
        checkpoints: arguments.read("checkpoints", checkpoints, 0)?,
        d_u: arguments.write("gradients.u", gradients.u)?,
        d_delta: arguments.write("gradients.delta", gradients.delta)?,
        d_z: arguments.write_optional("gradients.z", gradients.z)?,
        d_initial_state: arguments.write_optional("gradients.initial_state", gradients.initial_state)?,
        groups: groups as i64,
        steps: steps as i64,
        ..kernels::Backward::zeroed()
    };
    let (d_out, row) = (params.d_out, &[d_inner as i64][..]);
    let d_out_is_aligned = d_out.channel == 1 && undivided.is_aligned::<T>(&[(d_out.data, &[d_out.batch, d_out.step])]);
    let checkpoints_are_aligned = lies_whole::<f32>(params.checkpoints, &[], 4);
    undivided.is_fast &= d_out_is_aligned
        && checkpoints_are_aligned
        && undivided.is_aligned::<T>(&[(params.d_u, row), (params.d_delta, row), (params.d_z, row)]);
    // Some devices, 8.6, 8.9 and 12.0 among them, give a block less than the fast kernel's shared memory.
    let fast_shared = fast::SMEM + fast::SMEM_PER_BYTE * size_of::<T>();
    undivided.is_fast &= fast_shared <= device.shared_memory;
    let scan = undivided.divide(&device, &problem, &plan, Pass::Backward)?;
    params.inputs = scan.inputs;

    // Rows of blocks, each of which sums the gradients of parameters over the segments that it takes: as many for both
    // kernels, so that they give the same bits.
    let segments = scan.inputs.segments.count as usize;
    let columns = scan.groups() * scan.group_blocks(fast::CHANNELS);
    let rows = segments.min((BLOCKS_PER_PROCESSOR * device.processors).div_ceil(columns)).min(GRID_ROWS);
    let shape =
        |variant, channels, threads, shared| LaunchShape { variant, channels, threads, rows, shared: [shared; 2] };
    let fast = |variant| (Module::SCAN_BACKWARD, shape(variant, fast::CHANNELS, fast::THREADS, fast_shared), "fast");
    let (module, backward, chunk_state) = match scan.kernel {
        Kernel::General => {
            use backward_general::{CHANNELS, SMEM, THREADS};
            (Module::SCAN_BACKWARD_GENERAL, shape("general", CHANNELS, THREADS, SMEM), "general")
        }
        Kernel::Turns => fast("many_states"),
        Kernel::Fast(_) => fast("fast"),
    };
    let chunk_state = shape(chunk_state, backward_chunk_state::CHANNELS, backward_chunk_state::THREADS, 0);
    let group_blocks = scan.group_blocks(backward.channels);

    let mut sums = Sums { device: &device, rows, workspaces: Vec::new(), sums: Vec::new() };
    params.d_a = sums.add(d_inner * d_state, arguments.write("gradients.a", gradients.a)?)?;
    params.d_b = sums.add(d_inner * d_state, constant_b)?;
    params.d_c = sums.add(d_inner * d_state, constant_c)?;
    params.d_d = sums.add(d_inner, arguments.write_optional("gradients.d", gradients.d)?)?;
    params.d_bias = sums.add(d_inner, arguments.write_optional("gradients.delta_bias", gradients.delta_bias)?)?;

    let lines = steps * groups;
    let projections = match b != 0 || c != 0 {
        true => Some(device.workspace::<f32>("the gradients of b and c", group_blocks * lines * 2 * d_state)?),
        false => None,
    };
    params.projections = projections.as_ref().map_or(0, |parts| device.address(parts));
    let carried = match d_state > STATE_BLOCK {
        true => Some(device.workspace::<f32>("sums over states", 3 * steps * d_inner)?),
        false => None,
    };
    params.partial_sums = carried.as_ref().map_or(0, |sums| device.address(sums));
    let workspace = scan.workspace(&device)?;
    if let Some(workspace) = &workspace {
        params.inputs = scan.split_inputs(&device, workspace);
    }

    // Each turn of states is a launch. (Each turn overwrites what the one before has left as the sums of D and the bias.)
    let turns = if segments > 0 { d_state } else { 0 };
    for first_state in (0..turns).step_by(STATE_BLOCK) {
        let params = kernels::Backward { first_state: first_state as i64, ..params };
        // SAFETY (both): every address and extent has been checked by `Inputs::check` and `check_backward`, and the
        // workspaces have an element for each that the kernels write.
        if workspace.is_some() {
            unsafe {
                scan.launch::<T, _>(
                    &device,
                    Module::SCAN_BACKWARD_CHUNK_STATE,
                    "scan_backward_chunk_state",
                    chunk_state,
                    params,
                )
            }?;
        }
        unsafe { scan.launch::<T, _>(&device, module, "scan_backward", backward, params) }?;
    }
    if let Some(parts) = &projections {
        let m = lines * d_state;
        for (i, to) in [b, c].into_iter().enumerate().filter(|(_, to)| *to != 0) {
            let from = device.address(parts) + (i * group_blocks * m * size_of::<f32>()) as u64;
            sums.sums.push(Sum { from, parts: group_blocks, m, stride: m, to, is_full: false });
        }
    }
    // SAFETY: the backward kernel has written `group_blocks` rows of `m` sums for each of B and C, and `rows` for each
    // parameter: none, if there are no segments.
    unsafe { device.sum::<T>(&sums.sums) }
}

/// Blocks for each processor that the rows are enough for; more would only make more parts of sums.
const BLOCKS_PER_PROCESSOR: usize = 8;

/// Gradients that each row of blocks sums up for itself, and where the sums over the rows go.
struct Sums<'d> {
    device: &'d Device<'d>,
    rows: usize,
    workspaces: Vec<CudaSlice<f32>>,
    sums: Vec<Sum>,
}

impl Sums<'_> {
    /// Room for `m` sums of each row, whose totals go to the address `to`; a null stays one.
    fn add(&mut self, m: usize, to: u64) -> Result<u64> {
        if to == 0 {
            return Ok(0);
        }
        let workspace = self.device.workspace("the gradients of parameters", self.rows * m)?;
        let from = self.device.address(&workspace);
        self.workspaces.push(workspace);
        self.sums.push(Sum { from, parts: self.rows, m, stride: m, to, is_full: true });
        Ok(from)
    }
}
