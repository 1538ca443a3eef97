//! The scan with complex states and its update in place on candle's tensors.

use candle_core::{Result, Tensor};

use super::check::{ACTIVATION_NAMES, POOL_NAMES, Problem, STATE_NAMES, UpdateProblem};
use super::tensors::{ComplexScan, ComplexUpdate};
use super::{GradientsMut, Inputs, Options, OutputGradients, OutputMut, Tensors, UpdateInputs, UpdateMut, cpu};
use crate::ViewMut;
use crate::candle::ComplexScanGradients;
use crate::candle::device::{Backend, Cpu, Value, for_dtype};
use crate::candle::in_place::{InPlace, RunsOn, Updated, in_place, updated};
use crate::candle::sequences::over_sequences;
use crate::candle::tensors::{Arguments, Reader, both};
use crate::simd::Isa;

/// A device that runs scans with complex states.
pub(crate) trait ComplexScanBackend: Backend {
    fn forward<T: Value>(
        &self,
        problem: &Problem<T, Self::Memory>,
        outputs: OutputMut<T, Self::Memory>,
    ) -> crate::Result<()>;

    fn backward<T: Value>(
        &self,
        problem: &Problem<T, Self::Memory>,
        d_outputs: OutputGradients<T, Self::Memory>,
        gradients: GradientsMut<T, Self::Memory>,
    ) -> crate::Result<()>;

    fn update<T: Value, St: Value>(
        &self,
        problem: &UpdateProblem<T, Self::Memory>,
        outputs: UpdateMut<T, St, Self::Memory>,
    ) -> crate::Result<()>;
}

impl ComplexScanBackend for Cpu {
    fn forward<T: Value>(&self, problem: &Problem<T>, outputs: OutputMut<T>) -> crate::Result<()> {
        cpu::forward_checked(Isa::best(), problem, outputs)
    }

    fn backward<T: Value>(
        &self,
        problem: &Problem<T>,
        d_outputs: OutputGradients<T>,
        gradients: GradientsMut<T>,
    ) -> crate::Result<()> {
        cpu::backward_checked(Isa::best(), problem, d_outputs, gradients)
    }

    fn update<T: Value, St: Value>(&self, problem: &UpdateProblem<T>, outputs: UpdateMut<T, St>) -> crate::Result<()> {
        cpu::update_checked(problem, outputs)
    }
}

#[cfg(feature = "candle-cuda")]
impl ComplexScanBackend for crate::candle::cuda::Gpu {
    fn forward<T: Value>(
        &self,
        problem: &Problem<T, Self::Memory>,
        outputs: OutputMut<T, Self::Memory>,
    ) -> crate::Result<()> {
        super::cuda::forward_checked(&self.stream, problem, outputs)
    }

    fn backward<T: Value>(
        &self,
        problem: &Problem<T, Self::Memory>,
        d_outputs: OutputGradients<T, Self::Memory>,
        gradients: GradientsMut<T, Self::Memory>,
    ) -> crate::Result<()> {
        super::cuda::backward_checked(&self.stream, problem, d_outputs, gradients)
    }

    fn update<T: Value, St: Value>(
        &self,
        problem: &UpdateProblem<T, Self::Memory>,
        outputs: UpdateMut<T, St, Self::Memory>,
    ) -> crate::Result<()> {
        super::cuda::update_checked(&self.stream, problem, outputs)
    }
}

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

over_sequences!(ComplexScan on ComplexScanBackend, "complex-scan", u = "u");

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

impl InPlace for ComplexUpdate<'_> {
    const NAME: &'static str = "complex-update";
    const STATE: &'static str = POOL_NAMES[0];

    fn arguments(&self) -> Arguments<'_> {
        let mut arguments = Arguments::default();
        let Ok(_) = self.tensors().map(&mut arguments);
        arguments.add_slots(self.slots);
        arguments
    }
}

impl<B: ComplexScanBackend> RunsOn<B> for ComplexUpdate<'_> {
    fn run<St: Value>(
        &self,
        backend: &B,
        reader: Reader,
        state: ViewMut<St, 3, B::Memory>,
        with_token_states: bool,
    ) -> Result<Updated> {
        for_dtype!("u", self.u.dtype(), |T| {
            let views = self.tensors().map(&mut reader.views::<B, T>())?;
            let problem = UpdateInputs::of(views, reader.slots::<B>(self.slots)?, self.delta_softplus).check()?;
            let shapes = (problem.inputs.u.shape, problem.token_state_shape());
            updated::<B, T, St>(backend, "u", shapes, state, with_token_states, |outputs| {
                backend.update(&problem, outputs)
            })
        })
    }
}
