//! The convolution in `f64`, one channel and step after another: the equations and nothing else.
//!
//! The *line* of a channel is its initial state followed by its inputs, in the direction of the convolution. Output `t`
//! is made of the line from `t` to `t + width - 1`, and the final state is the line's end.

use super::update::POOL_NAMES;
use super::{Gradients, Inputs, Output, OutputGradients, Problem, UpdateInputs, UpdateOutput};
use crate::arguments::zeroed;
use crate::reference::{silu, silu_slope};
use crate::sequences::Sequence;
use crate::{Element, Result, View};

/// Runs the convolution. The results are what exact arithmetic on the inputs would give, to about 15 digits.
pub fn forward<T: Element>(inputs: &Inputs<T>) -> Result<Output<f64, f64>> {
    let problem = inputs.check()?;
    let [_, len, d_inner] = inputs.x.shape;
    let mut output = Output::zeroed_for(&problem)?;
    for sequence in problem.sequences.iter() {
        for d in 0..d_inner {
            let filter = Filter::read(&inputs.weight, &inputs.bias, d);
            let line = line(&problem, sequence, d);
            for (i, window) in line.windows(problem.width).enumerate() {
                let sum = filter.apply(window);
                let step = sequence.step(i, inputs.options.reverse);
                output.out[(sequence.batch * len + step) * d_inner + d] =
                    if inputs.options.silu { silu(sum) } else { sum };
            }
            for (j, x) in line[sequence.len..].iter().enumerate() {
                output.final_state[state_index(&problem, sequence, j, d)] = *x;
            }
        }
    }
    Ok(output)
}

/// The gradient of every input that was given, by the chain rule through the same sums.
pub fn backward<'a, T: Element>(
    inputs: &Inputs<T>,
    d_outputs: impl Into<OutputGradients<'a, T>>,
) -> Result<Gradients<f64, f64>> {
    let d_outputs = d_outputs.into();
    let problem = inputs.check()?;
    problem.check_output_gradients(&d_outputs)?;
    let ([_, len, d_inner], width) = (inputs.x.shape, problem.width);
    let mut grad: Gradients<f64, f64> = problem.zero_gradients()?;
    // As in the scan's reference.
    if len == 0 && grad.initial_state.is_none() {
        return Ok(grad);
    }
    for sequence in problem.sequences.iter() {
        for d in 0..d_inner {
            let filter = Filter::read(&inputs.weight, &inputs.bias, d);
            let line = line(&problem, sequence, d);
            let mut d_line = vec![0.0; line.len()];
            for (i, window) in line.windows(width).enumerate() {
                let step = sequence.step(i, inputs.options.reverse);
                let mut d_sum = f64::from(d_outputs.d_out.at([sequence.batch, step, d]));
                if inputs.options.silu {
                    d_sum *= silu_slope(filter.apply(window));
                }
                for k in 0..width {
                    grad.weight[d * width + k] += d_sum * window[k];
                    d_line[i + k] += d_sum * filter.weight[k];
                }
                if let Some(bias) = &mut grad.bias {
                    bias[d] += d_sum;
                }
            }
            if let Some(view) = &d_outputs.d_final_state {
                for j in 0..width - 1 {
                    d_line[sequence.len + j] += f64::from(view.at([sequence.index, j, d]));
                }
            }
            if let Some(state) = &mut grad.initial_state {
                for j in 0..width - 1 {
                    state[state_index(&problem, sequence, j, d)] = d_line[j];
                }
            }
            for (i, d_x) in d_line[width - 1..].iter().enumerate() {
                let step = sequence.step(i, inputs.options.reverse);
                grad.x[(sequence.batch * len + step) * d_inner + d] = *d_x;
            }
        }
    }
    Ok(grad)
}

/// Runs an update without writing to the pool: the state after each token is returned instead, not rounded. The
/// results of padding rows are zero.
pub fn update<T: Element, St: Element>(inputs: &UpdateInputs<T>, state: View<St, 3>) -> Result<UpdateOutput<f64, f64>> {
    let problem = inputs.check()?;
    let ([batch, tokens, d_inner], width) = (inputs.x.shape, problem.width);
    state.check("state", POOL_NAMES[0], [state.shape[0], width - 1, d_inner])?;
    let slots = inputs.slots;
    slots.check(batch, state.shape[0])?;
    let mut output =
        UpdateOutput { out: zeroed("x", &inputs.x.shape)?, token_states: zeroed("x", &problem.token_state_shape())? };
    // Without tokens there may be more rows than can be counted through.
    let rows = (0..if tokens == 0 { 0 } else { batch }).filter_map(|row| Some((row, slots.get(row)?)));
    for (row, slot) in rows {
        for d in 0..d_inner {
            let filter = Filter::read(&inputs.weight, &inputs.bias, d);
            let before = (0..width - 1).map(|j| state.at([slot, j, d]));
            let line: Vec<f64> = before.chain((0..tokens).map(|t| inputs.x.at([row, t, d]))).map(f64::from).collect();
            for (t, window) in line.windows(width).enumerate() {
                let sum = filter.apply(window);
                output.out[(row * tokens + t) * d_inner + d] = if inputs.silu { silu(sum) } else { sum };
                for (j, x) in window[1..].iter().enumerate() {
                    output.token_states[((row * tokens + t) * (width - 1) + j) * d_inner + d] = *x;
                }
            }
        }
    }
    Ok(output)
}

/// One channel's filter.
struct Filter {
    weight: Vec<f64>,
    bias: f64,
}

impl Filter {
    fn read(weight: &View<f32, 2>, bias: &Option<View<f32, 1>>, d: usize) -> Self {
        let weight = (0..weight.shape[1]).map(|k| weight.at([d, k]).into()).collect();
        Self { weight, bias: bias.map_or(0.0, |bias| bias.at([d]).into()) }
    }

    fn apply(&self, window: &[f64]) -> f64 {
        self.bias + self.weight.iter().zip(window).map(|(w, x)| w * x).sum::<f64>()
    }
}

fn line<T: Element>(problem: &Problem<T>, sequence: Sequence, d: usize) -> Vec<f64> {
    let Problem { inputs, width, .. } = problem;
    let before = (0..width - 1).map(|j| inputs.initial_state.map_or(0.0, |state| state.at([sequence.index, j, d])));
    let steps = (0..sequence.len).map(|i| sequence.step(i, inputs.options.reverse));
    before.chain(steps.map(|step| inputs.x.at([sequence.batch, step, d]))).map(f64::from).collect()
}

/// Where row `j` of one channel lies in a dense state.
fn state_index<T: Element>(problem: &Problem<T>, sequence: Sequence, j: usize, d: usize) -> usize {
    (sequence.index * (problem.width - 1) + j) * problem.d_inner() + d
}
