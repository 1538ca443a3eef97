//! The states that decoding carries from one call to the next.

use candle_core::{DType, Device, Result, Tensor};

use super::{MambaConfig, argument, check_room, wrap};
use crate::pool::Slots;

/// The states of one block for a number of sequences, each in a slot of its own.
///
/// The tensors are written in place. **A clone is another handle to the same states**, not a copy: what is written through
/// one is seen through the other. [`Cache::snapshot`] copies.
///
/// One that is made by hand has tensors of `f32`, `f16` or `bf16`, dense, and outside of candle's graph.
#[derive(Debug, Clone)]
pub struct LayerCache {
    /// The last inputs of the convolution, oldest first, `(slots, d_conv - 1, d_inner)`.
    pub conv: Tensor,
    /// The state of the scan, `(slots, d_inner, d_state)`.
    pub ssm: Tensor,
}

impl LayerCache {
    /// Zero states, from which a sequence begins. `dtype` is that of the states: `f32`, or `f16` or `bf16`, which take half
    /// the memory and round the state at every step.
    pub fn new(config: &MambaConfig, slots: usize, dtype: DType, device: &Device) -> Result<Self> {
        config.check()?;
        if !is_state(dtype) {
            return Err(argument("dtype", "f32, f16 or bf16", dtype.as_str()));
        }
        let [conv, ssm] = shapes(config, slots);
        check_room("slots", &conv, dtype, device)?;
        check_room("slots", &ssm, dtype, device)?;
        Ok(Self { conv: Tensor::zeros(&conv, dtype, device)?, ssm: Tensor::zeros(&ssm, dtype, device)? })
    }

    /// The number of sequences that it holds.
    pub fn slots(&self) -> usize {
        self.ssm.dims().first().copied().unwrap_or(0)
    }

    /// Zeroes the states of these slots, or of all, so that new sequences can begin there.
    pub fn reset(&self, slots: Option<&[usize]>) -> Result<()> {
        self.check_reset(slots)?;
        for pool in [&self.conv, &self.ssm] {
            match slots {
                None => pool.zero_set()?,
                Some(slots) => {
                    let zero = pool.narrow(0, 0, slots.len().min(1))?.zeros_like()?;
                    for &slot in slots {
                        pool.slice_set(&zero, 0, slot)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn check_reset(&self, slots: Option<&[usize]>) -> Result<()> {
        self.check_pools()?;
        match slots.into_iter().flatten().find(|&&slot| slot >= self.slots()) {
            Some(slot) => Err(argument("slots", format_args!("slots below {}", self.slots()), slot)),
            None => Ok(()),
        }
    }

    /// Checks that these are tensors that can be written in place, whatever their sizes.
    fn check_pools(&self) -> Result<()> {
        let [conv, ssm] = [self.conv.dims(), self.ssm.dims()];
        if conv.len() != 3 || ssm.len() != 3 || conv[0] != ssm[0] {
            let expected = "states (slots, d_conv - 1, d_inner) and (slots, d_inner, d_state)";
            return Err(argument("cache", expected, format_args!("{conv:?} and {ssm:?}")));
        }
        for (name, pool) in [("conv", &self.conv), ("ssm", &self.ssm)] {
            let refuse = |expected: &str, got: &str| Err(argument("cache", format_args!("`{name}` {expected}"), got));
            if !is_state(pool.dtype()) {
                return refuse("of type f32, f16 or bf16", pool.dtype().as_str());
            }
            if !pool.is_contiguous() {
                return refuse("that is dense", "one with other strides (copy it)");
            }
            if pool.track_op() {
                return refuse("outside of candle's graph", "a tensor that is tracked (detach and copy it)");
            }
        }
        Ok(())
    }

    /// Checks that these are states of a block with this configuration on this device, and that each of `sequences` has a
    /// slot.
    pub(crate) fn check<'s>(
        &self,
        config: &MambaConfig,
        device: &Device,
        sequences: usize,
        slots: Option<&'s [i32]>,
    ) -> Result<Slots<'s>> {
        self.check_pools()?;
        let (pool, got) = (self.slots(), [self.conv.dims(), self.ssm.dims()]);
        let expected = shapes(config, pool);
        if expected != got {
            let expected = format_args!("states of shapes {:?} and {:?}", expected[0], expected[1]);
            return Err(argument("cache", expected, format_args!("{:?} and {:?}", got[0], got[1])));
        }
        for pool in [&self.conv, &self.ssm] {
            if !pool.device().same_device(device) {
                let expected = format_args!("states on {:?}, as the input", device.location());
                return Err(argument("cache", expected, format_args!("{:?}", pool.device().location())));
            }
        }
        Slots::check(slots, sequences, pool).map_err(wrap)
    }

    /// The states from which `sequences` go on, in `f32`; zero for padding.
    pub(crate) fn load(&self, slots: &Slots, sequences: usize) -> Result<States> {
        let load = |pool: &Tensor| {
            let (_, rows, columns) = pool.dims3()?;
            let states = Tensor::zeros((sequences, rows, columns), pool.dtype(), pool.device())?;
            for row in 0..sequences {
                if let Some(slot) = slots.get(row) {
                    states.slice_set(&pool.narrow(0, slot, 1)?, 0, row)?;
                }
            }
            states.to_dtype(DType::F32)
        };
        Ok(States { conv: load(&self.conv)?, ssm: load(&self.ssm)? })
    }

    /// Keeps the states behind `sequences`, but for those of padding.
    pub(crate) fn store(&self, states: &States, slots: &Slots, sequences: usize) -> Result<()> {
        for (pool, states) in [(&self.conv, &states.conv), (&self.ssm, &states.ssm)] {
            let states = states.to_dtype(pool.dtype())?;
            for row in 0..sequences {
                if let Some(slot) = slots.get(row) {
                    pool.slice_set(&states.narrow(0, row, 1)?, 0, slot)?;
                }
            }
        }
        Ok(())
    }
}

/// The types that states may have.
fn is_state(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// The shapes of the states of the convolution and of the scan.
fn shapes(config: &MambaConfig, slots: usize) -> [[usize; 3]; 2] {
    [[slots, config.d_conv - 1, config.d_inner], [slots, config.d_inner, config.d_state]]
}

/// The states in front of or behind sequences, one row each, in `f32`.
pub(crate) struct States {
    pub conv: Tensor,
    pub ssm: Tensor,
}

/// The states of a language model: those of each block.
///
/// They are written in place. **A clone is another handle to the same states**, not a copy: what is written through one is
/// seen through the other. [`Cache::snapshot`] copies.
#[derive(Debug, Clone)]
pub struct Cache {
    pub(crate) layers: Vec<LayerCache>,
}

impl Cache {
    /// The states of each block, first to last.
    pub fn layers(&self) -> &[LayerCache] {
        &self.layers
    }

    /// The number of sequences that it holds.
    pub fn slots(&self) -> usize {
        self.layers[0].slots()
    }

    /// Zeroes the states of these slots, or of all, so that new sequences can begin there.
    pub fn reset(&self, slots: Option<&[usize]>) -> Result<()> {
        // All slots are checked before any is written.
        self.layers.iter().try_for_each(|layer| layer.check_reset(slots))?;
        self.layers.iter().try_for_each(|layer| layer.reset(slots))
    }

    /// A copy of all states, which later calls do not change.
    pub fn snapshot(&self) -> Result<Self> {
        let copy = |layer: &LayerCache| Ok(LayerCache { conv: layer.conv.copy()?, ssm: layer.ssm.copy()? });
        Ok(Self { layers: self.layers.iter().map(copy).collect::<Result<_>>()? })
    }
}
