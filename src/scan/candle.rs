//! The selective scan on candle's tensors.

use candle_core::{Result, Tensor};

use super::check::{ACTIVATION_NAMES, Problem, STATE_NAMES};
#[cfg(feature = "candle-cuda")]
use super::cuda::Plan;
use super::tensors::Scan;
use super::{GradientsMut, Inputs, Options, OutputGradients, OutputMut, Tensors, cpu};
use crate::candle::ScanGradients;
use crate::candle::device::{Backend, Buffer, Cpu, Value, for_dtype, on_device};
use crate::candle::graph::{self, Backward, Computed};
use crate::candle::tensors::{Allocate, Arguments, CandleTensors, Keep, Lend, List, Owned, Reader, Store, both};
use crate::simd::Isa;

const NAME: &str = "selective-scan";

/// A device that runs scans.
trait ScanBackend: Backend {
    fn forward<T: Value>(
        &self,
        problem: &Problem<T, Self::Memory>,
        outputs: OutputMut<T, Self::Memory>,
    ) -> crate::Result<()>;

    fn backward<T: Value>(
        &self,
        problem: &Problem<T, Self::Memory>,
        checkpoints: &Buffer<Self, f32>,
        d_outputs: OutputGradients<T, Self::Memory>,
        gradients: GradientsMut<T, Self::Memory>,
    ) -> crate::Result<()>;
}

impl ScanBackend for Cpu {
    fn forward<T: Value>(&self, problem: &Problem<T>, outputs: OutputMut<T>) -> crate::Result<()> {
        cpu::forward_checked(Isa::best(), problem, outputs)
    }

    fn backward<T: Value>(
        &self,
        problem: &Problem<T>,
        checkpoints: &[f32],
        d_outputs: OutputGradients<T>,
        gradients: GradientsMut<T>,
    ) -> crate::Result<()> {
        cpu::backward_checked(Isa::best(), problem, checkpoints, d_outputs, gradients)
    }
}

#[cfg(feature = "candle-cuda")]
impl ScanBackend for crate::candle::cuda::Gpu {
    fn forward<T: Value>(
        &self,
        problem: &Problem<T, Self::Memory>,
        outputs: OutputMut<T, Self::Memory>,
    ) -> crate::Result<()> {
        super::cuda::forward_checked(Plan::default(), &self.stream, problem, outputs)
    }

    fn backward<T: Value>(
        &self,
        problem: &Problem<T, Self::Memory>,
        checkpoints: &Buffer<Self, f32>,
        d_outputs: OutputGradients<T, Self::Memory>,
        gradients: GradientsMut<T, Self::Memory>,
    ) -> crate::Result<()> {
        super::cuda::backward_checked(Plan::default(), &self.stream, problem, checkpoints, d_outputs, gradients)
    }
}

impl Scan<'_> {
    /// Runs the scan: `(batch, length, d_inner)` of `T`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names. What the device refuses.
    pub fn forward(&self) -> Result<Tensor> {
        Ok(self.run(false)?.0)
    }

    /// Runs the scan and also gives the state after the last step, `(sequences, d_inner, d_state)` of `f32`.
    ///
    /// # Errors
    /// As [`Scan::forward`].
    pub fn forward_with_state(&self) -> Result<(Tensor, Tensor)> {
        self.run(true).map(both)
    }

    /// Runs the scan outside of candle's graph, and also gives the checkpoints that [`backward`](Self::backward) reads: the
    /// states at every 64th step, `(elements)` of `f32`. For an operator of several that has a backward pass of its own.
    ///
    /// # Errors
    /// As [`Scan::forward`].
    pub fn forward_with_checkpoints(&self) -> Result<(Tensor, Tensor)> {
        let mut arguments = Arguments::default();
        let Ok(_) = self.tensors().map(&mut arguments);
        let locked = arguments.lock()?;
        let results = on_device!("u", self.u, |backend| for_dtype!("u", self.u.dtype(), |T| {
            self.compute::<_, T>(backend, locked.reader(), false, true)
        }))?;
        Ok(both((results.out.untracked(), results.checkpoints)))
    }

    /// [`forward_with_checkpoints`](Self::forward_with_checkpoints) that also gives the final state, `(batch, d_inner, d_state)` of
    /// `f32`, last.
    ///
    /// # Errors
    /// As [`Scan::forward`].
    pub fn forward_with_checkpoints_and_state(&self) -> Result<(Tensor, Tensor, Tensor)> {
        let mut arguments = Arguments::default();
        let Ok(_) = self.tensors().map(&mut arguments);
        let locked = arguments.lock()?;
        let results = on_device!("u", self.u, |backend| for_dtype!("u", self.u.dtype(), |T| {
            self.compute::<_, T>(backend, locked.reader(), true, true)
        }))?;
        let Results { out, final_state, checkpoints } = results;
        let (out, checkpoints) = both((out.untracked(), checkpoints));
        let (out, final_state) = both((out, final_state.map(Computed::untracked)));
        Ok((out, checkpoints, final_state))
    }

    fn run(&self, with_state: bool) -> Result<(Tensor, Option<Tensor>)> {
        let mut arguments = Arguments::default();
        let Ok(_) = self.tensors().map(&mut arguments);
        let tensors = arguments.tensors();
        let tracked = graph::is_tracked(&tensors);
        let results = {
            let locked = arguments.lock()?;
            on_device!("u", self.u, |backend| for_dtype!("u", self.u.dtype(), |T| {
                self.compute::<_, T>(backend, locked.reader(), with_state, tracked)
            }))
        }?;
        let Results { out, final_state, checkpoints } = results;
        let Some(checkpoints) = checkpoints else {
            return Ok((out.untracked(), final_state.map(Computed::untracked)));
        };
        let Ok(kept) = self.tensors().map(&mut Keep);
        let cu_seqlens = self.cu_seqlens.map(<[usize]>::to_vec);
        let kept = Kept { tensors: kept, cu_seqlens, options: self.options, checkpoints };
        graph::attach(NAME, &tensors, out, final_state, kept)
    }

    fn compute<B: ScanBackend, T: Value>(
        &self,
        backend: &B,
        reader: Reader,
        with_state: bool,
        with_checkpoints: bool,
    ) -> Result<Results> {
        let views = self.tensors().map(&mut reader.views::<B, T>())?;
        let problem = Inputs::of(views, self.cu_seqlens, self.options).check()?;
        let (activation, state) = (problem.activation_shape(), problem.state_shape());
        let slots = [if with_checkpoints { problem.checkpoint_len()? } else { 0 }];
        let mut out = backend.allocate::<T>("u", &activation)?;
        let mut final_state = with_state.then(|| backend.allocate::<f32>("initial_state", &state)).transpose()?;
        let mut checkpoints = with_checkpoints.then(|| backend.allocate::<f32>("u", &slots)).transpose()?;
        let outputs = OutputMut {
            out: B::borrow(&mut out),
            final_state: final_state.as_mut().map(B::borrow),
            checkpoints: checkpoints.as_mut().map(B::borrow),
        };
        backend.forward(&problem, outputs)?;
        Ok(Results {
            out: Computed::new(backend.store(out), activation),
            final_state: final_state.map(|data| Computed::new(backend.store(data), state)),
            checkpoints: checkpoints.map(|data| graph::untracked(backend.store(data), slots[0])),
        })
    }

    /// The gradients of all tensors that were given, from the gradients of the output and of the final state, and the
    /// checkpoints that [`forward_with_checkpoints`](Self::forward_with_checkpoints) gave for the same tensors. This is what candle's backward pass
    /// does; here nothing is recorded in its graph.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names. What the device refuses.
    pub fn backward(
        &self,
        checkpoints: &Tensor,
        d_out: &Tensor,
        d_final_state: Option<&Tensor>,
    ) -> Result<ScanGradients> {
        let mut arguments = Arguments::default();
        let Ok(_) = self.tensors().map(&mut arguments);
        arguments.add("checkpoints", checkpoints);
        arguments.add("d_out", d_out);
        if let Some(tensor) = d_final_state {
            arguments.add("d_final_state", tensor);
        }
        let locked = arguments.lock()?;
        let reader = locked.reader();
        on_device!("u", self.u, |backend| for_dtype!("u", self.u.dtype(), |T| {
            self.gradients::<_, T>(backend, reader, checkpoints, d_out, d_final_state)
        }))
    }

    fn gradients<B: ScanBackend, T: Value>(
        &self,
        backend: &B,
        reader: Reader,
        checkpoints: &Tensor,
        d_out: &Tensor,
        d_final_state: Option<&Tensor>,
    ) -> Result<ScanGradients> {
        let views = self.tensors().map(&mut reader.views::<B, T>())?;
        let problem = Inputs::of(views, self.cu_seqlens, self.options).check()?;
        let checkpoints = reader.view::<B, f32, 1>("checkpoints", "(elements)", checkpoints)?;
        let final_state = |tensor| reader.view::<B, f32, 3>("d_final_state", STATE_NAMES, tensor);
        let d_outputs = OutputGradients {
            d_out: reader.view::<B, T, 3>("d_out", ACTIVATION_NAMES, d_out)?,
            d_final_state: d_final_state.map(final_state).transpose()?,
        };
        let mut gradients: Tensors<Owned<B, T>> = self.tensors().map(&mut Allocate(backend))?;
        let Ok(buffers) = gradients.by_mut().map(&mut Lend);
        backend.backward(&problem, checkpoints.data, d_outputs, buffers)?;
        let Ok(gradients) = gradients.zip(self.tensors())?.map(&mut Store(backend));
        Ok(gradients)
    }
}

/// What a forward pass gives.
struct Results {
    out: Computed,
    final_state: Option<Computed>,
    /// Those that a backward pass needs, if one may follow.
    checkpoints: Option<Tensor>,
}

/// What a backward pass needs: the inputs and the checkpoints.
struct Kept {
    tensors: Tensors<CandleTensors>,
    cu_seqlens: Option<Vec<usize>>,
    options: Options,
    checkpoints: Tensor,
}

impl Backward for Kept {
    fn backward(&self, d_out: &Tensor, d_final_state: Option<&Tensor>) -> Result<Vec<Option<Tensor>>> {
        let operator = Scan::over(&self.tensors, self.cu_seqlens.as_deref(), self.options);
        let mut list = List::default();
        let Ok(_) = operator.backward(&self.checkpoints, d_out, d_final_state)?.map(&mut list);
        Ok(list.0)
    }
}
