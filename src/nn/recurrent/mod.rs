//! LSTM and GRU as layers, by candle-nn's cells.

mod config;
mod layer;
mod state;

pub use config::{RecurrentCell, RecurrentConfig};
pub use layer::Recurrent;
pub use state::RecurrentState;
pub(crate) use state::StepStates;
