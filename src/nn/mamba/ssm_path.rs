//! The path through the state space model (SSM), between the projections of a block: the convolution, and the scan with
//! what it reads. A block has one for each direction.
//!
//! All of it is outside of candle's graph: a block is one node there, whose backward pass is written by hand.

use candle_core::{DType, Result, Tensor};

use super::joined::{JoinedPath, full};
use super::parts::rows;
use super::state::{States, TokenStates};
use super::{MambaConfig, MambaState, Norms};
use crate::candle::{CausalConv, ConvUpdate, RmsNorm, RmsNormGradients, Scan, Slots, StateUpdate};
use crate::nn::layers::{Converted, Gradients, Initial, Linear, Parameter, Parameters, rms_norm};
use crate::scan::CheckpointSteps;
use crate::{conv, norm, scan, state_update};

/// The convolution and the scan of one direction, with their parameters.
#[derive(Debug, Clone)]
pub(super) struct SsmPath {
    reverse: bool,
    checkpoint_steps: CheckpointSteps,
    /// Where to find `(dt_rank, d_state)` among the columns of `x_proj`.
    sizes: [usize; 2],
    /// `(d_inner, 1, d_conv)`, `f32`, as checkpoints have it.
    conv_weight: Parameter,
    /// `(d_inner)`, `f32`.
    conv_bias: Option<Parameter>,
    /// A, `(d_inner, d_state)`, `f32`, from `A_log`.
    a: Parameter,
    /// `(d_inner)`, `f32`.
    d: Parameter,
    /// `(d_inner)`, `f32`.
    delta_bias: Parameter,
    dynamics: Dynamics,
}

/// Where the step size, B and C come from.
#[derive(Debug, Clone)]
enum Dynamics {
    /// From the input.
    Selective(Box<Selective>),
    /// B and C are parameters, `(d_inner, d_state)`, `f32`, and the step size is that of the bias alone.
    Invariant { b: Parameter, c: Parameter },
}

/// The projections of what is selective.
#[derive(Debug, Clone)]
struct Selective {
    x_proj: Linear,
    dt_proj: Linear,
    norms: Option<ProjectionNorms>,
}

/// The norms of the low-rank step size, B and C.
#[derive(Debug, Clone)]
struct ProjectionNorms {
    weights: Option<[Parameter; 3]>,
    eps: f64,
}

/// What the convolution and the scan compute with.
struct Values {
    /// `(d_inner, d_conv)`.
    conv_weight: Tensor,
    conv_bias: Option<Tensor>,
    a: Tensor,
    d: Tensor,
    delta_bias: Tensor,
}

/// What the scan reads beside its input and parameters.
struct Projected {
    delta: Tensor,
    b: Tensor,
    c: Tensor,
}

/// The step size before its projection, B and C.
struct Columns {
    /// What `x_proj` gives, `(rows, dt_rank + 2 d_state)`.
    projected: Tensor,
    /// Its three ranges of columns after their norms, if there are norms.
    normed: Option<[Tensor; 3]>,
}

/// What a forward pass leaves for its backward pass. What is none there is computed again.
pub(super) struct Kept {
    /// After the convolution, `(batch, length, d_inner)`.
    u: Option<Tensor>,
    columns: Option<Columns>,
    delta: Option<Tensor>,
    checkpoints: Tensor,
    /// The states from which it began; zeros if absent.
    initial: Option<States>,
}

impl SsmPath {
    /// `reverse` also appends to the names what Vision Mamba does: `conv1d_b`, `A_b_log`, and so on.
    pub fn new(config: &MambaConfig, parameters: &Parameters, reverse: bool) -> Result<Self> {
        let &MambaConfig { d_inner, d_state, d_conv, dt_rank, checkpoint_steps, .. } = config;
        let (suffix, a_name) = if reverse { ("_b", "A_b_log") } else { ("", "A_log") };
        let within = |name: &str| parameters.pp(format!("{name}{suffix}"));
        let (conv, taps) = (within("conv1d"), Initial::linear(d_conv, 1.0));
        let a = parameters.get_a(&[d_inner, d_state], a_name)?;
        let d = parameters.get_f32(&[d_inner], &format!("D{suffix}"), Initial::Constant(1.0))?;
        let conv_weight = conv.get_f32(&[d_inner, 1, d_conv], "weight", taps)?;
        let conv_bias = config.conv_bias.then(|| conv.get_f32(&[d_inner], "bias", taps)).transpose()?;
        let steps = Initial::StepSizes { min: config.dt_min, max: config.dt_max, floor: config.dt_init_floor };
        let (dynamics, delta_bias) = if config.selective {
            let x_proj = Linear::new(&within("x_proj"), [d_inner, dt_rank + 2 * d_state], false, 1.0)?;
            let dt = within("dt_proj");
            let weight = Initial::Uniform(config.dt_scale / (dt_rank as f64).sqrt());
            let dt_proj = Linear::without_bias(dt.get(&[d_inner, dt_rank], "weight", weight)?);
            let delta_bias = dt.get_f32(&[d_inner], "bias", steps)?;
            let norms = ProjectionNorms::new(config, within)?;
            (Dynamics::Selective(Box::new(Selective { x_proj, dt_proj, norms })), delta_bias)
        } else {
            let parameter =
                |name: &str, initial| parameters.get_f32(&[d_inner, d_state], &format!("{name}{suffix}"), initial);
            let b = parameter("B", Initial::Constant(1.0))?;
            let c = parameter("C", Initial::Normal(1.0))?;
            (Dynamics::Invariant { b, c }, parameters.get_f32(&[d_inner], &format!("dt_bias{suffix}"), steps)?)
        };
        let sizes = [dt_rank, d_state];
        Ok(Self { reverse, checkpoint_steps, sizes, conv_weight, conv_bias, a, d, delta_bias, dynamics })
    }

    /// The same path outside of candle's graph.
    pub fn leave_graph(&self, converted: &Converted) -> Result<Self> {
        let dynamics = match &self.dynamics {
            Dynamics::Selective(selective) => {
                let Selective { x_proj, dt_proj, norms } = &**selective;
                let norms = norms.as_ref().map(|norms| norms.leave_graph(converted)).transpose()?;
                let (x_proj, dt_proj) = (x_proj.leave_graph(converted)?, dt_proj.leave_graph(converted)?);
                Dynamics::Selective(Box::new(Selective { x_proj, dt_proj, norms }))
            }
            Dynamics::Invariant { b, c } => {
                Dynamics::Invariant { b: b.leave_graph(converted)?, c: c.leave_graph(converted)? }
            }
        };
        Ok(Self {
            conv_weight: self.conv_weight.leave_graph(converted)?,
            conv_bias: self.conv_bias.as_ref().map(|bias| bias.leave_graph(converted)).transpose()?,
            a: self.a.leave_graph(converted)?,
            d: self.d.leave_graph(converted)?,
            delta_bias: self.delta_bias.leave_graph(converted)?,
            dynamics,
            ..*self
        })
    }

    /// Runs whole sequences from zero states. `x` and `z` are `(batch, length, d_inner)`.
    pub fn forward(&self, x: &Tensor, z: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<Tensor> {
        let values = self.values()?;
        let u = CausalConv { cu_seqlens, ..self.conv(x, &values) }.forward()?;
        let projected = self.project(&u)?;
        Scan { cu_seqlens, ..self.scan(&u, z, &projected, &values) }.forward()
    }

    /// [`forward`](Self::forward), and what [`backward`](Self::backward) needs: with `recompute` less than else. From given states on
    /// it also gives those afterwards.
    pub fn forward_kept(
        &self,
        x: &Tensor,
        z: &Tensor,
        cu_seqlens: Option<&[usize]>,
        recompute: bool,
        initial: Option<States>,
    ) -> Result<(Tensor, Kept, Option<States>)> {
        let values = self.values()?;
        let conv = CausalConv { cu_seqlens, ..self.conv(x, &values) };
        let (u, of_conv) = match &initial {
            Some(states) => {
                let (u, state) = CausalConv { initial_state: Some(&states.conv), ..conv }.forward_with_state()?;
                (u, Some(state))
            }
            None => (conv.forward()?, None),
        };
        let columns = self.columns(&u)?;
        let projected = self.projected(&u, columns.as_ref(), None)?;
        let initial_state = initial.as_ref().map(|states| &states.ssm);
        let scan = Scan { cu_seqlens, initial_state, ..self.scan(&u, z, &projected, &values) };
        let (y, checkpoints, after) = match of_conv {
            Some(conv) => {
                let (y, checkpoints, ssm) = scan.forward_with_checkpoints_and_state()?;
                (y, checkpoints, Some(States { conv, ssm }))
            }
            None => {
                let (y, checkpoints) = scan.forward_with_checkpoints()?;
                (y, checkpoints, None)
            }
        };
        let Projected { delta, .. } = projected;
        let (u, delta) = ((!recompute).then_some(u), (!recompute).then_some(delta));
        Ok((y, Kept { u, columns, delta, checkpoints, initial }, after))
    }

    /// The gradients of `x` and `z` from that of the output, and those of the parameters.
    pub fn backward(
        &self,
        kept: &Kept,
        [x, z]: [&Tensor; 2],
        cu_seqlens: Option<&[usize]>,
        d_y: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<[Tensor; 2]> {
        let values = self.values()?;
        let initial = kept.initial.as_ref();
        let conv =
            CausalConv { cu_seqlens, initial_state: initial.map(|states| &states.conv), ..self.conv(x, &values) };
        let u = match &kept.u {
            Some(u) => u.clone(),
            None => conv.forward()?,
        };
        let columns = kept.columns.as_ref();
        let projected = self.projected(&u, columns, kept.delta.clone())?;
        let initial_state = initial.map(|states| &states.ssm);
        let scan = Scan { cu_seqlens, initial_state, ..self.scan(&u, z, &projected, &values) };
        let of_scan = scan.backward(&kept.checkpoints, d_y, None)?;
        drop(projected);
        gradients.add(&self.a, |_| Ok(of_scan.a))?;
        for (parameter, gradient) in [(&self.d, of_scan.d), (&self.delta_bias, of_scan.delta_bias)] {
            gradients.add(parameter, |_| given(gradient))?;
        }
        let d_u = of_scan.u;
        let d_projected =
            Projected { delta: of_scan.delta, b: of_scan.b.either().clone(), c: of_scan.c.either().clone() };
        self.project_backward(&u, columns, &d_projected, &d_u, gradients)?;
        let of_conv = conv.backward(&d_u, None)?;
        gradients.add(&self.conv_weight, |_| of_conv.weight.reshape(self.conv_weight.stored().shape()))?;
        if let Some(bias) = &self.conv_bias {
            gradients.add(bias, |_| given(of_conv.bias))?;
        }
        Ok([of_conv.x, given(of_scan.z)?])
    }

    /// Runs sequences on from given states, and also gives those after them.
    pub fn extend(
        &self,
        x: &Tensor,
        z: &Tensor,
        cu_seqlens: Option<&[usize]>,
        states: &States,
    ) -> Result<(Tensor, States)> {
        let values = self.values()?;
        let convolution = CausalConv { cu_seqlens, initial_state: Some(&states.conv), ..self.conv(x, &values) };
        let (u, conv) = convolution.forward_with_state()?;
        let projected = self.project(&u)?;
        let scan = Scan { cu_seqlens, initial_state: Some(&states.ssm), ..self.scan(&u, z, &projected, &values) };
        let (y, ssm) = scan.forward_with_state()?;
        Ok((y, States { conv, ssm }))
    }

    /// Carries states through a few tokens, in place; if they are `kept`, also gives the states after each token.
    pub fn step(
        &self,
        x: &Tensor,
        z: &Tensor,
        state: &MambaState,
        slots: Slots,
        kept: bool,
    ) -> Result<(Tensor, Option<TokenStates>)> {
        let values = self.values()?;
        let weight = &values.conv_weight;
        let conv = ConvUpdate { bias: values.conv_bias.as_ref(), slots, silu: true, ..ConvUpdate::new(x, weight) };
        let (u, of_conv) = match kept {
            true => conv.update_with_token_states(&state.conv).map(|(u, states)| (u, Some(states)))?,
            false => (conv.update(&state.conv)?, None),
        };
        let Projected { delta, b, c } = self.project(&u)?;
        let update = StateUpdate {
            z: Some(z),
            d: Some(&values.d),
            delta_bias: Some(&values.delta_bias),
            slots,
            options: state_update::Options { delta_softplus: true, ..Default::default() },
            ..StateUpdate::new(&u, &delta, &values.a, &b, &c)
        };
        let Some(conv) = of_conv else { return Ok((update.update(&state.ssm)?, None)) };
        let (y, ssm) = update.update_with_token_states(&state.ssm)?;
        Ok((y, Some(TokenStates { conv, ssm })))
    }

    /// The path as a joined step takes it; none where nothing is projected.
    pub(super) fn joined(&self) -> Result<Option<JoinedPath>> {
        let Dynamics::Selective(selective) = &self.dynamics else { return Ok(None) };
        let Selective { x_proj, dt_proj, norms } = &**selective;
        let weights = |[dt, b, c]: &[Parameter; 3]| -> Result<_> {
            Ok([full(dt.tensor()?)?, full(b.tensor()?)?, full(c.tensor()?)?])
        };
        let norms = match norms {
            Some(ProjectionNorms { weights: all, eps }) => Some((all.as_ref().map(weights).transpose()?, *eps)),
            None => None,
        };
        let values = self.values()?;
        Ok(Some(JoinedPath {
            conv: (values.conv_weight.contiguous()?, values.conv_bias),
            x_proj: x_proj.weight().tensor()?,
            dt_proj: dt_proj.weight().tensor()?,
            norms,
            a: values.a,
            d: values.d,
            delta_bias: values.delta_bias,
        }))
    }

    /// What the convolution and the scan compute with.
    fn values(&self) -> Result<Values> {
        Ok(Values {
            conv_weight: self.conv_weight.tensor()?.squeeze(1)?,
            conv_bias: self.conv_bias.as_ref().map(Parameter::tensor).transpose()?,
            a: self.a.tensor()?,
            d: self.d.tensor()?,
            delta_bias: self.delta_bias.tensor()?,
        })
    }

    fn conv<'a>(&'a self, x: &'a Tensor, values: &'a Values) -> CausalConv<'a> {
        let options = conv::Options { silu: true, reverse: self.reverse };
        CausalConv { bias: values.conv_bias.as_ref(), options, ..CausalConv::new(x, &values.conv_weight) }
    }

    fn scan<'a>(&'a self, u: &'a Tensor, z: &'a Tensor, projected: &'a Projected, values: &'a Values) -> Scan<'a> {
        let Projected { delta, b, c } = projected;
        Scan {
            z: Some(z),
            d: Some(&values.d),
            delta_bias: Some(&values.delta_bias),
            options: scan::Options {
                delta_softplus: true,
                reverse: self.reverse,
                checkpoint_steps: self.checkpoint_steps,
                ..Default::default()
            },
            ..Scan::new(u, delta, &values.a, b, c)
        }
    }

    fn project(&self, u: &Tensor) -> Result<Projected> {
        self.projected(u, self.columns(u)?.as_ref(), None)
    }

    /// What `x_proj` gives; none where nothing is projected.
    fn columns(&self, u: &Tensor) -> Result<Option<Columns>> {
        let Dynamics::Selective(selective) = &self.dynamics else { return Ok(None) };
        let Selective { x_proj, norms, .. } = &**selective;
        let projected = x_proj.apply(&rows(u)?)?;
        let normed = |norms: &ProjectionNorms| {
            let [dt, b, c] = self.split(&projected, 1)?;
            Ok::<_, candle_core::Error>([norms.apply(0, &dt)?, norms.apply(1, &b)?, norms.apply(2, &c)?])
        };
        let normed = norms.as_ref().map(normed).transpose()?;
        Ok(Some(Columns { projected, normed }))
    }

    /// The columns of the step size, B and C along the last dimension, number `dim`: views, of which nothing is copied.
    fn split(&self, columns: &Tensor, dim: usize) -> Result<[Tensor; 3]> {
        let [dt_rank, d_state] = self.sizes;
        let part = |start, len| columns.narrow(dim, start, len);
        Ok([part(0, dt_rank)?, part(dt_rank, d_state)?, part(dt_rank + d_state, d_state)?])
    }

    /// The step size before its projection, `(rows, dt_rank)`.
    fn low_rank(&self, columns: &Columns) -> Result<Tensor> {
        match &columns.normed {
            Some([dt, ..]) => Ok(dt.clone()),
            None => columns.projected.narrow(1, 0, self.sizes[0]),
        }
    }

    /// What the scan reads, from the columns of `x_proj` where there are some, and from `delta` if it is there already.
    fn projected(&self, u: &Tensor, columns: Option<&Columns>, delta: Option<Tensor>) -> Result<Projected> {
        let (batch, length, d_inner) = u.dims3()?;
        match &self.dynamics {
            Dynamics::Selective(selective) => {
                let dt_proj = &selective.dt_proj;
                let columns = present(columns)?;
                let delta = match delta {
                    Some(delta) => delta,
                    None => dt_proj.apply(&self.low_rank(columns)?)?.reshape((batch, length, d_inner))?,
                };
                let by_step = |x: &Tensor| x.reshape((batch, length, x.dim(1)?));
                let [_, b, c] = match &columns.normed {
                    Some([dt, b, c]) => [dt.clone(), by_step(b)?, by_step(c)?],
                    None => self.split(&by_step(&columns.projected)?, 2)?,
                };
                Ok(Projected { delta, b, c })
            }
            Dynamics::Invariant { b, c } => {
                let zero = Tensor::zeros((1, 1, d_inner), u.dtype(), u.device())?;
                Ok(Projected { delta: zero.broadcast_as(u.shape())?, b: b.tensor()?, c: c.tensor()? })
            }
        }
    }

    /// Goes back from the gradients of what the scan reads to those of the parameters that it comes from, and adds what
    /// comes to `u` through it to `d_u`.
    fn project_backward(
        &self,
        u: &Tensor,
        columns: Option<&Columns>,
        d_projected: &Projected,
        d_u: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let Projected { delta, b, c } = d_projected;
        let Selective { x_proj, dt_proj, norms } = match &self.dynamics {
            Dynamics::Selective(selective) => &**selective,
            Dynamics::Invariant { b: b_parameter, c: c_parameter } => {
                gradients.add(b_parameter, |_| Ok(b.clone()))?;
                return gradients.add(c_parameter, |_| Ok(c.clone()));
            }
        };
        let columns = present(columns)?;
        let (u, d_delta) = (rows(u)?, rows(delta)?);
        dt_proj.parameter_gradients(&self.low_rank(columns)?, &d_delta, gradients)?;
        let projected = &columns.projected;
        // SAFETY: all three ranges of its columns are overwritten.
        let d_columns = unsafe { Tensor::empty(projected.shape(), projected.dtype(), projected.device())? };
        let [dt_rank, d_state] = self.sizes;
        match norms {
            None => {
                dt_proj.input_gradient_into(&d_columns.narrow(1, 0, dt_rank)?, &d_delta, false)?;
                d_columns.slice_set(&rows(b)?, 1, dt_rank)?;
                d_columns.slice_set(&rows(c)?, 1, dt_rank + d_state)?;
            }
            Some(norms) => {
                let d_normed = [dt_proj.input_gradient(&d_delta)?, rows(b)?, rows(c)?];
                let mut start = 0;
                for (i, (before, d_normed)) in self.split(projected, 1)?.iter().zip(&d_normed).enumerate() {
                    d_columns.slice_set(&norms.backward(i, before, d_normed, gradients)?, 1, start)?;
                    start += before.dim(1)?;
                }
            }
        }
        x_proj.parameter_gradients(&u, &d_columns, gradients)?;
        x_proj.input_gradient_into(&rows(d_u)?, &d_columns, true)
    }
}

/// What a selective path has.
fn present(columns: Option<&Columns>) -> Result<&Columns> {
    columns.ok_or_else(|| candle_core::Error::Msg("a selective path without the columns of x_proj".into()))
}

/// The gradient of what the operator was given.
fn given(gradient: Option<Tensor>) -> Result<Tensor> {
    gradient.ok_or_else(|| candle_core::Error::Msg("an operator has left a gradient out".into()))
}

impl ProjectionNorms {
    /// `within` gives the parameters of a norm by its name.
    fn new<'a>(config: &MambaConfig, within: impl Fn(&str) -> Parameters<'a>) -> Result<Option<Self>> {
        let (eps, weighted) = match config.norms {
            Norms::None => return Ok(None),
            Norms::Unweighted { eps } => (eps, false),
            Norms::Weighted { eps } => (eps, true),
        };
        let weight = |name, size| within(name).get(&[size], "weight", Initial::Constant(1.0));
        let weights = || -> Result<_> {
            Ok([
                weight("dt_layernorm", config.dt_rank)?,
                weight("b_layernorm", config.d_state)?,
                weight("c_layernorm", config.d_state)?,
            ])
        };
        Ok(Some(Self { weights: weighted.then(weights).transpose()?, eps }))
    }

    fn leave_graph(&self, converted: &Converted) -> Result<Self> {
        let detach = |[dt, b, c]: &[Parameter; 3]| {
            Ok::<_, candle_core::Error>([
                dt.leave_graph(converted)?,
                b.leave_graph(converted)?,
                c.leave_graph(converted)?,
            ])
        };
        Ok(Self { weights: self.weights.as_ref().map(detach).transpose()?, eps: self.eps })
    }

    /// The weight of norm `i`: the step size's, B's or C's.
    fn weight(&self, i: usize) -> Result<Option<Tensor>> {
        self.weights.as_ref().map(|weights| weights[i].tensor()).transpose()
    }

    fn apply(&self, i: usize, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, self.weight(i)?.as_ref(), self.eps, x.dtype())
    }

    /// The gradient of `x`, whose norm has the gradient `d_out`, and that of the weight.
    fn backward(&self, i: usize, x: &Tensor, d_out: &Tensor, gradients: &mut Gradients) -> Result<Tensor> {
        let weight = self.weight(i)?.map(|weight| weight.to_dtype(DType::F32)).transpose()?;
        let options = norm::Options { eps: self.eps, ..Default::default() };
        let norm = RmsNorm { weight: weight.as_ref(), options, ..RmsNorm::new(x) };
        let RmsNormGradients { sum: d_x, weight: d_weight, .. } = norm.backward(d_out, None)?;
        if let (Some(weights), Some(d_weight)) = (&self.weights, d_weight) {
            gradients.add(&weights[i], |_| Ok(d_weight))?;
        }
        Ok(d_x)
    }
}
