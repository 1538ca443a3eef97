//! The scan with complex states and its update in place on candle's tensors.

use candle_core::{Result, Tensor};

use super::check::{ACTIVATION_NAMES, POOL_NAMES, Problem, STATE_NAMES, UpdateProblem};
use super::tensors::{ComplexScan, ComplexUpdate};
use super::{GradientsMut, Inputs, Options, OutputGradients, OutputMut, Tensors, UpdateInputs, UpdateMut, cpu};
use crate::candle::ComplexScanGradients;
use crate::candle::in_place::{Updated, in_place, updates_in_place};
use crate::candle::sequences::over_sequences;
use crate::candle::tensors::both;

impl ComplexScan<'_> {
    /// Runs the scan: `(batch, length, d_inner)` of `T`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names. What the device refuses.
    pub fn forward(&self) -> Result<Tensor> {
        Ok(self.run_forward(false)?.0)
    }

    /// Runs the scan and also gives the final state, `(sequences, d_inner, 2 * d_state)` of `f32`.
    ///
    /// # Errors
    /// As [`ComplexScan::forward`].
    pub fn forward_with_state(&self) -> Result<(Tensor, Tensor)> {
        self.run_forward(true).map(both)
    }

    /// The gradients of all tensors that were given, from the gradients of the output and of the final state. This is
    /// what candle's backward pass does; here nothing is recorded in its graph.
    ///
    /// # Errors
    /// As [`ComplexScan::forward`].
    pub fn backward(&self, d_out: &Tensor, d_final_state: Option<&Tensor>) -> Result<ComplexScanGradients> {
        self.run_backward(d_out, d_final_state)
    }
}

over_sequences!(ComplexScan, "complex-scan", u = "u", cuda());

impl ComplexUpdate<'_> {
    /// Brings the pool `state`, `(slots, d_inner, 2 * d_state)` of `f32`, `f16` or `bf16`, up to date and gives the
    /// output, `(batch, tokens, d_inner)` of `T`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names; then nothing is written. `state` must not share its
    /// storage with another argument, nor be a variable or part of candle's graph: see
    /// [the module](crate::candle#updates-in-place). What the device refuses.
    pub fn update(&self, state: &Tensor) -> Result<Tensor> {
        Ok(self.run(state, false)?.0)
    }

    /// [`update`](Self::update) that also gives the state after each token, `(batch, tokens, d_inner, 2 * d_state)` of
    /// the type of `state`, for [`rollback`](crate::candle::rollback).
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn update_with_token_states(&self, state: &Tensor) -> Result<(Tensor, Tensor)> {
        self.run(state, true).map(both)
    }

    fn run(&self, state: &Tensor, with_token_states: bool) -> Result<Updated> {
        in_place(self, state, with_token_states)
    }
}

updates_in_place!(ComplexUpdate, "complex-update", POOL_NAMES, u = "u", UpdateInputs(delta_softplus) -> UpdateProblem, cpu());
