//! The state update: the selective scan's step on a pool of states, in place, as decoding runs it.
//!
//! For every batch row, the state that its slot names is carried through the row's `K` tokens, one for plain decoding, a
//! few for speculative decoding:
//!
//! ```text
//! Δ   = softplus(dt + dt_bias)                  softplus if asked for
//! h   ← exp(Δ A) h + Δ B u                      or exact zero-order hold, see Discretization
//! y   = Σ_n C h + D u                           summed over the d_state states
//! out = y · silu(z)                             if there is a gate z
//! ```
//!
//! These are the equations of [`scan`](crate::scan), so a scan over a prompt followed by updates equals one scan.
//!
//! The state is rounded to the pool's type behind *every* token, also where the next one follows at once. So `K` tokens
//! in one update give the same bits as `K` updates of one token, and speculative decoding, with rejected tokens rolled
//! back by [`rollback`], gives what plain decoding gives. (The output of a token is read from its state before rounding.)
//!
//! [`Inputs`] says what the operator reads and [`UpdateMut`] what it writes; [`cpu`] runs it on slices,
//! [`reference`](mod@reference) is the same written plainly in `f64`. [`Inputs::update`] allocates its result.

#[cfg(feature = "candle")]
mod candle;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;
mod tensors;

pub use crate::pool::{UpdateMut, UpdateOutput, rollback};
#[cfg(feature = "candle")]
pub use tensors::StateUpdate;
pub use tensors::{Inputs, Tensors};

use crate::arguments::{Dims, zeroed};
use crate::kinds::CheckViews;
use crate::pool::Slots;
use crate::simd::Isa;
use crate::{Discretization, Element, Host, Memory, Result, ViewMut};

/// Variants of the recurrence, as those of the scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Options {
    /// Pass `dt + dt_bias` through `softplus(x) = ln(1 + e^x)`, taken as the identity above 20.
    pub dt_softplus: bool,
    /// How the input is weighted.
    pub discretization: Discretization,
}

impl<'a, T: Element, M: Memory> Inputs<'a, T, M> {
    /// Checks every argument but those of [`Problem::check_outputs`].
    pub(crate) fn check(&self) -> Result<Problem<'a, T, M>> {
        let dims = Dims::check(ACTIVATION_NAMES, &self.u, &self.a, &self.b, &self.c)?;
        self.tensors().shaped(dims).map(&mut CheckViews)?;
        Ok(Problem { inputs: *self, dims })
    }
}

const ACTIVATION_NAMES: &str = "(batch, tokens, d_inner)";

/// The names of the dimensions of the pool and of the states behind each token.
pub(crate) const STATE_NAMES: [&str; 2] = ["(slots, d_inner, d_state)", "(batch, tokens, d_inner, d_state)"];

/// Inputs that have passed [`Inputs::check`]. The tokens are the steps of its `dims`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a, T: Element, M: Memory = Host> {
    pub inputs: Inputs<'a, T, M>,
    pub dims: Dims,
}

impl<'a, T: Element, M: Memory> Problem<'a, T, M> {
    fn activation_shape(&self) -> [usize; 3] {
        [self.dims.batch, self.dims.len, self.dims.d_inner]
    }

    pub fn state_shape(&self) -> [usize; 2] {
        [self.dims.d_inner, self.dims.d_state]
    }

    fn token_state_shape(&self) -> [usize; 4] {
        [self.dims.batch, self.dims.len, self.dims.d_inner, self.dims.d_state]
    }

    /// Checks the pool, the slots and the buffers to be written.
    pub fn check_outputs<St: Element>(&self, outputs: &UpdateMut<T, St, M>) -> Result<Slots<'a>> {
        outputs.check(self.activation_shape(), self.state_shape(), STATE_NAMES, self.inputs.slots)
    }
}

impl<T: Element> Inputs<'_, T> {
    /// Runs the update on the CPU and returns `out`, `(batch, tokens, d_inner)`.
    pub fn update<St: Element>(&self, state: ViewMut<St, 3>) -> Result<Vec<T>> {
        let problem = self.check()?;
        let mut out = zeroed("u", &problem.activation_shape())?;
        cpu::update_checked(Isa::best(), &problem, UpdateMut { state, out: &mut out, token_states: None })?;
        Ok(out)
    }

    /// Runs the update on the CPU and also returns the state behind each token, for [`rollback`].
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
