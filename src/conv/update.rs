//! The arguments of the convolution on a pool of states, in place, as decoding runs it.

use super::check::check_filter;
use super::{UpdateInputs, cpu};
use crate::arguments::zeroed;
use crate::kinds::CheckViews;
use crate::pool::{UpdateMut, UpdateOutput};
use crate::simd::Isa;
use crate::{Element, Host, Memory, Result, ViewMut};

/// The names of the dimensions of the pool and of the states after each token.
pub(crate) const POOL_NAMES: [&str; 2] = ["(slots, width - 1, d_inner)", "(batch, tokens, width - 1, d_inner)"];

/// Inputs that have passed [`UpdateInputs::check`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct UpdateProblem<'a, T: Element, M: Memory = Host> {
    pub inputs: UpdateInputs<'a, T, M>,
    pub width: usize,
}

impl<'a, T: Element, M: Memory> UpdateInputs<'a, T, M> {
    /// Checks every argument but those of [`UpdateProblem::check_outputs`].
    pub(crate) fn check(&self) -> Result<UpdateProblem<'a, T, M>> {
        let sizes = check_filter("(batch, tokens, d_inner)", &self.x, &self.weight)?;
        self.tensors().shaped(sizes).map(&mut CheckViews)?;
        Ok(UpdateProblem { inputs: *self, width: sizes.width })
    }
}

impl<'a, T: Element, M: Memory> UpdateProblem<'a, T, M> {
    pub fn state_shape(&self) -> [usize; 2] {
        [self.width - 1, self.inputs.x.shape[2]]
    }

    pub fn token_state_shape(&self) -> [usize; 4] {
        let [batch, tokens, d_inner] = self.inputs.x.shape;
        [batch, tokens, self.width - 1, d_inner]
    }

    /// Checks the pool, the slots and the buffers to be written.
    pub fn check_outputs<St: Element>(&self, outputs: &UpdateMut<T, St, M>) -> Result<()> {
        outputs.check(self.inputs.x.shape, self.state_shape(), POOL_NAMES, self.inputs.slots)
    }
}

impl<T: Element> UpdateInputs<'_, T> {
    /// Runs the update on the CPU and returns `out`, `(batch, tokens, d_inner)`.
    pub fn update<St: Element>(&self, state: ViewMut<St, 3>) -> Result<Vec<T>> {
        let problem = self.check()?;
        let mut out = zeroed("x", &self.x.shape)?;
        cpu::update_checked(Isa::best(), &problem, UpdateMut { state, out: &mut out, token_states: None })?;
        Ok(out)
    }

    /// Runs the update on the CPU and also returns the state after each token, for [`rollback`](super::rollback).
    pub fn update_with_token_states<St: Element>(&self, state: ViewMut<St, 3>) -> Result<UpdateOutput<T, St>> {
        let problem = self.check()?;
        let mut output =
            UpdateOutput { out: zeroed("x", &self.x.shape)?, token_states: zeroed("x", &problem.token_state_shape())? };
        let (out, token_states) = (&mut output.out[..], Some(&mut output.token_states[..]));
        cpu::update_checked(Isa::best(), &problem, UpdateMut { state, out, token_states })?;
        Ok(output)
    }
}
