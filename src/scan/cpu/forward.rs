//! The forward pass.

use rayon::prelude::*;

use crate::Element;
use crate::sequences::Sequence;
use crate::shared::Shared;
use crate::simd::{Isa, Kernel, Lanes, Row, Sum, SumRows, silu};
use crate::view::Ahead;

use super::kernels::Advance;
use super::split::{ChunkStates, state_rows};
use super::{Block, BlockParameters, OutputMut, Plan, Problem, Reader, Segment, Stage};

/// Steps in a tile. Few, so that the tiles of many blocks fit in the second-level cache together.
const TILE: usize = 16;

/// Rows from one block's tile to the next in the buffers of a unit: odd, so that they do not meet in few sets of the
/// first-level cache.
const STRIDE: usize = TILE + 1;

/// Blocks that one task carries through each tile, at most. The more there are, the longer the stretches of memory that
/// are read and written at once, and the fewer pages are visited.
const BLOCKS_PER_UNIT: usize = 32;

/// Tasks for each thread, if there are that many: enough to even out the work.
const TASKS_PER_THREAD: usize = 4;

/// Steps in a task at least, so that short sequences share the cost of reading the parameters.
const STEPS_PER_RUN: usize = 512;

pub(super) fn run<T: Element>(isa: Isa, problem: &Problem<T>, outputs: OutputMut<T>) {
    let plan = Plan::new(problem, outputs.final_state.is_some());
    let entry_states = plan.is_split().then(|| entry_states(isa, problem, &plan));
    let pass = Pass {
        isa,
        reader: Reader { problem },
        entry_states: entry_states.as_deref(),
        out: Shared::new(outputs.out),
        final_state: outputs.final_state.map(Shared::new),
        checkpoints: outputs.checkpoints.map(Shared::new),
    };
    let runs = plan.runs(STEPS_PER_RUN);
    // Nothing that is computed depends on this division, so it may look at the number of threads.
    let tasks = TASKS_PER_THREAD * rayon::current_num_threads();
    let per_unit = (plan.blocks.len() * runs.len() / tasks).clamp(1, BLOCKS_PER_UNIT);
    let units = plan.units(per_unit);
    (0..units.len() * runs.len()).into_par_iter().for_each_init(
        || Scratch::new(problem.dims.d_state, per_unit),
        |scratch, task| pass.run_unit(units[task % units.len()], runs[task / units.len()], scratch),
    );
}

/// Buffers of one task, used again by the next.
struct Scratch {
    delta: Vec<Row>,
    input: Vec<Row>,
    y: Vec<Row>,
    b: Vec<f32>,
    c: Vec<f32>,
}

impl Scratch {
    fn new(d_state: usize, blocks: usize) -> Self {
        let (rows, tile) = (|| vec![Row::ZERO; blocks * STRIDE], || vec![0.0; TILE * d_state]);
        Self { delta: rows(), input: rows(), y: rows(), b: tile(), c: tile() }
    }

    /// Reads a tile of everything that the recurrence reads.
    fn stage<T: Element>(
        &mut self,
        isa: Isa,
        reader: &Reader<T>,
        segment: &Segment,
        tile: (usize, usize),
        unit: &[BlockParameters],
    ) {
        let (inputs, group) = (&reader.problem.inputs, unit[0].block.group);
        reader.projection(&inputs.b, segment.sequence, tile, group, &mut self.b);
        reader.projection(&inputs.c, segment.sequence, tile, group, &mut self.c);
        let Self { delta, input, y, .. } = self;
        isa.run(Stage { reader, sequence: segment.sequence, tile, unit, stride: STRIDE, u: None, delta, input, y });
    }

    /// Runs the recurrence through the tile for block `i` of the unit.
    fn advance(
        &mut self,
        isa: Isa,
        parameters: &BlockParameters,
        i: usize,
        steps: usize,
        states: &mut States,
        ahead: [Ahead; 3],
    ) {
        let rows = i * STRIDE..i * STRIDE + steps;
        Advance {
            tile: parameters.tile(&self.b, &self.c, &self.delta[rows.clone()], &self.input[rows.clone()]),
            h: &mut states.h,
            lost: &mut states.lost,
            y: &mut self.y[rows],
            ahead,
        }
        .on(isa);
    }
}

/// The states of one block as they are carried from tile to tile.
struct States {
    h: Vec<Row>,
    lost: Vec<Row>,
}

impl States {
    fn new(d_state: usize) -> Self {
        Self { h: vec![Row::ZERO; d_state], lost: vec![Row::ZERO; d_state] }
    }
}

struct Pass<'p, 'a, T: Element> {
    isa: Isa,
    reader: Reader<'p, 'a, T>,
    /// The state before each segment, `(segments, d_state, d_inner)`, if there are more segments than sequences.
    entry_states: Option<&'p [f32]>,
    out: Shared<'p, T>,
    final_state: Option<Shared<'p, f32>>,
    checkpoints: Option<Shared<'p, f32>>,
}

impl<T: Element> Pass<'_, '_, T> {
    fn run_unit(&self, unit: &[Block], run: &[Segment], scratch: &mut Scratch) {
        let d_state = self.reader.problem.dims.d_state;
        let unit: Vec<_> = unit.iter().map(|&block| BlockParameters::read(&self.reader, block)).collect();
        let mut states: Vec<_> = unit.iter().map(|_| States::new(d_state)).collect();
        for segment in run {
            for (states, parameters) in states.iter_mut().zip(&unit) {
                self.enter(segment, parameters.block, &mut states.h);
                states.lost.fill(Row::ZERO);
            }
            for (first, steps) in segment.tiles(TILE) {
                scratch.stage(self.isa, &self.reader, segment, (first, steps), &unit);
                for (i, (states, parameters)) in states.iter_mut().zip(&unit).enumerate() {
                    self.keep_checkpoint(segment, first, parameters.block, &states.h);
                    let ahead = self.ahead(segment, (first, steps), parameters.block);
                    scratch.advance(self.isa, parameters, i, steps, states, ahead);
                }
                let finish = Finish { pass: self, sequence: segment.sequence, first, steps, unit: &unit, scratch };
                self.isa.run(finish);
            }
            if segment.ends_sequence() {
                for (states, parameters) in states.iter().zip(&unit) {
                    self.leave(segment, parameters.block, &states.h);
                }
            }
        }
    }

    /// What will be read for this block to finish the tile and to stage the next.
    fn ahead(&self, segment: &Segment, (first, steps): (usize, usize), block: Block) -> [Ahead; 3] {
        let (inputs, sequence) = (&self.reader.problem.inputs, segment.sequence);
        [
            inputs.z.map_or(Ahead::NONE, |z| self.reader.ahead(&z, sequence, first, block)),
            self.reader.ahead(&inputs.u, sequence, first + steps, block),
            self.reader.ahead(&inputs.delta, sequence, first + steps, block),
        ]
    }

    /// The state before a segment.
    fn enter(&self, segment: &Segment, block: Block, h: &mut [Row]) {
        match self.entry_states {
            Some(states) => state_rows(states, segment.index, self.reader.problem.dims.d_inner, block, h),
            None => {
                let initial = &self.reader.problem.inputs.initial_state;
                self.reader.state(initial, segment.sequence, block, h);
            }
        }
    }

    fn keep_checkpoint(&self, segment: &Segment, first: usize, block: Block, h: &[Row]) {
        let Some(checkpoints) = &self.checkpoints else { return };
        let every = self.reader.problem.checkpoint_steps();
        if first == 0 || !first.is_multiple_of(every) {
            return;
        }
        let slot = segment.sequence.checkpoint_slot(first, every);
        for (n, row) in h.iter().enumerate() {
            let at = (slot * h.len() + n) * self.reader.problem.dims.d_inner + block.first;
            // SAFETY: this task alone works on this tile of these channels, and slots of different tiles differ.
            row.narrow(unsafe { checkpoints.part(at..at + block.width) });
        }
    }

    fn leave(&self, segment: &Segment, block: Block, h: &[Row]) {
        let Some(states) = &self.final_state else { return };
        let at = (segment.sequence.index * self.reader.problem.dims.d_inner + block.first) * h.len();
        // SAFETY: this task alone works on the last segment of this sequence for these channels.
        let states = unsafe { states.part(at..at + block.width * h.len()) };
        transpose(h, states);
    }
}

/// Applies the gate and writes a tile, row by row.
struct Finish<'t, 'p, 'a, T: Element> {
    pass: &'t Pass<'p, 'a, T>,
    sequence: Sequence,
    first: usize,
    steps: usize,
    unit: &'t [BlockParameters],
    scratch: &'t Scratch,
}

impl<T: Element> Kernel for Finish<'_, '_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let (reader, scratch) = (&self.pass.reader, self.scratch);
        let Problem { inputs, dims, .. } = reader.problem;
        let mut gate = Row::ZERO;
        for t in 0..self.steps {
            let step = reader.step(self.sequence, self.first + t);
            for (i, parameters) in self.unit.iter().enumerate() {
                let block = parameters.block;
                let mut out = scratch.y[i * STRIDE + t];
                if let Some(z) = &inputs.z {
                    z.read_row([self.sequence.batch, step, block.first], block.width, &mut gate);
                    for (out, z) in out.vectors_mut::<S>().iter_mut().zip(gate.vectors::<S>()) {
                        *out = simd.mul_f32s(*out, silu(simd, *z));
                    }
                }
                let at = (self.sequence.batch * dims.len + step) * dims.d_inner + block.first;
                // SAFETY: this task alone works on these steps and channels.
                out.narrow(unsafe { self.pass.out.part(at..at + block.width) });
            }
        }
    }
}

/// Writes rows of channels as `(channels, d_state)`, as many channels as there is room for.
pub(super) fn transpose(rows: &[Row], out: &mut [f32]) {
    for (i, out) in out.chunks_exact_mut(rows.len()).enumerate() {
        for (out, row) in out.iter_mut().zip(rows) {
            *out = row.0[i];
        }
    }
}

/// The state before each segment, `(segments, d_state, d_inner)`.
fn entry_states<T: Element>(isa: Isa, problem: &Problem<T>, plan: &Plan) -> Vec<f32> {
    let reader = Reader { problem };
    let chunk_states = ChunkStates::new(problem, plan, |parameters, segment, h| {
        let mut scratch = Scratch::new(problem.dims.d_state, 1);
        let (mut sum, mut states) = (Sum::ZERO, States::new(h.len()));
        // What a sequence ends with is not handed on.
        if !segment.ends_sequence() {
            for (first, steps) in segment.tiles(TILE) {
                scratch.stage(isa, &reader, segment, (first, steps), std::slice::from_ref(parameters));
                scratch.advance(isa, parameters, 0, steps, &mut states, [Ahead::NONE; 3]);
                isa.run(SumRows { rows: &scratch.delta[..steps], sum: &mut sum });
            }
        }
        h.copy_from_slice(&states.h);
        sum.total
    });
    chunk_states.chain(isa, plan.segments.iter(), |segment, block, h| {
        reader.state(&problem.inputs.initial_state, segment.sequence, block, h);
    })
}
