//! The gradients that are sums: of parameters over all steps, of B and C over the channels of a group.

use rayon::prelude::*;

use crate::Element;
use crate::simd::{Kernel, Lanes, Row, Sum};

use super::{Block, BlockParameters};

/// Adds up the partial sums of the units, laid one after the other, in order.
pub(super) fn add_partial<T: Element>(partial: &[f32], out: &mut [T]) {
    const CHUNK: usize = 4096;
    let len = out.len();
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, out)| {
        let mut sum = [0.0; CHUNK];
        let sum = &mut sum[..out.len()];
        for unit in partial.chunks_exact(len) {
            for (sum, x) in sum.iter_mut().zip(&unit[chunk * CHUNK..]) {
                *sum += x;
            }
        }
        T::narrow(sum, out);
    });
}

/// What a task has of a block's gradients: those of the states, carried from tile to tile, and its share of those of
/// the parameters.
pub(super) struct BlockGradients {
    pub block: Block,
    pub d_h: Vec<Row>,
    /// What rounding has cost `d_h`.
    pub lost: Vec<Row>,
    pub a: Vec<Sum>,
    /// Of B and C where they are constant; else empty.
    pub b: Vec<Sum>,
    pub c: Vec<Sum>,
    pub skip: Sum,
    pub bias: Sum,
}

impl BlockGradients {
    pub fn zero(parameters: &BlockParameters) -> Self {
        let (rows, sums) = (|| vec![Row::ZERO; parameters.a.len()], || vec![Sum::ZERO; parameters.a.len()]);
        let if_constant = |constant: &[Row]| if constant.is_empty() { Vec::new() } else { sums() };
        Self {
            block: parameters.block,
            d_h: rows(),
            lost: rows(),
            a: sums(),
            b: if_constant(&parameters.b),
            c: if_constant(&parameters.c),
            skip: Sum::ZERO,
            bias: Sum::ZERO,
        }
    }
}

/// Adds the shares of all tasks, in order.
pub(super) struct Totals<'t> {
    pub sums: &'t [Vec<BlockGradients>],
    pub d_state: usize,
}

impl Totals<'_> {
    /// A `(d_inner, d_state)` gradient.
    pub fn states(&self, out: &mut [f32], part: impl Fn(&BlockGradients) -> &Vec<Sum>) {
        out.fill(0.0);
        for sum in self.sums.iter().flatten() {
            for (n, part) in part(sum).iter().enumerate() {
                for i in 0..sum.block.width {
                    out[(sum.block.first + i) * self.d_state + n] += part.total.0[i];
                }
            }
        }
    }

    /// A `(d_inner)` gradient.
    pub fn channels(&self, out: &mut [f32], part: impl Fn(&BlockGradients) -> &Sum) {
        out.fill(0.0);
        for sum in self.sums.iter().flatten() {
            let channels = sum.block.first..sum.block.first + sum.block.width;
            for (out, x) in out[channels].iter_mut().zip(part(sum).total.0) {
                *out += x;
            }
        }
    }
}

/// Sums each row over its channels.
pub(super) struct SumChannels<'t> {
    pub rows: &'t [Row],
    pub out: &'t mut [f32],
}

impl Kernel for SumChannels<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        for (out, row) in self.out.iter_mut().zip(self.rows) {
            let vectors = row.vectors::<S>();
            let sum = vectors[1..].iter().fold(vectors[0], |sum, x| simd.add_f32s(sum, *x));
            *out = simd.reduce_sum_f32s(sum);
        }
    }
}
