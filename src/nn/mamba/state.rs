//! The states of a Mamba block, which decoding carries from one call to the next.

use candle_core::{DType, Device, Result, Tensor};

use super::MambaConfig;
use crate::candle::{Slots, rollback};
use crate::nn::decode::{PoolWrites, check_pools, check_slots, reset};
use crate::nn::{argument, check_room};

/// The states of one block for a number of sequences, each in a slot of its own.
///
/// The tensors are written in place. **A clone is another handle to the same states**, not a copy: what is written through
/// one is seen through the other. [`Cache::snapshot`](crate::nn::Cache::snapshot) copies.
///
/// One that is made by hand has tensors of `f32`, `f16` or `bf16`, dense, and outside of candle's graph.
#[derive(Debug, Clone)]
pub struct MambaState {
    /// The last inputs of the convolution, oldest first, `(slots, d_conv - 1, d_inner)`.
    pub conv: Tensor,
    /// The state of the scan, `(slots, d_inner, d_state)`.
    pub ssm: Tensor,
}

impl MambaState {
    /// Zero states, from which a sequence begins. `dtype` is that of the states: `f32`, or `f16` or `bf16`, which take half
    /// the memory and round the state at every step.
    pub fn new(config: &MambaConfig, slots: usize, dtype: DType, device: &Device) -> Result<Self> {
        config.check()?;
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(argument("dtype", "f32, f16 or bf16", dtype.as_str()));
        }
        let [conv, ssm] = shapes(config, slots);
        check_room("slots", &conv, dtype, device)?;
        check_room("slots", &ssm, dtype, device)?;
        Ok(Self { conv: Tensor::zeros(&conv, dtype, device)?, ssm: Tensor::zeros(&ssm, dtype, device)? })
    }

    /// The number of sequences that it holds.
    pub fn slots(&self) -> usize {
        // One that was made by hand may be of no dimensions.
        self.ssm.dims().first().copied().unwrap_or(0)
    }

    /// Zeroes the states of these slots, or of all, so that new sequences can begin there. A negative slot is padding.
    ///
    /// # Errors
    /// A slot that there is not; tensors that no update would take. Nothing is written then.
    pub fn reset(&self, slots: Option<&[i32]>) -> Result<()> {
        self.check_pools()?;
        check_slots("slots", slots.unwrap_or_default(), self.slots(), true)?;
        reset(&self.pools(), slots)
    }

    /// Its tensors, whose first dimension is the slots'.
    pub(crate) fn pools(&self) -> [&Tensor; 2] {
        [&self.conv, &self.ssm]
    }

    /// Other tensors in their places.
    pub(crate) fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { conv: f(&self.conv)?, ssm: f(&self.ssm)? })
    }

    /// Checks that both pools can be written, before either is, and gives their shapes.
    pub(crate) fn check_pools(&self) -> Result<[[usize; 3]; 2]> {
        check_pools([
            ("cache.conv", "(slots, d_conv - 1, d_inner)", &self.conv),
            ("cache.ssm", "(slots, d_inner, d_state)", &self.ssm),
        ])
    }

    /// Checks that these are states of a block with this configuration on this device, and that each of `sequences` has a
    /// slot.
    pub(crate) fn check(&self, config: &MambaConfig, device: &Device, sequences: usize, slots: Slots) -> Result<()> {
        let got = self.check_pools()?;
        let pool = got[1][0];
        let expected = shapes(config, pool);
        if got != expected {
            let expected = format_args!("states of shapes {:?} and {:?}", expected[0], expected[1]);
            return Err(argument("cache", expected, format_args!("{:?} and {:?}", got[0], got[1])));
        }
        for pool in self.pools() {
            if !pool.device().same_device(device) {
                let expected = format_args!("states on {:?}, as the input", device.location());
                return Err(argument("cache", expected, format_args!("{:?}", pool.device().location())));
            }
        }
        slots.check(sequences, "cache", &self.ssm)
    }

    /// The slot of each of `sequences`, and `None` for padding, to [`load`](Self::load) and [`store`](Self::store) them.
    pub(super) fn slots_of(&self, sequences: usize, slots: Slots) -> Result<Vec<Option<usize>>> {
        slots.of_rows(sequences, "cache", &self.ssm)
    }

    /// The states from which sequences in these slots go on, in `f32`; any for padding.
    pub(super) fn load(&self, slots: &[Option<usize>]) -> Result<States> {
        let load = |pool: &Tensor| {
            let (count, rows, columns) = pool.dims3()?;
            if let Some(first) = run_of(slots) {
                return pool.narrow(0, first, slots.len())?.to_dtype(DType::F32);
            }
            if count == 0 {
                return Tensor::zeros((slots.len(), rows, columns), DType::F32, pool.device());
            }
            let places: Vec<u32> = slots.iter().map(|slot| slot.unwrap_or(0) as u32).collect();
            pool.index_select(&Tensor::new(places, pool.device())?, 0)?.to_dtype(DType::F32)
        };
        Ok(States { conv: load(&self.conv)?, ssm: load(&self.ssm)? })
    }

    /// Keeps the states after sequences in these slots, but for those of padding. Where the slots follow each other, that waits for
    /// `writes` to be written.
    pub(super) fn store(&self, states: States, slots: &[Option<usize>], writes: &mut PoolWrites) -> Result<()> {
        let mut pairs = [(&self.conv, states.conv), (&self.ssm, states.ssm)].into_iter();
        if let Some(first) = run_of(slots) {
            return pairs.try_for_each(|(pool, states)| writes.add(pool.narrow(0, first, slots.len())?, states));
        }
        // As after the first token of a draft that is all accepted.
        let (list, accepted): (Vec<i32>, Vec<usize>) =
            slots.iter().map(|slot| (slot.map_or(-1, |slot| slot as i32), 1)).unzip();
        pairs.try_for_each(|(pool, states)| {
            rollback(pool, &states.to_dtype(pool.dtype())?.unsqueeze(1)?, &list, &accepted)
        })
    }
}

/// The first of slots that follow each other, none of them padding.
fn run_of(slots: &[Option<usize>]) -> Option<usize> {
    let first = slots.first().copied().flatten()?;
    slots.iter().enumerate().all(|(i, slot)| *slot == Some(first + i)).then_some(first)
}

/// The shapes of the states of the convolution and of the scan.
fn shapes(config: &MambaConfig, slots: usize) -> [[usize; 3]; 2] {
    [[slots, config.d_conv - 1, config.d_inner], [slots, config.d_inner, config.d_state]]
}

/// The states before or after sequences, one row each, in `f32`.
pub(super) struct States {
    pub conv: Tensor,
    pub ssm: Tensor,
}

/// The states after each token of a draft, `(rows, tokens, ..)` each.
#[derive(Debug)]
pub(crate) struct TokenStates {
    pub(super) conv: Tensor,
    pub(super) ssm: Tensor,
}

impl TokenStates {
    /// Puts the states of these slots back to what they were after as many tokens as were accepted.
    pub fn accept(&self, state: &MambaState, slots: Slots, accepted: &[usize]) -> Result<()> {
        rollback(&state.conv, &self.conv, slots, accepted)?;
        rollback(&state.ssm, &self.ssm, slots, accepted)
    }
}
