//! The tensors of S4D and of its update in place, listed once.

use super::Options;
use crate::kinds::{Buffers, Vectors, tensors};
use crate::{DeviceSlots, Slots};

/// The sizes of the operator.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub batch: usize,
    pub length: usize,
    pub d_inner: usize,
    pub d_state: usize,
    pub sequences: usize,
}

tensors! {
    /// The tensors of S4D as some [`Kind`](crate::Kind), parameters and states of `f32` unless it says otherwise: those
    /// that a call has are there. Complex numbers are two neighbours, the real and the imaginary part.
    pub struct Tensors(Sizes { batch, length, d_inner, d_state, sequences });
    required {
        /// The input.
        u: activation(batch, length, d_inner),
        /// The logarithms of the step sizes.
        log_delta: parameter(d_inner),
        /// The eigenvalues, complex.
        a: parameter(d_inner, 2 * d_state),
        /// How the input enters the state, complex.
        b: parameter(d_inner, 2 * d_state),
        /// How the state is read, complex.
        c: parameter(d_inner, 2 * d_state),
    }
    optional {
        /// The skip connection.
        d: parameter(d_inner),
        /// The state before the first step, complex; zero if absent.
        initial_state: parameter(sequences, d_inner, 2 * d_state),
    }
    settings<'a> {
        /// Packed sequences: with offsets `[0, l1, l1 + l2, …, length]` the batch is 1 and sequence `i` takes the steps
        /// from `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Otherwise every batch row is a sequence.
        cu_seqlens: Option<&'a [usize]> = None,
        /// The variant of the operator.
        options: Options = Options::default(),
    }
    /// What S4D reads. `T` is the type of the activations; parameters and states are `f32`, and complex numbers two
    /// neighbours, the real and the imaginary part.
    views Inputs;
    /// S4D over tensors; see [`lti::s4d`](crate::lti::s4d) for what it computes.
    ///
    /// `T` stands for the element type of `u`: `f32`, `f16` or `bf16`. Tensors may have any strides and are not copied.
    /// Complex numbers are two neighbours, the real and the imaginary part.
    ///
    /// Gradients flow to every tensor here, from the output and from the final state.
    candle S4d;
    params s4d::Inputs;
}

/// Where a backward pass writes the gradient of each input: a dense buffer of the input's shape, overwritten whole.
/// Exactly the inputs that were given must have one.
pub type GradientsMut<'a, T, M = crate::Host> = Tensors<Buffers<'a, T, M>>;

/// The gradient of every input that was given, dense and of the input's shape: activations of type `T`, parameters and
/// states of type `P`. That of a complex number is made of the slopes by its real and by its imaginary part.
pub type Gradients<T, P = f32> = Tensors<Vectors<T, P>>;

tensors! {
    /// The tensors that an update reads beside the states, as some [`Kind`](crate::Kind).
    pub struct UpdateTensors(Sizes { batch, length: tokens, d_inner, d_state, .. });
    required {
        /// The input.
        u: activation(batch, tokens, d_inner),
        /// What [`recurrence`](crate::lti::s4d::recurrence) has made of the parameters.
        recurrence: parameter(d_inner, 6, d_state),
        /// How the state is read, complex.
        c: parameter(d_inner, 2 * d_state),
    }
    optional {
        /// The skip connection.
        d: parameter(d_inner),
    }
    settings<'a> {
        /// The slot of each batch row's state, `(batch)`. No two rows may have the same; a negative one makes its row
        /// padding, which gives zero and touches no state. By default the pool has one slot for each row.
        slots: Slots<'a, DeviceSlots<'a, M>> | crate::candle::Slots<'a> = Slots::Rows,
    }
    /// What an update reads beside the states. A state is what [`Inputs::initial_state`] says.
    ///
    /// The arithmetic of a step is `f64`, and the state is rounded to the pool's type after *every* token, also where
    /// the next one follows at once. So `K` tokens in one update give the same bits as `K` updates of one token, and
    /// speculative decoding, with rejected tokens rolled back by [`rollback`](super::rollback), gives what plain
    /// decoding gives.
    views UpdateInputs;
    /// An update of a pool of states of S4D by one token or a few, in place; see
    /// [`lti::s4d::UpdateInputs`](crate::lti::s4d::UpdateInputs) for what it computes.
    ///
    /// `T` stands for the element type of `u`: `f32`, `f16` or `bf16`. Tensors may have any strides and are not copied.
    /// No gradients flow: results are not part of candle's graph, whatever the tensors here are.
    candle S4dUpdate;
    params s4d::Update;
}
