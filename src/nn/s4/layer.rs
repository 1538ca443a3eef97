//! The layer of S4.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;
use candle_nn::ops::sigmoid;

use super::{S4Config, S4System};
use crate::candle::{LongConv, S4Kernel, S4d, S4dUpdate, Slots, s4d_recurrence};
use crate::lti::s4::Recurrence;
use crate::lti::s4d::Options;
use crate::nn::decode::{put, take};
use crate::nn::layers::{Initial, Linear, Parameter, ParameterList, Parameters, System, SystemRow};
use crate::nn::{argument, check_model_dtype};

/// The layer of S4 and S4D (Gu, Goel and Ré 2022, arXiv 2111.00396; Gu, Gupta, Goel and Ré 2022, arXiv 2206.11893):
///
/// ```text
/// y      = system of each channel(x)           in both directions, if there are two: the sum
/// g, h   = out_proj(gelu(y))                   from d_model to 2 d_model
/// output = g · sigmoid(h)
/// ```
///
/// Parameters, the systems' all of `f32`: `log_delta` `(d_model)`; `log_a_real`, of which the real parts of the
/// eigenvalues are minus the exponentials, and `a_imag`, `(d_model, d_state)`; `b` `(d_model, 2 d_state)`; `c`
/// `(directions, d_model, 2 d_state)`; `d` `(d_model)`; of S4 `p` `(d_model, rank, 2 d_state)` too; `out_proj`. Systems
/// of low rank run on processors only: on another device there is an error.
#[derive(Debug, Clone)]
pub struct S4Layer {
    config: S4Config,
    log_delta: Parameter,
    log_a_real: Parameter,
    a_imag: Parameter,
    b: Parameter,
    c: Parameter,
    d: Parameter,
    p: Option<Parameter>,
    out_proj: Linear,
    parameters: ParameterList,
}

/// The parameters of the systems as operators take them.
struct Tensors {
    log_delta: Tensor,
    a: Tensor,
    b: Tensor,
    d: Tensor,
    p: Option<Tensor>,
}

impl S4Layer {
    /// A layer with the parameters of `vb`. Those that a [`VarMap`](candle_nn::VarMap) does not have yet are drawn as
    /// in the papers, from the configuration's seed and the parameters' names.
    ///
    /// # Errors
    /// A size that makes no layer; a parameter that is missing or of another shape, by name.
    pub fn new(config: &S4Config, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        check_model_dtype(vb.dtype())?;
        Self::build(config, &Parameters::new(vb, config.seed))
    }

    pub(super) fn build(config: &S4Config, parameters: &Parameters) -> Result<Self> {
        let (count, [width, pairs]) = (parameters.count(), [config.d_model, config.d_state]);
        let directions = if config.bidirectional { 2 } else { 1 };
        let system = match config.system {
            S4System::Diagonal { initial, .. } => System::Diagonal(initial),
            S4System::LowRank { measure, .. } => System::LowRank(measure),
        };
        let rows = |shape: &[usize], name, row| parameters.get_f32(shape, name, Initial::Rows(row));
        let step_sizes = Initial::LogStepSizes { min: config.dt_min, max: config.dt_max };
        let p = match config.system {
            S4System::LowRank { measure, .. } => {
                let rank = measure.low_rank(2)?.p().len();
                Some(rows(&[width, rank, 2 * pairs], "p", SystemRow::Correction(measure))?)
            }
            S4System::Diagonal { .. } => None,
        };
        let layer = Self {
            log_delta: parameters.get_f32(&[width], "log_delta", step_sizes)?,
            log_a_real: rows(&[width, pairs], "log_a_real", SystemRow::LogDecay(system))?,
            a_imag: rows(&[width, pairs], "a_imag", SystemRow::Frequency(system))?,
            b: rows(&[width, 2 * pairs], "b", SystemRow::Input(system))?,
            // A complex number of variance 1.
            c: parameters.get_f32(&[directions, width, 2 * pairs], "c", Initial::Normal(0.5f64.sqrt()))?,
            d: parameters.get_f32(&[width], "d", Initial::Normal(1.0))?,
            p,
            out_proj: Linear::new(&parameters.pp("out_proj"), [width, 2 * width], true, 1.0)?,
            config: config.clone(),
            parameters: ParameterList::default(),
        };
        Ok(Self { parameters: parameters.taken_since(count), ..layer })
    }

    /// What it was made from.
    pub fn config(&self) -> &S4Config {
        &self.config
    }

    /// Calls `f` with the name of each parameter and the tensor that the layer was built on.
    pub fn visit(&self, f: &mut dyn FnMut(&str, &Tensor)) {
        self.parameters.visit(f);
    }

    fn tensors(&self) -> Result<Tensors> {
        let re = self.log_a_real.tensor()?.exp()?.neg()?;
        let shape = (self.config.d_model, 2 * self.config.d_state);
        Ok(Tensors {
            log_delta: self.log_delta.tensor()?,
            a: Tensor::stack(&[re, self.a_imag.tensor()?], 2)?.reshape(shape)?,
            b: self.b.tensor()?,
            d: self.d.tensor()?,
            p: self.p.as_ref().map(Parameter::tensor).transpose()?,
        })
    }

    /// What reads the states in a direction.
    fn c(&self, direction: usize) -> Result<Tensor> {
        self.c.tensor()?.get(direction)
    }

    /// Runs the layer over whole sequences, `(batch, length, d_model)` of the model's type. Differentiable.
    ///
    /// # Errors
    /// Another width; with low rank, more steps than the kernels have, or another device than the processor.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.check(x, 3, "(batch, length, d_model)")?;
        let tensors = self.tensors()?;
        let mut y = self.direction(x, &tensors, 0)?;
        if self.config.bidirectional {
            // D is added once.
            let d = tensors.d.zeros_like()?;
            y = (y + self.direction(x, &Tensors { d, ..tensors }, 1)?)?;
        }
        self.finish(&y)
    }

    /// Runs the layer over a part of sequences, which begins where the part before it ended: from `state`, `(batch, d_model, 2 *
    /// d_state)` of `f32`, or from zero, and gives the state after it too. Differentiable, by the state as well: a sequence in
    /// parts has the gradients of the whole.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); two directions, of which the second begins at the end; a state of another shape; with low
    /// rank, a system that has no recurrence.
    pub fn forward_with_state(&self, x: &Tensor, state: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        self.check(x, 3, "(batch, length, d_model)")?;
        if self.config.bidirectional {
            return Err(argument("bidirectional", "one direction, for parts of sequences", "two"));
        }
        let tensors = self.tensors()?;
        let Tensors { log_delta, a, b, d, p } = &tensors;
        let c = self.c(0)?;
        let (y, after) = match (self.config.system, p) {
            (S4System::LowRank { kernel_length, .. }, Some(p)) => {
                let kernel = S4Kernel { log_delta, a, p, b, c: &c };
                let mut y = self.direction(x, &tensors, 0)?;
                if let Some(state) = state {
                    let response = kernel.state_response(state, kernel_length, x.dim(1)?)?;
                    y = (y + response.to_dtype(x.dtype())?)?;
                }
                (y, kernel.final_state(&x.to_dtype(DType::F32)?, state)?)
            }
            (system, _) => {
                let options = Options { rule: rule(system), reverse: false };
                let operator = S4d { d: Some(d), options, initial_state: state, ..S4d::new(x, log_delta, a, b, &c) };
                operator.forward_with_state()?
            }
        };
        Ok((self.finish(&y)?, after))
    }

    fn direction(&self, u: &Tensor, tensors: &Tensors, direction: usize) -> Result<Tensor> {
        let Tensors { log_delta, a, b, d, p } = tensors;
        let (c, reverse) = (self.c(direction)?, direction == 1);
        match (self.config.system, p) {
            (S4System::LowRank { kernel_length, .. }, Some(p)) => {
                let length = u.dim(1)?;
                if length > kernel_length {
                    return Err(argument("x", format_args!("{kernel_length} steps at most, as kernels have"), length));
                }
                let kernel = S4Kernel { log_delta, a, p, b, c: &c }.forward(kernel_length)?;
                LongConv { d: Some(d), reverse, ..LongConv::new(u, &kernel) }.forward()
            }
            (system, _) => {
                let options = Options { rule: rule(system), reverse };
                S4d { d: Some(d), options, ..S4d::new(u, log_delta, a, b, &c) }.forward()
            }
        }
    }

    /// What stands after the systems.
    fn finish(&self, y: &Tensor) -> Result<Tensor> {
        let both = self.out_proj.forward(&y.gelu_erf()?)?;
        let width = self.config.d_model;
        both.narrow(D::Minus1, 0, width)? * sigmoid(&both.narrow(D::Minus1, width, width)?)?
    }

    /// What a step needs of the parameters: made once, for as long as they do not change.
    pub(super) fn decoder(&self) -> Result<Decoder> {
        if self.config.bidirectional {
            return Err(argument("bidirectional", "one direction, for steps", "two"));
        }
        let Tensors { log_delta, a, b, d, p } = self.tensors()?;
        let (c, d) = (self.c(0)?, d.detach());
        Ok(match (self.config.system, p) {
            (S4System::LowRank { kernel_length, .. }, Some(p)) => {
                let kernel = S4Kernel { log_delta: &log_delta, a: &a, p: &p, b: &b, c: &c };
                Decoder::LowRank { recurrence: kernel.recurrence(kernel_length)?, d }
            }
            (system, _) => {
                let recurrence = s4d_recurrence(&log_delta, &a, &b, rule(system))?;
                Decoder::Diagonal { recurrence, c: c.detach(), d }
            }
        })
    }

    /// One step of each row of `x`, `(batch, d_model)`, which uses its slot of the pool `state`, `(slots, d_model, 2 d_state)` of
    /// `f32`. Both have been checked.
    pub(super) fn step(&self, x: &Tensor, decoder: &Decoder, state: &Tensor, slots: Slots) -> Result<Tensor> {
        self.check(x, 2, "(batch, d_model)")?;
        let y = match decoder {
            Decoder::Diagonal { recurrence, c, d } => {
                let u = x.detach().unsqueeze(1)?;
                S4dUpdate { d: Some(d), slots, ..S4dUpdate::new(&u, recurrence, c) }.update(state)?.squeeze(1)?
            }
            Decoder::LowRank { recurrence, d } => {
                let width = self.config.d_model;
                let u = x.detach().to_dtype(DType::F32)?;
                let all = u.flatten_all()?.to_vec1::<f32>()?;
                let rows = slots.of_rows(x.dim(0)?, "state", state)?;
                let used: Vec<usize> = (0..rows.len()).filter(|&row| rows[row].is_some()).collect();
                let places: Vec<i32> = rows.iter().flatten().map(|&slot| slot as i32).collect();
                let inputs: Vec<f32> = used.iter().flat_map(|row| &all[row * width..][..width]).copied().collect();
                let mut numbers = take(state, &places)?.flatten_all()?.to_vec1::<f32>()?;
                let outputs = recurrence.step(&inputs, &mut numbers)?;
                let shape = (places.len(), width, 2 * self.config.d_state);
                put(state, &Tensor::from_vec(numbers, shape, state.device())?, &places)?;
                let mut y = vec![0.0; all.len()];
                for (row, outputs) in used.into_iter().zip(outputs.chunks_exact(width)) {
                    y[row * width..][..width].copy_from_slice(outputs);
                }
                let y = Tensor::from_vec(y, u.shape(), u.device())?;
                (y + u.broadcast_mul(d)?)?.to_dtype(x.dtype())?
            }
        };
        self.finish(&y)
    }

    fn check(&self, x: &Tensor, rank: usize, names: &str) -> Result<()> {
        if x.rank() != rank || x.dim(D::Minus1)? != self.config.d_model {
            let expected = format_args!("shape {names} with d_model = {}", self.config.d_model).to_string();
            return Err(argument("x", expected, format_args!("{:?}", x.dims())));
        }
        Ok(())
    }
}

/// The rule by which a system is discretized.
fn rule(system: S4System) -> crate::lti::Rule {
    match system {
        S4System::Diagonal { rule, .. } => rule,
        S4System::LowRank { .. } => crate::lti::Rule::Bilinear,
    }
}

/// What a step of a layer needs of its parameters.
#[derive(Debug, Clone)]
pub(super) enum Decoder {
    Diagonal { recurrence: Tensor, c: Tensor, d: Tensor },
    LowRank { recurrence: Recurrence, d: Tensor },
}
