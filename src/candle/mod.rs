//! The operators on [candle](https://docs.rs/candle-core)'s tensors, with gradients.
//!
//! | operator | on tensors | on views |
//! |---|---|---|
//! | selective scan | [`Scan`] | [`scan`](crate::scan) |
//! | causal convolution | [`CausalConv`] | [`conv`](crate::conv) |
//! | state update, in place | [`StateUpdate`], [`rollback()`] | [`state_update`](crate::state_update) |
//! | causal convolution, in place | [`ConvUpdate`], [`rollback()`] | [`conv::UpdateInputs`](crate::conv::UpdateInputs) |
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use selective_scan::candle::Scan;
//! use selective_scan::scan::Options;
//!
//! // One sequence of 3 steps, 2 channels with 4 states each.
//! let device = Device::Cpu;
//! let u = Tensor::randn(0f32, 1.0, (1, 3, 2), &device)?;
//! let delta = Tensor::randn(0f32, 1.0, (1, 3, 2), &device)?;
//! let a = Var::new(&[[-1f32, -2.0, -3.0, -4.0], [-1.0, -2.0, -3.0, -4.0]], &device)?;
//! // B and C as halves of one projection, which are not copied.
//! let projected = Var::randn(0f32, 1.0, (1, 3, 8), &device)?;
//! let (b, c) = (projected.narrow(2, 0, 4)?, projected.narrow(2, 4, 4)?);
//!
//! let options = Options { delta_softplus: true, ..Default::default() };
//! let scan = Scan { options, ..Scan::new(&u, &delta, &a, &b, &c) };
//! let (out, final_state) = scan.forward_with_state()?;
//! assert_eq!((out.dims(), final_state.dims()), (&[1, 3, 2][..], &[1, 2, 4][..]));
//!
//! let gradients = out.sqr()?.sum_all()?.backward()?;
//! assert_eq!(gradients.get(&a).unwrap().dims(), [2, 4]);
//! assert_eq!(gradients.get(&projected).unwrap().dims(), [1, 3, 8]);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # Tensors
//! Activations are `f32`, `f16` or `bf16`; parameters and states are `f32` (pools of states that are updated in place may
//! be of the narrow types too), as the operators on views have it. Strides are passed on and nothing is copied: chunks,
//! narrowed and transposed tensors and broadcast ones are read where they lie. All tensors of a call must be on one
//! device, the processor or, with the feature `cuda`, an NVIDIA GPU, on which work goes to the stream that candle uses.
//!
//! # Gradients
//! The scan and the convolution are differentiable in all of their tensors, from the output as well as from the final
//! state. What a backward pass needs, the inputs and for the scan one state of each channel for every 64 steps, is kept
//! only if candle tracks one of the inputs, and as long as the results are. Inputs that are not tracked get no gradient.
//!
//! - Operators cannot be differentiated twice: where candle keeps gradients in its graph (the variable
//!   `CANDLE_GRAD_DO_NOT_DETACH`), a backward pass gives an error.
//! - After a backward pass that failed halfway, compute the results anew before another over the same ones: a gradient of
//!   the final state may have been left behind.
//! - The updates in place have no gradients.
//!
//! # Errors
//! Whatever goes wrong comes as a [`candle_core::Error`]. A bad argument is an [`Error`](crate::Error) inside it, whose
//! message names the argument, what was expected and what came; nothing has been written then. (With `RUST_BACKTRACE` set,
//! candle prints a backtrace after the message.)

mod conv;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod graph;
mod scan;
mod tensors;
mod update;

pub use conv::CausalConv;
pub use scan::Scan;
pub use update::{ConvUpdate, StateUpdate, rollback};

impl From<crate::Error> for candle_core::Error {
    fn from(error: crate::Error) -> Self {
        Self::wrap(error)
    }
}
