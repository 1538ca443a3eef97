//! The state update and the convolution's update, in place on a pool of states.

use std::cell::RefCell;

use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp1, Layout, Result, Tensor};

use super::device::{Backend, Cpu, Value, for_dtype};
use super::graph;
use super::tensors::{Argument, Keyed, Locked, Reader, both, check_devices, given, keyed, storage_of};
use crate::{Error, ViewMut, conv, state_update};

/// An update of a pool of states by one token or a few, in place; see [`state_update`](crate::state_update) for what it
/// computes.
///
/// `T` stands for the element type of `u`: `f32`, `f16` or `bf16`. Tensors may have any strides and are not copied.
/// No gradients flow: results are not part of candle's graph, whatever the tensors here are.
#[derive(Debug, Clone, Copy)]
pub struct StateUpdate<'a> {
    /// The input, `(batch, tokens, d_inner)` of `T`.
    pub u: &'a Tensor,
    /// The step sizes before bias and softplus, `(batch, tokens, d_inner)` of `T`.
    pub dt: &'a Tensor,
    /// The state matrix, diagonal, `(d_inner, d_state)` of `f32`: negative for a state that decays.
    pub a: &'a Tensor,
    /// How the input enters the state: `(batch, tokens, groups, d_state)` of `T`, or `(batch, tokens, d_state)` of `T` for
    /// one group, or `(d_inner, d_state)` of `f32` if it is the same for every token.
    pub b: &'a Tensor,
    /// How the state is read, of one of the shapes that `b` may have.
    pub c: &'a Tensor,
    /// The gate, `(batch, tokens, d_inner)` of `T`.
    pub z: Option<&'a Tensor>,
    /// The skip connection, `(d_inner)` of `f32`.
    pub d: Option<&'a Tensor>,
    /// Added to `dt`, `(d_inner)` of `f32`.
    pub dt_bias: Option<&'a Tensor>,
    /// The slot of each batch row's state, `(batch)`. No two rows may have the same; a negative one makes its row padding,
    /// which gives zero and touches no state. If absent, the pool has one slot for each row.
    pub slots: Option<&'a [i32]>,
    /// The variant of the recurrence.
    pub options: state_update::Options,
}

impl<'a> StateUpdate<'a> {
    /// The tensors that every update has; the others are absent and the options plain. Add them with struct update
    /// syntax: `StateUpdate { slots: Some(&slots), ..StateUpdate::new(&u, &dt, &a, &b, &c) }`.
    pub fn new(u: &'a Tensor, dt: &'a Tensor, a: &'a Tensor, b: &'a Tensor, c: &'a Tensor) -> Self {
        let options = state_update::Options::default();
        Self { u, dt, a, b, c, z: None, d: None, dt_bias: None, slots: None, options }
    }

    /// Brings the pool `state`, `(slots, d_inner, d_state)` of `f32`, `f16` or `bf16`, up to date and gives the output,
    /// `(batch, tokens, d_inner)` of `T`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names; then nothing is written. `state` must not share its
    /// storage with another argument, nor be a variable or part of candle's graph: see
    /// [the module](super#updates-in-place). What the device refuses.
    pub fn update(&self, state: &Tensor) -> Result<Tensor> {
        Ok(in_place(self, state, false)?.0)
    }

    /// [`update`](Self::update) that also gives the state behind each token, `(batch, tokens, d_inner, d_state)` of the
    /// type of `state`, for [`rollback`].
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn update_with_token_states(&self, state: &Tensor) -> Result<(Tensor, Tensor)> {
        in_place(self, state, true).map(both)
    }
}

/// An update of a pool of states of the convolution by one token or a few, in place; see
/// [`conv::UpdateInputs`] for what it computes.
///
/// `T` stands for the element type of `x`: `f32`, `f16` or `bf16`. Tensors may have any strides and are not copied.
/// No gradients flow: results are not part of candle's graph, whatever the tensors here are.
#[derive(Debug, Clone, Copy)]
pub struct ConvUpdate<'a> {
    /// The input, `(batch, tokens, d_inner)` of `T`.
    pub x: &'a Tensor,
    /// The filters, `(d_inner, width)` of `f32`; the last weight meets the newest input.
    pub weight: &'a Tensor,
    /// Added to every output before SiLU, `(d_inner)` of `f32`.
    pub bias: Option<&'a Tensor>,
    /// The slot of each batch row's state, as [`StateUpdate::slots`].
    pub slots: Option<&'a [i32]>,
    /// Apply `silu(x) = x/(1 + e^-x)` to the result.
    pub silu: bool,
}

impl<'a> ConvUpdate<'a> {
    /// The tensors that every update has; bias and slots are absent and SiLU is off. Add them with struct update syntax:
    /// `ConvUpdate { silu: true, ..ConvUpdate::new(&x, &weight) }`.
    pub fn new(x: &'a Tensor, weight: &'a Tensor) -> Self {
        Self { x, weight, bias: None, slots: None, silu: false }
    }

    /// Brings the pool `state`, `(slots, width - 1, d_inner)` of `f32`, `f16` or `bf16`, up to date and gives the output,
    /// `(batch, tokens, d_inner)` of `T`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names; then nothing is written. `state` must not share its
    /// storage with another argument, nor be a variable or part of candle's graph: see
    /// [the module](super#updates-in-place). What the device refuses.
    pub fn update(&self, state: &Tensor) -> Result<Tensor> {
        Ok(in_place(self, state, false)?.0)
    }

    /// [`update`](Self::update) that also gives the state behind each token, `(batch, tokens, width - 1, d_inner)` of the
    /// type of `state`, for [`rollback`].
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub fn update_with_token_states(&self, state: &Tensor) -> Result<(Tensor, Tensor)> {
        in_place(self, state, true).map(both)
    }
}

/// Puts states of a pool back to what they were behind a token, after the tokens that follow it have been rejected; see
/// [`state_update::rollback`](crate::state_update::rollback). It serves pools of either update.
///
/// `state` is the pool, and `token_states` what the update gave for the same `slots`, of the same element type. The slot
/// of batch row `i` gets the state behind the first `accepted[i]` tokens.
///
/// # Errors
/// An argument that does not fit, which the message names; then nothing is written. `state` must not share its storage
/// with `token_states`, nor be a variable or part of candle's graph: see [`StateUpdate::update`]. What the
/// device refuses.
pub fn rollback(state: &Tensor, token_states: &Tensor, slots: Option<&[i32]>, accepted: &[usize]) -> Result<()> {
    in_place(&Rollback { token_states, slots, accepted }, state, false)?;
    Ok(())
}

struct Rollback<'a> {
    token_states: &'a Tensor,
    slots: Option<&'a [i32]>,
    accepted: &'a [usize],
}

/// What an operator in place gives: the output, and the state behind each token.
type Updated = (Tensor, Option<Tensor>);

/// An operator that writes to a pool of states.
trait InPlace {
    const NAME: &'static str;
    const STATE: &'static str;

    fn arguments(&self) -> Vec<Argument<'_>>;

    /// Runs the operator on a pool of states of type `St`.
    fn run<B: Backend, St: Value>(
        &self,
        backend: &B,
        reader: &Reader,
        state: ViewMut<St, 3, B::Memory>,
        with_token_states: bool,
    ) -> Result<Updated>;
}

fn in_place<O: InPlace>(operator: &O, state: &Tensor, with_token_states: bool) -> Result<Updated> {
    let arguments = operator.arguments();
    let mut all = arguments.clone();
    all.push(("state", state));
    check_devices(&all)?;
    check_pool("state", O::STATE, state)?;
    let (keyed, written) = (keyed(&arguments), storage_of(state));
    if let Some(argument) = keyed.iter().find(|argument| argument.storage == written) {
        let got = format_args!("the storage of `{}`", argument.name);
        return Err(Error::argument("state", "a storage of its own, as it is written", got).into());
    }
    // All locks are taken in the order of the storages; candle takes that of the state.
    let before = Locked::new(&keyed, |storage| storage < written);
    let running = Running { operator, keyed: &keyed, before, written, with_token_states, updated: RefCell::new(None) };
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
fn check_pool(argument: &'static str, names: &str, pool: &Tensor) -> crate::Result<[usize; 3]> {
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
    keyed: &'a [Keyed<'a>],
    before: Locked<'a>,
    written: usize,
    with_token_states: bool,
    updated: RefCell<Option<Updated>>,
}

impl<O: InPlace> Running<'_, O> {
    fn run<B: Backend>(&self, backend: &B, storage: &mut B::Storage, layout: &Layout) -> Result<()> {
        let behind = Locked::new(self.keyed, |storage| storage > self.written);
        let reader = Reader::new(self.keyed, &self.before).and(&behind);
        // `check_pool` has seen to it.
        let rank = || Error::argument("state", format_args!("shape {}", O::STATE), format_args!("{:?}", layout.dims()));
        let shape: [usize; 3] = layout.dims().try_into().map_err(|_| rank())?;
        let strides: [usize; 3] = layout.stride().try_into().map_err(|_| rank())?;
        let offset = layout.start_offset();
        let updated = for_dtype!("state", B::dtype(storage), |St| {
            let data = B::elements_mut::<St>(storage)?;
            let state = ViewMut { data, offset, shape, strides };
            self.operator.run::<B, St>(backend, &reader, state, self.with_token_states)
        })?;
        *self.updated.borrow_mut() = Some(updated);
        Ok(())
    }
}

impl<O: InPlace> InplaceOp1 for Running<'_, O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        self.run(&Cpu, storage, layout)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        use candle_core::backend::BackendStorage;
        let backend = super::cuda::Gpu::new(storage.device());
        self.run(&backend, storage, layout)
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(&self, _: &mut CudaStorage, _: &Layout) -> Result<()> {
        Err(candle_core::Error::NotCompiledWithCudaSupport)
    }

    fn metal_fwd(&self, _: &mut candle_core::MetalStorage, _: &Layout) -> Result<()> {
        Err(super::device::elsewhere("state", "a Metal device").into())
    }
}

const ACTIVATION: &str = "(batch, tokens, d_inner)";

impl InPlace for StateUpdate<'_> {
    const NAME: &'static str = "state-update";
    const STATE: &'static str = "(slots, d_inner, d_state)";

    fn arguments(&self) -> Vec<Argument<'_>> {
        let Self { u, dt, a, b, c, z, d, dt_bias, .. } = *self;
        given([("u", u), ("dt", dt), ("a", a), ("b", b), ("c", c)], [("z", z), ("d", d), ("dt_bias", dt_bias)])
    }

    fn run<B: Backend, St: Value>(
        &self,
        backend: &B,
        reader: &Reader,
        state: ViewMut<St, 3, B::Memory>,
        with_token_states: bool,
    ) -> Result<Updated> {
        for_dtype!("u", self.u.dtype(), |T| {
            let inputs = state_update::Inputs::<T, B::Memory> {
                z: reader.optional::<B, T, 3>("z", ACTIVATION)?,
                d: reader.optional::<B, f32, 1>("d", "(d_inner)")?,
                dt_bias: reader.optional::<B, f32, 1>("dt_bias", "(d_inner)")?,
                slots: self.slots,
                options: self.options,
                ..state_update::Inputs::new(
                    reader.view::<B, T, 3>("u", ACTIVATION)?,
                    reader.view::<B, T, 3>("dt", ACTIVATION)?,
                    reader.view::<B, f32, 2>("a", "(d_inner, d_state)")?,
                    reader.projection::<B, T>("b")?,
                    reader.projection::<B, T>("c")?,
                )
            };
            let [batch, tokens, d_inner] = inputs.u.shape;
            let shapes = [&[batch, tokens, d_inner][..], &[batch, tokens, d_inner, inputs.a.shape[1]]];
            updated::<B, T, St>(backend, "u", shapes, state, with_token_states, |outputs| {
                backend.state_update(&inputs, outputs)
            })
        })
    }
}

impl InPlace for ConvUpdate<'_> {
    const NAME: &'static str = "causal-conv-update";
    const STATE: &'static str = "(slots, width - 1, d_inner)";

    fn arguments(&self) -> Vec<Argument<'_>> {
        given([("x", self.x), ("weight", self.weight)], [("bias", self.bias)])
    }

    fn run<B: Backend, St: Value>(
        &self,
        backend: &B,
        reader: &Reader,
        state: ViewMut<St, 3, B::Memory>,
        with_token_states: bool,
    ) -> Result<Updated> {
        for_dtype!("x", self.x.dtype(), |T| {
            let x = reader.view::<B, T, 3>("x", ACTIVATION)?;
            let inputs = conv::UpdateInputs::<T, B::Memory> {
                bias: reader.optional::<B, f32, 1>("bias", "(d_inner)")?,
                slots: self.slots,
                silu: self.silu,
                ..conv::UpdateInputs::new(x, reader.view::<B, f32, 2>("weight", "(d_inner, width)")?)
            };
            let width = inputs.check()?.width;
            let [batch, tokens, d_inner] = x.shape;
            let shapes = [&[batch, tokens, d_inner][..], &[batch, tokens, width - 1, d_inner]];
            updated::<B, T, St>(backend, "x", shapes, state, with_token_states, |outputs| {
                backend.conv_update(&inputs, outputs)
            })
        })
    }
}

/// Allocates what an update writes, runs it, and makes tensors of the results. `shapes` are those of the output and of the
/// states behind each token; an error that there is no room for them names `argument`.
fn updated<B: Backend, T: Value, St: Value>(
    backend: &B,
    argument: &'static str,
    shapes: [&[usize]; 2],
    state: ViewMut<St, 3, B::Memory>,
    with_token_states: bool,
    update: impl FnOnce(state_update::UpdateMut<T, St, B::Memory>) -> crate::Result<()>,
) -> Result<Updated> {
    let mut out = backend.allocate::<T>(argument, shapes[0])?;
    let mut token_states = with_token_states.then(|| backend.allocate::<St>(argument, shapes[1])).transpose()?;
    let out_mut = B::borrow(&mut out);
    update(state_update::UpdateMut { state, out: out_mut, token_states: token_states.as_mut().map(B::borrow) })?;
    let token_states = token_states.map(|data| graph::untracked(backend.store(data), shapes[1]));
    Ok((graph::untracked(backend.store(out), shapes[0]), token_states))
}

impl InPlace for Rollback<'_> {
    const NAME: &'static str = "rollback";
    const STATE: &'static str = "(slots, ..state_shape)";

    fn arguments(&self) -> Vec<Argument<'_>> {
        vec![("token_states", self.token_states)]
    }

    fn run<B: Backend, St: Value>(
        &self,
        backend: &B,
        reader: &Reader,
        state: ViewMut<St, 3, B::Memory>,
        _: bool,
    ) -> Result<Updated> {
        let token_states = reader.view::<B, St, 4>("token_states", "(batch, tokens, ..state_shape)")?;
        backend.rollback(state, token_states, self.slots, self.accepted)?;
        Ok((self.token_states.clone(), None))
    }
}
