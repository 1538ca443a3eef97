//! stub
mod arguments;
mod element;
mod error;
mod reference;
pub mod scan;
mod sequences;
mod shared;
mod simd;
mod view;
pub use arguments::{Discretization, MAX_D_STATE, Projection};
pub use element::{DType, Element};
pub use error::{Error, Result};
pub use simd::Isa;
pub use view::{Host, Memory, View, ViewMut};
