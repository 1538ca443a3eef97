//! The tensors of a scan, listed once.

use super::Options;
use crate::arguments::Dims;
use crate::kinds::{Buffers, Vectors, tensors};

tensors! {
    /// The tensors of a scan as some [`Kind`](crate::kinds::Kind), parameters and states of `f32` unless it says otherwise:
    /// those that a call has are there.
    pub struct Tensors(Dims { batch, len: length, d_inner, d_state, groups, sequences });
    required {
        /// The input.
        u: activation(batch, length, d_inner),
        /// The step sizes before bias and softplus.
        delta: activation(batch, length, d_inner),
        /// The state matrix, diagonal: negative for a state that decays.
        a: parameter(d_inner, d_state),
        /// How the input enters the state.
        b: projection(batch, length, groups, d_state; d_inner, d_state),
        /// How the state is read.
        c: projection(batch, length, groups, d_state; d_inner, d_state),
    }
    optional {
        /// The gate.
        z: activation(batch, length, d_inner),
        /// The skip connection.
        d: parameter(d_inner),
        /// Added to `delta`.
        delta_bias: parameter(d_inner),
        /// The state before the first step; zero if absent.
        initial_state: parameter(sequences, d_inner, d_state),
    }
    settings<'a> {
        /// Packed sequences: with offsets `[0, l1, l1 + l2, …, length]` the batch is 1 and sequence `i` takes the steps from
        /// `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Otherwise every batch row is a sequence.
        cu_seqlens: Option<&'a [usize]> = None,
        /// The variant of the recurrence.
        options: Options = Options::default(),
    }
    /// What a selective scan reads. `T` is the type of the activations; parameters and states are `f32`.
    views Inputs;
    /// A selective scan over tensors; see [`scan`](crate::scan) for what it computes.
    ///
    /// `T` stands for the element type of `u`: `f32`, `f16` or `bf16`. Tensors may have any strides. Channels-last, such as
    /// a column range of a projection's output, is the fast layout and is not copied. A projection of one group may leave
    /// the dimension of groups out: `(batch, length, d_state)`.
    ///
    /// Gradients flow to every tensor here, from the output and from the final state.
    candle Scan;
    params scan::Inputs;
}

/// Where a backward pass writes the gradient of each input: a dense buffer of the input's shape, overwritten whole.
/// Exactly the inputs that were given must have one.
pub type GradientsMut<'a, T, M = crate::Host> = Tensors<Buffers<'a, T, M>>;

/// The gradient of every input that was given, dense and of the input's shape: activations of type `T`, parameters and
/// states of type `P`.
pub type Gradients<T, P = f32> = Tensors<Vectors<T, P>>;
