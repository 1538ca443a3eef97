//! The causal depthwise convolution that stands before the scan in a Mamba block: forward, backward and in place.
//!
//! Every channel has its own filter of `W` weights, the last of which meets the newest input:
//!
//! ```text
//! s_t   = bias + Σ_k weight_k x_{t - (W-1) + k}      summed over k = 0..W
//! out_t = silu(s_t)                                  SiLU if asked for
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
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;
mod tensors;
mod update;

pub use crate::pool::{UpdateMut, UpdateOutput, rollback};
#[cfg(feature = "candle")]
pub use tensors::{CausalConv, ConvUpdate};
pub use tensors::{Gradients, GradientsMut, Inputs, Tensors, UpdateInputs, UpdateTensors};

use std::ops::RangeInclusive;

use bytemuck::Pod;

use crate::arguments::{check_channels, check_count, check_exchanged, zeroed};
use crate::kinds::{CheckGradients, CheckViews, Slices, Zeros};
use crate::sequences::Sequences;
use crate::simd::Isa;
use crate::view::check_len;
use crate::{Element, Error, Host, Memory, Result, View};
use tensors::Sizes;

/// The filter widths that the operator takes.
pub const WIDTHS: RangeInclusive<usize> = 2..=8;

/// Variants of the convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Options {
    /// Apply `silu(x) = x/(1 + e^-x)` to the result.
    pub silu: bool,
    /// Run from the last step of each sequence to its first, as the second half of a bidirectional model does: the
    /// filter then reaches to later steps. The initial state stands behind the last step, its oldest row farthest, and
    /// the final state holds the first steps, the very first in its last row.
    pub reverse: bool,
}

impl<'a, T: Element, M: Memory> Inputs<'a, T, M> {
    /// Checks every argument. This is the only place that does; all implementations read what it returns.
    pub(crate) fn check(&self) -> Result<Problem<'a, T, M>> {
        let mut sizes = check_filter(ACTIVATION_NAMES, &self.x, &self.weight)?;
        let sequences = Sequences::check(sizes.batch, sizes.length, self.cu_seqlens)?;
        sizes.sequences = sequences.count();
        self.tensors().shaped(sizes).map(&mut CheckViews)?;
        Ok(Problem { inputs: *self, width: sizes.width, sizes, sequences })
    }
}

/// Checks the sizes that an input, whose dimensions have these names, and its filters give, every batch row a sequence.
/// Whether all tensors have the shapes that follow is left to be checked.
fn check_filter<T: Element, M: Memory>(names: &str, x: &View<T, 3, M>, weight: &View<f32, 2, M>) -> Result<Sizes> {
    check_count("x", x)?;
    let ([batch, length, d_inner], width) = (x.shape, weight.shape[1]);
    if !WIDTHS.contains(&width) {
        let expected = format_args!("a width from {} to {} as its last dimension", WIDTHS.start(), WIDTHS.end());
        return Err(Error::argument("weight", expected.to_string(), format_args!("shape {:?}", weight.shape)));
    }
    check_channels("x", names, x, "weight", weight.shape[0])?;
    Ok(Sizes { batch, length, d_inner, width, sequences: batch })
}

const ACTIVATION_NAMES: &str = "(batch, length, d_inner)";
const STATE_NAMES: &str = "(sequences, width - 1, d_inner)";

/// Inputs that have passed [`Inputs::check`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a, T: Element, M: Memory = Host> {
    pub inputs: Inputs<'a, T, M>,
    pub width: usize,
    pub sizes: Sizes,
    pub sequences: Sequences<'a>,
}

impl<T: Element, M: Memory> Problem<'_, T, M> {
    fn d_inner(&self) -> usize {
        self.inputs.x.shape[2]
    }

    fn state_shape(&self) -> [usize; 3] {
        [self.sequences.count(), self.width - 1, self.d_inner()]
    }

    /// Checks what a forward pass writes.
    pub fn check_outputs(&self, outputs: &OutputMut<T, M>) -> Result<()> {
        check_len("out", ACTIVATION_NAMES, &self.inputs.x.shape, M::len(outputs.out))?;
        match &outputs.final_state {
            Some(state) => check_len("final_state", STATE_NAMES, &self.state_shape(), M::len(state)),
            None => Ok(()),
        }
    }

    /// Checks what a backward pass reads beside the inputs, and what it writes.
    pub fn check_backward(&self, d_outputs: &OutputGradients<T, M>, gradients: &GradientsMut<T, M>) -> Result<()> {
        self.check_output_gradients(d_outputs)?;
        self.inputs.tensors().zip(gradients.by_ref())?.shaped(self.sizes).map(&mut CheckGradients)?;
        Ok(())
    }

    /// Checks the gradients that flow into a backward pass.
    pub fn check_output_gradients(&self, d_outputs: &OutputGradients<T, M>) -> Result<()> {
        check_exchanged("d_out", ACTIVATION_NAMES, &d_outputs.d_out, self.inputs.x.shape)?;
        match &d_outputs.d_final_state {
            Some(view) => view.check("d_final_state", STATE_NAMES, self.state_shape()),
            None => Ok(()),
        }
    }
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
