//! The keys and values of an attention layer, which decoding carries from one call to the next.

use candle_core::{DType, Device, Result, Tensor};

use super::AttentionConfig;
use crate::candle::{Slots, write_each};
use crate::nn::decode::{check_pools, check_slots};
use crate::nn::{NewTokens, argument, check_room};

/// The keys and values of one layer for a number of sequences, each in a slot of its own, with room for so many tokens.
///
/// Memory is asked for whole when the state is made; on processors a system gives it as it is written. A call that would need
/// more than there is room for is refused before anything is written, with the slot and the capacity in its message.
///
/// The tensors are written in place. **A clone is another handle to the same states**, not a copy: what is written through
/// one is seen through the other. [`Cache::snapshot`](crate::nn::Cache::snapshot) copies.
#[derive(Debug, Clone)]
pub struct AttentionState {
    /// The keys, turned to their positions, `(slots, capacity, n_kv_head · d_head)`. What is beyond a slot's length means
    /// nothing.
    pub k: Tensor,
    /// The values, of the same shape.
    pub v: Tensor,
    /// How many tokens are in each slot, `(slots)` of `u32` on the processor.
    pub length: Tensor,
}

const POOL_NAMES: &str = "(slots, capacity, n_kv_head * d_head)";

impl AttentionState {
    /// Empty slots, each with room for `capacity` tokens. `dtype` is that of the keys and values: `f32`, `f16` or `bf16`.
    ///
    /// # Errors
    /// A type that is none of these; more than fits in memory; more than 2^32 tokens.
    pub fn new(config: &AttentionConfig, slots: usize, capacity: usize, dtype: DType, device: &Device) -> Result<Self> {
        config.check()?;
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(argument("dtype", "f32, f16 or bf16", dtype.as_str()));
        }
        if u32::try_from(capacity).is_err() {
            return Err(argument("capacity", "less than 2^32", capacity));
        }
        let shape = [slots, capacity, config.n_kv_head * config.d_head];
        check_room("capacity", &shape, dtype, device)?;
        let pool = || Tensor::zeros(&shape, dtype, device);
        Ok(Self { k: pool()?, v: pool()?, length: Tensor::zeros(slots, DType::U32, &Device::Cpu)? })
    }

    /// The number of sequences that it holds.
    pub fn slots(&self) -> usize {
        // One that was made by hand may be of no dimensions.
        self.k.dims().first().copied().unwrap_or(0)
    }

    /// The tokens that a slot has room for.
    pub fn capacity(&self) -> usize {
        self.k.dims().get(1).copied().unwrap_or(0)
    }

    /// How many tokens are in each slot.
    ///
    /// # Errors
    /// A tensor that was made by hand and is no list of `u32`.
    pub fn lengths(&self) -> Result<Vec<u32>> {
        self.length.to_vec1()
    }

    /// Empties these slots, or all, so that new sequences can begin there. A negative slot is padding.
    ///
    /// # Errors
    /// A slot that there is not; tensors that no call would take. Nothing is written then.
    pub fn reset(&self, slots: Option<&[i32]>) -> Result<()> {
        self.check_pools()?;
        check_slots("slots", slots.unwrap_or_default(), self.slots(), true)?;
        crate::nn::decode::reset(&[&self.length], slots)
    }

    /// Its tensors, whose first dimension is the slots'.
    pub(crate) fn pools(&self) -> [&Tensor; 3] {
        [&self.k, &self.v, &self.length]
    }

    /// Other tensors in their places.
    pub(crate) fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        // The lengths are read on the processor wherever the rest is.
        Ok(Self { k: f(&self.k)?, v: f(&self.v)?, length: f(&self.length)?.to_device(&Device::Cpu)? })
    }

    /// Checks that all can be written, before one is, and gives the shape of keys and values.
    pub(crate) fn check_pools(&self) -> Result<[usize; 3]> {
        let [k, v] = check_pools([("cache.k", POOL_NAMES, &self.k), ("cache.v", POOL_NAMES, &self.v)])?;
        if k != v {
            return Err(argument("cache.v", format_args!("shape {k:?}, as `cache.k`"), format_args!("{v:?}")));
        }
        let length = &self.length;
        let is_list = length.dims() == [k[0]] && length.dtype() == DType::U32 && length.device().is_cpu();
        if !is_list || length.track_op() || !length.is_contiguous() {
            let expected = format_args!("{} numbers of u32 on the processor, in order", k[0]);
            return Err(argument("cache.length", expected, format_args!("{length:?}")));
        }
        match self.lengths()?.iter().position(|&length| length as usize > k[1]) {
            None => Ok(k),
            Some(slot) => {
                Err(argument("cache.length", format_args!("{} at most", k[1]), format_args!("more in slot {slot}")))
            }
        }
    }

    /// Checks that these are states of such a layer on this device, that each of `sequences` has a slot, and that there is room for
    /// new tokens.
    pub(crate) fn check(
        &self,
        config: &AttentionConfig,
        device: &Device,
        sequences: usize,
        slots: Slots,
        new: NewTokens,
    ) -> Result<()> {
        config.check_causal()?;
        let [_, capacity, width] = self.check_pools()?;
        if width != config.n_kv_head * config.d_head {
            let expected = format_args!("keys of {} heads of {}", config.n_kv_head, config.d_head);
            return Err(argument("cache", expected, format_args!("of {width} numbers")));
        }
        if !self.k.device().same_device(device) {
            let expected = format_args!("states on {:?}, as the input", device.location());
            return Err(argument("cache", expected, format_args!("{:?}", self.k.device().location())));
        }
        let lengths = self.lengths()?;
        for (index, slot) in slots.of_rows(sequences, "cache", &self.k)?.into_iter().enumerate() {
            let Some(slot) = slot else { continue };
            let (there, new) = (lengths[slot] as usize, new.of(index));
            if there + new > capacity {
                let expected = format_args!("room for {new} more tokens in slot {slot}, whose capacity is {capacity}");
                return Err(argument("cache", expected, format_args!("{there} tokens there")));
            }
        }
        Ok(())
    }

    /// Writes rows of keys and values, `(rows, n_kv_head · d_head)` each, after those that are in slots, and says that they are there.
    /// Each addition is a slot, how many tokens are in it, and the first of its rows and their number.
    pub(super) fn extend(&self, k: &Tensor, v: &Tensor, additions: &[(usize, usize, usize, usize)]) -> Result<()> {
        let mut parts = Vec::with_capacity(2 * additions.len());
        for (pool, rows) in [(&self.k, k), (&self.v, v)] {
            let rows = rows.contiguous()?;
            for &(slot, there, first, count) in additions {
                let to = pool.narrow(0, slot, 1)?.narrow(1, there, count)?.squeeze(0)?;
                parts.push((to, rows.narrow(0, first, count)?));
            }
        }
        write_each(&parts.iter().map(|(to, from)| (to, Some(from))).collect::<Vec<_>>())?;
        additions.iter().try_for_each(|&(slot, there, _, count)| self.set_length(slot, there + count))
    }

    /// Says how many tokens are in a slot.
    pub(super) fn set_length(&self, slot: usize, length: usize) -> Result<()> {
        // No more than the capacity, which is a `u32`.
        self.length.slice_set(&Tensor::new(&[length as u32], &Device::Cpu)?, 0, slot)
    }

    /// Takes tokens back: what remains of a draft whose slots had so many before it.
    pub(crate) fn accept(&self, before: &[usize], slots: Slots, accepted: &[usize]) -> Result<()> {
        if accepted.len() != before.len() {
            return Err(argument("accepted", format_args!("{}, one for each row", before.len()), accepted.len()));
        }
        for (row, slot) in slots.of_rows(before.len(), "cache", &self.k)?.into_iter().enumerate() {
            if let Some(slot) = slot {
                self.set_length(slot, before[row] + accepted[row])?;
            }
        }
        Ok(())
    }
}
