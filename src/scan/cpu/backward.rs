//! The backward pass.
//!
//! The gradient of the states obeys the recurrence of the states backwards: `g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1}`.
//! Tiles are taken from the last to the first; each recomputes its states from the checkpoint before it.
//!
//! The gradients of B and C are sums over the channels of a group. A task adds up its own blocks, lane by lane, and
//! leaves the sum over the lanes in a buffer of its own; these partial sums are then added in a fixed order.

use rayon::prelude::*;

use crate::Element;
use crate::sequences::{CHECKPOINT_STEPS, Sequence};
use crate::shared::Shared;
use crate::simd::{Decay, Isa, Kernel, Lanes, Row, Sum, SumRows, SumTile, silu_grad};
use crate::view::Ahead;

use super::super::{GradientsMut, OutputGradients, Problem, ProjectionMut};
use super::forward::transpose;
use super::kernels::{History, Retreat, RetreatStates};
use super::split::{ChunkStates, state_rows};
use super::sums::{BlockGradients, SumChannels, Totals, add_partial};
use super::{Block, BlockParameters, Plan, Reader, Segment, Stage};
use crate::{Discretization, Projection, ProjectionOf};

/// Steps in a tile: the states of one are recomputed from the checkpoint before it.
const TILE: usize = CHECKPOINT_STEPS;

/// Rows from one block's tile to the next in the buffers of a unit. One more than a tile, for at a distance of 4096 bytes
/// the rows of all blocks would share a set of the first-level cache.
const STRIDE: usize = TILE + 1;

/// Tasks that the channels of a group are divided into at most, and with it the partial sums for B and C.
const UNITS_PER_GROUP: usize = 16;

/// Runs of segments that the gradients of parameters are summed over separately, about.
const RUNS: usize = 16;

/// Steps in a run at least.
const STEPS_PER_RUN: usize = 1024;

pub(super) fn run<T: Element>(
    isa: Isa,
    problem: &Problem<T>,
    checkpoints: &[f32],
    d_outputs: OutputGradients<T>,
    gradients: GradientsMut<T>,
) {
    let plan = Plan::new(problem, gradients.initial_state.is_some());
    let steps = problem.dims.batch * problem.dims.len;
    let blocks_per_group = plan.blocks.len() / problem.dims.groups;
    let units = plan.units(blocks_per_group.div_ceil(UNITS_PER_GROUP));
    let units_per_group = units.len() / problem.dims.groups;
    let runs = plan.runs(STEPS_PER_RUN.max(steps / RUNS));

    let varying = steps * problem.dims.groups * problem.dims.d_state;
    let partial = |gradient: &ProjectionMut<T>| match gradient {
        ProjectionOf::Varying(_) => vec![0.0; units_per_group * varying],
        ProjectionOf::Constant(_) => Vec::new(),
    };
    let (mut partial_b, mut partial_c) = (partial(&gradients.b), partial(&gradients.c));
    let reader = Reader { problem };
    let exit = plan.is_split().then(|| exit_gradients(isa, problem, &plan, &d_outputs));
    let pass = Pass {
        isa,
        reader,
        checkpoints,
        d_outputs,
        exit_gradients: exit.as_deref(),
        d_u: Shared::new(gradients.u),
        d_delta: Shared::new(gradients.delta),
        d_z: gradients.z.map(Shared::new),
        d_initial_state: gradients.initial_state.map(Shared::new),
        partial_b: Shared::new(&mut partial_b),
        partial_c: Shared::new(&mut partial_c),
    };
    let sums: Vec<Vec<BlockGradients>> = (0..units.len() * runs.len())
        .into_par_iter()
        .map_init(
            || Scratch::new(problem, units[0].len()),
            |scratch, task| {
                let (unit, run) = (task % units.len(), task / units.len());
                pass.run_unit(unit % units_per_group, units[unit], runs[run], scratch)
            },
        )
        .collect();

    let total = Totals { sums: &sums, d_state: problem.dims.d_state };
    total.states(gradients.a, |sum| &sum.a);
    match gradients.b {
        ProjectionOf::Varying(d_b) => add_partial(&partial_b, d_b),
        ProjectionOf::Constant(d_b) => total.states(d_b, |sum| &sum.b),
    }
    match gradients.c {
        ProjectionOf::Varying(d_c) => add_partial(&partial_c, d_c),
        ProjectionOf::Constant(d_c) => total.states(d_c, |sum| &sum.c),
    }
    if let Some(d_skip) = gradients.d {
        total.channels(d_skip, |sum| &sum.skip);
    }
    if let Some(d_bias) = gradients.delta_bias {
        total.channels(d_bias, |sum| &sum.bias);
    }
}

/// Buffers of one task, used again by the next. Rows are those of [`Stage`].
struct Scratch {
    u: Vec<Row>,
    delta: Vec<Row>,
    input: Vec<Row>,
    d_y: Vec<Row>,
    /// The gradient of `out` times the slope of the gate: what y is multiplied by to give the gradient of z.
    gate_slope: Vec<Row>,
    y: Vec<Row>,
    d_input: Vec<Row>,
    d_delta: Vec<Row>,
    b: Vec<f32>,
    c: Vec<f32>,
    /// For each step and state, or for each state where B or C is constant.
    d_b: Vec<Row>,
    d_c: Vec<Row>,
    h: Vec<Row>,
    history: History,
}

impl Scratch {
    fn new<T: Element>(problem: &Problem<T>, blocks: usize) -> Self {
        let d_state = problem.dims.d_state;
        let (rows, tile) = (|| vec![Row::ZERO; blocks * STRIDE], || vec![0.0; TILE * d_state]);
        let gradient = |projection: &Projection<T>| match projection {
            Projection::Varying(_) => vec![Row::ZERO; TILE * d_state],
            Projection::Constant(_) => vec![Row::ZERO; d_state],
        };
        Self {
            u: rows(),
            delta: rows(),
            input: rows(),
            d_y: rows(),
            gate_slope: rows(),
            y: rows(),
            d_input: rows(),
            d_delta: rows(),
            b: tile(),
            c: tile(),
            d_b: gradient(&problem.inputs.b),
            d_c: gradient(&problem.inputs.c),
            h: vec![Row::ZERO; d_state],
            history: History::new(TILE),
        }
    }

    /// Reads a tile of everything that the recurrences read.
    fn stage<T: Element>(
        &mut self,
        isa: Isa,
        reader: &Reader<T>,
        d_outputs: &OutputGradients<T>,
        segment: &Segment,
        tile: (usize, usize),
        unit: &[BlockParameters],
    ) {
        let (inputs, sequence, group) = (&reader.problem.inputs, segment.sequence, unit[0].block.group);
        reader.projection(&inputs.b, sequence, tile, group, &mut self.b);
        reader.projection(&inputs.c, sequence, tile, group, &mut self.c);
        let Self { u, delta, input, y, d_y, gate_slope, .. } = self;
        isa.run(Stage { reader, sequence, tile, unit, stride: STRIDE, u: Some(u), delta, input, y });
        isa.run(StageGradient { reader, d_outputs, sequence, tile, unit, d_y, gate_slope });
    }
}

/// Reads a tile of `d_out` and takes it back through the gate.
struct StageGradient<'t, 'a, T: Element> {
    reader: &'t Reader<'t, 'a, T>,
    d_outputs: &'t OutputGradients<'a, T>,
    sequence: Sequence,
    tile: (usize, usize),
    unit: &'t [BlockParameters],
    d_y: &'t mut [Row],
    gate_slope: &'t mut [Row],
}

impl<T: Element> Kernel for StageGradient<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let (first, steps) = self.tile;
        let mut gate = Row::ZERO;
        for t in 0..steps {
            let step = self.reader.step(self.sequence, first + t);
            for (i, parameters) in self.unit.iter().enumerate() {
                let (index, width) = ([self.sequence.batch, step, parameters.block.first], parameters.block.width);
                let d_y = &mut self.d_y[i * STRIDE + t];
                self.d_outputs.d_out.read_row(index, width, d_y);
                if let Some(z) = &self.reader.problem.inputs.z {
                    z.read_row(index, width, &mut gate);
                    let slopes = self.gate_slope[i * STRIDE + t].vectors_mut::<S>();
                    let rows = d_y.vectors_mut::<S>().iter_mut().zip(gate.vectors::<S>()).zip(slopes);
                    for ((d_y, z), slope) in rows {
                        let (silu, silu_slope) = silu_grad(simd, *z);
                        *slope = simd.mul_f32s(*d_y, silu_slope);
                        *d_y = simd.mul_f32s(*d_y, silu);
                    }
                }
            }
        }
    }
}

struct Pass<'p, 'a, T: Element> {
    isa: Isa,
    reader: Reader<'p, 'a, T>,
    checkpoints: &'p [f32],
    d_outputs: OutputGradients<'a, T>,
    /// The gradient of the state after each segment, `(segments, d_state, d_inner)`, if there are more segments than
    /// sequences.
    exit_gradients: Option<&'p [f32]>,
    d_u: Shared<'p, T>,
    d_delta: Shared<'p, T>,
    d_z: Option<Shared<'p, T>>,
    d_initial_state: Option<Shared<'p, f32>>,
    /// `(units_per_group, batch, length, groups, d_state)`, empty if B or C is constant.
    partial_b: Shared<'p, f32>,
    partial_c: Shared<'p, f32>,
}

impl<T: Element> Pass<'_, '_, T> {
    /// Works on the `place`-th unit of its group.
    fn run_unit(&self, place: usize, unit: &[Block], run: &[Segment], scratch: &mut Scratch) -> Vec<BlockGradients> {
        let unit: Vec<_> = unit.iter().map(|&block| BlockParameters::read(&self.reader, block)).collect();
        let mut sums: Vec<_> = unit.iter().map(BlockGradients::zero).collect();
        for segment in run {
            sums.iter_mut().for_each(|sums| self.enter(segment, sums));
            for tile in segment.tiles(TILE).rev() {
                scratch.stage(self.isa, &self.reader, &self.d_outputs, segment, tile, &unit);
                scratch.d_b.fill(Row::ZERO);
                scratch.d_c.fill(Row::ZERO);
                for (i, (parameters, sums)) in unit.iter().zip(&mut sums).enumerate() {
                    self.retreat(segment, tile, parameters, i, sums, scratch);
                }
                self.isa.run(Finish {
                    pass: self,
                    sequence: segment.sequence,
                    tile,
                    unit: &unit,
                    scratch,
                    sums: &mut sums,
                });
                self.leave_projections(place, segment.sequence, tile, unit[0].block.group, scratch);
            }
            if segment.first == 0 {
                sums.iter().for_each(|sums| self.leave(segment.sequence, sums));
            }
        }
        sums
    }

    /// The gradient of the state after a segment.
    fn enter(&self, segment: &Segment, BlockGradients { block, d_h, lost, .. }: &mut BlockGradients) {
        let block = *block;
        lost.fill(Row::ZERO);
        match self.exit_gradients {
            Some(states) => state_rows(states, segment.index, self.reader.problem.dims.d_inner, block, d_h),
            None => self.reader.state(&self.d_outputs.d_final_state, segment.sequence, block, d_h),
        }
    }

    /// What will be read for this block to stage the tile before this one.
    fn ahead(&self, segment: &Segment, (first, _): (usize, usize), block: Block) -> [Ahead; 4] {
        let inputs = &self.reader.problem.inputs;
        [Some(inputs.u), Some(inputs.delta), inputs.z, Some(self.d_outputs.d_out)].map(|view| match (view, first) {
            (None, _) | (_, 0) => Ahead::NONE,
            (Some(view), _) => self.reader.ahead(&view, segment.sequence, first - TILE, block),
        })
    }

    /// Runs the recurrence of the states forwards and that of their gradient backwards through a tile of block `i`.
    fn retreat(
        &self,
        segment: &Segment,
        (first, steps): (usize, usize),
        parameters: &BlockParameters,
        i: usize,
        sums: &mut BlockGradients,
        scratch: &mut Scratch,
    ) {
        let (sequence, block) = (segment.sequence, parameters.block);
        match first {
            0 => self.reader.state(&self.reader.problem.inputs.initial_state, sequence, block, &mut scratch.h),
            _ => {
                let slot = sequence.checkpoint_slot(first, self.reader.problem.checkpoint_steps());
                state_rows(self.checkpoints, slot, self.reader.problem.dims.d_inner, block, &mut scratch.h);
            }
        }
        let rows = i * STRIDE..i * STRIDE + steps;
        Retreat {
            tile: parameters.tile(&scratch.b, &scratch.c, &scratch.delta[rows.clone()], &scratch.input[rows.clone()]),
            delta_sum: self.isa.run(SumTile(&scratch.delta[rows.clone()])),
            d_y: &scratch.d_y[rows.clone()],
            h: &scratch.h,
            d_h: &mut sums.d_h,
            lost: &mut sums.lost,
            y: &mut scratch.y[rows.clone()],
            d_input: &mut scratch.d_input[rows.clone()],
            d_delta: &mut scratch.d_delta[rows],
            d_a: &mut sums.a,
            d_b: &mut scratch.d_b,
            d_c: &mut scratch.d_c,
            history: &mut scratch.history,
            ahead: self.ahead(segment, (first, steps), block),
        }
        .on(self.isa);
        // Where B or C is constant, what the tile gave is this block's alone.
        for (totals, tile) in [(&mut sums.b, &mut scratch.d_b), (&mut sums.c, &mut scratch.d_c)] {
            for (total, row) in totals.iter_mut().zip(tile) {
                self.isa.run(SumRows { rows: std::slice::from_ref(row), sum: total });
                *row = Row::ZERO;
            }
        }
    }

    /// Leaves the unit's share of the gradients of B and C for a tile.
    fn leave_projections(
        &self,
        place: usize,
        sequence: Sequence,
        (first, steps): (usize, usize),
        group: usize,
        scratch: &Scratch,
    ) {
        let Problem { inputs, dims, .. } = self.reader.problem;
        for (projection, rows, partial) in
            [(&inputs.b, &scratch.d_b, &self.partial_b), (&inputs.c, &scratch.d_c, &self.partial_c)]
        {
            let Projection::Varying(_) = projection else { continue };
            for (t, rows) in rows.chunks_exact(dims.d_state).take(steps).enumerate() {
                let step = sequence.batch * dims.len + self.reader.step(sequence, first + t);
                let at = ((place * dims.batch * dims.len + step) * dims.groups + group) * dims.d_state;
                // SAFETY: this task alone works on these steps for this unit, and units have shares of their own.
                let out = unsafe { partial.part(at..at + dims.d_state) };
                self.isa.run(SumChannels { rows, out });
            }
        }
    }

    fn leave(&self, sequence: Sequence, BlockGradients { block, d_h, .. }: &BlockGradients) {
        let Some(states) = &self.d_initial_state else { return };
        let at = (sequence.index * self.reader.problem.dims.d_inner + block.first) * d_h.len();
        // SAFETY: this task alone works on the first segment of this sequence for these channels.
        let states = unsafe { states.part(at..at + block.width * d_h.len()) };
        transpose(d_h, states);
    }
}

/// Puts the gradients of u, delta and z together and writes a tile of them, row by row.
struct Finish<'t, 'p, 'a, T: Element> {
    pass: &'t Pass<'p, 'a, T>,
    sequence: Sequence,
    tile: (usize, usize),
    unit: &'t [BlockParameters],
    scratch: &'t Scratch,
    sums: &'t mut [BlockGradients],
}

impl<T: Element> Kernel for Finish<'_, '_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let (pass, scratch) = (self.pass, self.scratch);
        let Problem { inputs, dims, .. } = pass.reader.problem;
        let hold = inputs.options.discretization == Discretization::ZeroOrderHold;
        let (first, steps) = self.tile;
        // Summed over the tile first, which keeps long sums accurate.
        let mut sums = vec![(Row::ZERO, Row::ZERO); self.unit.len()];
        for t in 0..steps {
            let step = self.sequence.batch * dims.len + pass.reader.step(self.sequence, first + t);
            for (i, (parameters, (skip_sum, bias_sum))) in self.unit.iter().zip(&mut sums).enumerate() {
                let (block, skip) = (parameters.block, parameters.skip.vectors::<S>());
                let row = i * STRIDE + t;
                let (u, delta) = (scratch.u[row].vectors::<S>(), scratch.delta[row].vectors::<S>());
                let (d_y, y) = (scratch.d_y[row].vectors::<S>(), scratch.y[row].vectors::<S>());
                let (d_input, d_decay) = (scratch.d_input[row].vectors::<S>(), scratch.d_delta[row].vectors::<S>());
                let gate_slope = scratch.gate_slope[row].vectors::<S>();
                let (mut d_u, mut d_delta, mut d_z) = (Row::ZERO, Row::ZERO, Row::ZERO);
                for lane in 0..u.len() {
                    // d_decay is counted in binary logarithms.
                    let ln_2 = simd.splat_f32s(std::f32::consts::LN_2);
                    let (by_input, by_delta) = if hold {
                        (d_input[lane], simd.mul_f32s(d_decay[lane], ln_2))
                    } else {
                        let by_delta = simd.mul_f32s(d_input[lane], u[lane]);
                        (simd.mul_f32s(d_input[lane], delta[lane]), simd.fma(d_decay[lane], ln_2, by_delta))
                    };
                    d_u.vectors_mut::<S>()[lane] = simd.fma(skip[lane], d_y[lane], by_input);
                    let d_raw = if inputs.options.delta_softplus {
                        simd.mul_f32s(by_delta, softplus_slope(simd, delta[lane]))
                    } else {
                        by_delta
                    };
                    d_delta.vectors_mut::<S>()[lane] = d_raw;
                    d_z.vectors_mut::<S>()[lane] = simd.mul_f32s(gate_slope[lane], y[lane]);

                    let skip_sum = &mut skip_sum.vectors_mut::<S>()[lane];
                    *skip_sum = simd.fma(d_y[lane], u[lane], *skip_sum);
                    let bias_sum = &mut bias_sum.vectors_mut::<S>()[lane];
                    *bias_sum = simd.add_f32s(d_raw, *bias_sum);
                }
                let at = step * dims.d_inner + block.first;
                // SAFETY: this task alone works on these steps and channels, here and below.
                d_u.narrow(unsafe { pass.d_u.part(at..at + block.width) });
                // SAFETY: as above.
                d_delta.narrow(unsafe { pass.d_delta.part(at..at + block.width) });
                if let Some(out) = &pass.d_z {
                    // SAFETY: as above.
                    d_z.narrow(unsafe { out.part(at..at + block.width) });
                }
            }
        }
        for (total, (skip_sum, bias_sum)) in self.sums.iter_mut().zip(&sums) {
            total.skip.add_row(simd, skip_sum);
            total.bias.add_row(simd, bias_sum);
        }
    }
}

/// The slope of softplus where its value is `delta`: `1 - e^-delta`.
#[inline(always)]
fn softplus_slope<S: Lanes>(simd: S, delta: S::f32s) -> S::f32s {
    let exponent = simd.mul_f32s(delta, simd.splat_f32s(-std::f32::consts::LOG2_E));
    simd.neg_f32s(Decay::exp2(simd, exponent).minus_one(simd))
}

/// The gradient of the state after each segment, `(segments, d_state, d_inner)`.
///
/// A segment turns the gradient `g` after it into `exp(A ΣΔ) g + s`, where `s` is what it makes of zero: the forward
/// pass' chunk states, read from the end.
fn exit_gradients<T: Element>(isa: Isa, problem: &Problem<T>, plan: &Plan, d_outputs: &OutputGradients<T>) -> Vec<f32> {
    let reader = Reader { problem };
    let chunk_states = ChunkStates::new(problem, plan, |parameters, segment, h| {
        let (mut scratch, mut lost) = (Scratch::new(problem, 1), vec![Row::ZERO; h.len()]);
        let mut sum = Sum::ZERO;
        if segment.first == 0 {
            return sum.total;
        }
        for (first, steps) in segment.tiles(TILE).rev() {
            scratch.stage(isa, &reader, d_outputs, segment, (first, steps), std::slice::from_ref(parameters));
            let delta = &scratch.delta[..steps];
            let tile = parameters.tile(&scratch.b, &scratch.c, delta, &scratch.input[..steps]);
            let delta_sum = isa.run(SumTile(delta));
            RetreatStates { tile, delta_sum, d_y: &scratch.d_y[..steps], d_h: h, lost: &mut lost }.on(isa);
            isa.run(SumRows { rows: delta, sum: &mut sum });
        }
        sum.total
    });
    chunk_states.chain(isa, plan.segments.iter().rev(), |segment, block, h| {
        reader.state(&d_outputs.d_final_state, segment.sequence, block, h);
    })
}
