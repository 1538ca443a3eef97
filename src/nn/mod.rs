//! The Mamba block, stacks of layers and language models, on candle's tensors.
//!
//! | | |
//! |---|---|
//! | [`Mamba`] | the block: for whole sequences, packed ones, prompts in chunks, and token by token on a [`MambaState`] |
//! | [`Attention`], [`Mlp`], [`Experts`] | attention with a cache of keys and values; what stands after a mixer |
//! | [`Recurrent`] | an LSTM or a GRU, by candle-nn's cells |
//! | [`Backbone`] | norms, mixers and feed-forward parts around a residual stream, for sequences of anything |
//! | [`LanguageModel`] | a backbone between embeddings and a head, initialised as in the paper; trains on candle-nn's `VarMap` |
//! | [`decode`] | texts of sequences that come and go, steps of a model over fixed buffers (on a GPU one CUDA graph each), beams, drafts |
//! | [`Cache`], [`Sampler`] | the states of all layers in slots, which are reset, copied, taken and put back; the choice of tokens from logits on the host |
//! | [`Checkpoint`] | the files of Hugging Face and of state-spaces/mamba, read and written |
//! | [`train`] | a trainer with checkpoints, an optimizer whose state can be saved, learning rates, losses, what a pass leaves out at random |
//! | [`S4Model`], [`S4Layer`] | S4 and S4D, deep, with an encoder and a pooled or per-step head, in parts and step by step; S4 on processors |
//! | [`VisionModel`] | Vision Mamba: patches of images, a token in their middle, two directions; or a Transformer on them |
//! | [`RmsNorm`] | the norm between layers, with gradients, for models of your own |
//!
//! Layers may differ: a hybrid is a list of [`LayerConfig`]s, see there. [`BackboneConfig`] has one mixer and one feed-forward
//! part for all, and others by index. [`Mixer`] and [`LayerState`] are enums; a hybrid such as Jamba has several of their variants, in one
//! [`Cache`].
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
//! [`train::Trainer::language_model`] makes both and trains them. Where variables are of a half type all the same,
//! [`train::AdamW`] keeps masters of them in `f32`.
//!
//! Sums over rows, of the gradients of embeddings, norms and biases, are `f32` or wider in a model of any type, and are
//! rounded once.
//!
//! # The same bits
//! The same call on the same machine gives the same bits. But the number of rows decides how candle multiplies
//! matrices, and so in which order their sums are taken: a sequence that is batched or packed with others, or read in other
//! chunks, gets its own result within rounding (some 1e-6 in `f32`), not its bits. The operators under the model
//! ([`scan`](crate::scan), [`conv`](crate::conv), [`state_update`](crate::state_update)) do give the same bits then, and so do the
//! steps of a [`Decoder`](decode::Decoder). What a prompt leaves is the same within rounding: a server that promises the same text for
//! the same seed to the last token must read a prompt in the same company.
//!
//! # Checkpoints
//! ```no_run
//! # use candle_core::{DType, Device};
//! use selective_scan::nn::{Checkpoint, CheckpointFormat, FileFormat, LanguageModel, SaveOptions};
//!
//! // A folder with config.json and model.safetensors or pytorch_model.bin (or several files and their index), of either
//! // library.
//! let model = LanguageModel::load("mamba-130m-hf", DType::F32, &Device::Cpu)?;
//! model.save("mamba-130m", CheckpointFormat::StateSpaces)?;
//! // As state-spaces/mamba's own `from_pretrained` wants it:
//! let options = SaveOptions { file: FileFormat::PyTorch, ..SaveOptions::new(CheckpointFormat::StateSpaces) };
//! model.save_with("mamba-130m", &options)?;
//! // To train it further, and to keep the tokenizer beside it:
//! let checkpoint = Checkpoint::read("mamba-130m-hf", &Device::Cpu)?;
//! let (model, variables) = checkpoint.trainable(DType::F32)?;
//! checkpoint.save(&model, "finetuned", &SaveOptions::new(CheckpointFormat::HuggingFace))?;
//! # Ok::<(), candle_core::Error>(())
//! ```
//! What a config.json says beside the model is kept in [`extra`](LanguageModelConfig::extra) and written again, the special
//! tokens among it ([`eos_token_ids`](LanguageModelConfig::eos_token_ids)). A save replaces the checkpoint that is in a
//! folder as one, see [`LanguageModel::save_with`]. transformers and mamba_ssm open what is written, and the other way
//! round: `tests/vectors/exchange.py`. `examples/convert.rs` does this from the command line.
//!
//! `VarMap`'s own `save` and `load` keep the variables of a training run, by the same names.

mod attention;
mod checkpoint;
mod checks;
pub mod decode;
mod feed_forward;
mod layers;
mod mamba;
pub(crate) mod model;
mod recurrent;
mod s4;
pub mod train;
mod vision;

pub use attention::{Attention, AttentionConfig, AttentionState, RopeScaling};
pub use checkpoint::{Checkpoint, CheckpointFormat, FileFormat, SaveOptions};
pub use decode::{Cache, Sampler, Sampling};
pub use feed_forward::{Experts, ExpertsConfig, FeedForward, FeedForwardConfig, Mlp, MlpConfig};
pub use layers::RmsNorm;
pub use mamba::{Mamba, MambaConfig, MambaState, Norms};
pub use model::{
    Backbone, BackboneConfig, LanguageModel, LanguageModelConfig, LayerConfig, LayerState, Mixer, MixerConfig,
};
pub use recurrent::{Recurrent, RecurrentCell, RecurrentConfig, RecurrentState};
pub use s4::{S4Carry, S4Config, S4Head, S4Layer, S4Model, S4ModelConfig, S4State, S4System, s4_group};
pub use vision::{VisionConfig, VisionModel};

use checks::{COUNTABLE, NewTokens, argument, check_eps, check_model_dtype, check_once, check_room, sum};
