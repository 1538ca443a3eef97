//! The linear layer, whose backward pass multiplies views where they lie.

use candle_core::{D, DType, Result, Tensor};

use super::{Converted, Gradients, Initial, Parameter, Parameters, node_over};
use crate::candle::gemm;

/// A linear layer.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    /// `(out, in)`, or `(out, ..)` of which the rest is `in` all together.
    weight: Parameter,
    bias: Option<Parameter>,
}

impl Linear {
    pub fn new(parameters: &Parameters, [fan_in, out]: [usize; 2], bias: bool, divisor: f64) -> Result<Self> {
        let weight = parameters.get(&[out, fan_in], "weight", Initial::linear(fan_in, divisor))?;
        let bias = bias.then(|| parameters.get(&[out], "bias", Initial::Constant(0.0))).transpose()?;
        Ok(Self { weight, bias })
    }

    /// The layer that a convolution is to patches: its kernel is `(out, channels, rows, columns)`, and its input the numbers of
    /// a patch in that order. Begins as a convolution of Vision Mamba.
    pub fn of_patches(parameters: &Parameters, kernel: [usize; 4]) -> Result<Self> {
        let fan_in: usize = kernel[1..].iter().product();
        let weight = parameters.get(&kernel, "weight", Initial::Normal(1.0 / (fan_in as f64).sqrt()))?;
        let bias = parameters.get(&kernel[..1], "bias", Initial::Constant(0.0))?;
        Ok(Self { weight, bias: Some(bias) })
    }

    pub fn without_bias(weight: Parameter) -> Self {
        Self { weight, bias: None }
    }

    /// The matrix, `(out, in)`.
    pub fn weight(&self) -> &Parameter {
        &self.weight
    }

    /// What multiplies, `(out, in)`, in the type in which it computes.
    fn matrix(&self) -> Result<Tensor> {
        self.weight.tensor()?.flatten_from(1)
    }

    /// The matrix in the type in which it computes, and the bias in `f32`.
    pub fn joined(&self) -> Result<(Tensor, Option<Tensor>)> {
        let bias = self.bias.as_ref().map(|bias| bias.tensor()?.to_dtype(DType::F32)).transpose()?;
        Ok((self.weight.tensor()?, bias))
    }

    /// The type in which it computes.
    pub fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    /// Applies the layer to the last dimension of `x`, which is dense or has two dimensions. Differentiable.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (rest, features) = (&x.dims()[..x.rank() - 1], x.dim(D::Minus1)?);
        let layer = self.leave_graph(&Converted::default())?;
        let matrix = match x.rank() {
            2 => x.detach(),
            _ => x.detach().reshape((rest.iter().product::<usize>(), features))?,
        };
        let out = layer.apply(&matrix)?;
        let out = out.reshape([rest, &[out.dim(1)?]].concat())?;
        let parameters: Vec<_> = [&self.weight].into_iter().chain(&self.bias).map(|p| p.stored().clone()).collect();
        let (x_shape, is_x_tracked) = (x.shape().clone(), x.track_op());
        let backward = move |d_out: &Tensor, gradients: &mut Gradients| {
            let d_out = d_out.reshape(((), d_out.dim(D::Minus1)?))?;
            layer.parameter_gradients(&matrix, &d_out, gradients)?;
            is_x_tracked.then(|| layer.input_gradient(&d_out)?.reshape(&x_shape)).transpose()
        };
        // SAFETY: the product is a tensor of its own, of which no other handle is left.
        unsafe { node_over("linear", x, &parameters, out, backward) }
    }

    /// The layer outside of candle's graph.
    pub fn leave_graph(&self, converted: &Converted) -> Result<Self> {
        let bias = self.bias.as_ref().map(|bias| bias.leave_graph(converted)).transpose()?;
        Ok(Self { weight: self.weight.leave_graph(converted)?, bias })
    }

    /// Outside of candle's graph: `(rows, in)` to `(rows, out)`, in the type of `x`.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.matrix()?.t()?;
        match &self.bias {
            Some(bias) => {
                let bias = bias.tensor()?.to_dtype(DType::F32)?;
                product(x, &weight, DType::F32)?.broadcast_add(&bias)?.to_dtype(x.dtype())
            }
            None => product(x, &weight, x.dtype()),
        }
    }

    /// [`apply`](Self::apply), added to `out` in its type, `f32` or that of `x`.
    pub fn apply_onto(&self, out: &Tensor, x: &Tensor) -> Result<()> {
        if let Some(bias) = &self.bias {
            let rows = bias.tensor()?.to_dtype(out.dtype())?.unsqueeze(0)?;
            let ones = Tensor::ones((x.dim(0)?, 1), out.dtype(), x.device())?;
            gemm(out, &ones, &rows, true)?;
        }
        gemm(out, x, &self.matrix()?.t()?, true)
    }

    /// Outside of candle's graph: the gradient of its input, `(rows, in)`, from that of its output, `(rows, out)`.
    pub fn input_gradient(&self, d_out: &Tensor) -> Result<Tensor> {
        product(d_out, &self.matrix()?, d_out.dtype())
    }

    /// [`input_gradient`](Self::input_gradient) written into `d_x`, or added to it.
    pub fn input_gradient_into(&self, d_x: &Tensor, d_out: &Tensor, accumulate: bool) -> Result<()> {
        gemm(d_x, d_out, &self.matrix()?, accumulate)
    }

    /// Outside of candle's graph: the gradients of its parameters, from its input `(rows, in)` and the gradient of its output.
    pub fn parameter_gradients(&self, x: &Tensor, d_out: &Tensor, gradients: &mut Gradients) -> Result<()> {
        gradients.add(&self.weight, |dtype| product(&d_out.t()?, x, dtype)?.reshape(self.weight.stored().shape()))?;
        let Some(bias) = &self.bias else { return Ok(()) };
        // A sum over all rows, which in bf16 would stand still at 256 times what is added.
        gradients.add(bias, |_| d_out.to_dtype(DType::F32)?.sum(0))
    }
}

/// A layer whose outputs come in two halves, the gradients of which are matrices of their own, `(rows, out / 2)`.
impl Linear {
    /// See [`input_gradient`](Self::input_gradient).
    pub fn input_gradient_of_halves(&self, d_halves: [&Tensor; 2]) -> Result<Tensor> {
        let weight = self.weight.tensor()?;
        let (half, dtype) = (d_halves[0].dim(1)?, d_halves[0].dtype());
        let d_x = product(d_halves[0], &weight.narrow(0, 0, half)?, dtype)?;
        gemm(&d_x, d_halves[1], &weight.narrow(0, half, half)?, true)?;
        Ok(d_x)
    }

    /// See [`parameter_gradients`](Self::parameter_gradients).
    pub fn parameter_gradients_of_halves(
        &self,
        x: &Tensor,
        d_halves: [&Tensor; 2],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let half = d_halves[0].dim(1)?;
        gradients.add(&self.weight, |dtype| {
            // SAFETY: each half of the rows is overwritten.
            let d_weight = unsafe { Tensor::empty((2 * half, x.dim(1)?), dtype, x.device())? };
            for (i, d_half) in d_halves.iter().enumerate() {
                gemm(&d_weight.narrow(0, i * half, half)?, &d_half.t()?, x, false)?;
            }
            Ok(d_weight)
        })?;
        let Some(bias) = &self.bias else { return Ok(()) };
        gradients.add(bias, |_| {
            let sums = d_halves.map(|d_half| d_half.to_dtype(DType::F32)?.sum(0));
            let [first, second] = sums;
            Tensor::cat(&[first?, second?], 0)
        })
    }
}

/// `a·b` of views, `(m, k)` and `(k, n)`, in a matrix of type `dtype`.
fn product(a: &Tensor, b: &Tensor, dtype: DType) -> Result<Tensor> {
    // SAFETY: the product overwrites every element.
    let out = unsafe { Tensor::empty((a.dim(0)?, b.dim(1)?), dtype, a.device())? };
    gemm(&out, a, b, false)?;
    Ok(out)
}
