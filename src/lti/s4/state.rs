//! The states that inputs lead S4's systems to, with gradients: the recurrence, and the same backwards.
//!
//! A step is `(σ - A) x' = (σ + A) x + 2 B u` with `σ = 2/Δ`. From the slope `g` by `x'`, with `w = (σ - A)⁻* g`, those by
//! all that the step reads are
//!
//! ```text
//! by x   (σ + A)* w             by u   2 Re(B* w)             by B   2 u w
//! by σ   Re(w* (x - x'))        by A   w (x + x')*            which is w (x + x')‾ by Λ, and by a column of P
//!                                                             -w · P* (x + x') - (x + x') · P* w
//! ```
//!
//! A slope by a complex number is those by its real and by its imaginary part; products with `P*` run over states and their
//! conjugates, and are real.

use num_complex::Complex64;
use rayon::prelude::*;

use super::{Channel, Kernel};
use crate::arguments::zeroed;
use crate::lti::system::LowRankSteps;
use crate::lti::views::Recurrent;
use crate::sequences::CHECKPOINT_STEPS;
use crate::{Result, View};

const INPUT_NAMES: &str = "(batch, length, d_inner)";
const STATE_NAMES: &str = "(batch, d_inner, 2 * d_state)";

/// The gradients of what [`Kernel::final_state`] reads, dense, each of its tensor's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct StateGradients {
    /// `(d_inner)`.
    pub log_delta: Vec<f32>,
    /// `(d_inner, 2 * d_state)`.
    pub a: Vec<f32>,
    /// `(d_inner, rank, 2 * d_state)`.
    pub p: Vec<f32>,
    /// `(d_inner, 2 * d_state)`.
    pub b: Vec<f32>,
    /// `(batch, length, d_inner)`.
    pub u: Vec<f32>,
    /// `(batch, d_inner, 2 * d_state)`, whether there was an initial state or zero.
    pub initial_state: Vec<f32>,
}

impl Kernel<'_> {
    /// The states after the inputs `u`, `(batch, length, d_inner)`, from `initial_state` on or from zero, both `(batch, d_inner,
    /// 2 * d_state)`. It does not depend on `c`. The arithmetic is that of [`Recurrence`](super::Recurrence), in `f64`.
    ///
    /// # Errors
    /// An argument that does not fit; a system for which the bilinear rule has no recurrence.
    pub fn final_state(&self, u: View<f32, 3>, initial_state: Option<View<f32, 3>>) -> Result<Vec<f32>> {
        let [d_inner, _, d_state] = self.check_states(&u, &initial_state)?;
        let steps = self.all_steps()?;
        let mut all: Vec<f32> = zeroed("u", &[u.shape[0], d_inner, 2 * d_state])?;
        all.par_chunks_exact_mut(2 * d_state).enumerate().for_each(|(i, to)| {
            let place = Sequence { u: &u, row: i / d_inner, channel: i % d_inner };
            let mut state = place.state(&initial_state, d_state);
            for t in 0..u.shape[1] {
                steps[place.channel].step(&mut state, place.input(t));
            }
            narrow(&state, to);
        });
        Ok(all)
    }

    /// The gradients of what [`Self::final_state`] reads from that of its result, `(batch, d_inner, 2 * d_state)`. It keeps
    /// one state for each 64 steps of a channel.
    ///
    /// # Errors
    /// As [`Self::final_state`].
    pub fn final_state_backward(
        &self,
        u: View<f32, 3>,
        initial_state: Option<View<f32, 3>>,
        d_final_state: View<f32, 3>,
    ) -> Result<StateGradients> {
        let [d_inner, rank, d_state] = self.check_states(&u, &initial_state)?;
        let [batch, length, _] = u.shape;
        d_final_state.check("d_final_state", STATE_NAMES, [batch, d_inner, 2 * d_state])?;
        let steps = self.all_steps()?;
        let channels: Vec<_> = (0..d_inner)
            .into_par_iter()
            .map(|channel| {
                let of = self.channel(channel);
                let mut back = Back::new(&of, &steps[channel], length);
                let mut rows = Vec::with_capacity(batch);
                for row in 0..batch {
                    let place = Sequence { u: &u, row, channel };
                    let d_state_after = place.state(&Some(d_final_state), d_state);
                    rows.push(back.run(&place, place.state(&initial_state, d_state), d_state_after));
                }
                (back.sums, rows)
            })
            .collect();
        let parameters = |count: usize| Vec::with_capacity(d_inner * count * 2 * d_state);
        let mut all = StateGradients {
            log_delta: Vec::with_capacity(d_inner),
            a: parameters(1),
            p: parameters(rank),
            b: parameters(1),
            u: zeroed("u", &u.shape)?,
            initial_state: zeroed("u", &[batch, d_inner, 2 * d_state])?,
        };
        let parts = |x: &Complex64| [x.re as f32, x.im as f32];
        for (channel, (sums, rows)) in channels.into_iter().enumerate() {
            // σ = 2/Δ: by the logarithm of Δ it changes by -σ.
            all.log_delta.push((-sums.sigma * 2.0 / steps[channel].delta()) as f32);
            all.a.extend(sums.lambda.iter().flat_map(parts));
            all.p.extend(sums.p.iter().flatten().flat_map(parts));
            all.b.extend(sums.b.iter().flat_map(parts));
            for (row, (d_u, d_state_before)) in rows.into_iter().enumerate() {
                for (t, d_u) in d_u.into_iter().enumerate() {
                    all.u[(row * length + t) * d_inner + channel] = d_u;
                }
                let at = (row * d_inner + channel) * 2 * d_state;
                narrow(&d_state_before, &mut all.initial_state[at..at + 2 * d_state]);
            }
        }
        Ok(all)
    }

    fn check_states(&self, u: &View<f32, 3>, initial_state: &Option<View<f32, 3>>) -> Result<[usize; 3]> {
        let sizes @ [d_inner, _, d_state] = self.check()?;
        u.check("u", INPUT_NAMES, [u.shape[0], u.shape[1], d_inner])?;
        if let Some(state) = initial_state {
            state.check("initial_state", STATE_NAMES, [u.shape[0], d_inner, 2 * d_state])?;
        }
        Ok(sizes)
    }

    /// The recurrences of all channels.
    fn all_steps(&self) -> Result<Vec<LowRankSteps>> {
        let steps = |channel: usize| {
            let channel = self.channel(channel);
            channel.steps(&channel.c)
        };
        (0..self.a.shape[0]).into_par_iter().map(steps).collect()
    }
}

fn narrow(from: &[f64], to: &mut [f32]) {
    for (to, x) in to.iter_mut().zip(from) {
        *to = *x as f32;
    }
}

/// A channel of a batch row.
struct Sequence<'a> {
    u: &'a View<'a, f32, 3>,
    row: usize,
    channel: usize,
}

impl Sequence<'_> {
    fn input(&self, t: usize) -> f64 {
        self.u.at([self.row, t, self.channel]).into()
    }

    /// Its state among `states`; zero if there are none.
    fn state(&self, states: &Option<View<f32, 3>>, d_state: usize) -> Vec<f64> {
        let at = |k| states.map_or(0.0, |states| states.at([self.row, self.channel, k]).into());
        (0..2 * d_state).map(at).collect()
    }
}

/// The slopes by a channel's parameters.
struct Sums {
    sigma: f64,
    lambda: Vec<Complex64>,
    p: Vec<Vec<Complex64>>,
    b: Vec<Complex64>,
}

/// A channel on the way back.
struct Back<'a> {
    channel: &'a Channel,
    steps: &'a LowRankSteps,
    length: usize,
    sums: Sums,
}

impl<'a> Back<'a> {
    fn new(channel: &'a Channel, steps: &'a LowRankSteps, length: usize) -> Self {
        let zeros = vec![Complex64::ZERO; channel.lambda.len()];
        let sums = Sums { sigma: 0.0, lambda: zeros.clone(), p: vec![zeros.clone(); channel.p.len()], b: zeros };
        Self { channel, steps, length, sums }
    }

    /// Goes through a sequence from `state` on and back from the slope `d_state` by the state after it: the slopes by the
    /// inputs and by the state before.
    fn run(&mut self, place: &Sequence, mut state: Vec<f64>, mut d_state: Vec<f64>) -> (Vec<f32>, Vec<f64>) {
        let mut checkpoints = Vec::with_capacity(self.length.div_ceil(CHECKPOINT_STEPS));
        for t in 0..self.length {
            if t % CHECKPOINT_STEPS == 0 {
                checkpoints.push(state.clone());
            }
            self.steps.step(&mut state, place.input(t));
        }
        let mut d_u = vec![0.0; self.length];
        for (chunk, before) in checkpoints.into_iter().enumerate().rev() {
            let first = chunk * CHECKPOINT_STEPS;
            let steps = CHECKPOINT_STEPS.min(self.length - first);
            let mut states = vec![before];
            for k in 0..steps {
                let mut next = states[k].clone();
                self.steps.step(&mut next, place.input(first + k));
                states.push(next);
            }
            for k in (0..steps).rev() {
                let u = place.input(first + k);
                d_u[first + k] = self.step_back(&states[k], &states[k + 1], u, &mut d_state) as f32;
            }
        }
        (d_u, d_state)
    }

    /// Back through a step: the slope by the state after it becomes that by the state before it. Gives the slope by the input.
    fn step_back(&mut self, before: &[f64], after: &[f64], u: f64, d_state: &mut [f64]) -> f64 {
        let w = complex(&self.steps.solve_adjoint(d_state));
        let (before, after) = (complex(before), complex(after));
        let sigma = 2.0 / self.steps.delta();
        let real = |x: &[Complex64], y: &[Complex64]| -> f64 { x.iter().zip(y).map(|(x, y)| (x.conj() * y).re).sum() };
        let sum: Vec<Complex64> = before.iter().zip(&after).map(|(x, y)| x + y).collect();
        let mut to: Vec<Complex64> = w.iter().zip(&self.channel.lambda).map(|(w, a)| w * (a.conj() + sigma)).collect();
        for (p, d_p) in self.channel.p.iter().zip(&mut self.sums.p) {
            let (of_sum, of_w) = (2.0 * real(p, &sum), 2.0 * real(p, &w));
            for (n, d_p) in d_p.iter_mut().enumerate() {
                *d_p -= w[n] * of_sum + sum[n] * of_w;
                to[n] -= p[n] * of_w;
            }
        }
        for n in 0..w.len() {
            self.sums.lambda[n] += w[n] * sum[n].conj();
            self.sums.b[n] += w[n] * (2.0 * u);
            self.sums.sigma += (w[n].conj() * (before[n] - after[n])).re;
        }
        for (d, to) in d_state.as_chunks_mut().0.iter_mut().zip(to) {
            *d = [to.re, to.im];
        }
        2.0 * real(&self.channel.b, &w)
    }
}

fn complex(numbers: &[f64]) -> Vec<Complex64> {
    numbers.as_chunks().0.iter().map(|&[re, im]| Complex64::new(re, im)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a loss Σ g x, against differences of the state itself. Parameters are f32, so that a difference of 2^-9 has 15 digits
    /// after rounding; it is off by its square, 4e-6 of third derivatives that are up to 10 here, and the states' rounding to
    /// f32 by 2^-24 · 2^9.
    #[test]
    fn gradients_are_those_of_finite_differences() {
        let mut seed = 5.0f64;
        let mut draw = |count: usize, low: f32, high: f32| -> Vec<f32> {
            let mut next = || {
                seed = (seed * 16807.0) % 2_147_483_647.0;
                low + (high - low) * (seed / 2_147_483_647.0) as f32
            };
            (0..count).map(|_| next()).collect()
        };
        for (rank, length) in [(0, 5), (1, 70), (2, 5)] {
            let (batch, d_inner, pairs) = (2, 2, 3);
            let mut all = [
                draw(d_inner, -2.0, -1.0),
                draw(d_inner * 2 * pairs, -1.0, 1.0),
                draw(d_inner * rank * 2 * pairs, -0.5, 0.5),
                draw(d_inner * 2 * pairs, -1.0, 1.0),
                draw(batch * length * d_inner, -1.0, 1.0),
                draw(batch * d_inner * 2 * pairs, -1.0, 1.0),
            ];
            all[1].iter_mut().step_by(2).for_each(|re| *re = -0.5 - re.abs());
            let d_final = draw(batch * d_inner * 2 * pairs, -1.0, 1.0);
            let states = [batch, d_inner, 2 * pairs];
            type Work<'w> = &'w mut dyn FnMut(Kernel, View<f32, 3>, View<f32, 3>);
            let with = |all: &[Vec<f32>; 6], work: Work| {
                let complex = View::new(&all[1], [d_inner, 2 * pairs]);
                let kernel = Kernel {
                    log_delta: View::new(&all[0], [d_inner]),
                    a: complex,
                    p: View::new(&all[2], [d_inner, rank, 2 * pairs]),
                    b: View::new(&all[3], [d_inner, 2 * pairs]),
                    c: complex,
                };
                work(kernel, View::new(&all[4], [batch, length, d_inner]), View::new(&all[5], states));
            };
            let loss = |all: &[Vec<f32>; 6]| {
                let mut sum = 0.0;
                with(all, &mut |kernel, u, state| {
                    let state = kernel.final_state(u, Some(state)).unwrap();
                    sum = state.iter().zip(&d_final).map(|(x, g)| f64::from(*x) * f64::from(*g)).sum();
                });
                sum
            };
            let mut got = None;
            with(&all, &mut |kernel, u, state| {
                got = Some(kernel.final_state_backward(u, Some(state), View::new(&d_final, states)).unwrap());
            });
            let got = got.unwrap();
            let got = [got.log_delta, got.a, got.p, got.b, got.u, got.initial_state];
            for (which, got) in got.iter().enumerate() {
                assert_eq!(got.len(), all[which].len());
                // Of long sequences some inputs are enough.
                for i in (0..got.len()).step_by(1 + got.len() / 30) {
                    let at = all[which][i];
                    let (high, low) = (at + 1.9e-3, at - 1.9e-3);
                    all[which][i] = high;
                    let above = loss(&all);
                    all[which][i] = low;
                    let below = loss(&all);
                    all[which][i] = at;
                    let (want, got) = ((above - below) / (f64::from(high) - f64::from(low)), f64::from(got[i]));
                    assert!((got - want).abs() <= 3e-4 * (1.0 + want.abs()), "rank {rank}, {which} {i}: {got} {want}");
                }
            }
        }
    }
}
