//! The tensors of the scan with complex states and of its update in place, listed once.

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
    pub groups: usize,
    pub sequences: usize,
}

impl Sizes {
    /// The channels that share one group's `B` and `C`.
    pub fn group_channels(&self) -> usize {
        self.d_inner / self.groups
    }
}

tensors! {
    /// The tensors of a scan with complex states as some [`Kind`](crate::kinds::Kind), parameters and states of `f32` unless
    /// it says otherwise: those that a call has are there. Complex numbers are two neighbours, the real and the imaginary
    /// part.
    pub struct Tensors(Sizes { batch, length, d_inner, d_state, groups, sequences });
    required {
        /// The input.
        u: activation(batch, length, d_inner),
        /// The step sizes before bias and softplus.
        delta: activation(batch, length, d_inner),
        /// The eigenvalues, complex.
        a: parameter(d_inner, 2 * d_state),
        /// How the input enters the state, complex.
        b: projection(batch, length, groups, 2 * d_state; d_inner, 2 * d_state),
        /// How the state is read, complex.
        c: projection(batch, length, groups, 2 * d_state; d_inner, 2 * d_state),
    }
    optional {
        /// The gate.
        z: activation(batch, length, d_inner),
        /// The skip connection.
        d: parameter(d_inner),
        /// Added to `delta`.
        delta_bias: parameter(d_inner),
        /// The state before the first step, complex; zero if absent.
        initial_state: parameter(sequences, d_inner, 2 * d_state),
    }
    settings<'a> {
        /// Packed sequences: with offsets `[0, l1, l1 + l2, …, length]` the batch is 1 and sequence `i` takes the steps from
        /// `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Otherwise every batch row is a sequence.
        cu_seqlens: Option<&'a [usize]> = None,
        /// The variant of the recurrence.
        options: Options = Options::default(),
    }
    /// What a scan with complex states reads. `T` is the type of the activations; parameters and states are `f32`, and
    /// complex numbers two neighbours, the real and the imaginary part.
    views Inputs;
    /// A selective scan with complex states over tensors; see [`complex_scan`](crate::complex_scan) for what it computes.
    ///
    /// `T` stands for the element type of `u`: `f32`, `f16` or `bf16`. Tensors may have any strides and are not copied.
    /// Complex numbers are two neighbours, the real and the imaginary part. A projection of one group may leave the
    /// dimension of groups out: `(batch, length, 2 * d_state)`.
    ///
    /// Gradients flow to every tensor here, from the output and from the final state.
    candle ComplexScan;
    params complex_scan::Inputs;
}

/// Where a backward pass writes the gradient of each input: a dense buffer of the input's shape, overwritten whole.
/// Exactly the inputs that were given must have one.
pub type GradientsMut<'a, T, M = crate::Host> = Tensors<Buffers<'a, T, M>>;

/// The gradient of every input that was given, dense and of the input's shape: activations of type `T`, parameters and
/// states of type `P`. That of a complex number is made of the slopes by its real and by its imaginary part.
pub type Gradients<T, P = f32> = Tensors<Vectors<T, P>>;

tensors! {
    /// The tensors that an update reads beside the states, as some [`Kind`](crate::kinds::Kind).
    pub struct UpdateTensors(Sizes { batch, length: tokens, d_inner, d_state, groups, .. });
    required {
        /// The input.
        u: activation(batch, tokens, d_inner),
        /// The step sizes before bias and softplus.
        delta: activation(batch, tokens, d_inner),
        /// The eigenvalues, complex.
        a: parameter(d_inner, 2 * d_state),
        /// How the input enters the state, complex.
        b: projection(batch, tokens, groups, 2 * d_state; d_inner, 2 * d_state),
        /// How the state is read, complex.
        c: projection(batch, tokens, groups, 2 * d_state; d_inner, 2 * d_state),
    }
    optional {
        /// The gate.
        z: activation(batch, tokens, d_inner),
        /// The skip connection.
        d: parameter(d_inner),
        /// Added to `delta`.
        delta_bias: parameter(d_inner),
    }
    settings<'a> {
        /// The slot of each batch row's state, `(batch)`. No two rows may have the same; a negative one makes its row
        /// padding, which gives zero and touches no state. By default the pool has one slot for each row.
        slots: Slots<'a, DeviceSlots<'a, M>> | crate::candle::Slots<'a> = Slots::Rows,
        /// Pass `delta + delta_bias` through softplus.
        delta_softplus: bool = false,
    }
    /// What an update reads beside the states. A state is what [`Inputs::initial_state`] says.
    ///
    /// The state is rounded to the pool's type after *every* token, also where the next one follows at once: `K` tokens in
    /// one update give the same bits as `K` updates of one token.
    views UpdateInputs;
    /// An update of a pool of complex states by one token or a few, in place; see
    /// [`complex_scan::UpdateInputs`](crate::complex_scan::UpdateInputs) for what it computes.
    ///
    /// `T` stands for the element type of `u`: `f32`, `f16` or `bf16`. Tensors may have any strides and are not copied. A
    /// projection of one group may leave the dimension of groups out. No gradients flow: results are not part of candle's
    /// graph, whatever the tensors here are.
    candle ComplexUpdate;
    params complex_scan::Update;
}
