//! The tensors of a convolution and of its update in place, listed once.

use super::Options;
use crate::kinds::{Buffers, Vectors, tensors};
use crate::{DeviceSlots, Slots};

/// The sizes of a convolution.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub batch: usize,
    pub length: usize,
    pub d_inner: usize,
    pub width: usize,
    pub sequences: usize,
}

tensors! {
    /// The tensors of a convolution as some [`Kind`](crate::kinds::Kind), parameters and states of `f32` unless it says
    /// otherwise: those that a call has are there.
    pub struct Tensors(Sizes { batch, length, d_inner, width, sequences });
    required {
        /// The input.
        x: activation(batch, length, d_inner),
        /// The filters, with a width of [`WIDTHS`](crate::conv::WIDTHS); the last weight meets the newest input.
        weight: parameter(d_inner, width),
    }
    optional {
        /// Added to every output before SiLU.
        bias: parameter(d_inner),
        /// The inputs before the first step, oldest first; zero if absent.
        initial_state: parameter(sequences, width - 1, d_inner),
    }
    settings<'a> {
        /// Packed sequences: with offsets `[0, l1, l1 + l2, …, length]` the batch is 1 and sequence `i` takes the steps from
        /// `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Otherwise every batch row is a sequence.
        cu_seqlens: Option<&'a [usize]> = None,
        /// The variant of the convolution.
        options: Options = Options::default(),
    }
    /// What a convolution reads. `T` is the type of the activations; parameters and states are `f32`.
    views Inputs;
    /// A causal depthwise convolution over tensors; see [`conv`](crate::conv) for what it computes.
    ///
    /// `T` stands for the element type of `x`: `f32`, `f16` or `bf16`. Tensors may have any strides and are not copied.
    ///
    /// Gradients flow to every tensor here, from the output and from the final state.
    candle CausalConv;
    params conv::Inputs;
}

/// Where a backward pass writes the gradient of each input: a dense buffer of the input's shape, overwritten whole.
/// Exactly the inputs that were given must have one.
pub type GradientsMut<'a, T, M = crate::Host> = Tensors<Buffers<'a, T, M>>;

/// The gradient of every input that was given, dense and of the input's shape: activations of type `T`, parameters and
/// states of type `P`.
pub type Gradients<T, P = f32> = Tensors<Vectors<T, P>>;

tensors! {
    /// The tensors that an update reads beside the states, as some [`Kind`](crate::kinds::Kind).
    pub struct UpdateTensors(Sizes { batch, length: tokens, d_inner, width, .. });
    required {
        /// The input.
        x: activation(batch, tokens, d_inner),
        /// The filters; the last weight meets the newest input.
        weight: parameter(d_inner, width),
    }
    optional {
        /// Added to every output before SiLU.
        bias: parameter(d_inner),
    }
    settings<'a> {
        /// The slot of each batch row's state, `(batch)`. No two rows may have the same; a negative one makes its row
        /// padding, which gives zero and touches no state. By default the pool has one slot for each row.
        slots: Slots<'a, DeviceSlots<'a, M>> | crate::candle::Slots<'a> = Slots::Rows,
        /// Apply `silu(x) = x/(1 + e^-x)` to the result.
        silu: bool = false,
    }
    /// What an update reads beside the states. A state is what [`Inputs::initial_state`] says, the last `width - 1` inputs,
    /// oldest first.
    ///
    /// An input is rounded to the pool's type as soon as it is part of the state, also where the next token follows at
    /// once. So `K` tokens in one update give the same bits as `K` updates of one token, and speculative decoding, with
    /// rejected tokens rolled back by [`rollback`](super::rollback), gives what plain decoding gives.
    views UpdateInputs;
    /// An update of a pool of states of the convolution by one token or a few, in place; see
    /// [`conv::UpdateInputs`](crate::conv::UpdateInputs) for what it computes.
    ///
    /// `T` stands for the element type of `x`: `f32`, `f16` or `bf16`. Tensors may have any strides and are not copied.
    /// No gradients flow: results are not part of candle's graph, whatever the tensors here are.
    candle ConvUpdate;
    params conv::Update;
}
