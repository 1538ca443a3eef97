//! A step in `f64`, one parameter and element after another: the equations and nothing else.

use super::{Group, Options};

/// A parameter and its moments, which are zero at first.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// Its values.
    pub values: Vec<f64>,
    /// The running mean of each gradient.
    pub mean: Vec<f64>,
    /// The running mean of its square.
    pub mean_square: Vec<f64>,
    /// How it is trained.
    pub group: Group,
}

impl Parameter {
    /// A parameter that has not been trained.
    pub fn new(values: Vec<f64>, group: Group) -> Self {
        let zeros = vec![0.0; values.len()];
        Self { mean: zeros.clone(), mean_square: zeros, values, group }
    }
}

/// Takes step `t`, counted from 1, by the gradients of a loss that was multiplied by `scale`, and gives their norm. Gradients
/// that are not finite change nothing. Nothing is rounded, to half types neither.
///
/// # Panics
/// If there is not a gradient for each element.
pub fn step(
    options: &Options,
    learning_rate: f64,
    t: i32,
    scale: f64,
    parameters: &mut [Parameter],
    gradients: &[Vec<f64>],
) -> f64 {
    assert_eq!(parameters.len(), gradients.len());
    let divisor = scale * options.divisor;
    let norm = gradients.iter().flatten().map(|g| g * g).sum::<f64>().sqrt() / divisor;
    if !norm.is_finite() {
        return norm;
    }
    let shrink = options.clip.map_or(1.0, |clip| if norm > clip { clip / norm } else { 1.0 });
    let Options { beta1, beta2, eps, .. } = *options;
    for (parameter, gradients) in parameters.iter_mut().zip(gradients) {
        assert_eq!(parameter.values.len(), gradients.len());
        let rate = learning_rate * parameter.group.learning_rate;
        for (i, g) in gradients.iter().enumerate() {
            let g = g * shrink / divisor;
            let (m, v) = (&mut parameter.mean[i], &mut parameter.mean_square[i]);
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            let (m, v) = (*m / (1.0 - beta1.powi(t)), *v / (1.0 - beta2.powi(t)));
            let w = &mut parameter.values[i];
            *w = (1.0 - rate * parameter.group.weight_decay) * *w - rate * m / (v.sqrt() + eps);
        }
    }
    norm
}
