//! What is timed, as text.

use std::fmt;

use candle_core::DType;
use clap::ValueEnum;
use selective_scan::nn::{LanguageModelConfig, MambaConfig};
use selective_scan::scan::CheckpointSteps;

use crate::Result;

/// One piece of work of one model: `train 130m bf16-f32 8 2048`.
#[derive(Clone, PartialEq)]
pub struct Case {
    pub what: What,
    pub model: Model,
    pub mode: Mode,
    pub batch: usize,
    /// Steps of each sequence; 1 where models decode.
    pub length: usize,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum What {
    /// A step of training: forward, backward, optimizer.
    Train,
    /// A prompt, to the logits after it and the states.
    Prefill,
    /// A token of each sequence.
    Decode,
    /// The same of sequences that come and go, the time for their prompts taken off; `length` tokens in each prompt and in each text.
    Serve,
}

/// The sizes that Mamba's paper trains, and one that a test can.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Model {
    Tiny,
    #[value(name = "130m")]
    M130,
    #[value(name = "370m")]
    M370,
    #[value(name = "1.4b")]
    B1_4,
    #[value(name = "2.8b")]
    B2_8,
}

impl Model {
    /// `keeps` says whether training keeps what it otherwise computes again on the way back.
    pub fn config(self, keeps: bool) -> LanguageModelConfig {
        let (vocab_size, n_layer, d_model) = match self {
            Self::Tiny => (512, 2, 64),
            Self::M130 => (50_280, 24, 768),
            Self::M370 => (50_280, 48, 1024),
            Self::B1_4 => (50_280, 48, 2048),
            Self::B2_8 => (50_280, 64, 2560),
        };
        let block = MambaConfig::new(d_model);
        let block = match keeps {
            true => MambaConfig { recompute: false, checkpoint_steps: CheckpointSteps::Every16, ..block },
            false => block,
        };
        LanguageModelConfig::with_mixer(vocab_size, n_layer, block)
    }
}

/// In which types a model computes and has its parameters. The residual stream, norms, A, D and the convolution's filter
/// are `f32` in each.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Mode {
    F32,
    /// Parameters of bf16 too.
    Bf16,
    /// Arithmetic of bf16 on parameters of f32.
    #[value(name = "bf16-f32")]
    Bf16OnF32,
}

impl Mode {
    /// Of activations and matrices as they are multiplied.
    pub fn arithmetic(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 | Self::Bf16OnF32 => DType::BF16,
        }
    }

    /// Of what the optimizer changes.
    pub fn parameters(self) -> DType {
        match self {
            Self::F32 | Self::Bf16OnF32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

impl Case {
    /// The case of a text without commas.
    pub fn parse(text: &str) -> Result<Self> {
        let words: Vec<_> = text.split_whitespace().collect();
        let &[what, model, mode, batch, length] = &words[..] else {
            return Err(format!("expected what, model, type, batch and length, got `{text}`").into());
        };
        let number = |word: &str| match word.parse() {
            Ok(0) | Err(_) => Err(format!("expected a number above 0, got `{word}` in `{text}`")),
            Ok(number) => Ok(number),
        };
        let case = Self {
            what: one_of(what)?,
            model: one_of(model)?,
            mode: one_of(mode)?,
            batch: number(batch)?,
            length: number(length)?,
        };
        if case.what == What::Decode && case.length != 1 {
            return Err(format!("decoding reads one token of each sequence at a time, got `{text}`").into());
        }
        if case.what == What::Serve && case.length < 2 {
            return Err(format!("texts are timed from their second token on, got `{text}`").into());
        }
        Ok(case)
    }

    /// The cases of a text: each value between commas with each of the other words.
    pub fn expand(text: &str) -> Result<Vec<Self>> {
        let mut texts = vec![String::new()];
        // From the last word on, so that the first ones change slowest.
        for word in text.split_whitespace().rev() {
            texts = word.split(',').flat_map(|value| texts.iter().map(move |rest| format!("{value} {rest}"))).collect();
        }
        texts.iter().map(|text| Self::parse(text)).collect()
    }

    /// Tokens of a call.
    pub fn tokens(&self) -> usize {
        self.batch * self.length
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { what, model, mode, batch, length } = self;
        write!(f, "{} {} {} {batch} {length}", name(what), name(model), name(mode))
    }
}

/// The word that a value is written as.
pub fn name<T: ValueEnum>(value: &T) -> String {
    value.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default()
}

fn one_of<T: ValueEnum>(word: &str) -> Result<T> {
    T::from_str(word, false).map_err(|_| {
        let names: Vec<_> = T::value_variants().iter().map(name).collect();
        format!("expected one of {}, got `{word}`", names.join(", ")).into()
    })
}
