//! The long convolution in `f64`, as the sum that it is.

use super::check::ACTIVATION_NAMES;
use super::{Gradients, Inputs};
use crate::arguments::{check_exchanged, zeroed};
use crate::{Element, Result, View};

/// Runs the convolution.
pub fn forward<T: Element>(inputs: &Inputs<T>) -> Result<Vec<f64>> {
    let problem = inputs.check()?;
    let mut out = zeroed("u", &inputs.u.shape)?;
    for_each_term(inputs, &problem.sequences, |to, from, _, weight| {
        let [row, _, channel] = from;
        out[(row * problem.sizes.length + to) * problem.sizes.d_inner + channel] +=
            weight * f64::from(inputs.u.at(from));
    });
    Ok(out)
}

/// The gradient of every input that was given.
pub fn backward<T: Element>(inputs: &Inputs<T>, d_out: View<T, 3>) -> Result<Gradients<f64, f64>> {
    let problem = inputs.check()?;
    check_exchanged("d_out", ACTIVATION_NAMES, &d_out, inputs.u.shape)?;
    let mut grad: Gradients<f64, f64> = problem.zero_gradients()?;
    let sizes = problem.sizes;
    for_each_term(inputs, &problem.sequences, |to, from, k, weight| {
        let [row, step, channel] = from;
        let (d, u) = (f64::from(d_out.at([row, to, channel])), f64::from(inputs.u.at(from)));
        grad.u[(row * sizes.length + step) * sizes.d_inner + channel] += weight * d;
        match (k, &mut grad.d) {
            (Some(k), _) => grad.kernel[channel * sizes.kernel_length + k] += d * u,
            (None, Some(skip)) => skip[channel] += d * u,
            (None, None) => {}
        }
    });
    Ok(grad)
}

/// Calls `term` for each product that is summed up: with the step that it is added to, where its input is, the lag of
/// its weight in the kernel (none of the skip connection), and the weight.
fn for_each_term<T: Element>(
    inputs: &Inputs<T>,
    sequences: &crate::sequences::Sequences,
    mut term: impl FnMut(usize, [usize; 3], Option<usize>, f64),
) {
    // Batch rows without a step could be more than can be counted through.
    let count = if inputs.u.shape[1] == 0 { 0 } else { sequences.count() };
    for sequence in (0..count).map(|i| sequences.get(i)) {
        let step = |i: usize| sequence.step(i, inputs.reverse);
        for channel in 0..inputs.u.shape[2] {
            for t in 0..sequence.len {
                if let Some(d) = &inputs.d {
                    term(step(t), [sequence.batch, step(t), channel], None, d.at([channel]).into());
                }
                for k in 0..(t + 1).min(inputs.kernel.shape[1]) {
                    let weight = inputs.kernel.at([channel, k]).into();
                    term(step(t), [sequence.batch, step(t - k), channel], Some(k), weight);
                }
            }
        }
    }
}
