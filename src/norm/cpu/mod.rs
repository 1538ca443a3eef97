//! The norm on the CPU: vectorised along rows, parallel over blocks of rows.
//!
//! A row is staged as `f32` in a processor's cache, summed up, and written once. Rows do not depend on each other; only the
//! gradient of the weight sums over them, over those of a block and then over the blocks, which follow from the shape alone.

mod backward;
mod forward;

use bytemuck::{cast_slice, cast_slice_mut};

use super::{BackwardInputs, BackwardProblem, GradientsMut, Inputs, OutputMut, Problem};
use crate::simd::{BLOCK, Isa, Row};
use crate::{Element, Result, View};

/// Rows of a block.
const ROWS: usize = 64;

/// Runs the norm with the widest instructions of this processor, on the threads of the current rayon pool.
///
/// # Errors
/// An argument that does not fit; see [`Inputs`] and [`OutputMut`]. Nothing is written then.
pub fn forward<X: Element, S: Element, O: Element>(inputs: &Inputs<X, S>, outputs: OutputMut<S, O>) -> Result<()> {
    forward_with(Isa::best(), inputs, outputs)
}

/// [`forward`] with the instruction set given (plain code if this processor does not have it).
pub fn forward_with<X: Element, S: Element, O: Element>(
    isa: Isa,
    inputs: &Inputs<X, S>,
    outputs: OutputMut<S, O>,
) -> Result<()> {
    forward_checked(isa, &inputs.check::<O>()?, outputs)
}

/// [`forward_with`] of inputs that have been checked.
pub(crate) fn forward_checked<X: Element, S: Element, O: Element>(
    isa: Isa,
    problem: &Problem<X, S>,
    outputs: OutputMut<S, O>,
) -> Result<()> {
    problem.check_outputs(&outputs)?;
    forward::run(isa, problem, outputs);
    Ok(())
}

/// Computes the gradients that there are buffers for.
///
/// # Errors
/// An argument that does not fit; see [`BackwardInputs`] and [`GradientsMut`]. Nothing is written then.
pub fn backward<X: Element, S: Element, O: Element>(
    inputs: &BackwardInputs<X, S, O>,
    gradients: GradientsMut<X, S>,
) -> Result<()> {
    backward_with(Isa::best(), inputs, gradients)
}

/// [`backward`] with the instruction set given (plain code if this processor does not have it).
pub fn backward_with<X: Element, S: Element, O: Element>(
    isa: Isa,
    inputs: &BackwardInputs<X, S, O>,
    gradients: GradientsMut<X, S>,
) -> Result<()> {
    backward_checked(isa, &inputs.check()?, gradients)
}

/// [`backward_with`] of inputs that have been checked.
pub(crate) fn backward_checked<X: Element, S: Element, O: Element>(
    isa: Isa,
    problem: &BackwardProblem<X, S, O>,
    gradients: GradientsMut<X, S>,
) -> Result<()> {
    problem.check_gradients(&gradients)?;
    backward::run(isa, problem, gradients)
}

/// A row of `width` columns as vectors, with room after it for whole ones.
struct Staged {
    rows: Vec<Row>,
    width: usize,
}

impl Staged {
    fn new(width: usize) -> Self {
        Self { rows: vec![Row::ZERO; width.div_ceil(BLOCK)], width }
    }

    #[inline(always)]
    fn columns(&self) -> &[f32] {
        &cast_slice(&self.rows)[..self.width]
    }

    #[inline(always)]
    fn columns_mut(&mut self) -> &mut [f32] {
        &mut cast_slice_mut(&mut self.rows)[..self.width]
    }
}

/// The weight, or ones, which change no bits.
fn weight_or_ones(weight: &Option<View<f32, 1>>, width: usize) -> Vec<f32> {
    let mut columns = vec![1.0; width];
    if let Some(weight) = weight {
        weight.widen_row([0], &mut columns);
    }
    columns
}

#[inline(always)]
fn multiply(columns: &mut [f32], by: &[f32]) {
    for (x, by) in columns.iter_mut().zip(by) {
        *x *= by;
    }
}

/// What columns are multiplied by to norm them.
#[inline(always)]
fn scale(columns: &[f32], eps: f32) -> f32 {
    1.0 / (dot(columns, columns) / columns.len() as f32 + eps).sqrt()
}

/// Σ a b, in lanes of fixed order, so that it is the same with all instructions.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<BLOCK>(), b.as_chunks::<BLOCK>());
    let mut lanes = [0.0; BLOCK];
    for (a, b) in a.iter().zip(b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    for ((lane, a), b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane += a * b;
    }
    lanes.iter().sum()
}
