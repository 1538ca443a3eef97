//! The arguments of the convolution on a pool of states, in place, as decoding runs it.

use super::{check_filter, cpu};
use crate::arguments::zeroed;
use crate::pool::{Slots, UpdateMut, UpdateOutput};
use crate::{Element, Host, Memory, Result, View, ViewMut};

/// What an update reads beside the states. A state is what [`Inputs::initial_state`](super::Inputs) says, the last
/// `width - 1` inputs, oldest first.
///
/// An input is rounded to the pool's type as soon as it is part of the state, also where the next token follows at
/// once. So `K` tokens in one update give the same bits as `K` updates of one token, and speculative decoding, with
/// rejected tokens rolled back by [`rollback`](super::rollback), gives what plain decoding gives.
#[derive(Debug)]
pub struct UpdateInputs<'a, T: Element, M: Memory = Host> {
    /// The input, `(batch, tokens, d_inner)`.
    pub x: View<'a, T, 3, M>,
    /// The filters, `(d_inner, width)`; the last weight meets the newest input.
    pub weight: View<'a, f32, 2, M>,
    /// Added to every output before SiLU, `(d_inner)`.
    pub bias: Option<View<'a, f32, 1, M>>,
    /// The slot of each batch row's state, `(batch)`. No two rows may have the same; a negative one makes its row
    /// padding, which gives zero and touches no state. If absent, the pool has one slot for each row.
    pub slots: Option<&'a [i32]>,
    /// Apply `silu(x) = x/(1 + e^-x)` to the result.
    pub silu: bool,
}

impl<T: Element, M: Memory> Clone for UpdateInputs<'_, T, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element, M: Memory> Copy for UpdateInputs<'_, T, M> {}

/// The names of the dimensions of the pool and of the states behind each token.
pub(crate) const POOL_NAMES: [&str; 2] = ["(slots, width - 1, d_inner)", "(batch, tokens, width - 1, d_inner)"];

/// Inputs that have passed [`UpdateInputs::check`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct UpdateProblem<'a, T: Element, M: Memory = Host> {
    pub inputs: UpdateInputs<'a, T, M>,
    pub width: usize,
}

impl<'a, T: Element, M: Memory> UpdateInputs<'a, T, M> {
    /// The inputs that every update has; bias and slots are absent and SiLU is off. Add them with struct update syntax:
    /// `UpdateInputs { slots: Some(&slots), ..UpdateInputs::new(x, weight) }`.
    pub fn new(x: View<'a, T, 3, M>, weight: View<'a, f32, 2, M>) -> Self {
        Self { x, weight, bias: None, slots: None, silu: false }
    }

    /// Checks every argument but those of [`UpdateProblem::check_outputs`].
    pub(crate) fn check(&self) -> Result<UpdateProblem<'a, T, M>> {
        Ok(UpdateProblem {
            inputs: *self,
            width: check_filter("(batch, tokens, d_inner)", &self.x, &self.weight, &self.bias)?,
        })
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
    pub fn check_outputs<St: Element>(&self, outputs: &UpdateMut<T, St, M>) -> Result<Slots<'a>> {
        outputs.check(self.inputs.x.shape, self.state_shape(), POOL_NAMES, self.inputs.slots)
    }
}

impl<T: Element> UpdateInputs<'_, T> {
    /// Runs the update on the CPU and returns `out`, `(batch, tokens, d_inner)`.
    pub fn update<St: Element>(&self, state: ViewMut<St, 3>) -> Result<Vec<T>> {
        self.check()?;
        let mut out = zeroed("x", &self.x.shape)?;
        cpu::update(self, UpdateMut { state, out: &mut out, token_states: None })?;
        Ok(out)
    }

    /// Runs the update on the CPU and also returns the state behind each token, for [`rollback`](super::rollback).
    pub fn update_with_token_states<St: Element>(&self, state: ViewMut<St, 3>) -> Result<UpdateOutput<T, St>> {
        let problem = self.check()?;
        let mut output =
            UpdateOutput { out: zeroed("x", &self.x.shape)?, token_states: zeroed("x", &problem.token_state_shape())? };
        let (out, token_states) = (&mut output.out[..], Some(&mut output.token_states[..]));
        cpu::update(self, UpdateMut { state, out, token_states })?;
        Ok(output)
    }
}
