//! Causal softmax attention in `f32`, forward: what a Transformer does where Mamba scans.
//!
//! Plain but not naive: blocks of 64 queries meet blocks of 64 keys in cache, the softmax is computed on the way (Milakov
//! and Gimelshein 2018, Dao et al. 2022), and the products run in vector registers.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::common::{Random, touched};
use crate::math::exp;
use crate::measure::{Check, Deviation, FORWARD_BOUND};

/// The width of a head, and the rows in a block.
pub const HEAD: usize = 64;

/// 64 rows of 64.
type Block = [[f32; HEAD]; HEAD];

/// All tensors are `(heads, length, 64)`.
pub struct Attention {
    len: usize,
    heads: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
}

impl Attention {
    /// `width` and `len` are multiples of 64.
    pub fn random(random: &mut Random, len: usize, width: usize) -> Self {
        assert!(len.is_multiple_of(HEAD) && width.is_multiple_of(HEAD));
        let size = len * width;
        let [q, k, v] = std::array::from_fn(|_| random.normal(size));
        Self { len, heads: width / HEAD, q, k, v, out: touched(size) }
    }

    pub fn forward(&mut self) {
        let (arch, blocks) = (Arch::new(), self.len / HEAD);
        let (k, v) = (as_blocks(&self.k), as_blocks(&self.v));
        let out: &mut [Block] = bytemuck::cast_slice_mut(&mut self.out);
        out.par_iter_mut().zip(as_blocks(&self.q)).enumerate().for_each(|(i, (out, q))| {
            let first = i / blocks * blocks;
            arch.dispatch(QueryBlock { q, k: &k[first..=i], v: &v[first..=i], out });
        });
    }

    /// Holds some rows of every head to the equations in `f64`.
    pub fn check(&self) -> Check {
        let rows = [0, 1, self.len / 3, self.len / 2 + 1, self.len - 1];
        let mut deviation = Deviation::default();
        for head in 0..self.heads {
            let of_head = |data: &'_ [f32], row| -> Vec<f64> {
                data[(head * self.len + row) * HEAD..][..HEAD].iter().copied().map(f64::from).collect()
            };
            for row in rows {
                let q = of_head(&self.q, row);
                let score = |key| of_head(&self.k, key).iter().zip(&q).map(|(k, q)| k * q).sum::<f64>() / 8.0;
                let weights: Vec<_> = (0..=row).map(|key| f64::exp(score(key))).collect();
                let total: f64 = weights.iter().sum();
                let mut exact = [0.0; HEAD];
                for (key, weight) in weights.iter().enumerate() {
                    for (exact, v) in exact.iter_mut().zip(of_head(&self.v, key)) {
                        *exact += weight / total * v;
                    }
                }
                for (got, exact) in self.out[(head * self.len + row) * HEAD..].iter().zip(exact) {
                    deviation.add(*got, exact);
                }
            }
        }
        deviation.check(FORWARD_BOUND)
    }
}

fn as_blocks(data: &[f32]) -> &[Block] {
    bytemuck::cast_slice(data)
}

/// One block of queries against all blocks of keys up to its own.
struct QueryBlock<'a> {
    q: &'a Block,
    k: &'a [Block],
    v: &'a [Block],
    out: &'a mut Block,
}

impl WithSimd for QueryBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let scale = 1.0 / (HEAD as f32).sqrt();
        let q = self.q.map(|row| row.map(|q| q * scale));
        let (mut highest, mut total) = ([f32::NEG_INFINITY; HEAD], [0.0f32; HEAD]);
        let mut transposed = [[0.0; HEAD]; HEAD];
        *self.out = [[0.0; HEAD]; HEAD];
        for (i, (k, v)) in self.k.iter().zip(self.v).enumerate() {
            for (key, row) in k.iter().enumerate() {
                for (transposed, &k) in transposed.iter_mut().zip(row) {
                    transposed[key] = k;
                }
            }
            let mut scores = [[0.0; HEAD]; HEAD];
            add_product(simd, &mut scores, &q, &transposed);
            if i + 1 == self.k.len() {
                for (row, scores) in scores.iter_mut().enumerate() {
                    scores[row + 1..].fill(f32::NEG_INFINITY);
                }
            }
            for (row, scores) in scores.iter_mut().enumerate() {
                let peak = reduce(scores, highest[row], |a, b| if a > b { a } else { b });
                let correction = exp(highest[row] - peak);
                for score in scores.iter_mut() {
                    *score = exp(*score - peak);
                }
                total[row] = total[row] * correction + reduce(scores, 0.0, |a, b| a + b);
                highest[row] = peak;
                for out in &mut self.out[row] {
                    *out *= correction;
                }
            }
            add_product(simd, self.out, &scores, v);
        }
        for (out, total) in self.out.iter_mut().zip(total) {
            for out in out {
                *out /= total;
            }
        }
    }
}

/// Adds the matrix product `x·y`, four rows by two vectors of it in registers at a time.
#[inline(always)]
fn add_product<S: Simd>(simd: S, out: &mut Block, x: &Block, y: &Block) {
    const ROWS: usize = 4;
    for (out, x) in out.chunks_exact_mut(ROWS).zip(x.chunks_exact(ROWS)) {
        for column in (0..HEAD / S::F32_LANES).step_by(2) {
            let mut sums = [[simd.splat_f32s(0.0); 2]; ROWS];
            for (k, y) in y.iter().enumerate() {
                let y = S::as_simd_f32s(y).0;
                for (sums, x) in sums.iter_mut().zip(x) {
                    let x = simd.splat_f32s(x[k]);
                    sums[0] = simd.mul_add_e_f32s(x, y[column], sums[0]);
                    sums[1] = simd.mul_add_e_f32s(x, y[column + 1], sums[1]);
                }
            }
            for (out, sums) in out.iter_mut().zip(sums) {
                let out = &mut S::as_mut_simd_f32s(out).0[column..column + 2];
                out[0] = simd.add_f32s(out[0], sums[0]);
                out[1] = simd.add_f32s(out[1], sums[1]);
            }
        }
    }
}

/// Combines a row in 16 lanes first, which the compiler can vectorise.
#[inline(always)]
fn reduce(row: &[f32; HEAD], start: f32, combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; 16];
    for part in row.chunks_exact(16) {
        for (lane, x) in lanes.iter_mut().zip(part) {
            *lane = combine(*lane, *x);
        }
    }
    lanes.into_iter().fold(start, combine)
}
