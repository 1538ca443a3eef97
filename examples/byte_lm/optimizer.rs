//! AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with clipped gradients.
//!
//! candle-nn's own keeps its moments to itself, and a run that is to go on exactly where it stopped needs them.

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{Error, Result, Tensor, Var};
use candle_nn::VarMap;

const BETA1: f64 = 0.9;
/// Below the usual 0.999: a short run has no time for so long a memory.
const BETA2: f64 = 0.95;
const EPS: f64 = 1e-8;

pub struct AdamW {
    /// By name, so that sums over them are taken in the same order in every run.
    parameters: Vec<Parameter>,
    weight_decay: f64,
    clip: f64,
    /// Steps taken.
    steps: i32,
}

struct Parameter {
    name: String,
    variable: Var,
    /// Running means of the gradient and of its square.
    moments: [Tensor; 2],
    decays: bool,
}

/// The names of the moments in a file.
const MOMENTS: [&str; 2] = ["mean", "mean_square"];

impl AdamW {
    /// An optimizer that has seen no gradients yet. Those whose norm, all together, is above `clip` are shrunk to it.
    pub fn new(variables: &VarMap, weight_decay: f64, clip: f64) -> Result<Self> {
        let variables = variables.data().lock().map_err(|_| Error::msg("the lock of the variables is poisoned"))?;
        let mut parameters = Vec::new();
        for (name, variable) in variables.iter() {
            let moments = [variable.zeros_like()?, variable.zeros_like()?];
            // The matrices of linear layers alone: norms, biases, the embeddings, A and D are what they are.
            let decays = name.ends_with("_proj.weight");
            parameters.push(Parameter { name: name.clone(), variable: variable.clone(), moments, decays });
        }
        parameters.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { parameters, weight_decay, clip, steps: 0 })
    }

    /// Takes a step, and gives the gradients' norm before they were clipped.
    pub fn step(&mut self, gradients: &GradStore, learning_rate: f64) -> Result<f64> {
        let missing = |name: &str| Error::msg(format_args!("`{name}` has no gradient"));
        let mut squares = Vec::with_capacity(self.parameters.len());
        for Parameter { name, variable, .. } in &self.parameters {
            squares.push(gradients.get(variable).ok_or_else(|| missing(name))?.sqr()?.sum_all()?);
        }
        let norm = f64::from(Tensor::stack(&squares, 0)?.sum_all()?.to_scalar::<f32>()?).sqrt();
        if !norm.is_finite() {
            return Err(Error::msg("the gradients are not finite: a lower learning rate may help"));
        }
        let shrink = (self.clip / norm).min(1.0);

        self.steps += 1;
        let [correction1, correction2] = [BETA1, BETA2].map(|beta| 1.0 - beta.powi(self.steps));
        for Parameter { name, variable, moments: [mean, mean_square], decays } in &mut self.parameters {
            let gradient = (gradients.get(variable).ok_or_else(|| missing(name))? * shrink)?;
            *mean = ((&*mean * BETA1)? + (&gradient * (1.0 - BETA1))?)?;
            *mean_square = ((&*mean_square * BETA2)? + (gradient.sqr()? * (1.0 - BETA2))?)?;
            let scale = (mean_square.sqrt()? * correction2.sqrt().recip())?.affine(1.0, EPS)?;
            let change = (&*mean / scale)?.affine(learning_rate / correction1, 0.0)?;
            let decay = if *decays { learning_rate * self.weight_decay } else { 0.0 };
            variable.set(&((variable.as_detached_tensor() * (1.0 - decay))? - change)?)?;
        }
        Ok(norm)
    }

    /// The moments by name.
    pub fn moments(&self) -> HashMap<String, Tensor> {
        let named = |parameter: &Parameter| {
            let names = MOMENTS.map(|moment| format!("{}.{moment}", parameter.name));
            names.into_iter().zip(parameter.moments.clone()).collect::<Vec<_>>()
        };
        self.parameters.iter().flat_map(named).collect()
    }

    /// Goes on from the moments behind so many steps.
    pub fn restore(&mut self, mut moments: HashMap<String, Tensor>, steps: usize) -> Result<()> {
        for parameter in &mut self.parameters {
            for (to, moment) in parameter.moments.iter_mut().zip(MOMENTS) {
                let name = format!("{}.{moment}", parameter.name);
                let from = moments.remove(&name).ok_or_else(|| Error::msg(format_args!("there is no `{name}`")))?;
                if from.shape() != to.shape() || from.dtype() != to.dtype() {
                    return Err(Error::msg(format_args!("`{name}` is {:?}, not {:?}", from.shape(), to.shape())));
                }
                *to = from;
            }
        }
        self.steps = i32::try_from(steps).map_err(|_| Error::msg("too many steps"))?;
        Ok(())
    }
}

/// The learning rate of a step: it rises linearly for `warmup` steps, then falls along a cosine to a tenth.
pub fn learning_rate(highest: f64, step: usize, warmup: usize, steps: usize) -> f64 {
    if step < warmup {
        return highest * (step + 1) as f64 / warmup as f64;
    }
    let progress = (step - warmup) as f64 / (steps - warmup).max(1) as f64;
    highest * (0.1 + 0.9 * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()))
}
