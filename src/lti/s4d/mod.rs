//! S4D: a linear time-invariant system with a diagonal matrix for every channel, as an operator (Gu, Gupta, Goel and Ré
//! 2022, arXiv 2206.11893): forward and backward over whole sequences, and in place.
//!
//! Every channel has a step size `Δ` and `N` pairs of complex conjugates, of each of which one is stored:
//!
//! ```text
//! Ā = exp(ΔA),  B̄ = (exp(ΔA) - 1)/A · B          by zero-order hold; or by another Rule
//! x_t = Ā x_{t-1} + B̄ u_t                         N complex numbers, from the initial state on
//! y_t = 2 Re(Σ_n C_n x_{t,n}) + D u_t
//! ```
//!
//! `d_state` is `N`, and a complex number is two neighbours, its real and its imaginary part: `A`, `B` and `C` are
//! `(d_inner, 2 * d_state)`, as PyTorch's `view_as_real` gives them with the last two dimensions joined. A system whose
//! eigenvalues are real has imaginary parts of zero. Where the real part of `A` is negative, states decay; that it is,
//! is up to the caller.
//!
//! Angles are formed in `f64`, and the state is carried from one chunk of 16 steps to the next in `f64` (on GPUs, where
//! activations are halves, in `f32` by powers of more digits),
//! so that a million steps lose no more than a few. Gradients flow to every tensor, from the output and from the final
//! state.
//!
//! [`Inputs`] says what the operator reads; [`cpu`] runs it on slices, `cuda` (with that feature) on a GPU's memory, [`reference`](mod@reference) is the same written
//! plainly in `f64`. [`UpdateInputs`] are those of the step of decoding, on a pool of states in place, with a
//! recurrence that [`recurrence`] has made once of the parameters.

#[cfg(feature = "candle")]
pub(crate) mod candle;
mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod discrete;
pub mod reference;
pub(crate) mod tensors;
mod update;

pub use crate::pool::{UpdateMut, UpdateOutput, rollback};
pub use tensors::{Gradients, GradientsMut, Inputs, Tensors, UpdateInputs};
pub use update::{RECURRENCE_ROWS, recurrence};

use bytemuck::Pod;

use super::Rule;
use crate::arguments::zeroed;
use crate::kinds::{Slices, Zeros};
use crate::simd::Isa;
use crate::{Element, Host, Memory, Result, View};
use check::Problem;

/// Variants of the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Options {
    /// How the continuous system becomes a recurrence.
    pub rule: Rule,
    /// Run from the last step of each sequence to its first, as the second half of a bidirectional model does. The
    /// initial state then stands after the last step, and the final state before the first.
    pub reverse: bool,
}

/// Where a forward pass writes. Every buffer is dense and is overwritten whole.
pub struct OutputMut<'a, T: Element, M: Memory = Host> {
    /// `(batch, length, d_inner)`.
    pub out: &'a mut M::Buffer<T>,
    /// `(sequences, d_inner, 2 * d_state)`.
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
    /// The gradient of the final state, `(sequences, d_inner, 2 * d_state)`; zero if absent.
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
    /// `(sequences, d_inner, 2 * d_state)`.
    pub final_state: Vec<P>,
}

impl<T: Pod, P: Pod> Output<T, P> {
    fn zeroed_for<X: Element>(problem: &Problem<X>) -> Result<Self> {
        Ok(Self {
            out: zeroed("u", &problem.inputs.u.shape)?,
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
    /// Runs the operator on the CPU.
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
