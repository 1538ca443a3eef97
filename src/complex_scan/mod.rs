//! The selective scan with complex states: `A`, `B` and `C` are complex, as in the first of S4's descendants and in
//! mamba_ssm's operator; forward and backward over whole sequences, and in place.
//!
//! Each of the `d_state` complex states of a channel stands for itself and its conjugate, so that what is read of them is
//! real:
//!
//! ```text
//! Δ_t = softplus(delta_t + delta_bias)          softplus if `delta_softplus`
//! h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t
//! y_t = 2 Re(Σ_n C_t h_t) + D u_t
//! out = y · silu(z)                             if there is a gate z
//! ```
//!
//! These are the equations of mamba_ssm's `selective_scan_ref` for a complex `A` (Gu and Dao 2023, arXiv 2312.00752, whose
//! complex default is S4D-Lin). A complex number is two neighbours, the real and the imaginary part: `A` is
//! `(d_inner, 2 * d_state)`, a `B` or `C` that varies is `(batch, length, groups, 2 * d_state)`. (mamba_ssm has the two
//! parts interleaved along its last dimension too, which there is that of steps: `(batch, groups, d_state, 2 * length)`.)
//!
//! All arithmetic is `f64`, whatever the activations' type, so that errors do not add up over the steps.
//!
//! [`Inputs`] says what the operator reads; [`cpu`] runs it on slices, `cuda` (with the feature `cuda`) on a GPU, and
//! [`reference`](mod@reference) is the same written plainly.
//! [`UpdateInputs`] are those of the step of decoding, on a pool of states in place.

#[cfg(feature = "candle")]
pub(crate) mod candle;
mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod number;
pub mod reference;
pub(crate) mod tensors;

pub use crate::pool::{UpdateMut, UpdateOutput, rollback};
pub use tensors::{Gradients, GradientsMut, Inputs, Tensors, UpdateInputs};

use bytemuck::Pod;

use crate::arguments::zeroed;
use crate::kinds::{Slices, Zeros};
use crate::simd::Isa;
use crate::{Element, Host, Memory, Result, View, ViewMut};
use check::Problem;

/// Variants of the recurrence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Options {
    /// Pass `delta + delta_bias` through `softplus(x) = ln(1 + e^x)`, taken as the identity above 20.
    pub delta_softplus: bool,
    /// Run from the last step of each sequence to its first. The initial state then stands after the last step, and the
    /// final state before the first.
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
    /// Runs the scan on the CPU.
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

impl<T: Element> UpdateInputs<'_, T> {
    /// Runs the update on the CPU and returns `out`, `(batch, tokens, d_inner)`.
    pub fn update<St: Element>(&self, state: ViewMut<St, 3>) -> Result<Vec<T>> {
        let problem = self.check()?;
        let mut out = zeroed("u", &self.u.shape)?;
        cpu::update_checked(&problem, UpdateMut { state, out: &mut out, token_states: None })?;
        Ok(out)
    }

    /// Runs the update on the CPU and also returns the state after each token, for [`rollback`].
    pub fn update_with_token_states<St: Element>(&self, state: ViewMut<St, 3>) -> Result<UpdateOutput<T, St>> {
        let problem = self.check()?;
        let mut output =
            UpdateOutput { out: zeroed("u", &self.u.shape)?, token_states: zeroed("u", &problem.token_state_shape())? };
        let (out, token_states) = (&mut output.out[..], Some(&mut output.token_states[..]));
        cpu::update_checked(&problem, UpdateMut { state, out, token_states })?;
        Ok(output)
    }
}
