//! Launching the update in place.

use std::sync::Arc;

use bytemuck::Zeroable;
use cudarc::driver::CudaStream;

use super::{UpdateInputs, UpdateMut, UpdateProblem, UpdateTensors};
use crate::complex_scan::tensors::Sizes;
use crate::cuda::params::complex_scan::{self as kernels, update::THREADS};
use crate::cuda::{Arguments, Cuda, Device, DeviceViews, GRID_COLUMNS, Kernel, Module, grid_rows, params, suffix};
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
    problem.check_outputs(&outputs)?;
    let pool_slots = outputs.state.shape[0];
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let Sizes { batch, length, d_inner, d_state, .. } = problem.sizes;
    let tensors: UpdateTensors<DeviceViews> = problem.inputs.tensors().map(&mut arguments)?;
    let mut params = tensors.params(kernels::Update {
        state: arguments.pool("state", outputs.state)?,
        out: arguments.write("out", outputs.out)?,
        token_states: arguments.write_optional("token_states", outputs.token_states)?,
        batch: batch as i64,
        tokens: length as i64,
        d_inner: d_inner as i64,
        d_state: d_state as i64,
        group_channels: problem.sizes.group_channels() as i64,
        lane_shift: d_state.next_power_of_two().min(32).ilog2().into(),
        flags: params::flags([(problem.inputs.delta_softplus, kernels::FLAG_SOFTPLUS)]),
        ..kernels::Update::zeroed()
    });
    if batch == 0 || length == 0 || d_inner == 0 {
        return Ok(());
    }
    let columns = d_inner.div_ceil(THREADS >> params.lane_shift).min(GRID_COLUMNS);
    let grid = [columns, grid_rows(columns, batch, 48 * device.properties().processors)];
    let list = SlotList::new(&device, &mut arguments, problem.inputs.slots, pool_slots)?;
    params.slots = list.params;
    let name = ["complex_scan_update", suffix(T::DTYPE), suffix(St::DTYPE)];
    let kernel = Kernel::new(Module::COMPLEX_SCAN_UPDATE, name);
    // SAFETY: every address and extent has been checked by `UpdateInputs::check` and `check_outputs`, slots on the device by
    // the kernel; slots of different rows differ, and each state and output is written by one thread. (Where a caller has put
    // a slot on the device twice, two write one state: whatever they leave there is numbers of the state's type.)
    unsafe { device.launch(&kernel, grid, THREADS, 0, &params) }
}
