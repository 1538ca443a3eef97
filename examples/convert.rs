//! Reads a checkpoint, says what it is, and writes it by other names, in another type or in other files.
//!
//! ```text
//! cargo run --release --features nn --example convert -- mamba-130m                                      # what it is
//! cargo run --release --features nn --example convert -- mamba-130m-hf mamba-130m --naming state-spaces --format pytorch
//! cargo run --release --features nn --example convert -- mamba-2.8b mamba-2.8b-hf --naming hugging-face --dtype bf16 --max-shard-size 2000000000
//! cargo run --release --features nn --example convert -- mamba-130m --logits 50,12092                     # what it answers
//! ```
//!
//! The tokenizer and `generation_config.json` go along. `tests/vectors/exchange.py` drives this program, and lets other
//! people's libraries read what it writes.

use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::{DType, Device, Tensor};
use clap::{Parser, ValueEnum};
use selective_scan::nn::{Checkpoint, CheckpointFormat, FileFormat, LanguageModel, SaveOptions};
use serde_json::json;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Converts a checkpoint, or says what it is
#[derive(Debug, Parser)]
struct Arguments {
    /// Folder of a checkpoint
    from: PathBuf,

    /// Folder to write to, which is made if it is not there
    to: Option<PathBuf>,

    /// By whose names and keys it is written [default: as it was]
    #[arg(long, value_enum)]
    naming: Option<NamingKind>,

    /// In what kind of file it is written; state-spaces/mamba reads PyTorch's only
    #[arg(long, value_enum, default_value_t = FormatKind::Safetensors)]
    format: FormatKind,

    /// The type of its numbers [default: as it was]
    #[arg(long, value_enum)]
    dtype: Option<TypeKind>,

    /// Bytes above which tensors are written to several files
    #[arg(long, value_name = "BYTES")]
    max_shard_size: Option<usize>,

    /// Print the logits after each of these tokens, in f32, as JSON and nothing else
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    logits: Option<Vec<u32>>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum NamingKind {
    HuggingFace,
    StateSpaces,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FormatKind {
    Safetensors,
    Pytorch,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum TypeKind {
    F32,
    F16,
    Bf16,
}

impl Arguments {
    fn save_options(&self, format: CheckpointFormat) -> SaveOptions {
        SaveOptions {
            file: match self.format {
                FormatKind::Safetensors => FileFormat::Safetensors,
                FormatKind::Pytorch => FileFormat::PyTorch,
            },
            max_shard_size: self.max_shard_size,
            ..SaveOptions::new(match self.naming {
                Some(NamingKind::HuggingFace) => CheckpointFormat::HuggingFace,
                Some(NamingKind::StateSpaces) => CheckpointFormat::StateSpaces,
                None => format,
            })
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let checkpoint = Checkpoint::read(&arguments.from, &Device::Cpu)?;
    let dtype = match arguments.dtype {
        Some(TypeKind::F32) => DType::F32,
        Some(TypeKind::F16) => DType::F16,
        Some(TypeKind::Bf16) => DType::BF16,
        None => checkpoint.dtype(),
    };
    let model = checkpoint.model(dtype)?;
    if let Some(to) = &arguments.to {
        checkpoint.save(&model, to, &arguments.save_options(checkpoint.format))?;
    }
    match &arguments.logits {
        Some(ids) => println!("{}", json!(logits(&checkpoint.model(DType::F32)?, ids)?)),
        None => {
            let parameters: usize = model.named_tensors().iter().map(|(_, tensor)| tensor.elem_count()).sum();
            println!("{:#?}\n{:?}, {dtype:?}, {parameters} parameters", model.config(), checkpoint.format);
        }
    }
    Ok(())
}

/// The logits after each token, `(length, padded_vocab_size)`.
fn logits(model: &LanguageModel, ids: &[u32]) -> Result<Vec<Vec<f32>>> {
    let ids = Tensor::new(ids, model.device())?.unsqueeze(0)?;
    Ok(model.forward(&ids)?.squeeze(0)?.to_vec2()?)
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
