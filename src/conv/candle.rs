//! The causal convolution and its update in place on candle's tensors.

use candle_core::{Result, Tensor};

use super::check::{ACTIVATION_NAMES, Problem, STATE_NAMES};
use super::tensors::{CausalConv, ConvUpdate};
use super::update::{POOL_NAMES, UpdateProblem};
use super::{GradientsMut, Inputs, Options, OutputGradients, OutputMut, Tensors, UpdateInputs, UpdateMut, cpu};
use crate::candle::CausalConvGradients;
use crate::candle::in_place::{Updated, in_place, updates_in_place};
use crate::candle::sequences::over_sequences;
use crate::candle::tensors::both;
use crate::simd::Isa;

/// Filters of shape `(d_inner, 1, width)`, as checkpoints have them, as `(d_inner, width)`; none if they have another.
fn without_middle(weight: &Tensor) -> Result<Option<Tensor>> {
    match weight.dims() {
        [_, 1, _] => weight.squeeze(1).map(Some),
        _ => Ok(None),
    }
}

/// The filters may also be of shape `(d_inner, 1, width)`, as checkpoints have them.
impl CausalConv<'_> {
    /// Runs the convolution: `(batch, length, d_inner)` of `T`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names. What the device refuses.
    pub fn forward(&self) -> Result<Tensor> {
        Ok(self.run(false)?.0)
    }

    /// Runs the convolution and also gives the last inputs, oldest first, `(sequences, width - 1, d_inner)` of `f32`.
    ///
    /// # Errors
    /// As [`CausalConv::forward`].
    pub fn forward_with_state(&self) -> Result<(Tensor, Tensor)> {
        self.run(true).map(both)
    }

    fn run(&self, with_state: bool) -> Result<(Tensor, Option<Tensor>)> {
        match without_middle(self.weight)? {
            Some(weight) => CausalConv { weight: &weight, ..*self }.run(with_state),
            None => self.run_forward(with_state),
        }
    }

    /// The gradients of all tensors that were given, from the gradients of the output and of the final state. This is what candle's backward pass
    /// does; here nothing is recorded in its graph.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names. What the device refuses.
    pub fn backward(&self, d_out: &Tensor, d_final_state: Option<&Tensor>) -> Result<CausalConvGradients> {
        if let Some(weight) = without_middle(self.weight)? {
            let mut gradients = CausalConv { weight: &weight, ..*self }.backward(d_out, d_final_state)?;
            gradients.weight = gradients.weight.reshape(self.weight.shape())?;
            return Ok(gradients);
        }
        self.run_backward(d_out, d_final_state)
    }
}

over_sequences!(CausalConv, "causal-conv", x = "x", cuda());

/// The filters may also be of shape `(d_inner, 1, width)`, as checkpoints have them.
impl ConvUpdate<'_> {
    /// Brings the pool `state`, `(slots, width - 1, d_inner)` of `f32`, `f16` or `bf16`, up to date and gives the output,
    /// `(batch, tokens, d_inner)` of `T`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names; then nothing is written. `state` must not share its
    /// storage with another argument, nor be a variable or part of candle's graph: see
    /// [the module](crate::candle#updates-in-place). What the device refuses.
    pub fn update(&self, state: &Tensor) -> Result<Tensor> {
        Ok(self.run(state, false)?.0)
    }

    /// [`update`](Self::update) that also gives the state after each token, `(batch, tokens, width - 1, d_inner)` of the
    /// type of `state`, for [`rollback`](crate::candle::rollback).
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn update_with_token_states(&self, state: &Tensor) -> Result<(Tensor, Tensor)> {
        self.run(state, true).map(both)
    }

    fn run(&self, state: &Tensor, with_token_states: bool) -> Result<Updated> {
        if let Some(weight) = without_middle(self.weight)? {
            return ConvUpdate { weight: &weight, ..*self }.run(state, with_token_states);
        }
        in_place(self, state, with_token_states)
    }
}

updates_in_place!(ConvUpdate, "causal-conv-update", POOL_NAMES, x = "x", UpdateInputs(silu) -> UpdateProblem, cpu(Isa::best()));
