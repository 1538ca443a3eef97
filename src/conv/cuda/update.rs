//! Launching the update in place.

use std::sync::Arc;

use bytemuck::Zeroable;
use cudarc::driver::CudaStream;

use super::super::tensors::UpdateTensors;
use super::super::update::UpdateProblem;
use super::{UpdateInputs, UpdateMut};
use crate::cuda::params::conv::{self as kernels, THREADS};
use crate::cuda::params::{self, QUAD};
use crate::cuda::{
    Arguments, Cuda, Device, DeviceViews, GRID_COLUMNS, Kernel, Module, blocks, grid_rows, is_vectorizable, suffix,
};
use crate::pool::cuda::SlotList;
use crate::{Element, Result};

/// Runs the update on the stream's device, asynchronously.
///
/// # Errors
/// An argument that does not fit, see [`UpdateInputs`] and [`UpdateMut`], or that lies on another device; nothing is
/// written then. What the driver refuses.
pub fn update<T: Element, St: Element>(
    stream: &Arc<CudaStream>,
    inputs: &UpdateInputs<T, Cuda>,
    outputs: UpdateMut<T, St, Cuda>,
) -> Result<()> {
    update_checked(stream, &inputs.check()?, outputs)
}

/// [`update`] of inputs that have been checked.
pub(crate) fn update_checked<T: Element, St: Element>(
    stream: &Arc<CudaStream>,
    problem: &UpdateProblem<T, Cuda>,
    outputs: UpdateMut<T, St, Cuda>,
) -> Result<()> {
    let inputs = &problem.inputs;
    problem.check_outputs(&outputs)?;
    let pool_slots = outputs.state.shape[0];
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let [batch, tokens, d_inner] = inputs.x.shape;
    let quads = d_inner.div_ceil(QUAD);
    let tensors: UpdateTensors<DeviceViews> = inputs.tensors().map(&mut arguments)?;
    let mut params = tensors.params(kernels::Update {
        state: arguments.pool("state", outputs.state)?,
        out: arguments.write("out", outputs.out)?,
        token_states: arguments.write_optional("token_states", outputs.token_states)?,
        batch: batch as i64,
        tokens: tokens as i64,
        d_inner: d_inner as i64,
        width: problem.width as i64,
        lane_shift: quads.min(THREADS).next_power_of_two().ilog2().into(),
        ..kernels::Update::zeroed()
    });
    if batch == 0 || tokens == 0 {
        return Ok(());
    }
    let whole = is_whole::<T, St>(&params);
    params.flags = params::flags([(inputs.silu, kernels::FLAG_SILU), (whole, kernels::FLAG_VECTOR)]);
    let lanes = 1 << params.lane_shift;
    let columns = blocks(quads, lanes).min(GRID_COLUMNS);
    // Rows share what a thread reads of the filters, once there are enough of them to fill the device.
    let grid = [columns, grid_rows(columns, blocks(batch, THREADS / lanes), 16 * device.properties().processors)];

    let list = SlotList::new(&device, &mut arguments, inputs.slots, pool_slots)?;
    params.slots = list.params;
    let variant = if whole && problem.width == 4 { "fast" } else { "general" };
    let kernel = Kernel::new(Module::CONV_UPDATE, ["conv_update", variant, suffix(T::DTYPE), suffix(St::DTYPE)]);
    // SAFETY: every address and extent has been checked by `UpdateInputs::check` and `check_outputs`, slots on the device by
    // the kernel; slots of different rows differ, and each state and output is written by one thread. (Where a caller has put
    // a slot on the device twice, two write one state: whatever they leave there is numbers of the state's type.)
    unsafe { device.launch(&kernel, grid, THREADS, 0, &params) }
}

/// Whether four neighbouring channels can be accessed at a time.
fn is_whole<T, St>(p: &kernels::Update) -> bool {
    p.x.channel == 1
        && is_vectorizable::<T>(p.x.data, &[p.x.batch, p.x.step], QUAD)
        && is_vectorizable::<T>(p.out, &[p.d_inner], QUAD)
        && p.state.column == 1
        && is_vectorizable::<St>(p.state.data, &[p.state.slot, p.state.row], QUAD)
        && is_vectorizable::<St>(p.token_states, &[], QUAD)
}
