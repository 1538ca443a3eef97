//! The Mamba block and a language model of such blocks, on candle's tensors.
//!
//! [`Mamba`] is the block: for whole sequences, packed ones, prompts in chunks, and token by token on a [`MambaState`].
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
//! A model computes in `f32`, `f16` or `bf16`, the type of its `VarBuilder`: activations and matrices have it. The
//! convolution, A, D and the bias of the step size are `f32` always, and so is the residual stream if asked for
//! ([`residual_in_f32`](BackboneConfig::residual_in_f32)). On processors candle multiplies no `bf16` matrices; there
//! they are widened for each product, which is slow.
//!
//! What is trained has a type of its own: variables that are there already stay as they are, are brought into the type of
//! the model in every pass, and get its gradients. Small steps of training are lost in a half type, so a half model is best
//! trained on `f32` variables, which [`Checkpoint::trainable`] gives for a checkpoint, and for a new model a builder of
//! that type:
//! ```
//! # use candle_core::{DType, Device};
//! # use candle_nn::{VarBuilder, VarMap};
//! # use selective_scan::nn::{LanguageModel, LanguageModelConfig};
//! # let (config, device) = (LanguageModelConfig::new(16, 2, 32), Device::Cpu);
//! let variables = VarMap::new();
//! LanguageModel::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &device))?; // draws them
//! let model = LanguageModel::new(&config, VarBuilder::from_varmap(&variables, DType::BF16, &device))?;
//! assert!(model.dtype() == DType::BF16 && variables.all_vars().iter().all(|v| v.dtype() == DType::F32));
//! # Ok::<(), candle_core::Error>(())
//! ```
//! Sums over rows, of the gradients of embeddings, norms and biases, are `f32` or wider in a model of any type, and are
//! rounded once.
//!
//! # The same bits
//! The same call on the same machine gives the same bits. But the number of rows decides how candle multiplies
//! matrices, and so in which order their sums are taken: a sequence that is batched or packed with others, or read in other
//! chunks, gets its own result within rounding (some 1e-6 in `f32`), not its bits. The operators under the model
//! ([`scan`](crate::scan), [`conv`](crate::conv), [`state_update`](crate::state_update)) do give the same bits then. A
//! server that promises the same text for the same seed must run a sequence in the same company.
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

mod checkpoint;
mod counting;
mod decode;
mod layers;
mod mamba;
mod model;

pub use checkpoint::{Checkpoint, CheckpointFormat, FileFormat, SaveOptions};
pub use decode::{Cache, Sampler, Sampling};
pub use layers::RmsNorm;
pub use mamba::{Mamba, MambaConfig, MambaState, Norms};
pub use model::{Backbone, BackboneConfig, LanguageModel, LanguageModelConfig, LayerState, Mixer, MixerConfig};

use std::fmt::Display;

use candle_core::{DType, Device, Result, Tensor};

use crate::candle::check_pool;
use crate::{Slots, count_sequences};

/// This crate's error as candle's.
fn wrap(error: crate::Error) -> candle_core::Error {
    error.into()
}

/// An argument that does not fit.
fn argument(name: &'static str, expected: impl Display, got: impl Display) -> candle_core::Error {
    wrap(crate::Error::argument(name, expected, got))
}

/// Refuses types in which no model computes.
fn check_model_dtype(dtype: DType) -> Result<DType> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => Ok(dtype),
        other => Err(argument("dtype", "f32, f16 or bf16", other.as_str())),
    }
}

fn check_eps(name: &'static str, eps: f64) -> Result<()> {
    if eps >= 0.0 && eps.is_finite() { Ok(()) } else { Err(argument(name, "an epsilon of 0 or more", eps)) }
}

/// Refuses what does not fit in memory, by the name of the argument that asks for it: candle would panic or end the
/// program. The tensors of a device tell of this by themselves.
fn check_room(name: &'static str, shape: &[usize], dtype: DType, device: &Device) -> Result<()> {
    let bytes = shape.iter().try_fold(dtype.size_in_bytes(), |bytes, &size| bytes.checked_mul(size));
    let fits = match (bytes, device) {
        (Some(bytes), Device::Cpu) => {
            let mut room = Vec::<u8>::new();
            let fits = room.try_reserve_exact(bytes).is_ok();
            // Or the compiler leaves out what nobody uses.
            std::hint::black_box(&mut room);
            fits
        }
        (Some(bytes), _) => bytes <= isize::MAX as usize,
        (None, _) => false,
    };
    if fits {
        return Ok(());
    }
    let got = format_args!("{shape:?} of {}", dtype.as_str());
    Err(argument(name, "sizes that fit in memory", got))
}

/// Refuses to be differentiated twice: the gradients of our own operators are computed outside of candle's graph.
fn check_once(name: &'static str, gradient: &Tensor) -> Result<()> {
    if gradient.track_op() {
        return Err(candle_core::Error::Msg(format!(
            "{name}: cannot be differentiated twice, and its gradient is itself tracked (CANDLE_GRAD_DO_NOT_DETACH)"
        )));
    }
    Ok(())
}
