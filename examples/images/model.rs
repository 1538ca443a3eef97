//! The two models.

use candle_core::{Error, Result, Tensor};
use candle_nn::VarBuilder;
use clap::ValueEnum;
use selective_scan::nn::train::Drops;
use selective_scan::nn::{AttentionConfig, BackboneConfig, MlpConfig, VisionConfig, VisionModel};

use crate::digits::{Base, Model};

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

/// Numbers of a head.
const HEAD: usize = 32;

impl Sizes {
    /// A model of a kind.
    fn config(&self, kind: Kind) -> Result<VisionConfig> {
        let &Self { image, patch, classes, base: Base { layers, d_model, .. }, seed } = self;
        let mut vim = VisionConfig { channels: 1, ..VisionConfig::new(image, patch, classes, layers, d_model) };
        if let Some(mamba) = vim.backbone.mixer.as_mamba_mut() {
            mamba.seed = seed;
        }
        match kind {
            Kind::Vim => Ok(vim),
            Kind::Transformer => self.transformer(&vim),
        }
    }

    /// A Transformer on patches (Dosovitskiy et al. 2021, arXiv 2010.11929) of the same width and half as many layers, whose MLPs
    /// are as wide as comes closest to the other model's number of parameters. Patches, token, positions, norms and head are
    /// those of the other.
    fn transformer(&self, vim: &VisionConfig) -> Result<VisionConfig> {
        let Base { layers, d_model, .. } = self.base;
        if !d_model.is_multiple_of(HEAD) {
            return Err(Error::msg(format_args!("--d-model: expected a multiple of {HEAD}, for heads, got {d_model}")));
        }
        let attention = AttentionConfig {
            causal: false,
            // Positions are learnt.
            rope_theta: None,
            seed: self.seed,
            ..AttentionConfig::new(d_model, d_model / HEAD)
        };
        let of = |width: usize| VisionConfig {
            backbone: BackboneConfig {
                feed_forward: Some(MlpConfig::new(d_model, width).into()),
                ..BackboneConfig::with_mixer(layers.div_ceil(2), attention.clone())
            },
            ..vim.clone()
        };
        let wanted = vim.parameter_count()?;
        let mut best = of(8);
        for width in (8..=8 * d_model).step_by(4) {
            let next = of(width);
            if next.parameter_count()?.abs_diff(wanted) < best.parameter_count()?.abs_diff(wanted) {
                best = next;
            }
        }
        Ok(best)
    }
}

/// Either model: they differ in their layers.
pub struct Classifier(VisionModel);

impl Classifier {
    pub fn new(kind: Kind, sizes: &Sizes, vb: VarBuilder) -> Result<Self> {
        Ok(Self(VisionModel::new(&sizes.config(kind)?, vb)?))
    }
}

impl Model for Classifier {
    fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        self.0.forward(&pixels.unsqueeze(1)?)
    }

    fn with_drops(&self, drops: Drops) -> Result<Self> {
        Ok(Self(self.0.with_drops(drops)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_of_one_size() {
        for (layers, d_model) in [(2, 32), (4, 64), (24, 192)] {
            let base = Base { epochs: 1, layers, d_model };
            let sizes = Sizes { image: [32, 32], patch: 4, classes: 10, base, seed: 0 };
            let count = |kind| sizes.config(kind).unwrap().parameter_count().unwrap() as f64;
            let (vim, transformer) = (count(Kind::Vim), count(Kind::Transformer));
            // A width more or less is 4 · 3 · d_model parameters in each layer, of some 7 · d_model² · layers in all.
            assert!((transformer / vim - 1.0).abs() < 0.02, "{vim} and {transformer}");
        }
    }
}
