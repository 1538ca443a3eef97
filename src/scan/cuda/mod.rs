//! The scan on NVIDIA GPUs; see [`cuda`](crate::cuda) for how tensors are passed.
//!
//! A block of threads carries some neighbouring channels through a sequence, tile by tile, the states in registers. Where
//! sequences and channels are too few to fill the device, sequences are split into segments: a first pass runs all
//! segments at once from zero, and each is then run again from the state that the ones before it lead to. What a segment
//! does to a state is `exp(A ΣΔ) h + s`, so `ΣΔ` and `s` are all that the first pass has to leave.
//!
//! [`Plan`] says how a call is divided, [`forward`] chooses one. Results are the same bits in every run; and whatever a
//! sequence is packed with, as a packed sequence is divided as it would be alone.
//!
//! The fast kernels take what Mamba uses: states in multiples of 4, channels in multiples of 4 (per group), varying `B` and
//! `C`, Euler's rule; activations whose channels, and projections whose states, are contiguous and start at multiples of 4
//! elements. They work on 16 states at a time, and more take turns; backward, what they sum up is carried from one block
//! to the next in 12 bytes for each step and channel. Everything else takes a general kernel, which is slower. Both give the
//! same bits, but for the gradients that sum over channels or steps (those of `B`, `C`, `D` and the bias), which they sum in
//! different orders. Few channels have a third kernel ([`PerLane::Quarter`], [`PerLane::Half`]), which sums over states in
//! another order, so that its last bits differ. In f32, the states of sequences of more than 16,384 steps are summed with compensation, forward by the
//! general kernel. Backward, the general kernel takes everything on devices whose blocks have less than 110 kB of shared
//! memory, such as those of compute capability 8.6, 8.9 and 12.0.

mod backward;
mod forward;
mod launch;
mod plan;
mod recipe;

#[cfg(feature = "candle-cuda")]
pub(crate) use backward::backward_checked;
pub use backward::{backward, backward_with};
#[cfg(feature = "candle-cuda")]
pub(crate) use forward::forward_checked;
pub use forward::{forward, forward_with};
pub use plan::{PerLane, Plan};

use super::check::Problem;
use super::{CheckpointSteps, GradientsMut, Inputs, OutputGradients, OutputMut, Tensors};
