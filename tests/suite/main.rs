//! The correctness suite: one program, because each program that links GPU code is large. A folder for each operator, with a
//! module per property; what concerns several operators is beside them.

#[path = "../support/mod.rs"]
mod support;

mod attention;
#[cfg(feature = "candle")]
mod candle;
mod complex_scan;
mod conv;
mod decode;
mod embedding;
mod loss;
#[cfg(feature = "lti")]
mod lti;
#[cfg(feature = "nn")]
mod nn;
mod norm;
mod optimizer;
mod sampling;
mod scan;
mod state_update;

mod absurd;
mod extremes;
#[cfg(feature = "cuda")]
mod gpu;
mod interpreted;
mod nonfinite;
mod readme;
