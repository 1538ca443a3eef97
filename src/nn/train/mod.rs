//! Training: [`Trainer`] takes steps, with all that belongs to them. It is made of an optimizer whose state can be saved,
//! learning rates and losses, which can be used by themselves:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//! use selective_scan::nn::train::{AdamW, AdamWConfig, LossOptions, Schedule};
//! use selective_scan::nn::{LanguageModel, LanguageModelConfig};
//!
//! let device = Device::Cpu;
//! let variables = VarMap::new();
//! let config = LanguageModelConfig::new(16, 2, 32);
//! let model = LanguageModel::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &device))?;
//! let mut optimizer = AdamW::new(&variables, AdamWConfig { clip: Some(1.0), ..AdamWConfig::default() })?;
//! let (schedule, steps) = (Schedule::Cosine { warmup: 3, last: 0.1 }, 20);
//!
//! let text: Vec<u32> = (0..33).map(|i| i % 16).collect();
//! let (ids, next) = (Tensor::new(&text[..32], &device)?.unsqueeze(0)?, Tensor::new(&text[1..], &device)?.unsqueeze(0)?);
//! for step in 0..steps {
//!     let loss = model.loss(&ids, &next, &LossOptions::default())?;
//!     optimizer.step(&loss.backward()?, schedule.rate(1e-2, step, steps))?;
//! }
//! assert!(model.loss(&ids, &next, &LossOptions::default())?.to_scalar::<f32>()? < 1.0); // from 2.8
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! `examples/byte_lm` is a whole run: it goes on exactly where it stopped.

mod adamw;
mod loss;
mod run_folder;
mod schedule;
mod trainer;

pub use crate::nn::model::Drops;
pub use adamw::{AdamW, AdamWConfig, Group, LossScale};
pub(crate) use loss::Targets;
pub use loss::{LossOptions, cross_entropy, linear_cross_entropy};
pub use run_folder::RunFolder;
pub use schedule::Schedule;
pub use trainer::{Loss, Report, Trainer, TrainerConfig, next_token_loss, read_run};
