//! The tensors of a state update, listed once.

use super::Options;
use crate::arguments::Dims;
use crate::kinds::tensors;
use crate::{DeviceSlots, Slots};

tensors! {
    /// The tensors that a state update reads beside the states, as some [`Kind`](crate::kinds::Kind).
    pub struct Tensors(Dims { batch, len: tokens, d_inner, d_state, groups, .. });
    required {
        /// The input.
        u: activation(batch, tokens, d_inner),
        /// The step sizes before bias and softplus.
        delta: activation(batch, tokens, d_inner),
        /// The state matrix, diagonal: negative for a state that decays.
        a: parameter(d_inner, d_state),
        /// How the input enters the state.
        b: projection(batch, tokens, groups, d_state; d_inner, d_state),
        /// How the state is read.
        c: projection(batch, tokens, groups, d_state; d_inner, d_state),
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
        /// The variant of the recurrence.
        options: Options = Options::default(),
    }
    /// What a state update reads beside the states. `T` is the type of the activations; parameters are `f32`.
    views Inputs;
    /// An update of a pool of states by one token or a few, in place; see [`state_update`](crate::state_update) for what it
    /// computes.
    ///
    /// `T` stands for the element type of `u`: `f32`, `f16` or `bf16`. Tensors may have any strides and are not copied. A
    /// projection of one group may leave the dimension of groups out: `(batch, tokens, d_state)`. No gradients flow: results
    /// are not part of candle's graph, whatever the tensors here are.
    candle StateUpdate;
    params state_update::Update;
}
