//! Layers that models of every kind share, and how parameters come to be.

mod embedding;
mod linear;
mod parameters;
mod rms_norm;

pub(crate) use embedding::{Tokens, read_ids};
pub(crate) use linear::Linear;
pub(crate) use parameters::{
    Change, Converted, Gradients, Initial, Parameter, ParameterList, Parameters, System, SystemRow, each_once,
    node_over,
};
pub use rms_norm::RmsNorm;
pub(crate) use rms_norm::rms_norm;
