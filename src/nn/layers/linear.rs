//! The linear layer.

use candle_core::{D, DType, Device, Result, Tensor};

use super::{Initial, Parameter, Parameters};

/// A linear layer.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    /// `(out, in)`.
    weight: Parameter,
    bias: Option<Parameter>,
}

impl Linear {
    pub fn new(parameters: &Parameters, [fan_in, out]: [usize; 2], bias: bool, divisor: f64) -> Result<Self> {
        let weight = parameters.get(&[out, fan_in], "weight", Initial::linear(fan_in, divisor))?;
        let bias = bias.then(|| parameters.get(&[out], "bias", Initial::Constant(0.0))).transpose()?;
        Ok(Self { weight, bias })
    }

    pub fn without_bias(weight: Parameter) -> Self {
        Self { weight, bias: None }
    }

    /// The matrix, `(out, in)`.
    pub fn weight(&self) -> &Parameter {
        &self.weight
    }

    /// The type in which it computes.
    pub fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    /// Applies the layer to the last dimension of `x`, which is dense or has two dimensions.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.weight.tensor()?;
        let out = match x.dims() {
            [_, _] => product(x, &weight)?,
            dims => {
                let (rest, features) = (&dims[..dims.len() - 1], x.dim(D::Minus1)?);
                let shape = [rest, &[weight.dim(0)?]].concat();
                product(&x.reshape((rest.iter().product::<usize>(), features))?, &weight)?.reshape(shape)?
            }
        };
        match &self.bias {
            // In `f32`, for the gradient of the bias is a sum over all rows, which candle takes in the type that it finds:
            // a sum in bf16 stands still at 256 times what is added.
            Some(bias) => {
                let bias = bias.tensor()?.to_dtype(DType::F32)?;
                out.to_dtype(DType::F32)?.broadcast_add(&bias)?.to_dtype(out.dtype())
            }
            None => Ok(out),
        }
    }
}

/// `x` `(rows, in)` times the transpose of `weight` `(out, in)`.
fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let weight = weight.t()?;
    match (x.device(), x.dtype()) {
        // candle has no bf16 product on processors.
        (Device::Cpu, DType::BF16) => {
            x.to_dtype(DType::F32)?.matmul(&weight.to_dtype(DType::F32)?)?.to_dtype(DType::BF16)
        }
        // A column range is a matrix with a stride to gemm, but not to candle's use of cuBLAS.
        (Device::Cpu, _) => x.matmul(&weight),
        _ => x.contiguous()?.matmul(&weight),
    }
}
