//! The RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467) with the residual added: forward and backward.
//!
//! Every row of `width` columns, or every group of `group_size` neighbouring columns of it, is normed by itself:
//!
//! ```text
//! s   = x + residual                                s = x without a residual
//! out = s / √(mean(s²) + eps) · weight
//! ```
//!
//! `s` is the residual stream of a model after the addition, and is also given if it is wanted (`residual_out`). It is
//! rounded to the residual's type before it is normed, so that the sum and its norm in one call have the results of an
//! addition and a norm one after the other, and so that a backward pass finds in `residual_out` what was normed.
//!
//! With a gate `z` the norm is that of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060), in one of two orders:
//!
//! ```text
//! v = s · silu(z),  out = v / √(mean(v²) + eps) · weight          the gate first
//! out = s / √(mean(s²) + eps) · weight · silu(z)                  the norm first, `norm_before_gate`
//! ```
//!
//! All arithmetic is `f32`. `x` and `z` have one type, `X`; the residual and its successor are `f32` or also of `X`; the
//! output is of `X` or, where that is `f32`, of any type.
//!
//! What is not finite stays in its group of its row; only the gradient of the weight, which sums over rows, meets it again.
//! Where the mean of the squares is beyond `f32`, for entries of about 1.8e19 and more, the norm is infinite, and the group
//! and its gradients through the norm are zero. A group of zeros with an `eps` of 0 is not a number, as 0/0 is.
//!
//! [`Inputs`] says what a forward pass reads and [`BackwardInputs`] what a backward pass does; [`cpu`] runs them on slices,
//! [`reference`](mod@reference) is the same written plainly in `f64`.

#[cfg(feature = "candle")]
pub(crate) mod candle;
mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;

use crate::arguments::{plain_struct, zeroed};
use crate::simd::Isa;
use crate::{Element, Host, Memory, Result, View};
pub(crate) use check::check_eps;
use check::{BackwardProblem, Problem};

/// Variants of the norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Added to the mean of the squares: 0 or more, and finite.
    pub eps: f64,
    /// How many neighbouring columns are normed together, a divisor of the width; all of a row if absent.
    pub group_size: Option<usize>,
    /// Multiply the gate on after the norm and the weight, and not on what is normed. Of no account without a gate.
    pub norm_before_gate: bool,
}

impl Default for Options {
    /// An `eps` of 1e-5, whole rows, the gate first.
    fn default() -> Self {
        Self { eps: 1e-5, group_size: None, norm_before_gate: false }
    }
}

/// What a forward pass reads.
pub struct Inputs<'a, X: Element, S: Element = X, M: Memory = Host> {
    /// The input, `(rows, width)`.
    pub x: View<'a, X, 2, M>,
    /// Added to the input, `(rows, width)`.
    pub residual: Option<View<'a, S, 2, M>>,
    /// Multiplies what is normed, `(width)`; 1 if absent.
    pub weight: Option<View<'a, f32, 1, M>>,
    /// The gate, `(rows, width)`.
    pub z: Option<View<'a, X, 2, M>>,
    /// The variant of the norm.
    pub options: Options,
}

/// What a backward pass reads.
pub struct BackwardInputs<'a, X: Element, S: Element = X, O: Element = X, M: Memory = Host> {
    /// What was normed, before a gate: `residual_out`, or `x` if there was no residual; `(rows, width)`.
    pub s: View<'a, S, 2, M>,
    /// The weight of the forward pass, `(width)`.
    pub weight: Option<View<'a, f32, 1, M>>,
    /// The gate of the forward pass, `(rows, width)`.
    pub z: Option<View<'a, X, 2, M>>,
    /// The gradient of `out`, `(rows, width)`.
    pub d_out: View<'a, O, 2, M>,
    /// The gradient of `residual_out`, `(rows, width)`; zero if absent.
    pub d_residual_out: Option<View<'a, S, 2, M>>,
    /// The variant of the norm.
    pub options: Options,
}

plain_struct!(Inputs<X, S> { x, residual, weight, z, options });
plain_struct!(BackwardInputs<X, S, O> { s, weight, z, d_out, d_residual_out, options });

impl<'a, X: Element, S: Element, M: Memory> Inputs<'a, X, S, M> {
    /// The input alone; all else is absent or plain. Add it with struct update syntax:
    /// `Inputs { weight: Some(weight), ..Inputs::new(x) }`.
    pub fn new(x: View<'a, X, 2, M>) -> Self {
        Self { x, residual: None, weight: None, z: None, options: Options::default() }
    }
}

impl<'a, X: Element, S: Element, O: Element, M: Memory> BackwardInputs<'a, X, S, O, M> {
    /// What every call has; all else is absent or plain. Add it with struct update syntax:
    /// `BackwardInputs { weight: Some(weight), ..BackwardInputs::new(s, d_out) }`.
    pub fn new(s: View<'a, S, 2, M>, d_out: View<'a, O, 2, M>) -> Self {
        Self { s, weight: None, z: None, d_out, d_residual_out: None, options: Options::default() }
    }
}

/// Where a forward pass writes. Every buffer is dense and is overwritten whole.
pub struct OutputMut<'a, S: Element, O: Element, M: Memory = Host> {
    /// The norm, `(rows, width)`.
    pub out: &'a mut M::Buffer<O>,
    /// `s`, `(rows, width)`.
    pub residual_out: Option<&'a mut M::Buffer<S>>,
}

/// Where a backward pass writes: dense buffers, each overwritten whole. Those that are absent are not computed.
pub struct GradientsMut<'a, X: Element, S: Element = X, M: Memory = Host> {
    /// The gradient of `x`, `(rows, width)`.
    pub x: Option<&'a mut M::Buffer<X>>,
    /// The gradient of the residual, `(rows, width)`: the numbers of the gradient of `x`, so that where both have one type
    /// one of them serves.
    pub residual: Option<&'a mut M::Buffer<S>>,
    /// The gradient of the weight, `(width)`.
    pub weight: Option<&'a mut M::Buffer<f32>>,
    /// The gradient of the gate, `(rows, width)`; only where there is one.
    pub z: Option<&'a mut M::Buffer<X>>,
}

/// The results of a forward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct Output<S, O> {
    /// The norm, `(rows, width)`.
    pub out: Vec<O>,
    /// `s`, `(rows, width)`.
    pub residual_out: Vec<S>,
}

/// The results of a backward pass; `P` is the type of the gradient of the weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients<X, S, P = f32> {
    /// The gradient of `x`, `(rows, width)`.
    pub x: Vec<X>,
    /// The gradient of the residual, `(rows, width)`.
    pub residual: Vec<S>,
    /// The gradient of the weight, `(width)`, also where there is none and 1 stands in its place.
    pub weight: Vec<P>,
    /// The gradient of the gate, `(rows, width)`, where there is one.
    pub z: Option<Vec<X>>,
}

impl<X: Element, S: Element> Inputs<'_, X, S> {
    /// Runs the norm on the CPU.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names.
    pub fn forward<O: Element>(&self) -> Result<Output<S, O>> {
        let problem = self.check::<O>()?;
        let (mut out, mut residual_out) = (zeroed("x", &self.x.shape)?, zeroed("x", &self.x.shape)?);
        let outputs = OutputMut { out: &mut out[..], residual_out: Some(&mut residual_out[..]) };
        cpu::forward_checked(Isa::best(), &problem, outputs)?;
        Ok(Output { out, residual_out })
    }
}

impl<X: Element, S: Element, O: Element> BackwardInputs<'_, X, S, O> {
    /// Computes all gradients on the CPU.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names.
    pub fn backward(&self) -> Result<Gradients<X, S>> {
        let problem = self.check()?;
        let shape = self.s.shape;
        let (mut x, mut residual) = (zeroed("s", &shape)?, zeroed("s", &shape)?);
        let mut weight = zeroed("s", &shape[1..])?;
        let mut z = self.z.map(|_| zeroed("z", &shape)).transpose()?;
        let gradients = GradientsMut {
            x: Some(&mut x[..]),
            residual: Some(&mut residual[..]),
            weight: Some(&mut weight[..]),
            z: z.as_deref_mut(),
        };
        cpu::backward_checked(Isa::best(), &problem, gradients)?;
        Ok(Gradients { x, residual, weight, z })
    }
}
