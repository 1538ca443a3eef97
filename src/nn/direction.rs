//! What a block does between its projections: the convolution, and the scan with what it reads.

use candle_core::{Result, Tensor};

use super::cache::States;
use super::layers::Linear;
use super::norm::rms_norm;
use super::parameters::{Change, Initial, Parameter, Parameters};
use super::{LayerCache, MambaConfig, Norms};
use crate::candle::{CausalConv, ConvUpdate, Scan, StateUpdate};
use crate::{conv, scan, state_update};

/// The convolution and the scan of one direction, with their parameters.
#[derive(Debug, Clone)]
pub(super) struct Direction {
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
    dt_bias: Parameter,
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

const NORM_NAMES: [&str; 3] = ["dt_layernorm", "b_layernorm", "c_layernorm"];

/// What the convolution and the scan compute with.
struct Values {
    /// `(d_inner, d_conv)`.
    conv_weight: Tensor,
    conv_bias: Option<Tensor>,
    a: Tensor,
    d: Tensor,
    dt_bias: Tensor,
}

/// What the scan reads beside its input and parameters.
struct Projected {
    delta: Tensor,
    b: Tensor,
    c: Tensor,
}

impl Direction {
    /// `reverse` also appends to the names what Vision Mamba does: `conv1d_b`, `A_b_log`, and so on.
    pub fn new(config: &MambaConfig, parameters: &Parameters, reverse: bool) -> Result<Self> {
        let &MambaConfig { d_inner, d_state, d_conv, dt_rank, .. } = config;
        let (suffix, a_name) = if reverse { ("_b", "A_b_log") } else { ("", "A_log") };
        let within = |name: &str| parameters.pp(format!("{name}{suffix}"));
        let (conv, taps) = (within("conv1d"), Initial::linear(d_conv, 1.0));
        let steps = Initial::StepSizes { min: config.dt_min, max: config.dt_max, floor: config.dt_init_floor };
        let a = parameters.get_a(&[d_inner, d_state], a_name)?;
        let (dynamics, dt_bias) = if config.selective {
            let x_proj = Linear::new(&within("x_proj"), [d_inner, dt_rank + 2 * d_state], false, 1.0)?;
            let dt = within("dt_proj");
            let weight = Initial::Uniform(config.dt_scale / (dt_rank as f64).sqrt());
            let dt_proj = Linear::without_bias(dt.get(&[d_inner, dt_rank], "weight", weight)?);
            let norms = match config.norms {
                Norms::None => None,
                Norms::Unweighted { eps } => Some(ProjectionNorms { weights: None, eps }),
                Norms::Weighted { eps } => {
                    let weight = |name, size| within(name).get(&[size], "weight", Initial::Constant(1.0));
                    let [dt, b, c] = NORM_NAMES;
                    let weights = [weight(dt, dt_rank)?, weight(b, d_state)?, weight(c, d_state)?];
                    Some(ProjectionNorms { weights: Some(weights), eps })
                }
            };
            (Dynamics::Selective { x_proj, dt_proj, norms }, dt.get_f32(&[d_inner], "bias", steps)?)
        } else {
            let parameter =
                |name: &str, initial| parameters.get_f32(&[d_inner, d_state], &format!("{name}{suffix}"), initial);
            let dynamics = Dynamics::Invariant {
                b: parameter("B", Initial::Constant(1.0))?,
                c: parameter("C", Initial::Normal(1.0))?,
            };
            (dynamics, parameters.get_f32(&[d_inner], &format!("dt_bias{suffix}"), steps)?)
        };
        Ok(Self {
            reverse,
            sizes: [dt_rank, d_state],
            conv_weight: conv.get_f32(&[d_inner, 1, d_conv], "weight", taps)?,
            conv_bias: config.conv_bias.then(|| conv.get_f32(&[d_inner], "bias", taps)).transpose()?,
            a,
            d: parameters.get_f32(&[d_inner], &format!("D{suffix}"), Initial::Constant(1.0))?,
            dt_bias,
            dynamics,
        })
    }

    /// Runs whole sequences from zero states.
    pub fn forward(&self, x: &Tensor, z: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<Tensor> {
        let values = self.values()?;
        let u = CausalConv { cu_seqlens, ..self.conv(x, &values) }.forward()?;
        let projected = self.project(&u)?;
        Scan { cu_seqlens, ..self.scan(&u, z, &projected, &values) }.forward()
    }

    /// Runs sequences on from given states, and also gives those behind them.
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

    /// Carries the states of a cache through a few tokens, in place.
    pub fn step(&self, x: &Tensor, z: &Tensor, cache: &LayerCache, slots: Option<&[i32]>) -> Result<Tensor> {
        let values = self.values()?;
        let weight = &values.conv_weight;
        let update = ConvUpdate { bias: values.conv_bias.as_ref(), slots, silu: true, ..ConvUpdate::new(x, weight) };
        let u = update.update(&cache.conv)?;
        let Projected { delta, b, c } = self.project(&u)?;
        StateUpdate {
            z: Some(z),
            d: Some(&values.d),
            dt_bias: Some(&values.dt_bias),
            slots,
            options: state_update::Options { dt_softplus: true, ..Default::default() },
            ..StateUpdate::new(&u, &delta, &values.a, &b, &c)
        }
        .update(&cache.ssm)
    }

    /// What the convolution and the scan compute with.
    fn values(&self) -> Result<Values> {
        Ok(Values {
            conv_weight: self.conv_weight.tensor()?.squeeze(1)?,
            conv_bias: self.conv_bias.as_ref().map(Parameter::tensor).transpose()?,
            a: self.a.tensor()?,
            d: self.d.tensor()?,
            dt_bias: self.dt_bias.tensor()?,
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
            delta_bias: Some(&values.dt_bias),
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

    /// The direction with other parameters, whose names begin with `prefix`.
    pub fn map(&self, prefix: &str, f: &mut Change) -> Result<Self> {
        let (suffix, a_name) = if self.reverse { ("_b", "A_b_log") } else { ("", "A_log") };
        let mut f = |name: &str, parameter: &Parameter| f(&format!("{prefix}{name}"), parameter);
        let a = f(a_name, &self.a)?;
        let d = f(&format!("D{suffix}"), &self.d)?;
        let conv_weight = f(&format!("conv1d{suffix}.weight"), &self.conv_weight)?;
        let conv_bias = self.conv_bias.as_ref().map(|bias| f(&format!("conv1d{suffix}.bias"), bias)).transpose()?;
        let (dynamics, dt_bias) = match &self.dynamics {
            Dynamics::Selective { x_proj, dt_proj, norms } => {
                let x_proj = x_proj.map(&format!("x_proj{suffix}."), &mut f)?;
                let dt_proj = dt_proj.map(&format!("dt_proj{suffix}."), &mut f)?;
                let dt_bias = f(&format!("dt_proj{suffix}.bias"), &self.dt_bias)?;
                let norms = norms.as_ref().map(|norms| norms.map(suffix, &mut f)).transpose()?;
                (Dynamics::Selective { x_proj, dt_proj, norms }, dt_bias)
            }
            Dynamics::Invariant { b, c } => {
                let dynamics = Dynamics::Invariant { b: f(&format!("B{suffix}"), b)?, c: f(&format!("C{suffix}"), c)? };
                (dynamics, f(&format!("dt_bias{suffix}"), &self.dt_bias)?)
            }
        };
        Ok(Self { reverse: self.reverse, sizes: self.sizes, conv_weight, conv_bias, a, d, dt_bias, dynamics })
    }
}

impl ProjectionNorms {
    fn map(&self, suffix: &str, f: &mut Change) -> Result<Self> {
        let weights = match &self.weights {
            None => None,
            Some([dt, b, c]) => {
                let mut f = |index: usize, weight| f(&format!("{}{suffix}.weight", NORM_NAMES[index]), weight);
                Some([f(0, dt)?, f(1, b)?, f(2, c)?])
            }
        };
        Ok(Self { weights, eps: self.eps })
    }
}
