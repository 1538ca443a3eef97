//! The RMS norm as a layer.

use candle_core::{DType, Result, Tensor};
use candle_nn::{Module, VarBuilder};

use super::{Initial, Parameter, Parameters};
use crate::nn::{argument, check_eps, check_model_dtype};
use crate::norm;

/// The RMS norm over the last dimension, with a weight: `x / √(mean of x² + eps) · weight`. Unlike candle-nn's, it has
/// gradients by [`forward`](Self::forward), and takes a residual stream of `f32` in a model of a half type.
///
/// ```
/// # use candle_core::{DType, Device, Var};
/// # use candle_nn::{VarBuilder, VarMap};
/// use selective_scan::nn::RmsNorm;
///
/// let variables = VarMap::new();
/// let norm = RmsNorm::new(8, 1e-5, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
/// let x = Var::randn(0f32, 1.0, (2, 3, 8), &Device::Cpu)?;
/// let gradients = norm.forward(&x)?.sqr()?.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&x).unwrap().dims(), [2, 3, 8]);
/// assert_eq!(gradients.get(&variables.all_vars()[0]).unwrap().dims(), [8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct RmsNorm {
    /// `(size)`.
    weight: Parameter,
    /// The weight in `f32`, as the norm computes with it, where nothing changes it.
    wide: Option<Tensor>,
    eps: f64,
}

impl RmsNorm {
    /// A norm of rows of `size`, with the parameter `weight` of `vb`, which begins as 1 where a
    /// [`VarMap`](candle_nn::VarMap) does not have it yet. Its results are of the type of `vb`: `f32`, `f16` or `bf16`.
    ///
    /// # Errors
    /// A size of 0; an `eps` that is negative or not finite; a parameter that is missing or of another shape.
    pub fn new(size: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        if size == 0 {
            return Err(argument("size", "at least 1", 0));
        }
        check_eps("eps", eps)?;
        check_model_dtype(vb.dtype())?;
        Self::build(size, eps, &Parameters::new(vb, 0))
    }

    pub(crate) fn build(size: usize, eps: f64, parameters: &Parameters) -> Result<Self> {
        let weight = parameters.get(&[size], "weight", Initial::Constant(1.0))?;
        let wide = (!weight.is_tracked()).then(|| weight.tensor()?.to_dtype(DType::F32)).transpose()?;
        Ok(Self { weight, wide, eps })
    }

    /// The weight, `(size)`, as the norm was built on it.
    pub fn weight(&self) -> &Tensor {
        self.weight.stored()
    }

    /// The weight.
    pub(crate) fn parameter(&self) -> &Parameter {
        &self.weight
    }

    /// Added to the mean square.
    pub(crate) fn eps(&self) -> f64 {
        self.eps
    }

    /// Normalises the rows of `x`, `(.., size)` of `f32`, `f16` or `bf16`, computed in `f32`. Differentiable.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let size = self.weight().elem_count();
        if x.dims().last() != Some(&size) {
            return Err(argument("x", format_args!("rows of {size}"), format_args!("{:?}", x.dims())));
        }
        if !matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            return Err(argument("x", "f32, f16 or bf16", x.dtype().as_str()));
        }
        let weight = match &self.wide {
            Some(wide) => wide.clone(),
            None => self.weight.tensor()?,
        };
        rms_norm(x, Some(&weight), self.eps, self.weight.dtype())
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Self::forward(self, x)
    }
}

/// The RMS norm over the last dimension, times `weight` if there is one, computed in `f32` and given in `dtype`.
pub(crate) fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f64, dtype: DType) -> Result<Tensor> {
    if x.elem_count() == 0 {
        return Tensor::zeros(x.shape(), dtype, x.device());
    }
    // What comes in one type and is wanted in another goes through `f32`, of which all are made.
    let x = if x.dtype() == dtype { x.clone() } else { x.to_dtype(DType::F32)? };
    let weight = weight.map(|weight| weight.to_dtype(DType::F32)).transpose()?;
    let options = norm::Options { eps, ..Default::default() };
    crate::candle::RmsNorm { weight: weight.as_ref(), options, dtype, ..crate::candle::RmsNorm::new(&x) }.forward()
}
