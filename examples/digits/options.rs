//! The flags that programs on images share.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use candle_core::{Device, Error, Result};
use clap::{Args, ValueEnum};
use selective_scan::nn::train::Drops;

use super::Digits;

/// What is trained on, how, and where.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// A folder with images in MNIST's four files, unpacked [default: 1,797 digits of 8 x 8 pixels that the program holds]
    #[arg(long, value_name = "FOLDER")]
    data: Option<PathBuf>,

    /// Times that each image is trained on
    #[arg(long, value_name = "N")]
    epochs: Option<NonZeroUsize>,

    /// Images in a step of training
    #[arg(long, value_name = "N", default_value = "32")]
    batch: NonZeroUsize,

    /// Layers of each model
    #[arg(long, value_name = "N")]
    layers: Option<NonZeroUsize>,

    /// Width of each model
    #[arg(long, value_name = "N")]
    d_model: Option<NonZeroUsize>,

    /// Highest learning rate, from which it falls along a cosine to zero [default: of each model]
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,

    /// Weight decay of matrices
    #[arg(long, value_name = "RATE", default_value_t = 0.05)]
    weight_decay: f64,

    /// Share of what layers add that training leaves out, number by number
    #[arg(long, value_name = "RATE", default_value_t = 0.0)]
    dropout: f64,

    /// Share of the images that skip the last layer in training; it rises evenly from none at the first
    #[arg(long, value_name = "RATE", default_value_t = 0.0)]
    stochastic_depth: f64,

    /// Move each image by up to so many pixels along each axis whenever it is trained on
    #[arg(long, value_name = "PIXELS", default_value_t = 0)]
    shift: usize,

    /// Seconds instead of minutes: less training of smaller models
    #[arg(long)]
    quick: bool,

    /// Print the rows as JSON and nothing else
    #[arg(long)]
    json: bool,

    /// Where to run; cuda needs the feature `candle-cuda`
    #[arg(long, value_enum, default_value_t = On::Cpu)]
    device: On,

    /// Seed of the weights and of the order of the images
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum On {
    Cpu,
    /// The first GPU
    Cuda,
}

/// The sizes that flags leave open.
#[derive(Debug, Clone, Copy)]
pub struct Base {
    pub epochs: usize,
    pub layers: usize,
    pub d_model: usize,
}

impl Options {
    /// Whether only JSON is to be printed.
    pub fn json(&self) -> bool {
        self.json
    }

    /// Whether the run is to be brief.
    pub fn quick(&self) -> bool {
        self.quick
    }

    pub fn seed(&self) -> u64 {
        self.seed
    }

    pub fn batch(&self) -> usize {
        self.batch.get()
    }

    /// The learning rate of a model, whose default is this.
    pub fn learning_rate(&self, default: f64) -> f64 {
        self.lr.unwrap_or(default)
    }

    pub fn weight_decay(&self) -> f64 {
        self.weight_decay
    }

    /// What training leaves out. The trainer refuses what is no probability.
    pub fn drops(&self) -> Drops {
        let &Self { dropout, stochastic_depth, seed, .. } = self;
        Drops { dropout, stochastic_depth, seed, ..Drops::default() }
    }

    pub fn shift(&self) -> usize {
        self.shift
    }

    /// The sizes that flags give, and for what they leave open those of `full`, or of `quick` for a brief run.
    pub fn sizes(&self, full: Base, quick: Base) -> Base {
        let base = if self.quick { quick } else { full };
        let size = |flag: Option<NonZeroUsize>, size| flag.map_or(size, NonZeroUsize::get);
        Base {
            epochs: size(self.epochs, base.epochs),
            layers: size(self.layers, base.layers),
            d_model: size(self.d_model, base.d_model),
        }
    }

    /// The flags that say how large a model is, and where it runs, for another process of this program.
    pub fn of_sizes(&self) -> Vec<String> {
        let size = |name: &str, size: Option<NonZeroUsize>| size.map(|size| format!("--{name}={size}"));
        let device = match self.device {
            On::Cpu => "--device=cpu",
            On::Cuda => "--device=cuda",
        };
        let quick = self.quick.then(|| "--quick".to_string());
        let sizes = [size("layers", self.layers), size("d-model", self.d_model), quick];
        sizes.into_iter().flatten().chain([device.to_string(), format!("--seed={}", self.seed)]).collect()
    }

    /// The images.
    ///
    /// # Errors
    /// Those of [`Digits::read`]; a flag that means nothing, by name.
    pub fn digits(&self) -> Result<Digits> {
        // Not `lr <= 0`, which NaN would pass.
        if let Some(lr) = self.lr.filter(|lr| !(*lr > 0.0 && lr.is_finite())) {
            return Err(Error::msg(format_args!("--lr: expected a finite number above 0, got {lr}")));
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            let got = self.weight_decay;
            return Err(Error::msg(format_args!("--weight-decay: expected a finite number, 0 or more, got {got}")));
        }
        let digits = match &self.data {
            Some(folder) => Digits::read(folder)?,
            None => Digits::built_in()?,
        };
        let smaller = digits.train.rows.min(digits.train.columns);
        if self.shift >= smaller {
            let got = self.shift;
            return Err(Error::msg(format_args!("--shift: expected less than the images have, {smaller}, got {got}")));
        }
        Ok(digits)
    }

    /// The device.
    ///
    /// # Errors
    /// None of that kind.
    pub fn device(&self) -> Result<Device> {
        match self.device {
            On::Cpu => Ok(Device::Cpu),
            On::Cuda => Device::new_cuda(0),
        }
    }
}
