//! AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with clipped gradients.

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Error, Result, Tensor, Var};
use candle_nn::VarMap;

use crate::nn::argument;

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
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip: None }
    }
}

/// How the variables of a group are trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// What the learning rate of a step is multiplied by.
    pub learning_rate: f64,
    /// How much decays in a step, for a learning rate of 1.
    pub weight_decay: f64,
}

/// AdamW over named variables. Unlike candle-nn's, it clips gradients, has groups, and gives its state to be saved, so that
/// a run can go on exactly where it stopped.
///
/// Moments are `f32` for variables of a half type, which are rounded after each step.
#[derive(Debug)]
pub struct AdamW {
    /// By name, so that sums over them are taken in the same order in every run.
    parameters: Vec<Trained>,
    config: AdamWConfig,
    /// Steps taken.
    steps: i32,
}

#[derive(Debug)]
struct Trained {
    name: String,
    variable: Var,
    /// Running means of the gradient and of its square.
    moments: [Tensor; 2],
    group: Group,
}

/// The names of the moments in a file.
const MOMENTS: [&str; 2] = ["mean", "mean_square"];

impl AdamW {
    /// An optimizer that has seen no gradients yet. Of the variables decay those whose names end in `_proj.weight`, the
    /// matrices of linear layers: norms, biases, embeddings, A and D are what they are.
    ///
    /// # Errors
    /// A number that makes no optimizer, by name.
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
    /// A number that makes no optimizer, by name.
    pub fn with_groups(variables: &VarMap, config: AdamWConfig, group: impl Fn(&str) -> Group) -> Result<Self> {
        let AdamWConfig { beta1, beta2, eps, weight_decay, clip } = config;
        for (name, beta) in [("beta1", beta1), ("beta2", beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(argument(name, "0 or more and below 1", beta));
            }
        }
        check_not_negative("eps", eps)?;
        check_not_negative("weight_decay", weight_decay)?;
        if let Some(clip) = clip
            && !(clip > 0.0 && clip.is_finite())
        {
            return Err(argument("clip", "a norm above 0", clip));
        }
        let variables = variables.data().lock().map_err(|_| Error::msg("the lock of the variables is poisoned"))?;
        let mut parameters = Vec::new();
        for (name, variable) in variables.iter() {
            let group = group(name);
            check_not_negative("learning_rate", group.learning_rate)?;
            check_not_negative("weight_decay", group.weight_decay)?;
            let zeros = || Tensor::zeros(variable.shape(), moment_dtype(variable.dtype()), variable.device());
            let (name, moments) = (name.clone(), [zeros()?, zeros()?]);
            parameters.push(Trained { name, variable: variable.clone(), moments, group });
        }
        parameters.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { parameters, config, steps: 0 })
    }

    /// Takes a step, and gives the norm that the gradients had before they were clipped, all together.
    ///
    /// # Errors
    /// A variable without a gradient, by name; gradients that are not finite; a learning rate that is negative or not
    /// finite. Nothing is changed then.
    pub fn step(&mut self, gradients: &GradStore, learning_rate: f64) -> Result<f64> {
        check_not_negative("learning_rate", learning_rate)?;
        let mut squares = Vec::with_capacity(self.parameters.len());
        for parameter in &self.parameters {
            squares.push(parameter.gradient(gradients)?.sqr()?.sum_all()?.to_dtype(DType::F32)?);
        }
        if squares.is_empty() {
            return Ok(0.0);
        }
        let norm = f64::from(Tensor::stack(&squares, 0)?.sum_all()?.to_scalar::<f32>()?).sqrt();
        if !norm.is_finite() {
            return Err(Error::msg("the gradients are not finite: a lower learning rate may help"));
        }
        let shrink = self.config.clip.map_or(1.0, |clip| (clip / norm).min(1.0));

        self.steps = self.steps.saturating_add(1);
        let AdamWConfig { beta1, beta2, eps, .. } = self.config;
        let [correction1, correction2] = [beta1, beta2].map(|beta| 1.0 - beta.powi(self.steps));
        for parameter in &mut self.parameters {
            let gradient = (parameter.gradient(gradients)? * shrink)?;
            let Trained { variable, moments: [mean, mean_square], group, .. } = parameter;
            *mean = ((&*mean * beta1)? + (&gradient * (1.0 - beta1))?)?;
            *mean_square = ((&*mean_square * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
            let scale = (mean_square.sqrt()? * correction2.sqrt().recip())?.affine(1.0, eps)?;
            let learning_rate = learning_rate * group.learning_rate;
            let change = (&*mean / scale)?.affine(learning_rate / correction1, 0.0)?;
            let kept =
                (variable.as_detached_tensor().to_dtype(mean.dtype())? * (1.0 - learning_rate * group.weight_decay))?;
            variable.set(&(kept - change)?.to_dtype(variable.dtype())?)?;
        }
        Ok(norm)
    }

    /// Adds the gradients of another part of a batch to those of the parts before, for the variables that are trained. For
    /// the mean over `n` parts, divide each part's loss by `n`.
    ///
    /// # Errors
    /// A variable without a gradient, by name.
    pub fn accumulate(&self, total: &mut GradStore, gradients: &GradStore) -> Result<()> {
        for parameter in &self.parameters {
            let sum = (total.get(&parameter.variable).ok_or_else(|| parameter.missing())?
                + gradients.get(&parameter.variable).ok_or_else(|| parameter.missing())?)?;
            total.insert(&parameter.variable, sum);
        }
        Ok(())
    }

    /// Steps taken.
    pub fn steps(&self) -> usize {
        self.steps as usize
    }

    /// The moments by name, `NAME.mean` and `NAME.mean_square` for each variable. With the number of [steps](Self::steps)
    /// they are the optimizer's state.
    pub fn moments(&self) -> HashMap<String, Tensor> {
        let named = |parameter: &Trained| {
            let names = MOMENTS.map(|moment| format!("{}.{moment}", parameter.name));
            names.into_iter().zip(parameter.moments.clone()).collect::<Vec<_>>()
        };
        self.parameters.iter().flat_map(named).collect()
    }

    /// Goes on from the moments after that many steps. The bits of what follows are those of a run that did not stop.
    ///
    /// # Errors
    /// A moment that is missing, or of another shape or type, by name. Nothing is changed then.
    pub fn restore(&mut self, mut moments: HashMap<String, Tensor>, steps: usize) -> Result<()> {
        let steps = i32::try_from(steps).map_err(|_| argument("steps", "fewer than 2^31", steps))?;
        let mut restored = Vec::with_capacity(self.parameters.len());
        for parameter in &self.parameters {
            let mut found = parameter.moments.clone();
            for (to, moment) in found.iter_mut().zip(MOMENTS) {
                let name = format!("{}.{moment}", parameter.name);
                let from = moments.remove(&name).ok_or_else(|| Error::msg(format_args!("there is no `{name}`")))?;
                let describe = |tensor: &Tensor| format!("{:?} of {}", tensor.dims(), tensor.dtype().as_str());
                if describe(&from) != describe(to) {
                    let expected = format_args!("`{name}` {}", describe(to));
                    return Err(argument("moments", expected, describe(&from)));
                }
                *to = from.to_device(to.device())?;
            }
            restored.push(found);
        }
        for (parameter, moments) in self.parameters.iter_mut().zip(restored) {
            parameter.moments = moments;
        }
        self.steps = steps;
        Ok(())
    }
}

impl Trained {
    /// Its gradient, in the type of the moments. It is detached, for moments that were computed from it within candle's
    /// graph would keep what every step of a run has computed.
    fn gradient(&self, gradients: &GradStore) -> Result<Tensor> {
        let gradient = gradients.get(&self.variable).ok_or_else(|| self.missing())?;
        gradient.detach().to_dtype(self.moments[0].dtype())
    }

    fn missing(&self) -> Error {
        argument("gradients", format_args!("one for `{}`", self.name), "none")
    }
}

fn moment_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

fn check_not_negative(name: &'static str, value: f64) -> Result<()> {
    if value >= 0.0 && value.is_finite() { Ok(()) } else { Err(argument(name, "a finite number, 0 or more", value)) }
}
