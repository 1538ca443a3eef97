//! The recurrent layer.

use std::borrow::Cow;
use std::collections::HashMap;

use candle_core::{DType, Result, Tensor, Var};
use candle_nn::rnn::{GRUState, LSTMState};
use candle_nn::{GRU, GRUConfig, LSTM, LSTMConfig, Module, RNN, VarBuilder};

use super::{RecurrentCell, RecurrentConfig, RecurrentState, StepStates};
use crate::candle::{Slots, node};
use crate::count_sequences;
use crate::nn::argument;
use crate::nn::layers::{Change, Initial, Linear, Parameter, ParameterList, Parameters, each_once};
use crate::nn::mamba::CachePass;

/// The steps that a backward pass goes through at a time: those of a state that is kept, computed again.
const SEGMENT: usize = 64;

/// The names of a cell's parameters, which PyTorch and candle-nn have for them.
const NAMES: [&str; 4] = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"];

/// An LSTM or a GRU: `out_proj(cell(input))`, the cell being candle-nn's, a step after another.
///
/// Parameters are `weight_ih_l0`, `weight_hh_l0`, `bias_ih_l0`, `bias_hh_l0` and `out_proj.weight`. The cell computes in `f32` in
/// a model of any type. A backward pass keeps one state for every 64 steps and goes through the steps between again, so that
/// memory for training does not grow with all that a step computes.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::{VarBuilder, VarMap};
/// use selective_scan::nn::{Recurrent, RecurrentCell, RecurrentConfig};
///
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let layer = Recurrent::new(&RecurrentConfig::new(16, RecurrentCell::Lstm), vb)?;
/// let x = Tensor::randn(0f32, 1.0, (2, 5, 16), &Device::Cpu)?;
/// assert_eq!(layer.forward(&x)?.dims(), [2, 5, 16]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Recurrent {
    config: RecurrentConfig,
    /// In the order of [`NAMES`], `f32`.
    cell: [Parameter; 4],
    out_proj: Linear,
    parameters: ParameterList,
}

/// What a run over steps gives.
struct Steps {
    /// `(batch, length, d_hidden)`.
    out: Tensor,
    /// After the last step, `(batch, d_hidden)` each.
    state: Vec<Tensor>,
    /// After every step, if they are wanted.
    states: Vec<Vec<Tensor>>,
}

/// What a run that is differentiated keeps.
#[derive(Clone)]
struct Kept {
    config: RecurrentConfig,
    weights: Vec<Tensor>,
    x: Tensor,
    /// Before each segment.
    states: Vec<Vec<Tensor>>,
}

impl Recurrent {
    /// A layer with the parameters of `vb`, which computes in its type. Those that a [`VarMap`](candle_nn::VarMap) does not
    /// have yet are drawn as PyTorch draws them, from the configuration's seed and the parameters' names.
    ///
    /// # Errors
    /// A size that makes no layer, or one that does not fit in memory; a parameter that is missing or of another shape, by
    /// name.
    pub fn new(config: &RecurrentConfig, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        crate::nn::check_model_dtype(vb.dtype())?;
        let parameters = Parameters::new(vb, config.seed);
        parameters.check_room(NAMES[0], "d_model, d_hidden", config.parameter_count()?)?;
        Self::build(config, &parameters, 1.0)
    }

    /// A layer whose initial `out_proj` is divided by a number.
    pub(crate) fn build(config: &RecurrentConfig, parameters: &Parameters, out_proj_divisor: f64) -> Result<Self> {
        let count = parameters.count();
        let &RecurrentConfig { d_model, d_hidden, cell, .. } = config;
        let rows = cell.gates() * d_hidden;
        let get = |name, shape: &[usize]| parameters.get_f32(shape, name, Initial::linear(d_hidden, 1.0));
        let cell = [
            get(NAMES[0], &[rows, d_model])?,
            get(NAMES[1], &[rows, d_hidden])?,
            get(NAMES[2], &[rows])?,
            get(NAMES[3], &[rows])?,
        ];
        let out_proj = Linear::new(&parameters.pp("out_proj"), [d_hidden, d_model], false, out_proj_divisor)?;
        let parameters = parameters.taken_since(count);
        Ok(Self { config: config.clone(), cell, out_proj, parameters })
    }

    /// The layer's sizes and cell.
    pub fn config(&self) -> &RecurrentConfig {
        &self.config
    }

    /// Runs whole sequences: `(batch, length, d_model)` to the same shape. Differentiable. Of no steps there are no outputs.
    ///
    /// # Errors
    /// An input of another width or type.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, None)
    }

    /// Runs sequences that lie one after another: `x` is `(1, length, d_model)`, and sequence `i` takes the steps from
    /// `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Each gets what it would get alone. Differentiable.
    ///
    /// # Errors
    /// As [`Recurrent::forward`]; offsets that do not fit.
    pub fn forward_packed(&self, x: &Tensor, cu_seqlens: &[usize]) -> Result<Tensor> {
        self.run(x, Some(cu_seqlens))
    }

    pub(crate) fn run(&self, x: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<Tensor> {
        self.check_input(x, cu_seqlens)?;
        if x.elem_count() == 0 {
            return x.zeros_like();
        }
        let mut outs = Vec::new();
        for part in parts(x, cu_seqlens)? {
            let zero = self.zero_state(&part)?;
            outs.push(self.differentiable(&part, zero)?.0);
        }
        self.out_proj.forward(&joined(&outs)?.to_dtype(x.dtype())?)
    }

    /// [`forward`](Self::forward) from the states of a cache on, whose slots then have those afterwards: candle does not track
    /// these. All has been checked.
    pub(crate) fn forward_carried(&self, x: &Tensor, state: &RecurrentState, slots: Slots) -> Result<Tensor> {
        let slots = slots.of_rows(x.dim(0)?, "cache", &state.h)?;
        let (out, after) = self.differentiable(x, state.load(&slots)?)?;
        state.store(&after, &slots)?;
        self.out_proj.forward(&out.to_dtype(x.dtype())?)
    }

    /// Runs the norm of a residual stream on from the states of a cache, and adds what comes out to the stream, in place. All has been
    /// checked. Of a draft it gives the states after each token.
    pub(crate) fn extend_onto(
        &self,
        stream: &Tensor,
        x: &Tensor,
        pass: CachePass,
        state: &RecurrentState,
    ) -> Result<Option<StepStates>> {
        let layer = self.untracked()?;
        let parts = parts(x, pass.cu_seqlens())?;
        let sequences = pass.cu_seqlens().map_or(x.dim(0)?, |ends| ends.len() - 1);
        let slots = pass.slots().of_rows(sequences, "cache", &state.h)?;
        let is_draft = matches!(pass, CachePass::Draft { .. });
        let (mut outs, mut drafts) = (Vec::new(), None);
        let weights = layer.weights()?;
        // Whole rows at once, or packed sequences one by one.
        let slots_of = |index: usize| match pass.cu_seqlens() {
            Some(_) => &slots[index..index + 1],
            None => &slots[..],
        };
        for (index, part) in parts.iter().enumerate() {
            let slots = slots_of(index);
            if part.dim(1)? == 0 {
                continue;
            }
            let steps = run(&layer.config, &weights, &part.to_dtype(DType::F32)?, &state.load(slots)?, is_draft)?;
            state.store(&steps.state, slots)?;
            if is_draft {
                let of = |vector: usize| {
                    let steps: Vec<_> = steps.states.iter().map(|states| states[vector].clone()).collect();
                    Tensor::stack(&steps, 1)?.unsqueeze(2)
                };
                drafts = Some(StepStates((0..layer.config.cell.vectors()).map(of).collect::<Result<_>>()?));
            }
            outs.push(steps.out);
        }
        let y = joined(&outs)?.to_dtype(x.dtype())?;
        layer.out_proj.apply_onto(&stream.flatten(0, 1)?, &y.flatten(0, 1)?)?;
        Ok(drafts)
    }

    /// The layer itself where candle tracks nothing, else the same without gradients.
    fn untracked(&self) -> Result<Cow<'_, Self>> {
        Ok(if self.parameters.is_tracked() { Cow::Owned(self.detach()?) } else { Cow::Borrowed(self) })
    }

    fn weights(&self) -> Result<Vec<Tensor>> {
        self.cell.iter().map(|parameter| parameter.tensor()?.to_dtype(DType::F32)).collect()
    }

    fn zero_state(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let zero = || Tensor::zeros((x.dim(0)?, self.config.d_hidden), DType::F32, x.device());
        (0..self.config.cell.vectors()).map(|_| zero()).collect()
    }

    /// Runs the cell from a state on: `(batch, length, d_hidden)` of `f32`, one node of candle's graph; and the state afterwards,
    /// which is not part of it.
    fn differentiable(&self, x: &Tensor, state: Vec<Tensor>) -> Result<(Tensor, Vec<Tensor>)> {
        let stored: Vec<_> = self.cell.iter().map(Parameter::stored).collect();
        let weights: Vec<_> = self.weights()?.iter().map(Tensor::detach).collect();
        let x_wide = x.detach().to_dtype(DType::F32)?.contiguous()?;
        let (mut states, mut outs, mut current) = (Vec::new(), Vec::new(), state);
        let length = x_wide.dim(1)?;
        for start in (0..length).step_by(SEGMENT) {
            let segment = x_wide.narrow(1, start, SEGMENT.min(length - start))?;
            let steps = run(&self.config, &weights, &segment, &current, false)?;
            states.push(std::mem::replace(&mut current, steps.state));
            outs.push(steps.out);
        }
        let out = Tensor::cat(&outs, 1)?;
        let kept = Kept { config: self.config.clone(), weights, x: x_wide, states };
        let (tracked, dtypes) =
            (each_once(stored.iter().copied()), stored.iter().map(|w| w.dtype()).collect::<Vec<_>>());
        let places: Vec<_> = stored.iter().map(|w| tracked.iter().position(|other| other.id() == w.id())).collect();
        let inputs: Vec<_> = [x].into_iter().chain(&tracked).collect();
        let (x_dtype, count) = (x.dtype(), tracked.len());
        let backward = move |d_out: &Tensor| {
            let (d_x, d_weights) = kept.backward(d_out)?;
            let mut gradients: Vec<Option<Tensor>> = vec![None; count];
            for ((gradient, place), dtype) in d_weights.into_iter().zip(&places).zip(&dtypes) {
                let Some(place) = *place else { continue };
                let gradient = gradient.to_dtype(*dtype)?;
                gradients[place] = Some(match gradients[place].take() {
                    Some(other) => (other + gradient)?,
                    None => gradient,
                });
            }
            Ok([Some(d_x.to_dtype(x_dtype)?)].into_iter().chain(gradients).collect())
        };
        // SAFETY: the joined outputs are a tensor of their own, of which no other handle is left.
        let out = unsafe { node("recurrent", &inputs, out.force_contiguous()?, backward) }?;
        Ok((out, current))
    }

    /// Checks an input and how it is divided into sequences.
    fn check_input(&self, x: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<()> {
        let (d_model, dtype) = (self.config.d_model, self.out_proj.dtype());
        let &[batch, length, width] = x.dims() else {
            return Err(argument("x", format_args!("(batch, length, {d_model})"), format_args!("{:?}", x.dims())));
        };
        if width != d_model {
            return Err(argument("x", format_args!("(batch, length, {d_model})"), format_args!("{:?}", x.dims())));
        }
        if x.dtype() != dtype {
            return Err(argument("x", format_args!("type {}, as the layer", dtype.as_str()), x.dtype().as_str()));
        }
        count_sequences(batch, length, cu_seqlens)?;
        Ok(())
    }

    /// The same layer, sharing its parameters, without gradients. Where training goes on, take a new one after a step.
    pub fn detach(&self) -> Result<Self> {
        self.changed(&mut |_, parameter| parameter.detach())
    }

    /// The same layer, each parameter as `change` gives it.
    fn changed(&self, change: &mut Change) -> Result<Self> {
        Self::build(&self.config, &Parameters::changed(&self.parameters, change), 1.0)
    }

    /// All parameters by name, in the order in which the layer uses them.
    pub fn named_tensors(&self) -> Vec<(String, Tensor)> {
        self.parameters.named_tensors()
    }
}

impl Module for Recurrent {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Self::forward(self, x)
    }
}

/// Rows, or the sequences that are packed into one.
fn parts(x: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<Vec<Tensor>> {
    match cu_seqlens {
        None => Ok(vec![x.clone()]),
        Some(ends) => ends.windows(2).map(|ends| x.narrow(1, ends[0], ends[1] - ends[0])).collect(),
    }
}

fn joined(outs: &[Tensor]) -> Result<Tensor> {
    match outs {
        [one] => Ok(one.clone()),
        all => Tensor::cat(all, 1),
    }
}

/// Runs a cell over the steps of `x`, `(batch, length, d_model)`, from a state on. What candle tracks of weights, input and state,
/// it tracks of the results.
fn run(config: &RecurrentConfig, weights: &[Tensor], x: &Tensor, state: &[Tensor], with_states: bool) -> Result<Steps> {
    let tensors: HashMap<String, Tensor> = NAMES.map(String::from).into_iter().zip(weights.iter().cloned()).collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F32, x.device());
    let (length, widths) = (x.dim(1)?, (config.d_model, config.d_hidden));
    let input = |step: usize| x.narrow(1, step, 1)?.squeeze(1)?.contiguous();
    let mut steps = Steps { out: x.clone(), state: state.to_vec(), states: Vec::new() };
    let mut outs = Vec::with_capacity(length);
    let mut keep = |steps: &mut Steps, state: Vec<Tensor>| {
        outs.push(state[0].clone());
        if with_states {
            steps.states.push(state.clone());
        }
        steps.state = state;
    };
    match config.cell {
        RecurrentCell::Lstm => {
            let cell = LSTM::new(widths.0, widths.1, LSTMConfig::default(), vb)?;
            for step in 0..length {
                let state = LSTMState::new(steps.state[0].clone(), steps.state[1].clone());
                let LSTMState { h, c } = cell.step(&input(step)?, &state)?;
                keep(&mut steps, vec![h, c]);
            }
        }
        RecurrentCell::Gru => {
            let cell = GRU::new(widths.0, widths.1, GRUConfig::default(), vb)?;
            for step in 0..length {
                let GRUState { h } = cell.step(&input(step)?, &GRUState { h: steps.state[0].clone() })?;
                keep(&mut steps, vec![h]);
            }
        }
    }
    steps.out = Tensor::stack(&outs, 1)?;
    Ok(steps)
}

impl Kept {
    /// The gradients of the input and of the weights. Segments are computed again, the last first, in a graph of their own.
    fn backward(&self, d_out: &Tensor) -> Result<(Tensor, Vec<Tensor>)> {
        let length = self.x.dim(1)?;
        let (mut d_xs, mut d_weights, mut d_state) = (Vec::new(), Vec::new(), None::<Vec<Tensor>>);
        for (index, state) in self.states.iter().enumerate().rev() {
            let (start, count) = (index * SEGMENT, SEGMENT.min(length - index * SEGMENT));
            let variables = |tensors: &[Tensor]| tensors.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>();
            let (weights, x, state) =
                (variables(&self.weights)?, Var::from_tensor(&self.x.narrow(1, start, count)?)?, variables(state)?);
            let of = |variables: &[Var]| variables.iter().map(|v| v.as_tensor().clone()).collect::<Vec<_>>();
            let steps = run(&self.config, &of(&weights), &x, &of(&state), false)?;
            // The sum whose slopes by the results are their gradients.
            let mut sum = (steps.out * d_out.narrow(1, start, count)?)?.sum_all()?;
            for (state, d_state) in steps.state.iter().zip(d_state.iter().flatten()) {
                sum = (sum + (state * d_state)?.sum_all()?)?;
            }
            let mut gradients = sum.backward()?;
            let mut take = |variable: &Var| match gradients.remove(variable) {
                Some(gradient) => Ok(gradient),
                None => variable.zeros_like(),
            };
            d_xs.push(take(&x)?);
            let of_weights = weights.iter().map(&mut take).collect::<Result<Vec<_>>>()?;
            d_weights = match d_weights.is_empty() {
                true => of_weights,
                false => d_weights.iter().zip(&of_weights).map(|(a, b): (&Tensor, _)| a + b).collect::<Result<_>>()?,
            };
            d_state = Some(state.iter().map(&mut take).collect::<Result<_>>()?);
        }
        d_xs.reverse();
        Ok((Tensor::cat(&d_xs, 1)?, d_weights))
    }
}
