//! Sizes of feed-forward parts.

use candle_core::Result;

use crate::nn::{COUNTABLE, argument, sum};

/// The feed-forward part of a layer: its kind and sizes.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum FeedForwardConfig {
    /// One MLP for all steps.
    Mlp(MlpConfig),
    /// Several, of which a router chooses a few for each step.
    Experts(ExpertsConfig),
}

/// An MLP with a gate (SwiGLU; Shazeer 2020, arXiv 2002.05202).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MlpConfig {
    /// The width of its input and output.
    pub d_model: usize,
    /// The width inside.
    pub d_inner: usize,
    /// Whether its projections have biases.
    pub bias: bool,
}

impl MlpConfig {
    /// An MLP without biases.
    pub fn new(d_model: usize, d_inner: usize) -> Self {
        Self { d_model, d_inner, bias: false }
    }
}

/// A mixture of experts: MLPs without biases, of which the likeliest few are taken for each step. Nothing is added to a loss so
/// that all are taken as often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertsConfig {
    /// The width of the input and output.
    pub d_model: usize,
    /// The width inside each expert.
    pub d_inner: usize,
    /// The number of experts.
    pub count: usize,
    /// How many of them a step goes through.
    pub top_k: usize,
}

impl ExpertsConfig {
    /// `count` experts, of which a step goes through `top_k`.
    pub fn new(d_model: usize, d_inner: usize, count: usize, top_k: usize) -> Self {
        Self { d_model, d_inner, count, top_k }
    }
}

impl FeedForwardConfig {
    /// The width of its input and output.
    pub fn d_model(&self) -> usize {
        match self {
            Self::Mlp(config) => config.d_model,
            Self::Experts(config) => config.d_model,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let (d_model, d_inner) = match self {
            Self::Mlp(config) => (config.d_model, config.d_inner),
            Self::Experts(config) => (config.d_model, config.d_inner),
        };
        for (name, size) in [("d_model", d_model), ("d_inner", d_inner)] {
            if size == 0 {
                return Err(argument(name, "at least 1", 0));
            }
        }
        if let Self::Experts(config) = self {
            if config.count == 0 {
                return Err(argument("count", "at least 1", 0));
            }
            if !(1..=config.count).contains(&config.top_k) {
                return Err(argument(
                    "top_k",
                    format_args!("1 to {}, as there are experts", config.count),
                    config.top_k,
                ));
            }
        }
        self.parameter_count().map(|_| ())
    }

    /// The number of parameters.
    ///
    /// # Errors
    /// More than can be counted.
    pub(crate) fn parameter_count(&self) -> Result<usize> {
        let count = match *self {
            Self::Mlp(MlpConfig { d_model, d_inner, bias }) => {
                let bias = usize::from(bias);
                sum(&[[d_model, d_inner, 3], [d_inner, bias, 2], [d_model, bias, 1]])
            }
            Self::Experts(ExpertsConfig { d_model, d_inner, count, .. }) => {
                let one = sum(&[[d_model, d_inner, 3], [d_model, 1, 1]]);
                one.and_then(|one| one.checked_mul(count))
            }
        };
        count
            .filter(|count| *count <= COUNTABLE)
            .ok_or_else(|| argument("d_inner", "sizes whose parameters can be counted", format_args!("{self:?}")))
    }
}

impl From<MlpConfig> for FeedForwardConfig {
    fn from(config: MlpConfig) -> Self {
        Self::Mlp(config)
    }
}

impl From<ExpertsConfig> for FeedForwardConfig {
    fn from(config: ExpertsConfig) -> Self {
        Self::Experts(config)
    }
}
