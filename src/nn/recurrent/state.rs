//! The states of a recurrent layer, which decoding carries from one call to the next.

use candle_core::{DType, Device, Result, Tensor};

use super::RecurrentConfig;
use crate::candle::{Slots, rollback};
use crate::nn::decode::{check_pools, check_slots, reset};
use crate::nn::{argument, check_room};

/// The states of one layer for a number of sequences, each in a slot of its own.
///
/// The tensors are written in place. **A clone is another handle to the same states**, not a copy: what is written through
/// one is seen through the other. [`Cache::snapshot`](crate::nn::Cache::snapshot) copies.
#[derive(Debug, Clone)]
pub struct RecurrentState {
    /// The hidden state, `(slots, 1, d_hidden)`.
    pub h: Tensor,
    /// The cell state of an LSTM, of the same shape.
    pub c: Option<Tensor>,
}

const POOL_NAMES: &str = "(slots, 1, d_hidden)";

impl RecurrentState {
    /// Zero states, from which a sequence begins. `dtype` is that of the states: `f32`, `f16` or `bf16`.
    ///
    /// # Errors
    /// A type that is none of these; more than fits in memory.
    pub fn new(config: &RecurrentConfig, slots: usize, dtype: DType, device: &Device) -> Result<Self> {
        config.check()?;
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(argument("dtype", "f32, f16 or bf16", dtype.as_str()));
        }
        let shape = [slots, 1, config.d_hidden];
        check_room("slots", &shape, dtype, device)?;
        let pool = || Tensor::zeros(&shape, dtype, device);
        let c = (config.cell.vectors() == 2).then(pool).transpose()?;
        Ok(Self { h: pool()?, c })
    }

    /// The number of sequences that it holds.
    pub fn slots(&self) -> usize {
        // One that was made by hand may be of no dimensions.
        self.h.dims().first().copied().unwrap_or(0)
    }

    /// Zeroes the states of these slots, or of all, so that new sequences can begin there. A negative slot is padding.
    ///
    /// # Errors
    /// A slot that there is not; tensors that no call would take. Nothing is written then.
    pub fn reset(&self, slots: Option<&[i32]>) -> Result<()> {
        self.check_pools()?;
        check_slots("slots", slots.unwrap_or_default(), self.slots(), true)?;
        reset(&self.pools(), slots)
    }

    /// Its tensors, whose first dimension is the slots'.
    pub(crate) fn pools(&self) -> Vec<&Tensor> {
        [&self.h].into_iter().chain(&self.c).collect()
    }

    /// Other tensors in their places.
    pub(crate) fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { h: f(&self.h)?, c: self.c.as_ref().map(f).transpose()? })
    }

    /// Checks that all can be written, before one is, and gives their shape.
    pub(crate) fn check_pools(&self) -> Result<[usize; 3]> {
        let shape = match &self.c {
            Some(c) => {
                let [h, c] = check_pools([("cache.h", POOL_NAMES, &self.h), ("cache.c", POOL_NAMES, c)])?;
                if h != c {
                    return Err(argument("cache.c", format_args!("shape {h:?}, as `cache.h`"), format_args!("{c:?}")));
                }
                h
            }
            None => check_pools([("cache.h", POOL_NAMES, &self.h)])?[0],
        };
        Ok(shape)
    }

    /// Checks that these are states of such a layer on this device, and that each of `sequences` has a slot.
    pub(crate) fn check(
        &self,
        config: &RecurrentConfig,
        device: &Device,
        sequences: usize,
        slots: Slots,
    ) -> Result<()> {
        let got = self.check_pools()?;
        if got[1..] != [1, config.d_hidden] || self.pools().len() != config.cell.vectors() {
            let expected = format_args!("states of {:?} of width {}", config.cell, config.d_hidden);
            return Err(argument("cache", expected, format_args!("{} of shape {got:?}", self.pools().len())));
        }
        if !self.h.device().same_device(device) {
            let expected = format_args!("states on {:?}, as the input", device.location());
            return Err(argument("cache", expected, format_args!("{:?}", self.h.device().location())));
        }
        // States are gathered by a list on the host.
        slots.of_rows(sequences, "cache", &self.h).map(|_| ())
    }

    /// The states from which sequences in these slots go on, `(sequences, d_hidden)` of `f32`; zero for padding.
    pub(super) fn load(&self, slots: &[Option<usize>]) -> Result<Vec<Tensor>> {
        let row = |pool: &Tensor, slot: Option<usize>| match slot {
            Some(slot) => pool.get(slot)?.to_dtype(DType::F32),
            None => Tensor::zeros((1, pool.dim(2)?), DType::F32, pool.device()),
        };
        let load = |pool: &&Tensor| {
            let rows = slots.iter().map(|&slot| row(pool, slot)).collect::<Result<Vec<_>>>()?;
            Tensor::cat(&rows, 0)
        };
        self.pools().iter().map(load).collect()
    }

    /// Keeps the states after sequences in these slots, but for those of padding.
    pub(super) fn store(&self, states: &[Tensor], slots: &[Option<usize>]) -> Result<()> {
        for (pool, states) in self.pools().into_iter().zip(states) {
            let rows = states.to_dtype(pool.dtype())?.contiguous()?;
            for (row, slot) in slots.iter().enumerate() {
                if let Some(slot) = *slot {
                    pool.slice_set(&rows.narrow(0, row, 1)?.unsqueeze(1)?, 0, slot)?;
                }
            }
        }
        Ok(())
    }
}

/// The states after each token of a draft, `(rows, tokens, 1, d_hidden)` each.
#[derive(Debug)]
pub(crate) struct StepStates(pub(super) Vec<Tensor>);

impl StepStates {
    /// Puts the states of these slots back to what they were after as many tokens as were accepted.
    pub fn accept(&self, state: &RecurrentState, slots: Slots, accepted: &[usize]) -> Result<()> {
        let mut pools = state.pools().into_iter().zip(&self.0);
        pools.try_for_each(|(pool, states)| rollback(pool, &states.to_dtype(pool.dtype())?, slots, accepted))
    }
}
