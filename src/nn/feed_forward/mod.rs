//! What stands after a mixer, for every step by itself: an MLP, or a mixture of several.

mod config;
mod experts;
mod mlp;

pub use config::{ExpertsConfig, FeedForwardConfig, MlpConfig};
pub use experts::Experts;
pub use mlp::Mlp;

use candle_core::{Result, Tensor};

use super::layers::Parameters;

/// The feed-forward part of a layer.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum FeedForward {
    /// One MLP for all steps.
    Mlp(Mlp),
    /// Several, of which a router chooses a few for each step.
    Experts(Experts),
}

impl FeedForward {
    /// A part whose initial projection back to the stream is divided by a number.
    pub(crate) fn build(config: &FeedForwardConfig, parameters: &Parameters, divisor: f64) -> Result<Self> {
        Ok(match config {
            FeedForwardConfig::Mlp(config) => Self::Mlp(Mlp::build(config, parameters, divisor)?),
            FeedForwardConfig::Experts(config) => Self::Experts(Experts::build(config, parameters, divisor)?),
        })
    }

    /// Of every row, `(.., d_model)`, the same shape. Differentiable.
    ///
    /// # Errors
    /// Rows of another width or type.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Mlp(mlp) => mlp.forward(x),
            Self::Experts(experts) => experts.forward(x),
        }
    }
}
