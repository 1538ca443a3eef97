//! The long convolution on the CPU: a channel of a sequence after another, parallel over blocks of channels and runs of
//! sequences. The transforms are realfft's.

use std::sync::Arc;

use rayon::prelude::*;
use realfft::num_complex::Complex32;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};

use super::check::Problem;
use super::{GradientsMut, Inputs};
use crate::arguments::reserved;
use crate::sequences::{Sequence, runs};
use crate::shared::Shared;
use crate::simd::{BLOCK, Row};
use crate::{Element, Result, View};

/// Steps in a task at least.
const STEPS_PER_RUN: usize = 4096;

/// Runs the convolution on the threads of the current rayon pool. `out` is `(batch, length, d_inner)`, dense, and
/// overwritten whole.
///
/// # Errors
/// An argument that does not fit; see [`Inputs`]. Nothing is written then.
pub fn forward<T: Element>(inputs: &Inputs<T>, out: &mut [T]) -> Result<()> {
    forward_checked(&inputs.check()?, out)
}

/// [`forward`] of inputs that have been checked.
pub(crate) fn forward_checked<T: Element>(problem: &Problem<T>, out: &mut [T]) -> Result<()> {
    problem.check_output(out)?;
    let sequences = all_sequences(problem)?;
    let runs = runs(&sequences, |sequence| sequence.len, STEPS_PER_RUN);
    let blocks = problem.sizes.d_inner.div_ceil(BLOCK);
    let out = Shared::new(out);
    (0..runs.len() * blocks).into_par_iter().for_each(|task| {
        let mut pass = Pass::new(problem, task % blocks * BLOCK);
        for &sequence in runs[task / blocks] {
            pass.plan_for(sequence.len);
            pass.read(&problem.inputs.u, sequence, Side::Input);
            pass.each_channel(|channel, plan| {
                plan.transform(&mut channel.input, sequence.len);
                plan.multiply(&channel.input, &channel.kernel, false);
                plan.inverse(&mut channel.input, sequence.len);
            });
            // SAFETY: this task alone works on this sequence for these channels.
            unsafe { pass.write(sequence, &out, Side::Input, &problem.inputs.u) };
        }
    });
    Ok(())
}

/// Computes the gradient of every input that was given, from that of the output, `(batch, length, d_inner)`.
///
/// # Errors
/// An argument that does not fit; see [`Inputs`] and [`GradientsMut`]. Nothing is written then.
pub fn backward<T: Element>(inputs: &Inputs<T>, d_out: View<T, 3>, gradients: GradientsMut<T>) -> Result<()> {
    backward_checked(&inputs.check()?, d_out, gradients)
}

/// [`backward`] of inputs that have been checked.
pub(crate) fn backward_checked<T: Element>(
    problem: &Problem<T>,
    d_out: View<T, 3>,
    mut gradients: GradientsMut<T>,
) -> Result<()> {
    problem.check_backward(&d_out, &gradients)?;
    let sequences = all_sequences(problem)?;
    let runs = runs(&sequences, |sequence| sequence.len, STEPS_PER_RUN);
    let blocks = problem.sizes.d_inner.div_ceil(BLOCK);
    let d_u = Shared::new(gradients.u);
    let sums: Vec<Sums> = (0..runs.len() * blocks)
        .into_par_iter()
        .map(|task| {
            let mut pass = Pass::new(problem, task % blocks * BLOCK);
            let mut sums = Sums::zeros(pass.width, problem.sizes.kernel_length);
            for &sequence in runs[task / blocks] {
                pass.plan_for(sequence.len);
                pass.read(&problem.inputs.u, sequence, Side::Input);
                pass.read(&d_out, sequence, Side::Output);
                pass.add_kernel_slopes(sequence.len, &mut sums);
                // SAFETY: this task alone works on this sequence for these channels.
                unsafe { pass.write(sequence, &d_u, Side::Output, &d_out) };
            }
            sums
        })
        .collect();
    let kernel_length = problem.sizes.kernel_length;
    for channel in 0..problem.sizes.d_inner {
        let of_channel = || sums.iter().skip(channel / BLOCK).step_by(blocks);
        let at = channel % BLOCK * kernel_length;
        let row = &mut gradients.kernel[channel * kernel_length..][..kernel_length];
        for (k, to) in row.iter_mut().enumerate() {
            *to = of_channel().map(|sums| sums.kernel[at + k]).sum::<f64>() as f32;
        }
        if let Some(d) = &mut gradients.d {
            d[channel] = of_channel().map(|sums| sums.d[channel % BLOCK]).sum::<f64>() as f32;
        }
    }
    Ok(())
}

/// All sequences that have steps.
fn all_sequences<T: Element>(problem: &Problem<T>) -> Result<Vec<Sequence>> {
    if problem.sizes.length == 0 {
        return Ok(Vec::new());
    }
    let mut all = reserved("u", &problem.inputs.u.shape, problem.sequences.count())?;
    all.extend(problem.sequences.iter().filter(|sequence| sequence.len > 0));
    Ok(all)
}

/// The slopes by a block's kernels and skip connections, summed up over sequences.
struct Sums {
    kernel: Vec<f64>,
    d: [f64; BLOCK],
}

impl Sums {
    fn zeros(width: usize, kernel_length: usize) -> Self {
        Self { kernel: vec![0.0; width * kernel_length], d: [0.0; BLOCK] }
    }
}

/// Which of a channel's buffers.
#[derive(Clone, Copy)]
enum Side {
    Input,
    Output,
}

/// The numbers of a sequence and their transform.
#[derive(Default)]
struct Signal {
    steps: Vec<f32>,
    spectrum: Vec<Complex32>,
}

#[derive(Default)]
struct Channel {
    kernel: Signal,
    input: Signal,
    output: Signal,
}

/// The transforms of one length.
struct Plan {
    size: usize,
    forward: Arc<dyn RealToComplex<f32>>,
    inverse: Arc<dyn ComplexToReal<f32>>,
    scratch: Vec<Complex32>,
    product: Vec<Complex32>,
}

impl Plan {
    fn new(planner: &mut RealFftPlanner<f32>, size: usize) -> Self {
        let (forward, inverse) = (planner.plan_fft_forward(size), planner.plan_fft_inverse(size));
        let scratch = vec![Complex32::ZERO; forward.get_scratch_len().max(inverse.get_scratch_len())];
        Self { size, forward, inverse, scratch, product: vec![Complex32::ZERO; size / 2 + 1] }
    }

    /// Transforms the first `len` steps, followed by zeros.
    fn transform(&mut self, signal: &mut Signal, len: usize) {
        signal.steps.resize(self.size, 0.0);
        signal.steps[len..].fill(0.0);
        signal.spectrum.resize(self.size / 2 + 1, Complex32::ZERO);
        let done = self.forward.process_with_scratch(&mut signal.steps, &mut signal.spectrum, &mut self.scratch);
        done.expect("the buffers are of the plan's lengths");
    }

    /// Multiplies two transforms, the second conjugated for a correlation.
    fn multiply(&mut self, one: &Signal, other: &Signal, conjugate: bool) {
        // By this the result of the inverse is divided.
        let scale = 1.0 / self.size as f32;
        for ((product, x), y) in self.product.iter_mut().zip(&one.spectrum).zip(&other.spectrum) {
            *product = x * if conjugate { y.conj() } else { *y } * scale;
        }
        // Of real sequences these are real, and not a number where a sequence is not.
        let last = self.size / 2;
        (self.product[0].im, self.product[last].im) = (0.0, 0.0);
    }

    /// The steps that have the product as their transform, the first `len` of them.
    fn inverse(&mut self, signal: &mut Signal, len: usize) {
        signal.steps.resize(self.size, 0.0);
        let done = self.inverse.process_with_scratch(&mut self.product, &mut signal.steps, &mut self.scratch);
        done.expect("the ends are real, and the buffers of the plan's lengths");
        signal.steps.truncate(len);
    }
}

/// A task's channels.
struct Pass<'p, 'a, T: Element> {
    problem: &'p Problem<'a, T>,
    first: usize,
    width: usize,
    skip: [f32; BLOCK],
    planner: RealFftPlanner<f32>,
    plan: Option<Plan>,
    /// The steps of the kernels that have been transformed.
    taken: usize,
    channels: Vec<Channel>,
}

impl<'p, 'a, T: Element> Pass<'p, 'a, T> {
    fn new(problem: &'p Problem<'a, T>, first: usize) -> Self {
        let width = BLOCK.min(problem.sizes.d_inner - first);
        let mut skip = [0.0; BLOCK];
        if let Some(d) = &problem.inputs.d {
            d.widen_row([first], &mut skip[..width]);
        }
        let channels = (0..width).map(|_| Channel::default()).collect();
        Self { problem, first, width, skip, planner: RealFftPlanner::new(), plan: None, taken: 0, channels }
    }

    /// Makes the transforms for sequences of `len` and transforms the kernels, unless the last ones were as long.
    fn plan_for(&mut self, len: usize) {
        let taken = len.min(self.problem.sizes.kernel_length);
        let size = (len + taken - 1).next_power_of_two().max(2);
        if self.plan.as_ref().is_some_and(|plan| plan.size == size) && self.taken == taken {
            return;
        }
        let mut plan = Plan::new(&mut self.planner, size);
        for (i, channel) in self.channels.iter_mut().enumerate() {
            channel.kernel.steps.resize(taken, 0.0);
            self.problem.inputs.kernel.widen_row([self.first + i, 0], &mut channel.kernel.steps[..taken]);
            plan.transform(&mut channel.kernel, taken);
        }
        (self.plan, self.taken) = (Some(plan), taken);
    }

    fn each_channel(&mut self, mut work: impl FnMut(&mut Channel, &mut Plan)) {
        let Some(plan) = &mut self.plan else { return };
        for channel in &mut self.channels {
            work(channel, plan);
        }
    }

    /// Reads a sequence, in the direction of the convolution.
    fn read(&mut self, from: &View<T, 3>, sequence: Sequence, side: Side) {
        for channel in &mut self.channels {
            channel.side(side).steps.resize(sequence.len, 0.0);
        }
        let mut row = Row::ZERO;
        for i in 0..sequence.len {
            let step = sequence.step(i, self.problem.inputs.reverse);
            from.read_row([sequence.batch, step, self.first], self.width, &mut row);
            for (channel, x) in self.channels.iter_mut().zip(row.0) {
                channel.side(side).steps[i] = x;
            }
        }
    }

    /// Writes a sequence, with the skip connection from `beside`.
    ///
    /// # Safety
    /// No other call may write to this sequence's steps of these channels.
    unsafe fn write(&mut self, sequence: Sequence, to: &Shared<T>, side: Side, beside: &View<T, 3>) {
        let sizes = self.problem.sizes;
        let mut row = Row::ZERO;
        for i in 0..sequence.len {
            let step = sequence.step(i, self.problem.inputs.reverse);
            beside.read_row([sequence.batch, step, self.first], self.width, &mut row);
            for ((channel, x), skip) in self.channels.iter_mut().zip(&mut row.0).zip(self.skip) {
                *x = skip * *x + channel.side(side).steps[i];
            }
            let at = (sequence.batch * sizes.length + step) * sizes.d_inner + self.first;
            // SAFETY: these are the channels' elements of a step of the sequence, which the caller leaves to this call.
            row.narrow(unsafe { to.part(at..at + self.width) });
        }
    }

    /// Adds the slopes by the kernels and the skip connections, and leaves those by the inputs as the outputs' steps.
    fn add_kernel_slopes(&mut self, len: usize, sums: &mut Sums) {
        let (taken, kernel_length) = (self.taken, self.problem.sizes.kernel_length);
        let mut i = 0;
        self.each_channel(|channel, plan| {
            let Channel { kernel, input, output } = channel;
            let pairs = input.steps[..len].iter().zip(&output.steps[..len]);
            sums.d[i] += pairs.map(|(u, d)| f64::from(*u) * f64::from(*d)).sum::<f64>();
            plan.transform(input, len);
            plan.transform(output, len);
            // Σ_t dy_t u_{t-k} for each lag.
            plan.multiply(output, input, true);
            plan.inverse(input, taken);
            for (sum, x) in sums.kernel[i * kernel_length..].iter_mut().zip(&input.steps) {
                *sum += f64::from(*x);
            }
            plan.multiply(output, kernel, true);
            plan.inverse(output, len);
            i += 1;
        });
    }
}

impl Channel {
    fn side(&mut self, side: Side) -> &mut Signal {
        match side {
            Side::Input => &mut self.input,
            Side::Output => &mut self.output,
        }
    }
}
