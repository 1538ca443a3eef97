//! The Mamba block (S6).

mod block;
mod config;
mod joined;
mod parts;
mod ssm_path;
mod state;

pub(crate) use block::CachePass;
pub use block::Mamba;
pub use config::{MambaConfig, Norms};
pub(crate) use joined::{Buffers, JoinedLayer, full};
pub(crate) use parts::{Kept, Parts, rows};
pub use state::MambaState;
pub(crate) use state::TokenStates;
