//! The models: an encoder of pixels, layers around a residual stream, a last norm, the mean over steps and a head.

use candle_core::{Result, Tensor};
use candle_nn::{Linear, Module, VarBuilder, linear};
use clap::ValueEnum;
use selective_scan::lti::Rule;
use selective_scan::lti::hippo::{Initial, Measure};
use selective_scan::nn::train::Drops;
use selective_scan::nn::{Backbone, BackboneConfig, MambaConfig, S4Model, S4ModelConfig, S4System};

use crate::digits::{Base, Digits, Model};

/// What the layers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// S4D that begins with the eigenvalues of HiPPO-LegS
    S4dLegs,
    /// S4D that begins with those of a Fourier series
    S4dLin,
    /// S4D that begins with what those of LegS come to for many states
    S4dInv,
    /// S4D that begins on the real line
    S4dReal,
    /// S4 of HiPPO-LegS, diagonal less low rank
    S4,
    /// Mamba's layer, whose step size, B and C depend on the input
    S6,
    /// The same with a second direction, as in Vision Mamba
    S6Both,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::S4dLegs => "S4D-LegS",
            Self::S4dLin => "S4D-Lin",
            Self::S4dInv => "S4D-Inv",
            Self::S4dReal => "S4D-Real",
            Self::S4 => "S4",
            Self::S6 => "S6",
            Self::S6Both => "S6, two directions",
        }
    }

    pub fn is_s4(self) -> bool {
        !matches!(self, Self::S6 | Self::S6Both)
    }

    /// The learning rate: that of S4's papers, and the other as for language models of this size.
    pub fn learning_rate(self) -> f64 {
        if self.is_s4() { 1e-2 } else { 3e-3 }
    }

    pub fn config(self, sizes: Base, digits: &Digits, d_state: Option<usize>, seed: u64) -> Config {
        let Base { layers, d_model, .. } = sizes;
        let diagonal = |initial| S4System::Diagonal { initial, rule: Rule::ZeroOrderHold };
        let kernel_length = digits.train.size();
        let system = match self {
            Self::S4dLegs => diagonal(Initial::LegS),
            Self::S4dLin => diagonal(Initial::Lin),
            Self::S4dInv => diagonal(Initial::Inv),
            Self::S4dReal => diagonal(Initial::Real),
            Self::S4 => S4System::LowRank { measure: Measure::LegS, kernel_length },
            Self::S6 | Self::S6Both => {
                let (bidirectional, d_state) = (self == Self::S6Both, d_state.unwrap_or(16));
                let mixer = MambaConfig { bidirectional, d_state, seed, ..MambaConfig::new(d_model) };
                return Config::S6(BackboneConfig::with_mixer(layers, mixer), digits.classes());
            }
        };
        let mut config = S4ModelConfig::new(1, digits.classes(), layers, d_model);
        config.layer.system = system;
        config.layer.seed = seed;
        config.layer.d_state = d_state.unwrap_or(config.layer.d_state);
        Config::S4(config)
    }
}

/// The sizes of a model.
#[derive(Debug, Clone)]
pub enum Config {
    S4(S4ModelConfig),
    /// And the number of classes.
    S6(BackboneConfig, usize),
}

/// A model that tells sequences of pixels apart.
pub enum Classifier {
    S4(S4Model),
    S6 { encoder: Linear, backbone: Backbone, head: Linear },
}

impl Classifier {
    pub fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        Ok(match config {
            Config::S4(config) => Self::S4(S4Model::new(config, vb)?),
            Config::S6(config, classes) => Self::S6 {
                encoder: linear(1, config.d_model(), vb.pp("encoder"))?,
                backbone: Backbone::new(config, vb.pp("backbone"))?,
                head: linear(config.d_model(), *classes, vb.pp("head"))?,
            },
        })
    }
}

impl Model for Classifier {
    fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let (images, rows, columns) = pixels.dims3()?;
        let steps = pixels.reshape((images, rows * columns, 1))?;
        match self {
            Self::S4(model) => model.forward(&steps),
            Self::S6 { encoder, backbone, head } => {
                // As one matrix, whose product needs no batch of weights.
                let encoded = encoder.forward(&steps.reshape(((), 1))?)?;
                let stream = backbone.forward(&encoded.reshape((images, rows * columns, ()))?)?;
                head.forward(&stream.mean(1)?)
            }
        }
    }

    fn with_drops(&self, drops: Drops) -> Result<Self> {
        Ok(match self {
            Self::S4(model) => Self::S4(model.with_drops(drops)?),
            Self::S6 { encoder, backbone, head } => {
                Self::S6 { encoder: encoder.clone(), backbone: backbone.with_drops(drops)?, head: head.clone() }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use candle_nn::{VarBuilder, VarMap};

    use super::*;

    /// Pixels are read from left to right and from top to bottom, all of them: of a model that sees the first pixel and
    /// one that sees the last, both change.
    #[test]
    fn every_model_reads_all_pixels() {
        let digits = Digits::built_in().unwrap();
        let sizes = Base { epochs: 1, layers: 1, d_model: 8 };
        for kind in [Kind::S4dLegs, Kind::S4dLin, Kind::S4dInv, Kind::S4dReal, Kind::S4, Kind::S6, Kind::S6Both] {
            let variables = VarMap::new();
            let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
            let model = Classifier::new(&kind.config(sizes, &digits, Some(4), 0), vb).unwrap();
            let logits = |pixels: &[f32]| {
                let pixels = Tensor::from_slice(pixels, (1, 8, 8), &Device::Cpu).unwrap();
                model.forward(&pixels).unwrap().to_vec2::<f32>().unwrap().remove(0)
            };
            let plain = logits(&[0.5; 64]);
            assert_eq!(plain.len(), 10);
            for at in [0, 31, 63] {
                let mut pixels = [0.5; 64];
                pixels[at] = 2.0;
                assert_ne!(logits(&pixels), plain, "{kind:?} at {at}");
            }
        }
    }
}
