//! What operators over sequences have in common as candle runs them: a list of tensors, an output and a final state forward, and
//! backward the gradients of all tensors from the tensors alone.

/// Makes the trait `$Backend` of devices that run both passes of an operator, in whose module `Problem`, `OutputMut`,
/// `OutputGradients`, `GradientsMut` and `cpu` are in scope; `$plan` is what its launches on GPUs take first, if they take something.
macro_rules! passes_on_devices {
    ($Backend:ident, cuda($($plan:expr)?)) => {
        /// A device that runs the operator.
        trait $Backend: $crate::candle::device::Backend {
            fn forward<T: $crate::candle::device::Value>(
                &self,
                problem: &Problem<T, Self::Memory>,
                outputs: OutputMut<T, Self::Memory>,
            ) -> $crate::Result<()>;

            fn backward<T: $crate::candle::device::Value>(
                &self,
                problem: &Problem<T, Self::Memory>,
                outputs: OutputGradients<T, Self::Memory>,
                gradients: GradientsMut<T, Self::Memory>,
            ) -> $crate::Result<()>;
        }

        impl $Backend for $crate::candle::device::Cpu {
            fn forward<T: $crate::candle::device::Value>(
                &self,
                problem: &Problem<T>,
                outputs: OutputMut<T>,
            ) -> $crate::Result<()> {
                cpu::forward_checked($crate::simd::Isa::best(), problem, outputs)
            }

            fn backward<T: $crate::candle::device::Value>(
                &self,
                problem: &Problem<T>,
                outputs: OutputGradients<T>,
                gradients: GradientsMut<T>,
            ) -> $crate::Result<()> {
                cpu::backward_checked($crate::simd::Isa::best(), problem, outputs, gradients)
            }
        }

        #[cfg(feature = "candle-cuda")]
        impl $Backend for $crate::candle::cuda::Gpu {
            fn forward<T: $crate::candle::device::Value>(
                &self,
                problem: &Problem<T, Self::Memory>,
                outputs: OutputMut<T, Self::Memory>,
            ) -> $crate::Result<()> {
                super::cuda::forward_checked($($plan,)? &self.stream, problem, outputs)
            }

            fn backward<T: $crate::candle::device::Value>(
                &self,
                problem: &Problem<T, Self::Memory>,
                outputs: OutputGradients<T, Self::Memory>,
                gradients: GradientsMut<T, Self::Memory>,
            ) -> $crate::Result<()> {
                super::cuda::backward_checked($($plan,)? &self.stream, problem, outputs, gradients)
            }
        }
    };
}

/// Implements for the struct `$Operator` of candle's tensors, in whose module the operator's `Inputs`, `Options`, `OutputMut`,
/// `OutputGradients`, `GradientsMut`, `Tensors`, `Problem`, `cpu` and the names of its shapes are in scope:
///
/// - `run_forward`, the output and, if it is asked for, the final state, in candle's graph where one of the tensors is tracked;
/// - `run_backward`, the gradients, which are not recorded in the graph.
///
/// `$first` is the activation whose shape is the output's, `$argument` its name, and `$plan` what the operator's launches on GPUs
/// take first, if they take something.
macro_rules! over_sequences {
    ($Operator:ident, $name:literal, $first:ident = $argument:literal, cuda($($plan:expr)?)) => {
        $crate::candle::sequences::passes_on_devices!(SequenceBackend, cuda($($plan)?));

        impl $Operator<'_> {
            fn run_forward(
                &self,
                with_state: bool,
            ) -> candle_core::Result<(candle_core::Tensor, Option<candle_core::Tensor>)> {
                use $crate::candle::device::{for_dtype, on_device};
                use $crate::candle::graph::{self, Computed};
                use $crate::candle::tensors::{Arguments, Keep};

                let mut arguments = Arguments::default();
                let Ok(_) = self.tensors().map(&mut arguments);
                let tensors = arguments.tensors();
                let (out, final_state) = {
                    let locked = arguments.lock()?;
                    on_device!($argument, self.$first, |backend| for_dtype!($argument, self.$first.dtype(), |T| {
                        self.compute::<_, T>(backend, locked.reader(), with_state)
                    }))
                }?;
                if !graph::is_tracked(&tensors) {
                    return Ok((out.untracked(), final_state.map(Computed::untracked)));
                }
                let Ok(tensors_kept) = self.tensors().map(&mut Keep);
                let cu_seqlens = self.cu_seqlens.map(<[usize]>::to_vec);
                let kept = Kept { tensors: tensors_kept, cu_seqlens, options: self.options };
                graph::attach($name, &tensors, out, final_state, kept)
            }

            fn compute<B: SequenceBackend, T: $crate::candle::device::Value>(
                &self,
                backend: &B,
                reader: $crate::candle::tensors::Reader,
                with_state: bool,
            ) -> candle_core::Result<($crate::candle::graph::Computed, Option<$crate::candle::graph::Computed>)> {
                use $crate::candle::graph::Computed;

                let views = self.tensors().map(&mut reader.views::<B, T>())?;
                let problem = Inputs::of(views, self.cu_seqlens, self.options).check()?;
                let (activation, state) = (problem.inputs.$first.shape, problem.state_shape());
                let mut out = backend.allocate::<T>($argument, &activation)?;
                let mut final_state =
                    with_state.then(|| backend.allocate::<f32>("initial_state", &state)).transpose()?;
                let outputs = OutputMut { out: B::borrow(&mut out), final_state: final_state.as_mut().map(B::borrow) };
                backend.forward(&problem, outputs)?;
                let out = Computed::new(backend.store(out), activation);
                Ok((out, final_state.map(|data| Computed::new(backend.store(data), state))))
            }

            fn run_backward(
                &self,
                d_out: &candle_core::Tensor,
                d_final_state: Option<&candle_core::Tensor>,
            ) -> candle_core::Result<Tensors<$crate::candle::tensors::CandleTensors>> {
                use $crate::candle::device::{for_dtype, on_device};

                let mut arguments = $crate::candle::tensors::Arguments::default();
                let Ok(_) = self.tensors().map(&mut arguments);
                arguments.add("d_out", d_out);
                if let Some(tensor) = d_final_state {
                    arguments.add("d_final_state", tensor);
                }
                let locked = arguments.lock()?;
                let reader = locked.reader();
                on_device!($argument, self.$first, |backend| for_dtype!($argument, self.$first.dtype(), |T| {
                    self.gradients::<_, T>(backend, reader, d_out, d_final_state)
                }))
            }

            fn gradients<B: SequenceBackend, T: $crate::candle::device::Value>(
                &self,
                backend: &B,
                reader: $crate::candle::tensors::Reader,
                d_out: &candle_core::Tensor,
                d_final_state: Option<&candle_core::Tensor>,
            ) -> candle_core::Result<Tensors<$crate::candle::tensors::CandleTensors>> {
                use $crate::candle::tensors::{Allocate, Lend, Owned, Store};

                let views = self.tensors().map(&mut reader.views::<B, T>())?;
                let problem = Inputs::of(views, self.cu_seqlens, self.options).check()?;
                let final_state = |tensor| reader.view::<B, f32, 3>("d_final_state", STATE_NAMES, tensor);
                let d_outputs = OutputGradients {
                    d_out: reader.view::<B, T, 3>("d_out", ACTIVATION_NAMES, d_out)?,
                    d_final_state: d_final_state.map(final_state).transpose()?,
                };
                let mut gradients: Tensors<Owned<B, T>> = self.tensors().map(&mut Allocate(backend))?;
                let Ok(buffers) = gradients.by_mut().map(&mut Lend);
                backend.backward(&problem, d_outputs, buffers)?;
                let Ok(gradients) = gradients.zip(self.tensors())?.map(&mut Store(backend));
                Ok(gradients)
            }
        }

        /// What a backward pass needs: the inputs.
        struct Kept {
            tensors: Tensors<$crate::candle::tensors::CandleTensors>,
            cu_seqlens: Option<Vec<usize>>,
            options: Options,
        }

        impl $crate::candle::graph::Backward for Kept {
            fn backward(
                &self,
                d_out: &candle_core::Tensor,
                d_final_state: Option<&candle_core::Tensor>,
            ) -> candle_core::Result<Vec<Option<candle_core::Tensor>>> {
                let operator = $Operator::over(&self.tensors, self.cu_seqlens.as_deref(), self.options);
                let mut list = $crate::candle::tensors::List::default();
                let Ok(_) = operator.backward(d_out, d_final_state)?.map(&mut list);
                Ok(list.0)
            }
        }
    };
}

pub(crate) use {over_sequences, passes_on_devices};
