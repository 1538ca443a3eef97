//! How parameters come to be, and in which type they are computed with.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{argument, check_room};

/// A parameter: the tensor that the model was built on, and the form in which it is computed with.
///
/// What training changes keeps its own type, so that a half model may stand on `f32` variables: it is brought into the
/// model's type in every pass, within candle's graph, and the gradient comes to the variable.
#[derive(Debug, Clone)]
pub(crate) struct Parameter {
    stored: Tensor,
    form: Form,
    /// That form, where nothing changes what is stored.
    ready: Option<Tensor>,
}

/// In which form a parameter is computed with.
#[derive(Debug, Clone, Copy)]
enum Form {
    /// As it is, in this type.
    Plain(DType),
    /// -exp of it, in `f32`.
    NegativeExp,
}

impl Form {
    fn of(self, stored: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain(dtype) => stored.to_dtype(dtype),
            Self::NegativeExp => stored.to_dtype(DType::F32)?.exp()?.neg(),
        }
    }
}

impl Parameter {
    fn new(stored: Tensor, form: Form) -> Result<Self> {
        let ready = (!stored.track_op()).then(|| form.of(&stored)).transpose()?;
        Ok(Self { stored, form, ready })
    }

    /// What is computed with. Where the parameter is part of candle's graph, so is this.
    pub fn tensor(&self) -> Result<Tensor> {
        match &self.ready {
            Some(tensor) => Ok(tensor.clone()),
            None => self.form.of(&self.stored),
        }
    }

    /// What the model was built on.
    pub fn stored(&self) -> &Tensor {
        &self.stored
    }

    /// The type in which it is computed with.
    pub fn dtype(&self) -> DType {
        match self.form {
            Form::Plain(dtype) => dtype,
            Form::NegativeExp => DType::F32,
        }
    }

    /// Whether a backward pass could reach it.
    pub fn is_tracked(&self) -> bool {
        self.stored.track_op()
    }

    /// The same values, of which candle records nothing.
    pub fn detach(&self) -> Result<Self> {
        Self::new(self.stored.detach(), self.form)
    }

    /// Another tensor in its place, of the same shape and on the same device. An error says what `name` should be.
    pub fn replace(&self, name: &str, tensor: Tensor) -> Result<Self> {
        let describe = |tensor: &Tensor| format!("{:?} on {:?}", tensor.dims(), tensor.device().location());
        if describe(&tensor) != describe(&self.stored) {
            let expected = format_args!("`{name}` of shape {}", describe(&self.stored));
            return Err(argument("f", expected, describe(&tensor)));
        }
        check_float("f", name, tensor.dtype())?;
        Self::new(tensor, self.form)
    }
}

/// Refuses numbers that are none of a parameter's.
fn check_float(argument_name: &'static str, name: &str, dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 | DType::F64 => Ok(()),
        other => Err(argument(argument_name, format_args!("`{name}` of type f32, f16, bf16 or f64"), other.as_str())),
    }
}

/// What is done with each parameter of a layer, by name: another is given, or the same again.
pub(crate) type Change<'f> = dyn FnMut(&str, &Parameter) -> Result<Parameter> + 'f;

/// The parameters of something that has `map`, by name.
pub(crate) fn named<T>(map: impl FnOnce(&mut Change) -> Result<T>) -> Vec<(String, Tensor)> {
    let mut tensors = Vec::new();
    // The closure makes no error, and no layer makes one of its own.
    let _ = map(&mut |name, parameter| {
        tensors.push((name.to_string(), parameter.stored().clone()));
        Ok(parameter.clone())
    });
    tensors
}

/// Takes parameters from a `VarBuilder` by name. One that a `VarMap` does not have yet is drawn.
pub(crate) struct Parameters<'a> {
    vb: VarBuilder<'a>,
    seed: u64,
}

/// From here on a parameter is large: 4 GiB.
const LARGE: usize = 1 << 32;

impl<'a> Parameters<'a> {
    pub fn new(vb: VarBuilder<'a>, seed: u64) -> Self {
        Self { vb, seed }
    }

    /// The parameters whose names go on with `name`.
    pub fn pp(&self, name: impl ToString) -> Self {
        Self { vb: self.vb.pp(name), seed: self.seed }
    }

    /// Checks that there is room for `count` numbers, if the parameter called `name` is yet to be made: then so are most.
    pub fn check_room(&self, name: &str, argument: &'static str, count: usize) -> Result<()> {
        if self.vb.contains_tensor(name) {
            return Ok(());
        }
        check_room(argument, &[count], self.vb.dtype(), self.vb.device())
    }

    /// A parameter of the model's type.
    pub fn get(&self, shape: &[usize], name: &str, initial: Initial) -> Result<Parameter> {
        let dtype = self.vb.dtype();
        Parameter::new(self.take(shape, name, dtype, initial)?, Form::Plain(dtype))
    }

    /// A parameter that is computed with in `f32` whatever the model's type.
    pub fn get_f32(&self, shape: &[usize], name: &str, initial: Initial) -> Result<Parameter> {
        Parameter::new(self.take(shape, name, DType::F32, initial)?, Form::Plain(DType::F32))
    }

    /// A, of which the logarithm of its negative is the parameter.
    pub fn get_a(&self, shape: &[usize], name: &str) -> Result<Parameter> {
        Parameter::new(self.take(shape, name, DType::F32, Initial::LogOfIndex)?, Form::NegativeExp)
    }

    /// The tensor of a name: a variable of whatever type, or else one of type `dtype`.
    fn take(&self, shape: &[usize], name: &str, dtype: DType, initial: Initial) -> Result<Tensor> {
        let missing = !self.vb.contains_tensor(name);
        // What a backend says that it has, it may make by itself as `VarBuilder::zeros` does. Memory is not asked for
        // small parameters that are there, for they would have to fit twice.
        let bytes = shape.iter().fold(dtype.size_in_bytes(), |n, &size| n.saturating_mul(size));
        if missing || bytes >= LARGE {
            check_room("vb", shape, dtype, self.vb.device())?;
        }
        let get = |dtype| self.vb.get_with_hints_dtype(shape, name, Default::default(), dtype);
        let tensor = get(dtype)?;
        // Where a missing tensor is no error it was made now, as a variable: candle's own initializations have neither a
        // seed nor what the paper asks for.
        if missing && tensor.is_variable() {
            let values = initial.draw(shape, &mut self.random(name))?;
            let values = Tensor::from_vec(values, shape, &Device::Cpu)?.to_device(tensor.device())?.to_dtype(dtype)?;
            Var::from_tensor(&tensor)?.set(&values)?;
        }
        // A `VarMap` gives what it has, of whatever type. Other backends give a copy in the type that they are asked for,
        // which would not change with the variable.
        if tensor.track_op() && !tensor.is_variable() {
            for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
                let stored = get(dtype)?;
                if stored.is_variable() {
                    return Ok(stored);
                }
            }
        }
        check_float("vb", self.path(name).trim_start_matches('.'), tensor.dtype())?;
        Ok(tensor)
    }

    fn path(&self, name: &str) -> String {
        [self.vb.prefix().as_str(), name].join(".")
    }

    /// A source of random numbers for one parameter. That of another does not change with it, whatever is built first.
    fn random(&self, name: &str) -> StdRng {
        // FNV-1a: the standard library's hash may differ from one version to the next.
        let hash = self
            .path(name)
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

    fn draw(self, shape: &[usize], random: &mut StdRng) -> Result<Vec<f32>> {
        let count = shape.iter().product();
        let mut values = Vec::new();
        if values.try_reserve_exact(count).is_err() {
            return Err(argument("vb", "parameters that fit in memory", format_args!("one of shape {shape:?}")));
        }
        let mut uniform = || random.random::<f64>();
        let last = shape.last().copied().unwrap_or(1);
        values.extend((0..count).map(|i| match self {
            Self::Constant(value) => value,
            Self::Uniform(bound) => ((2.0 * uniform() - 1.0) * bound) as f32,
            // Box and Muller's transform; 1 - uniform lies above 0, where the logarithm is finite.
            Self::Normal(deviation) => {
                let radius = (-2.0 * (1.0 - uniform()).ln()).sqrt();
                (radius * (std::f64::consts::TAU * uniform()).cos() * deviation) as f32
            }
            Self::LogOfIndex => ((i % last + 1) as f64).ln() as f32,
            Self::StepSizes { min, max, floor } => {
                let step = (min.ln() + uniform() * (max.ln() - min.ln())).exp().max(floor);
                // ln(e^step - 1), written so that it does not cancel.
                (step + (-(-step).exp_m1()).ln()) as f32
            }
        }));
        Ok(values)
    }
}
