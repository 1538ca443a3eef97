//! The models that are compared, from tokens to logits.

use candle_core::{Device, Error, Result, Tensor};
use candle_nn::VarBuilder;
use candle_nn::encoding::one_hot;
use clap::ValueEnum;
use selective_scan::lti::Rule;
use selective_scan::lti::hippo::{Initial, Measure};
use selective_scan::nn::train::Group;
use selective_scan::nn::{
    LanguageModel, LanguageModelConfig, MambaConfig, S4Head, S4Model, S4ModelConfig, S4System, s4_group,
};

use super::Settings;

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Mamba's block: the step size, B and C depend on the input (S6)
    Selective,
    /// The same block with a step size, B and C that do not (S4D, real)
    Invariant,
    /// Layers of S4D that begin with the eigenvalues of HiPPO-LegS
    S4dLegs,
    /// Layers of S4D that begin with those of a Fourier series
    S4dLin,
    /// Layers of S4D that begin with what those of LegS come to for many states
    S4dInv,
    /// Layers of S4D that begin on the real line
    S4dReal,
    /// Layers of S4 of HiPPO-LegS, diagonal less low rank
    S4,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Selective => "selective (S6)",
            Self::Invariant => "time-invariant (S4D)",
            Self::S4dLegs => "S4D-LegS",
            Self::S4dLin => "S4D-Lin",
            Self::S4dInv => "S4D-Inv",
            Self::S4dReal => "S4D-Real",
            Self::S4 => "S4",
        }
    }

    /// The group of a parameter. S4's systems learn at a third of the rate of the rest: with those of the tasks, at what
    /// S4's papers have or more. Nothing decays.
    pub fn group(self, name: &str) -> Group {
        match self {
            Self::Selective | Self::Invariant => Group { learning_rate: 1.0, weight_decay: 0.0 },
            _ => s4_group(name, 0.3, 0.0),
        }
    }

    /// The systems of its layers, for sequences of so many steps at most; none for Mamba's block.
    fn system(self, longest: usize) -> Option<S4System> {
        let diagonal = |initial| S4System::Diagonal { initial, rule: Rule::ZeroOrderHold };
        Some(match self {
            Self::Selective | Self::Invariant => return None,
            Self::S4dLegs => diagonal(Initial::LegS),
            Self::S4dLin => diagonal(Initial::Lin),
            Self::S4dInv => diagonal(Initial::Inv),
            Self::S4dReal => diagonal(Initial::Real),
            Self::S4 => S4System::LowRank { measure: Measure::LegS, kernel_length: longest },
        })
    }
}

/// A model of tokens.
#[derive(Debug, Clone)]
pub enum Model {
    Blocks(Box<LanguageModel>),
    /// Layers of S4 on tokens as vectors of zeros and a one, of so many numbers.
    Systems(Box<S4Model>, usize, Device),
}

impl Model {
    /// A model for sequences of so many steps at most. Layers of S4 have twice as many pairs of states as the blocks have
    /// states: 32 by default, as in S4's papers.
    pub fn new(kind: Kind, settings: &Settings, longest: usize, vb: VarBuilder) -> Result<Self> {
        let &Settings { vocab, layers, d_model, d_state, seed, .. } = settings;
        let device = vb.device().clone();
        let Some(system) = kind.system(longest) else {
            let selective = kind == Kind::Selective;
            let mamba = MambaConfig { d_state, seed, selective, ..MambaConfig::new(d_model) };
            let config = LanguageModelConfig::with_mixer(vocab, layers, mamba);
            return Ok(Self::Blocks(Box::new(LanguageModel::new(&config, vb)?)));
        };
        let mut config = S4ModelConfig { head: S4Head::PerStep, ..S4ModelConfig::new(vocab, vocab, layers, d_model) };
        config.layer.system = system;
        config.layer.seed = seed;
        config.layer.d_state = d_state.saturating_mul(2);
        Ok(Self::Systems(Box::new(S4Model::new(&config, vb)?), vocab, device))
    }

    /// Tokens `(sequences, length)` to logits `(sequences, length, vocab)`.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Blocks(model) => model.forward(ids),
            Self::Systems(model, vocab, _) => model.forward(&one_hot::<f32>(ids.clone(), *vocab, 1.0, 0.0)?),
        }
    }

    /// The same for when nothing is trained.
    pub fn detach(&self) -> Result<Self> {
        match self {
            Self::Blocks(model) => Ok(Self::Blocks(Box::new(model.detach()?))),
            Self::Systems(..) => Ok(self.clone()),
        }
    }

    pub fn device(&self) -> &Device {
        match self {
            Self::Blocks(model) => model.device(),
            Self::Systems(.., device) => device,
        }
    }

    /// The language model of Mamba's blocks, which can be read on with.
    ///
    /// # Errors
    /// Layers of S4.
    pub fn as_blocks(&self) -> Result<&LanguageModel> {
        match self {
            Self::Blocks(model) => Ok(model),
            Self::Systems(..) => Err(Error::msg("expected a model of Mamba's blocks, got layers of S4")),
        }
    }
}
