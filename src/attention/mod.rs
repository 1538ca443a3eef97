//! Attention (Vaswani et al. 2017, arXiv 1706.03762) with grouped heads (Ainslie et al. 2023, arXiv 2305.13245):
//! forward and backward, in memory that grows with the length and not with its square.
//!
//! ```text
//! s_ij  = scale · q_i · k_j                        for the keys j that query i sees
//! out_i = Σ_j exp(s_ij - lse_i) v_j                lse_i = ln Σ_j exp(s_ij)
//! ```
//!
//! Query head `h` reads the keys and values of head `h / (heads / kv_heads)`. Of a sequence of `n` queries and `m` keys, the
//! last query sees all keys and each one before it one key less, so that query `i` sees the keys from 0 to `m - n + i`; or,
//! where attention is not causal, each sees all `m`. By default there are as many keys as queries, each at its own step;
//! [`KeyRange`] says where the keys of a sequence lie if they are more, as those of a cache are, or another sequence's.
//!
//! The scores are there a block at a time only, by the sums of a softmax that go on from block to block (Milakov and
//! Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135). A forward pass keeps `lse` for the backward pass,
//! which computes the scores again.
//!
//! Sums are `f32`. An output does not depend on what its sequence is packed or batched with. What is not finite in a
//! sequence may reach all of its steps of that head, those before it too.
//!
//! [`Inputs`] says what the operator reads; [`cpu`] runs it on slices, with the feature `cuda` a module of that name on GPUs, and
//! [`reference`](mod@reference) is the same written plainly in `f64`. [`Inputs::forward`] and [`Inputs::backward`] allocate their results.

#[cfg(feature = "candle")]
pub(crate) mod candle;
mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;
pub(crate) mod tensors;

pub use tensors::{Gradients, GradientsMut, Inputs, Tensors};

use bytemuck::Pod;

use crate::arguments::zeroed;
use crate::kinds::{Slices, Zeros};
use crate::{Element, Host, Memory, Result, View};
use check::Problem;

/// The largest `d_head` that the operator takes.
pub const MAX_D_HEAD: usize = 256;

/// Where the keys and values of a sequence lie: the steps from `start` to `start + length` of a batch row of `k` and `v`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyRange {
    /// The batch row.
    pub row: usize,
    /// The first step.
    pub start: usize,
    /// The number of steps: at least as many as the sequence has queries, or one where attention is not causal.
    pub length: usize,
}

/// The results of a forward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct Output<T, P = f32> {
    /// `(batch, length, heads, d_head)`.
    pub out: Vec<T>,
    /// The logarithm of the sum of the exponentials of the scores, `(batch, length, heads)`, which a backward pass reads.
    pub lse: Vec<P>,
}

/// Where a forward pass writes: dense buffers, each overwritten whole.
pub struct OutputMut<'a, T: Element, M: Memory = Host> {
    /// `(batch, length, heads, d_head)`.
    pub out: &'a mut M::Buffer<T>,
    /// `(batch, length, heads)`.
    pub lse: &'a mut M::Buffer<f32>,
}

/// What a backward pass reads beside the inputs.
#[derive(Debug)]
pub struct OutputGradients<'a, T: Element, M: Memory = Host> {
    /// What the forward pass gave, `(batch, length, heads, d_head)`.
    pub out: View<'a, T, 4, M>,
    /// What the forward pass gave, `(batch, length, heads)`.
    pub lse: View<'a, f32, 3, M>,
    /// The gradient of the output, `(batch, length, heads, d_head)`.
    pub d_out: View<'a, T, 4, M>,
}

impl<T: Element, M: Memory> Clone for OutputGradients<'_, T, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element, M: Memory> Copy for OutputGradients<'_, T, M> {}

impl<T: Element> Gradients<T> {
    /// Zeros for every input.
    ///
    /// # Errors
    /// Inputs that do not fit each other, and one whose gradient does not fit in memory.
    pub fn zeroed(inputs: &Inputs<T>) -> Result<Self> {
        inputs.check()?.zero_gradients()
    }

    /// The buffers, to be written.
    pub fn as_mut(&mut self) -> GradientsMut<'_, T> {
        let Ok(buffers) = self.by_mut().map(&mut Slices);
        buffers
    }
}

impl<T: Element> Problem<'_, T> {
    /// Zeros for the gradient of every input.
    fn zero_gradients<A: Pod, P: Pod>(&self) -> Result<Gradients<A, P>> {
        self.inputs.tensors().shaped(self.sizes).map(&mut Zeros)
    }

    /// Zeros for the results.
    fn zero_output<A: Pod, P: Pod>(&self) -> Result<Output<A, P>> {
        Ok(Output { out: zeroed("q", &self.inputs.q.shape)?, lse: zeroed("q", &self.inputs.q.shape[..3])? })
    }
}

impl<T: Element> Inputs<'_, T> {
    /// Runs attention on the CPU.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names.
    pub fn forward(&self) -> Result<Output<T>> {
        let problem = self.check()?;
        let mut output = problem.zero_output()?;
        cpu::forward(self, OutputMut { out: &mut output.out, lse: &mut output.lse })?;
        Ok(output)
    }

    /// The gradients of all inputs, on the CPU, from the results of a forward pass and the gradient of `out`,
    /// `(batch, length, heads, d_head)`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names; keys of several sequences at one place.
    pub fn backward(&self, output: &Output<T>, d_out: View<T, 4>) -> Result<Gradients<T>> {
        let mut gradients = Gradients::zeroed(self)?;
        let [batch, length, heads, _] = self.q.shape;
        let outputs = OutputGradients {
            out: View::new(&output.out, self.q.shape),
            lse: View::new(&output.lse, [batch, length, heads]),
            d_out,
        };
        cpu::backward(self, outputs, gradients.as_mut())?;
        Ok(gradients)
    }
}
