//! Pools of states on NVIDIA GPUs: how kernels are told of slots, and rollbacks.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use super::check_rollback;
use crate::cuda::{Arguments, Cuda, Device, GRID_ROWS, Kernel, Module, Slots, Strided, params};
use crate::{DeviceSlots, Element, Result, View, ViewMut};

/// The slots of a call as its kernel takes them.
pub(crate) struct SlotList {
    pub params: params::Slots,
    /// Where they lie on the device, if a caller has put them there.
    pub storage: Range<u64>,
    /// The table that `params` points at where there are too many to travel in the launch.
    _table: Option<Arc<CudaSlice<u64>>>,
}

impl SlotList {
    /// The list of slots that have been checked against a pool of `count`. Those on a device are among the `arguments`.
    pub fn new<'a>(device: &Device, arguments: &mut Arguments<'a>, slots: Slots<'a>, count: usize) -> Result<Self> {
        let zeroed = bytemuck::Zeroable::zeroed();
        let mut params = params::Slots { kind: params::SLOTS_IDENTITY, count: count as i64, ..zeroed };
        let in_launch = |params| Ok(Self { params, storage: 0..0, _table: None });
        let list = match slots {
            Slots::Rows => return in_launch(params),
            Slots::Device(slots) => {
                let start = slots.address(arguments)?;
                (params.kind, params.table) = (params::SLOTS_TABLE, start);
                let storage = start..start + (slots.len * size_of::<i32>()) as u64;
                return Ok(Self { params, storage, _table: None });
            }
            Slots::Host(list) => list,
        };
        if let Some(few) = params.few.get_mut(..list.len()) {
            few.copy_from_slice(list);
            params.kind = params::SLOTS_LISTED;
            return in_launch(params);
        }
        let mut pairs = vec![0u64; list.len().div_ceil(2)];
        bytemuck::cast_slice_mut(&mut pairs)[..list.len()].copy_from_slice(list);
        let table = device.table("slots", &pairs)?;
        (params.kind, params.table) = (params::SLOTS_TABLE, device.address(&table));
        Ok(Self { params, storage: 0..0, _table: Some(table) })
    }
}

impl<'a> DeviceSlots<'a, Cuda> {
    /// Where they lie, to be read.
    fn address(&self, arguments: &mut Arguments<'a>) -> Result<u64> {
        arguments.read("slots", self.data, self.offset)
    }
}

/// [`rollback`](super::rollback) on the stream's device, asynchronously.
///
/// # Errors
/// As [`rollback`](super::rollback); and an argument that lies on another device. Nothing is written then. What the
/// driver refuses.
pub fn rollback<'s, St: Element>(
    stream: &Arc<CudaStream>,
    state: ViewMut<St, 3, Cuda>,
    token_states: View<St, 4, Cuda>,
    slots: impl Into<Slots<'s>>,
    accepted: &[usize],
) -> Result<()> {
    let slots = slots.into();
    check_rollback(&state, &token_states, slots, accepted)?;
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let [_, _, rows, columns] = token_states.shape;
    let Strided { data, strides: [batch, token, row, column] } = arguments.view("token_states", &token_states)?;
    let pool_slots = state.shape[0] as i64;
    let state = arguments.pool("state", state)?;
    let on_device = match slots {
        Slots::Device(slots) => slots.address(&mut arguments)?,
        _ => 0,
    };
    let restored: Vec<_> = accepted
        .iter()
        .enumerate()
        .filter(|&(row, _)| !slots.is_padding(row))
        .map(|(row, &accepted)| {
            let slot = match slots {
                Slots::Host(list) => list[row].into(),
                _ => row as i64,
            };
            params::Restored { row: row as i64, slot, token: accepted as i64 - 1 }
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
        slots: on_device,
        pool_slots,
    };
    let threads = 256;
    let grid = [(rows * columns).div_ceil(threads).min(1 << 16), count.min(GRID_ROWS)];
    let kernel = Kernel::new(Module::ROLLBACK, ["rollback", if size_of::<St>() == 2 { "16" } else { "32" }]);
    // SAFETY: shapes, slots and tokens have been checked against both buffers, slots on the device by the kernel. Every
    // element of the pool is written by one thread because slots and places differ; where a caller has put a slot on the device
    // twice, by one of several, whose values are all those of an element.
    unsafe { device.launch(&kernel, grid, threads, 0, &params) }
}
