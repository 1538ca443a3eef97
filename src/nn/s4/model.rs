//! A deep model of S4's layers.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::layer::Decoder;
use super::{S4Head, S4Layer, S4ModelConfig};
use crate::candle::Slots;
use crate::nn::decode::{check_slots, reset};
use crate::nn::layers::{Linear, ParameterList, Parameters, RmsNorm};
use crate::nn::train::Drops;
use crate::nn::{argument, check_model_dtype, check_room};

/// An encoder, layers of S4 around a residual stream, each after an RMS norm, a last norm and a head:
///
/// ```text
/// x = encoder(input);  x = x + layer(norm(x))  for each layer;  output = head(mean over steps of norm_f(x))
/// ```
///
/// or without the mean, see [`S4Head`]. Parameters: `encoder`, `layers.0.norm`, `layers.0.ssm` and so on, `norm_f`,
/// `head`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use selective_scan::nn::{S4Model, S4ModelConfig};
///
/// // Sequences of one number a step in 10 classes.
/// let config = S4ModelConfig::new(1, 10, 2, 16);
/// let variables = VarMap::new();
/// let model = S4Model::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
/// let x = Tensor::randn(0f32, 1.0, (3, 50, 1), &Device::Cpu)?;
/// assert_eq!(model.forward(&x)?.dims(), [3, 10]);
///
/// // The same step by step: after each, the output of what there was so far.
/// let mut state = model.new_state(3)?;
/// for t in 0..50 {
///     model.step(&x.narrow(1, t, 1)?.squeeze(1)?, &mut state, None)?;
/// }
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct S4Model {
    config: S4ModelConfig,
    encoder: Linear,
    layers: Vec<(RmsNorm, S4Layer)>,
    norm: RmsNorm,
    head: Linear,
    parameters: ParameterList,
    dtype: DType,
    drops: Drops,
}

/// The states of sequences in slots, for steps, with what the steps need of the parameters: it is of no use any more once they
/// change.
#[derive(Debug)]
pub struct S4State {
    decoders: Vec<Decoder>,
    /// Of each layer, `(slots, d_model, 2 * d_state)` of `f32`.
    states: Vec<Tensor>,
    /// The sum over the steps so far of what a pooled head takes the mean of, `(slots, d_model)` of `f32`.
    sum: Tensor,
    steps: Vec<usize>,
}

impl S4State {
    /// The states of all layers, `(slots, d_model, 2 * d_state)` of `f32` each, which steps change in place.
    pub fn layers(&self) -> &[Tensor] {
        &self.states
    }

    /// The slots.
    pub fn slots(&self) -> usize {
        self.steps.len()
    }

    /// The steps so far in each slot, over which a pooled head takes its mean; with another head they are not counted.
    pub fn steps(&self) -> &[usize] {
        &self.steps
    }

    /// Adds a step of rows, `(batch, d_model)`, to the sums in their slots, and gives the means.
    fn mean(&mut self, rows: &Tensor, places: &[Option<usize>]) -> Result<Tensor> {
        let mut means = Vec::with_capacity(places.len());
        for (i, place) in places.iter().enumerate() {
            let row = rows.narrow(0, i, 1)?;
            let Some(slot) = *place else {
                means.push(row);
                continue;
            };
            let sum = (self.sum.narrow(0, slot, 1)? + row)?;
            self.sum.slice_set(&sum, 0, slot)?;
            self.steps[slot] += 1;
            means.push((sum / self.steps[slot] as f64)?);
        }
        if means.is_empty() { rows.copy() } else { Tensor::cat(&means, 0) }
    }

    /// Zeroes the states of these slots, or of all, so that new sequences can begin there. A negative slot is padding.
    ///
    /// # Errors
    /// A slot that there is not; then nothing is written.
    pub fn reset(&mut self, slots: Option<&[i32]>) -> Result<()> {
        check_slots("slots", slots.unwrap_or_default(), self.slots(), true)?;
        reset(&self.states.iter().chain([&self.sum]).collect::<Vec<_>>(), slots)?;
        match slots {
            None => self.steps.fill(0),
            Some(slots) => {
                slots.iter().filter_map(|&slot| usize::try_from(slot).ok()).for_each(|slot| self.steps[slot] = 0)
            }
        }
        Ok(())
    }
}

/// What parts of sequences hand on to the parts after them, in training: part of candle's graph, so that a later part's loss has
/// gradients by what the parts before have read. [`S4Carry::detach`] cuts it off.
#[derive(Debug, Clone)]
pub struct S4Carry {
    states: Vec<Tensor>,
    sum: Tensor,
    steps: usize,
}

impl S4Carry {
    /// The states of all layers, `(batch, d_model, 2 * d_state)` of `f32` each.
    pub fn layers(&self) -> &[Tensor] {
        &self.states
    }

    /// The steps so far.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The same outside of candle's graph: gradients end here, and what earlier parts keep for them is freed.
    pub fn detach(&self) -> Self {
        let states = self.states.iter().map(Tensor::detach).collect();
        Self { states, sum: self.sum.detach(), steps: self.steps }
    }
}

impl S4Model {
    /// A model with the parameters of `vb`, which computes in its type. Those that a [`VarMap`](candle_nn::VarMap) does
    /// not have yet are drawn, from the seed of the layers' configuration and the parameters' names.
    ///
    /// # Errors
    /// A size that makes no model; a parameter that is missing or of another shape, by name.
    pub fn new(config: &S4ModelConfig, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        let dtype = check_model_dtype(vb.dtype())?;
        let parameters = Parameters::new(vb, config.layer.seed);
        let width = config.layer.d_model;
        let layer = |i: usize| -> Result<_> {
            let parameters = parameters.pp("layers").pp(i);
            let norm = RmsNorm::build(width, config.norm_eps, &parameters.pp("norm"))?;
            Ok((norm, S4Layer::build(&config.layer, &parameters.pp("ssm"))?))
        };
        let encoder = Linear::new(&parameters.pp("encoder"), [config.d_input, width], true, 1.0)?;
        let layers = (0..config.n_layer).map(layer).collect::<Result<_>>()?;
        let norm = RmsNorm::build(width, config.norm_eps, &parameters.pp("norm_f"))?;
        let head = Linear::new(&parameters.pp("head"), [width, config.d_output], true, 1.0)?;
        let parameters = parameters.taken_since(0);
        Ok(Self { config: config.clone(), encoder, layers, norm, head, parameters, dtype, drops: Drops::default() })
    }

    /// What it was made from.
    pub fn config(&self) -> &S4ModelConfig {
        &self.config
    }

    /// The same model, sharing its parameters with their gradients, whose [`forward`](Self::forward) leaves that out of what layers
    /// add: for a step of training. S4's papers train with dropout of 0.1 to 0.2. With [`Drops::default`] nothing is left out.
    ///
    /// # Errors
    /// A probability below 0, or of 1 or more.
    pub fn with_drops(&self, drops: Drops) -> Result<Self> {
        drops.check()?;
        Ok(Self { drops, ..self.clone() })
    }

    /// Calls `f` with the name of each parameter and the tensor that the model was built on.
    pub fn visit(&self, f: &mut dyn FnMut(&str, &Tensor)) {
        self.parameters.visit(f);
    }

    /// The parameters by name.
    pub fn named_tensors(&self) -> Vec<(String, Tensor)> {
        self.parameters.named_tensors()
    }

    /// Runs the model over whole sequences, `(batch, length, d_input)` of its type: `(batch, d_output)`, or for each
    /// step `(batch, length, d_output)`. Differentiable.
    ///
    /// # Errors
    /// Another shape; no step, where outputs are of the mean; what [`S4Layer::forward`] refuses.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.check(x, 3, "(batch, length, d_input)")?;
        let length = x.dim(1)?;
        if length == 0 && self.config.head == S4Head::Pooled {
            return Err(argument("x", "at least one step, to take the mean of", 0));
        }
        let stream = self.through_layers(x, |_, layer, x| layer.forward(x))?;
        match self.config.head {
            S4Head::PerStep => self.head.forward(&stream),
            S4Head::Pooled => self.head.forward(&stream.to_dtype(DType::F32)?.mean(1)?.to_dtype(self.dtype)?),
        }
    }

    /// Runs the model over a part of sequences that begins where the part before it ended, and gives what the next one goes on
    /// from. Outputs are as [`forward`](Self::forward) has them; with a pooled head of all steps so far. Differentiable through
    /// the parts: the gradients of a sequence in parts are those of the whole.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{VarBuilder, VarMap};
    /// # use selective_scan::nn::{S4Model, S4ModelConfig};
    /// # let model = S4Model::new(&S4ModelConfig::new(1, 10, 2, 16), VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu))?;
    /// let x = Tensor::randn(0f32, 1.0, (3, 50, 1), &Device::Cpu)?;
    /// let mut carry = model.new_carry(3)?;
    /// for first in [0, 25] {
    ///     let (out, after) = model.forward_from(&x.narrow(1, first, 25)?, &carry)?;
    ///     assert_eq!(out.dims(), [3, 10]);
    ///     carry = after; // or `after.detach()`, for gradients of a part alone
    /// }
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`forward`](Self::forward), no step being wrong only where there is none yet; layers in two directions; a carry of another
    /// model or batch.
    pub fn forward_from(&self, x: &Tensor, carry: &S4Carry) -> Result<(Tensor, S4Carry)> {
        self.check(x, 3, "(batch, length, d_input)")?;
        if carry.states.len() != self.layers.len() {
            return Err(argument("carry", format_args!("{} layers", self.layers.len()), carry.states.len()));
        }
        if x.dim(0)? != carry.sum.dim(0)? {
            return Err(argument("x", format_args!("a batch of {}, as `carry` has", carry.sum.dim(0)?), x.dim(0)?));
        }
        let steps = carry.steps + x.dim(1)?;
        if steps == 0 && self.config.head == S4Head::Pooled {
            return Err(argument("x", "at least one step, to take the mean of", 0));
        }
        let mut states = Vec::with_capacity(self.layers.len());
        let stream = self.through_layers(x, |i, layer, x| {
            let (y, state) = layer.forward_with_state(x, Some(&carry.states[i]))?;
            states.push(state);
            Ok(y)
        })?;
        let sum = (&carry.sum + stream.to_dtype(DType::F32)?.sum(1)?)?;
        let out = match self.config.head {
            S4Head::PerStep => stream,
            S4Head::Pooled => (&sum / steps as f64)?.to_dtype(self.dtype)?,
        };
        Ok((self.head.forward(&out)?, S4Carry { states, sum, steps }))
    }

    /// The residual stream after all layers and the last norm. `run` gives what a layer, by number, makes of its input.
    fn through_layers(
        &self,
        x: &Tensor,
        mut run: impl FnMut(usize, &S4Layer, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut stream = self.encoder.forward(&x.contiguous()?)?;
        for (i, (norm, layer)) in self.layers.iter().enumerate() {
            let out = run(i, layer, &norm.forward(&stream)?)?;
            let keep = match stream.elem_count() {
                0 => None,
                _ => self.drops.keep(i, self.layers.len(), &stream, None)?,
            };
            stream = (&stream + keep.map_or(Ok(out.clone()), |keep| keep.of(&out))?)?;
        }
        self.norm.forward(&stream)
    }

    /// Tensors of zeros, the states of all layers for `rows` sequences and what a pooled head sums up.
    fn zeros(&self, argument: &'static str, rows: usize) -> Result<(Vec<Tensor>, Tensor)> {
        let layer = &self.config.layer;
        let device = self.norm.weight().device();
        let shape = [rows, layer.d_model, 2 * layer.d_state];
        check_room(argument, &shape, DType::F32, device)?;
        let states = self.layers.iter().map(|_| Tensor::zeros(&shape, DType::F32, device)).collect::<Result<_>>()?;
        Ok((states, Tensor::zeros((rows, layer.d_model), DType::F32, device)?))
    }

    /// What `batch` sequences begin from: states of zero.
    ///
    /// # Errors
    /// Layers in two directions, of which the second begins at the end; states that do not fit in memory.
    pub fn new_carry(&self, batch: usize) -> Result<S4Carry> {
        if self.config.layer.bidirectional {
            return Err(argument("bidirectional", "one direction, for parts of sequences", "two"));
        }
        let (states, sum) = self.zeros("batch", batch)?;
        Ok(S4Carry { states, sum, steps: 0 })
    }

    /// States of zero for sequences in `slots` slots.
    ///
    /// # Errors
    /// Layers in two directions, which have no steps; states that do not fit in memory; of low rank, another device than the
    /// processor.
    pub fn new_state(&self, slots: usize) -> Result<S4State> {
        let (states, sum) = self.zeros("slots", slots)?;
        Ok(S4State { decoders: self.decoders()?, states, sum, steps: vec![0; slots] })
    }

    /// The states with which sequences go on step by step after their parts, a slot for each: a copy, with no gradients.
    ///
    /// # Errors
    /// As [`new_state`](Self::new_state); a carry of another model.
    pub fn state_from(&self, carry: &S4Carry) -> Result<S4State> {
        if carry.states.len() != self.layers.len() {
            return Err(argument("carry", format_args!("{} layers", self.layers.len()), carry.states.len()));
        }
        let copy = |tensor: &Tensor| tensor.detach().copy();
        Ok(S4State {
            decoders: self.decoders()?,
            states: carry.states.iter().map(copy).collect::<Result<_>>()?,
            sum: copy(&carry.sum)?,
            steps: vec![carry.steps; carry.sum.dim(0)?],
        })
    }

    fn decoders(&self) -> Result<Vec<Decoder>> {
        self.layers.iter().map(|(_, layer)| layer.decoder()).collect()
    }

    /// One step of some sequences, `(batch, d_input)`: their outputs, `(batch, d_output)`; with a pooled head those of the
    /// steps so far. Not differentiable.
    ///
    /// Row `i` uses slot `slots[i]`, or slot `i` if `slots` is `None`, the state then having one for each row. A row whose slot is
    /// negative is padding: what it gives means nothing, and it changes no state.
    ///
    /// # Errors
    /// Another shape; a state of another model; slots that do not fit, see [`Slots`]; with a pooled head, slots on a GPU. Nothing
    /// is written then.
    pub fn step<'s>(&self, x: &Tensor, state: &mut S4State, slots: impl Into<Slots<'s>>) -> Result<Tensor> {
        let slots = slots.into();
        self.check(x, 2, "(batch, d_input)")?;
        if state.states.len() != self.layers.len() {
            return Err(argument("state", format_args!("{} layers", self.layers.len()), state.states.len()));
        }
        let batch = x.dim(0)?;
        slots.check(batch, "state", &state.sum)?;
        let places = match self.config.head {
            S4Head::PerStep => None,
            S4Head::Pooled => Some(slots.of_rows(batch, "state", &state.sum)?),
        };
        let mut stream = self.encoder.forward(&x.detach().contiguous()?)?.detach();
        for (i, (norm, layer)) in self.layers.iter().enumerate() {
            let out = layer.step(&norm.forward(&stream)?.detach(), &state.decoders[i], &state.states[i], slots)?;
            stream = (stream + out)?.detach();
        }
        let mut stream = self.norm.forward(&stream)?.detach();
        if let Some(places) = places {
            stream = state.mean(&stream.to_dtype(DType::F32)?, &places)?.to_dtype(self.dtype)?;
        }
        Ok(self.head.forward(&stream)?.detach())
    }

    fn check(&self, x: &Tensor, rank: usize, names: &str) -> Result<()> {
        if x.rank() != rank || x.dim(D::Minus1)? != self.config.d_input {
            let expected = format_args!("shape {names} with d_input = {}", self.config.d_input).to_string();
            return Err(argument("x", expected, format_args!("{:?}", x.dims())));
        }
        Ok(())
    }
}
