//! What a layer mixes its sequence with: one enum each for configurations, blocks and states.
//!
//! This is all that a model knows of the kinds of layers. A new kind is a variant in each, and an arm in each `match` below.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};

use crate::candle::Slots;
use crate::nn::decode::PoolWrites;
use crate::nn::layers::Parameters;
use crate::nn::mamba::{CachePass, TokenStates};
use crate::nn::recurrent::StepStates;
use crate::nn::{
    Attention, AttentionConfig, AttentionState, Mamba, MambaConfig, MambaState, NewTokens, Recurrent, RecurrentConfig,
    RecurrentState, argument,
};

/// The mixer of a layer: its kind, sizes and variants.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum MixerConfig {
    /// A Mamba block (S6).
    Mamba(MambaConfig),
    /// Causal attention.
    Attention(AttentionConfig),
    /// An LSTM or a GRU.
    Recurrent(RecurrentConfig),
}

impl MixerConfig {
    /// The width of its input and output.
    pub fn d_model(&self) -> usize {
        match self {
            Self::Mamba(config) => config.d_model,
            Self::Attention(config) => config.d_model,
            Self::Recurrent(config) => config.d_model,
        }
    }

    /// What initial weights are drawn from, together with each parameter's name.
    pub fn seed(&self) -> u64 {
        match self {
            Self::Mamba(config) => config.seed,
            Self::Attention(config) => config.seed,
            Self::Recurrent(config) => config.seed,
        }
    }

    /// The configuration of a Mamba block, if it is one.
    pub fn as_mamba(&self) -> Option<&MambaConfig> {
        match self {
            Self::Mamba(config) => Some(config),
            _ => None,
        }
    }

    /// The configuration of a Mamba block to be changed, if it is one.
    pub fn as_mamba_mut(&mut self) -> Option<&mut MambaConfig> {
        match self {
            Self::Mamba(config) => Some(config),
            _ => None,
        }
    }

    /// The configuration of attention, if it is that.
    pub fn as_attention(&self) -> Option<&AttentionConfig> {
        match self {
            Self::Attention(config) => Some(config),
            _ => None,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::Mamba(config) => config.check(),
            Self::Attention(config) => config.check(),
            Self::Recurrent(config) => config.check(),
        }
    }

    pub(crate) fn parameter_count(&self) -> Result<usize> {
        match self {
            Self::Mamba(config) => config.parameter_count(),
            Self::Attention(config) => config.parameter_count(),
            Self::Recurrent(config) => config.parameter_count(),
        }
    }
}

impl From<MambaConfig> for MixerConfig {
    fn from(config: MambaConfig) -> Self {
        Self::Mamba(config)
    }
}

impl From<AttentionConfig> for MixerConfig {
    fn from(config: AttentionConfig) -> Self {
        Self::Attention(config)
    }
}

impl From<RecurrentConfig> for MixerConfig {
    fn from(config: RecurrentConfig) -> Self {
        Self::Recurrent(config)
    }
}

/// The mixer of a layer.
#[derive(Debug, Clone)]
#[non_exhaustive]
#[allow(clippy::large_enum_variant, reason = "there is one for each layer, and it is not moved")]
pub enum Mixer {
    /// A Mamba block (S6).
    Mamba(Mamba),
    /// Causal attention.
    Attention(Attention),
    /// An LSTM or a GRU.
    Recurrent(Recurrent),
}

impl Mixer {
    /// The Mamba block, if it is one.
    pub fn as_mamba(&self) -> Option<&Mamba> {
        match self {
            Self::Mamba(block) => Some(block),
            _ => None,
        }
    }

    /// The attention layer, if it is one.
    pub fn as_attention(&self) -> Option<&Attention> {
        match self {
            Self::Attention(layer) => Some(layer),
            _ => None,
        }
    }

    /// The recurrent layer, if it is one.
    pub fn as_recurrent(&self) -> Option<&Recurrent> {
        match self {
            Self::Recurrent(layer) => Some(layer),
            _ => None,
        }
    }

    /// A mixer whose initial output projection is divided by a number.
    pub(super) fn build(config: &MixerConfig, parameters: &Parameters, out_proj_divisor: f64) -> Result<Self> {
        match config {
            MixerConfig::Mamba(config) => Ok(Self::Mamba(Mamba::build(config, parameters, out_proj_divisor)?)),
            MixerConfig::Attention(config) => {
                Ok(Self::Attention(Attention::build(config, parameters, out_proj_divisor)?))
            }
            MixerConfig::Recurrent(config) => {
                Ok(Self::Recurrent(Recurrent::build(config, parameters, out_proj_divisor)?))
            }
        }
    }

    /// Runs whole sequences, `(batch, length, d_model)`. Differentiable.
    pub(super) fn forward(&self, x: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<Tensor> {
        match self {
            Self::Mamba(block) => block.run(x, cu_seqlens),
            Self::Attention(layer) => layer.run(x, cu_seqlens),
            Self::Recurrent(layer) => layer.run(x, cu_seqlens),
        }
    }

    /// [`forward`](Self::forward) of `(batch, length, d_model)` from the states of a cache on, whose slots then have those
    /// afterwards, of any but a Mamba block. All has been checked.
    pub(super) fn forward_carried(&self, x: &Tensor, state: &LayerState, slots: Slots) -> Result<Tensor> {
        match self {
            Self::Mamba(_) => Err(argument("layers", "any but a Mamba block, which goes with the stream", "one")),
            Self::Attention(layer) => layer.forward_carried(x, state.attention()?, slots),
            Self::Recurrent(layer) => layer.forward_carried(x, state.recurrent()?, slots),
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
        writes: &mut PoolWrites,
    ) -> Result<Option<LayerDraft>> {
        match self {
            Self::Mamba(block) => {
                Ok(block.extend_onto(stream, x, pass, state.mamba()?, writes)?.map(LayerDraft::Mamba))
            }
            Self::Attention(layer) => {
                let before = layer.extend_onto(stream, x, pass.cu_seqlens(), state.attention()?, pass.slots())?;
                Ok(matches!(pass, CachePass::Draft { .. }).then_some(LayerDraft::Attention { before }))
            }
            Self::Recurrent(layer) => {
                Ok(layer.extend_onto(stream, x, pass, state.recurrent()?)?.map(LayerDraft::Recurrent))
            }
        }
    }

    /// Zero states for `slots` sequences, with room for `capacity` tokens of each where states grow with them.
    pub(super) fn new_state(
        &self,
        slots: usize,
        dtype: DType,
        capacity: Option<usize>,
        device: &Device,
    ) -> Result<LayerState> {
        match self {
            Self::Mamba(block) => Ok(LayerState::Mamba(MambaState::new(block.config(), slots, dtype, device)?)),
            Self::Attention(layer) => {
                let capacity = capacity.unwrap_or(layer.config().capacity);
                let dtype = layer.state_dtype(dtype);
                Ok(LayerState::Attention(AttentionState::new(layer.config(), slots, capacity, dtype, device)?))
            }
            Self::Recurrent(layer) => {
                Ok(LayerState::Recurrent(RecurrentState::new(layer.config(), slots, dtype, device)?))
            }
        }
    }

    /// Checks that the mixer decodes, that `state` is one of its own with a slot for each of `sequences`, and that there is room
    /// for new tokens.
    pub(super) fn check_decoding(
        &self,
        state: &LayerState,
        device: &Device,
        sequences: usize,
        slots: Slots,
        new: NewTokens,
    ) -> Result<()> {
        match self {
            Self::Mamba(block) => {
                block.check_causal()?;
                state.mamba()?.check(block.config(), device, sequences, slots).map(|_| ())
            }
            Self::Attention(layer) => state.attention()?.check(layer.config(), device, sequences, slots, new),
            Self::Recurrent(layer) => state.recurrent()?.check(layer.config(), device, sequences, slots),
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
    /// The keys and values of attention.
    Attention(AttentionState),
    /// Those of an LSTM or a GRU.
    Recurrent(RecurrentState),
}

/// The names of a layer's tensors in a file, by kind: of two that begin alike the one with more names first.
const NAMES: [&[&str]; 4] = [&["conv", "ssm"], &["k", "v", "length"], &["h", "c"], &["h"]];

impl LayerState {
    /// The number of sequences that it holds.
    pub fn slots(&self) -> usize {
        match self {
            Self::Mamba(state) => state.slots(),
            Self::Attention(state) => state.slots(),
            Self::Recurrent(state) => state.slots(),
        }
    }

    /// The states of a Mamba block, if they are that.
    pub fn as_mamba(&self) -> Option<&MambaState> {
        match self {
            Self::Mamba(state) => Some(state),
            _ => None,
        }
    }

    /// The keys and values of attention, if they are that.
    pub fn as_attention(&self) -> Option<&AttentionState> {
        match self {
            Self::Attention(state) => Some(state),
            _ => None,
        }
    }

    pub(crate) fn mamba(&self) -> Result<&MambaState> {
        self.as_mamba().ok_or_else(|| argument("cache", "states of a Mamba block", "those of another"))
    }

    pub(crate) fn attention(&self) -> Result<&AttentionState> {
        self.as_attention().ok_or_else(|| argument("cache", "keys and values of attention", "states of another layer"))
    }

    /// The states of an LSTM or a GRU, if they are that.
    pub fn as_recurrent(&self) -> Option<&RecurrentState> {
        match self {
            Self::Recurrent(state) => Some(state),
            _ => None,
        }
    }

    pub(crate) fn recurrent(&self) -> Result<&RecurrentState> {
        self.as_recurrent().ok_or_else(|| argument("cache", "states of a recurrent layer", "those of another"))
    }

    /// Its tensors, whose first dimension is the slots'.
    pub(crate) fn pools(&self) -> Vec<&Tensor> {
        match self {
            Self::Mamba(state) => state.pools().to_vec(),
            Self::Attention(state) => state.pools().to_vec(),
            Self::Recurrent(state) => state.pools(),
        }
    }

    /// Those of them that say where a sequence begins: the others mean nothing once these are zero.
    pub(crate) fn beginnings(&self) -> Vec<&Tensor> {
        match self {
            Self::Mamba(state) => state.pools().to_vec(),
            Self::Attention(state) => vec![&state.length],
            Self::Recurrent(state) => state.pools(),
        }
    }

    /// The names of its tensors in a file.
    pub(crate) fn names(&self) -> &'static [&'static str] {
        match self {
            Self::Mamba(_) => NAMES[0],
            Self::Attention(_) => NAMES[1],
            Self::Recurrent(state) => NAMES[if state.c.is_some() { 2 } else { 3 }],
        }
    }

    /// Takes the states of layer `index` from the tensors of a file; none if they are not there.
    pub(crate) fn from_tensors(index: usize, tensors: &mut HashMap<String, Tensor>) -> Result<Option<Self>> {
        for names in NAMES {
            let full = |name: &&str| format!("layers.{index}.{name}");
            if !names.iter().all(|name| tensors.contains_key(&full(name))) {
                continue;
            }
            let taken: Vec<_> = names.iter().filter_map(|name| tensors.remove(&full(name))).collect();
            return Ok(match (names, taken.as_slice()) {
                (["conv", ..], [conv, ssm]) => Some(Self::Mamba(MambaState { conv: conv.clone(), ssm: ssm.clone() })),
                (["k", ..], [k, v, length]) => {
                    let length = length.to_device(&Device::Cpu)?;
                    Some(Self::Attention(AttentionState { k: k.clone(), v: v.clone(), length }))
                }
                (_, [h, rest @ ..]) => Some(Self::Recurrent(RecurrentState { h: h.clone(), c: rest.first().cloned() })),
                _ => None,
            });
        }
        Ok(None)
    }

    /// Other tensors in their places.
    pub(crate) fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        match self {
            Self::Mamba(state) => Ok(Self::Mamba(state.map(f)?)),
            Self::Attention(state) => Ok(Self::Attention(state.map(f)?)),
            Self::Recurrent(state) => Ok(Self::Recurrent(state.map(f)?)),
        }
    }

    /// Checks that all of them can be written.
    pub(crate) fn check_pools(&self) -> Result<()> {
        match self {
            Self::Mamba(state) => state.check_pools().map(|_| ()),
            Self::Attention(state) => state.check_pools().map(|_| ()),
            Self::Recurrent(state) => state.check_pools().map(|_| ()),
        }
    }
}

/// What a layer keeps of a draft, to take some of its tokens back.
#[derive(Debug)]
pub(crate) enum LayerDraft {
    Mamba(TokenStates),
    Attention {
        /// How many tokens there were in the slot of each row before.
        before: Vec<usize>,
    },
    Recurrent(StepStates),
}

impl LayerDraft {
    /// Puts states back to what they were after as many tokens of each row as were accepted.
    pub fn accept(&self, state: &LayerState, slots: Slots, accepted: &[usize]) -> Result<()> {
        match self {
            Self::Mamba(states) => states.accept(state.mamba()?, slots, accepted),
            Self::Attention { before } => state.attention()?.accept(before, slots, accepted),
            Self::Recurrent(states) => states.accept(state.recurrent()?, slots, accepted),
        }
    }
}
