//! The causal depthwise convolution that stands before the scan in a Mamba block: forward, backward and in place.
//!
//! Every channel has its own filter of `W` weights, the last of which meets the newest input:
//!
//! ```text
//! s_t   = bias + Σ_k weight_k x_{t - (W-1) + k}      summed over k = 0..W
//! out_t = silu(s_t)                                  SiLU if `silu`
//! ```
//!
//! The inputs before the first step are the `W - 1` rows of the initial state, oldest first, or zero; the last `W - 1`
//! inputs are the final state, and convolving on from there equals convolving the whole. The state is made of inputs,
//! so it can also be cut from anywhere.
//!
//! [`Inputs`] says what the operator reads; [`cpu`] runs it on slices, [`reference`](mod@reference) is the same written
//! plainly in `f64`. [`Inputs::forward`] and [`Inputs::backward`] allocate their results. [`UpdateInputs`] are those of
//! the step of decoding, on a pool of states in place.

#[cfg(feature = "candle")]
mod candle;
mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;
pub(crate) mod tensors;
mod update;

pub use crate::pool::{UpdateMut, UpdateOutput, rollback};
pub use tensors::{Gradients, GradientsMut, Inputs, Tensors, UpdateInputs};

use std::ops::RangeInclusive;

use bytemuck::Pod;

use crate::arguments::zeroed;
use crate::kinds::{Slices, Zeros};
use crate::simd::Isa;
use crate::{Element, Host, Memory, Result, View};
use check::Problem;
pub(crate) use update::POOL_NAMES;

/// The filter widths that the operator takes.
pub const WIDTHS: RangeInclusive<usize> = 2..=8;

/// Variants of the convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Options {
    /// Apply `silu(x) = x/(1 + e^-x)` to the result.
    pub silu: bool,
    /// Run from the last step of each sequence to its first, as the second half of a bidirectional model does: the
    /// filter then reaches to later steps. The initial state stands after the last step, its oldest row farthest, and
    /// the final state holds the first steps, the very first in its last row.
    pub reverse: bool,
}

/// Where a forward pass writes. Every buffer is dense and is overwritten whole.
pub struct OutputMut<'a, T: Element, M: Memory = Host> {
    /// `(batch, length, d_inner)`.
    pub out: &'a mut M::Buffer<T>,
    /// The last inputs, oldest first, `(sequences, width - 1, d_inner)`.
    pub final_state: Option<&'a mut M::Buffer<f32>>,
}

impl<'a, T: Element, M: Memory> OutputMut<'a, T, M> {
    /// The output alone. Add more with struct update syntax:
    /// `OutputMut { final_state: Some(&mut state), ..OutputMut::new(&mut out) }`.
    pub fn new(out: &'a mut M::Buffer<T>) -> Self {
        Self { out, final_state: None }
    }
}

/// The gradients that flow into a backward pass.
#[derive(Debug)]
pub struct OutputGradients<'a, T: Element, M: Memory = Host> {
    /// The gradient of `out`, `(batch, length, d_inner)`.
    pub d_out: View<'a, T, 3, M>,
    /// The gradient of the final state, `(sequences, width - 1, d_inner)`; zero if absent.
    pub d_final_state: Option<View<'a, f32, 3, M>>,
}

impl<T: Element, M: Memory> Clone for OutputGradients<'_, T, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element, M: Memory> Copy for OutputGradients<'_, T, M> {}

impl<'a, T: Element, M: Memory> From<View<'a, T, 3, M>> for OutputGradients<'a, T, M> {
    fn from(d_out: View<'a, T, 3, M>) -> Self {
        Self { d_out, d_final_state: None }
    }
}

/// The results of a forward pass: activations of type `T`, states of type `P`.
#[derive(Debug, Clone, PartialEq)]
pub struct Output<T, P = f32> {
    /// `(batch, length, d_inner)`.
    pub out: Vec<T>,
    /// The last inputs, oldest first, `(sequences, width - 1, d_inner)`.
    pub final_state: Vec<P>,
}

impl<T: Pod, P: Pod> Output<T, P> {
    fn zeroed_for<X: Element>(problem: &Problem<X>) -> Result<Self> {
        Ok(Self {
            out: zeroed("x", &problem.inputs.x.shape)?,
            final_state: zeroed("initial_state", &problem.state_shape())?,
        })
    }
}

impl<T: Element> Gradients<T> {
    /// Zeros for every input that is given.
    ///
    /// # Errors
    /// Inputs that do not fit each other, and one whose gradient does not fit in memory.
    pub fn zeroed(inputs: &Inputs<T>) -> Result<Self> {
        inputs.check()?.zero_gradients()
    }

    /// The buffers, to be written.
    pub fn as_mut(&mut self) -> GradientsMut<'_, T> {
        let Ok(buffers) = self.by_mut().map(&mut Slices);
        buffers
    }
}

impl<T: Element> Problem<'_, T> {
    /// Zeros for the gradient of every input that is given.
    fn zero_gradients<A: Pod, P: Pod>(&self) -> Result<Gradients<A, P>> {
        self.inputs.tensors().shaped(self.sizes).map(&mut Zeros)
    }
}

impl<T: Element> Inputs<'_, T> {
    /// Runs the convolution on the CPU.
    pub fn forward(&self) -> Result<Output<T>> {
        let problem = self.check()?;
        let mut output = Output::zeroed_for(&problem)?;
        let (out, final_state) = (&mut output.out[..], Some(&mut output.final_state[..]));
        cpu::forward_checked(Isa::best(), &problem, OutputMut { out, final_state })?;
        Ok(output)
    }

    /// The gradient of every input that was given, on the CPU. It needs nothing from a forward pass.
    pub fn backward<'a>(&self, d_outputs: impl Into<OutputGradients<'a, T>>) -> Result<Gradients<T>> {
        let problem = self.check()?;
        let mut gradients: Gradients<T> = problem.zero_gradients()?;
        cpu::backward_checked(Isa::best(), &problem, d_outputs.into(), gradients.as_mut())?;
        Ok(gradients)
    }
}
