//! The selective scan: the recurrence of Mamba (S6), forward and backward.
//!
//! For every batch row, channel and state, with `Δ`, `B` and `C` projected from the input at each step:
//!
//! ```text
//! Δ_t = softplus(delta_t + delta_bias)          softplus if `delta_softplus`
//! h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        or exact zero-order hold, see Discretization
//! y_t = Σ_n C_t h_t + D u_t                     summed over the d_state states
//! out = y · silu(z)                             if there is a gate z
//! ```
//!
//! Equations, names and symbols are those of Gu and Dao, *Mamba* (2023), arXiv 2312.00752. Only the state of one step is
//! ever held: neither `exp(ΔA)` nor `h` is stored for all steps, forward or backward.
//!
//! Activations are `(batch, length, d_inner)`. mamba_ssm's are `(batch, d_inner, length)`: such a tensor is read where it lies
//! through [`View::permuted`]. One that is passed as it is gives an error that says so, except where the length equals
//! `d_inner`: there nothing can tell, and the results are wrong. The page `docs/from-mamba-ssm.md` of the repository has all
//! arguments side by side.
//!
//! # Ranges
//!
//! All arithmetic is `f32`, with decays formed as `2^(Δ·(A·log2 e))`: each has a relative error of 2^-24 for each unit of
//! its exponent `Δ·A`, from rounding `A·log2 e` and the product, and decays near 1 and near 0 are as exact as others. On
//! processors rounding does not add up over steps, however many there are. On GPUs that holds forward for `f32` sequences
//! of more than 16,384 steps; shorter ones, and gradients within each part of a sequence that is split, may lose 2^-24 for
//! each step where all are rounded the same way. A state beyond about 1e38 may become infinite, or not a number, in a step
//! where plain arithmetic would just have kept it; so may one whose decay is formed of an infinite `A` and a `Δ` of 0, which
//! on GPUs stands for the steps that a sequence lacks to a whole tile of its kernel (8 to 64 steps), in its final state. An
//! output of type `f16` is infinite beyond 65,504, whatever the state is; `bf16` has the range of `f32`. (An output in `f32`
//! of half activations is had by widening these: the arithmetic is the same.)
//!
//! [`Inputs`] says what the operator reads; [`cpu`] runs it on slices, [`reference`](mod@reference) is the same written plainly in
//! `f64`. [`Inputs::forward`] and [`Inputs::backward`] allocate their results.

#[cfg(feature = "candle")]
mod candle;
mod check;
mod checkpoints;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;
pub(crate) mod tensors;

pub use checkpoints::Checkpoints;
pub use tensors::{Gradients, GradientsMut, Inputs, Tensors};

use bytemuck::Pod;

use crate::arguments::zeroed;
use crate::kinds::{ProjectionOf, Slices, Zeros};
use crate::sequences::CHECKPOINT_STEPS;
use crate::simd::Isa;
use crate::{Discretization, Element, Host, Memory, Result, View};
use check::Problem;

/// Variants of the recurrence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Options {
    /// Pass `delta + delta_bias` through `softplus(x) = ln(1 + e^x)`, taken as the identity above 20.
    pub delta_softplus: bool,
    /// How the input is weighted.
    pub discretization: Discretization,
    /// Run from the last step of each sequence to its first, as the second half of a bidirectional model does. The
    /// initial state then applies after the last step and the final state before the first.
    pub reverse: bool,
    /// How far apart the states lie that a forward pass keeps for a backward pass.
    pub checkpoint_steps: CheckpointSteps,
}

/// The steps between two states that a forward pass keeps of each sequence, if a backward pass is to follow: `4·d_state` bytes of
/// each channel, so that with 16 states each 64 steps are 1 byte for a step of a channel, and each 16 are 4.
///
/// Backward goes from one to the next once more before it turns back. On GPUs that is less work where they lie closer: each 16
/// steps in place of 64, 16 states of bf16 activations, save 4 % of backward (H200) and cost 1 % of forward. Processors go through
/// 64 steps at a time whatever lies between. Results are the same within rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum CheckpointSteps {
    /// Each 16 steps: four times the memory.
    Every16,
    /// Each 32 steps: twice the memory.
    Every32,
    /// Each 64 steps.
    #[default]
    Every64,
}

impl CheckpointSteps {
    /// As a number.
    pub const fn get(self) -> usize {
        match self {
            Self::Every16 => 16,
            Self::Every32 => 32,
            Self::Every64 => CHECKPOINT_STEPS,
        }
    }
}

impl<'a, T: Element, M: Memory> Inputs<'a, T, M> {
    /// The number of elements of [`OutputMut::checkpoints`]: one state of every channel for every 64 steps, or what
    /// [`Options::checkpoint_steps`] says.
    pub fn checkpoint_len(&self) -> Result<usize> {
        self.check()?.checkpoint_len()
    }
}

/// Where a forward pass writes. Every buffer is dense and is overwritten whole.
pub struct OutputMut<'a, T: Element, M: Memory = Host> {
    /// `(batch, length, d_inner)`.
    pub out: &'a mut M::Buffer<T>,
    /// The state after the last step, `(sequences, d_inner, d_state)`.
    pub final_state: Option<&'a mut M::Buffer<f32>>,
    /// What a backward pass needs to recompute the states: [`Inputs::checkpoint_len`] elements, of which only that pass
    /// makes sense. A bare buffer does not say whose they are, and no backward pass can tell: whoever keeps it keeps it
    /// with its inputs and options. ([`Inputs::forward_with_checkpoints`] does.)
    pub checkpoints: Option<&'a mut M::Buffer<f32>>,
}

impl<'a, T: Element, M: Memory> OutputMut<'a, T, M> {
    /// The output alone. Add more with struct update syntax:
    /// `OutputMut { final_state: Some(&mut state), ..OutputMut::new(&mut out) }`.
    pub fn new(out: &'a mut M::Buffer<T>) -> Self {
        Self { out, final_state: None, checkpoints: None }
    }
}

/// The gradients that flow into a backward pass.
#[derive(Debug)]
pub struct OutputGradients<'a, T: Element, M: Memory = Host> {
    /// The gradient of `out`, `(batch, length, d_inner)`.
    pub d_out: View<'a, T, 3, M>,
    /// The gradient of the final state, `(sequences, d_inner, d_state)`; zero if absent.
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

/// Where the gradient of a [`Projection`](crate::Projection) goes.
pub type ProjectionMut<'a, T, M = Host> =
    ProjectionOf<&'a mut <M as Memory>::Buffer<T>, &'a mut <M as Memory>::Buffer<f32>>;

/// The gradient of a [`Projection`](crate::Projection).
pub type ProjectionGradient<T, P = f32> = ProjectionOf<Vec<T>, Vec<P>>;

/// The results of a forward pass: activations of type `T`, states of type `P`.
#[derive(Debug, Clone, PartialEq)]
pub struct Output<T, P = f32> {
    /// `(batch, length, d_inner)`.
    pub out: Vec<T>,
    /// The state after the last step, `(sequences, d_inner, d_state)`.
    pub final_state: Vec<P>,
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
        self.inputs.tensors().shaped(self.dims).map(&mut Zeros)
    }
}

impl<T: Pod, P: Pod> Output<T, P> {
    fn zeroed_for<X: Element>(problem: &Problem<X>) -> Result<Self> {
        Ok(Self {
            out: zeroed("u", &problem.activation_shape())?,
            final_state: zeroed("initial_state", &problem.state_shape())?,
        })
    }
}

impl<T: Element> Inputs<'_, T> {
    /// Runs the scan on the CPU. Keeps nothing for a backward pass.
    pub fn forward(&self) -> Result<Output<T>> {
        self.check()?.forward(None)
    }

    /// Runs the scan on the CPU and also returns the checkpoints that [`Inputs::backward`] needs.
    pub fn forward_with_checkpoints(&self) -> Result<(Output<T>, Checkpoints)> {
        let problem = self.check()?;
        let mut states = zeroed("u", &[problem.checkpoint_len()?])?;
        let output = problem.forward(Some(&mut states))?;
        Ok((output, Checkpoints::new(states, &problem)))
    }

    /// The gradient of every input that was given, on the CPU. `checkpoints` are those of a forward pass over the same
    /// inputs with the same options.
    ///
    /// # Errors
    /// An argument that does not fit, and checkpoints of other inputs or options: see [`Checkpoints`] for what is compared.
    pub fn backward<'a>(
        &self,
        checkpoints: &Checkpoints,
        d_outputs: impl Into<OutputGradients<'a, T>>,
    ) -> Result<Gradients<T>> {
        let problem = self.check()?;
        checkpoints.check(&problem)?;
        let mut gradients: Gradients<T> = problem.zero_gradients()?;
        cpu::backward_checked(Isa::best(), &problem, &checkpoints.states, d_outputs.into(), gradients.as_mut())?;
        Ok(gradients)
    }
}

impl<T: Element> Problem<'_, T> {
    fn forward(&self, checkpoints: Option<&mut [f32]>) -> Result<Output<T>> {
        let mut output = Output::zeroed_for(self)?;
        let (out, final_state) = (&mut output.out[..], Some(&mut output.final_state[..]));
        cpu::forward_checked(Isa::best(), self, OutputMut { out, final_state, checkpoints })?;
        Ok(output)
    }
}
