//! Cross entropy: the loss of a language model that gives each token of its vocabulary a logit, with label smoothing and a
//! term that keeps the logits' normaliser near 1.
//!
//! For every row `x` of `V` logits and its target `t`:
//!
//! ```text
//! lse  = log Σ_v exp(x_v)
//! loss = (1 - ε)(lse - x_t) + ε (lse - mean_v x_v) + ζ lse²
//!
//! d loss / dx_v = softmax_v(x) (1 + 2 ζ lse) - (1 - ε)[v = t] - ε/V
//! ```
//!
//! ε smooths labels (Szegedy et al. 2016, arXiv 1512.00567), ζ weights the z-loss (Chowdhery et al. 2022, arXiv 2204.02311).
//! Neither logits of any size nor any number of them overflow: the greatest is subtracted first. Where a model is sure and
//! right, `lse - x_t` and `softmax_t - 1` are next to nothing; they are computed from what all other logits have together,
//! and keep their digits.
//!
//! Logits are `f32`, `f16` or `bf16`, arithmetic is `f32` or wider, and losses are `f32`. The gradient takes the place of the
//! logits, in their type, rounded once: a batch of 16,384 rows and 50,280 tokens has 1.6 GB of logits in a half type, and
//! needs no more.
//!
//! # Rows that are left out
//! A row whose target is [`IGNORED`] has a loss of zero and a gradient of zero, whatever its logits. A target that is none of
//! the vocabulary and not that number gives NaN in all of its row: targets may lie on a device, where nobody looks at them
//! before. A NaN among the logits is in the results of its row and of no other, and so is what an infinite logit gives: an
//! infinite loss if the target has `-inf`, NaN if one has `+inf`.
//!
//! # Sums
//! Each row's sums are taken in an order that the size of the vocabulary gives, and no sum goes over rows. A mean over rows is
//! `scale = 1/n` here, with `n` the rows that are not left out, and the losses' own sum times that.
//!
//! ```
//! use selective_scan::loss::{IGNORED, Inputs, InputsMut};
//! use selective_scan::{View, ViewMut};
//!
//! let mut logits = [0.0f32, 0.0, 1.0, 3.0, 9.0, 9.0];
//! let losses = Inputs::new(View::new(&logits, [3, 2]), &[1, 1, IGNORED]).losses()?;
//! assert!((losses[0] - 2f32.ln()).abs() < 1e-6 && losses[2] == 0.0);
//!
//! let again = InputsMut::new(ViewMut::new(&mut logits, [3, 2]), &[1, 1, IGNORED], 0.5).losses_and_gradient()?;
//! assert_eq!(again, losses);
//! assert_eq!(logits[..2], [0.25, -0.25]);
//! assert_eq!(logits[4..], [0.0, 0.0]);
//! # Ok::<(), selective_scan::Error>(())
//! ```
//!
//! [`cpu`] runs it on slices, [`reference`](mod@reference) is the same written plainly in `f64`.

#[cfg(feature = "candle")]
pub(crate) mod candle;
mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;

use crate::arguments::zeroed;
use crate::{Element, Host, Memory, Result, View, ViewMut};

/// The target of a row that is left out.
pub const IGNORED: u32 = u32::MAX;

/// Terms of the loss beside the likelihood.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Options {
    /// ε, from 0 to 1: how much of each target is spread evenly over the vocabulary.
    pub label_smoothing: f32,
    /// ζ, 0 or more: the weight of the squared logarithm of the normaliser. Models are trained with 1e-4.
    pub z_loss: f32,
}

/// What the losses are computed from.
pub struct Inputs<'a, T: Element, M: Memory = Host> {
    /// `(rows, vocab)`. The logits of a row are neighbours in memory.
    pub logits: View<'a, T, 2, M>,
    /// `(rows)`, each below `vocab`, or [`IGNORED`].
    pub targets: &'a M::Tokens,
    /// Terms beside the likelihood.
    pub options: Options,
}

impl<T: Element, M: Memory> Clone for Inputs<'_, T, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element, M: Memory> Copy for Inputs<'_, T, M> {}

impl<'a, T: Element, M: Memory> Inputs<'a, T, M> {
    /// The plain loss.
    pub fn new(logits: View<'a, T, 2, M>, targets: &'a M::Tokens) -> Self {
        Self { logits, targets, options: Options::default() }
    }
}

/// What the losses are computed from, where the gradient takes the place of the logits.
pub struct InputsMut<'a, T: Element, M: Memory = Host> {
    /// `(rows, vocab)`. The logits of a row are neighbours in memory.
    pub logits: ViewMut<'a, T, 2, M>,
    /// `(rows)`, each below `vocab`, or [`IGNORED`].
    pub targets: &'a M::Tokens,
    /// Terms beside the likelihood.
    pub options: Options,
    /// What the gradient is multiplied by: that of a row's loss.
    pub scale: f32,
}

impl<'a, T: Element, M: Memory> InputsMut<'a, T, M> {
    /// The plain loss.
    pub fn new(logits: ViewMut<'a, T, 2, M>, targets: &'a M::Tokens, scale: f32) -> Self {
        Self { logits, targets, options: Options::default(), scale }
    }
}

impl<T: Element> Inputs<'_, T> {
    /// The loss of each row, on the CPU.
    ///
    /// # Errors
    /// An argument that does not fit.
    pub fn losses(&self) -> Result<Vec<f32>> {
        let mut losses = zeroed("logits", &[self.check()?.rows])?;
        cpu::losses(self, &mut losses)?;
        Ok(losses)
    }
}

impl<T: Element> InputsMut<'_, T> {
    /// The loss of each row, on the CPU; the gradient takes the place of the logits.
    ///
    /// # Errors
    /// An argument that does not fit. Nothing is written then.
    pub fn losses_and_gradient(self) -> Result<Vec<f32>> {
        let mut losses = zeroed("logits", &[self.check()?.rows])?;
        cpu::losses_and_gradient(self, &mut losses)?;
        Ok(losses)
    }
}
