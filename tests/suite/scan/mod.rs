//! The selective scan.

mod accuracy;
mod arguments;
pub mod case;
mod finite_differences;
#[cfg(feature = "cuda")]
mod gpu;
mod memory;
mod properties;
mod vectors;
