//! The scan with complex states in `f64`, one channel, step and state after another: the equations and nothing else.

use super::check::{POOL_NAMES, Problem};
use super::number::Number;
use super::tensors::Sizes;
use super::{Gradients, Inputs, Output, OutputGradients, UpdateInputs, UpdateOutput};
use crate::arguments::zeroed;
use crate::kinds::ProjectionOf;
use crate::reference::{silu, silu_slope, softplus};
use crate::sequences::Sequence;
use crate::{Element, Projection, Result, View};

/// Runs the scan. The results are what exact arithmetic on the inputs would give, to about 15 digits.
pub fn forward<T: Element>(inputs: &Inputs<T>) -> Result<Output<f64, f64>> {
    let problem = inputs.check()?;
    let mut output = Output::zeroed_for(&problem)?;
    for sequence in problem.sequences.iter() {
        for d in 0..problem.sizes.d_inner {
            let channel = Channel { problem: &problem, sequence, d };
            let mut h = channel.state(&inputs.initial_state);
            for i in 0..sequence.len {
                let step = channel.step(i);
                step.advance(&mut h);
                output.out[channel.index(i)] = step.read(&h) * step.gate.map_or(1.0, silu);
            }
            channel.write_state(&h, &mut output.final_state);
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
        for d in 0..problem.sizes.d_inner {
            let channel = Channel { problem: &problem, sequence, d };
            channel.backward(&d_outputs, &mut grad);
        }
    }
    Ok(grad)
}

/// Runs an update without writing to the pool: the state after each token is returned instead, not rounded. The results of
/// padding rows are zero.
pub fn update<T: Element, St: Element>(inputs: &UpdateInputs<T>, state: View<St, 3>) -> Result<UpdateOutput<f64, f64>> {
    let problem = inputs.check()?;
    let Sizes { batch, length, d_inner, d_state, .. } = problem.sizes;
    state.check("state", POOL_NAMES[0], [state.shape[0], d_inner, 2 * d_state])?;
    inputs.slots.check(batch, state.shape[0])?;
    let mut output =
        UpdateOutput { out: zeroed("u", &inputs.u.shape)?, token_states: zeroed("u", &problem.token_state_shape())? };
    // Without tokens there may be more rows than can be counted through.
    let rows = (0..if length == 0 { 0 } else { batch }).filter_map(|row| Some((row, inputs.slots.get(row)?)));
    for (row, slot) in rows {
        for d in 0..d_inner {
            let part = |n, k| f64::from(state.at([slot, d, 2 * n + k]));
            let mut h: Vec<Number> = (0..d_state).map(|n| Number { re: part(n, 0), im: part(n, 1) }).collect();
            for t in 0..length {
                let step = Step::read_from(
                    [&inputs.u, &inputs.delta],
                    inputs.z.as_ref(),
                    [inputs.d.as_ref(), inputs.delta_bias.as_ref()],
                    (&inputs.a, [&inputs.b, &inputs.c]),
                    ([row, t, d], d / problem.sizes.group_channels()),
                    inputs.delta_softplus,
                );
                step.advance(&mut h);
                let at = (row * length + t) * d_inner + d;
                output.out[at] = step.read(&h) * step.gate.map_or(1.0, silu);
                let states = output.token_states[at * 2 * d_state..][..2 * d_state].as_chunks_mut::<2>().0;
                for (to, h) in states.iter_mut().zip(&h) {
                    *to = [h.re, h.im];
                }
            }
        }
    }
    Ok(output)
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
    a: Vec<Number>,
    b: Vec<Number>,
    c: Vec<Number>,
    d: Option<f64>,
    gate: Option<f64>,
}

impl Step {
    fn read_from<T: Element>(
        [u, delta]: [&View<T, 3>; 2],
        z: Option<&View<T, 3>>,
        [d, bias]: [Option<&View<f32, 1>>; 2],
        (a, [b, c]): (&View<f32, 2>, [&Projection<T>; 2]),
        (at, group): ([usize; 3], usize),
        plus: bool,
    ) -> Self {
        let channel = at[2];
        let states = 0..a.shape[1] / 2;
        let number =
            |part: &dyn Fn(usize) -> f32, n: usize| Number { re: part(2 * n).into(), im: part(2 * n + 1).into() };
        let projection = |input: &Projection<T>| -> Vec<Number> {
            let part = |k| match input {
                Projection::Varying(view) => view.at([at[0], at[1], group, k]),
                Projection::Constant(view) => view.at([channel, k]),
            };
            states.clone().map(|n| number(&part, n)).collect()
        };
        let raw = f64::from(delta.at(at)) + bias.map_or(0.0, |view| f64::from(view.at([channel])));
        let (delta, delta_slope) = if plus { softplus(raw) } else { (raw, 1.0) };
        Self {
            u: u.at(at).into(),
            delta,
            delta_slope,
            a: states.clone().map(|n| number(&|k| a.at([channel, k]), n)).collect(),
            b: projection(b),
            c: projection(c),
            d: d.map(|view| view.at([channel]).into()),
            gate: z.map(|view| view.at(at).into()),
        }
    }

    fn decay(&self, n: usize) -> Number {
        (self.a[n] * self.delta).exp()
    }

    fn advance(&self, h: &mut [Number]) {
        for (n, h) in h.iter_mut().enumerate() {
            *h = self.decay(n) * *h + self.b[n] * (self.delta * self.u);
        }
    }

    /// y. Without D nothing goes past the states, not even the NaN of zero times infinity.
    fn read(&self, h: &[Number]) -> f64 {
        let states: f64 = self.c.iter().zip(h).map(|(c, h)| (*c * *h).re).sum();
        2.0 * states + self.d.map_or(0.0, |d| d * self.u)
    }
}

impl<T: Element> Channel<'_, '_, T> {
    fn step(&self, i: usize) -> Step {
        let inputs = &self.problem.inputs;
        Step::read_from(
            [&inputs.u, &inputs.delta],
            inputs.z.as_ref(),
            [inputs.d.as_ref(), inputs.delta_bias.as_ref()],
            (&inputs.a, [&inputs.b, &inputs.c]),
            ([self.sequence.batch, self.time(i), self.d], self.d / self.problem.sizes.group_channels()),
            inputs.options.delta_softplus,
        )
    }

    /// The step of the batch row that is the sequence's `i`-th in the direction of the scan.
    fn time(&self, i: usize) -> usize {
        self.sequence.step(i, self.problem.inputs.options.reverse)
    }

    /// Where that step lies in a dense activation.
    fn index(&self, i: usize) -> usize {
        (self.sequence.batch * self.problem.sizes.length + self.time(i)) * self.problem.sizes.d_inner + self.d
    }

    fn state(&self, view: &Option<View<f32, 3>>) -> Vec<Number> {
        let part = |k| view.map_or(0.0, |view| view.at([self.sequence.index, self.d, k]).into());
        (0..self.problem.sizes.d_state).map(|n| Number { re: part(2 * n), im: part(2 * n + 1) }).collect()
    }

    fn write_state(&self, h: &[Number], to: &mut [f64]) {
        let Sizes { d_inner, d_state, .. } = self.problem.sizes;
        let first = (self.sequence.index * d_inner + self.d) * 2 * d_state;
        for (to, h) in to[first..][..2 * d_state].as_chunks_mut::<2>().0.iter_mut().zip(h) {
            *to = [h.re, h.im];
        }
    }

    /// Adds to the gradient of B or C what this channel's step `i` adds to that of its `n`-th state.
    fn add(&self, gradient: &mut ProjectionOf<Vec<f64>, Vec<f64>>, i: usize, n: usize, x: Number) {
        let Sizes { length, d_state, groups, .. } = self.problem.sizes;
        let (data, row) = match gradient {
            ProjectionOf::Varying(data) => {
                let group = self.d / self.problem.sizes.group_channels();
                (data, (self.sequence.batch * length + self.time(i)) * groups + group)
            }
            ProjectionOf::Constant(data) => (data, self.d),
        };
        data[(row * d_state + n) * 2] += x.re;
        data[(row * d_state + n) * 2 + 1] += x.im;
    }

    fn backward(&self, d_outputs: &OutputGradients<T>, grad: &mut Gradients<f64, f64>) {
        let mut states = vec![self.state(&self.problem.inputs.initial_state)];
        for i in 0..self.sequence.len {
            let mut h = states[i].clone();
            self.step(i).advance(&mut h);
            states.push(h);
        }
        let mut d_h = self.state(&d_outputs.d_final_state);
        for i in (0..self.sequence.len).rev() {
            let (step, before, h) = (self.step(i), &states[i], &states[i + 1]);
            let d_out: f64 = d_outputs.d_out.at([self.sequence.batch, self.time(i), self.d]).into();
            let mut d_y = d_out;
            if let (Some(gate), Some(d_z)) = (step.gate, &mut grad.z) {
                d_z[self.index(i)] = d_out * step.read(h) * silu_slope(gate);
                d_y = d_out * silu(gate);
            }
            let (mut d_u, mut d_delta) = (step.d.map_or(0.0, |d| d * d_y), 0.0);
            for n in 0..d_h.len() {
                // As slopes by the real and by the imaginary part: where y = w x, that by x is that by y times w̄.
                d_h[n] += step.c[n].conj() * (2.0 * d_y);
                self.add(&mut grad.c, i, n, h[n].conj() * (2.0 * d_y));
                self.add(&mut grad.b, i, n, d_h[n] * (step.delta * step.u));
                let through_input = (d_h[n] * step.b[n].conj()).re;
                d_u += through_input * step.delta;
                let decay = step.decay(n);
                let d_exponent = d_h[n] * before[n].conj() * decay.conj();
                d_delta += through_input * step.u + (d_exponent * step.a[n].conj()).re;
                let at = (self.d * d_h.len() + n) * 2;
                grad.a[at] += d_exponent.re * step.delta;
                grad.a[at + 1] += d_exponent.im * step.delta;
                d_h[n] = d_h[n] * decay.conj();
            }
            grad.u[self.index(i)] = d_u;
            grad.delta[self.index(i)] = d_delta * step.delta_slope;
            if let Some(bias) = &mut grad.delta_bias {
                bias[self.d] += d_delta * step.delta_slope;
            }
            if let Some(d) = &mut grad.d {
                d[self.d] += d_y * step.u;
            }
        }
        if let Some(initial) = &mut grad.initial_state {
            self.write_state(&d_h, initial);
        }
    }
}
