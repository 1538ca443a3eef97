//! The gradients of queries, a tile of them after another over the keys; then those of keys and values, a tile of them after
//! another over the queries.

use super::forward::limits;
use super::product::{Matrix, add_product};
use super::{Queries, STEPS, TILE, put_lane, take_lane, tiles};
use crate::attention::check::Problem;
use crate::attention::{GradientsMut, OutputGradients};
use crate::shared::Shared;
use crate::simd::{BLOCK, Isa, Kernel, Lanes, Row, exp};
use crate::tasks::for_each_init;
use crate::{Element, View};

const BLOCKS: usize = TILE / BLOCK;

/// What a thread works in. Rows are those of a tile; steps are what meets it.
struct Scratch {
    /// Queries and gradients of outputs, or keys and values: `(d_head, rows)`.
    first: Vec<Row>,
    second: Vec<Row>,
    /// Their gradients.
    d_first: Vec<Row>,
    d_second: Vec<Row>,
    /// `(steps, rows)`: the weights, and the slopes by them and by the scores.
    weights: Vec<Row>,
    slopes: Vec<Row>,
    /// The others of the two: `(steps, d_head)`.
    first_steps: Vec<f32>,
    second_steps: Vec<f32>,
    numbers: Vec<f32>,
}

impl Scratch {
    fn new(d_head: usize) -> Self {
        let lanes = |rows: usize| vec![Row::ZERO; rows * BLOCKS];
        let steps = || vec![0.0; STEPS * d_head];
        Self {
            first: lanes(d_head),
            second: lanes(d_head),
            d_first: lanes(d_head),
            d_second: lanes(d_head),
            weights: lanes(STEPS),
            slopes: lanes(STEPS),
            first_steps: steps(),
            second_steps: steps(),
            numbers: vec![0.0; d_head],
        }
    }

    fn clear(&mut self, d_head: usize, width: usize) {
        for matrix in [&mut self.first, &mut self.second, &mut self.d_first, &mut self.d_second] {
            matrix[..d_head * width].fill(Row::ZERO);
        }
    }

    /// Zeroes what products of so many steps are added to.
    fn clear_steps(&mut self, steps: usize, width: usize) {
        self.weights[..steps * width].fill(Row::ZERO);
        self.slopes[..steps * width].fill(Row::ZERO);
    }
}

pub(super) fn run<T: Element>(
    isa: Isa,
    problem: &Problem<T>,
    outputs: &OutputGradients<T>,
    gradients: GradientsMut<T>,
) {
    let (parts, sizes) = (problem.parts(), problem.sizes);
    for buffer in [&mut *gradients.k, &mut *gradients.v] {
        // Of keys that no query has.
        buffer.fill(T::from_f32(0.0));
    }
    let mut means = vec![0.0; outputs.lse.shape.iter().product()];
    let [d_q, d_k, d_v] = [gradients.q, gradients.k, gradients.v].map(Shared::new);
    let scratch = || Scratch::new(sizes.d_head);
    let of_queries = tiles(problem, &parts, |part| part.queries.len * sizes.group());
    {
        let means = Shared::new(&mut means);
        for_each_init(of_queries.len(), 1, scratch, |scratch, task| {
            let [part, kv_head, first] = of_queries[task];
            let queries = Queries::new(problem, parts[part], kv_head);
            isa.run(QueryTile { problem, outputs, queries, first, scratch, means: &means, d_q: &d_q });
        });
    }
    let means = &View::new(&means, [sizes.batch, sizes.length, sizes.heads]);
    let of_keys = tiles(problem, &parts, |part| part.keys.length);
    for_each_init(of_keys.len(), 1, scratch, |scratch, task| {
        let [part, kv_head, first] = of_keys[task];
        let queries = Queries::new(problem, parts[part], kv_head);
        isa.run(KeyTile { problem, outputs, means, queries, first, scratch, d_k: &d_k, d_v: &d_v });
    });
}

/// The gradients of a tile of queries.
struct QueryTile<'t, 'a, T: Element> {
    problem: &'t Problem<'a, T>,
    outputs: &'t OutputGradients<'t, T>,
    queries: Queries,
    first: usize,
    scratch: &'t mut Scratch,
    /// For every query the mean of the slopes by its weights, which is `out · d_out`.
    means: &'t Shared<'t, f32>,
    d_q: &'t Shared<'t, T>,
}

/// `lse` and the means of the rows of a tile.
struct OfRows {
    lse: [Row; BLOCKS],
    means: [Row; BLOCKS],
}

/// What is done with the slopes by the weights.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sweep {
    /// They are summed up to their mean: an output of a half type has it only to its own rounding.
    Mean,
    /// They become slopes by the scores, and with these gradients of the queries.
    Gradient,
}

impl<T: Element> Kernel for QueryTile<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(mut self, simd: S) {
        let Self { problem, outputs, queries, first, .. } = self;
        let d_head = problem.sizes.d_head;
        let rows = TILE.min(queries.rows() - first);
        let width = rows.div_ceil(BLOCK);
        let mut of_rows = OfRows { lse: [Row::ZERO; BLOCKS], means: [Row::ZERO; BLOCKS] };
        let is_single = T::DTYPE == crate::DType::F32;
        let scratch = &mut *self.scratch;
        scratch.clear(d_head, width);
        for row in 0..rows {
            let (block, lane) = (row / BLOCK, row % BLOCK);
            queries.read(&problem.inputs.q, first + row, problem.scale, &mut scratch.numbers);
            put_lane(&mut scratch.first, width, row, &scratch.numbers);
            queries.read(&outputs.d_out, first + row, 1.0, &mut scratch.numbers);
            put_lane(&mut scratch.second, width, row, &scratch.numbers);
            of_rows.lse[block].0[lane] = outputs.lse.at(queries.at(first + row));
            if is_single {
                let out = &mut scratch.first_steps[..d_head];
                queries.read(&outputs.out, first + row, 1.0, out);
                of_rows.means[block].0[lane] = out.iter().zip(&scratch.numbers).map(|(a, b)| a * b).sum();
            }
        }
        if !is_single {
            self.sweep(simd, rows, &mut of_rows, Sweep::Mean);
        }
        self.sweep(simd, rows, &mut of_rows, Sweep::Gradient);
        for row in 0..rows {
            let numbers = &mut self.scratch.numbers;
            take_lane(&self.scratch.d_first, width, row, numbers);
            numbers.iter_mut().for_each(|x| *x *= problem.scale);
            let [batch, step, head] = queries.at(first + row);
            let at = (batch * problem.sizes.length + step) * problem.sizes.heads + head;
            // SAFETY: this tile alone has this query of this head.
            unsafe {
                T::narrow(numbers, self.d_q.part(at * d_head..(at + 1) * d_head));
                self.means.part(at..at + 1)[0] = of_rows.means[row / BLOCK].0[row % BLOCK];
            }
        }
    }
}

impl<T: Element> QueryTile<'_, '_, T> {
    /// Goes over all keys that the tile sees.
    #[inline(always)]
    fn sweep<S: Lanes>(&mut self, simd: S, rows: usize, of_rows: &mut OfRows, sweep: Sweep) {
        let Self { problem, queries, first, scratch, .. } = self;
        let (d_head, width) = (problem.sizes.d_head, rows.div_ceil(BLOCK));
        let last = queries.seen(*first + rows - 1);
        for start in (0..last).step_by(STEPS) {
            let keys = STEPS.min(last - start);
            scratch.clear_steps(keys, width);
            let Scratch { first: q, second: d_out, d_first, weights, slopes, first_steps: k, second_steps: v, .. } =
                &mut **scratch;
            for j in 0..keys {
                queries.read_key(&problem.inputs.k, start + j, &mut k[j * d_head..][..d_head]);
                queries.read_key(&problem.inputs.v, start + j, &mut v[j * d_head..][..d_head]);
            }
            let by_steps = |data| Matrix { data, row: d_head, column: 1 };
            add_product(simd, weights, by_steps(k), q, [keys, d_head, width]);
            add_product(simd, slopes, by_steps(v), d_out, [keys, d_head, width]);
            let is_cut = start + keys > queries.seen(*first);
            for block in 0..width {
                let limits = is_cut.then(|| limits(queries, *first, rows, block, start));
                for lane in 0..Row::ZERO.vectors::<S>().len() {
                    let limit = limits.as_ref().map(|limits| limits.vectors::<S>()[lane]);
                    let lse = of_rows.lse[block].vectors::<S>()[lane];
                    let mean = &mut of_rows.means[block].vectors_mut::<S>()[lane];
                    for j in 0..keys {
                        let weight = weights[j * width + block].vectors::<S>()[lane];
                        let mut weight = exp(simd, simd.sub_f32s(weight, lse));
                        if let Some(limit) = limit {
                            let visible = simd.less_than_f32s(simd.splat_f32s(j as f32), limit);
                            weight = simd.select_f32s(visible, weight, simd.splat_f32s(0.0));
                        }
                        let slope = &mut slopes[j * width + block].vectors_mut::<S>()[lane];
                        match sweep {
                            Sweep::Mean => *mean = simd.fma(weight, *slope, *mean),
                            Sweep::Gradient => *slope = simd.mul_f32s(weight, simd.sub_f32s(*slope, *mean)),
                        }
                    }
                }
            }
            if sweep == Sweep::Gradient {
                add_product(simd, d_first, Matrix { data: k, row: 1, column: d_head }, slopes, [d_head, keys, width]);
            }
        }
    }
}

/// The gradients of a tile of keys and values.
struct KeyTile<'t, 'a, T: Element> {
    problem: &'t Problem<'a, T>,
    outputs: &'t OutputGradients<'t, T>,
    /// As the tiles of queries have left them.
    means: &'t View<'t, f32, 3>,
    queries: Queries,
    first: usize,
    scratch: &'t mut Scratch,
    d_k: &'t Shared<'t, T>,
    d_v: &'t Shared<'t, T>,
}

impl<T: Element> Kernel for KeyTile<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { problem, outputs, means, queries, first, scratch, d_k, d_v } = self;
        let d_head = problem.sizes.d_head;
        let keys = TILE.min(queries.part.keys.length - first);
        let width = keys.div_ceil(BLOCK);
        scratch.clear(d_head, width);
        for j in 0..keys {
            queries.read_key(&problem.inputs.k, first + j, &mut scratch.numbers);
            put_lane(&mut scratch.first, width, j, &scratch.numbers);
            queries.read_key(&problem.inputs.v, first + j, &mut scratch.numbers);
            put_lane(&mut scratch.second, width, j, &scratch.numbers);
        }
        // The first step that sees the first of these keys.
        let hidden = (first + 1).saturating_sub(queries.part.seen(0));
        for start in (hidden * queries.group..queries.rows()).step_by(STEPS) {
            let rows = STEPS.min(queries.rows() - start);
            scratch.clear_steps(rows, width);
            let Scratch { first: k, second: v, d_first, d_second, weights, slopes, first_steps, second_steps, .. } =
                &mut *scratch;
            let (q, d_out) = (first_steps, second_steps);
            for row in 0..rows {
                let place = row * d_head..(row + 1) * d_head;
                queries.read(&problem.inputs.q, start + row, problem.scale, &mut q[place.clone()]);
                queries.read(&outputs.d_out, start + row, 1.0, &mut d_out[place]);
            }
            let by_steps = |data| Matrix { data, row: d_head, column: 1 };
            add_product(simd, weights, by_steps(q), k, [rows, d_head, width]);
            add_product(simd, slopes, by_steps(d_out), v, [rows, d_head, width]);
            for row in 0..rows {
                let at = queries.at(start + row);
                let [lse, mean] = [&outputs.lse, means].map(|view| simd.splat_f32s(view.at(at)));
                let seen = queries.seen(start + row).saturating_sub(first);
                for block in 0..width {
                    let visible = seen.saturating_sub(block * BLOCK).min(BLOCK);
                    if visible < BLOCK {
                        // Of keys that the query does not see.
                        weights[row * width + block].0[visible..].fill(f32::NEG_INFINITY);
                    }
                    for lane in 0..Row::ZERO.vectors::<S>().len() {
                        let weight = &mut weights[row * width + block].vectors_mut::<S>()[lane];
                        *weight = exp(simd, simd.sub_f32s(*weight, lse));
                        let slope = &mut slopes[row * width + block].vectors_mut::<S>()[lane];
                        *slope = simd.mul_f32s(*weight, simd.sub_f32s(*slope, mean));
                    }
                }
            }
            let transposed = |data| Matrix { data, row: 1, column: d_head };
            add_product(simd, d_first, transposed(q), slopes, [d_head, rows, width]);
            add_product(simd, d_second, transposed(d_out), weights, [d_head, rows, width]);
        }
        let (sizes, range) = (problem.sizes, queries.part.keys);
        for j in 0..keys {
            let step = range.row * sizes.steps + range.start + first + j;
            let at = (step * sizes.kv_heads + queries.kv_head) * d_head;
            for (matrix, to) in [(&scratch.d_first, d_k), (&scratch.d_second, d_v)] {
                take_lane(matrix, width, j, &mut scratch.numbers);
                // SAFETY: this tile alone has this key, as no other sequence has it.
                T::narrow(&scratch.numbers, unsafe { to.part(at..at + d_head) });
            }
        }
    }
}
