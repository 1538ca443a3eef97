//! One step of one channel, its states in the lanes of vectors, and the padded rows that it reads.

use std::ops::Range;

use crate::arguments::Dims;
use crate::simd::{BLOCK, Decay, Lanes, Row, hold_inverse, hold_weight};
use crate::{Element, Projection, View};

use super::Block;

/// The first `len` elements of a buffer, whatever they hold.
#[inline(always)]
pub(super) fn sized<E: Element>(buffer: &mut Vec<E>, len: usize) -> &mut [E] {
    if buffer.len() < len {
        buffer.resize(len, E::zeroed());
    }
    &mut buffer[..len]
}

/// Widens rows of `d_state` elements into rows of `padded`, of which the rest is left.
#[inline(always)]
pub(super) fn widen_padded<E: Element>(from: &[E], to: &mut [f32], d_state: usize, padded: usize) {
    if d_state == padded {
        return E::widen(from, to);
    }
    for (from, to) in from.chunks_exact(d_state).zip(to.chunks_exact_mut(padded)) {
        E::widen(from, &mut to[..d_state]);
    }
}

/// Rounds the first `d_state` elements of rows of `padded`.
#[inline(always)]
pub(super) fn narrow_padded<E: Element>(from: &[f32], to: &mut [E], d_state: usize, padded: usize) {
    if d_state == padded {
        return E::narrow(from, to);
    }
    for (from, to) in from.chunks_exact(padded).zip(to.chunks_exact_mut(d_state)) {
        E::narrow(&from[..d_state], to);
    }
}

/// A block's padded rows of a `(d_inner, d_state)` parameter: the caller's, where they need no padding, or copies.
#[inline(always)]
pub(super) fn parameter<'p>(
    view: &View<'p, f32, 2>,
    block: Block,
    padded: usize,
    buffer: &'p mut Vec<f32>,
) -> &'p [f32] {
    let d_state = view.shape[1];
    if padded == d_state && view.strides == [d_state, 1] {
        return &view.data[view.index([block.first, 0])..][..block.width * d_state];
    }
    let buffer = sized(buffer, block.width * padded);
    buffer.fill(0.0);
    for (i, row) in buffer.chunks_exact_mut(padded).enumerate() {
        view.widen_row([block.first + i, 0], &mut row[..d_state]);
    }
    buffer
}

/// 1/A for [`hold_weight`].
#[inline(always)]
pub(super) fn inverses<'p>(a: &[f32], buffer: &'p mut Vec<f32>) -> &'p [f32] {
    let buffer = sized(buffer, a.len());
    for (inverse, a) in buffer.iter_mut().zip(a) {
        *inverse = hold_inverse(*a);
    }
    buffer
}

/// Reads the padded rows `(tokens, groups)` of B or C if it varies.
#[inline(always)]
pub(super) fn varying<T: Element>(
    projection: &Projection<T>,
    row: usize,
    tokens: Range<usize>,
    groups: Range<usize>,
    padded: usize,
    buffer: &mut Vec<f32>,
) {
    let Projection::Varying(view) = projection else { return };
    let buffer = sized(buffer, tokens.len() * groups.len() * padded);
    buffer.fill(0.0);
    let indices = tokens.flat_map(|token| groups.clone().map(move |group| [row, token, group, 0]));
    for (index, to) in indices.zip(buffer.chunks_exact_mut(padded)) {
        view.widen_row(index, &mut to[..view.shape[3]]);
    }
}

/// The padded rows of B or C that a block reads.
pub(super) struct Coefficients<'t> {
    data: &'t [f32],
    /// Between the rows of neighbouring tokens.
    stride: usize,
    /// Where the row of each channel starts.
    starts: [usize; BLOCK],
    padded: usize,
}

impl<'t> Coefficients<'t> {
    /// `groups` are those in `buffer`, which [`varying`] has filled.
    #[inline(always)]
    pub fn new<T: Element>(
        projection: &Projection<'t, T>,
        dims: &Dims,
        block: Block,
        groups: Range<usize>,
        padded: usize,
        buffer: &'t mut Vec<f32>,
    ) -> Self {
        let mut starts = [0; BLOCK];
        let Projection::Constant(view) = projection else {
            if groups.len() > 1 {
                // Counted on, because a division for every channel takes longer than its step.
                let channels = dims.group_channels();
                let (mut group, mut left) = (block.first / channels, channels - block.first % channels);
                for start in &mut starts {
                    *start = (group - groups.start) * padded;
                    left -= 1;
                    if left == 0 {
                        (group, left) = (group + 1, channels);
                    }
                }
            }
            return Self { data: buffer, stride: groups.len() * padded, starts, padded };
        };
        for (i, start) in starts.iter_mut().enumerate() {
            *start = i * padded;
        }
        Self { data: parameter(view, block, padded, buffer), stride: 0, starts, padded }
    }

    /// The rows of token `t`.
    #[inline(always)]
    pub fn at(&self, t: usize) -> TokenCoefficients<'_> {
        TokenCoefficients { data: &self.data[t * self.stride..], starts: &self.starts, padded: self.padded }
    }
}

/// [`Coefficients`] of one token.
#[derive(Clone, Copy)]
pub(super) struct TokenCoefficients<'t> {
    data: &'t [f32],
    starts: &'t [usize; BLOCK],
    padded: usize,
}

impl<'t> TokenCoefficients<'t> {
    /// The row of channel `i` of the block.
    #[inline(always)]
    pub fn row(self, i: usize) -> &'t [f32] {
        &self.data[self.starts[i]..][..self.padded]
    }
}

/// How many states the last vector of a channel holds, if it is not full.
pub(super) struct Tail {
    is_there: bool,
    /// 1 in the lanes that hold a state.
    lanes: Row,
}

impl Tail {
    #[inline(always)]
    pub fn new(states: usize) -> Self {
        let mut lanes = Row::ZERO;
        lanes.0[..states].fill(1.0);
        Self { is_there: states > 0, lanes }
    }
}

/// One token of one channel. The slices are padded to whole vectors with zeros.
pub(super) struct Step<'t> {
    pub a: &'t [f32],
    /// 1/A with zero-order hold, else not looked at.
    pub inverse_a: &'t [f32],
    pub b: &'t [f32],
    pub c: &'t [f32],
    pub delta: f32,
    pub u: f32,
}

impl Step<'_> {
    /// Brings `h` up to date and returns `Σ_n C h`.
    #[inline(always)]
    pub fn run<S: Lanes, const HOLD: bool>(self, simd: S, h: &mut [f32], tail: &Tail) -> f32 {
        let (delta, log2_e) = (simd.splat_f32s(self.delta), simd.splat_f32s(std::f32::consts::LOG2_E));
        let input = simd.splat_f32s(if HOLD { self.u } else { self.delta * self.u });
        let h: &mut [S::f32s] = bytemuck::cast_slice_mut(h);
        let (a, b): (&[S::f32s], &[S::f32s]) = (bytemuck::cast_slice(self.a), bytemuck::cast_slice(self.b));
        let (c, inverse_a): (&[S::f32s], &[S::f32s]) =
            (bytemuck::cast_slice(self.c), bytemuck::cast_slice(self.inverse_a));
        let mut sum = simd.splat_f32s(0.0);
        let vectors = h.len();
        for (i, (h, ((a, b), c))) in h.iter_mut().zip(a.iter().zip(b).zip(c)).enumerate() {
            let decay = Decay::exp2(simd, simd.mul_f32s(delta, simd.mul_f32s(*a, log2_e)));
            let weighted = if HOLD {
                simd.mul_f32s(input, hold_weight(simd, decay.minus_one(simd), inverse_a[i], delta))
            } else {
                input
            };
            *h = simd.fma(weighted, *b, decay.apply(simd, *h));
            if tail.is_there && i + 1 == vectors {
                // An infinite Δ or u would make NaN of the padding.
                let holds = simd.greater_than_f32s(tail.lanes.vectors::<S>()[0], simd.splat_f32s(0.0));
                *h = simd.select_f32s(holds, *h, simd.splat_f32s(0.0));
            }
            sum = simd.fma(*c, *h, sum);
        }
        simd.reduce_sum_f32s(sum)
    }
}
