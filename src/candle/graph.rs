//! Operators of many inputs and two outputs in candle's graph.
//!
//! candle lets others define operators of at most three inputs and one output, and keeps the constructors of its graph
//! to itself. So an operator here is several nodes:
//!
//! ```text
//! inputs, by threes  ->  leaves, a token of one element each  ->  hub, which is the output  ->  final state
//! ```
//!
//! The hub too takes three tokens at most: where there are more, joints between them take tokens by threes and give one
//! each, as many levels of them as it needs. So an operator may have any number of inputs.
//!
//! The results are computed before any node is made; a node only hands out what it was given. candle walks the nodes from
//! a loss backwards, each after all that depend on it. The final state's node leaves its gradient for the hub, the hub
//! computes all gradients at once and leaves them for the leaves, and these hand them out. Pending gradients are keyed
//! by thread, so that two threads may run backward through one graph.
//!
//! Only inputs that candle tracks (variables, and what is computed from them) have a leaf. Every token must get a
//! gradient, since candle takes for granted that all tracked nodes have one; zero is the right one, as no result depends
//! on a token's value.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp3, Error, InplaceOp1, Layout, Result, Shape, Storage, Tensor,
};

/// What an operator does in a backward pass.
pub(crate) trait Backward: Send + Sync + 'static {
    /// The gradients of all inputs, in the order in which [`attach`] got them. Of one that is not tracked there may be none.
    fn backward(&self, d_out: &Tensor, d_final_state: Option<&Tensor>) -> Result<Vec<Option<Tensor>>>;
}

/// A tensor that candle does not track.
pub(crate) fn untracked(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// Whether a backward pass could reach one of `inputs`.
pub(crate) fn is_tracked(inputs: &[&Tensor]) -> bool {
    inputs.iter().any(|input| input.track_op())
}

/// Puts results into the graph: `out`, and `final_state` if it is there, depend on `inputs`.
pub(crate) fn attach(
    name: &'static str,
    inputs: &[&Tensor],
    out: Computed,
    final_state: Option<Computed>,
    operator: impl Backward,
) -> Result<(Tensor, Option<Tensor>)> {
    let tracked: Vec<bool> = inputs.iter().map(|input| input.track_op()).collect();
    let cells = Arc::new(Cells::default());
    let indices: Vec<usize> = (0..inputs.len()).filter(|&i| tracked[i]).collect();
    let mut tokens = indices
        .chunks(3)
        .map(|indices| {
            let inputs: Vec<_> = indices.iter().map(|&i| inputs[i]).collect();
            let indices = [0, 1, 2].map(|k| indices.get(k).copied());
            apply(&inputs, Token { name, of: Of::Inputs { indices, cells: cells.clone() } })
        })
        .collect::<Result<Vec<_>>>()?;
    while tokens.len() > 3 {
        tokens = tokens
            .chunks(3)
            .map(|tokens| {
                let tokens: Vec<_> = tokens.iter().collect();
                apply(&tokens, Token { name, of: Of::Tokens(tokens.len()) })
            })
            .collect::<Result<_>>()?;
    }
    if tokens.is_empty() {
        return Ok((out.untracked(), final_state.map(Computed::untracked)));
    }
    let tokens: Vec<_> = tokens.iter().collect();
    let (out, operator) = (Given::new(out), Box::new(operator));
    let hub = Hub { name, tokens: tokens.len(), tracked, out, cells: cells.clone(), operator };
    let out = apply(&tokens, hub)?;
    let final_state = final_state
        .map(|state| out.apply_op1(FinalState { name, final_state: Given::new(state), cells }))
        .transpose()?;
    Ok((out, final_state))
}

/// Puts a result into candle's graph that was computed outside of it: an operator of any number of inputs with a backward
/// pass of its own. `backward` gets the gradient of `out` and gives those of the inputs, in their order, each of its input's
/// shape and type; of one that candle does not track there may be none. Where candle tracks none of the inputs, `out` is
/// given back.
///
/// # Errors
/// What candle refuses.
///
/// # Safety
/// No other tensor reads the storage of `out`, which is moved into the graph: another handle would be left with a shape and
/// no elements.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use selective_scan::candle::node;
///
/// let x = Var::new(&[1f32, 2.0, 3.0], &Device::Cpu)?;
/// let kept = x.detach();
/// let square = kept.sqr()?;
/// // SAFETY: nothing else reads what `sqr` has made.
/// let square = unsafe { node("square", &[&x], square, move |d_out| Ok(vec![Some(((d_out * &kept)? * 2.0)?)])) }?;
/// assert_eq!(square.sum_all()?.backward()?.get(&x).unwrap().to_vec1::<f32>()?, [2.0, 4.0, 6.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub unsafe fn node(
    name: &'static str,
    inputs: &[&Tensor],
    out: Tensor,
    backward: impl Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !is_tracked(inputs) {
        return Ok(out.detach());
    }
    Ok(attach(name, inputs, Computed::of(&out)?, None, Composed(backward))?.0)
}

/// A backward pass that another has written.
struct Composed<F>(F);

impl<F: Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static> Backward for Composed<F> {
    fn backward(&self, d_out: &Tensor, _: Option<&Tensor>) -> Result<Vec<Option<Tensor>>> {
        (self.0)(d_out)
    }
}

/// Applies a node to one, two or three arguments. Places that are left over get the first again, to which the node gives
/// no gradient there.
fn apply(arguments: &[&Tensor], node: impl CustomOp3 + Send + Sync + 'static) -> Result<Tensor> {
    let argument = |k: usize| arguments.get(k).copied().unwrap_or(arguments[0]);
    argument(0).apply_op3(argument(1), argument(2), node)
}

/// The gradients of a node's `count` arguments that are tokens.
fn of_tokens(token: &Tensor, count: usize) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
    let zero = token.zeros_like()?;
    let [first, second, third] = [0, 1, 2].map(|k| (k < count).then(|| zero.clone()));
    Ok((first, second, third))
}

/// A result.
pub(crate) struct Computed {
    storage: Storage,
    shape: Shape,
}

impl Computed {
    pub fn new<const R: usize>(storage: Storage, shape: [usize; R]) -> Self {
        Self::of_shape(storage, (&shape).into())
    }

    /// The same, of any number of dimensions.
    pub fn of_shape(storage: Storage, shape: Shape) -> Self {
        Self { storage, shape }
    }

    /// The storage of a tensor, which is left without elements.
    pub fn of(tensor: &Tensor) -> Result<Self> {
        let is_whole = tensor.is_contiguous() && tensor.layout().start_offset() == 0;
        let dense = if is_whole { tensor.detach() } else { tensor.detach().force_contiguous()? };
        let taken = Take(Mutex::new(None));
        // As a row: of a shape without elements candle takes the strides for those of repeated ones.
        dense.flatten_all()?.inplace_op1(&taken)?;
        match lock(&taken.0).take() {
            Some(storage) => Ok(Self { storage, shape: dense.shape().clone() }),
            None => unreachable!("candle ran the operator"),
        }
    }

    /// The result as a tensor that candle does not track.
    pub fn untracked(self) -> Tensor {
        untracked(self.storage, self.shape)
    }
}

/// Takes the storage of a tensor.
struct Take(Mutex<Option<Storage>>);

impl InplaceOp1 for Take {
    fn name(&self) -> &'static str {
        "take"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        let taken = std::mem::replace(storage, CpuStorage::F32(Vec::new()));
        *lock(&self.0) = Some(Storage::Cpu(taken));
        Ok(())
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        let empty = super::cuda::empty(storage)?;
        *lock(&self.0) = Some(Storage::Cuda(std::mem::replace(storage, empty)));
        Ok(())
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

/// A node between inputs and their hub, which gives a token.
struct Token {
    name: &'static str,
    of: Of,
}

/// What a token stands for.
enum Of {
    /// A leaf: the inputs of these indices, whose gradients it hands out.
    Inputs { indices: [Option<usize>; 3], cells: Arc<Cells> },
    /// A joint: this many other tokens.
    Tokens(usize),
}

impl CustomOp3 for Token {
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

    #[cfg(feature = "candle-cuda")]
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
        first: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        match &self.of {
            Of::Inputs { indices, cells } => {
                let [first, second, third] = indices.map(|index| cells.take(index?));
                Ok((first, second, third))
            }
            Of::Tokens(count) => of_tokens(first, *count),
        }
    }
}

/// The node of the output.
struct Hub {
    name: &'static str,
    /// How many of the arguments are tokens of their own.
    tokens: usize,
    /// By input, whether it has a leaf.
    tracked: Vec<bool>,
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
        let all = self.operator.backward(d_out, d_final_state.as_ref())?;
        let (got, expected) = (all.len(), self.tracked.len());
        if got != expected {
            return Err(Error::Msg(format!("{}: {got} gradients for {expected} inputs", self.name)));
        }
        // candle panics where a node that it tracks has no gradient.
        if let Some(i) = (0..expected).find(|&i| self.tracked[i] && all[i].is_none()) {
            return Err(Error::Msg(format!("{}: no gradient for input {i}, which candle tracks", self.name)));
        }
        let kept =
            all.into_iter().zip(&self.tracked).map(|(gradient, tracked)| gradient.filter(|_| *tracked)).collect();
        lock(&self.cells.gradients).insert(thread, kept);
        of_tokens(token, self.tokens)
    }
}

/// The node of the final state. It stands after the output, so that candle comes to the hub after it.
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::{Device, TensorId, Var};

    use super::*;

    /// `out = x_0·x_1·…` and `final_state = Σ (i + 1) x_i²`: every gradient depends on its own input, so that one that
    /// goes astray is seen.
    struct Made(Vec<Tensor>);

    impl Made {
        fn out(inputs: &[&Tensor]) -> Result<Tensor> {
            let mut out = inputs[0].clone();
            for input in &inputs[1..] {
                out = (out * *input)?;
            }
            Ok(out)
        }

        fn final_state(inputs: &[&Tensor]) -> Result<Tensor> {
            let mut sum = inputs[0].sqr()?;
            for (i, input) in inputs.iter().enumerate().skip(1) {
                sum = (sum + (input.sqr()? * (i + 1) as f64)?)?;
            }
            Ok(sum)
        }

        fn run(inputs: &[&Tensor]) -> Result<(Tensor, Tensor)> {
            let detached: Vec<_> = inputs.iter().map(|input| input.detach()).collect();
            let parts: Vec<_> = detached.iter().collect();
            let computed = |tensor: Tensor| -> Result<Computed> {
                Ok(Computed::new(Storage::Cpu(CpuStorage::F32(tensor.to_vec1()?)), [tensor.elem_count()]))
            };
            let (out, state) = (computed(Self::out(&parts)?)?, computed(Self::final_state(&parts)?)?);
            let (out, state) = attach("made-up", inputs, out, Some(state), Self(detached))?;
            Ok((out, state.expect("it was given")))
        }
    }

    impl Backward for Made {
        fn backward(&self, d_out: &Tensor, d_final_state: Option<&Tensor>) -> Result<Vec<Option<Tensor>>> {
            let gradient = |i: usize| {
                let others: Vec<_> = (0..self.0.len()).filter(|&k| k != i).map(|k| &self.0[k]).collect();
                let mut gradient = if others.is_empty() { d_out.clone() } else { (d_out * Self::out(&others)?)? };
                if let Some(d_state) = d_final_state {
                    gradient = (gradient + ((d_state * &self.0[i])? * (2 * (i + 1)) as f64)?)?;
                }
                Ok(Some(gradient))
            };
            (0..self.0.len()).map(gradient).collect()
        }
    }

    /// Two applications in one graph, the second of the results of the first: the loss.
    fn loss(inputs: &[Tensor], run: impl Fn(&[&Tensor]) -> Result<(Tensor, Tensor)>) -> Result<Tensor> {
        let all: Vec<_> = inputs.iter().collect();
        let (out, state) = run(&all)?;
        let mut again = all.clone();
        again[0] = &out;
        let last = again.len() - 1;
        again[last] = &state;
        let (out, state) = run(&again)?;
        (out.sum_all()? + (state.sum_all()? * 0.01)?)?.sqr()
    }

    fn gradients(loss: &Tensor, inputs: &[Tensor]) -> HashMap<TensorId, Vec<f32>> {
        let store = loss.backward().expect("a loss");
        let get = |input: &Tensor| Some((input.id(), store.get(input)?.to_vec1().expect("floats")));
        inputs.iter().filter_map(get).collect()
    }

    /// 3 leaves are one hub's, 10 inputs want a level of joints, and 28 a second.
    #[test]
    fn any_number_of_inputs() {
        for count in [1, 2, 3, 4, 9, 10, 12, 14, 27, 28, 30, 85] {
            // All, none, one in two, all but the first ten, the last alone.
            let subsets: [fn(usize, usize) -> bool; 5] =
                [|_, _| true, |_, _| false, |i, _| i % 2 == 1, |i, _| i >= 10, |i, count| i + 1 == count];
            for (subset, is_tracked) in subsets.into_iter().enumerate() {
                let input = |i: usize| {
                    // Near 1, so that products of many stay so.
                    let values: Vec<f32> = (0..3).map(|k| 1.0 + ((i * 3 + k) % 7) as f32 * 0.02 - 0.06).collect();
                    let tensor = Tensor::new(values, &Device::Cpu).expect("floats");
                    match is_tracked(i, count) {
                        true => Var::from_tensor(&tensor).expect("a copy").into_inner(),
                        false => tensor,
                    }
                };
                let inputs: Vec<_> = (0..count).map(input).collect();
                let what = format!("{count} inputs, subset {subset}");
                let ours = loss(&inputs, Made::run).expect(&what);
                let plain = loss(&inputs, |inputs| Ok((Made::out(inputs)?, Made::final_state(inputs)?))).expect(&what);
                assert_eq!(ours.track_op(), (0..count).any(|i| is_tracked(i, count)), "{what}");
                let (first, expected) = (gradients(&ours, &inputs), gradients(&plain, &inputs));
                assert_eq!(gradients(&ours, &inputs), first, "backward again, {what}");
                for (i, input) in inputs.iter().enumerate() {
                    // candle's plain operators store a gradient for untracked arguments too.
                    assert_eq!(first.contains_key(&input.id()), is_tracked(i, count), "input {i}, {what}");
                    let Some(ours) = first.get(&input.id()) else { continue };
                    for (ours, expected) in ours.iter().zip(&expected[&input.id()]) {
                        // Products and sums of up to 85 f32 in two orders: a few hundred roundings of 6e-8.
                        assert!(
                            (ours - expected).abs() <= 5e-5 * expected.abs(),
                            "input {i}: {ours}, {expected}, {what}"
                        );
                    }
                }
            }
        }
    }

    /// An operator whose backward pass does not give each input its gradient is told of.
    #[test]
    fn gradients_are_counted() {
        struct Short(Vec<bool>);
        impl Backward for Short {
            fn backward(&self, d_out: &Tensor, _: Option<&Tensor>) -> Result<Vec<Option<Tensor>>> {
                Ok(self.0.iter().map(|is_there| is_there.then(|| d_out.clone())).collect())
            }
        }
        let x = Var::new(&[1f32, 2.0], &Device::Cpu).expect("floats");
        let error = |given: &[bool]| {
            let out = Computed::new(Storage::Cpu(CpuStorage::F32(vec![0.0; 2])), [2]);
            let (out, _) = attach("short", &[&x, &x], out, None, Short(given.into())).expect("two inputs");
            out.sum_all().and_then(|loss| loss.backward()).expect_err("one gradient").to_string()
        };
        let (one, other) = (error(&[true]), error(&[true, false]));
        assert!(one.contains("short: 1 gradients for 2 inputs"), "{one}");
        assert!(other.contains("short: no gradient for input 1"), "{other}");
    }
}
