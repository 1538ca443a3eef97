//! Launching the backward pass.

use std::sync::Arc;

use bytemuck::Zeroable;
use cudarc::driver::CudaStream;

use super::launch::Launcher;
use super::{GradientsMut, Inputs, OutputGradients, Plan, Problem, Tensors};
use crate::cuda::params::s4d::{self as kernels, BOX_STEPS, CHUNK, OF_KERNEL, THREADS, WARPS, backward_states};
use crate::cuda::params::{self, TensorMap};
use crate::cuda::{
    Arguments, COPIES_BOXES, Cuda, Device, DeviceBuffers, GRID_COLUMNS, Kernel, Module, Properties, or_null, suffix,
};
use crate::lti::s4d::tensors::Sizes;
use crate::{DType, Element, Result};

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
    let variant = Variant::of(T::DTYPE, plan.tf32, device.properties());
    // One that is not contiguous is as one that is not aligned.
    let d_out_strides = if d_out.strides[2] == 1 { [d_out.strides[0], d_out.strides[1]] } else { [1, 1] };
    let others: [(u64, &[i64]); 2] = [(d_out.data, &d_out_strides), (to.u, &[d_inner as i64])];
    let mut launcher = Launcher::new(&device, &plan, problem, &mut arguments, &others)?;
    let boxes = match launcher.are_rows() && variant.takes_boxes {
        true => {
            let activations = [launcher.inputs.u, d_out.into(), dense(to.u, &problem.sizes)];
            boxes::<T>(&device, &variant, problem, &activations)?
        }
        false => None,
    };
    if boxes.is_some() {
        launcher.inputs.flags |= kernels::FLAG_BOXES;
    }
    let [u_boxes, d_out_boxes, d_u_boxes] = boxes.unwrap_or_else(Zeroable::zeroed);
    let grid = launcher.grid(variant.at_a_time, variant.most_shared());
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
    let name = |kernel| [kernel, variant.suffix];
    // SAFETY (all): every address and extent has been checked by `Inputs::check` and `check_backward`, and the workspaces
    // have an element for each that the kernels write.
    if launcher.is_split {
        let forward = kernels::Forward { inputs: launcher.inputs, out: 0, final_state: 0 };
        let of_forward = kernels::forward::SMEM;
        unsafe {
            launcher.launch(Module::S4D_FORWARD, ["s4d_chunk_state", suffix(T::DTYPE)], grid, of_forward, &forward)
        }?;
        unsafe {
            launcher.launch(Module::S4D_BACKWARD, name("s4d_backward_chunk_state"), grid, variant.of_back, &params)
        }?;
    }
    if rows > 0 {
        let module = Module::S4D_BACKWARD_STATES;
        unsafe { launcher.launch(module, name("s4d_backward_states"), grid, variant.of_states, &params) }?;
        unsafe { launcher.launch(Module::S4D_BACKWARD, name("s4d_backward"), grid, variant.of_back, &params) }?;
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

/// The kernels for a type.
struct Variant {
    suffix: &'static str,
    /// Blocks that a processor has registers for, as their launch bounds say.
    at_a_time: usize,
    /// Whether there is code for the copy engine.
    takes_boxes: bool,
    /// Bytes of shared memory of the one that has the slopes by states, and of the one that goes back.
    of_states: usize,
    of_back: usize,
}

impl Variant {
    /// `tf32`: in TF32, whether or not there is another way.
    fn of(dtype: DType, tf32: bool, device: Properties) -> Self {
        let (of_states, of_back) = (backward_states::SMEM, kernels::backward::SMEM);
        let of_bf16 = Self { suffix: suffix(dtype), at_a_time: 2, takes_boxes: true, of_states, of_back };
        if dtype == DType::Bf16 && !tf32 && of_bf16.most_shared() <= device.shared_memory {
            return of_bf16;
        }
        let suffix = if dtype == DType::Bf16 { "bf16_in_tf32" } else { suffix(dtype) };
        let (of_states, of_back) = (backward_states::OF_OTHERS, kernels::backward::OF_OTHERS);
        Self { suffix, at_a_time: 1, takes_boxes: false, of_states, of_back }
    }

    /// Of the two kernels the bytes of the one that takes more: they have one grid.
    fn most_shared(&self) -> usize {
        self.of_states.max(self.of_back)
    }
}

/// What the copy engine moves, if the device has one and it can go through all of these.
fn boxes<T: Element>(
    device: &Device,
    variant: &Variant,
    problem: &Problem<T, Cuda>,
    activations: &[params::Activation; 3],
) -> Result<Option<[TensorMap; 3]>> {
    let kernel = Launcher::kernel(Module::S4D_BACKWARD, ["s4d_backward", variant.suffix], variant.of_back);
    if !device.is_compiled_for(&kernel, COPIES_BOXES)? {
        return Ok(None);
    }
    let Sizes { batch, length, d_inner, .. } = problem.sizes;
    let map = |of: &params::Activation| {
        TensorMap::new::<T>(of.data, [batch, length, d_inner], [of.batch, of.step], [1, BOX_STEPS, WARPS])
    };
    let [u, d_out, d_u] = activations;
    Ok(map(u).zip(map(d_out)).zip(map(d_u)).map(|((u, d_out), d_u)| [u, d_out, d_u]))
}

/// `(batch, length, d_inner)` without gaps.
fn dense(data: u64, sizes: &Sizes) -> params::Activation {
    let step = sizes.d_inner as i64;
    params::Activation { data, batch: step * sizes.length as i64, step, channel: 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On devices whose blocks have 227 and 99 KiB, every type has kernels that fit.
    #[test]
    fn every_device_has_kernels_of_every_type() {
        for (kib, of_bf16) in [(227, "bf16"), (163, "bf16"), (99, "bf16_in_tf32")] {
            let device = Properties { processors: 132, shared_memory: kib * 1024 };
            for dtype in [DType::F32, DType::F16, DType::Bf16] {
                let variant = Variant::of(dtype, false, device);
                assert!(variant.most_shared() <= device.shared_memory, "{dtype:?} of {kib} KiB");
                let suffix = if dtype == DType::Bf16 { of_bf16 } else { suffix(dtype) };
                assert_eq!(variant.suffix, suffix, "{kib} KiB");
            }
            assert_eq!(Variant::of(DType::Bf16, true, device).suffix, "bf16_in_tf32");
        }
    }

    /// Two blocks of bf16 where a processor has 228 KiB, one where it has 164.
    #[test]
    fn blocks_have_room_beside_each_other() {
        for (kib, at_a_time) in [(227, 2), (163, 1)] {
            let device = Properties { processors: 132, shared_memory: kib * 1024 };
            let variant = Variant::of(DType::Bf16, false, device);
            assert_eq!(device.blocks_by_shared_memory(variant.most_shared()), at_a_time);
        }
    }
}
