//! A deep model of S4's layers.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;

use super::layer::Decoder;
use super::{S4Head, S4Layer, S4ModelConfig};
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
///     model.step(&x.narrow(1, t, 1)?.squeeze(1)?, &mut state)?;
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

/// The states of a model's sequences between steps, with what the steps need of the parameters: it is of no use any
/// more once they change.
#[derive(Debug)]
pub struct S4State {
    decoders: Vec<Decoder>,
    /// Of each layer, `(batch, d_model, 2 * d_state)` of `f32`.
    states: Vec<Tensor>,
    /// The sum over the steps so far of what a pooled head takes the mean of, `(batch, d_model)` of `f32`.
    sum: Tensor,
    steps: usize,
}

impl S4State {
    /// The states of all layers, `(batch, d_model, 2 * d_state)` of `f32` each.
    pub fn layers(&self) -> &[Tensor] {
        &self.states
    }

    /// The steps so far.
    pub fn steps(&self) -> usize {
        self.steps
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
        let mut stream = self.encoder.forward(&x.contiguous()?)?;
        for (i, (norm, layer)) in self.layers.iter().enumerate() {
            let out = layer.forward(&norm.forward(&stream)?)?;
            let keep = match stream.elem_count() {
                0 => None,
                _ => self.drops.keep(i, self.layers.len(), &stream, None)?,
            };
            stream = (&stream + keep.map_or(Ok(out.clone()), |keep| keep.of(&out))?)?;
        }
        let stream = self.norm.forward(&stream)?;
        match self.config.head {
            S4Head::PerStep => self.head.forward(&stream),
            S4Head::Pooled => self.head.forward(&stream.to_dtype(DType::F32)?.mean(1)?.to_dtype(self.dtype)?),
        }
    }

    /// States of zero for `batch` sequences.
    ///
    /// # Errors
    /// Layers in two directions, which have no steps; states that do not fit in memory; another device than the
    /// processor.
    pub fn new_state(&self, batch: usize) -> Result<S4State> {
        let layer = &self.config.layer;
        let device = self.norm.weight().device();
        let shape = [batch, layer.d_model, 2 * layer.d_state];
        check_room("batch", &shape, DType::F32, device)?;
        let zeros = |_: &_| Tensor::zeros(&shape, DType::F32, device);
        Ok(S4State {
            decoders: self.layers.iter().map(|(_, layer)| layer.decoder()).collect::<Result<_>>()?,
            states: self.layers.iter().map(zeros).collect::<Result<_>>()?,
            sum: Tensor::zeros((batch, layer.d_model), DType::F32, device)?,
            steps: 0,
        })
    }

    /// One step of each sequence, `(batch, d_input)`: its output, `(batch, d_output)`; with a pooled head that of the
    /// steps so far. Not differentiable.
    ///
    /// # Errors
    /// Another shape; a state of another model.
    pub fn step(&self, x: &Tensor, state: &mut S4State) -> Result<Tensor> {
        self.check(x, 2, "(batch, d_input)")?;
        if state.states.len() != self.layers.len() {
            return Err(argument("state", format_args!("{} layers", self.layers.len()), state.states.len()));
        }
        if x.dim(0)? != state.sum.dim(0)? {
            return Err(argument("x", format_args!("a batch of {}, as the state has", state.sum.dim(0)?), x.dim(0)?));
        }
        let mut stream = self.encoder.forward(&x.detach().contiguous()?)?.detach();
        for (i, (norm, layer)) in self.layers.iter().enumerate() {
            let out = layer.step(&norm.forward(&stream)?.detach(), &state.decoders[i], &mut state.states[i])?;
            stream = (stream + out)?.detach();
        }
        let stream = self.norm.forward(&stream)?.detach();
        state.steps += 1;
        let stream = match self.config.head {
            S4Head::PerStep => stream,
            S4Head::Pooled => {
                state.sum = (&state.sum + stream.to_dtype(DType::F32)?)?;
                (&state.sum / state.steps as f64)?.to_dtype(self.dtype)?
            }
        };
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
