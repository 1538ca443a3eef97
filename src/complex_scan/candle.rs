//! The scan with complex states and its update in place on candle's tensors.

use candle_core::{Device, Result, Tensor};

use super::check::{ACTIVATION_NAMES, POOL_NAMES, STATE_NAMES};
use super::tensors::{ComplexScan, ComplexUpdate};
use super::{Inputs, Options, OutputGradients, OutputMut, Tensors, UpdateInputs, cpu};
use crate::candle::ComplexScanGradients;
use crate::candle::device::{Backend, Cpu, Value, for_dtype};
use crate::candle::graph::{self, Backward, Computed};
use crate::candle::in_place::{InPlace, RunsOn, Updated, in_place, updated};
use crate::candle::tensors::{Allocate, Arguments, CandleTensors, Keep, Lend, List, Owned, Reader, Store, both};
use crate::simd::Isa;
use crate::{Error, ViewMut};

const NAME: &str = "complex-scan";

/// Refuses tensors that are not on the processor.
fn check_processor(argument: &'static str, tensor: &Tensor) -> Result<()> {
    match tensor.device() {
        Device::Cpu => Ok(()),
        device => {
            let expected = "a tensor on the processor (the scan with complex states has no kernels for GPUs)";
            Err(Error::argument(argument, expected, format_args!("one on {:?}", device.location())).into())
        }
    }
}

impl ComplexScan<'_> {
    /// Runs the scan: `(batch, length, d_inner)` of `T`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names. Tensors on another device than the processor.
    pub fn forward(&self) -> Result<Tensor> {
        Ok(self.run(false)?.0)
    }

    /// Runs the scan and also gives the final state, `(sequences, d_inner, 2 * d_state)` of `f32`.
    ///
    /// # Errors
    /// As [`ComplexScan::forward`].
    pub fn forward_with_state(&self) -> Result<(Tensor, Tensor)> {
        self.run(true).map(both)
    }

    fn run(&self, with_state: bool) -> Result<(Tensor, Option<Tensor>)> {
        check_processor("u", self.u)?;
        let mut arguments = Arguments::default();
        let Ok(_) = self.tensors().map(&mut arguments);
        let tensors = arguments.tensors();
        let (out, final_state) = {
            let locked = arguments.lock()?;
            for_dtype!("u", self.u.dtype(), |T| self.compute::<T>(locked.reader(), with_state))
        }?;
        if !graph::is_tracked(&tensors) {
            return Ok((out.untracked(), final_state.map(Computed::untracked)));
        }
        let Ok(kept) = self.tensors().map(&mut Keep);
        let cu_seqlens = self.cu_seqlens.map(<[usize]>::to_vec);
        let kept = Kept { tensors: kept, cu_seqlens, options: self.options };
        graph::attach(NAME, &tensors, out, final_state, kept)
    }

    fn compute<T: Value>(&self, reader: Reader, with_state: bool) -> Result<(Computed, Option<Computed>)> {
        let views = self.tensors().map(&mut reader.views::<Cpu, T>())?;
        let problem = Inputs::of(views, self.cu_seqlens, self.options).check()?;
        let (activation, state) = (problem.inputs.u.shape, problem.state_shape());
        let mut out = Cpu.allocate::<T>("u", &activation)?;
        let mut final_state = with_state.then(|| Cpu.allocate::<f32>("initial_state", &state)).transpose()?;
        let outputs = OutputMut { out: &mut out[..], final_state: final_state.as_deref_mut() };
        cpu::forward_checked(Isa::best(), &problem, outputs)?;
        let out = Computed::new(Cpu.store(out), activation);
        Ok((out, final_state.map(|data| Computed::new(Cpu.store(data), state))))
    }

    /// The gradients of all tensors that were given, from the gradients of the output and of the final state. This is
    /// what candle's backward pass does; here nothing is recorded in its graph.
    ///
    /// # Errors
    /// As [`ComplexScan::forward`].
    pub fn backward(&self, d_out: &Tensor, d_final_state: Option<&Tensor>) -> Result<ComplexScanGradients> {
        check_processor("u", self.u)?;
        let mut arguments = Arguments::default();
        let Ok(_) = self.tensors().map(&mut arguments);
        arguments.add("d_out", d_out);
        if let Some(tensor) = d_final_state {
            arguments.add("d_final_state", tensor);
        }
        let locked = arguments.lock()?;
        let reader = locked.reader();
        for_dtype!("u", self.u.dtype(), |T| self.gradients::<T>(reader, d_out, d_final_state))
    }

    fn gradients<T: Value>(
        &self,
        reader: Reader,
        d_out: &Tensor,
        d_final_state: Option<&Tensor>,
    ) -> Result<ComplexScanGradients> {
        let views = self.tensors().map(&mut reader.views::<Cpu, T>())?;
        let problem = Inputs::of(views, self.cu_seqlens, self.options).check()?;
        let final_state = |tensor| reader.view::<Cpu, f32, 3>("d_final_state", STATE_NAMES, tensor);
        let d_outputs = OutputGradients {
            d_out: reader.view::<Cpu, T, 3>("d_out", ACTIVATION_NAMES, d_out)?,
            d_final_state: d_final_state.map(final_state).transpose()?,
        };
        let mut gradients: Tensors<Owned<Cpu, T>> = self.tensors().map(&mut Allocate(&Cpu))?;
        let Ok(buffers) = gradients.by_mut().map(&mut Lend);
        cpu::backward_checked(Isa::best(), &problem, d_outputs, buffers)?;
        let Ok(gradients) = gradients.zip(self.tensors())?.map(&mut Store(&Cpu));
        Ok(gradients)
    }
}

/// What a backward pass needs: the inputs.
struct Kept {
    tensors: Tensors<CandleTensors>,
    cu_seqlens: Option<Vec<usize>>,
    options: Options,
}

impl Backward for Kept {
    fn backward(&self, d_out: &Tensor, d_final_state: Option<&Tensor>) -> Result<Vec<Option<Tensor>>> {
        let operator = ComplexScan::over(&self.tensors, self.cu_seqlens.as_deref(), self.options);
        let mut list = List::default();
        let Ok(_) = operator.backward(d_out, d_final_state)?.map(&mut list);
        Ok(list.0)
    }
}

impl ComplexUpdate<'_> {
    /// Brings the pool `state`, `(slots, d_inner, 2 * d_state)` of `f32`, `f16` or `bf16`, up to date and gives the
    /// output, `(batch, tokens, d_inner)` of `T`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names; then nothing is written. `state` must not share its
    /// storage with another argument, nor be a variable or part of candle's graph: see
    /// [the module](crate::candle#updates-in-place). Tensors on another device than the processor.
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
        check_processor("u", self.u)?;
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

impl RunsOn<Cpu> for ComplexUpdate<'_> {
    fn run<St: Value>(
        &self,
        backend: &Cpu,
        reader: Reader,
        state: ViewMut<St, 3>,
        with_token_states: bool,
    ) -> Result<Updated> {
        for_dtype!("u", self.u.dtype(), |T| {
            let views = self.tensors().map(&mut reader.views::<Cpu, T>())?;
            let problem = UpdateInputs::of(views, reader.slots::<Cpu>(self.slots)?, self.delta_softplus).check()?;
            let shapes = (problem.inputs.u.shape, problem.token_state_shape());
            updated::<Cpu, T, St>(backend, "u", shapes, state, with_token_states, |outputs| {
                cpu::update_checked(&problem, outputs)
            })
        })
    }
}

#[cfg(feature = "candle-cuda")]
impl RunsOn<crate::candle::cuda::Gpu> for ComplexUpdate<'_> {
    fn run<St: Value>(
        &self,
        _: &crate::candle::cuda::Gpu,
        _: Reader,
        _: ViewMut<St, 3, <crate::candle::cuda::Gpu as Backend>::Memory>,
        _: bool,
    ) -> Result<Updated> {
        // All tensors are on one device, and `run` has refused another than the processor.
        check_processor("u", self.u)?;
        Err(Error::argument("state", "a tensor on the processor", "one on a GPU").into())
    }
}
