//! The path through the state space model (SSM), between the projections of a block: the convolution, and the scan with
//! what it reads. A block has one for each direction.

use candle_core::{Result, Tensor};

use super::state::States;
use super::{MambaConfig, MambaState, Norms};
use crate::candle::{CausalConv, ConvUpdate, Scan, Slots, StateUpdate};
use crate::nn::layers::{Initial, Linear, Parameter, Parameters, rms_norm};
use crate::{conv, scan, state_update};

/// The convolution and the scan of one direction, with their parameters.
#[derive(Debug, Clone)]
pub(super) struct SsmPath {
    reverse: bool,
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
    Selective { x_proj: Linear, dt_proj: Linear, norms: Option<ProjectionNorms> },
    /// B and C are parameters, `(d_inner, d_state)`, `f32`, and the step size is that of the bias alone.
    Invariant { b: Parameter, c: Parameter },
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

impl SsmPath {
    /// `reverse` also appends to the names what Vision Mamba does: `conv1d_b`, `A_b_log`, and so on.
    pub fn new(config: &MambaConfig, parameters: &Parameters, reverse: bool) -> Result<Self> {
        let &MambaConfig { d_inner, d_state, d_conv, dt_rank, .. } = config;
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
            (Dynamics::Selective { x_proj, dt_proj, norms }, delta_bias)
        } else {
            let parameter =
                |name: &str, initial| parameters.get_f32(&[d_inner, d_state], &format!("{name}{suffix}"), initial);
            let b = parameter("B", Initial::Constant(1.0))?;
            let c = parameter("C", Initial::Normal(1.0))?;
            (Dynamics::Invariant { b, c }, parameters.get_f32(&[d_inner], &format!("dt_bias{suffix}"), steps)?)
        };
        Ok(Self { reverse, sizes: [dt_rank, d_state], conv_weight, conv_bias, a, d, delta_bias, dynamics })
    }

    /// Runs whole sequences from zero states.
    pub fn forward(&self, x: &Tensor, z: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<Tensor> {
        let values = self.values()?;
        let u = CausalConv { cu_seqlens, ..self.conv(x, &values) }.forward()?;
        let projected = self.project(&u)?;
        Scan { cu_seqlens, ..self.scan(&u, z, &projected, &values) }.forward()
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

    /// Carries states through a few tokens, in place.
    pub fn step(&self, x: &Tensor, z: &Tensor, state: &MambaState, slots: Slots) -> Result<Tensor> {
        let values = self.values()?;
        let weight = &values.conv_weight;
        let update = ConvUpdate { bias: values.conv_bias.as_ref(), slots, silu: true, ..ConvUpdate::new(x, weight) };
        let u = update.update(&state.conv)?;
        let Projected { delta, b, c } = self.project(&u)?;
        StateUpdate {
            z: Some(z),
            d: Some(&values.d),
            delta_bias: Some(&values.delta_bias),
            slots,
            options: state_update::Options { delta_softplus: true, ..Default::default() },
            ..StateUpdate::new(&u, &delta, &values.a, &b, &c)
        }
        .update(&state.ssm)
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
            options: scan::Options { delta_softplus: true, reverse: self.reverse, ..Default::default() },
            ..Scan::new(u, delta, &values.a, b, c)
        }
    }

    fn project(&self, u: &Tensor) -> Result<Projected> {
        let (batch, length, d_inner) = u.dims3()?;
        match &self.dynamics {
            Dynamics::Selective { x_proj, dt_proj, norms } => {
                let [dt_rank, d_state] = self.sizes;
                let columns = x_proj.forward(&u.reshape((batch * length, d_inner))?)?;
                // Columns of a matrix are a matrix to `dt_proj`, and views with strides to the scan: nothing is copied.
                let activations = columns.reshape((batch, length, dt_rank + 2 * d_state))?;
                let mut dt = columns.narrow(1, 0, dt_rank)?;
                let mut b = activations.narrow(2, dt_rank, d_state)?;
                let mut c = activations.narrow(2, dt_rank + d_state, d_state)?;
                if let Some(norms) = norms {
                    for (i, x) in [&mut dt, &mut b, &mut c].into_iter().enumerate() {
                        let weight = norms.weights.as_ref().map(|weights| weights[i].tensor()).transpose()?;
                        *x = rms_norm(x, weight.as_ref(), norms.eps, x.dtype())?;
                    }
                }
                Ok(Projected { delta: dt_proj.forward(&dt)?.reshape((batch, length, d_inner))?, b, c })
            }
            Dynamics::Invariant { b, c } => {
                let zero = Tensor::zeros((1, 1, d_inner), u.dtype(), u.device())?;
                Ok(Projected { delta: zero.broadcast_as(u.shape())?, b: b.tensor()?, c: c.tensor()? })
            }
        }
    }
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
}
