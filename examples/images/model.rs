//! The two models.

use candle_core::{Error, Result, Tensor};
use candle_nn::VarBuilder;
use clap::ValueEnum;
use selective_scan::nn::train::Drops;
use selective_scan::nn::{VisionConfig, VisionModel};

use crate::digits::{Base, Model};
use crate::transformer::Transformer;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Vision Mamba
    Vim,
    /// A Transformer of the same size
    Transformer,
}

/// The sizes of a model.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Rows and columns of pixels.
    pub image: [usize; 2],
    pub patch: usize,
    pub classes: usize,
    pub base: Base,
    pub seed: u64,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Vim => "Vision Mamba",
            Self::Transformer => "Transformer",
        }
    }

    /// What `--model` calls it.
    pub fn flag(self) -> &'static str {
        match self {
            Self::Vim => "vim",
            Self::Transformer => "transformer",
        }
    }

    pub fn learning_rate(self) -> f64 {
        match self {
            Self::Vim => 3e-3,
            Self::Transformer => 1e-3,
        }
    }
}

/// Either model.
pub enum Classifier {
    Vim(Box<VisionModel>),
    Transformer(Box<Transformer>),
}

impl Classifier {
    pub fn new(kind: Kind, sizes: &Sizes, vb: VarBuilder) -> Result<Self> {
        let &Sizes { image, patch, classes, base: Base { layers, d_model, .. }, seed } = sizes;
        let mut config = VisionConfig { channels: 1, ..VisionConfig::new(image, patch, classes, layers, d_model) };
        if let Some(mamba) = config.backbone.mixer.as_mamba_mut() {
            mamba.seed = seed;
        }
        Ok(match kind {
            Kind::Vim => Self::Vim(Box::new(VisionModel::new(&config, vb)?)),
            Kind::Transformer => Self::Transformer(Box::new(Transformer::new(&config, vb)?)),
        })
    }
}

impl Model for Classifier {
    fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let images = pixels.unsqueeze(1)?;
        match self {
            Self::Vim(model) => model.forward(&images),
            Self::Transformer(model) => model.forward(&images),
        }
    }

    fn with_drops(&self, drops: Drops) -> Result<Self> {
        match self {
            Self::Vim(model) => Ok(Self::Vim(Box::new(model.with_drops(drops)?))),
            Self::Transformer(model) if drops.dropout == 0.0 && drops.stochastic_depth == 0.0 => {
                Ok(Self::Transformer(model.clone()))
            }
            Self::Transformer(_) => Err(Error::msg(
                "--dropout, --stochastic-depth: expected 0 for the Transformer, which has none, got more",
            )),
        }
    }
}
