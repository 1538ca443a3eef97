//! Models: a stack of layers, and a language model around it.

mod backbone;
mod config;
mod drops;
mod gradients;
mod language_model;
mod mixer;
mod stack;

pub use backbone::Backbone;
pub use config::{BackboneConfig, LanguageModelConfig, LayerConfig};
pub use drops::Drops;
pub use language_model::LanguageModel;
pub(crate) use mixer::LayerDraft;
pub use mixer::{LayerState, Mixer, MixerConfig};
