//! The product, with the norm before it and the convolution after it.

use std::ops::Range;

use bytemuck::cast_slice_mut;

use super::{Linear, LinearMut, LinearProblem};
use crate::arguments::zeroed;
use crate::conv;
use crate::decode::{ConvStep, RowNorm};
use crate::norm;
use crate::shared::Shared;
use crate::simd::{BLOCK, Isa, Kernel, Lanes, Row, load};
use crate::tasks;
use crate::view::Ahead;
use crate::{Element, Result, View, ViewMut};

/// Rows of the matrix that are read at a time. With one row of `x` their sums keep the multipliers busy in turn.
const TOGETHER: usize = 4;

/// The most rows of `x` that meet them at a time.
const MOST_ROWS: usize = 4;

/// Multiplications in a task: 10 to 50 µs, by where the matrix lies. Two of them are worth a second thread, which takes 5
/// to 10 µs to wake. (Miri, which takes a thousand times as long, is to see several threads too.)
const WORK_PER_TASK: usize = if cfg!(miri) { 1 << 7 } else { 1 << 17 };

pub(super) fn run<X: Element, T: Element, O: Element, St: Element>(
    isa: Isa,
    problem: &LinearProblem<X, T>,
    outputs: LinearMut<O, St>,
) -> Result<()> {
    let (Linear { x, weight, bias, norm, conv }, sizes) = (problem.inputs, problem.sizes);
    let (rows, columns, [d_inner, _]) = (sizes.rows, sizes.out_features, sizes.conv);
    if outputs.out.is_empty() {
        // There may be more rows than can be counted through.
        return Ok(());
    }
    let x = match norm {
        Some(norm) => {
            let normed = normed::<X, T>(isa, x, norm)?;
            staged::<T, T>(View::new(&normed, x.shape))?
        }
        None => staged::<X, T>(x)?,
    };
    let mut inputs_of_conv: Vec<T> = zeroed("x", &[rows, d_inner])?;
    let per_task = (WORK_PER_TASK / sizes.features / rows).next_multiple_of(TOGETHER).max(TOGETHER);
    let product = Product {
        x: &x,
        weight,
        bias,
        sizes: [rows, sizes.features, columns],
        d_inner,
        accumulate: outputs.accumulate,
        out: Shared::new(&mut *outputs.out),
        inputs_of_conv: Shared::new(&mut inputs_of_conv),
    };
    tasks::for_each_init(columns.div_ceil(per_task), 1, Scratch::default, |scratch, task| {
        let first = task * per_task;
        let columns = first..columns.min(first + per_task);
        isa.run(Task { product: &product, columns, scratch });
    });
    if let (Some(conv), Some(state)) = (conv, outputs.conv_state)
        && d_inner > 0
    {
        // The check has seen to it that `O` is `T` where there is a convolution.
        convolve(isa, &inputs_of_conv, conv, state, bytemuck::cast_slice_mut::<O, T>(outputs.out), columns)?;
    }
    Ok(())
}

/// Rows, normed and rounded, dense.
pub(super) fn normed<X: Element, T: Element>(isa: Isa, x: View<X, 2>, by: RowNorm) -> Result<Vec<T>> {
    let options = norm::Options { eps: by.eps, ..norm::Options::default() };
    let inputs = norm::Inputs::<X> { weight: by.weight, options, ..norm::Inputs::new(x) };
    let mut out = zeroed("x", &x.shape)?;
    let outputs = norm::OutputMut { out: &mut out[..], residual_out: None };
    norm::cpu::forward_checked::<X, X, T>(isa, &inputs.check::<T>()?, outputs)?;
    Ok(out)
}

/// Rows as vectors, rounded to `T`, each with zeros after it up to a whole block.
fn staged<X: Element, T: Element>(x: View<X, 2>) -> Result<Vec<Row>> {
    let [rows, features] = x.shape;
    let blocks = features.div_ceil(BLOCK);
    let mut staged: Vec<Row> = zeroed("x", &[rows, blocks])?;
    let mut rounded = vec![T::from_f32(0.0); if X::DTYPE == T::DTYPE { 0 } else { features }];
    for (row, to) in staged.chunks_exact_mut(blocks).enumerate() {
        let to = &mut cast_slice_mut(to)[..features];
        x.widen_row([row, 0], to);
        if X::DTYPE != T::DTYPE {
            T::narrow(to, &mut rounded);
            T::widen(&rounded, to);
        }
    }
    Ok(staged)
}

/// A step of the convolution, whose results are the first channels of the rows of `out`.
fn convolve<T: Element, St: Element>(
    isa: Isa,
    inputs: &[T],
    conv: ConvStep,
    state: ViewMut<St, 3>,
    out: &mut [T],
    columns: usize,
) -> Result<()> {
    let d_inner = conv.weight.shape[0];
    let x = View::new(inputs, [inputs.len() / d_inner, 1, d_inner]);
    let inputs = conv::UpdateInputs {
        bias: conv.bias,
        slots: conv.slots,
        silu: true,
        ..conv::UpdateInputs::new(x, conv.weight)
    };
    conv::cpu::update_in_rows(isa, &inputs.check()?, state, out, columns);
    Ok(())
}

struct Product<'p, 'a, T: Element, O> {
    /// [`staged`].
    x: &'p [Row],
    weight: View<'a, T, 2>,
    bias: Option<View<'a, f32, 1>>,
    /// Rows, features, columns.
    sizes: [usize; 3],
    /// The columns, from the first on, that go to the convolution.
    d_inner: usize,
    accumulate: bool,
    out: Shared<'p, O>,
    inputs_of_conv: Shared<'p, T>,
}

/// Buffers of one task, used again by the next.
struct Scratch<T> {
    /// Rows of the matrix, where they are not contiguous.
    packed: Vec<T>,
    /// The columns of some rows.
    sums: [Vec<f32>; MOST_ROWS],
    /// Those of one row, rounded, and what they are added to.
    rounded: Vec<T>,
    before: Vec<f32>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self { packed: Vec::new(), sums: Default::default(), rounded: Vec::new(), before: Vec::new() }
    }
}

/// All rows of a range of columns.
struct Task<'t, 'p, 'a, T: Element, O> {
    product: &'t Product<'p, 'a, T, O>,
    columns: Range<usize>,
    scratch: &'t mut Scratch<T>,
}

impl<T: Element, O: Element> Kernel for Task<'_, '_, '_, T, O> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { product, columns, scratch } = self;
        let Scratch { packed, sums, rounded, before } = scratch;
        let [rows, features, _] = product.sizes;
        let matrix = Matrix::new(&product.weight, columns.clone(), packed);
        for sums in sums.iter_mut() {
            sums.resize(columns.len(), 0.0);
        }
        rounded.resize(columns.len(), T::zeroed());
        before.resize(columns.len(), 0.0);
        let staged = |row: usize, count: usize| {
            let blocks = features.div_ceil(BLOCK);
            &product.x[row * blocks..(row + count) * blocks]
        };
        let mut row = 0;
        while row < rows {
            let count = match rows - row {
                // Their sums need 16 registers, and as many again.
                4.. if S::REGISTER_COUNT >= 32 => {
                    multiply::<S, T, 4>(simd, &matrix, staged(row, 4), features, sums);
                    4
                }
                2.. => {
                    multiply::<S, T, 2>(simd, &matrix, staged(row, 2), features, sums);
                    2
                }
                _ => {
                    multiply::<S, T, 1>(simd, &matrix, staged(row, 1), features, sums);
                    1
                }
            };
            for (i, sums) in sums[..count].iter_mut().enumerate() {
                product.finish(row + i, columns.clone(), sums, rounded, before);
            }
            row += count;
        }
    }
}

impl<T: Element, O: Element> Product<'_, '_, T, O> {
    /// Adds the bias to some columns of a row, and writes them, or adds them to what is there. What goes to the convolution is rounded
    /// before it, all else once.
    #[inline(always)]
    fn finish(&self, row: usize, columns: Range<usize>, sums: &mut [f32], rounded: &mut [T], before: &mut [f32]) {
        if let Some(bias) = &self.bias {
            bias.widen_row([columns.start], before);
            for (sum, bias) in sums.iter_mut().zip(&*before) {
                *sum += bias;
            }
        }
        let convolved = self.d_inner.clamp(columns.start, columns.end) - columns.start;
        if convolved > 0 {
            let rounded = &mut rounded[..convolved];
            T::narrow(&sums[..convolved], rounded);
            let at = row * self.d_inner + columns.start;
            // SAFETY: this task alone works on these columns of this row.
            unsafe { self.inputs_of_conv.part(at..at + convolved) }.copy_from_slice(rounded);
        }
        let at = row * self.sizes[2] + columns.start;
        // SAFETY: as above.
        let out = unsafe { self.out.part(at + convolved..at + columns.len()) };
        let sums = &mut sums[convolved..];
        if self.accumulate {
            let before = &mut before[convolved..];
            O::widen(out, before);
            for (sum, before) in sums.iter_mut().zip(before) {
                *sum += *before;
            }
        }
        O::narrow(sums, out);
    }
}

/// Rows of a matrix, each contiguous.
struct Matrix<'t, T> {
    data: &'t [T],
    stride: usize,
    rows: usize,
}

impl<'t, T: Element> Matrix<'t, T> {
    /// Rows of a weight, in `packed` if they are not contiguous.
    #[inline(always)]
    fn new(weight: &View<'t, T, 2>, rows: Range<usize>, packed: &'t mut Vec<T>) -> Self {
        let ([_, features], [stride, step]) = (weight.shape, weight.strides);
        let first = weight.index([rows.start, 0]);
        if step == 1 || features == 1 {
            return Self { data: &weight.data[first..], stride, rows: rows.len() };
        }
        packed.clear();
        for row in 0..rows.len() {
            packed.extend((0..features).map(|i| weight.data[first + row * stride + i * step]));
        }
        Self { data: packed, stride: features, rows: rows.len() }
    }

    #[inline(always)]
    fn row(&self, row: usize, features: usize) -> &'t [T] {
        &self.data[row * self.stride..][..features]
    }

    /// The vectors of `lanes` elements of a row, which may be one after the last: then it is probably the next task's.
    #[inline(always)]
    fn ahead(&self, row: usize, lanes: usize) -> Ahead {
        // A single row may have any stride.
        let first = row.checked_mul(self.stride).and_then(|at| self.data.get(at));
        first.map_or(Ahead::NONE, |first| Ahead::of(first, lanes))
    }
}

/// The products of `M` rows, which are one after another in `x`, with all rows of a matrix.
#[inline(always)]
fn multiply<S: Lanes, T: Element, const M: usize>(
    simd: S,
    matrix: &Matrix<T>,
    x: &[Row],
    features: usize,
    to: &mut [Vec<f32>; MOST_ROWS],
) {
    let blocks = x.len() / M;
    let mut rows: [&[S::f32s]; M] = [&[]; M];
    for (m, row) in rows.iter_mut().enumerate() {
        *row = bytemuck::cast_slice(&x[m * blocks..(m + 1) * blocks]);
    }
    for first in (0..matrix.rows).step_by(TOGETHER) {
        let count = TOGETHER.min(matrix.rows - first);
        // The last row again where there are too few.
        let mut weights: [&[T]; TOGETHER] = [&[]; TOGETHER];
        let mut next = [Ahead::NONE; TOGETHER];
        for i in 0..TOGETHER {
            weights[i] = matrix.row(first + i.min(count - 1), features);
            next[i] = matrix.ahead(first + TOGETHER + i, S::F32_LANES);
        }
        let sums = dot::<S, T, M>(simd, weights, next, rows, features);
        for (to, sums) in to.iter_mut().zip(sums) {
            to[first..first + count].copy_from_slice(&sums[..count]);
        }
    }
}

/// The products of `M` rows with [`TOGETHER`] rows of a matrix. The processor is told of those that come next, since it
/// does not fetch ahead from one page of memory into another.
#[inline(always)]
fn dot<S: Lanes, T: Element, const M: usize>(
    simd: S,
    weights: [&[T]; TOGETHER],
    next: [Ahead; TOGETHER],
    x: [&[S::f32s]; M],
    features: usize,
) -> [[f32; TOGETHER]; M] {
    let mut sums = [[simd.splat_f32s(0.0); TOGETHER]; M];
    let [a, b, c, d] = weights.map(|row| row[..features].chunks_exact(S::F32_LANES));
    let rest = features % S::F32_LANES;
    for (k, (((a, b), c), d)) in a.zip(b).zip(c).zip(d).enumerate() {
        for next in &next {
            next.prefetch(k);
        }
        let vectors = [load(simd, a), load(simd, b), load(simd, c), load(simd, d)];
        for m in 0..M {
            for i in 0..TOGETHER {
                sums[m][i] = simd.fma(vectors[i], x[m][k], sums[m][i]);
            }
        }
    }
    if rest > 0 {
        for i in 0..TOGETHER {
            // Zeros after the end of the row, as `x` has.
            let mut last = [T::zeroed(); BLOCK];
            last[..rest].copy_from_slice(&weights[i][features - rest..features]);
            let vector = load(simd, &last[..S::F32_LANES]);
            for m in 0..M {
                sums[m][i] = simd.fma(vector, x[m][features / S::F32_LANES], sums[m][i]);
            }
        }
    }
    let mut totals = [[0.0; TOGETHER]; M];
    for m in 0..M {
        for i in 0..TOGETHER {
            totals[m][i] = simd.reduce_sum_f32s(sums[m][i]);
        }
    }
    totals
}
