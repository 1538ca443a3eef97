//! Attention on the CPU, in `f32` whatever the type of the tensors, parallel over sequences, heads and tiles of rows.
//!
//! The rows of a tile are the lanes of vectors: scores of a block of keys stand as `(keys, rows)`, so that the softmax over keys
//! is arithmetic of whole vectors, and keys and values are read as they lie. Rows of a tile are queries of all heads that read
//! one head of keys; for the gradients of keys and values they are keys.

mod backward;
mod forward;
mod product;

use super::check::{Part, Problem};
use super::{GradientsMut, Inputs, OutputGradients, OutputMut};
use crate::simd::{BLOCK, Isa, Row};
use crate::{Element, Result, View};

/// Rows of a tile at most.
const TILE: usize = 4 * BLOCK;
/// Keys, or queries, that meet a tile at a time.
const STEPS: usize = 64;

/// Runs attention on the threads of the current rayon pool.
///
/// # Errors
/// An argument that does not fit; see [`Inputs`]. Nothing is written then.
pub fn forward<T: Element>(inputs: &Inputs<T>, outputs: OutputMut<T>) -> Result<()> {
    forward_with(Isa::best(), inputs, outputs)
}

/// [`forward`] by these instructions.
///
/// # Errors
/// As [`forward`].
pub fn forward_with<T: Element>(isa: Isa, inputs: &Inputs<T>, outputs: OutputMut<T>) -> Result<()> {
    forward_checked(isa, &inputs.check()?, outputs)
}

/// [`forward_with`] of inputs that have been checked.
pub(crate) fn forward_checked<T: Element>(isa: Isa, problem: &Problem<T>, outputs: OutputMut<T>) -> Result<()> {
    problem.check_output(&outputs)?;
    forward::run(isa, problem, outputs);
    Ok(())
}

/// Computes the gradients of all inputs, from the results of a forward pass and the gradient of `out`.
///
/// # Errors
/// An argument that does not fit; see [`Inputs`] and [`GradientsMut`]. Keys of several sequences at one place. Nothing is
/// written then.
pub fn backward<T: Element>(inputs: &Inputs<T>, outputs: OutputGradients<T>, gradients: GradientsMut<T>) -> Result<()> {
    backward_with(Isa::best(), inputs, outputs, gradients)
}

/// [`backward`] by these instructions.
///
/// # Errors
/// As [`backward`].
pub fn backward_with<T: Element>(
    isa: Isa,
    inputs: &Inputs<T>,
    outputs: OutputGradients<T>,
    gradients: GradientsMut<T>,
) -> Result<()> {
    backward_checked(isa, &inputs.check()?, outputs, gradients)
}

/// [`backward_with`] of inputs that have been checked.
pub(crate) fn backward_checked<T: Element>(
    isa: Isa,
    problem: &Problem<T>,
    outputs: OutputGradients<T>,
    gradients: GradientsMut<T>,
) -> Result<()> {
    problem.check_backward(&outputs, &gradients)?;
    backward::run(isa, problem, &outputs, gradients);
    Ok(())
}

/// The queries of a sequence that read one head of keys: row `r` is that of step `r / group` and of head `r % group` of those.
#[derive(Clone, Copy)]
struct Queries {
    part: Part,
    kv_head: usize,
    group: usize,
}

impl Queries {
    fn new<T: Element>(problem: &Problem<T>, part: Part, kv_head: usize) -> Self {
        Self { part, kv_head, group: problem.sizes.group() }
    }

    fn rows(&self) -> usize {
        self.part.queries.len * self.group
    }

    /// Where a row lies: the batch row, the step and the head.
    #[inline(always)]
    fn at(&self, row: usize) -> [usize; 3] {
        let head = self.kv_head * self.group + row % self.group;
        [self.part.queries.batch, self.part.queries.start + row / self.group, head]
    }

    /// How many keys a row sees.
    #[inline(always)]
    fn seen(&self, row: usize) -> usize {
        self.part.seen(row / self.group)
    }

    /// Widens a row, times `scale`.
    #[inline(always)]
    fn read<T: Element>(&self, from: &View<T, 4>, row: usize, scale: f32, to: &mut [f32]) {
        let [batch, step, head] = self.at(row);
        from.widen_row([batch, step, head, 0], to);
        to.iter_mut().for_each(|x| *x *= scale);
    }

    /// Widens a key or value.
    #[inline(always)]
    fn read_key<T: Element>(&self, from: &View<T, 4>, j: usize, to: &mut [f32]) {
        let keys = self.part.keys;
        from.widen_row([keys.row, keys.start + j, self.kv_head, 0], to);
    }
}

/// Puts numbers into a lane of a matrix of `(d_head, rows)` whose rows are `width` vectors of a block.
#[inline(always)]
fn put_lane(matrix: &mut [Row], width: usize, lane: usize, numbers: &[f32]) {
    for (d, &x) in numbers.iter().enumerate() {
        matrix[d * width + lane / BLOCK].0[lane % BLOCK] = x;
    }
}

/// The numbers of a lane.
#[inline(always)]
fn take_lane(matrix: &[Row], width: usize, lane: usize, numbers: &mut [f32]) {
    for (d, x) in numbers.iter_mut().enumerate() {
        *x = matrix[d * width + lane / BLOCK].0[lane % BLOCK];
    }
}

/// The tiles of a problem: which sequence, which head of keys, and the first of `count` rows, at most [`TILE`] of them.
fn tiles<T: Element>(problem: &Problem<T>, parts: &[Part], count: impl Fn(&Part) -> usize) -> Vec<[usize; 3]> {
    let mut tiles = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        for kv_head in 0..problem.sizes.kv_heads {
            tiles.extend((0..count(part)).step_by(TILE).map(|first| [index, kv_head, first]));
        }
    }
    tiles
}
