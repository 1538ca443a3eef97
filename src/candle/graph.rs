//! Operators of many inputs and two outputs in candle's graph.
//!
//! candle lets others define operators of at most three inputs and one output, and keeps the constructors of its graph
//! to itself. So an operator here is several nodes:
//!
//! ```text
//! inputs, by threes  ->  leaves, a token of one element each  ->  hub, which is the output  ->  final state
//! ```
//!
//! The results are computed before any node is made; a node only hands out what it was given. candle walks the nodes from
//! a loss backwards, each after all that depend on it. The final state's node leaves its gradient for the hub, the hub
//! computes all gradients at once and leaves them for the leaves, and these hand them out. What is left lies in a cell
//! under the thread's name, so that two threads may walk one graph.
//!
//! Only inputs that candle tracks (variables, and what is computed from them) have a leaf. Every token must get a
//! gradient, since candle takes for granted that all tracked nodes have one; zero is the right one, as no result depends
//! on a token's value.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp3, Error, Layout, Result, Shape, Storage, Tensor};

use super::device::{Backend, Buffer, Value};

/// What an operator does in a backward pass.
pub(super) trait Backward: Send + Sync + 'static {
    /// The gradients of all inputs, in the order in which [`attach`] got them.
    fn backward(&self, d_out: &Tensor, d_final_state: Option<&Tensor>) -> Result<Vec<Tensor>>;
}

/// A tensor that candle does not track.
pub(super) fn untracked(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// Room for the gradient of an input.
pub(super) struct Gradient<'t, B: Backend, T: Value> {
    data: B::Owned<T>,
    input: &'t Tensor,
}

impl<'t, B: Backend, T: Value> Gradient<'t, B, T> {
    pub fn new(backend: &B, name: &'static str, input: &'t Tensor) -> Result<Self> {
        Ok(Self { data: backend.allocate(name, input.dims())?, input })
    }

    pub fn optional(backend: &B, name: &'static str, input: &'t Option<Tensor>) -> Result<Option<Self>> {
        input.as_ref().map(|input| Self::new(backend, name, input)).transpose()
    }

    pub fn as_mut(&mut self) -> &mut Buffer<B, T> {
        B::borrow(&mut self.data)
    }

    /// The gradient, of the input's shape.
    pub fn tensor(self, backend: &B) -> Tensor {
        untracked(backend.storage_of(self.data), self.input.shape())
    }
}

/// Whether a backward pass could reach one of `inputs`.
pub(super) fn is_tracked(inputs: &[&Tensor]) -> bool {
    inputs.iter().any(|input| input.track_op())
}

/// Puts results into the graph: `out`, and `final_state` if it is there, depend on `inputs`.
pub(super) fn attach(
    name: &'static str,
    inputs: &[&Tensor],
    out: Computed,
    final_state: Option<Computed>,
    operator: impl Backward,
) -> Result<(Tensor, Option<Tensor>)> {
    let tracked: Vec<usize> = (0..inputs.len()).filter(|&i| inputs[i].track_op()).collect();
    let cells = Arc::new(Cells::default());
    let mut tokens = Vec::new();
    for indices in tracked.chunks(3) {
        // Places that are left over get the first input again, and no gradient.
        let input = |k: usize| inputs[*indices.get(k).unwrap_or(&indices[0])];
        let leaf = Leaf { name, indices: [0, 1, 2].map(|k| indices.get(k).copied()), cells: cells.clone() };
        tokens.push(input(0).apply_op3(input(1), input(2), leaf)?);
    }
    let Some(first) = tokens.first() else {
        return Ok((out.untracked(), final_state.map(Computed::untracked)));
    };
    let token = |k: usize| tokens.get(k).unwrap_or(first);
    let hub = Hub {
        name,
        tokens: tokens.len(),
        tracked,
        out: Given::new(out),
        cells: cells.clone(),
        operator: Box::new(operator),
    };
    let out = token(0).apply_op3(token(1), token(2), hub)?;
    let final_state = final_state
        .map(|state| out.apply_op1(FinalState { name, final_state: Given::new(state), cells }))
        .transpose()?;
    Ok((out, final_state))
}

/// A result.
pub(super) struct Computed {
    storage: Storage,
    shape: Shape,
}

impl Computed {
    pub fn new<const R: usize>(storage: Storage, shape: [usize; R]) -> Self {
        Self { storage, shape: (&shape).into() }
    }

    /// The result as a tensor that candle does not track.
    pub fn untracked(self) -> Tensor {
        untracked(self.storage, self.shape)
    }
}

/// A result that is waiting for its node.
struct Given(Mutex<Option<Computed>>);

impl Given {
    fn new(result: Computed) -> Self {
        Self(Mutex::new(Some(result)))
    }

    fn take(&self, name: &'static str) -> Result<Computed> {
        // candle runs a node once, when it is made.
        lock(&self.0).take().ok_or_else(|| Error::Msg(format!("{name} was run twice")))
    }

    fn cpu(&self, name: &'static str) -> Result<(CpuStorage, Shape)> {
        match self.take(name)? {
            Computed { storage: Storage::Cpu(storage), shape } => Ok((storage, shape)),
            _ => Err(Error::Msg(format!("{name}: the result is not on the processor"))),
        }
    }

    fn cuda(&self, name: &'static str) -> Result<(CudaStorage, Shape)> {
        match self.take(name)? {
            Computed { storage: Storage::Cuda(storage), shape } => Ok((storage, shape)),
            _ => Err(Error::Msg(format!("{name}: the result is not on a GPU"))),
        }
    }
}

/// What the nodes of one operator leave for each other in a backward pass, for each thread that is in one.
#[derive(Default)]
struct Cells {
    d_final_state: Mutex<HashMap<ThreadId, Tensor>>,
    /// By input; none where candle does not track it or it has been handed out.
    gradients: Mutex<HashMap<ThreadId, Vec<Option<Tensor>>>>,
}

impl Cells {
    /// The gradient of input `index` of this thread's backward pass.
    fn take(&self, index: usize) -> Option<Tensor> {
        let thread = thread::current().id();
        let mut all = lock(&self.gradients);
        let gradients = all.get_mut(&thread)?;
        let gradient = gradients[index].take();
        if gradients.iter().all(Option::is_none) {
            all.remove(&thread);
        }
        gradient
    }
}

/// Locks a cell. What a thread left that panicked is whole: each value is put there at once.
fn lock<T>(cell: &Mutex<T>) -> MutexGuard<'_, T> {
    cell.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Refuses to be differentiated twice: the gradients are computed outside of candle's graph.
fn check_once(name: &'static str, gradient: &Tensor) -> Result<()> {
    if gradient.track_op() {
        return Err(Error::Msg(format!(
            "{name}: cannot be differentiated twice, and its gradient is itself tracked (CANDLE_GRAD_DO_NOT_DETACH)"
        )));
    }
    Ok(())
}

/// A node between inputs and their hub.
struct Leaf {
    name: &'static str,
    indices: [Option<usize>; 3],
    cells: Arc<Cells>,
}

impl CustomOp3 for Leaf {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), 1.into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        input: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((super::cuda::token(input)?, 1.into()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [first, second, third] = self.indices.map(|index| self.cells.take(index?));
        Ok((first, second, third))
    }
}

/// The node of the output.
struct Hub {
    name: &'static str,
    /// How many of the arguments are tokens of their own.
    tokens: usize,
    /// The inputs that have leaves.
    tracked: Vec<usize>,
    out: Given,
    cells: Arc<Cells>,
    operator: Box<dyn Backward>,
}

impl CustomOp3 for Hub {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.out.cpu(self.name)
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.out.cuda(self.name)
    }

    fn bwd(
        &self,
        token: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        check_once(self.name, d_out)?;
        let thread = thread::current().id();
        let d_final_state = lock(&self.cells.d_final_state).remove(&thread);
        let mut all: Vec<_> = self.operator.backward(d_out, d_final_state.as_ref())?.into_iter().map(Some).collect();
        let kept = (0..all.len()).map(|i| all[i].take().filter(|_| self.tracked.contains(&i))).collect();
        lock(&self.cells.gradients).insert(thread, kept);
        let zero = token.zeros_like()?;
        let [first, second, third] = [0, 1, 2].map(|k| (k < self.tokens).then(|| zero.clone()));
        Ok((first, second, third))
    }
}

/// The node of the final state. It stands behind the output, so that candle comes to the hub after it.
struct FinalState {
    name: &'static str,
    final_state: Given,
    cells: Arc<Cells>,
}

impl CustomOp1 for FinalState {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.final_state.cpu(self.name)
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.final_state.cuda(self.name)
    }

    fn bwd(&self, out: &Tensor, _: &Tensor, d_final_state: &Tensor) -> Result<Option<Tensor>> {
        check_once(self.name, d_final_state)?;
        lock(&self.cells.d_final_state).insert(thread::current().id(), d_final_state.clone());
        Ok(Some(out.zeros_like()?))
    }
}
