//! Launching the backward pass.

use std::sync::Arc;

use bytemuck::Zeroable;
use cudarc::driver::CudaStream;

use super::launch::Launcher;
use super::{GradientsMut, Inputs, OutputGradients, Plan, Problem, Tensors};
use crate::cuda::params::s4d::{self as kernels, BOX_STEPS, CHUNK, OF_KERNEL, THREADS, WARPS, backward_states};
use crate::cuda::params::{self, TensorMap};
use crate::cuda::{
    Arguments, COPIES_BOXES, Cuda, Device, DeviceBuffers, GRID_COLUMNS, Kernel, Module, or_null, suffix,
};
use crate::lti::s4d::tensors::Sizes;
use crate::{DType, Element, Error, Result};

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
    backward_with(Plan::default(), stream, inputs, d_outputs, gradients)
}

/// [`backward`] divided as `plan` says.
pub fn backward_with<T: Element>(
    plan: Plan,
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    d_outputs: OutputGradients<T, Cuda>,
    gradients: GradientsMut<T, Cuda>,
) -> Result<()> {
    backward_checked(plan, stream, &inputs.check()?, d_outputs, gradients)
}

/// [`backward_with`] of inputs that have been checked.
pub(crate) fn backward_checked<T: Element>(
    plan: Plan,
    stream: &Arc<CudaStream>,
    problem: &Problem<T, Cuda>,
    d_outputs: OutputGradients<T, Cuda>,
    gradients: GradientsMut<T, Cuda>,
) -> Result<()> {
    problem.check_backward(&d_outputs, &gradients)?;
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let Sizes { d_inner, d_state, .. } = problem.sizes;
    let to: Tensors<DeviceBuffers> = gradients.map(&mut arguments)?;
    let d_out = arguments.view("d_out", &d_outputs.d_out)?;
    let d_final_state = or_null(arguments.optional_view("d_final_state", &d_outputs.d_final_state)?);
    if d_inner == 0 {
        return Ok(());
    }
    let shared = Shared::of::<T>(&device)?;
    // One that is not contiguous is as one that is not aligned.
    let d_out_strides = if d_out.strides[2] == 1 { [d_out.strides[0], d_out.strides[1]] } else { [1, 1] };
    let others: [(u64, &[i64]); 2] = [(d_out.data, &d_out_strides), (to.u, &[d_inner as i64])];
    let mut launcher = Launcher::new(&device, &plan, problem, &mut arguments, &others)?;
    let boxes = match launcher.are_rows() && T::DTYPE == DType::Bf16 {
        true => {
            let activations = [launcher.inputs.u, d_out.into(), dense(to.u, &problem.sizes)];
            boxes::<T>(&device, shared.back, problem, &activations)?
        }
        false => None,
    };
    if boxes.is_some() {
        launcher.inputs.flags |= kernels::FLAG_BOXES;
    }
    let [u_boxes, d_out_boxes, d_u_boxes] = boxes.unwrap_or_else(Zeroable::zeroed);
    let grid = launcher.grid::<T>();
    let rows = if launcher.segments == 0 { 0 } else { grid[1] };
    let pairs = rows * d_inner * launcher.inputs.padded as usize;
    let sums = device.workspace::<f32>("sums of S4D", pairs * 4 * CHUNK + rows * d_inner * OF_KERNEL)?;
    let of_pairs = device.workspace::<f64>("sums over steps", pairs * 8)?;
    let states = if launcher.is_split { launcher.segments * d_inner * 2 * d_state } else { 0 };
    let d_chunk_states = device.workspace::<f32>("slopes by chunk states", states)?;
    let of_read = device.address(&sums);
    let after = |address: u64, count: usize| address + (count * size_of::<f32>()) as u64;
    let of_enter = after(of_read, pairs * 2 * CHUNK);
    let params = kernels::Backward {
        u_boxes,
        d_out_boxes,
        d_u_boxes,
        inputs: launcher.inputs,
        d_out: d_out.into(),
        d_final_state,
        d_u: to.u,
        d_initial_state: to.initial_state.unwrap_or(0),
        d_chunk_states: device.address(&d_chunk_states),
        of_read,
        of_enter,
        of_kernel: after(of_enter, pairs * 2 * CHUNK),
        of_pairs: device.address(&of_pairs),
        ..Zeroable::zeroed()
    };
    let name = |kernel| [kernel, suffix(T::DTYPE)];
    // SAFETY (all): every address and extent has been checked by `Inputs::check` and `check_backward`, and the workspaces
    // have an element for each that the kernels write.
    if launcher.is_split {
        let forward = kernels::Forward { inputs: launcher.inputs, out: 0, final_state: 0 };
        let of_forward = kernels::forward::SMEM;
        unsafe { launcher.launch(Module::S4D_FORWARD, name("s4d_chunk_state"), grid, of_forward, &forward) }?;
        unsafe { launcher.launch(Module::S4D_BACKWARD, name("s4d_backward_chunk_state"), grid, shared.back, &params) }?;
    }
    if rows > 0 {
        let module = Module::S4D_BACKWARD_STATES;
        unsafe { launcher.launch(module, name("s4d_backward_states"), grid, shared.states, &params) }?;
        unsafe { launcher.launch(Module::S4D_BACKWARD, name("s4d_backward"), grid, shared.back, &params) }?;
    }
    let kernel = Kernel::new(Module::S4D_GRADIENTS, ["s4d_gradients"]);
    let params = kernels::Gradients {
        sums: params,
        rows: rows as i64,
        d_log_delta: to.log_delta,
        d_a: to.a,
        d_b: to.b,
        d_c: to.c,
        d_d: to.d.unwrap_or(0),
        ..Zeroable::zeroed()
    };
    unsafe { device.launch(&kernel, [d_inner.min(GRID_COLUMNS), 1], THREADS, 0, &params) }
}

/// Bytes of shared memory for a block of each of the two kernels.
struct Shared {
    states: usize,
    back: usize,
}

impl Shared {
    fn of<T: Element>(device: &Device) -> Result<Self> {
        let shared = match T::DTYPE {
            DType::Bf16 => Self { states: backward_states::SMEM, back: kernels::backward::SMEM },
            DType::F16 | DType::F32 => Self { states: backward_states::OF_OTHERS, back: kernels::backward::OF_OTHERS },
        };
        let (most, there) = (shared.states.max(shared.back), device.properties().shared_memory);
        if there < most {
            let expected = format_args!(
                "a device whose blocks have {most} bytes of shared memory, for a backward pass of {}",
                suffix(T::DTYPE)
            );
            return Err(Error::argument("stream", expected, format_args!("one with {there}")));
        }
        Ok(shared)
    }
}

/// What the copy engine moves, if the device has one and it can go through all of these; `shared` is the shared memory of the kernel
/// that goes back.
fn boxes<T: Element>(
    device: &Device,
    shared: usize,
    problem: &Problem<T, Cuda>,
    activations: &[params::Activation; 3],
) -> Result<Option<[TensorMap; 3]>> {
    let kernel = Launcher::kernel(Module::S4D_BACKWARD, ["s4d_backward", suffix(T::DTYPE)], shared);
    if !device.is_compiled_for(&kernel, COPIES_BOXES)? {
        return Ok(None);
    }
    let Sizes { batch, length, d_inner, .. } = problem.sizes;
    let map = |of: &params::Activation| {
        TensorMap::new::<T>(of.data, [batch, length, d_inner], [of.batch, of.step], [BOX_STEPS, WARPS])
    };
    let [u, d_out, d_u] = activations;
    Ok(map(u).zip(map(d_out)).zip(map(d_u)).map(|((u, d_out), d_u)| [u, d_out, d_u]))
}

/// `(batch, length, d_inner)` without gaps.
fn dense(data: u64, sizes: &Sizes) -> params::Activation {
    let step = sizes.d_inner as i64;
    params::Activation { data, batch: step * sizes.length as i64, step, channel: 1 }
}
