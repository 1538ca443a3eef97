//! The operators on [candle](https://docs.rs/candle-core)'s tensors, with gradients.

mod conv;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod graph;
mod scan;
mod tensors;
mod update;

pub use conv::CausalConv;
pub use scan::Scan;
pub use update::{ConvUpdate, StateUpdate, rollback};

impl From<crate::Error> for candle_core::Error {
    fn from(error: crate::Error) -> Self {
        Self::wrap(error)
    }
}
