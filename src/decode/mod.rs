//! What a model's decoding step is made of, in few launches: products of few rows with large matrices, joined with what
//! stands before and after them.
//!
//! A step reads every weight once for a handful of rows, and takes as long as that reading does if nothing else stands in
//! the way. So each operator here is one kernel on a GPU and does all that lies between two reductions:
//!
//! ```text
//! linear             out  = norm(x) Wᵀ + bias                the RMS norm, or none; written, or added to what is there
//! linear with conv   x, z = the halves of that;  u = silu(conv(x))            the causal convolution on a pool, in place
//! selective_update   dt, B, C = u W_xᵀ, or given;   Δ = T(norm(dt) W_dtᵀ);   y = the state update, gated         in place
//! ```
//!
//! Three of them are a Mamba block with the norm before it and the addition after it: `linear` with norm and convolution,
//! [`SelectiveUpdate`] with `x_proj`, `linear` that adds.
//!
//! # Numbers
//! `T` is the type of matrices and activations. Arithmetic is `f32`, and rounded to `T` wherever the operators one by one
//! would round: the rows that are multiplied, after their norm, the output of the convolution and what goes into it, Δ, the output of
//! the update. A product is rounded once, to the type of what it is written to or added to. What a row gets depends on
//! neither the other rows nor their number, to the last bit: a sequence that is decoded in company gets what it gets alone.
//!
//! [`Linear`] and [`SelectiveUpdate`] say what the operators read; [`cpu`] runs them on slices,
//! [`reference`](mod@reference) is the same written plainly in `f64`.

#[cfg(feature = "candle")]
pub(crate) mod candle;
mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;

use crate::arguments::plain_struct;
use crate::{DeviceSlots, Element, Host, Memory, Slots, View, ViewMut};
use check::{LinearProblem, UpdateProblem};

/// What a product of rows with a matrix reads. `X` is the type of the rows: `T`, or `f32` as a residual stream may be.
pub struct Linear<'a, X: Element, T: Element = X, M: Memory = Host> {
    /// `(rows, features)`.
    pub x: View<'a, X, 2, M>,
    /// `(out_features, features)`.
    pub weight: View<'a, T, 2, M>,
    /// Added to the product, `(out_features)`.
    pub bias: Option<View<'a, f32, 1, M>>,
    /// The norm of the rows before the product.
    pub norm: Option<RowNorm<'a, M>>,
    /// The convolution of the first columns after it.
    pub conv: Option<ConvStep<'a, M>>,
}

/// An RMS norm of whole rows, see [`norm`](crate::norm).
pub struct RowNorm<'a, M: Memory = Host> {
    /// `(features)`; 1 if absent.
    pub weight: Option<View<'a, f32, 1, M>>,
    /// Added to the mean of the squares: 0 or more, and finite.
    pub eps: f64,
}

/// A step of the causal convolution with SiLU on the first `d_inner` columns of a product, see
/// [`conv::UpdateInputs`](crate::conv::UpdateInputs): in place of these the product has the results.
pub struct ConvStep<'a, M: Memory = Host> {
    /// `(d_inner, width)`, where `d_inner` is at most the columns of the product and the width 2 to 8.
    pub weight: View<'a, f32, 2, M>,
    /// `(d_inner)`.
    pub bias: Option<View<'a, f32, 1, M>>,
    /// The slot of each row's state; a negative one makes its row padding, whose first columns are zero.
    pub slots: Slots<'a, DeviceSlots<'a, M>>,
}

/// What a product writes; `O` is `T` or `f32`, and `St` the type of the convolution's states.
pub struct LinearMut<'a, O: Element, St: Element = f32, M: Memory = Host> {
    /// `(rows, out_features)`, dense.
    pub out: &'a mut M::Buffer<O>,
    /// Add to what `out` has; else it is overwritten.
    pub accumulate: bool,
    /// The pool of the convolution, `(slots, width - 1, d_inner)`, read and brought up to date; where there is one.
    pub conv_state: Option<ViewMut<'a, St, 3, M>>,
}

/// What a selective state update of one token reads beside the states: the step sizes are projected within it.
pub struct SelectiveUpdate<'a, T: Element, M: Memory = Host> {
    /// The input, `(rows, d_inner)`.
    pub u: View<'a, T, 2, M>,
    /// The low-rank step sizes, B and C of each row.
    pub columns: Columns<'a, T, M>,
    /// What the step sizes are projected by, `(d_inner, dt_rank)`.
    pub dt_weight: View<'a, T, 2, M>,
    /// Norms of the three parts of `columns`.
    pub norms: Option<ColumnNorms<'a, M>>,
    /// The state matrix, `(d_inner, d_state)`.
    pub a: View<'a, f32, 2, M>,
    /// The skip connection, `(d_inner)`.
    pub d: Option<View<'a, f32, 1, M>>,
    /// Added to the step sizes before softplus, `(d_inner)`.
    pub delta_bias: Option<View<'a, f32, 1, M>>,
    /// The gate, `(rows, d_inner)`.
    pub z: Option<View<'a, T, 2, M>>,
    /// The slot of each row's state; a negative one makes its row padding, which gives zero and touches no state.
    pub slots: Slots<'a, DeviceSlots<'a, M>>,
}

/// What `x_proj` gives, `(rows, dt_rank + 2 d_state)`: the low-rank step sizes, B and C.
pub enum Columns<'a, T: Element, M: Memory = Host> {
    /// As it is.
    Given(View<'a, T, 2, M>),
    /// By a product with `u` before the update, which is rounded to `T`.
    Projected {
        /// The weight of `x_proj`, `(dt_rank + 2 d_state, d_inner)`.
        weight: View<'a, T, 2, M>,
    },
}

/// RMS norms of the low-rank step sizes, B and C, as in Jamba and Falcon Mamba.
pub struct ColumnNorms<'a, M: Memory = Host> {
    /// `(dt_rank)`, `(d_state)` and `(d_state)`; 1 if absent.
    pub weights: Option<[View<'a, f32, 1, M>; 3]>,
    /// Added to the mean of the squares: 0 or more, and finite.
    pub eps: f64,
}

/// What a selective update writes.
pub struct SelectiveUpdateMut<'a, T: Element, St: Element, M: Memory = Host> {
    /// The pool, `(slots, d_inner, d_state)`, read and brought up to date.
    pub state: ViewMut<'a, St, 3, M>,
    /// `(rows, d_inner)`, dense, overwritten whole.
    pub out: &'a mut M::Buffer<T>,
    /// What `x_proj` gives, where that is [projected](Columns::Projected): `(rows, dt_rank + 2 d_state)`, dense, overwritten whole.
    pub columns: Option<&'a mut M::Buffer<T>>,
}

plain_struct!(Linear<X, T> { x, weight, bias, norm, conv });
plain_struct!(RowNorm<> { weight, eps });
plain_struct!(ConvStep<> { weight, bias, slots });
plain_struct!(SelectiveUpdate<T> { u, columns, dt_weight, norms, a, d, delta_bias, z, slots });
plain_struct!(ColumnNorms<> { weights, eps });

impl<T: Element, M: Memory> Clone for Columns<'_, T, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element, M: Memory> Copy for Columns<'_, T, M> {}

impl<T: Element, M: Memory> std::fmt::Debug for Columns<'_, T, M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Given(view) => f.debug_tuple("Given").field(view).finish(),
            Self::Projected { weight } => f.debug_struct("Projected").field("weight", weight).finish(),
        }
    }
}

impl<'a, T: Element, M: Memory> From<View<'a, T, 2, M>> for Columns<'a, T, M> {
    fn from(view: View<'a, T, 2, M>) -> Self {
        Self::Given(view)
    }
}

impl<'a, X: Element, T: Element, M: Memory> Linear<'a, X, T, M> {
    /// The plain product. Add what else there is with struct update syntax: `Linear { bias, ..Linear::new(x, weight) }`.
    pub fn new(x: View<'a, X, 2, M>, weight: View<'a, T, 2, M>) -> Self {
        Self { x, weight, bias: None, norm: None, conv: None }
    }
}

impl<'a, O: Element, M: Memory> LinearMut<'a, O, f32, M> {
    /// A buffer that is overwritten.
    pub fn new(out: &'a mut M::Buffer<O>) -> Self {
        Self { out, accumulate: false, conv_state: None }
    }

    /// A buffer that is added to.
    pub fn add_to(out: &'a mut M::Buffer<O>) -> Self {
        Self { accumulate: true, ..Self::new(out) }
    }
}

impl<'a, T: Element, St: Element, M: Memory> SelectiveUpdateMut<'a, T, St, M> {
    /// Where columns are given.
    pub fn new(state: ViewMut<'a, St, 3, M>, out: &'a mut M::Buffer<T>) -> Self {
        Self { state, out, columns: None }
    }
}

impl<'a, T: Element, M: Memory> SelectiveUpdate<'a, T, M> {
    /// What every update has; all else is absent, and row `i` has slot `i`. Add it with struct update syntax.
    pub fn new(
        u: View<'a, T, 2, M>,
        columns: impl Into<Columns<'a, T, M>>,
        dt_weight: View<'a, T, 2, M>,
        a: View<'a, f32, 2, M>,
    ) -> Self {
        let columns = columns.into();
        Self { u, columns, dt_weight, norms: None, a, d: None, delta_bias: None, z: None, slots: Slots::Rows }
    }
}
