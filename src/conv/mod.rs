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

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;
mod update;

pub use crate::pool::{UpdateMut, UpdateOutput, rollback};
pub use update::UpdateInputs;

use std::ops::RangeInclusive;

use crate::arguments::{check_channels, check_count, check_exchanged, zeroed};
use crate::sequences::Sequences;
use crate::view::{check_len, check_optional};
use crate::{Element, Error, Host, Memory, Result, View};

/// The filter widths that the operator takes.
pub const WIDTHS: RangeInclusive<usize> = 2..=8;

/// What a convolution reads. `T` is the type of the activations; parameters and states are `f32`.
#[derive(Debug)]
pub struct Inputs<'a, T: Element, M: Memory = Host> {
    /// The input, `(batch, length, d_inner)`.
    pub x: View<'a, T, 3, M>,
    /// The filters, `(d_inner, width)`, with a width of [`WIDTHS`]; the last weight meets the newest input.
    pub weight: View<'a, f32, 2, M>,
    /// Added to every output before SiLU, `(d_inner)`.
    pub bias: Option<View<'a, f32, 1, M>>,
    /// The inputs before the first step, oldest first, `(sequences, width - 1, d_inner)`; zero if absent.
    pub initial_state: Option<View<'a, f32, 3, M>>,
    /// Packed sequences: with offsets `[0, l1, l1 + l2, …, length]` the batch is 1 and sequence `i` takes the steps from
    /// `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Otherwise every batch row is a sequence.
    pub cu_seqlens: Option<&'a [usize]>,
    /// The variant of the convolution.
    pub options: Options,
}

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

impl<T: Element, M: Memory> Clone for Inputs<'_, T, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element, M: Memory> Copy for Inputs<'_, T, M> {}

impl<'a, T: Element, M: Memory> Inputs<'a, T, M> {
    /// The inputs that every convolution has; the others are absent and the options plain. Add them with struct update
    /// syntax: `Inputs { bias: Some(bias), ..Inputs::new(x, weight) }`.
    pub fn new(x: View<'a, T, 3, M>, weight: View<'a, f32, 2, M>) -> Self {
        Self { x, weight, bias: None, initial_state: None, cu_seqlens: None, options: Options::default() }
    }

    /// Checks every argument. This is the only place that does; all implementations read what it returns.
    pub(crate) fn check(&self) -> Result<Problem<'a, T, M>> {
        let width = check_filter(ACTIVATION_NAMES, &self.x, &self.weight, &self.bias)?;
        let [batch, len, d_inner] = self.x.shape;
        let sequences = Sequences::check(batch, len, self.cu_seqlens)?;
        if let Some(view) = &self.initial_state {
            check_exchanged("initial_state", STATE_NAMES, view, [sequences.count(), width - 1, d_inner])?;
        }
        Ok(Problem { inputs: *self, width, sequences })
    }
}

/// Checks an input, whose dimensions have these names, and its filters, and gives their width.
fn check_filter<T: Element, M: Memory>(
    names: &str,
    x: &View<T, 3, M>,
    weight: &View<f32, 2, M>,
    bias: &Option<View<f32, 1, M>>,
) -> Result<usize> {
    check_count("x", x)?;
    x.check("x", names, x.shape)?;
    let (d_inner, width) = (x.shape[2], weight.shape[1]);
    if !WIDTHS.contains(&width) {
        let expected = format_args!("a width from {} to {} as its last dimension", WIDTHS.start(), WIDTHS.end());
        return Err(Error::argument("weight", expected.to_string(), format_args!("shape {:?}", weight.shape)));
    }
    check_channels("x", names, x, "weight", weight.shape[0])?;
    weight.check("weight", "(d_inner, width)", [d_inner, width])?;
    if let Some(bias) = bias {
        bias.check("bias", "(d_inner)", [d_inner])?;
    }
    Ok(width)
}

const ACTIVATION_NAMES: &str = "(batch, length, d_inner)";
const STATE_NAMES: &str = "(sequences, width - 1, d_inner)";

/// Inputs that have passed [`Inputs::check`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a, T: Element, M: Memory = Host> {
    pub inputs: Inputs<'a, T, M>,
    pub width: usize,
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
        let (inputs, d_inner) = (&self.inputs, self.d_inner());
        check_len("gradients.x", ACTIVATION_NAMES, &inputs.x.shape, M::len(gradients.x))?;
        check_len("gradients.weight", "(d_inner, width)", &inputs.weight.shape, M::len(gradients.weight))?;
        let bias = gradients.bias.as_ref().map(|bias| M::len(bias));
        check_optional("gradients.bias", "(d_inner)", inputs.bias.is_some(), &[d_inner], bias)?;
        let state = gradients.initial_state.as_ref().map(|state| M::len(state));
        let given = inputs.initial_state.is_some();
        check_optional("gradients.initial_state", STATE_NAMES, given, &self.state_shape(), state)
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

/// Where a backward pass writes the gradient of each input: a dense buffer of the input's shape, overwritten whole.
/// Exactly the inputs that were given must have one.
#[allow(missing_docs, reason = "each field is the gradient of the input of that name")]
pub struct GradientsMut<'a, T: Element, M: Memory = Host> {
    pub x: &'a mut M::Buffer<T>,
    pub weight: &'a mut M::Buffer<f32>,
    pub bias: Option<&'a mut M::Buffer<f32>>,
    pub initial_state: Option<&'a mut M::Buffer<f32>>,
}

impl<'a, T: Element, M: Memory> GradientsMut<'a, T, M> {
    /// The gradients of the inputs that every convolution has. Those of the others are added with struct update syntax:
    /// `GradientsMut { bias: Some(&mut bias), ..GradientsMut::new(&mut x, &mut weight) }`.
    pub fn new(x: &'a mut M::Buffer<T>, weight: &'a mut M::Buffer<f32>) -> Self {
        Self { x, weight, bias: None, initial_state: None }
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

/// The gradient of every input that was given, dense and of the input's shape.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "each field is the gradient of the input of that name")]
pub struct Gradients<T, P = f32> {
    pub x: Vec<T>,
    pub weight: Vec<P>,
    pub bias: Option<Vec<P>>,
    pub initial_state: Option<Vec<P>>,
}

impl<T: bytemuck::Pod, P: bytemuck::Pod> Gradients<T, P> {
    fn zeroed_for<X: Element>(problem: &Problem<X>) -> Result<Self> {
        let inputs = &problem.inputs;
        Ok(Self {
            x: zeroed("x", &inputs.x.shape)?,
            weight: zeroed("weight", &inputs.weight.shape)?,
            bias: inputs.bias.map(|view| zeroed("bias", &view.shape)).transpose()?,
            initial_state: inputs.initial_state.map(|view| zeroed("initial_state", &view.shape)).transpose()?,
        })
    }
}

impl<T: Element> Gradients<T> {
    /// Zeros for every input that is given.
    pub fn zeroed(inputs: &Inputs<T>) -> Result<Self> {
        Self::zeroed_for(&inputs.check()?)
    }

    /// The buffers, to be written.
    pub fn as_mut(&mut self) -> GradientsMut<'_, T> {
        GradientsMut {
            x: &mut self.x,
            weight: &mut self.weight,
            bias: self.bias.as_deref_mut(),
            initial_state: self.initial_state.as_deref_mut(),
        }
    }
}

impl<T: Element> Inputs<'_, T> {
    /// Runs the convolution on the CPU.
    pub fn forward(&self) -> Result<Output<T>> {
        let problem = self.check()?;
        let mut output =
            Output { out: zeroed("x", &self.x.shape)?, final_state: zeroed("initial_state", &problem.state_shape())? };
        let (out, final_state) = (&mut output.out[..], Some(&mut output.final_state[..]));
        cpu::forward(self, OutputMut { out, final_state })?;
        Ok(output)
    }

    /// The gradient of every input that was given, on the CPU. It needs nothing from a forward pass.
    pub fn backward<'a>(&self, d_outputs: impl Into<OutputGradients<'a, T>>) -> Result<Gradients<T>> {
        let mut gradients = Gradients::zeroed(self)?;
        cpu::backward(self, d_outputs.into(), gradients.as_mut())?;
        Ok(gradients)
    }
}
