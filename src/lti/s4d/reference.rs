//! S4D in `f64`, one channel, pair and step after another: the equations and nothing else.

use num_complex::Complex64;

use super::check::{POOL_NAMES, Problem};
use super::discrete::{Discrete, Slopes, complex};
use super::{Gradients, Inputs, Output, OutputGradients, UpdateInputs, UpdateOutput};
use crate::arguments::zeroed;
use crate::sequences::Sequence;
use crate::{Element, Result, View};

/// Runs the operator. The results are what exact arithmetic on the inputs would give, to about 15 digits less those of
/// the number of steps that are remembered.
pub fn forward<T: Element>(inputs: &Inputs<T>) -> Result<Output<f64, f64>> {
    let problem = inputs.check()?;
    let d_state = problem.sizes.d_state;
    let mut output = Output::zeroed_for(&problem)?;
    for sequence in problem.sequences.iter() {
        for channel in 0..problem.sizes.d_inner {
            let delta = problem.delta(channel);
            for i in 0..sequence.len {
                let skip = inputs.d.map_or(0.0, |d| d.at([channel]).into());
                output.out[problem.at(sequence, i, channel)] = skip * problem.input(sequence, i, channel);
            }
            for n in 0..d_state {
                let discrete = problem.pair(channel, n).discretize(delta, inputs.options.rule);
                let states = states(&problem, sequence, channel, n, &discrete);
                for (i, x) in states[1..].iter().enumerate() {
                    output.out[problem.at(sequence, i, channel)] += 2.0 * (discrete.c * x).re;
                }
                let at = problem.state_at(sequence, channel, n);
                let last = states[sequence.len];
                (output.final_state[at], output.final_state[at + 1]) = (last.re, last.im);
            }
        }
    }
    Ok(output)
}

/// The gradient of every input that was given, by the chain rule through the same recurrence.
pub fn backward<'a, T: Element>(
    inputs: &Inputs<T>,
    d_outputs: impl Into<OutputGradients<'a, T>>,
) -> Result<Gradients<f64, f64>> {
    let d_outputs = d_outputs.into();
    let problem = inputs.check()?;
    problem.check_output_gradients(&d_outputs)?;
    let mut grad: Gradients<f64, f64> = problem.zero_gradients()?;
    // Batch rows without a step could be more than can be counted through.
    if problem.sizes.length == 0 && grad.initial_state.is_none() {
        return Ok(grad);
    }
    for sequence in problem.sequences.iter() {
        for channel in 0..problem.sizes.d_inner {
            let d_out: Vec<f64> = (0..sequence.len)
                .map(|i| d_outputs.d_out.at([sequence.batch, problem.step(sequence, i), channel]).into())
                .collect();
            for (i, &d_out) in d_out.iter().enumerate() {
                let skip = inputs.d.map_or(0.0, |d| d.at([channel]).into());
                grad.u[problem.at(sequence, i, channel)] = skip * d_out;
                if let Some(d) = &mut grad.d {
                    d[channel] += d_out * problem.input(sequence, i, channel);
                }
            }
            for n in 0..problem.sizes.d_state {
                let (pair, delta) = (problem.pair(channel, n), problem.delta(channel));
                let at = problem.state_at(sequence, channel, n);
                let d_final = d_outputs.d_final_state.map_or(Complex64::ZERO, |view| {
                    let part = |k| view.at([sequence.index, channel, 2 * n + k]).into();
                    Complex64::new(part(0), part(1))
                });
                let (d_discrete, d_initial) =
                    pair_backward(&problem, sequence, channel, n, &d_out, d_final, &mut grad.u);
                let d_pair = pair.backward(delta, inputs.options.rule, &d_discrete);
                let to = (channel * problem.sizes.d_state + n) * 2;
                for (slopes, d) in [(&mut grad.a, d_pair.a), (&mut grad.b, d_pair.b), (&mut grad.c, d_pair.c)] {
                    slopes[to] += d.re;
                    slopes[to + 1] += d.im;
                }
                grad.log_delta[channel] += d_pair.log_delta;
                if let Some(state) = &mut grad.initial_state {
                    (state[at], state[at + 1]) = (d_initial.re, d_initial.im);
                }
            }
        }
    }
    Ok(grad)
}

/// One pair's slopes by its recurrence and its initial state; those by the inputs are added to `d_u`.
fn pair_backward<T: Element>(
    problem: &Problem<T>,
    sequence: Sequence,
    channel: usize,
    n: usize,
    d_out: &[f64],
    d_final: Complex64,
    d_u: &mut [f64],
) -> (Slopes, Complex64) {
    let discrete = problem.pair(channel, n).discretize(problem.delta(channel), problem.inputs.options.rule);
    let states = states(problem, sequence, channel, n, &discrete);
    let (mut slopes, mut d_state) = (Slopes::default(), d_final);
    for i in (0..sequence.len).rev() {
        d_state += 2.0 * d_out[i] * discrete.c.conj();
        slopes.c += 2.0 * d_out[i] * states[i + 1].conj();
        slopes.a += d_state * states[i].conj();
        slopes.b += d_state * problem.input(sequence, i, channel);
        d_u[problem.at(sequence, i, channel)] += (discrete.b.conj() * d_state).re;
        d_state *= discrete.a.conj();
    }
    (slopes, d_state)
}

/// Runs an update without writing to the pool: the state after each token is returned instead, not rounded. The
/// results of padding rows are zero.
pub fn update<T: Element, St: Element>(inputs: &UpdateInputs<T>, state: View<St, 3>) -> Result<UpdateOutput<f64, f64>> {
    let problem = inputs.check()?;
    let [batch, tokens, d_inner] = inputs.u.shape;
    let d_state = problem.sizes.d_state;
    state.check("state", POOL_NAMES[0], [state.shape[0], d_inner, 2 * d_state])?;
    inputs.slots.check(batch, state.shape[0])?;
    let mut output =
        UpdateOutput { out: zeroed("u", &inputs.u.shape)?, token_states: zeroed("u", &problem.token_state_shape())? };
    // Without tokens there may be more rows than can be counted through.
    let rows = (0..if tokens == 0 { 0 } else { batch }).filter_map(|row| Some((row, inputs.slots.get(row)?)));
    for (row, slot) in rows {
        for channel in 0..d_inner {
            let skip: f64 = inputs.d.map_or(0.0, |d| d.at([channel]).into());
            for t in 0..tokens {
                let at = (row * tokens + t) * d_inner + channel;
                output.out[at] = skip * f64::from(inputs.u.at([row, t, channel]));
            }
            for n in 0..d_state {
                let part = |k| f64::from(state.at([slot, channel, 2 * n + k]));
                let row_of = |k| f64::from(inputs.recurrence.at([channel, k, n]));
                let a = Complex64::new(row_of(0) + row_of(1), row_of(2) + row_of(3));
                let (b, c) = (Complex64::new(row_of(4), row_of(5)), complex(&inputs.c, channel, n));
                let mut x = Complex64::new(part(0), part(1));
                for t in 0..tokens {
                    x = a * x + b * f64::from(inputs.u.at([row, t, channel]));
                    let at = (row * tokens + t) * d_inner + channel;
                    output.out[at] += 2.0 * (c * x).re;
                    let states = &mut output.token_states[(at * d_state + n) * 2..][..2];
                    states.copy_from_slice(&[x.re, x.im]);
                }
            }
        }
    }
    Ok(output)
}

/// The states of one pair: the initial one, and that after each step.
fn states<T: Element>(
    problem: &Problem<T>,
    sequence: Sequence,
    channel: usize,
    n: usize,
    discrete: &Discrete,
) -> Vec<Complex64> {
    let part = |k| problem.inputs.initial_state.map_or(0.0, |x| x.at([sequence.index, channel, 2 * n + k]).into());
    let mut x = Complex64::new(part(0), part(1));
    let mut all = vec![x];
    for i in 0..sequence.len {
        x = discrete.a * x + discrete.b * problem.input(sequence, i, channel);
        all.push(x);
    }
    all
}

impl<T: Element> Problem<'_, T> {
    fn step(&self, sequence: Sequence, i: usize) -> usize {
        sequence.step(i, self.inputs.options.reverse)
    }

    fn input(&self, sequence: Sequence, i: usize, channel: usize) -> f64 {
        self.inputs.u.at([sequence.batch, self.step(sequence, i), channel]).into()
    }

    /// Where a step of a channel lies in a dense activation.
    fn at(&self, sequence: Sequence, i: usize, channel: usize) -> usize {
        (sequence.batch * self.sizes.length + self.step(sequence, i)) * self.sizes.d_inner + channel
    }

    /// Where the real part of a pair lies in a dense state.
    fn state_at(&self, sequence: Sequence, channel: usize, n: usize) -> usize {
        ((sequence.index * self.sizes.d_inner + channel) * self.sizes.d_state + n) * 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lti::Rule;
    use crate::lti::s4d::discrete::Pair;

    /// Differences of 1e-5 are off by its square of third derivatives of about 1, and by 1e-16/1e-5 of rounding.
    #[test]
    fn slopes_of_the_rules_are_those_of_differences() {
        for rule in [Rule::ZeroOrderHold, Rule::Bilinear, Rule::Euler] {
            for a in [Complex64::new(-0.5, 3.0), Complex64::new(-1e-4, 0.0), Complex64::ZERO] {
                let pair = Pair { a, b: Complex64::new(0.7, -0.3), c: Complex64::ONE };
                let (weight_a, weight_b) = (Complex64::new(0.4, 1.3), Complex64::new(-0.9, 0.6));
                // A loss that is linear in Ā and B̄, whose slopes these are.
                let loss = |pair: &Pair, log_delta: f64| {
                    let discrete = pair.discretize(log_delta.exp(), rule);
                    (weight_a.conj() * discrete.a + weight_b.conj() * discrete.b).re
                };
                let d = Slopes { a: weight_a, b: weight_b, ..Slopes::default() };
                let got = pair.backward(0.2f64.exp(), rule, &d);
                let h = 1e-5;
                let slope = |change: &dyn Fn(f64) -> f64| (change(h) - change(-h)) / (2.0 * h);
                let moved = |da: Complex64, db: Complex64| Pair { a: pair.a + da, b: pair.b + db, ..pair };
                let zero = Complex64::ZERO;
                for (unit, of_a, of_b) in [(Complex64::ONE, got.a.re, got.b.re), (Complex64::I, got.a.im, got.b.im)] {
                    let by_a = slope(&|h| loss(&moved(unit * h, zero), 0.2));
                    let by_b = slope(&|h| loss(&moved(zero, unit * h), 0.2));
                    assert!((by_a - of_a).abs() < 1e-8, "{rule:?}, {a}: by a {of_a}, {by_a}");
                    assert!((by_b - of_b).abs() < 1e-8, "{rule:?}, {a}: by b {of_b}, {by_b}");
                }
                let by_delta = slope(&|h| loss(&pair, 0.2 + h));
                assert!((by_delta - got.log_delta).abs() < 1e-8, "{rule:?}, {a}: {} {by_delta}", got.log_delta);
            }
        }
    }
}
