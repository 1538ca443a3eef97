//! The Mamba block and a language model of such blocks, on candle's tensors.
//!
//! [`Mamba`] is the block: for whole sequences, packed ones, prompts in chunks, and token by token on a [`LayerCache`].
//! [`LanguageModel`] stacks blocks between embeddings and a head; it is initialised as in the paper, trains with
//! candle-nn's `VarMap` and optimizers, and reads and writes the checkpoints of Hugging Face and of state-spaces/mamba.
//! [`Sampler`] chooses tokens.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss};
//! use selective_scan::nn::{LanguageModel, LanguageModelConfig, Sampler, Sampling};
//!
//! let device = Device::Cpu;
//! // 16 tokens, 2 layers of width 32. What the map does not have yet is drawn.
//! let config = LanguageModelConfig::new(16, 2, 32);
//! let variables = VarMap::new();
//! let model = LanguageModel::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &device))?;
//!
//! // Learn to count.
//! let text: Vec<u32> = (0..33).map(|i| i % 16).collect();
//! let (ids, next) = (Tensor::new(&text[..32], &device)?.unsqueeze(0)?, Tensor::new(&text[1..], &device)?);
//! let mut optimizer = AdamW::new(variables.all_vars(), ParamsAdamW { lr: 1e-2, ..Default::default() })?;
//! for _ in 0..30 {
//!     let logits = model.forward(&ids)?; // (batch, length, vocab_size)
//!     optimizer.backward_step(&loss::cross_entropy(&logits.squeeze(0)?, &next)?)?;
//! }
//!
//! // Read a prompt by the scan, then go on token by token.
//! let model = model.detach()?;
//! let cache = model.new_cache(1, DType::F32)?;
//! let mut sampler = Sampler::new(Sampling::greedy())?;
//! let mut token = sampler.sample(&model.prefill(&ids.narrow(1, 0, 5)?, &cache, None)?)?;
//! assert_eq!(token, [5]);
//! token = sampler.sample(&model.step(&Tensor::new(&token[..], &device)?, &cache, None)?)?;
//! assert_eq!(token, [6]);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # Types
//! A model is `f32`, `f16` or `bf16`: the type of activations and of the matrices. The convolution, A, D and the bias of
//! the step size are `f32` always, and so is the residual stream if asked for
//! ([`residual_in_f32`](LanguageModelConfig::residual_in_f32)). On processors candle multiplies no `bf16` matrices; there
//! they are widened for each product, which is slow.
//!
//! # Checkpoints
//! ```no_run
//! # use candle_core::{DType, Device};
//! use selective_scan::nn::{Checkpoint, Format, LanguageModel, Naming, SaveOptions};
//!
//! // A folder with config.json and model.safetensors or pytorch_model.bin (or several files and their index), of either
//! // naming.
//! let model = LanguageModel::load("mamba-130m-hf", DType::F32, &Device::Cpu)?;
//! model.save("mamba-130m", Naming::StateSpaces)?;
//! // As state-spaces/mamba's own `from_pretrained` wants it:
//! model.save_with("mamba-130m", &SaveOptions { format: Format::PyTorch, ..SaveOptions::new(Naming::StateSpaces) })?;
//! // To train it further, and to keep the tokenizer beside it:
//! let checkpoint = Checkpoint::read("mamba-130m-hf", &Device::Cpu)?;
//! let (model, variables) = checkpoint.trainable(DType::F32)?;
//! checkpoint.save(&model, "finetuned", &SaveOptions::new(Naming::HuggingFace))?;
//! # Ok::<(), candle_core::Error>(())
//! ```
//! What a config.json says beside the model is kept in [`extra`](LanguageModelConfig::extra) and written again, the special
//! tokens among it ([`eos_token_ids`](LanguageModelConfig::eos_token_ids)). A save replaces the checkpoint that is in a
//! folder as one, see [`LanguageModel::save_with`]. transformers and mamba_ssm open what is written, and the other way
//! round: `tests/vectors/exchange.py`. `examples/convert.rs` does this from the command line.
//!
//! `VarMap`'s own `save` and `load` keep the variables of a training run, by the same names.

mod block;
mod cache;
mod checkpoint;
mod config;
mod direction;
mod json;
mod language_model;
mod layers;
mod norm;
mod sampler;

pub use block::Mamba;
pub use cache::{Cache, LayerCache};
pub use checkpoint::{Checkpoint, Format, Naming, SaveOptions};
pub use config::{LanguageModelConfig, MambaConfig, Norms};
pub use language_model::LanguageModel;
pub use sampler::{Sampler, Sampling};

use std::fmt::Display;

/// This crate's error as candle's.
fn wrap(error: crate::Error) -> candle_core::Error {
    error.into()
}

/// An argument that does not fit.
fn argument(name: &'static str, expected: impl Display, got: impl Display) -> candle_core::Error {
    wrap(crate::Error::argument(name, expected, got))
}
