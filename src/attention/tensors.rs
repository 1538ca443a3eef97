//! The tensors of attention, listed once.

use super::KeyRange;
use crate::kinds::{Buffers, Vectors, tensors};

/// The sizes of attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub batch: usize,
    pub length: usize,
    pub heads: usize,
    pub d_head: usize,
    pub rows: usize,
    pub steps: usize,
    pub kv_heads: usize,
}

impl Sizes {
    /// The query heads that read one head of keys and values.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

tensors! {
    /// The tensors of attention as some [`Kind`](crate::Kind).
    pub struct Tensors(Sizes { batch, length, heads, d_head, rows, steps, kv_heads });
    required {
        /// The queries, with a `d_head` of [`MAX_D_HEAD`](crate::attention::MAX_D_HEAD) at most.
        q: activation(batch, length, heads, d_head),
        /// The keys: of as many rows and steps as the queries, unless `keys` says where they lie. `heads` is a multiple of
        /// `kv_heads`.
        k: activation(rows, steps, kv_heads, d_head),
        /// The values, of the shape of the keys.
        v: activation(rows, steps, kv_heads, d_head),
    }
    optional {}
    settings<'a> {
        /// By what products of queries and keys are multiplied; `1/√d_head` if absent.
        scale: Option<f32> = None,
        /// Packed sequences: with offsets `[0, l1, l1 + l2, …, length]` the batch is 1 and sequence `i` takes the queries from
        /// `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Otherwise every batch row is a sequence.
        cu_seqlens: Option<&'a [usize]> = None,
        /// Where the keys of each sequence lie; if absent, where its queries do.
        keys: Option<&'a [KeyRange]> = None,
        /// Whether a query sees no keys after its own; if not, it sees all keys of its sequence.
        causal: bool = true,
    }
    /// What attention reads. `T` is the type of the tensors.
    views Inputs;
    /// Attention over tensors; see [`attention`](crate::attention) for what it computes.
    ///
    /// `T` stands for the element type of `q`: `f32`, `f16` or `bf16`. Tensors may have any strides and are not copied.
    ///
    /// Gradients flow to every tensor here.
    candle Attention;
}

/// Where a backward pass writes the gradient of each input: a dense buffer of the input's shape, overwritten whole.
pub type GradientsMut<'a, T, M = crate::Host> = Tensors<Buffers<'a, T, M>>;

/// The gradient of every input, dense and of the input's shape: of type `T`. There are no parameters of type `P`.
pub type Gradients<T, P = f32> = Tensors<Vectors<T, P>>;
