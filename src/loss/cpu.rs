//! The loss on the CPU: rows in parallel, each vectorised over its logits.
//!
//! A row is widened once and worked on in the cache of its thread: the greatest logit, then the exponentials and their sum,
//! then the gradient of them. Sums are `f32` within 1,024 logits and `f64` over these.

use bytemuck::Zeroable;
use rayon::prelude::*;

use super::check::Problem;
use super::{IGNORED, Inputs, InputsMut, Options};
use crate::shared::Shared;
use crate::simd::{BLOCK, Isa, Kernel, Lanes, Row, exp};
use crate::{Element, Result};

/// Logits in a task at least: some microseconds of work.
const LOGITS_PER_TASK: usize = 8192;

/// Rows of [`BLOCK`] logits whose sums are `f32`.
const PART: usize = 64;

/// Writes the loss of each row to `losses`, `(rows)`, with the widest instructions of this processor, on the threads of the
/// current rayon pool.
///
/// # Errors
/// An argument that does not fit. Nothing is written then.
pub fn losses<T: Element>(inputs: &Inputs<T>, losses: &mut [f32]) -> Result<()> {
    losses_with(Isa::best(), inputs, losses)
}

/// [`losses`] with the instruction set given (plain code if this processor does not have it).
///
/// # Errors
/// As [`losses`].
pub fn losses_with<T: Element>(isa: Isa, inputs: &Inputs<T>, losses: &mut [f32]) -> Result<()> {
    let problem = inputs.check()?;
    problem.check_losses(losses.len())?;
    let row = |index: usize| {
        let start = problem.offset + index * problem.stride;
        Logits::Read(&inputs.logits.data[start..start + problem.vocab])
    };
    run(isa, &problem, inputs.targets, losses, row);
    Ok(())
}

/// [`losses`] whose gradient, times the inputs' `scale`, takes the place of the logits.
///
/// # Errors
/// As [`losses`].
pub fn losses_and_gradient<T: Element>(inputs: InputsMut<T>, losses: &mut [f32]) -> Result<()> {
    losses_and_gradient_with(Isa::best(), inputs, losses)
}

/// [`losses_and_gradient`] with the instruction set given (plain code if this processor does not have it).
///
/// # Errors
/// As [`losses`].
pub fn losses_and_gradient_with<T: Element>(isa: Isa, inputs: InputsMut<T>, losses: &mut [f32]) -> Result<()> {
    let problem = inputs.check()?;
    problem.check_losses(losses.len())?;
    let logits = Shared::new(inputs.logits.data);
    let row = |index: usize| {
        let start = problem.offset + index * problem.stride;
        // SAFETY: the check has seen to it that no two elements of the view share a place, and each row is asked for once.
        Logits::Replace(unsafe { logits.part(start..start + problem.vocab) })
    };
    run(isa, &problem, inputs.targets, losses, row);
    Ok(())
}

fn run<'a, T: Element>(
    isa: Isa,
    problem: &Problem,
    targets: &[u32],
    losses: &mut [f32],
    row: impl Fn(usize) -> Logits<'a, T> + Sync,
) {
    let rows_per_task = LOGITS_PER_TASK.div_ceil(problem.vocab);
    let rows = losses.par_iter_mut().zip(targets).enumerate().with_min_len(rows_per_task);
    rows.for_each_init(Vec::new, |scratch, (index, (loss, &target))| {
        *loss = isa.run(Task { logits: row(index), target, problem, scratch });
    });
}

/// A row of logits.
enum Logits<'a, T> {
    Read(&'a [T]),
    /// The gradient takes their place.
    Replace(&'a mut [T]),
}

/// One row, which gives its loss.
struct Task<'t, 'a, T> {
    logits: Logits<'a, T>,
    target: u32,
    problem: &'t Problem,
    scratch: &'t mut Vec<Row>,
}

impl<T: Element> Kernel for Task<'_, '_, T> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) -> f32 {
        let Self { mut logits, target, problem, scratch } = self;
        let Options { label_smoothing, z_loss } = problem.options;
        let (smoothing, z_loss) = (f64::from(label_smoothing), f64::from(z_loss));
        if target as usize >= problem.vocab {
            let value = if target == IGNORED { 0.0 } else { f32::NAN };
            if let Logits::Replace(gradient) = logits {
                gradient.fill(T::from_f32(value));
            }
            return value;
        }
        let target = target as usize;
        scratch.resize(problem.vocab.div_ceil(BLOCK), Row::zeroed());
        let read: &[T] = match &logits {
            Logits::Read(row) => row,
            Logits::Replace(row) => row,
        };
        let Read { most, sum: of_logits } = read_row(simd, read, scratch, smoothing > 0.0);
        let right = scratch[target / BLOCK].0[target % BLOCK];
        // What the target has beside the others decides a loss near zero, and would be lost in an f32 sum with it.
        scratch[target / BLOCK].0[target % BLOCK] = f32::NEG_INFINITY;
        let others = exponentials(simd, scratch, most);

        let (right, most) = (f64::from(right), f64::from(most));
        let of_target = (right - most).exp();
        let total = others + of_target;
        let log_sum = most + total.ln();
        let likelihood = if right == most { others.ln_1p() } else { total.ln() + (most - right) };
        let mut loss = (1.0 - smoothing) * likelihood + z_loss * log_sum * log_sum;
        if smoothing > 0.0 {
            loss += smoothing * (log_sum - of_logits / problem.vocab as f64);
        }

        if let (Logits::Replace(gradient), Some(scale)) = (&mut logits, problem.scale) {
            let scale = f64::from(scale);
            let (pull, each) = (2.0 * z_loss * log_sum, smoothing / problem.vocab as f64);
            let (factor, offset) = (scale * (1.0 + pull) / total, scale * each);
            write_gradient(simd, scratch, factor as f32, offset as f32, gradient);
            // Where the target has most of the softmax, softmax - 1 is what all others have together.
            let share = of_target / total;
            let rest = if share > 0.5 { smoothing - others / total } else { share - (1.0 - smoothing) };
            let of_target = scale * (share * pull + rest - each);
            gradient[target] = T::from_f32(of_target as f32);
        }
        loss as f32
    }
}

/// What is known of a row once it is read.
struct Read {
    /// The greatest logit, and finite if all are infinitely small.
    most: f32,
    /// The sum of all, if it was asked for.
    sum: f64,
}

/// Widens a row into `scratch`, followed by -inf up to a whole number of [`BLOCK`]s.
#[inline(always)]
fn read_row<S: Lanes, T: Element>(simd: S, row: &[T], scratch: &mut [Row], with_sum: bool) -> Read {
    let (mut most, mut total) = (simd.splat_f32s(f32::NEG_INFINITY), 0.0);
    for (from, to) in row.chunks(PART * BLOCK).zip(scratch.chunks_mut(PART)) {
        let floats: &mut [f32] = bytemuck::cast_slice_mut(to);
        let (floats, rest) = floats.split_at_mut(from.len());
        T::widen(from, floats);
        rest.fill(0.0);
        if with_sum {
            let mut sum = simd.splat_f32s(0.0);
            for x in bytemuck::cast_slice::<Row, S::f32s>(to) {
                sum = simd.add_f32s(sum, *x);
            }
            total += f64::from(simd.reduce_sum_f32s(sum));
        }
        bytemuck::cast_slice_mut::<Row, f32>(to)[from.len()..].fill(f32::NEG_INFINITY);
        for x in bytemuck::cast_slice::<Row, S::f32s>(to) {
            most = simd.max_f32s(most, *x);
        }
    }
    Read { most: simd.reduce_max_f32s(most).max(f32::MIN), sum: total }
}

/// Puts exp(x - most) in the place of each logit, and gives their sum.
#[inline(always)]
fn exponentials<S: Lanes>(simd: S, logits: &mut [Row], most: f32) -> f64 {
    let most = simd.splat_f32s(most);
    let mut total = 0.0;
    for part in logits.chunks_mut(PART) {
        let mut sum = simd.splat_f32s(0.0);
        for x in bytemuck::cast_slice_mut::<Row, S::f32s>(part) {
            *x = exp(simd, simd.sub_f32s(*x, most));
            sum = simd.add_f32s(sum, *x);
        }
        total += f64::from(simd.reduce_sum_f32s(sum));
    }
    total
}

/// Writes the gradient of a row but for its target: `factor · exponential - offset`.
#[inline(always)]
fn write_gradient<S: Lanes, T: Element>(
    simd: S,
    exponentials: &mut [Row],
    factor: f32,
    offset: f32,
    gradient: &mut [T],
) {
    let (factor, minus_offset) = (simd.splat_f32s(factor), simd.splat_f32s(-offset));
    for (from, to) in exponentials.chunks_mut(PART).zip(gradient.chunks_mut(PART * BLOCK)) {
        for x in bytemuck::cast_slice_mut::<Row, S::f32s>(from) {
            *x = simd.fma(*x, factor, minus_offset);
        }
        T::narrow(&bytemuck::cast_slice::<Row, f32>(from)[..to.len()], to);
    }
}
