//! The tensors of a long convolution, listed once.

use crate::kinds::{Buffers, Vectors, tensors};

/// The sizes of a long convolution.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub batch: usize,
    pub length: usize,
    pub d_inner: usize,
    pub kernel_length: usize,
}

tensors! {
    /// The tensors of a long convolution as some [`Kind`](crate::Kind).
    pub struct Tensors(Sizes { batch, length, d_inner, kernel_length });
    required {
        /// The input.
        u: activation(batch, length, d_inner),
        /// The kernels, the first of which meets the newest input. They may be shorter or longer than the sequences.
        kernel: parameter(d_inner, kernel_length),
    }
    optional {
        /// The skip connection.
        d: parameter(d_inner),
    }
    settings<'a> {
        /// Packed sequences: with offsets `[0, l1, l1 + l2, …, length]` the batch is 1 and sequence `i` takes the steps
        /// from `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Otherwise every batch row is a sequence.
        cu_seqlens: Option<&'a [usize]> = None,
        /// Run from the last step of each sequence to its first: an output is then made of the inputs after it.
        reverse: bool = false,
    }
    /// What a long convolution reads. `T` is the type of the activations; parameters are `f32`.
    views Inputs;
    /// A long convolution over tensors; see [`lti::long_conv`](crate::lti::long_conv) for what it computes. On the
    /// processor only: on another device it gives an error.
    ///
    /// `T` stands for the element type of `u`: `f32`, `f16` or `bf16`. Tensors may have any strides and are not copied.
    ///
    /// Gradients flow to every tensor here.
    candle LongConv;
}

/// Where a backward pass writes the gradient of each input: a dense buffer of the input's shape, overwritten whole.
/// Exactly the inputs that were given must have one.
pub type GradientsMut<'a, T, M = crate::Host> = Tensors<Buffers<'a, T, M>>;

/// The gradient of every input that was given, dense and of the input's shape: activations of type `T`, parameters of
/// type `P`.
pub type Gradients<T, P = f32> = Tensors<Vectors<T, P>>;
