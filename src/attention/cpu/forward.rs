//! A tile of queries after another over all blocks of keys that it sees.

use super::product::{Matrix, add_product};
use super::{Queries, STEPS, TILE, put_lane, take_lane, tiles};
use crate::Element;
use crate::attention::OutputMut;
use crate::attention::check::Problem;
use crate::shared::Shared;
use crate::simd::{BLOCK, Isa, Kernel, Lanes, Row, exp};
use crate::tasks::for_each_init;

const BLOCKS: usize = TILE / BLOCK;

/// What a thread works in.
struct Scratch {
    /// The queries times the scale, `(d_head, rows)`.
    q: Vec<Row>,
    /// `(d_head, rows)`.
    out: Vec<Row>,
    /// Scores, then weights, `(keys, rows)`.
    scores: Vec<Row>,
    /// `(keys, d_head)`.
    k: Vec<f32>,
    v: Vec<f32>,
    /// `(d_head)`.
    numbers: Vec<f32>,
}

impl Scratch {
    fn new(d_head: usize) -> Self {
        let lanes = |rows: usize| vec![Row::ZERO; rows * BLOCKS];
        let keys = || vec![0.0; STEPS * d_head];
        Self {
            q: lanes(d_head),
            out: lanes(d_head),
            scores: lanes(STEPS),
            k: keys(),
            v: keys(),
            numbers: vec![0.0; d_head],
        }
    }
}

pub(super) fn run<T: Element>(isa: Isa, problem: &Problem<T>, outputs: OutputMut<T>) {
    let parts = problem.parts();
    let tiles = tiles(problem, &parts, |part| part.queries.len * problem.sizes.group());
    let (out, lse) = (Shared::new(outputs.out), Shared::new(outputs.lse));
    for_each_init(
        tiles.len(),
        1,
        || Scratch::new(problem.sizes.d_head),
        |scratch, task| {
            let [part, kv_head, first] = tiles[task];
            let queries = Queries::new(problem, parts[part], kv_head);
            isa.run(Tile { problem, queries, first, scratch, out: &out, lse: &lse });
        },
    );
}

/// A tile, of which one task writes the results.
struct Tile<'t, 'a, T: Element> {
    problem: &'t Problem<'a, T>,
    queries: Queries,
    first: usize,
    scratch: &'t mut Scratch,
    out: &'t Shared<'t, T>,
    lse: &'t Shared<'t, f32>,
}

impl<T: Element> Kernel for Tile<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { problem, queries, first, scratch, out: outs, lse } = self;
        let d_head = problem.sizes.d_head;
        let rows = TILE.min(queries.rows() - first);
        let width = rows.div_ceil(BLOCK);
        let Scratch { q, out, scores, k, v, numbers } = scratch;
        q[..d_head * width].fill(Row::ZERO);
        out[..d_head * width].fill(Row::ZERO);
        for row in 0..rows {
            queries.read(&problem.inputs.q, first + row, problem.scale, numbers);
            put_lane(q, width, row, numbers);
        }
        let (mut most, mut sums) = ([Row([f32::NEG_INFINITY; BLOCK]); BLOCKS], [Row::ZERO; BLOCKS]);
        let last = queries.seen(first + rows - 1);
        for start in (0..last).step_by(STEPS) {
            let keys = STEPS.min(last - start);
            for j in 0..keys {
                queries.read_key(&problem.inputs.k, start + j, &mut k[j * d_head..][..d_head]);
                queries.read_key(&problem.inputs.v, start + j, &mut v[j * d_head..][..d_head]);
            }
            scores[..keys * width].fill(Row::ZERO);
            let k = Matrix { data: k, row: d_head, column: 1 };
            add_product(simd, scores, k, q, [keys, d_head, width]);
            for block in 0..width {
                let limits = (start + keys > queries.seen(first)).then(|| limits(&queries, first, rows, block, start));
                let softmax = Softmax { width, block, limits: limits.as_ref() };
                softmax.advance(simd, &mut scores[..keys * width], out, &mut most[block], &mut sums[block]);
            }
            // The transpose of the values.
            let v = Matrix { data: v, row: 1, column: d_head };
            add_product(simd, out, v, scores, [d_head, keys, width]);
        }
        for row in 0..rows {
            let [block, lane] = [row / BLOCK, row % BLOCK];
            let (most, sum) = (most[block].0[lane], sums[block].0[lane]);
            take_lane(out, width, row, numbers);
            numbers.iter_mut().for_each(|x| *x /= sum);
            let [batch, step, head] = queries.at(first + row);
            let at = (batch * problem.sizes.length + step) * problem.sizes.heads + head;
            // SAFETY: this tile alone has this query of this head.
            unsafe {
                T::narrow(numbers, outs.part(at * d_head..(at + 1) * d_head));
                lse.part(at..at + 1)[0] = most + sum.ln();
            }
        }
    }
}

/// How many of the keys from `start` on each lane of a block sees. Lanes beyond the last row see what that does.
#[inline(always)]
pub(super) fn limits(queries: &Queries, first: usize, rows: usize, block: usize, start: usize) -> Row {
    let mut limits = Row::ZERO;
    for (lane, limit) in limits.0.iter_mut().enumerate() {
        let seen = queries.seen(first + (block * BLOCK + lane).min(rows - 1));
        *limit = seen.saturating_sub(start).min(STEPS) as f32;
    }
    limits
}

/// The softmax of a block of lanes.
struct Softmax<'l> {
    /// The blocks of a row of scores, and which of them this is.
    width: usize,
    block: usize,
    /// How many of the keys each lane sees, if it is not all.
    limits: Option<&'l Row>,
}

impl Softmax<'_> {
    /// Goes on with the scores of more keys, which become weights: beside the greatest score so far, `most`, to which what is
    /// summed up is brought.
    #[inline(always)]
    fn advance<S: Lanes>(&self, simd: S, scores: &mut [Row], out: &mut [Row], most: &mut Row, sums: &mut Row) {
        let Self { width, block, limits } = *self;
        for lane in 0..Row::ZERO.vectors::<S>().len() {
            let limit = limits.map(|limits| limits.vectors::<S>()[lane]);
            let visible = |j: usize| limit.map(|limit| simd.less_than_f32s(simd.splat_f32s(j as f32), limit));
            let before = most.vectors::<S>()[lane];
            let mut top = before;
            for (j, row) in scores.chunks_exact(width).enumerate() {
                let score = row[block].vectors::<S>()[lane];
                let greater = simd.max_f32s(top, score);
                top = match visible(j) {
                    Some(visible) => simd.select_f32s(visible, greater, top),
                    None => greater,
                };
            }
            let mut sum = simd.splat_f32s(0.0);
            for (j, row) in scores.chunks_exact_mut(width).enumerate() {
                let score = &mut row[block].vectors_mut::<S>()[lane];
                let weight = exp(simd, simd.sub_f32s(*score, top));
                *score = match visible(j) {
                    Some(visible) => simd.select_f32s(visible, weight, simd.splat_f32s(0.0)),
                    None => weight,
                };
                sum = simd.add_f32s(sum, *score);
            }
            let decay = exp(simd, simd.sub_f32s(before, top));
            let total = &mut sums.vectors_mut::<S>()[lane];
            *total = simd.fma(*total, decay, sum);
            most.vectors_mut::<S>()[lane] = top;
            for row in out.chunks_exact_mut(width) {
                let x = &mut row[block].vectors_mut::<S>()[lane];
                *x = simd.mul_f32s(*x, decay);
            }
        }
    }
}
