//! The state update on candle's tensors.

use candle_core::{Result, Tensor};

use super::tensors::StateUpdate;
use super::{Inputs, Problem, STATE_NAMES, UpdateMut, cpu};
use crate::ViewMut;
use crate::candle::device::{Backend, Cpu, Value, for_dtype};
use crate::candle::in_place::{InPlace, RunsOn, Updated, in_place, updated};
use crate::candle::tensors::{Arguments, Reader, both};
use crate::simd::Isa;

/// A device that runs state updates.
pub(crate) trait StateUpdateBackend: Backend {
    fn update<T: Value, St: Value>(
        &self,
        problem: &Problem<T, Self::Memory>,
        outputs: UpdateMut<T, St, Self::Memory>,
    ) -> crate::Result<()>;
}

impl StateUpdateBackend for Cpu {
    fn update<T: Value, St: Value>(&self, problem: &Problem<T>, outputs: UpdateMut<T, St>) -> crate::Result<()> {
        cpu::update_checked(Isa::best(), problem, outputs)
    }
}

#[cfg(feature = "candle-cuda")]
impl StateUpdateBackend for crate::candle::cuda::Gpu {
    fn update<T: Value, St: Value>(
        &self,
        problem: &Problem<T, Self::Memory>,
        outputs: UpdateMut<T, St, Self::Memory>,
    ) -> crate::Result<()> {
        super::cuda::update_checked(&self.stream, problem, outputs)
    }
}

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

impl InPlace for StateUpdate<'_> {
    const NAME: &'static str = "state-update";
    const STATE: &'static str = STATE_NAMES[0];

    fn arguments(&self) -> Arguments<'_> {
        let mut arguments = Arguments::default();
        let Ok(_) = self.tensors().map(&mut arguments);
        arguments.add_slots(self.slots);
        arguments
    }
}

impl<B: StateUpdateBackend> RunsOn<B> for StateUpdate<'_> {
    fn run<St: Value>(
        &self,
        backend: &B,
        reader: Reader,
        state: ViewMut<St, 3, B::Memory>,
        with_token_states: bool,
    ) -> Result<Updated> {
        for_dtype!("u", self.u.dtype(), |T| {
            let views = self.tensors().map(&mut reader.views::<B, T>())?;
            let problem = Inputs::of(views, reader.slots::<B>(self.slots)?, self.options).check()?;
            let shapes = (problem.activation_shape(), problem.token_state_shape());
            updated::<B, T, St>(backend, "u", shapes, state, with_token_states, |outputs| {
                backend.update(&problem, outputs)
            })
        })
    }
}
