//! The Mamba block (S6).

mod block;
mod config;
mod ssm_path;
mod state;

pub use block::Mamba;
pub use config::{MambaConfig, Norms};
pub use state::MambaState;
