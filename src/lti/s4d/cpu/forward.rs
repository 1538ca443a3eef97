//! The forward pass.

use rayon::prelude::*;

use super::tables::Tables;
use super::{Block, CHUNK, GROUP, Group, OutputMut, Problem, Wide, all_sequences, blocks, runs};
use crate::sequences::Sequence;
use crate::shared::Shared;
use crate::simd::{Isa, Kernel, Lanes, Row};
use crate::{Element, Result};

pub(super) fn run<T: Element>(isa: Isa, problem: &Problem<T>, outputs: OutputMut<T>) -> Result<()> {
    let sequences = all_sequences(problem, outputs.final_state.is_some())?;
    let runs = runs(&sequences);
    // Without a step there may be more channels than can be listed.
    if runs.is_empty() {
        return Ok(());
    }
    let blocks = blocks(problem.sizes.d_inner);
    let tables: Vec<Tables> = blocks.par_iter().map(|&block| Tables::new(problem, block)).collect();
    let out = Shared::new(outputs.out);
    let final_state = outputs.final_state.map(Shared::new);
    let rows = tables[0].rows;
    (0..runs.len() * blocks.len()).into_par_iter().for_each_init(
        || Scratch::new(rows),
        |scratch, task| {
            let at = task % blocks.len();
            for &sequence in runs[task / blocks.len()] {
                let (block, tables) = (blocks[at], &tables[at]);
                problem.read_state(&problem.inputs.initial_state, sequence, block, &mut scratch.state);
                isa.run(Pass { problem, tables, sequence, block, scratch, out: &out });
                if let Some(state) = &final_state {
                    // SAFETY: this task alone works on this sequence for these channels.
                    let to = unsafe { state.part(problem.state_range(sequence, block)) };
                    problem.write_state(&scratch.state, to);
                }
            }
        },
    );
    Ok(())
}

/// Buffers of one task, used again by the next.
struct Scratch {
    /// The state that is carried, by row.
    state: Vec<Wide>,
    group: GroupScratch,
    y: Vec<Row>,
}

impl Scratch {
    fn new(rows: usize) -> Self {
        Self { state: vec![Wide::ZERO; rows], group: GroupScratch::new(rows), y: vec![Row::ZERO; GROUP * CHUNK] }
    }
}

/// What is known of a group's chunks.
pub(super) struct GroupScratch {
    /// The inputs.
    pub u: Vec<Row>,
    /// The inputs of a tail, at the end of a chunk.
    pub late: [Row; CHUNK],
    /// By chunk, the state before it.
    pub states: Vec<Row>,
}

impl GroupScratch {
    pub fn new(rows: usize) -> Self {
        let states = vec![Row::ZERO; GROUP * rows];
        Self { u: vec![Row::ZERO; GROUP * CHUNK], late: [Row::ZERO; CHUNK], states }
    }

    /// Computes the states before each chunk of a group whose inputs are staged, and carries the state through the
    /// group.
    #[inline(always)]
    pub fn advance<S: Lanes>(&mut self, simd: S, tables: &Tables, group: Group, state: &mut [Wide]) {
        let (rows, whole) = (tables.rows, group.len / CHUNK);
        tables.h.multiply(simd, &self.u, &mut self.states, whole);
        if group.tail() > 0 {
            // The last input of the tail is where that of a whole chunk is.
            let inputs = &self.u[whole * CHUNK..][..group.tail()];
            self.late = [Row::ZERO; CHUNK];
            self.late[CHUNK - group.tail()..].copy_from_slice(inputs);
            tables.h.multiply(simd, &self.late, &mut self.states[whole * rows..], 1);
        }
        for (chunk, left) in self.states.chunks_exact_mut(rows).enumerate().take(group.chunks()) {
            let len = if chunk == whole { group.tail() } else { CHUNK };
            carry(tables.power(len), state, left);
        }
    }
}

/// Carries a state over a chunk whose inputs leave `left`, which becomes the state before.
#[inline(always)]
fn carry(power: &[Wide], state: &mut [Wide], left: &mut [Row]) {
    let pairs = power.chunks_exact(2).zip(state.chunks_exact_mut(2)).zip(left.chunks_exact_mut(2));
    for ((power, state), left) in pairs {
        let ([p, q], [x, y]) = ([&power[0].0, &power[1].0], [state[0].0, state[1].0]);
        for i in 0..x.len() {
            state[0].0[i] = p[i] * x[i] - q[i] * y[i] + f64::from(left[0].0[i]);
            state[1].0[i] = p[i] * y[i] + q[i] * x[i] + f64::from(left[1].0[i]);
            left[0].0[i] = x[i] as f32;
            left[1].0[i] = y[i] as f32;
        }
    }
}

/// One sequence for a block of channels.
struct Pass<'t, 'a, T: Element> {
    problem: &'t Problem<'a, T>,
    tables: &'t Tables,
    sequence: Sequence,
    block: Block,
    scratch: &'t mut Scratch,
    out: &'t Shared<'t, T>,
}

impl<T: Element> Kernel for Pass<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { problem, tables, sequence, block, scratch, out } = self;
        for index in 0..sequence.len.div_ceil(GROUP * CHUNK) {
            let group = Group::new(sequence, index);
            problem.stage(&problem.inputs.u, group, block, &mut scratch.group.u);
            scratch.group.advance(simd, tables, group, &mut scratch.state);
            tables.g.multiply(simd, &scratch.group.states, &mut scratch.y, group.chunks());
            for (u, y) in
                scratch.group.u.chunks_exact(CHUNK).zip(scratch.y.chunks_exact_mut(CHUNK)).take(group.chunks())
            {
                add_recent(simd, &tables.kernel, u, y);
            }
            for (i, y) in scratch.y.iter().enumerate().take(group.len) {
                // SAFETY: this task alone works on these steps and channels.
                y.narrow(unsafe { out.part(problem.activation_range(group, i, block)) });
            }
        }
    }
}

/// Adds to the outputs of a chunk what its own inputs come to.
#[inline(always)]
fn add_recent<S: Lanes>(simd: S, kernel: &[Row; CHUNK], u: &[Row], y: &mut [Row]) {
    for lane in 0..Row::ZERO.vectors::<S>().len() {
        let kernel: [S::f32s; CHUNK] = std::array::from_fn(|k| kernel[k].vectors::<S>()[lane]);
        for t in 0..CHUNK {
            // Later inputs are left out, and not multiplied by zero: they may not be finite.
            let mut sum = y[t].vectors::<S>()[lane];
            for k in 0..=t {
                sum = simd.fma(kernel[k], u[t - k].vectors::<S>()[lane], sum);
            }
            y[t].vectors_mut::<S>()[lane] = sum;
        }
    }
}
