//! The scan with complex states on NVIDIA GPUs; see [`cuda`](crate::cuda) for how tensors are passed.
//!
//! As on processors all arithmetic is `f64`, whatever the activations' type, so that errors do not add up over the steps; that
//! costs twice the time of `f32` on GPUs for data centres, and much more on others.
//!
//! A thread carries one state of a channel through a whole sequence, 8 steps at a time, for which the block's threads
//! share what is read of activations and sum up over states; sequences are not divided. Backward goes forward first, keeping the
//! states before each 64 steps of the sequences that are being worked on, and then back, finding the states of 64 steps again;
//! it needs nothing from a forward pass. What channels add to the gradients of a `B` or `C` that varies is summed up by parts
//! of up to 32 channels of a group, and so are the parameters' gradients by rows of blocks, which take sequences one after the
//! other; a second kernel forms the sums over parts and rows in their order. Results are the same bits in every run, and a
//! sequence's are the same whatever it is packed with, the gradients of parameters excepted.

mod backward;
mod forward;
mod launch;
mod update;

pub use backward::backward;
#[cfg(feature = "candle-cuda")]
pub(crate) use backward::backward_checked;
pub use forward::forward;
#[cfg(feature = "candle-cuda")]
pub(crate) use forward::forward_checked;
pub use update::update;
#[cfg(feature = "candle-cuda")]
pub(crate) use update::update_checked;

pub use crate::pool::cuda::rollback;

use super::check::{Problem, UpdateProblem};
use super::tensors::UpdateTensors;
use super::{GradientsMut, Inputs, OutputGradients, OutputMut, Tensors, UpdateInputs, UpdateMut};
