//! Launching the update in place.

use std::sync::Arc;

use bytemuck::Zeroable;
use cudarc::driver::{CudaSlice, CudaStream};

use super::launch::number_of;
use super::{UpdateInputs, UpdateMut, UpdateProblem, UpdateTensors};
use crate::cuda::params::s4d::{self as kernels, update::THREADS};
use crate::cuda::{Arguments, Cuda, Device, DeviceViews, GRID_COLUMNS, Kernel, Module, blocks, grid_rows, suffix};
use crate::lti::Rule;
use crate::lti::s4d::check::{RECURRENCE_NAMES, check_recurrence};
use crate::lti::s4d::tensors::Sizes;
use crate::pool::cuda::SlotList;
use crate::view::check_len;
use crate::{Element, Result, View};

/// Makes of the parameters, on the stream's device, what an update reads: `(d_inner, 6, d_state)`, as
/// [`recurrence`](crate::lti::s4d::recurrence) does.
///
/// # Errors
/// A parameter that does not fit `a`, a buffer of another length, or what lies on another device; nothing is written then.
/// What the driver refuses.
pub fn recurrence(
    stream: &Arc<CudaStream>,
    log_delta: View<f32, 1, Cuda>,
    a: View<f32, 2, Cuda>,
    b: View<f32, 2, Cuda>,
    rule: Rule,
    to: &mut CudaSlice<f32>,
) -> Result<()> {
    let shape = check_recurrence(&log_delta, &a, &b)?;
    check_len("to", RECURRENCE_NAMES, &shape, to.len())?;
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let inputs = kernels::Inputs {
        log_delta: arguments.view("log_delta", &log_delta)?.into(),
        a: arguments.view("a", &a)?.into(),
        b: arguments.view("b", &b)?.into(),
        d_inner: shape[0] as i64,
        d_state: shape[2] as i64,
        rule: number_of(rule),
        ..kernels::Inputs::zeroed()
    };
    let params = kernels::Recurrence { inputs, to: arguments.write("to", to)? };
    let pairs = shape[0] * shape[2];
    if pairs == 0 {
        return Ok(());
    }
    let kernel = Kernel::new(Module::S4D_UPDATE, ["s4d_recurrence"]);
    let grid = [blocks(pairs, THREADS).min(GRID_COLUMNS), 1];
    // SAFETY: the parameters and the length of what is written have been checked.
    unsafe { device.launch(&kernel, grid, THREADS, 0, &params) }
}

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
        lane_shift: d_state.next_power_of_two().min(32).ilog2().into(),
        ..kernels::Update::zeroed()
    });
    if batch == 0 || length == 0 || d_inner == 0 {
        return Ok(());
    }
    let columns = d_inner.div_ceil(THREADS >> params.lane_shift).min(GRID_COLUMNS);
    let grid = [columns, grid_rows(columns, batch, 48 * device.properties().processors)];
    let list = SlotList::new(&device, &mut arguments, problem.inputs.slots, pool_slots)?;
    params.slots = list.params;
    let kernel = Kernel::new(Module::S4D_UPDATE, ["s4d_update", suffix(T::DTYPE), suffix(St::DTYPE)]);
    // SAFETY: every address and extent has been checked by `UpdateInputs::check` and `check_outputs`, slots on the device by
    // the kernel; slots of different rows differ, and each state and output is written by one thread. (Where a caller has put
    // a slot on the device twice, two write one state: whatever they leave there is numbers of the state's type.)
    unsafe { device.launch(&kernel, grid, THREADS, 0, &params) }
}
