//! Operators that write to a pool of states in place, as candle runs them.

use std::cell::RefCell;

use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp1, Layout, Result, Tensor};

use super::device::{Backend, Cpu, Value, for_dtype};
use super::graph;
use super::tensors::{Arguments, Guards, Reader, Storages, storage_of};
use crate::pool::UpdateMut;
use crate::{Error, ViewMut};

/// What an operator in place gives: the output, and the state after each token.
pub(crate) type Updated = (Tensor, Option<Tensor>);

/// An operator that writes to a pool of states.
pub(crate) trait InPlace {
    const NAME: &'static str;
    const STATE: &'static str;

    /// What it reads beside the pool.
    fn arguments(&self) -> Arguments<'_>;
}

/// An operator that writes to a pool on devices of a kind.
pub(crate) trait RunsOn<B: Backend>: InPlace {
    /// Runs the operator on a pool of states of type `St`.
    fn run<St: Value>(
        &self,
        backend: &B,
        reader: Reader,
        state: ViewMut<St, 3, B::Memory>,
        with_token_states: bool,
    ) -> Result<Updated>;
}

/// An operator that writes to a pool on every kind of device.
#[cfg(not(feature = "candle-cuda"))]
pub(crate) trait Runs: RunsOn<Cpu> {}
#[cfg(not(feature = "candle-cuda"))]
impl<O: RunsOn<Cpu>> Runs for O {}

/// An operator that writes to a pool on every kind of device.
#[cfg(feature = "candle-cuda")]
pub(crate) trait Runs: RunsOn<Cpu> + RunsOn<super::cuda::Gpu> {}
#[cfg(feature = "candle-cuda")]
impl<O: RunsOn<Cpu> + RunsOn<super::cuda::Gpu>> Runs for O {}

pub(crate) fn in_place<O: Runs>(operator: &O, state: &Tensor, with_token_states: bool) -> Result<Updated> {
    let mut arguments = operator.arguments();
    let (storages, written) = (arguments.storages(), storage_of(state));
    arguments.add("state", state);
    arguments.check_devices()?;
    check_pool("state", O::STATE, state)?;
    if let Some(argument) = storages.iter().find(|argument| argument.storage == written) {
        let got = format_args!("the storage of `{}`", argument.name);
        return Err(Error::argument("state", "a storage of its own, as it is written", got).into());
    }
    // All locks are taken in the order of the storages; candle takes that of the state.
    let before = storages.lock(|storage| storage < written);
    let updated = RefCell::new(None);
    let running = Running { operator, storages, before, written, with_token_states, updated };
    state.inplace_op1(&running)?;
    match running.updated.into_inner() {
        Some(updated) => Ok(updated),
        None => unreachable!("candle ran the operator"),
    }
}

/// Checks that a tensor can be a pool of states, whatever its sizes, and gives its shape: that it has three dimensions,
/// `names`, and a type that states may have, that no two elements share a place, and that writing to it changes nothing
/// that candle keeps for a backward pass.
///
/// What is not seen is another tensor over the same storage: `detach` makes one, and so does every view and clone.
pub fn check_pool(argument: &'static str, names: &str, pool: &Tensor) -> crate::Result<[usize; 3]> {
    let shape = pool
        .dims()
        .try_into()
        .map_err(|_| Error::argument(argument, format_args!("shape {names}"), format_args!("{:?}", pool.dims())))?;
    if !matches!(pool.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Err(super::device::unsupported(argument, pool.dtype()));
    }
    // candle refuses this too, but does not say which argument it is about.
    if pool.layout().has_internal_overlap() {
        let got = format_args!("shape {:?} with strides {:?}", pool.dims(), pool.stride());
        return Err(Error::argument(argument, "strides that give every element a place of its own", got));
    }
    if pool.track_op() {
        let expected = "a tensor outside of candle's graph, since it is overwritten (detach and copy it: \
                        `state.detach().copy()`)";
        let got = if pool.is_variable() { "a variable" } else { "one that candle tracks for a backward pass" };
        return Err(Error::argument(argument, expected, got));
    }
    Ok(shape)
}

/// An operator while candle runs it.
struct Running<'a, O> {
    operator: &'a O,
    storages: Storages<'a>,
    before: Guards<'a>,
    written: usize,
    with_token_states: bool,
    updated: RefCell<Option<Updated>>,
}

impl<O> Running<'_, O> {
    fn run<B: Backend>(&self, backend: &B, storage: &mut B::Storage, layout: &Layout) -> Result<()>
    where
        O: RunsOn<B>,
    {
        let after = self.storages.lock(|storage| storage > self.written);
        let reader = Reader::new(&self.storages, [&self.before, &after]);
        // `check_pool` has seen to it.
        let rank = || Error::argument("state", format_args!("shape {}", O::STATE), format_args!("{:?}", layout.dims()));
        let shape: [usize; 3] = layout.dims().try_into().map_err(|_| rank())?;
        let strides: [usize; 3] = layout.stride().try_into().map_err(|_| rank())?;
        let offset = layout.start_offset();
        let updated = for_dtype!("state", B::dtype(storage), |St| {
            let data = B::elements_mut::<St>(storage)?;
            let state = ViewMut { data, offset, shape, strides };
            self.operator.run::<St>(backend, reader, state, self.with_token_states)
        })?;
        *self.updated.borrow_mut() = Some(updated);
        Ok(())
    }
}

impl<O: Runs> InplaceOp1 for Running<'_, O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        self.run(&Cpu, storage, layout)
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        use candle_core::backend::BackendStorage;
        let backend = super::cuda::Gpu::new(storage.device());
        self.run(&backend, storage, layout)
    }

    #[cfg(not(feature = "candle-cuda"))]
    fn cuda_fwd(&self, _: &mut CudaStorage, _: &Layout) -> Result<()> {
        // candle may have been built for GPUs by another crate's wish.
        Err(super::device::elsewhere("state", "an NVIDIA GPU").into())
    }

    fn metal_fwd(&self, _: &mut candle_core::MetalStorage, _: &Layout) -> Result<()> {
        Err(super::device::elsewhere("state", "a Metal device").into())
    }
}

/// Allocates what an update writes, runs it, and makes tensors of the results. `shapes` are those of the output and of the
/// states after each token; an error that there is no room for them names `argument`.
pub(crate) fn updated<B: Backend, T: Value, St: Value>(
    backend: &B,
    argument: &'static str,
    shapes: ([usize; 3], [usize; 4]),
    state: ViewMut<St, 3, B::Memory>,
    with_token_states: bool,
    update: impl FnOnce(UpdateMut<T, St, B::Memory>) -> crate::Result<()>,
) -> Result<Updated> {
    let mut out = backend.allocate::<T>(argument, &shapes.0)?;
    let mut token_states = with_token_states.then(|| backend.allocate::<St>(argument, &shapes.1)).transpose()?;
    let out_mut = B::borrow(&mut out);
    update(UpdateMut { state, out: out_mut, token_states: token_states.as_mut().map(B::borrow) })?;
    let token_states = token_states.map(|data| graph::untracked(backend.store(data), &shapes.1));
    Ok((graph::untracked(backend.store(out), &shapes.0), token_states))
}

/// Implements [`InPlace`] and [`RunsOn`] for the struct `$Operator` of candle's tensors, in whose module `$Inputs`, the `$Problem`
/// that checking them gives, `UpdateMut` and `cpu` are in scope. `$names` are those of the pool's shape, `$first` is the activation
/// whose shape is the output's, `$argument` its name, `$setting` what `$Inputs` has beside tensors and slots, and `$isa` what the
/// update on processors takes first, if it takes something.
macro_rules! updates_in_place {
    (
        $Operator:ident, $name:literal, $names:expr, $first:ident = $argument:literal,
        $Inputs:ident($($setting:ident)?) -> $Problem:ident, cpu($($isa:expr)?)
    ) => {
        /// A device that runs the update.
        trait UpdateBackend: $crate::candle::device::Backend {
            fn update<T: $crate::candle::device::Value, St: $crate::candle::device::Value>(
                &self,
                problem: &$Problem<T, Self::Memory>,
                outputs: UpdateMut<T, St, Self::Memory>,
            ) -> $crate::Result<()>;
        }

        impl UpdateBackend for $crate::candle::device::Cpu {
            fn update<T: $crate::candle::device::Value, St: $crate::candle::device::Value>(
                &self,
                problem: &$Problem<T>,
                outputs: UpdateMut<T, St>,
            ) -> $crate::Result<()> {
                cpu::update_checked($($isa,)? problem, outputs)
            }
        }

        #[cfg(feature = "candle-cuda")]
        impl UpdateBackend for $crate::candle::cuda::Gpu {
            fn update<T: $crate::candle::device::Value, St: $crate::candle::device::Value>(
                &self,
                problem: &$Problem<T, Self::Memory>,
                outputs: UpdateMut<T, St, Self::Memory>,
            ) -> $crate::Result<()> {
                super::cuda::update_checked(&self.stream, problem, outputs)
            }
        }

        impl $crate::candle::in_place::InPlace for $Operator<'_> {
            const NAME: &'static str = $name;
            const STATE: &'static str = $names[0];

            fn arguments(&self) -> $crate::candle::tensors::Arguments<'_> {
                let mut arguments = $crate::candle::tensors::Arguments::default();
                let Ok(_) = self.tensors().map(&mut arguments);
                arguments.add_slots(self.slots);
                arguments
            }
        }

        impl<B: UpdateBackend> $crate::candle::in_place::RunsOn<B> for $Operator<'_> {
            fn run<St: $crate::candle::device::Value>(
                &self,
                backend: &B,
                reader: $crate::candle::tensors::Reader,
                state: $crate::ViewMut<St, 3, B::Memory>,
                with_token_states: bool,
            ) -> candle_core::Result<$crate::candle::in_place::Updated> {
                $crate::candle::device::for_dtype!($argument, self.$first.dtype(), |T| {
                    let views = self.tensors().map(&mut reader.views::<B, T>())?;
                    let slots = reader.slots::<B>(self.slots)?;
                    let problem = $Inputs::of(views, slots $(, self.$setting)?).check()?;
                    let shapes = (problem.inputs.$first.shape, problem.token_state_shape());
                    let update = |outputs: UpdateMut<T, St, B::Memory>| backend.update(&problem, outputs);
                    $crate::candle::in_place::updated(backend, $argument, shapes, state, with_token_states, update)
                })
            }
        }
    };
}

pub(crate) use updates_in_place;
