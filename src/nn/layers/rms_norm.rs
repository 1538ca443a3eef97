//! The RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467), with gradients.
//!
//! candle-nn's own has none for dense input. Here dense `f32` input on a processor goes through one pass each way, on all
//! threads; the rest, through candle's operators.

use candle_core::{Context, CpuStorage, CustomOp2, CustomOp3, D, DType, Device, Error, Layout, Result, Shape, Tensor};
use candle_nn::{Module, VarBuilder};
use rayon::prelude::*;

use super::{Initial, Parameter, Parameters};
use crate::nn::{argument, check_eps, check_model_dtype, check_once};

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
        Ok(Self { weight: parameters.get(&[size], "weight", Initial::Constant(1.0))?, eps })
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
        rms_norm(x, Some(&self.weight.tensor()?), self.eps, self.weight.dtype())
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
    let x = x.to_dtype(DType::F32)?;
    let weight = weight.map(|weight| weight.to_dtype(DType::F32)).transpose()?;
    let out = match (&weight, x.device()) {
        (Some(weight), Device::Cpu) if x.is_contiguous() && weight.is_contiguous() => {
            x.apply_op2(weight, Rows { eps: eps as f32 })?
        }
        _ => {
            let mean_square = (x.sqr()?.sum_keepdim(D::Minus1)? / x.dim(D::Minus1)? as f64)?;
            let out = x.broadcast_div(&(mean_square + eps)?.sqrt()?)?;
            match &weight {
                Some(weight) => out.broadcast_mul(weight)?,
                None => out,
            }
        }
    };
    out.to_dtype(dtype)
}

/// The gradients of `x`, in its type, and of the weight, from that of the norm.
pub(crate) fn rms_norm_gradients(
    x: &Tensor,
    weight: Option<&Tensor>,
    eps: f64,
    d_out: &Tensor,
    d_stream: Option<&Tensor>,
) -> Result<(Tensor, Option<Tensor>)> {
    let s = x.to_dtype(DType::F32)?;
    let d_out = d_out.to_dtype(DType::F32)?;
    let scale = ((s.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip())?;
    let normed = s.broadcast_mul(&scale)?;
    let d_normed = match weight {
        Some(weight) => d_out.broadcast_mul(&weight.to_dtype(DType::F32)?)?,
        None => d_out.clone(),
    };
    let along = (&d_normed * &normed)?.mean_keepdim(D::Minus1)?;
    let mut d_x = (d_normed - normed.broadcast_mul(&along)?)?.broadcast_mul(&scale)?;
    if let Some(d_stream) = d_stream {
        d_x = (d_x + d_stream.to_dtype(DType::F32)?)?;
    }
    let width = x.dim(D::Minus1)?;
    let d_weight = weight.map(|_| (d_out * normed)?.reshape(((), width))?.sum(0)).transpose()?;
    Ok((d_x.to_dtype(x.dtype())?, d_weight))
}

/// Rows that are worked on, and whose gradients are summed, together: by this the order of sums is fixed, whatever the
/// number of threads.
const ROWS: usize = 64;

/// `(x, weight)` to `x weight / √(mean of x² + eps)`.
#[derive(Clone, Copy)]
struct Rows {
    eps: f32,
}

/// `(x, weight, grad)` to the gradient of `x`.
struct InputGradient(Rows);

/// `(x, grad)` to the gradient of the weight.
struct WeightGradient(Rows);

impl Rows {
    /// What a row is multiplied by.
    fn scale(&self, x: &[f32]) -> f32 {
        1.0 / (dot(x, x) / x.len() as f32 + self.eps).sqrt()
    }
}

impl CustomOp2 for Rows {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (slice(x, x_layout)?, slice(w, w_layout)?);
        let width = check_width(x_layout, weight)?;
        let mut out = vec![0.0; x.len()];
        out.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).for_each(|(out, x)| {
            for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                let scale = self.scale(x);
                for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                    *out = x * scale * weight;
                }
            }
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        check_once(self.name(), grad)?;
        let grad = grad.contiguous()?;
        let to_input = x.apply_op3_no_bwd(weight, &grad, &InputGradient(*self))?;
        Ok((Some(to_input), Some(x.apply_op2_no_bwd(&grad, &WeightGradient(*self))?)))
    }
}

impl CustomOp3 for InputGradient {
    fn name(&self) -> &'static str {
        "rms-norm-input-gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight, grad) = (slice(x, x_layout)?, slice(w, w_layout)?, slice(grad, grad_layout)?);
        let width = check_width(x_layout, weight)?;
        let mut out = vec![0.0; x.len()];
        let chunk = ROWS * width;
        let inputs = x.par_chunks(chunk).zip(grad.par_chunks(chunk));
        out.par_chunks_mut(chunk).zip(inputs).for_each(|(out, (x, grad))| {
            let rows = x.chunks_exact(width).zip(grad.chunks_exact(width));
            for (out, (x, grad)) in out.chunks_exact_mut(width).zip(rows) {
                let scale = self.0.scale(x);
                // The gradient of the normed row, from which its part along that row is taken.
                for ((out, grad), weight) in out.iter_mut().zip(grad).zip(weight) {
                    *out = grad * weight;
                }
                let along = dot(out, x) * scale * scale / width as f32;
                for (out, x) in out.iter_mut().zip(x) {
                    *out = scale * (*out - x * along);
                }
            }
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }
}

impl CustomOp2 for WeightGradient {
    fn name(&self) -> &'static str {
        "rms-norm-weight-gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, grad) = (slice(x, x_layout)?, slice(grad, grad_layout)?);
        let width = *x_layout.dims().last().context("rms-norm of a scalar")?;
        let chunks = x.par_chunks(ROWS * width).zip(grad.par_chunks(ROWS * width));
        let sums: Vec<Vec<f32>> = chunks
            .map(|(x, grad)| {
                let mut sum = vec![0.0; width];
                for (x, grad) in x.chunks_exact(width).zip(grad.chunks_exact(width)) {
                    let scale = self.0.scale(x);
                    for ((sum, x), grad) in sum.iter_mut().zip(x).zip(grad) {
                        *sum += x * scale * grad;
                    }
                }
                sum
            })
            .collect();
        let mut total = vec![0.0; width];
        for sum in &sums {
            for (total, sum) in total.iter_mut().zip(sum) {
                *total += sum;
            }
        }
        Ok((CpuStorage::F32(total), Shape::from(width)))
    }
}

/// The elements of a dense tensor.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => Err(Error::RequiresContiguous { op: "rms-norm" }.bt()),
    }
}

/// The width of the rows, which is that of the weight, and not zero.
fn check_width(layout: &Layout, weight: &[f32]) -> Result<usize> {
    match layout.dims().last() {
        Some(&width) if width == weight.len() && width > 0 => Ok(width),
        _ => Err(argument("x", format_args!("rows of {}", weight.len()), format_args!("{:?}", layout.dims()))),
    }
}

/// Σ a b, in lanes of fixed order that the compiler can vectorise.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    let mut lanes = [0.0; 16];
    for (a, b) in a.iter().zip(b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + rest
}
