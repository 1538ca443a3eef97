//! Attention as a layer, with a cache of keys and values.

mod config;
mod layer;
mod rotary;
mod state;

pub use config::{AttentionConfig, RopeScaling};
pub use layer::Attention;
pub use state::AttentionState;
