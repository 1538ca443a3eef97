//! The correctness suite: one program with a module per property, because each program that links GPU code is large.

mod absurd;
mod accuracy;
mod arguments;
#[cfg(feature = "candle")]
mod candle;
mod case;
mod common;
mod conv;
mod extremes;
mod finite_differences;
#[cfg(feature = "cuda")]
mod gpu;
mod interpreted;
mod memory;
#[cfg(feature = "nn")]
mod nn;
mod nonfinite;
mod properties;
mod readme;
mod state_update;
mod vectors;
mod wild;
