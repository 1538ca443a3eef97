//! The states that decoding carries from one call to the next.

use candle_core::{DType, Device, Result, Tensor};

use super::{MambaConfig, argument, check_room, wrap};
use crate::Slots;
use crate::candle::check_pool;

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
        // One that was made by hand may be of no dimensions.
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

    /// Checks that both pools can be written, before either is, and gives their shapes.
    fn check_pools(&self) -> Result<[[usize; 3]; 2]> {
        let check = |name, names, pool: &Tensor| {
            let shape = check_pool(name, names, pool)?;
            if !pool.is_contiguous() {
                let got = format_args!("shape {:?} with strides {:?}", pool.dims(), pool.stride());
                return Err(crate::Error::argument(name, "a contiguous tensor", got));
            }
            Ok(shape)
        };
        let conv = check("cache.conv", "(slots, d_conv - 1, d_inner)", &self.conv).map_err(wrap)?;
        let ssm = check("cache.ssm", "(slots, d_inner, d_state)", &self.ssm).map_err(wrap)?;
        if conv[0] != ssm[0] {
            return Err(argument("cache.conv", format_args!("{} slots, as `cache.ssm`", ssm[0]), conv[0]));
        }
        let devices = [&self.conv, &self.ssm].map(|pool| pool.device().location());
        if devices[0] != devices[1] {
            let expected = format_args!("a tensor on {:?}, as `cache.ssm`", devices[1]);
            return Err(argument("cache.conv", expected, format_args!("one on {:?}", devices[0])));
        }
        Ok([conv, ssm])
    }

    fn check_reset(&self, slots: Option<&[usize]>) -> Result<()> {
        self.check_pools()?;
        match slots.into_iter().flatten().find(|&&slot| slot >= self.slots()) {
            Some(slot) => Err(argument("slots", format_args!("slots below {}", self.slots()), slot)),
            None => Ok(()),
        }
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
        let got = self.check_pools()?;
        let pool = got[1][0];
        let expected = shapes(config, pool);
        if got != expected {
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
