//! The layers that a block is made of beside its convolution and scan, and how parameters come to be.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Takes parameters from a `VarBuilder` by name. One that a `VarMap` does not have yet is drawn.
pub(crate) struct Parameters<'a> {
    vb: VarBuilder<'a>,
    seed: u64,
}

impl<'a> Parameters<'a> {
    pub fn new(vb: VarBuilder<'a>, seed: u64) -> Self {
        Self { vb, seed }
    }

    /// The parameters whose names go on with `name`.
    pub fn pp(&self, name: impl ToString) -> Self {
        Self { vb: self.vb.pp(name), seed: self.seed }
    }

    /// A parameter of the model's type.
    pub fn get(&self, shape: &[usize], name: &str, initial: Initial) -> Result<Tensor> {
        self.get_dtype(shape, name, self.vb.dtype(), initial)
    }

    /// A parameter that is `f32` whatever the model's type.
    pub fn get_f32(&self, shape: &[usize], name: &str, initial: Initial) -> Result<Tensor> {
        self.get_dtype(shape, name, DType::F32, initial)
    }

    fn get_dtype(&self, shape: &[usize], name: &str, dtype: DType, initial: Initial) -> Result<Tensor> {
        let missing = !self.vb.contains_tensor(name);
        let tensor = self.vb.get_with_hints_dtype(shape, name, Default::default(), dtype)?;
        // Where a missing tensor is no error it was made now, as a variable: candle's own initializations have neither a
        // seed nor what the paper asks for.
        if missing && tensor.is_variable() {
            let values = initial.draw(shape, &mut self.random(name));
            let values = Tensor::from_vec(values, shape, &Device::Cpu)?.to_device(tensor.device())?.to_dtype(dtype)?;
            Var::from_tensor(&tensor)?.set(&values)?;
        }
        // A `VarMap` gives what it has, of whatever type.
        tensor.to_dtype(dtype)
    }

    /// A source of random numbers for one parameter. That of another does not change with it, whatever is built first.
    fn random(&self, name: &str) -> StdRng {
        let path = [self.vb.prefix().as_str(), name].join(".");
        // FNV-1a: the standard library's hash may differ from one version to the next.
        let hash = path
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        StdRng::seed_from_u64(hash ^ self.seed.rotate_left(32))
    }
}

/// How a parameter begins.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Initial {
    Constant(f32),
    Normal(f64),
    /// Within this bound of zero.
    Uniform(f64),
    /// log(1), log(2), … along the last dimension: S4D-Real, by which state n decays at the rate n.
    LogOfIndex,
    /// What softplus takes to step sizes spread log-uniformly.
    StepSizes {
        min: f64,
        max: f64,
        floor: f64,
    },
}

impl Initial {
    /// As PyTorch begins a linear layer or a convolution that sums over `fan_in` terms, divided by `shrink`.
    pub fn linear(fan_in: usize, shrink: f64) -> Self {
        Self::Uniform(1.0 / (fan_in as f64).sqrt() / shrink)
    }

    fn draw(self, shape: &[usize], random: &mut StdRng) -> Vec<f32> {
        let count = shape.iter().product();
        let mut uniform = || random.random::<f64>();
        match self {
            Self::Constant(value) => vec![value; count],
            Self::Uniform(bound) => (0..count).map(|_| ((2.0 * uniform() - 1.0) * bound) as f32).collect(),
            // Box and Muller's transform; 1 - uniform lies above 0, where the logarithm is finite.
            Self::Normal(deviation) => (0..count)
                .map(|_| {
                    let radius = (-2.0 * (1.0 - uniform()).ln()).sqrt();
                    (radius * (std::f64::consts::TAU * uniform()).cos() * deviation) as f32
                })
                .collect(),
            Self::LogOfIndex => {
                let last = shape.last().copied().unwrap_or(1);
                (0..count).map(|i| ((i % last + 1) as f64).ln() as f32).collect()
            }
            Self::StepSizes { min, max, floor } => (0..count)
                .map(|_| {
                    let step = (min.ln() + uniform() * (max.ln() - min.ln())).exp().max(floor);
                    // ln(e^step - 1), written so that it does not cancel.
                    (step + (-(-step).exp_m1()).ln()) as f32
                })
                .collect(),
        }
    }
}

/// A linear layer.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    /// `(out, in)`.
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Linear {
    pub fn new(parameters: &Parameters, [fan_in, out]: [usize; 2], bias: bool, shrink: f64) -> Result<Self> {
        let weight = parameters.get(&[out, fan_in], "weight", Initial::linear(fan_in, shrink))?;
        let bias = bias.then(|| parameters.get(&[out], "bias", Initial::Constant(0.0))).transpose()?;
        Ok(Self { weight, bias })
    }

    pub fn without_bias(weight: Tensor) -> Self {
        Self { weight, bias: None }
    }

    /// Applies the layer to the last dimension of `x`, which is dense or has two dimensions.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let out = match x.dims() {
            [_, _] => self.product(x)?,
            dims => {
                let (rest, features) = (&dims[..dims.len() - 1], x.dim(D::Minus1)?);
                let shape = [rest, &[self.weight.dim(0)?]].concat();
                self.product(&x.reshape((rest.iter().product::<usize>(), features))?)?.reshape(shape)?
            }
        };
        match &self.bias {
            Some(bias) => out.broadcast_add(bias),
            None => Ok(out),
        }
    }

    fn product(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.weight.t()?;
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

    pub fn map(&self, f: &impl Fn(&Tensor) -> Tensor) -> Self {
        Self { weight: f(&self.weight), bias: self.bias.as_ref().map(f) }
    }

    pub fn name_tensors(&self, prefix: &str, to: &mut Vec<(String, Tensor)>) {
        to.push((format!("{prefix}.weight"), self.weight.clone()));
        to.extend(self.bias.iter().map(|bias| (format!("{prefix}.bias"), bias.clone())));
    }
}
