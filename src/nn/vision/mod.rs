//! Models of images: Vision Mamba.

mod config;
mod model;

pub use config::VisionConfig;
pub use model::VisionModel;
