//! What a layer mixes its sequence with: one enum each for configurations, blocks and states.
//!
//! This is all that a model knows of the kinds of layers. A new kind is a variant in each, and an arm in each `match` below.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};

use crate::candle::Slots;
use crate::nn::layers::Parameters;
use crate::nn::mamba::{CachePass, TokenStates};
use crate::nn::{Mamba, MambaConfig, MambaState, argument};

/// The mixer of a layer: its kind, sizes and variants.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum MixerConfig {
    /// A Mamba block (S6).
    Mamba(MambaConfig),
}

impl MixerConfig {
    /// The width of its input and output.
    pub fn d_model(&self) -> usize {
        match self {
            Self::Mamba(config) => config.d_model,
        }
    }

    /// What initial weights are drawn from, together with each parameter's name.
    pub fn seed(&self) -> u64 {
        match self {
            Self::Mamba(config) => config.seed,
        }
    }

    /// The configuration of a Mamba block, if it is one.
    pub fn as_mamba(&self) -> Option<&MambaConfig> {
        match self {
            Self::Mamba(config) => Some(config),
        }
    }

    /// The configuration of a Mamba block to be changed, if it is one.
    pub fn as_mamba_mut(&mut self) -> Option<&mut MambaConfig> {
        match self {
            Self::Mamba(config) => Some(config),
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::Mamba(config) => config.check(),
        }
    }

    pub(crate) fn parameter_count(&self) -> Result<usize> {
        match self {
            Self::Mamba(config) => config.parameter_count(),
        }
    }
}

impl From<MambaConfig> for MixerConfig {
    fn from(config: MambaConfig) -> Self {
        Self::Mamba(config)
    }
}

/// The mixer of a layer.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Mixer {
    /// A Mamba block (S6).
    Mamba(Mamba),
}

impl Mixer {
    /// The Mamba block, if it is one.
    pub fn as_mamba(&self) -> Option<&Mamba> {
        match self {
            Self::Mamba(block) => Some(block),
        }
    }

    /// A mixer whose initial output projection is divided by a number.
    pub(super) fn build(config: &MixerConfig, parameters: &Parameters, out_proj_divisor: f64) -> Result<Self> {
        match config {
            MixerConfig::Mamba(config) => Ok(Self::Mamba(Mamba::build(config, parameters, out_proj_divisor)?)),
        }
    }

    /// Runs the norm of a residual stream, `(batch, length, d_model)` with at least one row, on from the states of a cache, and adds
    /// what comes out to the stream. All has been checked. Of a draft it gives what takes tokens back.
    pub(super) fn extend_onto(
        &self,
        stream: &Tensor,
        x: &Tensor,
        pass: CachePass,
        state: &LayerState,
    ) -> Result<Option<LayerDraft>> {
        match self {
            Self::Mamba(block) => Ok(block.extend_onto(stream, x, pass, state.mamba()?)?.map(LayerDraft::Mamba)),
        }
    }

    /// Zero states for `slots` sequences.
    pub(super) fn new_state(&self, slots: usize, dtype: DType, device: &Device) -> Result<LayerState> {
        match self {
            Self::Mamba(block) => Ok(LayerState::Mamba(MambaState::new(block.config(), slots, dtype, device)?)),
        }
    }

    /// Checks that the mixer decodes, and that `state` is one of its own with a slot for each of `sequences`.
    pub(super) fn check_decoding(
        &self,
        state: &LayerState,
        device: &Device,
        sequences: usize,
        slots: Slots,
    ) -> Result<()> {
        match self {
            Self::Mamba(block) => {
                block.check_causal()?;
                state.mamba()?.check(block.config(), device, sequences, slots).map(|_| ())
            }
        }
    }
}

/// The states of a layer for a number of sequences, each in a slot of its own.
///
/// As those of [`Cache`](crate::nn::Cache), they are written in place, and a clone is another handle to the same states.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum LayerState {
    /// Those of a Mamba block.
    Mamba(MambaState),
}

impl LayerState {
    /// The number of sequences that it holds.
    pub fn slots(&self) -> usize {
        match self {
            Self::Mamba(state) => state.slots(),
        }
    }

    /// The states of a Mamba block, if they are that.
    pub fn as_mamba(&self) -> Option<&MambaState> {
        match self {
            Self::Mamba(state) => Some(state),
        }
    }

    pub(crate) fn mamba(&self) -> Result<&MambaState> {
        self.as_mamba().ok_or_else(|| argument("cache", "states of a Mamba block", "those of another"))
    }

    /// Its tensors, whose first dimension is the slots'.
    pub(crate) fn pools(&self) -> Vec<&Tensor> {
        match self {
            Self::Mamba(state) => state.pools().to_vec(),
        }
    }

    /// The names of its tensors in a file.
    pub(crate) fn names(&self) -> &'static [&'static str] {
        match self {
            Self::Mamba(_) => &["conv", "ssm"],
        }
    }

    /// Takes the states of layer `index` from the tensors of a file; none if they are not there.
    pub(crate) fn from_tensors(index: usize, tensors: &mut HashMap<String, Tensor>) -> Option<Self> {
        let [conv, ssm] = ["conv", "ssm"].map(|name| format!("layers.{index}.{name}"));
        if !tensors.contains_key(&conv) || !tensors.contains_key(&ssm) {
            return None;
        }
        Some(Self::Mamba(MambaState { conv: tensors.remove(&conv)?, ssm: tensors.remove(&ssm)? }))
    }

    /// Other tensors in their places.
    pub(crate) fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        match self {
            Self::Mamba(state) => Ok(Self::Mamba(state.map(f)?)),
        }
    }

    /// Checks that all of them can be written.
    pub(crate) fn check_pools(&self) -> Result<()> {
        match self {
            Self::Mamba(state) => state.check_pools().map(|_| ()),
        }
    }
}

/// What a layer keeps of a draft, to take some of its tokens back.
#[derive(Debug)]
pub(crate) enum LayerDraft {
    Mamba(TokenStates),
}

impl LayerDraft {
    /// Puts states back to what they were after as many tokens of each row as were accepted.
    pub fn accept(&self, state: &LayerState, slots: Slots, accepted: &[usize]) -> Result<()> {
        match self {
            Self::Mamba(states) => states.accept(state.mamba()?, slots, accepted),
        }
    }
}
