//! What all tests share: how problems are drawn, where they run, and how results are compared. What belongs to one operator
//! is in its own folder.

pub mod device;
pub mod draw;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod memory;
pub mod strided;
pub mod tolerance;
pub mod vectors;
pub mod wild;
