//! The state update: the selective scan's step on a pool of states, in place, as decoding runs it.
//!
//! For every batch row, the state that its slot names is carried through the row's `K` tokens, one for plain decoding, a
//! few for speculative decoding:
//!
//! ```text
//! Δ   = softplus(delta + delta_bias)            softplus if `delta_softplus`
//! h   ← exp(Δ A) h + Δ B u                      or exact zero-order hold, see Discretization
//! y   = Σ_n C h + D u                           summed over the d_state states
//! out = y · silu(z)                             if there is a gate z
//! ```
//!
//! These are the equations of [`scan`](crate::scan), so a scan over a prompt followed by updates equals one scan.
//!
//! The state is rounded to the pool's type after *every* token, also where the next one follows at once. So `K` tokens
//! in one update give the same bits as `K` updates of one token, and speculative decoding, with rejected tokens rolled
//! back by [`rollback`], gives what plain decoding gives. (The output of a token is read from its state before rounding.)
//!
//! [`Inputs`] says what the operator reads and [`UpdateMut`] what it writes; [`cpu`] runs it on slices,
//! [`reference`](mod@reference) is the same written plainly in `f64`. [`Inputs::update`] allocates its result.

#[cfg(feature = "candle")]
mod candle;
mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;
pub(crate) mod tensors;

pub use crate::pool::{UpdateMut, UpdateOutput, rollback};
pub use tensors::Inputs;

use crate::arguments::zeroed;
use crate::simd::Isa;
use crate::{Discretization, Element, Result, ViewMut};
use check::Problem;
pub(crate) use check::STATE_NAMES;

/// Variants of the recurrence, as those of the scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Options {
    /// Pass `delta + delta_bias` through `softplus(x) = ln(1 + e^x)`, taken as the identity above 20.
    pub delta_softplus: bool,
    /// How the input is weighted.
    pub discretization: Discretization,
}

impl<T: Element> Inputs<'_, T> {
    /// Runs the update on the CPU and returns `out`, `(batch, tokens, d_inner)`.
    pub fn update<St: Element>(&self, state: ViewMut<St, 3>) -> Result<Vec<T>> {
        let problem = self.check()?;
        let mut out = zeroed("u", &problem.activation_shape())?;
        cpu::update_checked(Isa::best(), &problem, UpdateMut { state, out: &mut out, token_states: None })?;
        Ok(out)
    }

    /// Runs the update on the CPU and also returns the state after each token, for [`rollback`].
    pub fn update_with_token_states<St: Element>(&self, state: ViewMut<St, 3>) -> Result<UpdateOutput<T, St>> {
        let problem = self.check()?;
        let mut output = UpdateOutput {
            out: zeroed("u", &problem.activation_shape())?,
            token_states: zeroed("u", &problem.token_state_shape())?,
        };
        let (out, token_states) = (&mut output.out[..], Some(&mut output.token_states[..]));
        cpu::update_checked(Isa::best(), &problem, UpdateMut { state, out, token_states })?;
        Ok(output)
    }
}
