//! What a block does between its projections: the convolution, and the scan with what it reads.

use candle_core::{Result, Tensor};

use super::cache::States;
use super::layers::{Initial, Linear, Parameters};
use super::norm::rms_norm;
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
    conv_weight: Tensor,
    /// `(d_inner)`, `f32`.
    conv_bias: Option<Tensor>,
    /// `(d_inner, d_state)`, `f32`: A = -exp(A_log).
    a_log: Tensor,
    /// A, where A_log is no variable that training changes.
    a: Option<Tensor>,
    /// `(d_inner)`, `f32`.
    d: Tensor,
    /// `(d_inner)`, `f32`.
    dt_bias: Tensor,
    dynamics: Dynamics,
}

/// Where the step size, B and C come from.
#[derive(Debug, Clone)]
enum Dynamics {
    /// From the input.
    Selective { x_proj: Linear, dt_proj: Linear, norms: Option<ProjectionNorms> },
    /// B and C are parameters, `(d_inner, d_state)`, `f32`, and the step size is that of the bias alone.
    Invariant { b: Tensor, c: Tensor },
}

/// The norms of the low-rank step size, B and C.
#[derive(Debug, Clone)]
struct ProjectionNorms {
    weights: Option<[Tensor; 3]>,
    eps: f64,
}

const NORM_NAMES: [&str; 3] = ["dt_layernorm", "b_layernorm", "c_layernorm"];

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
        let a_log = parameters.get_f32(&[d_inner, d_state], a_name, Initial::LogOfIndex)?;
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
            a: (!a_log.track_op()).then(|| a_log.exp()?.neg()).transpose()?,
            a_log,
            d: parameters.get_f32(&[d_inner], &format!("D{suffix}"), Initial::Constant(1.0))?,
            dt_bias,
            dynamics,
        })
    }

    /// Runs whole sequences from zero states.
    pub fn forward(&self, x: &Tensor, z: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<Tensor> {
        let weight = self.conv_weight.squeeze(1)?;
        let u = CausalConv { cu_seqlens, ..self.conv(x, &weight) }.forward()?;
        let (projected, a) = (self.project(&u)?, self.a()?);
        Scan { cu_seqlens, ..self.scan(&u, z, &projected, &a) }.forward()
    }

    /// Runs sequences on from given states, and also gives those behind them.
    pub fn extend(
        &self,
        x: &Tensor,
        z: &Tensor,
        cu_seqlens: Option<&[usize]>,
        states: &States,
    ) -> Result<(Tensor, States)> {
        let weight = self.conv_weight.squeeze(1)?;
        let convolution = CausalConv { cu_seqlens, initial_state: Some(&states.conv), ..self.conv(x, &weight) };
        let (u, conv) = convolution.forward_with_state()?;
        let (projected, a) = (self.project(&u)?, self.a()?);
        let scan = Scan { cu_seqlens, initial_state: Some(&states.ssm), ..self.scan(&u, z, &projected, &a) };
        let (y, ssm) = scan.forward_with_state()?;
        Ok((y, States { conv, ssm }))
    }

    /// Carries the states of a cache through a few tokens, in place.
    pub fn step(&self, x: &Tensor, z: &Tensor, cache: &LayerCache, slots: Option<&[i32]>) -> Result<Tensor> {
        let weight = self.conv_weight.squeeze(1)?;
        let update = ConvUpdate { bias: self.conv_bias.as_ref(), slots, silu: true, ..ConvUpdate::new(x, &weight) };
        let u = update.update(&cache.conv)?;
        let (Projected { delta, b, c }, a) = (self.project(&u)?, self.a()?);
        StateUpdate {
            z: Some(z),
            d: Some(&self.d),
            dt_bias: Some(&self.dt_bias),
            slots,
            options: state_update::Options { dt_softplus: true, ..Default::default() },
            ..StateUpdate::new(&u, &delta, &a, &b, &c)
        }
        .update(&cache.ssm)
    }

    fn conv<'a>(&'a self, x: &'a Tensor, weight: &'a Tensor) -> CausalConv<'a> {
        let options = conv::Options { silu: true, reverse: self.reverse };
        CausalConv { bias: self.conv_bias.as_ref(), options, ..CausalConv::new(x, weight) }
    }

    fn scan<'a>(&'a self, u: &'a Tensor, z: &'a Tensor, projected: &'a Projected, a: &'a Tensor) -> Scan<'a> {
        let Projected { delta, b, c } = projected;
        Scan {
            z: Some(z),
            d: Some(&self.d),
            delta_bias: Some(&self.dt_bias),
            options: scan::Options { delta_softplus: true, reverse: self.reverse, ..Default::default() },
            ..Scan::new(u, delta, a, b, c)
        }
    }

    fn a(&self) -> Result<Tensor> {
        match &self.a {
            Some(a) => Ok(a.clone()),
            None => self.a_log.exp()?.neg(),
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
                        *x = rms_norm(x, norms.weights.as_ref().map(|weights| &weights[i]), norms.eps, x.dtype())?;
                    }
                }
                Ok(Projected { delta: dt_proj.forward(&dt)?.reshape((batch, length, d_inner))?, b, c })
            }
            Dynamics::Invariant { b, c } => {
                let zero = Tensor::zeros((1, 1, d_inner), u.dtype(), u.device())?;
                Ok(Projected { delta: zero.broadcast_as(u.shape())?, b: b.clone(), c: c.clone() })
            }
        }
    }

    pub fn map(&self, f: &impl Fn(&Tensor) -> Tensor) -> Result<Self> {
        let a_log = f(&self.a_log);
        Ok(Self {
            reverse: self.reverse,
            sizes: self.sizes,
            conv_weight: f(&self.conv_weight),
            conv_bias: self.conv_bias.as_ref().map(f),
            a: (!a_log.track_op()).then(|| a_log.exp()?.neg()).transpose()?,
            a_log,
            d: f(&self.d),
            dt_bias: f(&self.dt_bias),
            dynamics: match &self.dynamics {
                Dynamics::Selective { x_proj, dt_proj, norms } => Dynamics::Selective {
                    x_proj: x_proj.map(f),
                    dt_proj: dt_proj.map(f),
                    norms: norms.as_ref().map(|ProjectionNorms { weights, eps }| ProjectionNorms {
                        weights: weights.as_ref().map(|weights| weights.each_ref().map(f)),
                        eps: *eps,
                    }),
                },
                Dynamics::Invariant { b, c } => Dynamics::Invariant { b: f(b), c: f(c) },
            },
        })
    }

    pub fn name_tensors(&self, prefix: &str, to: &mut Vec<(String, Tensor)>) {
        let (suffix, a_name) = if self.reverse { ("_b", "A_b_log") } else { ("", "A_log") };
        let mut add = |name: String, tensor: &Tensor| to.push((format!("{prefix}.{name}"), tensor.clone()));
        add(a_name.into(), &self.a_log);
        add(format!("D{suffix}"), &self.d);
        add(format!("conv1d{suffix}.weight"), &self.conv_weight);
        if let Some(bias) = &self.conv_bias {
            add(format!("conv1d{suffix}.bias"), bias);
        }
        match &self.dynamics {
            Dynamics::Selective { x_proj, dt_proj, norms } => {
                add(format!("x_proj{suffix}.weight"), &x_proj.weight);
                add(format!("dt_proj{suffix}.weight"), &dt_proj.weight);
                add(format!("dt_proj{suffix}.bias"), &self.dt_bias);
                for weights in norms.iter().filter_map(|norms| norms.weights.as_ref()) {
                    for (name, weight) in NORM_NAMES.iter().zip(weights) {
                        add(format!("{name}{suffix}.weight"), weight);
                    }
                }
            }
            Dynamics::Invariant { b, c } => {
                add(format!("B{suffix}"), b);
                add(format!("C{suffix}"), c);
                add(format!("dt_bias{suffix}"), &self.dt_bias);
            }
        }
    }
}
