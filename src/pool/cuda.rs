//! Pools of states on NVIDIA GPUs: how kernels are told of slots, and rollbacks.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use super::{Slots, check_rollback};
use crate::cuda::{Arguments, Cuda, Device, GRID_ROWS, Kernel, Module, Strided, params};
use crate::{Element, Result, View, ViewMut};

/// The slots of a call as its kernel takes them.
pub(crate) struct SlotList {
    pub params: params::Slots,
    /// The table that `params` points at where there are too many to travel in the launch.
    _table: Option<Arc<CudaSlice<u64>>>,
}

impl SlotList {
    pub fn new(device: &Device, slots: Slots) -> Result<Self> {
        let mut params = params::Slots { kind: params::SLOTS_IDENTITY, ..bytemuck::Zeroable::zeroed() };
        let Some(slots) = slots.0 else { return Ok(Self { params, _table: None }) };
        if let Some(few) = params.few.get_mut(..slots.len()) {
            few.copy_from_slice(slots);
            params.kind = params::SLOTS_LISTED;
            return Ok(Self { params, _table: None });
        }
        let entries: Vec<u64> = slots.iter().map(|&slot| i64::from(slot) as u64).collect();
        let table = device.table("slots", &entries)?;
        (params.kind, params.table) = (params::SLOTS_TABLE, device.address(&table));
        Ok(Self { params, _table: Some(table) })
    }
}

/// [`rollback`](super::rollback) on the stream's device, asynchronously.
///
/// # Errors
/// As [`rollback`](super::rollback); and an argument that lies on another device. Nothing is written then. What the
/// driver refuses.
pub fn rollback<St: Element>(
    stream: &Arc<CudaStream>,
    state: ViewMut<St, 3, Cuda>,
    token_states: View<St, 4, Cuda>,
    slots: Option<&[i32]>,
    accepted: &[usize],
) -> Result<()> {
    let slots = check_rollback(&state, &token_states, slots, accepted)?;
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let [_, _, rows, columns] = token_states.shape;
    let Strided { data, strides: [batch, token, row, column] } = arguments.view("token_states", &token_states)?;
    let state = arguments.pool("state", state)?;
    let restored: Vec<_> = accepted
        .iter()
        .enumerate()
        .filter_map(|(row, &accepted)| {
            let slot = slots.get(row)? as i64;
            Some(params::Restored { row: row as i64, slot, token: accepted as i64 - 1 })
        })
        .collect();
    let count = restored.len();
    if count == 0 || rows == 0 || columns == 0 {
        return Ok(());
    }
    let table = device.table("what a rollback restores", bytemuck::cast_slice(&restored))?;
    let params = params::Rollback {
        state,
        token_states: data,
        batch,
        token,
        row,
        column,
        restored: device.address(&table),
        count: count as i64,
        rows: rows as i64,
        columns: columns as i64,
    };
    let threads = 256;
    let grid = [(rows * columns).div_ceil(threads).min(1 << 16), count.min(GRID_ROWS)];
    let kernel = Kernel::new(Module::ROLLBACK, ["rollback", if size_of::<St>() == 2 { "16" } else { "32" }]);
    // SAFETY: shapes, slots and tokens have been checked against both buffers, and every element of the pool is written
    // by one thread because slots and places differ.
    unsafe { device.launch(&kernel, grid, threads, 0, &params) }
}
