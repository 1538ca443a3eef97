//! Sizes of a model and its training, and the flags that set them.

use std::num::NonZeroUsize;

use candle_core::{Device, Error, Result};
use clap::{Args, ValueEnum};
use selective_scan::nn::train::Schedule;

use super::Kind;

/// The flags of both tasks. What is not given has the task's own default, or the paper's with `--paper`.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// The paper's full size; other flags still change what they name. Meant for a GPU
    #[arg(long)]
    paper: bool,

    /// Steps of training at most; it ends early where held-out accuracy has reached --target
    #[arg(long, value_name = "N")]
    steps: Option<NonZeroUsize>,

    /// Length of the sequences in training
    #[arg(long, value_name = "L")]
    length: Option<NonZeroUsize>,

    /// Length of the sequences in the first steps. It doubles, up to --length, where the mean loss of 25 steps is below
    /// 0.3, and after --stage steps at the latest
    #[arg(long, value_name = "L")]
    start: Option<NonZeroUsize>,

    /// Steps at one of the lengths before --length, at most
    #[arg(long, value_name = "N")]
    stage: Option<NonZeroUsize>,

    /// Sequences in a step of training
    #[arg(long, value_name = "N")]
    batch: Option<NonZeroUsize>,

    /// Number of tokens, special ones included
    #[arg(long, value_name = "N")]
    vocab: Option<NonZeroUsize>,

    /// Blocks of the model
    #[arg(long, value_name = "N")]
    layers: Option<NonZeroUsize>,

    /// Width of the model
    #[arg(long, value_name = "N")]
    d_model: Option<NonZeroUsize>,

    /// States of each channel
    #[arg(long, value_name = "N")]
    d_state: Option<NonZeroUsize>,

    /// Learning rate of Adam between --warmup and --decay
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,

    /// Steps over which the learning rate rises
    #[arg(long, value_name = "N")]
    warmup: Option<usize>,

    /// Last steps over which the learning rate falls to zero
    #[arg(long, value_name = "N")]
    decay: Option<usize>,

    /// Steps between looks at held-out sequences
    #[arg(long, value_name = "N")]
    evaluate: Option<NonZeroUsize>,

    /// Held-out accuracy at which training ends early; above 1 for never
    #[arg(long, value_name = "SHARE")]
    target: Option<f64>,

    /// Which model to train; may be repeated [default: all that the task compares]
    #[arg(long, value_enum)]
    model: Vec<Kind>,

    /// Where to run; cuda needs the feature `candle-cuda`
    #[arg(long, value_enum, default_value_t = On::Cpu)]
    device: On,

    /// Seed of the weights and of the sequences
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum On {
    Cpu,
    /// The first GPU
    Cuda,
}

/// Sizes of a model and its training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    pub steps: usize,
    pub length: usize,
    pub start: usize,
    pub stage: usize,
    pub batch: usize,
    pub vocab: usize,
    pub layers: usize,
    pub d_model: usize,
    pub d_state: usize,
    pub lr: f64,
    pub warmup: usize,
    pub decay: usize,
    pub evaluate: usize,
    pub target: f64,
    pub seed: u64,
}

impl Options {
    /// Whether the paper's size is requested.
    pub fn paper(&self) -> bool {
        self.paper
    }

    /// The flags, and for what they leave open one of these.
    ///
    /// # Errors
    /// A flag that means nothing, by name.
    pub fn settings(&self, default: Settings, paper: Settings) -> Result<Settings> {
        let base = if self.paper { paper } else { default };
        let size = |flag: Option<NonZeroUsize>, size| flag.map_or(size, NonZeroUsize::get);
        let settings = Settings {
            steps: size(self.steps, base.steps),
            length: size(self.length, base.length),
            start: size(self.start, base.start),
            stage: size(self.stage, base.stage),
            batch: size(self.batch, base.batch),
            vocab: size(self.vocab, base.vocab),
            layers: size(self.layers, base.layers),
            d_model: size(self.d_model, base.d_model),
            d_state: size(self.d_state, base.d_state),
            lr: self.lr.unwrap_or(base.lr),
            warmup: self.warmup.unwrap_or(base.warmup),
            decay: self.decay.unwrap_or(base.decay),
            evaluate: size(self.evaluate, base.evaluate),
            target: self.target.unwrap_or(base.target),
            seed: self.seed,
        };
        settings.check()?;
        Ok(settings)
    }

    pub fn device(&self) -> Result<Device> {
        match self.device {
            On::Cpu => Ok(Device::Cpu),
            On::Cuda => Device::new_cuda(0),
        }
    }

    /// The models to train, of those that a task compares.
    ///
    /// # Errors
    /// Another one.
    pub fn models(&self, compared: &[Kind]) -> Result<Vec<Kind>> {
        if let Some(other) = self.model.iter().find(|kind| !compared.contains(kind)) {
            let names: Vec<_> = compared.iter().map(|kind| kind.name()).collect();
            let (expected, got) = (names.join(" or "), other.name());
            return Err(Error::msg(format_args!(
                "--model: expected one that the task compares, {expected}, got {got}"
            )));
        }
        Ok(if self.model.is_empty() { compared.to_vec() } else { self.model.clone() })
    }
}

impl Settings {
    fn check(&self) -> Result<()> {
        if u32::try_from(self.vocab).is_err() {
            return Err(Error::msg(format_args!("--vocab: expected less than 2^32, got {}", self.vocab)));
        }
        // Not `lr <= 0`, which NaN would pass.
        if !(self.lr > 0.0 && self.lr.is_finite()) {
            return Err(Error::msg(format_args!("--lr: expected a finite number above 0, got {}", self.lr)));
        }
        if self.target.is_nan() {
            return Err(Error::msg("--target: expected a number, got NaN"));
        }
        Ok(())
    }

    /// How the learning rate goes from step to step.
    pub fn schedule(&self) -> Schedule {
        Schedule::Trapezoid { warmup: self.warmup, decay: self.decay }
    }
}
