//! How parameters come to be, and in which type they are computed with.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::rc::Rc;

use candle_core::{DType, Device, Result, Tensor, TensorId, Var};
use candle_nn::VarBuilder;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::candle::{node, to_dtype_all};
use crate::lti::Complex64;
use crate::lti::hippo::Measure;
use crate::nn::{argument, check_once, check_room};

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
    /// The tensor of candle's graph that this was detached from, to which its gradient belongs.
    origin: Option<TensorId>,
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
    /// The type in which it is computed with.
    fn dtype(self) -> DType {
        match self {
            Self::Plain(dtype) => dtype,
            Self::NegativeExp => DType::F32,
        }
    }

    fn is_plain(self) -> bool {
        matches!(self, Self::Plain(_))
    }

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
        Ok(Self { stored, form, ready, origin: None })
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
        self.form.dtype()
    }

    /// Whether a backward pass could reach it.
    pub fn is_tracked(&self) -> bool {
        self.stored.track_op()
    }

    /// The same values, of which candle records nothing.
    pub fn detach(&self) -> Result<Self> {
        Self::new(self.stored.detach(), self.form)
    }

    /// The same values, of which candle records nothing, for a pass whose [`Gradients`] come to what this was. Its form is taken
    /// from `converted` if it is there.
    pub fn leave_graph(&self, converted: &Converted) -> Result<Self> {
        if !self.is_tracked() {
            return Ok(self.clone());
        }
        let stored = self.stored.detach();
        let ready = match converted.0.get(&(self.stored.id(), self.dtype())) {
            Some(tensor) if self.form.is_plain() => tensor.clone(),
            _ => self.form.of(&stored)?,
        };
        Ok(Self { stored, form: self.form, ready: Some(ready), origin: Some(self.stored.id()) })
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

/// Parameters that were brought into the type in which they are computed with, all at once, for a pass in which they
/// [leave](Parameter::leave_graph) candle's graph.
#[derive(Default)]
pub(crate) struct Converted(HashMap<(TensorId, DType), Tensor>);

impl Converted {
    /// Of those of `parameters` that candle tracks and that are stored in another type.
    pub fn of<'a>(parameters: impl IntoIterator<Item = &'a Parameter>) -> Result<Self> {
        let mut by_type: HashMap<DType, Vec<&Tensor>> = HashMap::new();
        let mut keys = HashSet::new();
        for Parameter { stored, form, .. } in parameters {
            let dtype = form.dtype();
            if form.is_plain() && stored.track_op() && stored.dtype() != dtype && keys.insert((stored.id(), dtype)) {
                by_type.entry(dtype).or_default().push(stored);
            }
        }
        let mut converted = HashMap::new();
        for (dtype, stored) in by_type {
            let keys = stored.iter().map(|tensor| (tensor.id(), dtype));
            converted.extend(keys.zip(to_dtype_all(&stored, dtype)?));
        }
        Ok(Self(converted))
    }
}

/// The gradients that a backward pass finds, by the tensors of candle's graph, which the parameters have [left](Parameter::leave_graph).
#[derive(Default)]
pub(crate) struct Gradients(HashMap<TensorId, Tensor>);

impl Gradients {
    /// Adds the gradient of a parameter, if candle tracks what it came of; else it is not computed. `gradient` gives that of
    /// the form in which the parameter is computed with: of the type that it gets, or of `f32`.
    pub fn add(&mut self, parameter: &Parameter, gradient: impl FnOnce(DType) -> Result<Tensor>) -> Result<()> {
        let Some(origin) = parameter.origin else { return Ok(()) };
        let (dtype, computed) = (parameter.stored.dtype(), parameter.dtype());
        let gradient = gradient(if dtype == computed { dtype } else { DType::F32 })?;
        let gradient = match parameter.form {
            Form::Plain(_) => gradient,
            // It is its own derivative.
            Form::NegativeExp => (gradient * parameter.tensor()?)?,
        };
        let gradient = gradient.to_dtype(dtype)?;
        let sum = match self.0.get(&origin) {
            Some(other) => (other + gradient)?,
            None => gradient,
        };
        self.0.insert(origin, sum);
        Ok(())
    }

    /// The gradient of a tensor, if there is one.
    pub fn take(&mut self, id: TensorId) -> Option<Tensor> {
        self.0.remove(&id)
    }
}

/// Puts into candle's graph what was computed outside of it from `x` and `parameters`, tensors of the graph, each once.
/// `backward` gets the gradient of `out`, adds those of the parameters, and gives that of `x`, which it has if candle tracks
/// `x`.
///
/// # Safety
/// As [`node`]: no other tensor reads the storage of `out`.
pub(crate) unsafe fn node_over(
    name: &'static str,
    x: &Tensor,
    parameters: &[Tensor],
    out: Tensor,
    backward: impl Fn(&Tensor, &mut Gradients) -> Result<Option<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    let inputs: Vec<_> = [x].into_iter().chain(parameters).collect();
    let ids: Vec<_> = parameters.iter().map(Tensor::id).collect();
    let backward = move |d_out: &Tensor| {
        check_once(name, d_out)?;
        let mut gradients = Gradients::default();
        let d_x = backward(d_out, &mut gradients)?;
        Ok([d_x].into_iter().chain(ids.iter().map(|&id| gradients.take(id))).collect())
    };
    // SAFETY: as the caller promises.
    unsafe { node(name, &inputs, out, backward) }
}

/// Tensors without those that stand before them already.
pub(crate) fn each_once<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Vec<Tensor> {
    let mut once: Vec<Tensor> = Vec::new();
    for tensor in tensors {
        if once.iter().all(|other| other.id() != tensor.id()) {
            once.push(tensor.clone());
        }
    }
    once
}

/// Refuses numbers that are none of a parameter's.
fn check_float(argument_name: &'static str, name: &str, dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 | DType::F64 => Ok(()),
        other => Err(argument(argument_name, format_args!("`{name}` of type f32, f16, bf16 or f64"), other.as_str())),
    }
}

/// What is done with a parameter, by name, where a model is made again: another is given, or the same.
pub(crate) type Change<'f> = dyn FnMut(&str, &Parameter) -> Result<Parameter> + 'f;

/// The parameters of a layer or a model by name, in the order in which they were taken.
///
/// A layer lists its parameters in one place, where it is built: what it takes from [`Parameters`] is listed here, and all
/// that goes over parameters (names, saving, detaching, replacing) goes over this list.
#[derive(Debug, Clone, Default)]
pub(crate) struct ParameterList {
    parameters: Vec<(String, Parameter)>,
    tracked: bool,
}

impl ParameterList {
    /// Calls `f` with each parameter, as the layer was built on it.
    pub fn visit(&self, f: &mut dyn FnMut(&str, &Tensor)) {
        for (name, parameter) in &self.parameters {
            f(name, &parameter.stored);
        }
    }

    /// All by name.
    pub fn named_tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = Vec::with_capacity(self.parameters.len());
        self.visit(&mut |name, tensor| tensors.push((name.to_string(), tensor.clone())));
        tensors
    }

    /// Whether a backward pass could reach one of them.
    pub fn is_tracked(&self) -> bool {
        self.tracked
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Parameter> {
        self.parameters.iter().map(|(_, parameter)| parameter)
    }

    /// The tensors that a backward pass could reach, each once.
    pub fn tracked(&self) -> Vec<Tensor> {
        let stored = self.parameters.iter().map(|(_, parameter)| &parameter.stored);
        each_once(stored.filter(|tensor| tensor.track_op()))
    }

    /// The same by name, to be looked up.
    fn by_name(&self) -> HashMap<&str, &Parameter> {
        self.parameters.iter().map(|(name, parameter)| (name.as_str(), parameter)).collect()
    }
}

/// Where a layer takes its parameters from as it is built, and the list of those that it has taken.
pub(crate) struct Parameters<'a> {
    root: Rc<Root<'a>>,
    /// What the names of this layer begin with.
    prefix: String,
}

struct Root<'a> {
    source: Source<'a>,
    taken: RefCell<Vec<(String, Parameter)>>,
}

enum Source<'a> {
    /// Tensors by name. One that a `VarMap` does not have yet is drawn, from the seed and its name.
    Builder { vb: VarBuilder<'a>, seed: u64 },
    /// The parameters of a model that is made again, changed.
    Changed { parameters: HashMap<&'a str, &'a Parameter>, change: RefCell<&'a mut Change<'a>> },
}

/// From here on a parameter is large: 4 GiB.
const LARGE: usize = 1 << 32;

impl<'a> Parameters<'a> {
    pub fn new(vb: VarBuilder<'a>, seed: u64) -> Self {
        Self::root(Source::Builder { vb, seed })
    }

    /// Those of a model that is made again, each as `change` gives it.
    pub fn changed(parameters: &'a ParameterList, change: &'a mut Change<'a>) -> Self {
        Self::root(Source::Changed { parameters: parameters.by_name(), change: RefCell::new(change) })
    }

    fn root(source: Source<'a>) -> Self {
        Self { root: Rc::new(Root { source, taken: RefCell::default() }), prefix: String::new() }
    }

    /// The parameters whose names go on with `name`.
    pub fn pp(&self, name: impl Display) -> Self {
        Self { root: self.root.clone(), prefix: format!("{}{name}.", self.prefix) }
    }

    /// How many were taken, by this layer and all others.
    pub fn count(&self) -> usize {
        self.root.taken.borrow().len()
    }

    /// The parameters that this layer has taken since there were `count`, by their names within the layer.
    pub fn taken_since(&self, count: usize) -> ParameterList {
        let taken = self.root.taken.borrow();
        let within = |name: &str| name.strip_prefix(&self.prefix).unwrap_or(name).to_string();
        let parameters: Vec<_> =
            taken[count..].iter().map(|(name, parameter)| (within(name), parameter.clone())).collect();
        let tracked = parameters.iter().any(|(_, parameter)| parameter.is_tracked());
        ParameterList { parameters, tracked }
    }

    /// Checks that there is room for `count` numbers, if the parameter called `name` is yet to be made: then so are most.
    pub fn check_room(&self, name: &str, argument: &'static str, count: usize) -> Result<()> {
        match &self.root.source {
            Source::Builder { vb, .. } if !vb.contains_tensor(&self.name(name)) => {
                check_room(argument, &[count], vb.dtype(), vb.device())
            }
            _ => Ok(()),
        }
    }

    /// A parameter of the model's type.
    pub fn get(&self, shape: &[usize], name: &str, initial: Initial) -> Result<Parameter> {
        self.take(shape, name, None, initial)
    }

    /// A parameter that is computed with in `f32` whatever the model's type.
    pub fn get_f32(&self, shape: &[usize], name: &str, initial: Initial) -> Result<Parameter> {
        self.take(shape, name, Some(Form::Plain(DType::F32)), initial)
    }

    /// A, of which the logarithm of its negative is the parameter.
    pub fn get_a(&self, shape: &[usize], name: &str) -> Result<Parameter> {
        self.take(shape, name, Some(Form::NegativeExp), Initial::LogOfIndex)
    }

    /// A parameter in a form, or else one of the model's type, which goes to the list.
    fn take(&self, shape: &[usize], name: &str, form: Option<Form>, initial: Initial) -> Result<Parameter> {
        let name = self.name(name);
        let parameter = match &self.root.source {
            Source::Builder { vb, seed } => {
                let form = form.unwrap_or(Form::Plain(vb.dtype()));
                Parameter::new(fetch(vb, *seed, shape, &name, form.dtype(), initial)?, form)?
            }
            Source::Changed { parameters, change } => match parameters.get(name.as_str()) {
                Some(&parameter) => (change.borrow_mut())(&name, parameter)?,
                None => return Err(candle_core::Error::CannotFindTensor { path: name }.bt()),
            },
        };
        self.root.taken.borrow_mut().push((name, parameter.clone()));
        Ok(parameter)
    }

    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

/// The tensor of a name: a variable of whatever type, or else one of type `dtype`.
fn fetch(vb: &VarBuilder, seed: u64, shape: &[usize], name: &str, dtype: DType, initial: Initial) -> Result<Tensor> {
    let missing = !vb.contains_tensor(name);
    // What a backend says that it has, it may make by itself as `VarBuilder::zeros` does. Memory is not asked for
    // small parameters that are there, for they would have to fit twice.
    let bytes = shape.iter().fold(dtype.size_in_bytes(), |n, &size| n.saturating_mul(size));
    if missing || bytes >= LARGE {
        check_room("vb", shape, dtype, vb.device())?;
    }
    let get = |dtype| vb.get_with_hints_dtype(shape, name, Default::default(), dtype);
    let tensor = get(dtype)?;
    let path = vb.prefix().split('.').filter(|part| !part.is_empty()).chain([name]).collect::<Vec<_>>().join(".");
    // Where a missing tensor is no error it was made now, as a variable: candle's own initializations have neither a
    // seed nor what the paper asks for.
    if missing && tensor.is_variable() {
        let values = initial.draw(shape, &mut random(seed, &path))?;
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
    check_float("vb", &path, tensor.dtype())?;
    Ok(tensor)
}

/// A source of random numbers for one parameter. That of another does not change with it, whatever is built first.
fn random(seed: u64, path: &str) -> StdRng {
    // A name of one part begins with a point: by this the draws of a seed have been what they are.
    let point = if path.contains('.') { "" } else { "." };
    // FNV-1a: the standard library's hash may differ from one version to the next.
    let hash = point
        .bytes()
        .chain(path.bytes())
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    StdRng::seed_from_u64(hash ^ seed.rotate_left(32))
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
    /// The logarithms of step sizes spread log-uniformly.
    LogStepSizes {
        min: f64,
        max: f64,
    },
    /// The same numbers in every row.
    Rows(SystemRow),
    /// What softplus takes to step sizes spread log-uniformly.
    StepSizes {
        min: f64,
        max: f64,
        floor: f64,
    },
}

/// What every channel of a linear time-invariant system begins with.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SystemRow {
    /// The logarithms of the decay rates of eigenvalues.
    LogDecay(System),
    /// Their frequencies.
    Frequency(System),
    /// Complex numbers that enter the state: ones for a diagonal system, and those of a measure.
    Input(System),
    /// The vectors of low rank of a measure, one after another.
    Correction(Measure),
}

/// A system that training begins from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum System {
    Diagonal(crate::lti::hippo::Initial),
    LowRank(Measure),
}

impl System {
    fn eigenvalues(self, pairs: usize) -> Result<Vec<Complex64>> {
        Ok(match self {
            Self::Diagonal(initial) => initial.eigenvalues(pairs)?,
            Self::LowRank(measure) => measure.low_rank(2 * pairs)?.diagonal().a().to_vec(),
        })
    }
}

impl SystemRow {
    /// The numbers of a row of `len`, or of some.
    fn numbers(self, len: usize) -> Result<Vec<f32>> {
        // A rate of zero has no logarithm: such states forget in 10,000 units of time.
        let log_decay = |a: &Complex64| (-a.re).max(1e-4).ln() as f32;
        let parts = |numbers: &[Complex64]| numbers.iter().flat_map(|x| [x.re as f32, x.im as f32]).collect();
        Ok(match self {
            Self::LogDecay(system) => system.eigenvalues(len)?.iter().map(log_decay).collect(),
            Self::Frequency(system) => system.eigenvalues(len)?.iter().map(|a| a.im as f32).collect(),
            Self::Input(System::Diagonal(_)) => [1.0, 0.0].repeat(len / 2),
            Self::Input(System::LowRank(measure)) => parts(measure.low_rank(len)?.diagonal().b()),
            Self::Correction(measure) => parts(&measure.low_rank(len)?.p().concat()),
        })
    }
}

impl Initial {
    /// As PyTorch begins a linear layer or a convolution that sums over `fan_in` terms, divided by `divisor`.
    pub fn linear(fan_in: usize, divisor: f64) -> Self {
        Self::Uniform(1.0 / (fan_in as f64).sqrt() / divisor)
    }

    fn draw(self, shape: &[usize], random: &mut StdRng) -> Result<Vec<f32>> {
        let count = shape.iter().product();
        let mut values = Vec::new();
        if values.try_reserve_exact(count).is_err() {
            return Err(argument("vb", "parameters that fit in memory", format_args!("one of shape {shape:?}")));
        }
        let mut uniform = || random.random::<f64>();
        let last = shape.last().copied().unwrap_or(1);
        let row = match self {
            Self::Rows(row) => row.numbers(last)?,
            _ => Vec::new(),
        };
        values.extend((0..count).map(|i| match self {
            Self::Constant(value) => value,
            Self::Uniform(bound) => ((2.0 * uniform() - 1.0) * bound) as f32,
            // Box and Muller's transform; 1 - uniform lies above 0, where the logarithm is finite.
            Self::Normal(deviation) => {
                let radius = (-2.0 * (1.0 - uniform()).ln()).sqrt();
                (radius * (std::f64::consts::TAU * uniform()).cos() * deviation) as f32
            }
            Self::LogOfIndex => ((i % last + 1) as f64).ln() as f32,
            Self::LogStepSizes { min, max } => (min.ln() + uniform() * (max.ln() - min.ln())) as f32,
            Self::Rows(_) => row[i % row.len()],
            Self::StepSizes { min, max, floor } => {
                let step = (min.ln() + uniform() * (max.ln() - min.ln())).exp().max(floor);
                // ln(e^step - 1), written so that it does not cancel.
                (step + (-(-step).exp_m1()).ln()) as f32
            }
        }));
        Ok(values)
    }
}
