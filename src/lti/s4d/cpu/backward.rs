//! The backward pass.
//!
//! With `dy_t` the slope by an output, `Λ` that by the state after a chunk, the slopes of a chunk are
//!
//! ```text
//! dX  = (Ā^16)ᵀ Λ + Σ_t G_t dy_t         which is Λ of the chunk before
//! du_j = Σ_{t>=j} K_{t-j} dy_t + H_j · Λ
//! dG_t = dy_t X     dH_j = u_j Λ     dK_k = Σ_t dy_t u_{t-k}     dĀ^16 = Λ ⊗ X
//! ```
//!
//! The last line is summed up over the chunks: in `f32` over the groups of a run of [`GROUPS`], then in `f64`.

use num_complex::Complex64;
use rayon::prelude::*;

use super::forward::GroupScratch;
use super::products::Tiles;
use super::tables::Tables;
use super::{Block, CHUNK, GROUP, GradientsMut, Group, OutputGradients, Problem, Wide, all_sequences, blocks, runs};
use crate::lti::s4d::discrete::Slopes;
use crate::sequences::Sequence;
use crate::shared::Shared;
use crate::simd::{BLOCK, Isa, Kernel, Lanes, Row};
use crate::{Element, Result};

/// Groups whose sums are added up in `f32`: of 64 chunks.
const GROUPS: usize = 8;

pub(super) fn run<T: Element>(
    isa: Isa,
    problem: &Problem<T>,
    d_outputs: OutputGradients<T>,
    mut gradients: GradientsMut<T>,
) -> Result<()> {
    let sequences = all_sequences(problem, gradients.initial_state.is_some())?;
    let (runs, blocks) = (runs(&sequences), blocks(problem.sizes.d_inner));
    let tables: Vec<Transposed> = if runs.is_empty() {
        Vec::new()
    } else {
        blocks.par_iter().map(|&block| Transposed::new(Tables::new(problem, block))).collect()
    };
    let pass = Pass {
        isa,
        problem,
        d_outputs,
        d_u: Shared::new(gradients.u),
        d_initial_state: gradients.initial_state.map(Shared::new),
    };
    let sums: Vec<Sums> = (0..runs.len() * blocks.len())
        .into_par_iter()
        .map_init(Vec::new, |checkpoints, task| {
            let at = task % blocks.len();
            pass.run_block(&tables[at], blocks[at], runs[task / blocks.len()], checkpoints)
        })
        .collect();
    let d_state = problem.sizes.d_state;
    for (at, block) in blocks.iter().enumerate() {
        let mut total = Sums::zeros(d_state);
        for sums in sums.iter().skip(at).step_by(blocks.len()) {
            total.add(sums);
        }
        for i in 0..block.width {
            let channel = block.first + i;
            let delta = problem.delta(channel);
            let mut d_log_delta = 0.0;
            for n in 0..d_state {
                let slopes = problem.pair(channel, n).backward(delta, problem.inputs.options.rule, &total.pairs[n][i]);
                let to = (channel * d_state + n) * 2;
                for (buffer, d) in
                    [(&mut *gradients.a, slopes.a), (&mut *gradients.b, slopes.b), (&mut *gradients.c, slopes.c)]
                {
                    buffer[to..to + 2].copy_from_slice(&[d.re as f32, d.im as f32]);
                }
                d_log_delta += slopes.log_delta;
            }
            gradients.log_delta[channel] = d_log_delta as f32;
            if let Some(d) = &mut gradients.d {
                d[channel] = total.d.0[i] as f32;
            }
        }
    }
    Ok(())
}

/// The matrices of a block in both directions.
struct Transposed {
    tables: Tables,
    g: Tiles,
    h: Tiles,
}

impl Transposed {
    fn new(tables: Tables) -> Self {
        let (g, h) = (tables.g.transposed(), tables.h.transposed());
        Self { tables, g, h }
    }
}

/// The slopes by what becomes of a block's parameters, summed up over sequences.
struct Sums {
    /// By pair and channel.
    pairs: Vec<[Slopes; BLOCK]>,
    d: Wide,
}

impl Sums {
    fn zeros(d_state: usize) -> Self {
        Self { pairs: vec![[Slopes::default(); BLOCK]; d_state], d: Wide::ZERO }
    }

    fn add(&mut self, other: &Self) {
        for (to, from) in self.pairs.as_flattened_mut().iter_mut().zip(other.pairs.as_flattened()) {
            to.a += from.a;
            to.b += from.b;
            to.c += from.c;
        }
        for (to, from) in self.d.0.iter_mut().zip(other.d.0) {
            *to += from;
        }
    }
}

struct Pass<'p, 'a, T: Element> {
    isa: Isa,
    problem: &'p Problem<'a, T>,
    d_outputs: OutputGradients<'p, T>,
    d_u: Shared<'p, T>,
    d_initial_state: Option<Shared<'p, f32>>,
}

impl<T: Element> Pass<'_, '_, T> {
    /// Works through a run of sequences.
    fn run_block(&self, tables: &Transposed, block: Block, run: &[Sequence], checkpoints: &mut Vec<Wide>) -> Sums {
        let rows = tables.tables.rows;
        let mut scratch = Scratch::new(rows);
        for &sequence in run {
            let initial = &self.problem.inputs.initial_state;
            self.problem.read_state(initial, sequence, block, &mut scratch.state);
            checkpoints.clear();
            let (problem, forward) = (self.problem, &tables.tables);
            self.isa.run(Forward { problem, tables: forward, sequence, block, scratch: &mut scratch, checkpoints });
            self.problem.read_state(&self.d_outputs.d_final_state, sequence, block, &mut scratch.d_state);
            for index in (0..sequence.len.div_ceil(GROUP * CHUNK)).rev() {
                let group = Group::new(sequence, index);
                let before = &checkpoints[index * rows..][..rows];
                self.isa.run(Backward { pass: self, tables, group, block, before, scratch: &mut scratch });
                scratch.groups += 1;
                if scratch.groups == GROUPS {
                    scratch.flush();
                }
            }
            if let Some(state) = &self.d_initial_state {
                // SAFETY: this task alone works on this sequence for these channels.
                let to = unsafe { state.part(self.problem.state_range(sequence, block)) };
                self.problem.write_state(&scratch.d_state, to);
            }
        }
        scratch.flush();
        scratch.finish(&tables.tables)
    }
}

/// Buffers and sums of one task.
struct Scratch {
    group: GroupScratch,
    /// The state that is carried forward, by row.
    state: Vec<Wide>,
    /// The slope by the state, which is carried back.
    d_state: Vec<Wide>,
    dy: Vec<Row>,
    d_u: Vec<Row>,
    /// By chunk, the slope by the state after it.
    d_after: Vec<Row>,
    /// The groups whose sums are in `f32`.
    groups: usize,
    d_g: Tiles,
    d_h: Tiles,
    d_kernel: [Row; CHUNK],
    /// The same over all groups.
    all_g: Vec<Wide>,
    all_h: Vec<Wide>,
    all_kernel: [Wide; CHUNK],
    /// The slope by `Ā^16`, and by `Ā` through the powers of tails, by row.
    d_power: Vec<Wide>,
    d_tails: Vec<Wide>,
}

impl Scratch {
    fn new(rows: usize) -> Self {
        let (steps, wide) = (|| vec![Row::ZERO; GROUP * CHUNK], |count: usize| vec![Wide::ZERO; count]);
        Self {
            group: GroupScratch::new(rows),
            state: wide(rows),
            d_state: wide(rows),
            dy: steps(),
            d_u: steps(),
            d_after: vec![Row::ZERO; GROUP * rows],
            groups: 0,
            d_g: Tiles::zeros(rows, CHUNK),
            d_h: Tiles::zeros(CHUNK, rows),
            d_kernel: [Row::ZERO; CHUNK],
            all_g: wide(rows * CHUNK),
            all_h: wide(rows * CHUNK),
            all_kernel: [Wide::ZERO; CHUNK],
            d_power: wide(rows),
            d_tails: wide(rows),
        }
    }

    /// Adds what was summed up in `f32` to the sums over all groups.
    fn flush(&mut self) {
        if self.groups == 0 {
            return;
        }
        let rows = self.d_power.len();
        let add = |to: &mut Wide, from: &Row| {
            for (to, from) in to.0.iter_mut().zip(from.0) {
                *to += f64::from(from);
            }
        };
        for row in 0..rows {
            for k in 0..CHUNK {
                add(&mut self.all_g[row * CHUNK + k], self.d_g.at(row, k));
                add(&mut self.all_h[row * CHUNK + k], self.d_h.at(k, row));
            }
        }
        for (to, from) in self.all_kernel.iter_mut().zip(&self.d_kernel) {
            add(to, from);
        }
        self.d_g.fill_zero();
        self.d_h.fill_zero();
        self.d_kernel = [Row::ZERO; CHUNK];
        self.groups = 0;
    }

    /// The slopes by `Ā`, `B̄` and `C` from those by the matrices that are made of them.
    fn finish(&self, tables: &Tables) -> Sums {
        let mut sums = Sums::zeros(tables.pairs.len());
        sums.d = self.all_kernel[0];
        for (n, pairs) in tables.pairs.iter().enumerate() {
            for (i, pair) in pairs.iter().enumerate() {
                let number = |at: &[Wide], stride: usize, k: usize, sign: f64| {
                    let part = |row: usize| at[row * stride + k].0[i];
                    Complex64::new(part(2 * n), sign * part(2 * n + 1))
                };
                let power = |k: usize| number(tables.power(k), 1, 0, 1.0);
                let slopes = &mut sums.pairs[n][i];
                slopes.a = number(&self.d_tails, 1, 0, 1.0)
                    + number(&self.d_power, 1, 0, 1.0) * (CHUNK as f64 * power(CHUNK - 1)).conj();
                for k in 0..CHUNK {
                    // The slope of a power: of the first there is none.
                    let slope = if k == 0 { Complex64::ZERO } else { k as f64 * power(k - 1) };
                    // G_k = 2 C Ā^{k+1}, whose imaginary part is stored with the other sign.
                    let d_g = 2.0 * number(&self.all_g, CHUNK, k, -1.0);
                    slopes.c += d_g * power(k + 1).conj();
                    slopes.a += d_g * ((k + 1) as f64 * pair.c * power(k)).conj();
                    // H_{15-k} = Ā^k B̄.
                    let d_h = number(&self.all_h, CHUNK, CHUNK - 1 - k, 1.0);
                    slopes.b += d_h * power(k).conj();
                    slopes.a += d_h * (slope * pair.b).conj();
                    // K_k = 2 Re(C Ā^k B̄).
                    let d_kernel = 2.0 * self.all_kernel[k].0[i];
                    slopes.c += d_kernel * (power(k) * pair.b).conj();
                    slopes.b += d_kernel * (power(k) * pair.c).conj();
                    slopes.a += d_kernel * (slope * pair.b * pair.c).conj();
                }
            }
        }
        sums
    }
}

/// The states before each group of a sequence.
struct Forward<'t, 'a, T: Element> {
    problem: &'t Problem<'a, T>,
    tables: &'t Tables,
    sequence: Sequence,
    block: Block,
    scratch: &'t mut Scratch,
    checkpoints: &'t mut Vec<Wide>,
}

impl<T: Element> Kernel for Forward<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { problem, tables, sequence, block, scratch, checkpoints } = self;
        for index in 0..sequence.len.div_ceil(GROUP * CHUNK) {
            let group = Group::new(sequence, index);
            checkpoints.extend_from_slice(&scratch.state);
            // What the last group leaves is not needed.
            if group.first + group.len < sequence.len {
                problem.stage(&problem.inputs.u, group, block, &mut scratch.group.u);
                scratch.group.advance(simd, tables, group, &mut scratch.state);
            }
        }
    }
}

/// One group of a sequence for a block of channels.
struct Backward<'t, 'p, 'a, T: Element> {
    pass: &'t Pass<'p, 'a, T>,
    tables: &'t Transposed,
    group: Group,
    block: Block,
    /// The state before it.
    before: &'t [Wide],
    scratch: &'t mut Scratch,
}

impl<T: Element> Kernel for Backward<'_, '_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { pass, tables: Transposed { tables, g, h }, group, block, before, scratch } = self;
        let (problem, chunks, rows) = (pass.problem, group.chunks(), tables.rows);
        problem.stage(&problem.inputs.u, group, block, &mut scratch.group.u);
        problem.stage(&pass.d_outputs.d_out, group, block, &mut scratch.dy);
        scratch.state.copy_from_slice(before);
        scratch.group.advance(simd, tables, group, &mut scratch.state);
        g.multiply(simd, &scratch.dy, &mut scratch.d_after, chunks);
        for chunk in (0..chunks).rev() {
            let at = chunk * rows..(chunk + 1) * rows;
            let (states, d_after) = (&scratch.group.states[at.clone()], &mut scratch.d_after[at]);
            let tail = if (chunk + 1) * CHUNK > group.len { group.tail() } else { CHUNK };
            if tail == CHUNK {
                add_power_slope(&scratch.d_state, states, &mut scratch.d_power);
            } else {
                let mut slope = [Wide::ZERO; 2];
                for n in 0..rows / 2 {
                    slope.fill(Wide::ZERO);
                    let pair = 2 * n..2 * n + 2;
                    add_power_slope(&scratch.d_state[pair.clone()], &states[pair.clone()], &mut slope);
                    add_tail_slope(&slope, &tables.power(tail - 1)[pair.clone()], tail, &mut scratch.d_tails[pair]);
                }
            }
            carry_back(tables.power(tail), &mut scratch.d_state, d_after);
        }
        scratch.differentiate(simd, h, &tables.kernel, group);
        for (i, d_u) in scratch.d_u.iter().enumerate().take(group.len) {
            // SAFETY: this task alone works on these steps and channels.
            d_u.narrow(unsafe { pass.d_u.part(problem.activation_range(group, i, block)) });
        }
    }
}

impl Scratch {
    /// The slopes by the inputs and by the matrices, where the states before each chunk and the slopes by those after
    /// it are known.
    #[inline(always)]
    fn differentiate<S: Lanes>(&mut self, simd: S, h: &Tiles, kernel: &[Row; CHUNK], group: Group) {
        let (chunks, whole, rows) = (group.chunks(), group.len / CHUNK, self.d_power.len());
        self.d_g.add_products(simd, &self.group.states, &self.dy, chunks);
        self.d_h.add_products(simd, &self.group.u, &self.d_after, whole);
        h.multiply(simd, &self.d_after, &mut self.d_u, chunks);
        if group.tail() > 0 {
            // Its inputs are at the end of a chunk, as `advance` has left them, and so are their slopes.
            self.d_h.add_products(simd, &self.group.late, &self.d_after[whole * rows..], 1);
            let d_u = &mut self.d_u[whole * CHUNK..][..CHUNK];
            d_u.copy_within(CHUNK - group.tail().., 0);
        }
        for chunk in 0..chunks {
            let at = chunk * CHUNK..(chunk + 1) * CHUNK;
            let (u, dy, d_u) = (&self.group.u[at.clone()], &self.dy[at.clone()], &mut self.d_u[at]);
            let len = if chunk == whole { group.tail() } else { CHUNK };
            differentiate_recent(simd, kernel, (u, dy), d_u, len, &mut self.d_kernel);
        }
    }
}

/// Adds `Λ ⊗ X` for each pair: the slope by a complex number that multiplies `X`.
#[inline(always)]
fn add_power_slope(d_after: &[Wide], states: &[Row], to: &mut [Wide]) {
    let pairs = d_after.chunks_exact(2).zip(states.chunks_exact(2)).zip(to.chunks_exact_mut(2));
    for ((d, x), to) in pairs {
        for i in 0..BLOCK {
            let ([d_re, d_im], [re, im]) = ([d[0].0[i], d[1].0[i]], [x[0].0[i], x[1].0[i]].map(f64::from));
            to[0].0[i] += d_re * re + d_im * im;
            to[1].0[i] += d_im * re - d_re * im;
        }
    }
}

/// Adds the slope by `Ā` through `Ā^len`: that by the power times the conjugate of `len Ā^(len-1)`.
#[inline(always)]
fn add_tail_slope(slope: &[Wide; 2], power: &[Wide], len: usize, to: &mut [Wide]) {
    for i in 0..BLOCK {
        let ([re, im], [p, q]) = ([slope[0].0[i], slope[1].0[i]], [power[0].0[i], power[1].0[i]]);
        to[0].0[i] += len as f64 * (re * p + im * q);
        to[1].0[i] += len as f64 * (im * p - re * q);
    }
}

/// Carries the slope by the state back over a chunk whose outputs add `added` to it; `added` becomes the slope after
/// it.
#[inline(always)]
fn carry_back(power: &[Wide], d_state: &mut [Wide], added: &mut [Row]) {
    let pairs = power.chunks_exact(2).zip(d_state.chunks_exact_mut(2)).zip(added.chunks_exact_mut(2));
    for ((power, d), added) in pairs {
        for i in 0..BLOCK {
            let ([p, q], [x, y]) = ([power[0].0[i], power[1].0[i]], [d[0].0[i], d[1].0[i]]);
            d[0].0[i] = p * x + q * y + f64::from(added[0].0[i]);
            d[1].0[i] = p * y - q * x + f64::from(added[1].0[i]);
            added[0].0[i] = x as f32;
            added[1].0[i] = y as f32;
        }
    }
}

/// The slopes by a chunk's own inputs, and by `K`.
#[inline(always)]
fn differentiate_recent<S: Lanes>(
    simd: S,
    kernel: &[Row; CHUNK],
    (u, dy): (&[Row], &[Row]),
    d_u: &mut [Row],
    len: usize,
    d_kernel: &mut [Row; CHUNK],
) {
    for lane in 0..Row::ZERO.vectors::<S>().len() {
        for j in 0..len {
            let mut sum = d_u[j].vectors::<S>()[lane];
            // Earlier slopes are left out, and not multiplied by zero: they may not be finite.
            for t in j..len {
                sum = simd.fma(kernel[t - j].vectors::<S>()[lane], dy[t].vectors::<S>()[lane], sum);
            }
            d_u[j].vectors_mut::<S>()[lane] = sum;
        }
        for k in 0..len {
            let mut sum = simd.splat_f32s(0.0);
            for t in k..len {
                sum = simd.fma(dy[t].vectors::<S>()[lane], u[t - k].vectors::<S>()[lane], sum);
            }
            let to = &mut d_kernel[k].vectors_mut::<S>()[lane];
            *to = simd.add_f32s(*to, sum);
        }
    }
}
