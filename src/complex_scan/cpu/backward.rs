//! The backward pass.

use rayon::prelude::*;

use super::block::{Block, Channels, Coefficients, Step, advance, decay, read_out};
use super::math::{LANES, Wide, WideNumber};
use super::{GradientsMut, OutputGradients, Problem, TASKS};
use crate::arguments::{reserved, zeroed};
use crate::kinds::ProjectionOf;
use crate::reference::{silu, silu_slope};
use crate::sequences::{CHECKPOINT_STEPS, Sequence};
use crate::shared::Shared;
use crate::simd::{Isa, Kernel, Lanes};
use crate::{Element, Result};

/// Runs of sequences that are worked on at once, at most.
const RUNS: usize = 8;

pub(super) fn run<T: Element>(
    isa: Isa,
    problem: &Problem<T>,
    d_outputs: OutputGradients<T>,
    gradients: GradientsMut<T>,
) -> Result<()> {
    let sizes = problem.sizes;
    // Batch rows without a step could be more than can be listed.
    let count = if sizes.length == 0 && gradients.initial_state.is_none() { 0 } else { sizes.sequences };
    let mut sequences = reserved("u", &problem.inputs.u.shape, count)?;
    sequences.extend(problem.sequences.iter().take(count));
    let runs: Vec<&[Sequence]> = sequences.chunks(count.div_ceil(RUNS).max(1)).collect();
    let per_group = Block::count(sizes.group_channels());
    let parts = (TASKS / (runs.len() * sizes.groups).max(1)).clamp(1, per_group);
    let mut tasks = Vec::new();
    for (run, sequences) in runs.iter().enumerate() {
        for group in 0..sizes.groups {
            for part in 0..parts {
                let blocks = part * per_group / parts..(part + 1) * per_group / parts;
                tasks.push((run, *sequences, group, blocks));
            }
        }
    }
    let pass = Pass {
        isa,
        problem,
        d_outputs,
        d_u: Shared::new(gradients.u),
        d_delta: Shared::new(gradients.delta),
        d_z: gradients.z.map(Shared::new),
        d_initial_state: gradients.initial_state.map(Shared::new),
    };
    let done: Vec<Done> = tasks
        .into_par_iter()
        .map(|(run, sequences, group, blocks)| pass.run_task(run, sequences, group, blocks))
        .collect::<Result<_>>()?;
    // What follows is in the order of the tasks, whoever has done them.
    let mut totals: Vec<Sums> = reserved("a", &problem.inputs.a.shape, sizes.groups * per_group)?;
    totals.extend((0..sizes.groups * per_group).map(|_| Sums::zeros(sizes.d_state)));
    for task in &done {
        for (index, sums) in task.blocks.clone().zip(&task.sums) {
            totals[task.group * per_group + index].add(sums);
        }
    }
    let a = gradients.a;
    let (mut b, mut c) = (gradients.b, gradients.c);
    let (mut d, mut bias) = (gradients.d, gradients.delta_bias);
    for (index, total) in totals.iter().enumerate() {
        let block = Block::of_group(sizes.group_channels(), index / per_group, index % per_group);
        total.write(&total.a, block, a);
        if let ProjectionOf::Constant(b) = &mut b {
            total.write(&total.b, block, b);
        }
        if let ProjectionOf::Constant(c) = &mut c {
            total.write(&total.c, block, c);
        }
        for (to, wide) in [(&mut d, &total.d), (&mut bias, &total.bias)] {
            if let Some(to) = to {
                for (to, x) in to[block.first..][..block.width].iter_mut().zip(wide.0) {
                    *to = x as f32;
                }
            }
        }
    }
    for (to, first) in [(b, 0), (c, 2 * sizes.d_state)] {
        if let ProjectionOf::Varying(to) = to {
            write_projection(problem, &done, &runs, first, to);
        }
    }
    Ok(())
}

/// Writes the gradient of a projection that varies, the sum over the tasks of a group.
fn write_projection<T: Element>(problem: &Problem<T>, done: &[Done], runs: &[&[Sequence]], first: usize, to: &mut [T]) {
    let sizes = problem.sizes;
    let states = 2 * sizes.d_state;
    let (mut sum, mut narrow) = (vec![0.0f64; states], vec![0.0f32; states]);
    for (run, sequences) in runs.iter().enumerate() {
        let mut offset = 0;
        for &sequence in *sequences {
            for i in 0..sequence.len {
                let t = sequence.step(i, problem.inputs.options.reverse);
                for group in 0..sizes.groups {
                    sum.fill(0.0);
                    for task in done.iter().filter(|task| task.run == run && task.group == group) {
                        let row = &task.projections[(offset + i) * 2 * states + first..][..states];
                        for (sum, x) in sum.iter_mut().zip(row) {
                            *sum += x;
                        }
                    }
                    for (narrow, sum) in narrow.iter_mut().zip(&sum) {
                        *narrow = *sum as f32;
                    }
                    let at = ((sequence.batch * sizes.length + t) * sizes.groups + group) * states;
                    T::narrow(&narrow, &mut to[at..at + states]);
                }
            }
            offset += sequence.len;
        }
    }
}

/// What a block adds to the gradients of its parameters.
struct Sums {
    a: Vec<WideNumber>,
    b: Vec<WideNumber>,
    c: Vec<WideNumber>,
    d: Wide,
    bias: Wide,
}

impl Sums {
    fn zeros(d_state: usize) -> Self {
        let zeros = || vec![WideNumber::ZERO; d_state];
        Self { a: zeros(), b: zeros(), c: zeros(), d: Wide::ZERO, bias: Wide::ZERO }
    }

    fn add(&mut self, other: &Self) {
        let pairs = [(&mut self.a, &other.a), (&mut self.b, &other.b), (&mut self.c, &other.c)];
        for (to, from) in pairs.into_iter().flat_map(|(to, from)| to.iter_mut().zip(from)) {
            add(&mut to.re, &from.re);
            add(&mut to.im, &from.im);
        }
        add(&mut self.d, &other.d);
        add(&mut self.bias, &other.bias);
    }

    fn write(&self, numbers: &[WideNumber], block: Block, to: &mut [f32]) {
        for (i, to) in
            to[block.first * 2 * numbers.len()..].chunks_exact_mut(2 * numbers.len()).enumerate().take(block.width)
        {
            for (to, number) in to.as_chunks_mut::<2>().0.iter_mut().zip(numbers) {
                *to = [number.re.0[i] as f32, number.im.0[i] as f32];
            }
        }
    }
}

#[inline(always)]
fn add(to: &mut Wide, from: &Wide) {
    for (to, from) in to.0.iter_mut().zip(from.0) {
        *to += from;
    }
}

/// What a task leaves to be summed up.
struct Done {
    run: usize,
    group: usize,
    blocks: std::ops::Range<usize>,
    /// By block.
    sums: Vec<Sums>,
    /// By step of the run, what its channels add to the gradients of `B` and then of `C`; nothing if neither varies.
    projections: Vec<f64>,
}

struct Pass<'p, 'a, T: Element> {
    isa: Isa,
    problem: &'p Problem<'a, T>,
    d_outputs: OutputGradients<'p, T>,
    d_u: Shared<'p, T>,
    d_delta: Shared<'p, T>,
    d_z: Option<Shared<'p, T>>,
    d_initial_state: Option<Shared<'p, f32>>,
}

impl<T: Element> Pass<'_, '_, T> {
    fn run_task(
        &self,
        run: usize,
        sequences: &[Sequence],
        group: usize,
        blocks: std::ops::Range<usize>,
    ) -> Result<Done> {
        let (problem, sizes) = (self.problem, self.problem.sizes);
        let varies = problem.inputs.b.varying().is_some() || problem.inputs.c.varying().is_some();
        let steps: usize = sequences.iter().map(|sequence| sequence.len).sum();
        let mut projections = zeroed("b", &[if varies { steps } else { 0 }, 4 * sizes.d_state])?;
        let mut sums = Vec::new();
        for index in blocks.clone() {
            let block = Block::of_group(sizes.group_channels(), group, index);
            let mut work = Work::new(Channels::new(problem, block), sizes.d_state);
            let mut offset = 0;
            for &sequence in sequences {
                let first = if varies { offset * 4 * sizes.d_state } else { 0 };
                work.channels.read_states(&problem.inputs.initial_state, sequence, &mut work.states);
                work.channels.read_states(&self.d_outputs.d_final_state, sequence, &mut work.d_states);
                work = self.isa.run(Sequenced { pass: self, work, sequence, projections: &mut projections[first..] });
                if let Some(state) = &self.d_initial_state {
                    // SAFETY: this task alone works on this sequence for these channels.
                    let to = unsafe { state.part(work.channels.state_range(sequence)) };
                    work.channels.write_states(&work.d_states, to);
                }
                offset += sequence.len;
            }
            sums.push(work.sums);
        }
        Ok(Done { run, group, blocks, sums, projections })
    }
}

/// A block's channels, and what is known of them.
struct Work<'p, 'a, T: Element> {
    channels: Channels<'p, 'a, T>,
    /// The states that are carried forward, and the slopes by them, which are carried back.
    states: Vec<WideNumber>,
    d_states: Vec<WideNumber>,
    /// The states before each chunk of a sequence, and those before each step of a chunk and after its last.
    checkpoints: Vec<WideNumber>,
    history: Vec<WideNumber>,
    sums: Sums,
}

impl<'p, 'a, T: Element> Work<'p, 'a, T> {
    fn new(channels: Channels<'p, 'a, T>, d_state: usize) -> Self {
        let zeros = |count: usize| vec![WideNumber::ZERO; count * d_state];
        Self {
            channels,
            states: zeros(1),
            d_states: zeros(1),
            checkpoints: Vec::new(),
            history: zeros(CHECKPOINT_STEPS + 1),
            sums: Sums::zeros(d_state),
        }
    }
}

/// One sequence of a block.
struct Sequenced<'t, 'q, 'p, 'a, T: Element> {
    pass: &'t Pass<'q, 'a, T>,
    work: Work<'p, 'a, T>,
    sequence: Sequence,
    /// From the sequence's first step on.
    projections: &'t mut [f64],
}

impl<'p, 'a, T: Element> Kernel for Sequenced<'_, '_, 'p, 'a, T> {
    type Output = Work<'p, 'a, T>;

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) -> Self::Output {
        let Self { pass, mut work, sequence, projections } = self;
        let (reverse, count) = (pass.problem.inputs.options.reverse, work.states.len());
        work.checkpoints.clear();
        for i in 0..sequence.len {
            if i % CHECKPOINT_STEPS == 0 {
                work.checkpoints.extend_from_slice(&work.states);
            }
            let step = work.channels.read(sequence, sequence.step(i, reverse));
            advance(&work.channels.a, &work.channels.b, &step, &mut work.states);
        }
        for chunk in (0..sequence.len.div_ceil(CHECKPOINT_STEPS)).rev() {
            let first = chunk * CHECKPOINT_STEPS;
            let steps = CHECKPOINT_STEPS.min(sequence.len - first);
            work.states.copy_from_slice(&work.checkpoints[chunk * count..][..count]);
            work.history[..count].copy_from_slice(&work.states);
            for k in 0..steps {
                let step = work.channels.read(sequence, sequence.step(first + k, reverse));
                advance(&work.channels.a, &work.channels.b, &step, &mut work.states);
                work.history[(k + 1) * count..][..count].copy_from_slice(&work.states);
            }
            for k in (0..steps).rev() {
                let i = first + k;
                let row =
                    if projections.is_empty() { &mut [][..] } else { &mut projections[i * 4 * count..][..4 * count] };
                pass.step_back(&mut work, sequence, sequence.step(i, reverse), k, row);
            }
        }
        work
    }
}

impl<T: Element> Pass<'_, '_, T> {
    /// Goes back through step `t`, the `k`-th of a chunk whose states are known. `row` is the step's of the projections.
    #[inline(always)]
    fn step_back(&self, work: &mut Work<T>, sequence: Sequence, t: usize, k: usize, row: &mut [f64]) {
        let (inputs, count) = (&self.problem.inputs, work.states.len());
        let step = work.channels.read(sequence, t);
        let mut d_y = work.channels.row(&self.d_outputs.d_out, sequence, t);
        let range = work.channels.range(sequence, t);
        let write = |to: &Shared<T>, x: &Wide| {
            // SAFETY: one task alone works on these steps and channels.
            T::narrow(&x.0.map(|x| x as f32)[..range.len()], unsafe { to.part(range.clone()) });
        };
        if let (Some(z), Some(d_z)) = (&inputs.z, &self.d_z) {
            let z = work.channels.row(z, sequence, t);
            let after = &work.history[(k + 1) * count..][..count];
            let skip = inputs.d.is_some().then_some(&work.channels.d);
            let y = read_out(&work.channels.c, skip, &step, after);
            write(d_z, &Wide(std::array::from_fn(|i| d_y.0[i] * y.0[i] * silu_slope(z.0[i]))));
            for i in 0..LANES {
                d_y.0[i] *= silu(z.0[i]);
            }
        }
        let (d_u, d_delta) = back_through_states(work, &step, &d_y, k, row);
        let d_u = Wide(std::array::from_fn(|i| {
            d_u.0[i] + if inputs.d.is_some() { work.channels.d.0[i] * d_y.0[i] } else { 0.0 }
        }));
        let d_delta = Wide(std::array::from_fn(|i| d_delta.0[i] * step.slope.0[i]));
        write(&self.d_u, &d_u);
        write(&self.d_delta, &d_delta);
        add(&mut work.sums.bias, &d_delta);
        add(&mut work.sums.d, &Wide(std::array::from_fn(|i| d_y.0[i] * step.u.0[i])));
    }
}

/// The slopes by `u` and by `Δ` through the states; those by the states, by `A`, `B` and `C` are brought up to date.
#[inline(always)]
fn back_through_states<T: Element>(
    work: &mut Work<T>,
    step: &Step,
    d_y: &Wide,
    k: usize,
    row: &mut [f64],
) -> (Wide, Wide) {
    let (count, width) = (work.states.len(), work.channels.block.width);
    let (mut d_u, mut d_delta) = (Wide::ZERO, Wide::ZERO);
    let is_constant = |one: &Coefficients| matches!(one, Coefficients::Constant(_));
    let (b_is_constant, c_is_constant) = (is_constant(&work.channels.b), is_constant(&work.channels.c));
    for n in 0..count {
        let (a, b, c) = (work.channels.a[n], work.channels.b.at(n), work.channels.c.at(n));
        let decay = decay(&a, &step.delta);
        let (before, after) = (work.history[k * count + n], work.history[(k + 1) * count + n]);
        let (mut of_b, mut of_c) = (WideNumber::ZERO, WideNumber::ZERO);
        let (d, of_a) = (&mut work.d_states[n], &mut work.sums.a[n]);
        for i in 0..LANES {
            let (delta, u, twice) = (step.delta.0[i], step.u.0[i], 2.0 * d_y.0[i]);
            // As slopes by the real and by the imaginary part: where y = w x, that by x is that by y times w̄.
            let [re, im] = [d.re.0[i] + c.re.0[i] * twice, d.im.0[i] - c.im.0[i] * twice];
            (of_c.re.0[i], of_c.im.0[i]) = (after.re.0[i] * twice, -after.im.0[i] * twice);
            (of_b.re.0[i], of_b.im.0[i]) = (re * (delta * u), im * (delta * u));
            let through_input = re * b.re.0[i] + im * b.im.0[i];
            d_u.0[i] += through_input * delta;
            // d conj(exp(ΔA)), which is also what goes on to the state before.
            let [p, q] = [re * decay.re.0[i] + im * decay.im.0[i], im * decay.re.0[i] - re * decay.im.0[i]];
            let exponent = [p * before.re.0[i] + q * before.im.0[i], q * before.re.0[i] - p * before.im.0[i]];
            d_delta.0[i] += through_input * u + exponent[0] * a.re.0[i] + exponent[1] * a.im.0[i];
            of_a.re.0[i] += exponent[0] * delta;
            of_a.im.0[i] += exponent[1] * delta;
            (d.re.0[i], d.im.0[i]) = (p, q);
        }
        for (is_constant, of, sums, first) in
            [(b_is_constant, &of_b, &mut work.sums.b[n], 0), (c_is_constant, &of_c, &mut work.sums.c[n], 2 * count)]
        {
            if is_constant {
                add(&mut sums.re, &of.re);
                add(&mut sums.im, &of.im);
            } else {
                row[first + 2 * n] += of.re.0[..width].iter().sum::<f64>();
                row[first + 2 * n + 1] += of.im.0[..width].iter().sum::<f64>();
            }
        }
    }
    (d_u, d_delta)
}
