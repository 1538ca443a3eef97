//! The causal convolution on tensors.

use candle_core::{Result, Tensor};

use super::device::{Backend, Value, for_dtype, on_device};
use super::graph::{self, Backward, Computed, Gradient};
use super::tensors::{Argument, Opened, Reader, both, given};
use crate::conv::{GradientsMut, Inputs, Options, OutputGradients, OutputMut};
use crate::sequences::Sequences;

/// A causal depthwise convolution over tensors; see [`conv`](crate::conv) for what it computes.
///
/// `T` stands for the element type of `x`: `f32`, `f16` or `bf16`. Tensors may have any strides and are not copied.
///
/// Gradients flow to every tensor here, from the output and from the final state.
#[derive(Debug, Clone, Copy)]
pub struct CausalConv<'a> {
    /// The input, `(batch, length, d_inner)` of `T`.
    pub x: &'a Tensor,
    /// The filters, `(d_inner, width)` of `f32`, or `(d_inner, 1, width)` as checkpoints have them, with a width from 2 to 8;
    /// the last weight meets the newest input.
    pub weight: &'a Tensor,
    /// Added to every output before SiLU, `(d_inner)` of `f32`.
    pub bias: Option<&'a Tensor>,
    /// The inputs before the first step, oldest first, `(sequences, width - 1, d_inner)` of `f32`; zero if absent.
    pub initial_state: Option<&'a Tensor>,
    /// Packed sequences: with offsets `[0, l1, l1 + l2, …, length]` the batch is 1 and sequence `i` takes the steps from
    /// `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Otherwise every batch row is a sequence.
    pub cu_seqlens: Option<&'a [usize]>,
    /// The variant of the convolution.
    pub options: Options,
}

const NAME: &str = "causal-conv";
const ACTIVATION: &str = "(batch, length, d_inner)";
const STATE: &str = "(sequences, width - 1, d_inner)";

impl<'a> CausalConv<'a> {
    /// The tensors that every convolution has; the others are absent and the options plain. Add them with struct update
    /// syntax: `CausalConv { bias: Some(&bias), ..CausalConv::new(&x, &weight) }`.
    pub fn new(x: &'a Tensor, weight: &'a Tensor) -> Self {
        Self { x, weight, bias: None, initial_state: None, cu_seqlens: None, options: Options::default() }
    }

    /// Runs the convolution: `(batch, length, d_inner)` of `T`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names. What the device refuses.
    pub fn forward(&self) -> Result<Tensor> {
        Ok(self.run(false)?.0)
    }

    /// Runs the convolution and also gives the last inputs, oldest first, `(sequences, width - 1, d_inner)` of `f32`.
    ///
    /// # Errors
    /// As [`CausalConv::forward`].
    pub fn forward_with_state(&self) -> Result<(Tensor, Tensor)> {
        self.run(true).map(both)
    }

    fn arguments(&self) -> Vec<Argument<'a>> {
        given([("x", self.x), ("weight", self.weight)], [("bias", self.bias), ("initial_state", self.initial_state)])
    }

    fn run(&self, with_state: bool) -> Result<(Tensor, Option<Tensor>)> {
        if let Some(weight) = without_middle(self.weight)? {
            return CausalConv { weight: &weight, ..*self }.run(with_state);
        }
        let arguments = self.arguments();
        let tensors: Vec<_> = arguments.iter().map(|(_, tensor)| *tensor).collect();
        let (out, final_state) = {
            let opened = Opened::new(&arguments)?;
            let reader = opened.reader();
            on_device!("x", self.x, |backend| for_dtype!("x", self.x.dtype(), |T| {
                let inputs = inputs(backend, &reader, self.cu_seqlens, self.options)?;
                compute::<_, T>(backend, &inputs, with_state)
            }))
        }?;
        let kept = Kept {
            x: self.x.clone(),
            weight: self.weight.clone(),
            bias: self.bias.cloned(),
            initial_state: self.initial_state.cloned(),
            cu_seqlens: self.cu_seqlens.map(<[usize]>::to_vec),
            options: self.options,
        };
        graph::attach(NAME, &tensors, out, final_state, kept)
    }
}

/// Filters of shape `(d_inner, 1, width)` as `(d_inner, width)`; none if they have another.
pub(super) fn without_middle(weight: &Tensor) -> Result<Option<Tensor>> {
    match weight.dims() {
        [_, 1, _] => weight.squeeze(1).map(Some),
        _ => Ok(None),
    }
}

fn inputs<'l, B: Backend, T: Value>(
    _: &B,
    reader: &Reader<'l>,
    cu_seqlens: Option<&'l [usize]>,
    options: Options,
) -> Result<Inputs<'l, T, B::Memory>> {
    let x = reader.view::<B, T, 3>("x", ACTIVATION)?;
    let weight = reader.view::<B, f32, 2>("weight", "(d_inner, width)")?;
    Ok(Inputs {
        bias: reader.optional::<B, f32, 1>("bias", "(d_inner)")?,
        initial_state: reader.optional::<B, f32, 3>("initial_state", STATE)?,
        cu_seqlens,
        options,
        ..Inputs::new(x, weight)
    })
}

fn compute<B: Backend, T: Value>(
    backend: &B,
    inputs: &Inputs<T, B::Memory>,
    with_state: bool,
) -> Result<(Computed, Option<Computed>)> {
    let problem = inputs.check()?;
    let [batch, len, d_inner] = inputs.x.shape;
    let state = [Sequences::check(batch, len, inputs.cu_seqlens)?.count(), problem.width - 1, d_inner];
    let mut out = backend.allocate::<T>("x", &inputs.x.shape)?;
    let mut final_state = with_state.then(|| backend.allocate::<f32>("initial_state", &state)).transpose()?;
    let outputs = OutputMut { out: B::borrow(&mut out), final_state: final_state.as_mut().map(B::borrow) };
    backend.conv_forward(inputs, outputs)?;
    let out = Computed::new(backend.store(out), inputs.x.shape);
    Ok((out, final_state.map(|data| Computed::new(backend.store(data), state))))
}

/// What a backward pass needs: the inputs.
struct Kept {
    x: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    initial_state: Option<Tensor>,
    cu_seqlens: Option<Vec<usize>>,
    options: Options,
}

impl Backward for Kept {
    fn backward(&self, d_out: &Tensor, d_final_state: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let inputs = CausalConv {
            bias: self.bias.as_ref(),
            initial_state: self.initial_state.as_ref(),
            ..CausalConv::new(&self.x, &self.weight)
        };
        let mut arguments = inputs.arguments();
        arguments.push(("d_out", d_out));
        arguments.extend(d_final_state.map(|tensor| ("d_final_state", tensor)));
        let opened = Opened::new(&arguments)?;
        let reader = opened.reader();
        on_device!("x", self.x, |backend| for_dtype!("x", self.x.dtype(), |T| {
            self.gradients::<_, T>(backend, &reader)
        }))
    }
}

impl Kept {
    /// The gradients in the order of [`CausalConv::arguments`].
    fn gradients<B: Backend, T: Value>(&self, backend: &B, reader: &Reader) -> Result<Vec<Tensor>> {
        let inputs = inputs::<B, T>(backend, reader, self.cu_seqlens.as_deref(), self.options)?;
        let d_outputs = OutputGradients {
            d_out: reader.view::<B, T, 3>("d_out", ACTIVATION)?,
            d_final_state: reader.optional::<B, f32, 3>("d_final_state", STATE)?,
        };
        let mut x = Gradient::<B, T>::new(backend, "x", &self.x)?;
        let mut weight = Gradient::<B, f32>::new(backend, "weight", &self.weight)?;
        let mut bias = Gradient::<B, f32>::optional(backend, "bias", &self.bias)?;
        let mut initial_state = Gradient::<B, f32>::optional(backend, "initial_state", &self.initial_state)?;
        let gradients = GradientsMut {
            x: x.as_mut(),
            weight: weight.as_mut(),
            bias: bias.as_mut().map(Gradient::as_mut),
            initial_state: initial_state.as_mut().map(Gradient::as_mut),
        };
        backend.conv_backward(&inputs, d_outputs, gradients)?;
        let mut all = vec![x.tensor(backend), weight.tensor(backend)];
        all.extend([bias, initial_state].into_iter().flatten().map(|gradient| gradient.tensor(backend)));
        Ok(all)
    }
}
