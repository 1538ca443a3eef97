//! The arguments of the step of decoding, and what its recurrence is made of.

use num_complex::Complex64;

use super::check::check_recurrence;
use super::{UpdateInputs, UpdateMut, UpdateOutput, cpu};
use crate::arguments::zeroed;
use crate::lti::Rule;
use crate::lti::system::discretize_number;
use crate::simd::Isa;
use crate::{Element, Result, View, ViewMut};

/// The numbers that a recurrence has for each pair: `Re Ā` and `Im Ā`, each rounded and then what rounding took from
/// it, and `Re B̄` and `Im B̄`.
///
/// With `Ā` rounded to `f32`, a step would be off by 2^-25 each time in the same direction, and a sequence of steps
/// would leave the whole sequence's results.
///
/// The list of tensors has it as a number, for the names of dimensions are written from there.
pub const RECURRENCE_ROWS: usize = 6;

/// Makes of the parameters, as [`Inputs`](super::Inputs) has them, what a step needs: `(d_inner, 6, d_state)`, dense.
/// It takes an exponential for every pair, and is the same until a parameter changes.
///
/// # Errors
/// A parameter that does not fit `a`.
pub fn recurrence(log_delta: View<f32, 1>, a: View<f32, 2>, b: View<f32, 2>, rule: Rule) -> Result<Vec<f32>> {
    let shape = check_recurrence(&log_delta, &a, &b)?;
    let d_state = shape[2];
    let mut all: Vec<f32> = zeroed("a", &shape)?;
    for (channel, rows) in all.chunks_exact_mut(RECURRENCE_ROWS * d_state).enumerate() {
        let delta = f64::from(log_delta.at([channel])).exp();
        for n in 0..d_state {
            let read = |view: &View<f32, 2>| super::discrete::complex(view, channel, n);
            let (power, weight) = discretize_number(read(&a), delta, rule);
            for (k, value) in numbers(power, weight * read(&b)).into_iter().enumerate() {
                rows[k * d_state + n] = value;
            }
        }
    }
    Ok(all)
}

fn numbers(a: Complex64, b: Complex64) -> [f32; RECURRENCE_ROWS] {
    let rest = |x: f64| (x - f64::from(x as f32)) as f32;
    [a.re as f32, rest(a.re), a.im as f32, rest(a.im), b.re as f32, b.im as f32]
}

impl<T: Element> UpdateInputs<'_, T> {
    /// Runs the update on the CPU and returns `out`, `(batch, tokens, d_inner)`.
    pub fn update<St: Element>(&self, state: ViewMut<St, 3>) -> Result<Vec<T>> {
        let problem = self.check()?;
        let mut out = zeroed("u", &self.u.shape)?;
        cpu::update_checked(Isa::best(), &problem, UpdateMut { state, out: &mut out, token_states: None })?;
        Ok(out)
    }

    /// Runs the update on the CPU and also returns the state after each token, for [`rollback`](super::rollback).
    pub fn update_with_token_states<St: Element>(&self, state: ViewMut<St, 3>) -> Result<UpdateOutput<T, St>> {
        let problem = self.check()?;
        let mut output =
            UpdateOutput { out: zeroed("u", &self.u.shape)?, token_states: zeroed("u", &problem.token_state_shape())? };
        let (out, token_states) = (&mut output.out[..], Some(&mut output.token_states[..]));
        cpu::update_checked(Isa::best(), &problem, UpdateMut { state, out, token_states })?;
        Ok(output)
    }
}
