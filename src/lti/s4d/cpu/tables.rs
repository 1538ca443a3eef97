//! The matrices of a block of channels.

use num_complex::Complex64;

use super::products::{TILE, Tiles};
use super::{Block, CHUNK, Problem, Wide};
use crate::Element;
use crate::lti::s4d::discrete::Discrete;
use crate::simd::{BLOCK, Row};

/// The matrices of a block, and what its pairs are in `f64`. A pair has two *rows*, for its real and its imaginary
/// part, and what is read of the imaginary part of a state has the sign with which it is added. Rows of zeros fill the
/// last tile, and zeros the lanes without a channel.
pub(super) struct Tables {
    /// `2 N` and what fills the last tile.
    pub rows: usize,
    /// By pair and channel.
    pub pairs: Vec<[Discrete; BLOCK]>,
    /// `Ā^k` from `k = 0` to the length of a chunk, by `k` and row.
    pub powers: Vec<Wide>,
    /// `K`, by step.
    pub kernel: [Row; CHUNK],
    /// From the state before a chunk to the outputs.
    pub g: Tiles,
    /// From the inputs of a chunk to what they leave in the state.
    pub h: Tiles,
}

impl Tables {
    pub fn new<T: Element>(problem: &Problem<T>, block: Block) -> Self {
        let d_state = problem.sizes.d_state;
        let rows = (2 * d_state).next_multiple_of(TILE);
        let zero = Discrete { a: Complex64::ZERO, b: Complex64::ZERO, c: Complex64::ZERO };
        let mut tables = Self {
            rows,
            pairs: vec![[zero; BLOCK]; d_state],
            powers: vec![Wide::ZERO; (CHUNK + 1) * rows],
            kernel: [Row::ZERO; CHUNK],
            g: Tiles::zeros(rows, CHUNK),
            h: Tiles::zeros(CHUNK, rows),
        };
        let mut kernel = [Wide::ZERO; CHUNK];
        for i in 0..block.width {
            let channel = block.first + i;
            let delta = problem.delta(channel);
            for n in 0..d_state {
                tables.pairs[n][i] = problem.pair(channel, n).discretize(delta, problem.inputs.options.rule);
            }
            kernel[0].0[i] = problem.inputs.d.map_or(0.0, |d| d.at([channel]).into());
        }
        for n in 0..d_state {
            tables.fill(n, &mut kernel);
        }
        for (row, wide) in tables.kernel.iter_mut().zip(&kernel) {
            row.0 = wide.0.map(|x| x as f32);
        }
        tables
    }

    /// Fills in what one pair adds.
    fn fill(&mut self, n: usize, kernel: &mut [Wide; CHUNK]) {
        let pairs = self.pairs[n];
        let (re, im) = (2 * n, 2 * n + 1);
        let mut power = [Complex64::ONE; BLOCK];
        #[allow(clippy::needless_range_loop, reason = "the power is what counts; the kernel is one shorter")]
        for k in 0..=CHUNK {
            for (i, (power, pair)) in power.iter_mut().zip(&pairs).enumerate() {
                self.powers[k * self.rows + re].0[i] = power.re;
                self.powers[k * self.rows + im].0[i] = power.im;
                if k > 0 {
                    let read = 2.0 * pair.c * *power;
                    self.g.at_mut(re, k - 1).0[i] = read.re as f32;
                    self.g.at_mut(im, k - 1).0[i] = -read.im as f32;
                }
                if k < CHUNK {
                    let entering = pair.b * *power;
                    self.h.at_mut(CHUNK - 1 - k, re).0[i] = entering.re as f32;
                    self.h.at_mut(CHUNK - 1 - k, im).0[i] = entering.im as f32;
                    kernel[k].0[i] += 2.0 * (pair.c * entering).re;
                    *power *= pair.a;
                }
            }
        }
    }

    /// `Ā^k`, by row.
    #[inline(always)]
    pub fn power(&self, k: usize) -> &[Wide] {
        &self.powers[k * self.rows..][..self.rows]
    }
}
