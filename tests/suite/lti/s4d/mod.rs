//! S4D on slices.

mod accuracy;
mod arguments;
pub mod case;
pub mod device;
#[cfg(feature = "cuda")]
mod gpu;
mod properties;
mod update;
