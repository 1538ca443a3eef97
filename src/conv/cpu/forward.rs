//! The forward pass.

use rayon::prelude::*;

use crate::shared::Shared;
use crate::simd::{Isa, Kernel, Lanes, Row, silu};
use crate::{Element, Result};

use super::{
    BLOCKS, Filters, MOST_BEFORE, OutputMut, Problem, TILE, Tile, Unit, channels, channels_mut, runs, tiles, unit_rows,
    units, with_width,
};

pub(super) fn run<T: Element>(isa: Isa, problem: &Problem<T>, outputs: OutputMut<T>) -> Result<()> {
    let tiles = tiles(problem, outputs.final_state.is_some())?;
    if tiles.is_empty() {
        // There may be more channels than can be counted through.
        return Ok(());
    }
    let (runs, units) = (runs(&tiles), units(problem.d_inner()));
    let out = Shared::new(outputs.out);
    let final_state = outputs.final_state.map(Shared::new);
    (0..runs.len() * units.len()).into_par_iter().for_each_init(
        || unit_rows(TILE + MOST_BEFORE),
        |rows, task| {
            let unit = units[task % units.len()];
            let filters = Filters::read(&problem.inputs.weight, &problem.inputs.bias, unit);
            for &tile in runs[task / units.len()] {
                isa.run(Stage { problem, tile, unit, rows });
                let silu = problem.inputs.options.silu;
                isa.run(Convolve { filters: &filters, unit, steps: tile.len, silu, rows });
                isa.run(Finish { problem, tile, unit, rows, out: &out });
                if let Some(state) = final_state.as_ref().filter(|_| tile.ends_sequence()) {
                    for j in 0..problem.width - 1 {
                        // SAFETY: this task alone works on the last tile of this sequence for these channels.
                        let to = unsafe { state.part(problem.state_range(tile.sequence, j, unit)) };
                        problem.read_line(tile.sequence, tile.sequence.len + j, unit, to);
                    }
                }
            }
        },
    );
    Ok(())
}

/// Reads the rows of the line that a tile needs.
struct Stage<'t, 'a, T: Element> {
    problem: &'t Problem<'a, T>,
    tile: Tile,
    unit: Unit,
    rows: &'t mut [Row],
}

impl<T: Element> Kernel for Stage<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let Self { problem, tile, unit, rows } = self;
        for r in 0..tile.len + problem.width - 1 {
            problem.read_line(tile.sequence, tile.first + r, unit, channels_mut(rows, r, unit));
        }
    }
}

/// Replaces the first rows by the outputs.
struct Convolve<'t> {
    filters: &'t Filters,
    unit: Unit,
    steps: usize,
    silu: bool,
    rows: &'t mut [Row],
}

impl Kernel for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let width = self.filters.weight.len() / BLOCKS;
        if self.silu {
            with_width!(width, convolve::<S, true>(simd, self));
        } else {
            with_width!(width, convolve::<S, false>(simd, self));
        }
    }
}

#[inline(always)]
fn convolve<S: Lanes, const SILU: bool, const W: usize>(simd: S, tile: Convolve) {
    let Convolve { filters, unit, steps, rows, .. } = tile;
    for i in 0..unit.blocks() {
        for lane in 0..Row::ZERO.vectors::<S>().len() {
            let weight: [S::f32s; W] = std::array::from_fn(|k| filters.weight[k * BLOCKS + i].vectors::<S>()[lane]);
            let bias = filters.bias[i].vectors::<S>()[lane];
            for t in 0..steps {
                // One check of the bounds for all accesses.
                let window = &mut rows[t * BLOCKS + i..][..(W - 1) * BLOCKS + 1];
                let mut sum = bias;
                for k in 0..W {
                    sum = simd.fma(weight[k], window[k * BLOCKS].vectors::<S>()[lane], sum);
                }
                // No later step reads this row.
                window[0].vectors_mut::<S>()[lane] = if SILU { silu(simd, sum) } else { sum };
            }
        }
    }
}

/// Rounds and writes a tile.
struct Finish<'t, 'a, T: Element> {
    problem: &'t Problem<'a, T>,
    tile: Tile,
    unit: Unit,
    rows: &'t [Row],
    out: &'t Shared<'t, T>,
}

impl<T: Element> Kernel for Finish<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let Self { problem, tile, unit, rows, out } = self;
        for t in 0..tile.len {
            let range = problem.activation_range(tile.sequence, tile.first + t, unit);
            // SAFETY: this task alone works on these steps and channels.
            T::narrow(channels(rows, t, unit), unsafe { out.part(range) });
        }
    }
}
