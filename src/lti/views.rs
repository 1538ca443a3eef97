//! The three views of a linear time-invariant system, which are what S4, S4D and the selective scan are three sides of:
//!
//! | view | what it is | cost of `L` steps with `N` states |
//! |---|---|---|
//! | continuous | a differential equation, integrated | many small steps for each |
//! | recurrent | a step for each input, a state between | `L N`, one after the other |
//! | convolutional | a kernel, and a convolution with it | `L N` for the kernel, `L log L` for the convolution |

use std::ops::Range;

use super::fft::convolve;
use super::system::check_states;
use crate::{Error, Result};

/// The continuous view: `x'(t) = A x(t) + B u(t)`, `y(t) = C x(t) + D u(t)`.
pub trait Continuous {
    /// The numbers that a state is made of.
    fn state_len(&self) -> usize;

    /// `x'` where the state is `state` and the input `u`.
    fn derivative(&self, state: &[f64], u: f64, derivative: &mut [f64]);

    /// `y` where the state is `state` and the input `u`.
    fn output(&self, state: &[f64], u: f64) -> f64;

    /// Carries the state through the time `time` in `steps` steps of Runge and Kutta's method of fourth order. The
    /// input is read at the two ends and in the middle of each. It is the yardstick of what follows: exact in the limit
    /// of many steps, whatever the input.
    ///
    /// # Errors
    /// A state of another size.
    fn integrate(&self, u: impl Fn(f64) -> f64, time: Range<f64>, steps: usize, state: &mut [f64]) -> Result<()> {
        check_states("state", self.state_len(), state.len())?;
        let step = (time.end - time.start) / steps as f64;
        let mut slopes = [0, 1, 2, 3].map(|_| vec![0.0; state.len()]);
        let mut at = vec![0.0; state.len()];
        for i in 0..steps {
            let start = time.start + i as f64 * step;
            for (k, part) in [0.0, 0.5, 0.5, 1.0].into_iter().enumerate() {
                for (j, at) in at.iter_mut().enumerate() {
                    *at = state[j] + if k == 0 { 0.0 } else { part * step * slopes[k - 1][j] };
                }
                self.derivative(&at, u(start + part * step), &mut slopes[k]);
            }
            for (j, x) in state.iter_mut().enumerate() {
                *x += step / 6.0 * (slopes[0][j] + 2.0 * (slopes[1][j] + slopes[2][j]) + slopes[3][j]);
            }
        }
        Ok(())
    }

    /// The outputs at the ends of steps of `delta` over which each input is held, each integrated in `fine` steps, from
    /// a state that becomes the one at the end.
    ///
    /// # Errors
    /// A state of another size; a `fine` of zero.
    fn integrate_held(&self, u: &[f64], delta: f64, fine: usize, state: &mut [f64]) -> Result<Vec<f64>> {
        if fine == 0 {
            return Err(Error::argument("fine", "at least one step", fine));
        }
        let mut all = Vec::with_capacity(u.len());
        for &u in u {
            self.integrate(|_| u, 0.0..delta, fine, state)?;
            all.push(self.output(state, u));
        }
        Ok(all)
    }
}

/// The recurrent view, `x_k = Ā x_{k-1} + B̄ u_k`, `y_k = C x_k + D u_k`, and what the convolutional view is made of.
pub trait Recurrent {
    /// The numbers that a state is made of.
    fn state_len(&self) -> usize;

    /// One step: brings the state up to date and gives the output. The state must have [`Recurrent::state_len`]
    /// numbers.
    fn step(&self, state: &mut [f64], u: f64) -> f64;

    /// `D`.
    fn feed_through(&self) -> f64;

    /// The kernel `K_k = C Ā^k B̄` for `k` below `len`, without `D`.
    fn kernel(&self, len: usize) -> Vec<f64>;

    /// What a state before the first step adds to the outputs, `C Ā^(k+1) x`.
    fn state_response(&self, state: &[f64], len: usize) -> Vec<f64>;

    /// The state after the inputs, by sums over them: `Ā^L x + Σ_k Ā^(L-1-k) B̄ u_k`.
    fn final_state(&self, u: &[f64], state: &[f64]) -> Vec<f64>;

    /// The recurrent view of a sequence: the outputs. The state becomes the one at the end.
    ///
    /// # Errors
    /// A state of another size.
    fn sequence(&self, u: &[f64], state: &mut [f64]) -> Result<Vec<f64>> {
        check_states("state", self.state_len(), state.len())?;
        Ok(u.iter().map(|&u| self.step(state, u)).collect())
    }

    /// The convolutional view of a sequence: the outputs, by a kernel and a convolution, and what the state adds to
    /// them. The state becomes the one at the end.
    ///
    /// # Errors
    /// A state of another size.
    fn convolution(&self, u: &[f64], state: &mut [f64]) -> Result<Vec<f64>> {
        check_states("state", self.state_len(), state.len())?;
        let mut out = convolve(&self.kernel(u.len()), u);
        let response = self.state_response(state, u.len());
        for ((out, response), u) in out.iter_mut().zip(response).zip(u) {
            *out += response + self.feed_through() * u;
        }
        state.copy_from_slice(&self.final_state(u, state));
        Ok(out)
    }
}
