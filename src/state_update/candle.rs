//! The state update on candle's tensors.

use candle_core::{Result, Tensor};

use super::tensors::StateUpdate;
use super::{Inputs, Problem, STATE_NAMES, UpdateMut, cpu};
use crate::candle::in_place::{in_place, updates_in_place};
use crate::candle::tensors::both;
use crate::simd::Isa;

impl StateUpdate<'_> {
    /// Brings the pool `state`, `(slots, d_inner, d_state)` of `f32`, `f16` or `bf16`, up to date and gives the output,
    /// `(batch, tokens, d_inner)` of `T`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names; then nothing is written. `state` must not share its
    /// storage with another argument, nor be a variable or part of candle's graph: see
    /// [the module](crate::candle#updates-in-place). What the device refuses.
    pub fn update(&self, state: &Tensor) -> Result<Tensor> {
        Ok(in_place(self, state, false)?.0)
    }

    /// [`update`](Self::update) that also gives the state after each token, `(batch, tokens, d_inner, d_state)` of the
    /// type of `state`, for [`rollback`](crate::candle::rollback).
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn update_with_token_states(&self, state: &Tensor) -> Result<(Tensor, Tensor)> {
        in_place(self, state, true).map(both)
    }
}

updates_in_place!(StateUpdate, "state-update", STATE_NAMES, u = "u", Inputs(options) -> Problem, cpu(Isa::best()));
