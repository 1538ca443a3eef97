//! S4D on NVIDIA GPUs; see [`cuda`](crate::cuda) for how tensors are passed.
//!
//! As on processors, a chunk of 16 steps is products with matrices that are made once for each call, of which the angles
//! are formed in `f64`: with `X` the state before a chunk,
//!
//! ```text
//! y_t = Σ_{k<=t} K_k u_{t-k} + G_t · X          X' = Ā^16 X + Σ_j H_j u_j
//! ```
//!
//! A warp has a channel and 32 of its pairs (more are shared out over warps). It goes through 16 chunks at a time, which
//! are the rows of products on the tensor cores; the states from chunk to chunk are carried outside of these, each by a
//! lane. The operands of the products are 10-bit mantissas: what is more than that (states, matrices, activations of
//! `f32`) is taken in two parts, so that 21 bits count. With activations of `bf16` the operands are `bf16` themselves, and
//! states and matrices are taken in two parts of 8 bits: 2^-17 of each term is left out. States are carried in `f64` where activations are `f32`, and
//! else in `f32` by powers of twice its digits, so that errors do not add up over the steps.
//!
//! Steps after the last whole chunk are gone through one by one, and so is what comes after something that is not finite in
//! 256 steps.
//!
//! Where sequences and channels are too few to fill the device, sequences are split into segments: a first pass runs all
//! segments at once from zero, and each is then run again from the state that the ones before it lead to. [`Plan`] says
//! how a call is divided, [`forward`] chooses one. Results are the same bits in every run; and whatever a sequence is
//! packed with, as a packed sequence is divided as it would be alone. Backward needs nothing from a forward pass: one
//! kernel goes through segments forward in time for the slopes that take the states, one back for those by inputs and states.

mod backward;
mod forward;
mod launch;
mod plan;
mod update;

#[cfg(feature = "candle-cuda")]
pub(crate) use backward::backward_checked;
pub use backward::{backward, backward_with};
#[cfg(feature = "candle-cuda")]
pub(crate) use forward::forward_checked;
pub use forward::{forward, forward_with};
pub use plan::Plan;
#[cfg(feature = "candle-cuda")]
pub(crate) use update::update_checked;
pub use update::{recurrence, update};

use super::check::{Problem, UpdateProblem};
use super::tensors::UpdateTensors;
use super::{GradientsMut, Inputs, OutputGradients, OutputMut, Tensors, UpdateInputs, UpdateMut};
pub use crate::pool::cuda::rollback;
