//! The states that a model's decoding carries from one call to the next.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Result};

use super::{check_slots, copy, grow, put, reset, take};
use crate::nn::{AttentionState, LayerState, argument};

/// The states of a model: those of each layer, for a number of sequences, each in a slot of its own.
///
/// They are written in place. **A clone is another handle to the same states**, not a copy: what is written through one is
/// seen through the other. [`Cache::snapshot`] copies.
///
/// Slots are `i32` everywhere, from 0 on. Where rows of a batch have slots, a negative one is padding.
#[derive(Debug, Clone)]
pub struct Cache {
    pub(crate) layers: Vec<LayerState>,
}

impl Cache {
    /// The states of each layer, first to last.
    pub fn layers(&self) -> &[LayerState] {
        &self.layers
    }

    /// The number of sequences that it holds.
    pub fn slots(&self) -> usize {
        self.layers.first().map_or(0, LayerState::slots)
    }

    /// The tokens that every slot has room for in all layers; none if no state grows with them.
    pub fn capacity(&self) -> Option<usize> {
        self.layers.iter().filter_map(|layer| Some(layer.as_attention()?.capacity())).min()
    }

    /// The most tokens of a slot in any layer, where states grow with them.
    pub(crate) fn tokens(&self) -> Result<usize> {
        let lengths = self.layers.iter().filter_map(LayerState::as_attention).map(AttentionState::lengths);
        let lengths = lengths.collect::<Result<Vec<_>>>()?;
        Ok(lengths.into_iter().flatten().max().unwrap_or(0) as usize)
    }

    /// Makes these slots, or all, ready for new sequences: states are zero, and of attention no token is there. A negative slot is padding.
    ///
    /// # Errors
    /// A slot that there is not. Nothing is written then.
    pub fn reset(&self, slots: Option<&[i32]>) -> Result<()> {
        self.check("slots", slots.unwrap_or_default(), true)?;
        reset(&self.layers.iter().flat_map(LayerState::beginnings).collect::<Vec<_>>(), slots)
    }

    /// Copies the states of slot `from[i]` onto slot `to[i]`, for each `i`, as a search with beams does when it has chosen.
    /// All are read before any is written, so that slots may be exchanged; one may be copied several times.
    ///
    /// # Errors
    /// A slot that there is not, or that is written twice; lists of different lengths. Nothing is written then.
    pub fn copy_slots(&self, from: &[i32], to: &[i32]) -> Result<()> {
        self.check("from", from, false)?;
        self.check_written("to", to, from.len())?;
        self.layers.iter().flat_map(LayerState::pools).try_for_each(|pool| copy(pool, from, to))
    }

    /// The states of these slots as a cache of their own, a copy with all the room that they have: what is kept of a prompt that many sequences begin with,
    /// or of a sequence that has to wait.
    ///
    /// # Errors
    /// A slot that there is not.
    pub fn take(&self, slots: &[i32]) -> Result<Self> {
        self.check("slots", slots, false)?;
        self.map(|pool| take(pool, slots))
    }

    /// Writes the states of another cache of the same model, of which slot `i` goes to slot `slots[i]` here. That cache may
    /// be on another device, and its states of another type, to which they are then rounded.
    ///
    /// # Errors
    /// A slot that there is not, or that is written twice; a cache of another model, capacity or number of slots. Nothing is
    /// written then.
    pub fn put(&self, states: &Self, slots: &[i32]) -> Result<()> {
        self.check_states("states", states)?;
        self.check_written("slots", slots, states.slots())?;
        let pools = |cache| Self::layers(cache).iter().flat_map(LayerState::pools);
        pools(self).zip(pools(states)).try_for_each(|(pool, rows)| put(pool, rows, slots))
    }

    /// Checks that states are those of the same model.
    pub(crate) fn check_states(&self, name: &'static str, states: &Self) -> Result<()> {
        states.check(name, &[], false)?;
        let shapes = |cache: &Self| {
            let shape = |pool: &candle_core::Tensor| pool.dims()[1..].to_vec();
            cache.layers.iter().map(|layer| layer.pools().into_iter().map(shape).collect()).collect::<Vec<Vec<_>>>()
        };
        match shapes(self) == shapes(states) {
            true => Ok(()),
            false => Err(argument(name, "states of the same model", "those of another")),
        }
    }

    /// Makes room for more sequences, in new memory: slots stay where they are, and the new ones are zero. Other handles to
    /// the states keep the old memory.
    ///
    /// # Errors
    /// Fewer slots than there are; more than fit in memory.
    pub fn grow(&mut self, slots: usize) -> Result<()> {
        if slots < self.slots() {
            return Err(argument("slots", format_args!("{} or more, as there are already", self.slots()), slots));
        }
        self.check("slots", &[], false)?;
        *self = self.map(|pool| grow(pool, slots))?;
        Ok(())
    }

    /// A copy of all states, which later calls do not change.
    pub fn snapshot(&self) -> Result<Self> {
        self.map(|pool| pool.copy())
    }

    /// The states on another device: a copy, unless they are there already.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.map(|pool| pool.to_device(device))
    }

    /// Writes all states to a file in the format of safetensors, `layers.N.conv` and `layers.N.ssm` for a Mamba layer `N`, and `layers.N.k`,
    /// `layers.N.v` and `layers.N.length` for attention, `layers.N.h` and of an LSTM `layers.N.c`; what is there already is
    /// replaced as one.
    ///
    /// # Errors
    /// What the system refuses. The file is as it was then.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let mut tensors = HashMap::new();
        for (index, layer) in self.layers.iter().enumerate() {
            for (name, pool) in layer.names().iter().zip(layer.pools()) {
                tensors.insert(format!("layers.{index}.{name}"), pool.to_device(&Device::Cpu)?);
            }
        }
        let mut unfinished = path.as_os_str().to_owned();
        unfinished.push(format!(".{}.unfinished", std::process::id()));
        let written = candle_core::safetensors::save(&tensors, &unfinished).and_then(|()| {
            std::fs::rename(&unfinished, path).map_err(|error| candle_core::Error::from(error).with_path(path))
        });
        if written.is_err() {
            // What is left of it is of no use; that it cannot be removed is the lesser error.
            let _ = std::fs::remove_file(&unfinished);
        }
        written
    }

    /// Reads what [`save`](Self::save) wrote, to a device. Whether it is of a model's layers is seen when it is used with that.
    ///
    /// # Errors
    /// A file that cannot be read, or whose tensors are not states of layers from 0 on.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let mut tensors = candle_core::safetensors::load(path, device).map_err(|error| error.with_path(path))?;
        let mut layers = Vec::new();
        while let Some(layer) = LayerState::from_tensors(layers.len(), &mut tensors)? {
            layers.push(layer);
        }
        if layers.is_empty() || !tensors.is_empty() {
            let mut names: Vec<_> = tensors.keys().cloned().collect();
            names.sort_unstable();
            let expected =
                "`layers.N.conv` and `layers.N.ssm`, or those of another kind of layer, for each layer from 0 on";
            return Err(
                argument("path", expected, format_args!("{} layers, and {names:?}", layers.len())).with_path(path)
            );
        }
        let cache = Self { layers };
        cache.check("path", &[], false)?;
        Ok(cache)
    }

    fn map(&self, mut f: impl FnMut(&candle_core::Tensor) -> Result<candle_core::Tensor>) -> Result<Self> {
        Ok(Self { layers: self.layers.iter().map(|layer| layer.map(&mut f)).collect::<Result<_>>()? })
    }

    /// Checks that all states can be written, before any is, and that there are these slots.
    fn check(&self, name: &'static str, slots: &[i32], padding: bool) -> Result<()> {
        for layer in &self.layers {
            layer.check_pools()?;
            check_slots(name, slots, layer.slots(), padding)?;
        }
        Ok(())
    }

    /// The same for slots that are written, `count` of them.
    fn check_written(&self, name: &'static str, slots: &[i32], count: usize) -> Result<()> {
        if slots.len() != count {
            return Err(argument(name, format_args!("{count} slots"), slots.len()));
        }
        let mut sorted = slots.to_vec();
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(argument(name, "different slots", format_args!("{} twice", pair[0])));
        }
        self.check(name, slots, false)
    }
}
