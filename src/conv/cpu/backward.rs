//! The backward pass.
//!
//! With `g_t` the gradient of the sum that SiLU is applied to, the gradients of the line, of the weights and of the bias
//! are
//!
//! ```text
//! d_line_p = Σ_k weight_k g_{p - k}        g is zero outside the sequence
//! d_weight_k = Σ_t g_t line_{t + k}        d_bias = Σ_t g_t
//! ```
//!
//! A tile of the steps from `first` on computes the `g` of its own steps and of the `width - 1` steps after them, and
//! from these the gradient of the line from `first + width - 1` on, which is that of the inputs of its own steps. The
//! first tile of a sequence also does the rows before, which are the initial state's.

use rayon::prelude::*;

use crate::shared::Shared;
use crate::simd::{BLOCK, Isa, Kernel, Lanes, Row, silu_grad};
use crate::{Element, Result};

use super::{
    BLOCKS, Filters, GradientsMut, MOST_BEFORE, OutputGradients, Problem, TILE, Tile, Unit, channels, channels_mut,
    runs, tiles, unit_rows, units, with_width,
};

pub(super) fn run<T: Element>(
    isa: Isa,
    problem: &Problem<T>,
    d_outputs: OutputGradients<T>,
    mut gradients: GradientsMut<T>,
) -> Result<()> {
    let tiles = tiles(problem, gradients.initial_state.is_some())?;
    let (runs, units) = (runs(&tiles), units(problem.d_inner()));
    let pass = Pass {
        isa,
        problem,
        d_outputs,
        d_x: Shared::new(gradients.x),
        d_initial_state: gradients.initial_state.map(Shared::new),
    };
    let sums: Vec<Vec<Row>> = (0..runs.len() * units.len())
        .into_par_iter()
        .map_init(Scratch::new, |scratch, task| {
            pass.run_unit(units[task % units.len()], runs[task / units.len()], scratch)
        })
        .collect();

    // There may be many runs, so they are added in f64.
    let width = problem.width;
    let totals: Vec<Vec<f64>> = (0..units.len())
        .into_par_iter()
        .map(|unit| {
            let mut total = vec![0.0; (width + 1) * BLOCKS * BLOCK];
            for sums in sums.iter().skip(unit).step_by(units.len()) {
                let sums: &[f32] = bytemuck::cast_slice(sums);
                for (total, &sum) in total.iter_mut().zip(sums) {
                    *total += f64::from(sum);
                }
            }
            total
        })
        .collect();
    for (unit, total) in units.iter().zip(totals) {
        for i in 0..unit.width {
            for k in 0..width {
                gradients.weight[(unit.first + i) * width + k] = total[k * BLOCKS * BLOCK + i] as f32;
            }
            if let Some(bias) = &mut gradients.bias {
                bias[unit.first + i] = total[width * BLOCKS * BLOCK + i] as f32;
            }
        }
    }
    Ok(())
}

struct Pass<'p, 'a, T: Element> {
    isa: Isa,
    problem: &'p Problem<'a, T>,
    d_outputs: OutputGradients<'p, T>,
    d_x: Shared<'p, T>,
    d_initial_state: Option<Shared<'p, f32>>,
}

/// Buffers of one task, used again by the next.
struct Scratch {
    /// The line from the tile's first step on.
    line: Vec<Row>,
    /// `g` from the step `width - 1` before the tile's first on; then the gradient of the line from that first on.
    g: Vec<Row>,
}

impl Scratch {
    fn new() -> Self {
        let rows = || unit_rows(TILE + 2 * MOST_BEFORE);
        Self { line: rows(), g: rows() }
    }
}

impl<T: Element> Pass<'_, '_, T> {
    /// Works through a run of tiles. Gives the sums for the gradients of the parameters, a row for each weight and one
    /// for the bias.
    fn run_unit(&self, unit: Unit, run: &[Tile], scratch: &mut Scratch) -> Vec<Row> {
        let inputs = &self.problem.inputs;
        let filters = Filters::read(&inputs.weight, &inputs.bias, unit);
        let mut sums = unit_rows(self.problem.width + 1);
        for &tile in run {
            let after = (tile.sequence.len - tile.first - tile.len).min(self.problem.width - 1);
            let steps = tile.len + after;
            self.isa.run(Stage { pass: self, tile, steps, unit, scratch });
            let (silu, whole) = (inputs.options.silu, tile.first == 0);
            self.isa.run(Spread {
                filters: &filters,
                unit,
                tile_steps: tile.len,
                steps,
                silu,
                whole,
                scratch,
                sums: &mut sums,
            });
            self.isa.run(Finish { pass: self, tile, unit, scratch });
        }
        sums
    }
}

/// Reads the line and the gradients of the outputs.
struct Stage<'t, 'p, 'a, T: Element> {
    pass: &'t Pass<'p, 'a, T>,
    tile: Tile,
    /// The steps of the tile and those after them that matter.
    steps: usize,
    unit: Unit,
    scratch: &'t mut Scratch,
}

impl<T: Element> Kernel for Stage<'_, '_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let Self { pass, tile: Tile { sequence, first, len }, steps, unit, scratch } = self;
        let Problem { inputs, width, .. } = pass.problem;
        let before = width - 1;
        // The sums after the tile are only computed again for the slope of SiLU.
        let needed = if inputs.options.silu { steps } else { len };
        for r in 0..needed + before {
            pass.problem.read_line(sequence, first + r, unit, channels_mut(&mut scratch.line, r, unit));
        }
        scratch.g[..before * BLOCKS].fill(Row::ZERO);
        scratch.g[(before + steps) * BLOCKS..].fill(Row::ZERO);
        for t in 0..steps {
            let step = sequence.step(first + t, inputs.options.reverse);
            let to = channels_mut(&mut scratch.g, before + t, unit);
            pass.d_outputs.d_out.widen_row([sequence.batch, step, unit.first], to);
        }
    }
}

/// Carries the gradients of the outputs over to the line and the parameters.
struct Spread<'t> {
    filters: &'t Filters,
    unit: Unit,
    /// The steps of the tile.
    tile_steps: usize,
    /// Those and the steps after them that matter.
    steps: usize,
    silu: bool,
    /// Do the rows of the line before the tile's inputs too.
    whole: bool,
    scratch: &'t mut Scratch,
    sums: &'t mut [Row],
}

impl Kernel for Spread<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let width = self.filters.weight.len() / BLOCKS;
        if self.silu {
            with_width!(width, spread::<S, true>(simd, self));
        } else {
            with_width!(width, spread::<S, false>(simd, self));
        }
    }
}

/// The slope of SiLU at the sum over a window of the line.
#[inline(always)]
fn slope<S: Lanes, const W: usize>(
    simd: S,
    weight: &[S::f32s; W],
    bias: S::f32s,
    window: &[Row],
    lane: usize,
) -> S::f32s {
    let window = &window[..(W - 1) * BLOCKS + 1];
    let mut sum = bias;
    for k in 0..W {
        sum = simd.fma(weight[k], window[k * BLOCKS].vectors::<S>()[lane], sum);
    }
    silu_grad(simd, sum).1
}

#[inline(always)]
fn spread<S: Lanes, const SILU: bool, const W: usize>(simd: S, tile: Spread) {
    let Spread { filters, unit, tile_steps, steps, whole, scratch: Scratch { line, g }, sums, .. } = tile;
    for i in 0..unit.blocks() {
        for lane in 0..Row::ZERO.vectors::<S>().len() {
            let weight: [S::f32s; W] = std::array::from_fn(|k| filters.weight[k * BLOCKS + i].vectors::<S>()[lane]);
            let bias = filters.bias[i].vectors::<S>()[lane];
            let window = |t: usize| &line[t * BLOCKS + i..][..(W - 1) * BLOCKS + 1];

            let (mut d_weight, mut d_bias) = ([simd.splat_f32s(0.0); W], simd.splat_f32s(0.0));
            for t in 0..tile_steps {
                let window = window(t);
                let g = &mut g[(t + W - 1) * BLOCKS + i].vectors_mut::<S>()[lane];
                if SILU {
                    *g = simd.mul_f32s(*g, slope(simd, &weight, bias, window, lane));
                }
                for k in 0..W {
                    d_weight[k] = simd.fma(*g, window[k * BLOCKS].vectors::<S>()[lane], d_weight[k]);
                }
                d_bias = simd.add_f32s(d_bias, *g);
            }
            if SILU {
                for t in tile_steps..steps {
                    let g = &mut g[(t + W - 1) * BLOCKS + i].vectors_mut::<S>()[lane];
                    *g = simd.mul_f32s(*g, slope(simd, &weight, bias, window(t), lane));
                }
            }
            for (k, d_weight) in d_weight.into_iter().enumerate() {
                let sum = &mut sums[k * BLOCKS + i].vectors_mut::<S>()[lane];
                *sum = simd.add_f32s(*sum, d_weight);
            }
            let sum = &mut sums[W * BLOCKS + i].vectors_mut::<S>()[lane];
            *sum = simd.add_f32s(*sum, d_bias);

            for r in if whole { 0 } else { W - 1 }..tile_steps + W - 1 {
                let window = &mut g[r * BLOCKS + i..][..(W - 1) * BLOCKS + 1];
                let mut sum = simd.splat_f32s(0.0);
                if (W - 1..steps).contains(&r) {
                    for k in 0..W {
                        sum = simd.fma(weight[k], window[(W - 1 - k) * BLOCKS].vectors::<S>()[lane], sum);
                    }
                } else {
                    // The window reaches out of the sequence, where no weight has been: not even an infinite one, whose
                    // product with a zero there would be NaN.
                    for k in (0..W).filter(|k| (W - 1..W - 1 + steps).contains(&(r + W - 1 - k))) {
                        sum = simd.fma(weight[k], window[(W - 1 - k) * BLOCKS].vectors::<S>()[lane], sum);
                    }
                }
                // No later row of the line reads this g.
                window[0].vectors_mut::<S>()[lane] = sum;
            }
        }
    }
}

/// Adds the gradient of the final state, rounds and writes.
struct Finish<'t, 'p, 'a, T: Element> {
    pass: &'t Pass<'p, 'a, T>,
    tile: Tile,
    unit: Unit,
    scratch: &'t mut Scratch,
}

impl<T: Element> Kernel for Finish<'_, '_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let Self { pass, tile: Tile { sequence, first, len }, unit, scratch } = self;
        let before = pass.problem.width - 1;
        for r in if first == 0 { 0 } else { before }..len + before {
            let d_line = channels_mut(&mut scratch.g, r, unit);
            let position = first + r;
            if let (Some(view), Some(j)) = (&pass.d_outputs.d_final_state, position.checked_sub(sequence.len)) {
                for (i, d_line) in d_line.iter_mut().enumerate() {
                    *d_line += view.at([sequence.index, j, unit.first + i]);
                }
            }
            let d_line = channels(&scratch.g, r, unit);
            match (position.checked_sub(before), &pass.d_initial_state) {
                (Some(i), _) => {
                    let range = pass.problem.activation_range(sequence, i, unit);
                    // SAFETY: this task alone works on these steps and channels.
                    T::narrow(d_line, unsafe { pass.d_x.part(range) });
                }
                (None, Some(state)) => {
                    let range = pass.problem.state_range(sequence, position, unit);
                    // SAFETY: this task alone works on the first tile of this sequence for these channels.
                    unsafe { state.part(range) }.copy_from_slice(d_line);
                }
                (None, None) => {}
            }
        }
    }
}
