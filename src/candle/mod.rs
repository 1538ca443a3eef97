//! The operators on [candle](https://docs.rs/candle-core)'s tensors, with gradients.
//!
//! | operator | on tensors | on views |
//! |---|---|---|
//! | selective scan | [`Scan`] | [`scan`](crate::scan) |
//! | attention | [`Attention`] | [`attention`](crate::attention) |
//! | causal convolution | [`CausalConv`] | [`conv`](crate::conv) |
//! | RMS norm | [`RmsNorm`] | [`norm`](crate::norm) |
//! | a decoding step, in place | [`DecodeLinear`], [`DecodeUpdate`], [`embedding_lookup`] | [`decode`](crate::decode) |
//! | gradient of an embedding | [`embedding_gradient`] | [`embedding`](crate::embedding) |
//! | state update, in place | [`StateUpdate`], [`rollback()`] | [`state_update`](crate::state_update) |
//! | causal convolution, in place | [`ConvUpdate`], [`rollback()`] | [`conv::UpdateInputs`](crate::conv::UpdateInputs) |
//! | cross entropy, its gradient in place | [`CrossEntropy`] | [`loss`](crate::loss) |
//! | choosing tokens | [`SamplingState`] | [`sampling`](crate::sampling) |
//! | AdamW, in place | [`AdamWState`] | [`optimizer`](crate::optimizer) |
//! | conversion of many tensors, also in place | [`to_dtype_all`], [`write_each`] | |
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
//! device, the processor or, with the feature `candle-cuda`, an NVIDIA GPU, on which work goes to the stream that candle uses.
//!
//! Activations are `(batch, length, d_inner)`; mamba_ssm's `(batch, d_inner, length)` is `transpose(1, 2)` of that, which
//! copies nothing. Where the length equals `d_inner` a tensor that should have been transposed cannot be told from one that
//! is right.
//!
//! # Gradients
//! The scan and the convolution are differentiable in all of their tensors, from the output as well as from the final
//! state, and the norm from its result as well as from the sum that was normed. What a backward pass needs, the inputs, for
//! the scan one state of each channel for every 64 steps and for the norm of a sum the sum, is kept only if candle tracks one
//! of the inputs, and as long as the results are. Inputs that are not tracked get no gradient.
//!
//! - Operators cannot be differentiated twice: where candle keeps gradients in its graph (the variable
//!   `CANDLE_GRAD_DO_NOT_DETACH`), a backward pass gives an error.
//! - After a backward pass that failed halfway, compute the results again before another over the same ones: a gradient of
//!   the final state may have been left behind.
//! - The updates in place have no gradients.
//!
//! # Updates in place
//! Slots are a list on the host, or a tensor of `i32` where the pool is ([`Slots`]); on a GPU a tensor is read when the update
//! runs, so that a CUDA graph of it is replayed with other slots.
//!
//! The updates and [`rollback()`] overwrite the pool that they are given. A pool that candle tracks, a `Var` or the final
//! state of a scan over variables, is refused: a backward pass would read what was overwritten and give wrong gradients
//! without a word. Decoding goes on from such a state with a copy, `state.detach().copy()?`.
//!
//! `detach` alone is not enough: it gives another tensor over the *same* storage, which candle no longer tracks, so that
//! the operator cannot tell and overwrites what the graph still reads. The same is true of every clone and view that was
//! made before: all of them see what is written. Whoever detaches a state, copies it. Nor can it be told that an untracked
//! pool is still to be read, such as one that was the initial state of a scan over variables: it may be updated after the
//! backward pass, or copied before.
//!
//! # Errors
//! Whatever goes wrong comes as a [`candle_core::Error`]. A bad argument is an [`Error`](crate::Error) inside it, whose
//! message names the argument, what was expected and what came; nothing has been written then.
//! [`Error::of`](crate::Error::of) finds it there, so that a server can tell a request that does not fit from a device that
//! fails. The models of the module `nn` give the same.

mod convert;
#[cfg(feature = "candle-cuda")]
pub(crate) mod cuda;
pub(crate) mod device;
pub(crate) mod gemm;
pub(crate) mod graph;
pub(crate) mod host;
pub(crate) mod in_place;
mod repeat;
pub(crate) mod sequences;
pub(crate) mod tensors;
pub(crate) mod write_all;

use std::io;

pub use crate::attention::tensors::Attention;
pub use crate::complex_scan::tensors::{ComplexScan, ComplexUpdate};
pub use crate::conv::tensors::{CausalConv, ConvUpdate};
pub use crate::decode::candle::{DecodeColumns, DecodeConv, DecodeLinear, DecodeUpdate, embedding_lookup};
pub use crate::embedding::candle::embedding_gradient;
pub use crate::loss::candle::CrossEntropy;
#[cfg(feature = "lti")]
pub use crate::lti::long_conv::tensors::LongConv;
#[cfg(feature = "lti")]
pub use crate::lti::s4::candle::{S4Kernel, S4KernelGradients};
#[cfg(feature = "lti")]
pub use crate::lti::s4d::candle::s4d_recurrence;
#[cfg(feature = "lti")]
pub use crate::lti::s4d::tensors::{S4d, S4dUpdate};
pub use crate::norm::candle::{RmsNorm, RmsNormGradients};
pub use crate::optimizer::candle::AdamWState;
pub use crate::pool::candle::{Slots, rollback};
pub use crate::sampling::candle::SamplingState;
pub use crate::scan::tensors::Scan;
pub use crate::state_update::tensors::StateUpdate;
pub use convert::{to_dtype_all, write_each};
pub use gemm::gemm;
pub use graph::node;
pub use host::{HostCopy, Number, copy_from_host, copy_from_host_at};
pub use in_place::check_pool;
pub use repeat::{Repeated, Repetition};
pub use tensors::CandleTensors;

/// The gradients of the tensors of a [`Scan`], dense, each of its tensor's shape and type: of those that were given.
pub type ScanGradients = crate::scan::Tensors<CandleTensors>;

/// The gradients of the tensors of an [`Attention`], dense, each of its tensor's shape and type.
pub type AttentionGradients = crate::attention::Tensors<CandleTensors>;

/// The gradients of the tensors of a [`ComplexScan`], dense, each of its tensor's shape and type: of those that were given.
pub type ComplexScanGradients = crate::complex_scan::Tensors<CandleTensors>;

/// The gradients of the tensors of a [`CausalConv`], dense, each of its tensor's shape and type: of those that were given.
pub type CausalConvGradients = crate::conv::Tensors<CandleTensors>;

/// The gradients of the tensors of an [`S4d`], dense, each of its tensor's shape and type: of those that were given.
#[cfg(feature = "lti")]
pub type S4dGradients = crate::lti::s4d::Tensors<CandleTensors>;

/// The gradients of the tensors of a [`LongConv`], dense, each of its tensor's shape and type: of those that were given.
#[cfg(feature = "lti")]
pub type LongConvGradients = crate::lti::long_conv::Tensors<CandleTensors>;

/// Lets a GPU keep the memory that tensors free, for the next ones; does nothing on other devices. By default all of it goes back
/// to the driver whenever the device is waited for, and has to be mapped again.
#[cfg_attr(not(feature = "candle-cuda"), expect(unused_variables, reason = "there is no GPU"))]
pub fn keep_freed_memory(device: &candle_core::Device) {
    #[cfg(feature = "candle-cuda")]
    if let candle_core::Device::Cuda(device) = device {
        crate::cuda::keep_freed_memory(device.cuda_stream().context());
    }
}

/// Has candle make no events for the tensors of a GPU; does nothing on other devices. By default it makes two for each tensor, with which
/// several streams could wait for each other; candle's own operators take one. A forward pass of mamba-130m makes 200 tensors, and so
/// calls the driver 800 times less: what a short prompt takes is the host's time.
///
/// # Safety
/// cudarc then no longer has one stream wait for another that uses the same memory of this device, that of older tensors included. So either
/// one stream has all that uses it, or the program orders what several have. The stream of `Device::new_cuda` is another one in
/// each host thread.
#[cfg_attr(not(feature = "candle-cuda"), expect(unused_variables, reason = "there is no GPU"))]
pub unsafe fn use_one_stream(device: &candle_core::Device) {
    #[cfg(feature = "candle-cuda")]
    if let candle_core::Device::Cuda(device) = device {
        // SAFETY: the caller promises what candle asks for.
        unsafe { device.disable_event_tracking() };
    }
}

impl From<crate::Error> for candle_core::Error {
    fn from(error: crate::Error) -> Self {
        // Of candle's errors that hold another, this one gives it back as a value, shows its message and nothing else.
        let kind = match error {
            crate::Error::Argument { .. } => io::ErrorKind::InvalidInput,
            _ => io::ErrorKind::Other,
        };
        Self::Io(io::Error::new(kind, error))
    }
}

impl crate::Error {
    /// The error of this crate that came as one of candle's, from the modules `candle` or `nn`, also
    /// where context, a path or a backtrace has been added; none if something else went wrong.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use selective_scan::Error;
    /// use selective_scan::candle::CausalConv;
    ///
    /// let x = Tensor::zeros((1, 3, 4), DType::F32, &Device::Cpu)?;
    /// let weight = Tensor::zeros((4, 9), DType::F32, &Device::Cpu)?;
    /// let error = CausalConv::new(&x, &weight).forward().unwrap_err();
    /// assert!(matches!(Error::of(&error), Some(Error::Argument { argument: "weight", .. })));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn of(error: &candle_core::Error) -> Option<&Self> {
        use candle_core::Error::{Context, Io, WithBacktrace, WithPath};
        match error {
            Io(error) => error.get_ref()?.downcast_ref(),
            Context { inner, .. } | WithBacktrace { inner, .. } | WithPath { inner, .. } => Self::of(inner),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::Error;

    #[test]
    fn an_error_is_found_inside_candles() {
        let ours = Error::argument("u", "a", "b");
        let error = candle_core::Error::from(ours.clone());
        assert_eq!(error.to_string(), "`u`: expected a, got b");
        let wrapped = error.with_path("a path").context("a context").bt();
        assert_eq!(Error::of(&wrapped), Some(&ours));
        assert_eq!(Error::of(&candle_core::Error::Msg("another".into())), None);
        assert_eq!(Error::of(&std::io::Error::other("another").into()), None);
    }
}
