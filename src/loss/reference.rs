//! The loss in `f64`, one row and one logit after another: the equations and nothing else.

use super::{IGNORED, Inputs};
use crate::arguments::zeroed;
use crate::{Element, Result};

/// The loss of each row.
///
/// # Errors
/// An argument that does not fit.
pub fn losses<T: Element>(inputs: &Inputs<T>) -> Result<Vec<f64>> {
    let problem = inputs.check()?;
    let mut losses = zeroed("logits", &[problem.rows])?;
    let (smoothing, z_loss) = (f64::from(problem.options.label_smoothing), f64::from(problem.options.z_loss));
    for (row, loss) in losses.iter_mut().enumerate() {
        *loss = match inputs.targets[row] {
            IGNORED => 0.0,
            target if target as usize >= problem.vocab => f64::NAN,
            target => {
                let x = logits(inputs, row);
                let lse = log_sum_exp(&x);
                let mut loss = (1.0 - smoothing) * (lse - x[target as usize]) + z_loss * lse * lse;
                // Else a logit of -inf would be multiplied by zero.
                if smoothing > 0.0 {
                    loss += smoothing * (lse - x.iter().sum::<f64>() / x.len() as f64);
                }
                loss
            }
        };
    }
    Ok(losses)
}

/// The gradient of the sum of all losses times `scale`, `(rows, vocab)`.
///
/// # Errors
/// An argument that does not fit.
pub fn gradient<T: Element>(inputs: &Inputs<T>, scale: f64) -> Result<Vec<f64>> {
    let problem = inputs.check()?;
    let mut gradient = zeroed("logits", &[problem.rows, problem.vocab])?;
    let (smoothing, z_loss) = (f64::from(problem.options.label_smoothing), f64::from(problem.options.z_loss));
    for (row, gradient) in gradient.chunks_exact_mut(problem.vocab).enumerate() {
        match inputs.targets[row] {
            IGNORED => {}
            target if target as usize >= problem.vocab => gradient.fill(f64::NAN),
            target => {
                let x = logits(inputs, row);
                let lse = log_sum_exp(&x);
                for (v, (gradient, x)) in gradient.iter_mut().zip(&x).enumerate() {
                    let softmax = (x - lse).exp();
                    let label = if v == target as usize { 1.0 - smoothing } else { 0.0 };
                    let smooth = smoothing / problem.vocab as f64;
                    *gradient = scale * (softmax * (1.0 + 2.0 * z_loss * lse) - label - smooth);
                }
            }
        }
    }
    Ok(gradient)
}

fn logits<T: Element>(inputs: &Inputs<T>, row: usize) -> Vec<f64> {
    (0..inputs.logits.shape[1]).map(|v| f64::from(inputs.logits.at([row, v]))).collect()
}

/// log Σ exp(x)
fn log_sum_exp(x: &[f64]) -> f64 {
    let greatest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    greatest + x.iter().map(|x| (x - greatest).exp()).sum::<f64>().ln()
}
