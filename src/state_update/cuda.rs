//! The state update on NVIDIA GPUs; see [`cuda`](crate::cuda) for how tensors are passed.
//!
//! Every state is read and written once, by one thread, and that is what the time goes to: a thread holds four
//! neighbouring states of a channel as they are stored, and four more in the fast kernel. What Mamba uses (Euler's rule,
//! varying `B` and `C`, `d_state` a multiple of 4 and at most 128) takes the fast kernel where states are contiguous and
//! start at multiples of 4 elements, those of the pool as well as those of `A`, `B` and `C`, and where no activation spans
//! 2^31 elements. Everything else gets the same bits from a general one.

use std::sync::Arc;

use bytemuck::Zeroable;
use cudarc::driver::CudaStream;

use super::check::Problem;
use super::tensors::Tensors;
use super::{Inputs, UpdateMut};
use crate::arguments::Dims;
use crate::cuda::params::state_update::{self as kernels, QUADS, THREADS};
use crate::cuda::params::{self, QUAD};
use crate::cuda::{
    Arguments, Cuda, Device, DeviceViews, GRID_COLUMNS, Kernel, Module, grid_rows, is_vectorizable, suffix,
};
use crate::pool::cuda::SlotList;
use crate::{Discretization, Element, Result};

pub use crate::pool::cuda::rollback;

/// Runs the update on the stream's device, asynchronously.
///
/// # Errors
/// An argument that does not fit, see [`Inputs`] and [`UpdateMut`], or that lies on another device; nothing is written
/// then. What the driver refuses.
pub fn update<T: Element, St: Element>(
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    outputs: UpdateMut<T, St, Cuda>,
) -> Result<()> {
    update_checked(stream, &inputs.check()?, outputs)
}

/// [`update`] of inputs that have been checked.
pub(crate) fn update_checked<T: Element, St: Element>(
    stream: &Arc<CudaStream>,
    problem: &Problem<T, Cuda>,
    outputs: UpdateMut<T, St, Cuda>,
) -> Result<()> {
    let options = problem.inputs.options;
    problem.check_outputs(&outputs)?;
    let pool_slots = outputs.state.shape[0];
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let Dims { batch, len, d_inner, d_state, .. } = problem.dims;
    let tensors: Tensors<DeviceViews> = problem.inputs.tensors().map(&mut arguments)?;
    let mut params = tensors.params(kernels::Update {
        state: arguments.pool("state", outputs.state)?,
        out: arguments.write("out", outputs.out)?,
        token_states: arguments.write_optional("token_states", outputs.token_states)?,
        batch: batch as i64,
        tokens: len as i64,
        d_inner: d_inner as i64,
        d_state: d_state as i64,
        group_channels: problem.dims.group_channels() as i64,
        ..kernels::Update::zeroed()
    });
    if batch == 0 || len == 0 {
        return Ok(());
    }
    let hold = options.discretization == Discretization::ZeroOrderHold;
    let whole = is_whole::<T, St>(&params);
    let euler = !hold && params.b.constant == 0 && params.c.constant == 0;
    let fast = whole && euler && d_state <= 32 * QUAD && is_small(&params);
    let held = if fast { QUADS * QUAD } else { QUAD };
    params.lane_shift = d_state.div_ceil(held).next_power_of_two().min(32).ilog2().into();
    params.flags = params::flags([
        (options.delta_softplus, kernels::FLAG_SOFTPLUS),
        (hold, kernels::FLAG_ZOH),
        (whole, kernels::FLAG_VECTOR),
    ]);
    let columns = d_inner.div_ceil(THREADS >> params.lane_shift).min(GRID_COLUMNS);
    let grid = [columns, grid_rows(columns, batch, 48 * device.properties().processors)];

    let list = SlotList::new(&device, &mut arguments, problem.inputs.slots, pool_slots)?;
    params.slots = list.params;
    let variant = if fast { "fast" } else { "general" };
    let kernel = Kernel::new(Module::STATE_UPDATE, ["state_update", variant, suffix(T::DTYPE), suffix(St::DTYPE)]);
    // SAFETY: every address and extent has been checked by `Inputs::check` and `check_outputs`, slots on the device by the
    // kernel; slots of different rows differ, and each state and output is written by one thread. (Where a caller has put a
    // slot on the device twice, two write one state: whatever they leave there is numbers of the state's type.)
    unsafe { device.launch(&kernel, grid, THREADS, 0, &params) }
}

/// Whether every index into what is not a state fits in 31 bits.
fn is_small(p: &kernels::Update) -> bool {
    let fits = |extents: &[(i64, i64)]| {
        let last: i128 = extents.iter().map(|&(count, stride)| i128::from(count - 1) * i128::from(stride)).sum();
        last < i128::from(i32::MAX)
    };
    let activation = |x: &params::Activation| fits(&[(p.batch, x.batch), (p.tokens, x.step), (p.d_inner, x.channel)]);
    let groups = p.d_inner / p.group_channels;
    let projection = |x: &params::Projection| {
        fits(&[(p.batch, x.batch), (p.tokens, x.step), (groups, x.group), (p.d_state, x.state)])
    };
    let out = [(p.batch, p.tokens * p.d_inner), (p.tokens, p.d_inner), (p.d_inner, 1)];
    [&p.u, &p.delta, &p.z].into_iter().all(activation) && projection(&p.b) && projection(&p.c) && fits(&out)
}

/// Whether all that has states as its last dimension can be accessed in vectors of 4.
fn is_whole<T, St>(p: &kernels::Update) -> bool {
    let projection = |x: &params::Projection| match x.constant {
        0 => x.state == 1 && is_vectorizable::<T>(x.data, &[x.batch, x.step, x.group], QUAD),
        _ => x.state == 1 && is_vectorizable::<f32>(x.data, &[x.channel], QUAD),
    };
    p.d_state % QUAD as i64 == 0
        && p.a.state == 1
        && is_vectorizable::<f32>(p.a.data, &[p.a.channel], QUAD)
        && projection(&p.b)
        && projection(&p.c)
        && p.state.column == 1
        && is_vectorizable::<St>(p.state.data, &[p.state.slot, p.state.row], QUAD)
        && is_vectorizable::<St>(p.token_states, &[], QUAD)
}
