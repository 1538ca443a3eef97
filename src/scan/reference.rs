//! The scan in `f64`, one channel, state and step after another: the equations and nothing else.
//!
//! Everything else in the crate is held to this; this is held to finite differences and to PyTorch.

use super::{Gradients, Inputs, Output, OutputGradients, Problem, ProjectionGradient};
use crate::arguments::{Dims, zeroed};
use crate::reference::{silu, silu_slope, softplus};
use crate::sequences::Sequence;
use crate::{Discretization, Element, Projection, Result};

/// Runs the scan. The results are what exact arithmetic on the inputs would give, to about 15 digits.
pub fn forward<T: Element>(inputs: &Inputs<T>) -> Result<Output<f64, f64>> {
    let problem = inputs.check()?;
    let Dims { d_inner, d_state, .. } = problem.dims;
    let mut output = Output::zeroed_for(&problem)?;
    for sequence in problem.sequences.iter() {
        for d in 0..d_inner {
            let channel = Channel { problem: &problem, sequence, d };
            let mut h = channel.initial_state();
            for t in channel.steps() {
                let step = channel.step(t);
                let mut y = step.skip();
                for (n, h) in h.iter_mut().enumerate() {
                    *h = step.decay(n) * *h + step.input_weight(n) * step.b[n] * step.u;
                    y += step.c[n] * *h;
                }
                output.out[channel.index(t)] = y * step.gate.map_or(1.0, silu);
            }
            output.final_state[channel.state_index(0)..][..d_state].copy_from_slice(&h);
        }
    }
    Ok(output)
}

/// The gradient of every input that was given, by the chain rule through the same steps in the opposite order.
pub fn backward<'a, T: Element>(
    inputs: &Inputs<T>,
    d_outputs: impl Into<OutputGradients<'a, T>>,
) -> Result<Gradients<f64, f64>> {
    let d_outputs = d_outputs.into();
    let problem = inputs.check()?;
    problem.check_output_gradients(&d_outputs)?;
    let Dims { len, d_inner, d_state, .. } = problem.dims;
    let mut grad: Gradients<f64, f64> = problem.zero_gradients()?;
    // Without steps only the gradient of an initial state is not zero, and without one there may be more sequences than can
    // be counted through.
    if len == 0 && grad.initial_state.is_none() {
        return Ok(grad);
    }
    for sequence in problem.sequences.iter() {
        for d in 0..d_inner {
            let channel = Channel { problem: &problem, sequence, d };

            // The states of this one channel before every step and after the last, which the adjoint recurrence reads
            // backwards.
            let mut states: Vec<f64> = zeroed("u", &[sequence.len + 1, d_state])?;
            states[..d_state].copy_from_slice(&channel.initial_state());
            for (i, t) in channel.steps().enumerate() {
                let step = channel.step(t);
                let (before, after) = states[i * d_state..].split_at_mut(d_state);
                for n in 0..d_state {
                    after[n] = step.decay(n) * before[n] + step.input_weight(n) * step.b[n] * step.u;
                }
            }

            // d_h is the gradient of the state after the step at hand.
            let mut d_h: Vec<f64> = (0..d_state)
                .map(|n| d_outputs.d_final_state.map_or(0.0, |view| view.at([sequence.index, d, n]).into()))
                .collect();
            for (i, t) in channel.steps().enumerate().rev() {
                let step = channel.step(t);
                let (h_before, h) = states[i * d_state..].split_at(d_state);
                let d_out = f64::from(d_outputs.d_out.at([sequence.batch, t, d]));

                let mut d_y = d_out;
                if let (Some(z), Some(grad_z)) = (step.gate, &mut grad.z) {
                    let y: f64 = step.skip() + (0..d_state).map(|n| step.c[n] * h[n]).sum::<f64>();
                    grad_z[channel.index(t)] = d_out * y * silu_slope(z);
                    d_y = d_out * silu(z);
                }

                let mut d_u = step.d.map_or(0.0, |d| d * d_y);
                let mut d_delta = 0.0;
                for n in 0..d_state {
                    d_h[n] += step.c[n] * d_y;
                    *channel.projection(&mut grad.c, t, n) += d_y * h[n];

                    let weight = step.input_weight(n);
                    *channel.projection(&mut grad.b, t, n) += d_h[n] * weight * step.u;
                    d_u += d_h[n] * weight * step.b[n];

                    let (d_decay, d_weight) = (d_h[n] * h_before[n], d_h[n] * step.b[n] * step.u);
                    d_delta += d_decay * step.a[n] * step.decay(n);
                    let d_a = &mut grad.a[d * d_state + n];
                    *d_a += d_decay * step.delta * step.decay(n);
                    match step.discretization {
                        // The input's weight does not depend on A: not even infinity times zero comes from there.
                        Discretization::Euler => d_delta += d_weight,
                        Discretization::ZeroOrderHold => {
                            d_delta += d_weight * step.decay(n);
                            *d_a += d_weight * hold_slope(step.delta, step.a[n]);
                        }
                    }

                    d_h[n] *= step.decay(n);
                }
                grad.u[channel.index(t)] = d_u;
                let d_raw = d_delta * step.delta_slope;
                grad.delta[channel.index(t)] = d_raw;
                if let Some(bias) = &mut grad.delta_bias {
                    bias[d] += d_raw;
                }
                if let Some(skip) = &mut grad.d {
                    skip[d] += d_y * step.u;
                }
            }
            if let Some(initial) = &mut grad.initial_state {
                initial[channel.state_index(0)..][..d_state].copy_from_slice(&d_h);
            }
        }
    }
    Ok(grad)
}

/// One channel of one sequence.
struct Channel<'p, 'a, T: Element> {
    problem: &'p Problem<'a, T>,
    sequence: Sequence,
    d: usize,
}

/// What one step of one channel reads, widened.
struct Step {
    u: f64,
    delta: f64,
    /// The derivative of `delta` by what it was before softplus.
    delta_slope: f64,
    a: Vec<f64>,
    b: Vec<f64>,
    c: Vec<f64>,
    d: Option<f64>,
    gate: Option<f64>,
    discretization: Discretization,
}

impl<T: Element> Channel<'_, '_, T> {
    /// The steps of the batch row in the direction of the scan.
    fn steps(&self) -> impl ExactSizeIterator<Item = usize> + DoubleEndedIterator {
        let (sequence, reverse) = (self.sequence, self.problem.inputs.options.reverse);
        (0..sequence.len).map(move |i| sequence.step(i, reverse))
    }

    fn initial_state(&self) -> Vec<f64> {
        let at = |n| self.problem.inputs.initial_state.map_or(0.0, |view| view.at([self.sequence.index, self.d, n]));
        (0..self.problem.dims.d_state).map(|n| f64::from(at(n))).collect()
    }

    fn step(&self, t: usize) -> Step {
        let inputs = &self.problem.inputs;
        let (batch, d, states) = (self.sequence.batch, self.d, 0..self.problem.dims.d_state);
        let group = d / self.problem.dims.group_channels();
        let projection = |input: &Projection<T>| -> Vec<f64> {
            let at = |n| match input {
                Projection::Varying(view) => view.at([batch, t, group, n]),
                Projection::Constant(view) => view.at([d, n]),
            };
            states.clone().map(|n| f64::from(at(n))).collect()
        };
        let raw = f64::from(inputs.delta.at([batch, t, d])) + inputs.delta_bias.map_or(0.0, |v| f64::from(v.at([d])));
        let (delta, delta_slope) = if inputs.options.delta_softplus { softplus(raw) } else { (raw, 1.0) };
        Step {
            u: inputs.u.at([batch, t, d]).into(),
            delta,
            delta_slope,
            a: states.clone().map(|n| f64::from(inputs.a.at([d, n]))).collect(),
            b: projection(&inputs.b),
            c: projection(&inputs.c),
            d: inputs.d.map(|v| v.at([d]).into()),
            gate: inputs.z.map(|v| v.at([batch, t, d]).into()),
            discretization: inputs.options.discretization,
        }
    }

    /// Where this channel's value of step `t` lies in a dense activation.
    fn index(&self, t: usize) -> usize {
        let Dims { len, d_inner, .. } = self.problem.dims;
        (self.sequence.batch * len + t) * d_inner + self.d
    }

    /// Where this channel's `n`-th state lies in a dense state.
    fn state_index(&self, n: usize) -> usize {
        let Dims { d_inner, d_state, .. } = self.problem.dims;
        (self.sequence.index * d_inner + self.d) * d_state + n
    }

    /// The element of the gradient of B or C that this channel's step `t` reads.
    fn projection<'g>(&self, gradient: &'g mut ProjectionGradient<f64, f64>, t: usize, n: usize) -> &'g mut f64 {
        let Dims { len, d_state, groups, .. } = self.problem.dims;
        let group = self.d / self.problem.dims.group_channels();
        match gradient {
            ProjectionGradient::Varying(data) => {
                &mut data[((self.sequence.batch * len + t) * groups + group) * d_state + n]
            }
            ProjectionGradient::Constant(data) => &mut data[self.d * d_state + n],
        }
    }
}

impl Step {
    /// exp(Δ A)
    fn decay(&self, n: usize) -> f64 {
        (self.delta * self.a[n]).exp()
    }

    /// Δ, or (exp(ΔA) - 1)/A = Δ φ(ΔA): what multiplies B u.
    fn input_weight(&self, n: usize) -> f64 {
        crate::reference::input_weight(self.discretization, self.delta, self.a[n])
    }

    /// What goes past the states. Without D nothing does, not even the NaN of zero times infinity.
    fn skip(&self) -> f64 {
        self.d.map_or(0.0, |d| d * self.u)
    }
}

/// The derivative of (exp(ΔA) - 1)/A by A, which is Δ² φ'(ΔA) for φ(x) = (e^x - 1)/x.
fn hold_slope(delta: f64, a: f64) -> f64 {
    let x = delta * a;
    if x.abs() < 1.0 {
        // φ'(x) = Σ x^k/(k! (k + 2)): the closed form cancels for small x.
        let mut term = 1.0;
        let mut sum = 0.0;
        for k in 0..20 {
            sum += term / f64::from(k + 2);
            term *= x / f64::from(k + 1);
        }
        delta * delta * sum
    } else {
        // Where e^x is 0, so is its product, also if x is infinite.
        let product = if x < -800.0 { 0.0 } else { (x - 1.0) * x.exp() };
        (product + 1.0) / (a * a)
    }
}
