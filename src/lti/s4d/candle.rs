//! S4D and its update in place on candle's tensors.

use candle_core::{Result, Tensor};

use super::check::{ACTIVATION_NAMES, POOL_NAMES, Problem, STATE_NAMES, UpdateProblem, check_recurrence};
use super::tensors::{S4d, S4dUpdate};
use super::{GradientsMut, Inputs, Options, OutputGradients, OutputMut, Tensors, UpdateInputs, UpdateMut, cpu};
use crate::View;
use crate::candle::S4dGradients;
use crate::candle::device::{Backend, Cpu, on_device};
use crate::candle::graph;
use crate::candle::in_place::{Updated, in_place, updates_in_place};
use crate::candle::sequences::over_sequences;
use crate::candle::tensors::{Arguments, Reader, both};
use crate::lti::Rule;
use crate::simd::Isa;

impl S4d<'_> {
    /// Runs the operator: `(batch, length, d_inner)` of `T`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names. What the device refuses.
    pub fn forward(&self) -> Result<Tensor> {
        Ok(self.run_forward(false)?.0)
    }

    /// Runs the operator and also gives the final state, `(sequences, d_inner, 2 * d_state)` of `f32`.
    ///
    /// # Errors
    /// As [`S4d::forward`].
    pub fn forward_with_state(&self) -> Result<(Tensor, Tensor)> {
        self.run_forward(true).map(both)
    }

    /// The gradients of all tensors that were given, from the gradients of the output and of the final state. This is
    /// what candle's backward pass does; here nothing is recorded in its graph.
    ///
    /// # Errors
    /// As [`S4d::forward`].
    pub fn backward(&self, d_out: &Tensor, d_final_state: Option<&Tensor>) -> Result<S4dGradients> {
        self.run_backward(d_out, d_final_state)
    }
}

over_sequences!(S4d, "s4d", u = "u", cuda(super::cuda::Plan::default()));

/// A device that makes recurrences.
trait RecurrenceBackend: Backend {
    /// [`recurrence`](super::recurrence) of the step sizes and of `A` and `B`, which have been checked; it has this shape.
    fn recurrence(
        &self,
        shape: [usize; 3],
        log_delta: View<f32, 1, Self::Memory>,
        complex: [View<f32, 2, Self::Memory>; 2],
        rule: Rule,
    ) -> crate::Result<Self::Owned<f32>>;
}

impl RecurrenceBackend for Cpu {
    fn recurrence(
        &self,
        _: [usize; 3],
        log_delta: View<f32, 1>,
        [a, b]: [View<f32, 2>; 2],
        rule: Rule,
    ) -> crate::Result<Vec<f32>> {
        super::recurrence(log_delta, a, b, rule)
    }
}

#[cfg(feature = "candle-cuda")]
impl RecurrenceBackend for crate::candle::cuda::Gpu {
    fn recurrence(
        &self,
        shape: [usize; 3],
        log_delta: View<f32, 1, Self::Memory>,
        [a, b]: [View<f32, 2, Self::Memory>; 2],
        rule: Rule,
    ) -> crate::Result<Self::Owned<f32>> {
        let mut to = self.allocate::<f32>("a", &shape)?;
        super::cuda::recurrence(&self.stream, log_delta, a, b, rule, &mut to)?;
        Ok(to)
    }
}

/// Makes of the parameters of an [`S4d`] what an [`S4dUpdate`] needs: `(d_inner, 6, d_state)` of `f32`, not part of
/// candle's graph. See [`recurrence`](crate::lti::s4d::recurrence).
///
/// # Errors
/// A parameter that does not fit `a`. What the device refuses.
pub fn s4d_recurrence(log_delta: &Tensor, a: &Tensor, b: &Tensor, rule: Rule) -> Result<Tensor> {
    let mut arguments = Arguments::default();
    for (name, tensor) in [("log_delta", log_delta), ("a", a), ("b", b)] {
        arguments.add(name, tensor);
    }
    let locked = arguments.lock()?;
    on_device!("a", a, |backend| made_of(backend, locked.reader(), [log_delta, a, b], rule))
}

fn made_of<B: RecurrenceBackend>(
    backend: &B,
    reader: Reader,
    [log_delta, a, b]: [&Tensor; 3],
    rule: Rule,
) -> Result<Tensor> {
    let complex = "(d_inner, 2 * d_state)";
    let log_delta: View<f32, 1, B::Memory> = reader.view::<B, f32, 1>("log_delta", "(d_inner)", log_delta)?;
    let a = reader.view::<B, f32, 2>("a", complex, a)?;
    let b = reader.view::<B, f32, 2>("b", complex, b)?;
    let shape = check_recurrence(&log_delta, &a, &b)?;
    let made = backend.recurrence(shape, log_delta, [a, b], rule)?;
    Ok(graph::untracked(backend.store(made), &shape))
}

impl S4dUpdate<'_> {
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

updates_in_place!(S4dUpdate, "s4d-update", POOL_NAMES, u = "u", UpdateInputs() -> UpdateProblem, cpu(Isa::best()));
