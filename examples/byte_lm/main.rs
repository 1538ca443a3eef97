//! A language model of bytes: Mamba, trained on real text, beside an n-gram model of the same text.
//!
//! ```text
//! cargo run --release --features nn,avx512-gemm --example byte_lm                                  # train, on the repository's own text
//! cargo run --release --features nn,avx512-gemm --example byte_lm -- --text book.txt --fresh       # … or on yours
//! cargo run --release --features nn,avx512-gemm --example byte_lm -- --resume                      # go on where a run stopped
//! cargo run --release --features nn,avx512-gemm --example byte_lm -- generate --prompt '/// The '
//! cargo run --release --features nn,candle-cuda --example byte_lm -- --device cuda                 # bf16 arithmetic on a GPU
//! ```

mod checkpoint;
mod data;
mod evaluate;
mod generate;
mod ngram;
mod plot;
#[cfg(test)]
mod tests;
mod train;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Trains a Mamba language model of bytes, and writes text with it
///
/// Without a subcommand, it trains.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    train: TrainArguments,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a model, or go on training it
    Train(TrainArguments),
    /// Go on with a prompt
    Generate(GenerateArguments),
}

#[derive(Debug, Clone, Args)]
struct TrainArguments {
    /// Folder of the run: its checkpoints and the plot of its losses
    #[arg(long, value_name = "FOLDER", default_value = "target/byte_lm")]
    out: PathBuf,

    /// Go on with the run in the folder, with its options, exactly as if it had not stopped
    #[arg(long, conflicts_with_all = ["RunOptions", "fresh"])]
    resume: bool,

    /// Begin again where the folder already has a run, which is lost
    #[arg(long)]
    fresh: bool,

    /// Stop after this many steps, with a checkpoint
    #[arg(long, value_name = "STEP")]
    until: Option<usize>,

    /// Steps from one checkpoint to the next
    #[arg(long, value_name = "STEPS", default_value = "500")]
    checkpoint_every: NonZeroUsize,

    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,

    #[command(flatten)]
    options: RunOptions,
}

/// What a run's result depends on.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
struct RunOptions {
    /// Text files, in UTF-8 [default: the repository's own documents and sources]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,

    /// Share of the text that is held out to measure by, in whole files or pieces of 64 KiB
    #[arg(long, value_name = "FRACTION", default_value_t = 0.1, value_parser = fraction)]
    held_out: f64,

    /// Layers of the model
    #[arg(long, value_name = "N", default_value = "4")]
    layers: NonZeroUsize,

    /// Width of the model
    #[arg(long, value_name = "N", default_value = "160")]
    d_model: NonZeroUsize,

    /// States of each channel
    #[arg(long, value_name = "N", default_value = "16")]
    d_state: NonZeroUsize,

    /// Steps of training
    #[arg(long, value_name = "N", default_value = "2000")]
    steps: NonZeroUsize,

    /// Sequences in a step
    #[arg(long, value_name = "N", default_value = "4")]
    batch: NonZeroUsize,

    /// Bytes in a sequence
    #[arg(long, value_name = "N", default_value = "512")]
    length: NonZeroUsize,

    /// Highest learning rate, from which it falls along a cosine to a tenth
    #[arg(long, value_name = "RATE", default_value_t = 3e-3, value_parser = positive)]
    learning_rate: f64,

    /// Steps in which the learning rate rises
    #[arg(long, value_name = "STEPS", default_value_t = 100)]
    warmup: usize,

    /// Weight decay, of the projections' matrices
    #[arg(long, value_name = "RATE", default_value_t = 0.1, value_parser = not_negative)]
    weight_decay: f64,

    /// Norm above which gradients are clipped
    #[arg(long, value_name = "NORM", default_value_t = 1.0, value_parser = positive)]
    clip: f64,

    /// Steps from one look at the held-out text to the next
    #[arg(long, value_name = "STEPS", default_value = "200")]
    evaluate_every: NonZeroUsize,

    /// Seed of the initial weights, of what is held out, and of the order of training
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Type of the model's arithmetic; variables are f32 [default: bf16 on a GPU, f32 elsewhere]
    #[arg(long, value_enum)]
    #[serde(default)]
    arithmetic: Option<Arithmetic>,
}

/// What a model computes in
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Arithmetic {
    F32,
    Bf16,
}

impl Arithmetic {
    fn on(device: &candle_core::Device) -> Self {
        if device.is_cuda() { Self::Bf16 } else { Self::F32 }
    }

    fn dtype(self) -> candle_core::DType {
        match self {
            Self::F32 => candle_core::DType::F32,
            Self::Bf16 => candle_core::DType::BF16,
        }
    }
}

impl RunOptions {
    /// Checks options that come from a file as those of the command line are. The other numbers can be nothing else than
    /// they may.
    fn check(&self) -> Result<()> {
        type Parser = fn(&str) -> std::result::Result<f64, String>;
        let options: [(&str, f64, Parser); 4] = [
            ("held_out", self.held_out, fraction),
            ("learning_rate", self.learning_rate, positive),
            ("weight_decay", self.weight_decay, not_negative),
            ("clip", self.clip, positive),
        ];
        for (name, value, parser) in options {
            parser(&value.to_string()).map_err(|expected| format!("{name}: {expected}, got {value}"))?;
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Args)]
struct GenerateArguments {
    /// Folder of a run, or of a checkpoint of a model of bytes
    #[arg(long, value_name = "FOLDER", default_value = "target/byte_lm")]
    from: PathBuf,

    /// What the text begins with
    #[arg(long, value_name = "TEXT", default_value = "", conflicts_with = "prompt_file")]
    prompt: String,

    /// A file with what the text begins with
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,

    /// Bytes to write
    #[arg(long, value_name = "N", default_value_t = 400)]
    bytes: usize,

    /// What logits are divided by; 0 takes the likeliest byte
    #[arg(long, default_value_t = 0.7)]
    temperature: f64,

    /// Choose among this many likeliest bytes
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,

    /// Choose among the likeliest bytes that reach this probability together
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,

    /// Seed of the choices
    #[arg(long, default_value_t = 0)]
    seed: u64,

    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,
}

/// Where the model runs
#[derive(Debug, Clone, Copy, ValueEnum)]
enum DeviceKind {
    Cpu,
    /// The first GPU
    #[cfg(feature = "candle-cuda")]
    Cuda,
}

impl DeviceKind {
    fn open(self) -> candle_core::Result<candle_core::Device> {
        match self {
            Self::Cpu => Ok(candle_core::Device::Cpu),
            #[cfg(feature = "candle-cuda")]
            Self::Cuda => candle_core::Device::new_cuda(0),
        }
    }
}

fn number(text: &str, expected: &str, fits: impl Fn(f64) -> bool) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(number) if fits(number) => Ok(number),
        _ => Err(format!("expected {expected}")),
    }
}

fn positive(text: &str) -> std::result::Result<f64, String> {
    number(text, "a number above 0", |number| number > 0.0 && number.is_finite())
}

fn not_negative(text: &str) -> std::result::Result<f64, String> {
    number(text, "0 or a number above", |number| number >= 0.0 && number.is_finite())
}

fn fraction(text: &str) -> std::result::Result<f64, String> {
    number(text, "a number above 0 and below 1", |number| number > 0.0 && number < 1.0)
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.command.unwrap_or(Command::Train(arguments.train)) {
        Command::Train(arguments) => train::run(&arguments),
        Command::Generate(arguments) => generate::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
