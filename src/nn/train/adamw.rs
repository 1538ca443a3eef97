//! AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over named variables.

use std::collections::{HashMap, HashSet};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::VarMap;

use crate::candle::AdamWState;
use crate::nn::argument;
use crate::optimizer::{Options, Status};

pub use crate::optimizer::Group;

/// What an [`AdamW`] computes with, beside the learning rate of each step. Fields may be added: end with
/// `..AdamWConfig::default()`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// The share of the mean of gradients that a step keeps, 0.9.
    pub beta1: f64,
    /// The share of the mean of their squares that a step keeps. 0.95 by default, as for language models; 0.999 in the
    /// paper, whose memory is as long as many a whole run.
    pub beta2: f64,
    /// Added to the root of the mean of squares, 1e-8.
    pub eps: f64,
    /// How much of a variable decays in a step, for a learning rate of 1: 0.1. It is that of the matrices of linear layers
    /// alone, unless groups say otherwise.
    pub weight_decay: f64,
    /// Gradients whose norm, all together, is above this are shrunk to it.
    pub clip: Option<f64>,
    /// The scale of losses; see [`AdamW::scaled`].
    pub loss_scale: Option<LossScale>,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: None, loss_scale: None }
    }
}

/// What losses are multiplied by before their gradients are taken, so that those of a model in `f16`, of which the least is
/// 6e-8, do not vanish (Micikevicius et al. 2018, arXiv 1710.03740). `bf16` has the range of `f32` and needs none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossScale {
    /// The scale of the first step, a power of two from 1 to 2^30: 65,536.
    pub first: f32,
    /// After so many steps in a row with finite gradients the scale doubles, 2,000. After any other it is halved.
    pub interval: u32,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { first: 65_536.0, interval: 2000 }
    }
}

/// AdamW over named variables, as [`optimizer`](crate::optimizer) says: a few launches on a GPU for all of them together, one
/// pass on processors. Unlike candle-nn's, it clips gradients, has groups, and gives its state to be saved, so that a run can
/// go on exactly where it stopped.
///
/// Moments are `f32`. Variables of a half type have masters in `f32`, of which they are the rounded values after each step, so
/// that small steps add up.
///
/// A step whose gradients are not all finite is skipped: nothing changes but the count of such steps
/// ([`status`](Self::status)). Nothing waits for the device, so it shows in the norm that the step gives.
#[derive(Debug)]
pub struct AdamW {
    /// Of the variables, in order, so that sums over them are taken in the same order in every run.
    names: Vec<String>,
    groups: Vec<Group>,
    state: AdamWState,
    config: AdamWConfig,
    /// Steps taken or skipped.
    steps: usize,
}

/// The names of the moments in a file, of the master and of the status.
const MOMENTS: [&str; 2] = ["mean", "mean_square"];
const MASTER: &str = "master";
const STATUS: &str = "status";

impl AdamW {
    /// An optimizer that has seen no gradients yet. Of the variables decay those whose names end in `_proj.weight`, the
    /// matrices of linear layers: norms, biases, embeddings, A and D are what they are.
    ///
    /// # Errors
    /// A number that makes no optimizer, by name; variables that are not `f32`, `f16` or `bf16`, not contiguous, or on several
    /// devices.
    pub fn new(variables: &VarMap, config: AdamWConfig) -> Result<Self> {
        let decay = |name: &str| if name.ends_with("_proj.weight") { config.weight_decay } else { 0.0 };
        Self::with_groups(variables, config, |name| Group { learning_rate: 1.0, weight_decay: decay(name) })
    }

    /// An optimizer whose variables are in the groups that `group` gives for their names:
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use candle_nn::{VarBuilder, VarMap};
    /// # use selective_scan::nn::train::{AdamW, AdamWConfig, Group};
    /// # use selective_scan::nn::{LanguageModel, LanguageModelConfig};
    /// # let variables = VarMap::new();
    /// # let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    /// # LanguageModel::new(&LanguageModelConfig::new(16, 2, 32), vb)?;
    /// // The parameters of the state space model itself learn slowly, and nothing of them decays.
    /// let ssm = ["A_log", "D", "dt_proj.bias"];
    /// let optimizer = AdamW::with_groups(&variables, AdamWConfig::default(), |name| {
    ///     let slow = ssm.iter().any(|end| name.ends_with(end));
    ///     if slow { Group { learning_rate: 0.1, weight_decay: 0.0 } } else { Group { learning_rate: 1.0, weight_decay: 0.1 } }
    /// })?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// A number that makes no optimizer, by name; variables that are not `f32`, `f16` or `bf16`, not contiguous, or on several
    /// devices.
    pub fn with_groups(variables: &VarMap, config: AdamWConfig, group: impl Fn(&str) -> Group) -> Result<Self> {
        config.options().check()?;
        check_not_negative("weight_decay", config.weight_decay)?;
        let variables = variables.data().lock().map_err(|_| Error::msg("the lock of the variables is poisoned"))?;
        let mut named: Vec<(&String, &Var)> = variables.iter().collect();
        named.sort_by_key(|(name, _)| *name);
        // What stands under several names is one variable.
        let mut ids = HashSet::new();
        named.retain(|(_, variable)| ids.insert(variable.id()));
        let mut groups = Vec::with_capacity(named.len());
        for (name, variable) in &named {
            if !matches!(variable.dtype(), DType::F32 | DType::F16 | DType::BF16) {
                let got = format_args!("`{name}` of {}", variable.dtype().as_str()).to_string();
                return Err(argument("variables", "variables of f32, f16 or bf16", got));
            }
            let group = group(name);
            group.check()?;
            groups.push(group);
        }
        let mut state = AdamWState::new(&named.iter().map(|(_, variable)| (*variable).clone()).collect::<Vec<_>>())?;
        if let Some(LossScale { first, .. }) = config.loss_scale {
            state.set_status(Status { scale: first, ..Status::default() })?;
        }
        let names = named.into_iter().map(|(name, _)| name.clone()).collect();
        Ok(Self { names, groups, state, config, steps: 0 })
    }

    /// A loss times the scale that the next step divides its gradients by; the loss itself if there is
    /// [none](AdamWConfig::loss_scale). The gradients of what this gives are for [`step`](Self::step).
    ///
    /// # Errors
    /// What candle refuses.
    pub fn scaled(&self, loss: &Tensor) -> Result<Tensor> {
        match self.config.loss_scale {
            Some(_) => loss.to_dtype(DType::F32)?.broadcast_mul(&self.state.scale()?),
            None => Ok(loss.clone()),
        }
    }

    /// Takes a step, and gives the norm that the gradients had before they were clipped, all together: a scalar of `f32` on the
    /// device, so that only who reads it waits for the device. It is not finite if the step was skipped.
    ///
    /// # Errors
    /// A variable without a gradient, by name; a learning rate that is negative or not finite. Nothing is changed then.
    pub fn step(&mut self, gradients: &GradStore, learning_rate: f64) -> Result<Tensor> {
        self.step_divided(gradients, 1.0, learning_rate)
    }

    /// [`step`](Self::step) by gradients that are first divided by a number, where they are sums over parts of a batch.
    ///
    /// # Errors
    /// As [`step`](Self::step), and a divisor that is not above 0.
    pub fn step_divided(&mut self, gradients: &GradStore, divisor: f64, learning_rate: f64) -> Result<Tensor> {
        check_not_negative("learning_rate", learning_rate)?;
        let mut found = Vec::with_capacity(self.names.len());
        for (name, variable) in self.names.iter().zip(self.state.variables()) {
            let gradient = gradients.get(variable).ok_or_else(|| missing(name))?;
            found.push(match gradient.dtype() {
                dtype if dtype == variable.dtype() => gradient.clone(),
                _ => gradient.to_dtype(DType::F32)?,
            });
        }
        let options = Options { divisor, ..self.config.options() };
        let norm = self.state.step(&options, learning_rate, &self.groups, &found)?;
        self.steps += 1;
        Ok(norm)
    }

    /// Adds the gradients of another part of a batch to those of the parts before, in `f32`, for the variables that are
    /// trained. For the mean over `n` parts, divide each part's loss by `n`.
    ///
    /// # Errors
    /// A variable without a gradient, by name.
    pub fn accumulate(&self, total: &mut GradStore, gradients: &GradStore) -> Result<()> {
        for (name, variable) in self.names.iter().zip(self.state.variables()) {
            let wide =
                |gradients: &GradStore| gradients.get(variable).ok_or_else(|| missing(name))?.to_dtype(DType::F32);
            let sum = (wide(total)? + wide(gradients)?)?;
            total.insert(variable, sum);
        }
        Ok(())
    }

    /// Steps taken or skipped.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The device that the variables lie on.
    pub fn device(&self) -> &Device {
        self.state.device()
    }

    /// How many steps were taken and how many skipped, and the scale of losses. This waits for the device.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn status(&self) -> Result<Status> {
        self.state.status()
    }

    /// The state by name, on the processor, to be saved: `NAME.mean` and `NAME.mean_square` for each variable, for those of half
    /// types `NAME.master` too, and the numbers of [`status`](Self::status) as `status`.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::new();
        for (index, name) in self.names.iter().enumerate() {
            let (moments, master) = self.state.moments(index)?;
            let moments = MOMENTS.into_iter().zip(moments);
            for (kind, tensor) in moments.chain(master.map(|master| (MASTER, master))) {
                state.insert(format!("{name}.{kind}"), tensor.to_device(&Device::Cpu)?);
            }
        }
        let Status { taken, skipped, streak, scale } = self.status()?;
        let numbers = [taken.cast_signed(), skipped.cast_signed(), streak.cast_signed(), scale as i64];
        state.insert(STATUS.into(), Tensor::new(&numbers, &Device::Cpu)?);
        Ok(state)
    }

    /// Goes on from a [`state`](Self::state) after that many steps, with variables that have their values of then. The bits of
    /// what follows are those of a run that did not stop.
    ///
    /// Without masters these are the variables, and without `status` no step was skipped, as in files of before there were
    /// such.
    ///
    /// # Errors
    /// What is missing, or of another shape or type, by name; another number of steps than the state's. Nothing is changed
    /// then.
    pub fn restore(&mut self, state: HashMap<String, Tensor>, steps: usize) -> Result<()> {
        let describe = |dims: &[usize], dtype: DType| format!("{dims:?} of {}", dtype.as_str());
        let find = |name: &str, dims: &[usize], dtype: DType| match state.get(name) {
            None => Ok(None),
            Some(found) if found.dims() == dims && found.dtype() == dtype => Ok(Some(found)),
            Some(found) => {
                let expected = format!("`{name}` {}", describe(dims, dtype));
                Err(argument("state", expected, describe(found.dims(), found.dtype())))
            }
        };
        let status = match find(STATUS, &[4], DType::I64)? {
            None => Status { taken: steps as u64, ..self.first_status() },
            Some(numbers) => {
                let numbers = numbers.to_vec1::<i64>()?;
                let [taken, skipped, streak] = [numbers[0], numbers[1], numbers[2]].map(|n| u64::try_from(n).ok());
                let (Some(taken), Some(skipped), Some(streak)) = (taken, skipped, streak) else {
                    return Err(argument("state", "counts of 0 or more in `status`", format_args!("{numbers:?}")));
                };
                Status { taken, skipped, streak, scale: numbers[3] as f32 }
            }
        };
        let mut found = Vec::with_capacity(self.names.len());
        for (name, variable) in self.names.iter().zip(self.state.variables()) {
            let mut moments = Vec::with_capacity(2);
            for kind in MOMENTS {
                let name = format!("{name}.{kind}");
                let moment = find(&name, variable.dims(), DType::F32)?;
                moments.push(moment.ok_or_else(|| Error::msg(format_args!("there is no `{name}`")))?);
            }
            found.push((moments, find(&format!("{name}.{MASTER}"), variable.dims(), DType::F32)?));
        }
        if status.taken.checked_add(status.skipped) != Some(steps as u64) {
            let Status { taken, skipped, .. } = status;
            let expected = format!("the steps of the state, {taken} taken and {skipped} skipped");
            return Err(argument("steps", expected, steps));
        }
        self.state.set_status(status)?;
        for (index, (moments, master)) in found.into_iter().enumerate() {
            self.state.set_moments(index, [moments[0], moments[1]])?;
            if self.state.has_master(index) {
                let variable = self.state.variables()[index].as_tensor().clone();
                self.state.set_master(index, master.unwrap_or(&variable))?;
            }
        }
        self.steps = steps;
        Ok(())
    }

    /// The status before any step.
    fn first_status(&self) -> Status {
        Status { scale: self.config.loss_scale.map_or(1.0, |scale| scale.first), ..Status::default() }
    }
}

impl AdamWConfig {
    fn options(&self) -> Options {
        let &Self { beta1, beta2, eps, clip, loss_scale, .. } = self;
        let scale_interval = loss_scale.map(|scale| scale.interval);
        Options { beta1, beta2, eps, clip, scale_interval, ..Options::default() }
    }
}

fn missing(name: &str) -> Error {
    argument("gradients", format_args!("one for `{name}`"), "none")
}

fn check_not_negative(name: &'static str, value: f64) -> Result<()> {
    if value >= 0.0 && value.is_finite() { Ok(()) } else { Err(argument(name, "a finite number, 0 or more", value)) }
}
