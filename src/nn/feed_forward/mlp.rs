//! An MLP with a gate.

use candle_core::{D, Result, Tensor};
use candle_nn::{Module, VarBuilder};

use super::{FeedForwardConfig, MlpConfig};
use crate::candle::node;
use crate::nn::argument;
use crate::nn::layers::{Linear, ParameterList, Parameters};

/// An MLP with a gate: `down_proj(silu(gate_proj(x)) · up_proj(x))`, by the names of Llama and Jamba.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::{VarBuilder, VarMap};
/// use selective_scan::nn::{Mlp, MlpConfig};
///
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let mlp = Mlp::new(&MlpConfig::new(16, 40), 0, vb)?;
/// let x = Tensor::randn(0f32, 1.0, (2, 5, 16), &Device::Cpu)?;
/// assert_eq!(mlp.forward(&x)?.dims(), [2, 5, 16]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Mlp {
    d_model: usize,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    parameters: ParameterList,
}

impl Mlp {
    /// An MLP with the parameters of `vb`, which computes in its type. Those that a [`VarMap`](candle_nn::VarMap) does not have
    /// yet are drawn, from `seed` and the parameters' names.
    ///
    /// # Errors
    /// A size that makes no MLP, or one that does not fit in memory; a parameter that is missing or of another shape, by name.
    pub fn new(config: &MlpConfig, seed: u64, vb: VarBuilder) -> Result<Self> {
        let all = FeedForwardConfig::Mlp(config.clone());
        all.check()?;
        crate::nn::check_model_dtype(vb.dtype())?;
        let parameters = Parameters::new(vb, seed);
        parameters.pp("gate_proj").check_room("weight", "d_inner", all.parameter_count()?)?;
        Self::build(config, &parameters, 1.0)
    }

    /// An MLP whose initial `down_proj` is divided by a number.
    pub(crate) fn build(config: &MlpConfig, parameters: &Parameters, divisor: f64) -> Result<Self> {
        let count = parameters.count();
        let &MlpConfig { d_model, d_inner, bias } = config;
        let gate_proj = Linear::new(&parameters.pp("gate_proj"), [d_model, d_inner], bias, 1.0)?;
        let up_proj = Linear::new(&parameters.pp("up_proj"), [d_model, d_inner], bias, 1.0)?;
        let down_proj = Linear::new(&parameters.pp("down_proj"), [d_inner, d_model], bias, divisor)?;
        Ok(Self { d_model, gate_proj, up_proj, down_proj, parameters: parameters.taken_since(count) })
    }

    /// Of every row, `(.., d_model)`, the same shape. Differentiable. Of no rows there is nothing.
    ///
    /// # Errors
    /// Rows of another width or type.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        check_rows(x, self.d_model, self.gate_proj.dtype())?;
        if x.elem_count() == 0 {
            return x.zeros_like();
        }
        let x = x.contiguous()?;
        let (gate, up) = (self.gate_proj.forward(&x)?, self.up_proj.forward(&x)?);
        self.down_proj.forward(&gated(&gate, &up)?)
    }

    /// The parameters that a backward pass could reach.
    pub(super) fn tracked(&self) -> Vec<Tensor> {
        self.parameters.tracked()
    }

    /// All parameters by name, in the order in which the MLP uses them.
    pub fn named_tensors(&self) -> Vec<(String, Tensor)> {
        self.parameters.named_tensors()
    }
}

impl Module for Mlp {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Self::forward(self, x)
    }
}

/// Checks the rows that a feed-forward part takes.
pub(super) fn check_rows(x: &Tensor, d_model: usize, dtype: candle_core::DType) -> Result<()> {
    if x.dims().last() != Some(&d_model) || x.rank() < 2 {
        return Err(argument(
            "x",
            format_args!("(.., {d_model}), of two dimensions or more"),
            format_args!("{:?}", x.dims()),
        ));
    }
    if x.dtype() != dtype {
        return Err(argument("x", format_args!("type {}, as the layer", dtype.as_str()), x.dtype().as_str()));
    }
    Ok(())
}

/// `silu(gate) · up`, as one node of candle's graph, which keeps these two and nothing else.
fn gated(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (g, u) = (gate.detach(), up.detach());
    let out = (g.silu()? * &u)?;
    let backward = move |d_out: &Tensor| {
        let sigmoid = candle_nn::ops::sigmoid(&g)?;
        let silu = (&g * &sigmoid)?;
        // The slope of silu: σ + silu (1 - σ).
        let slope = (&sigmoid + (&silu * sigmoid.affine(-1.0, 1.0)?)?)?;
        Ok(vec![Some(((d_out * &u)? * slope)?), Some((d_out * silu)?)])
    };
    debug_assert_eq!(gate.dim(D::Minus1)?, up.dim(D::Minus1)?);
    // SAFETY: the product is a tensor of its own, of which no other handle is left.
    unsafe { node("swiglu", &[gate, up], out, backward) }
}
