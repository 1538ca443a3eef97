//! S4D on the CPU: vectorised over channels, parallel over blocks of channels and runs of sequences.
//!
//! The coefficients do not change over time, so that a chunk of 16 steps is products with matrices that are made once.
//! With `X` the state before a chunk, a row of `2 N` real numbers,
//!
//! ```text
//! y_t = Σ_{k<=t} K_k u_{t-k} + G_t · X          K_k = 2 Re(C Ā^k B̄), and D in K_0;  G_t = 2 C Ā^{t+1}
//! X'  = Ā^16 X + Σ_j H_j u_j                     H_j = Ā^{15-j} B̄
//! ```
//!
//! That is 4 multiply-adds for each step, channel and pair, where the recurrence step by step has 6, and more to keep
//! its error down. Every channel has matrices of its own; 16 channels stand in the lanes. A group of 8 chunks is worked
//! on at a time: first what the inputs of each come to (`H`), then the states before each, one after the other, in
//! `f64`, then the outputs.
//!
//! The angles in these matrices are formed in `f64`. So is the one chain of the computation, the states between chunks;
//! all else is a sum of at most `2 N + 16` terms. So errors do not grow with the number of steps.
//!
//! Backward goes through the groups from the last, with the states before each group kept from a forward pass over
//! them. The slopes by `G`, `H`, `K` and `Ā^16` are summed up over the chunks, and in the end those by the parameters
//! are made of them.
//!
//! One sequence is never faster by a Fourier transform: its kernel alone ([`kernel()`]) takes longer than all of this. On
//! one core the convolution takes 17 ns for each step and channel of 4,096 steps and 40 of 65,536, as long as this does with
//! 150 pairs and more. Where many sequences of one length share a kernel with so many pairs, and no states go in or out,
//! [`long_conv`](crate::lti::long_conv) with that kernel may be faster; the choice is the caller's, for what a sequence gets
//! must not depend on how many others there are.
//!
//! What a sequence gets does not depend on its neighbours nor on the division of the work, which follows from the
//! shape.

mod backward;

mod forward;
mod products;
mod tables;
mod update;

use crate::arguments::{reserved, zeroed};
use crate::sequences::{self, Sequence};
use crate::simd::{BLOCK, Isa, Row};
use crate::{Element, Result, View};

use super::check::{Problem, UpdateProblem};
use super::{GradientsMut, Inputs, OutputGradients, OutputMut, UpdateInputs, UpdateMut};

/// Steps in a chunk.
const CHUNK: usize = 16;

/// Chunks in a group.
const GROUP: usize = 8;

/// Steps in a task at least, so that short sequences share what is made once for each task.
const STEPS_PER_RUN: usize = 2048;

/// One number for each channel of a block, in `f64`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Wide([f64; BLOCK]);

impl Wide {
    const ZERO: Self = Self([0.0; BLOCK]);
}

/// Neighbouring channels, at most [`BLOCK`].
#[derive(Debug, Clone, Copy)]
struct Block {
    first: usize,
    width: usize,
}

/// The blocks of `d_inner` channels.
fn blocks(d_inner: usize) -> Vec<Block> {
    (0..d_inner).step_by(BLOCK).map(|first| Block { first, width: BLOCK.min(d_inner - first) }).collect()
}

/// `len` steps of a sequence from the `first`-th in the direction of the operator on, at most those of a group.
#[derive(Debug, Clone, Copy)]
struct Group {
    sequence: Sequence,
    first: usize,
    len: usize,
}

impl Group {
    /// The `index`-th group of a sequence.
    fn new(sequence: Sequence, index: usize) -> Self {
        let first = index * GROUP * CHUNK;
        Self { sequence, first, len: (GROUP * CHUNK).min(sequence.len - first) }
    }

    fn chunks(&self) -> usize {
        self.len.div_ceil(CHUNK)
    }

    /// The steps of the last chunk if it is not a whole one; else none.
    fn tail(&self) -> usize {
        self.len % CHUNK
    }
}

/// Runs the operator with the widest instructions of this processor, on the threads of the current rayon pool.
///
/// # Errors
/// An argument that does not fit; see [`Inputs`] and [`OutputMut`]. Nothing is written then.
pub fn forward<T: Element>(inputs: &Inputs<T>, outputs: OutputMut<T>) -> Result<()> {
    forward_with(Isa::best(), inputs, outputs)
}

/// [`forward`] with the instruction set given (plain code if this processor does not have it).
pub fn forward_with<T: Element>(isa: Isa, inputs: &Inputs<T>, outputs: OutputMut<T>) -> Result<()> {
    forward_checked(isa, &inputs.check()?, outputs)
}

/// [`forward_with`] of inputs that have been checked.
pub(crate) fn forward_checked<T: Element>(isa: Isa, problem: &Problem<T>, outputs: OutputMut<T>) -> Result<()> {
    problem.check_outputs(&outputs)?;
    forward::run(isa, problem, outputs)
}

/// Computes the gradient of every input that was given.
///
/// # Errors
/// An argument that does not fit; see [`Inputs`], [`OutputGradients`] and [`GradientsMut`]. Nothing is written then.
pub fn backward<T: Element>(
    inputs: &Inputs<T>,
    d_outputs: OutputGradients<T>,
    gradients: GradientsMut<T>,
) -> Result<()> {
    backward_with(Isa::best(), inputs, d_outputs, gradients)
}

/// [`backward`] with the instruction set given (plain code if this processor does not have it).
pub fn backward_with<T: Element>(
    isa: Isa,
    inputs: &Inputs<T>,
    d_outputs: OutputGradients<T>,
    gradients: GradientsMut<T>,
) -> Result<()> {
    backward_checked(isa, &inputs.check()?, d_outputs, gradients)
}

/// [`backward_with`] of inputs that have been checked.
pub(crate) fn backward_checked<T: Element>(
    isa: Isa,
    problem: &Problem<T>,
    d_outputs: OutputGradients<T>,
    gradients: GradientsMut<T>,
) -> Result<()> {
    problem.check_backward(&d_outputs, &gradients)?;
    backward::run(isa, problem, d_outputs, gradients)
}

/// Runs an update with the widest instructions of this processor, on the threads of the current rayon pool.
///
/// # Errors
/// An argument that does not fit; see [`UpdateInputs`] and [`UpdateMut`]. Nothing is written then.
pub fn update<T: Element, St: Element>(inputs: &UpdateInputs<T>, outputs: UpdateMut<T, St>) -> Result<()> {
    update_with(Isa::best(), inputs, outputs)
}

/// [`update`] with the instruction set given (plain code if this processor does not have it).
pub fn update_with<T: Element, St: Element>(
    isa: Isa,
    inputs: &UpdateInputs<T>,
    outputs: UpdateMut<T, St>,
) -> Result<()> {
    update_checked(isa, &inputs.check()?, outputs)
}

/// [`update_with`] of inputs that have been checked.
pub(crate) fn update_checked<T: Element, St: Element>(
    isa: Isa,
    problem: &UpdateProblem<T>,
    outputs: UpdateMut<T, St>,
) -> Result<()> {
    problem.check_outputs(&outputs)?;
    update::run(isa, problem, outputs);
    Ok(())
}

/// The kernels `K_k = 2 Re(Σ_n C_n Ā_n^k B̄_n)` of all channels, `(d_inner, length)`, dense, for
/// [`long_conv`](crate::lti::long_conv): what the operator without `D` and initial state answers to a one and then
/// zeros.
///
/// # Errors
/// An argument that does not fit. `u` and what belongs to it is not looked at but for its number of channels.
pub fn kernel<T: Element>(inputs: &Inputs<T>, length: usize) -> Result<Vec<f32>> {
    let d_inner = inputs.u.shape[2];
    let (one, zero) = ([1.0f32], [0.0f32]);
    let impulse = |data, length| View::new(data, [1, length, d_inner]).with_layout(0, [0, 0, 0]);
    let options = super::Options { reverse: false, ..inputs.options };
    let of = |u, initial_state| Inputs::<f32> {
        initial_state,
        options,
        ..Inputs::new(u, inputs.log_delta, inputs.a, inputs.b, inputs.c)
    };
    let mut out: Vec<f32> = zeroed("length", &[length, d_inner])?;
    if length > 0 {
        let first = of(impulse(&one, 1), None);
        let problem = first.check()?;
        let mut state: Vec<f32> = zeroed("a", &problem.state_shape())?;
        let (now, later) = out.split_at_mut(d_inner);
        forward_checked(Isa::best(), &problem, OutputMut { out: now, final_state: Some(&mut state) })?;
        let state = View::new(&state, problem.state_shape());
        forward(&of(impulse(&zero, length - 1), Some(state)), OutputMut::new(later))?;
    }
    let mut kernel: Vec<f32> = zeroed("length", &[d_inner, length])?;
    for (k, row) in out.chunks_exact(d_inner).enumerate() {
        for (channel, x) in row.iter().enumerate() {
            kernel[channel * length + k] = *x;
        }
    }
    Ok(kernel)
}

/// All sequences; those without a step only if their states matter, as there may be more than can be counted.
fn all_sequences<T: Element>(problem: &Problem<T>, keep_empty: bool) -> Result<Vec<Sequence>> {
    if problem.sizes.length == 0 && !keep_empty {
        return Ok(Vec::new());
    }
    let mut all = reserved("u", &problem.inputs.u.shape, problem.sequences.count())?;
    all.extend(problem.sequences.iter());
    Ok(all)
}

/// Neighbouring sequences that one task goes through.
fn runs(sequences: &[Sequence]) -> Vec<&[Sequence]> {
    sequences::runs(sequences, |sequence| sequence.len, STEPS_PER_RUN)
}

impl<T: Element> Problem<'_, T> {
    /// Reads the steps of a group of an activation, and sets the rest of its last chunk to zero.
    #[inline(always)]
    fn stage<X: Element>(&self, from: &View<X, 3>, group: Group, block: Block, rows: &mut [Row]) {
        for (i, row) in rows[..group.chunks() * CHUNK].iter_mut().enumerate() {
            if i < group.len {
                let step = group.sequence.step(group.first + i, self.inputs.options.reverse);
                from.read_row([group.sequence.batch, step, block.first], block.width, row);
            } else {
                *row = Row::ZERO;
            }
        }
    }

    /// Where the channels of the block lie in a dense activation at a step of a group.
    #[inline(always)]
    fn activation_range(&self, group: Group, i: usize, block: Block) -> std::ops::Range<usize> {
        let step = group.sequence.step(group.first + i, self.inputs.options.reverse);
        let at = (group.sequence.batch * self.sizes.length + step) * self.sizes.d_inner + block.first;
        at..at + block.width
    }

    /// Reads a state, `(sequences, d_inner, 2 * d_state)`, with the channels in the lanes; zeros if there is none.
    fn read_state(&self, from: &Option<View<f32, 3>>, sequence: Sequence, block: Block, state: &mut [Wide]) {
        state.fill(Wide::ZERO);
        let Some(view) = from else { return };
        for i in 0..block.width {
            for (k, to) in state[..2 * self.sizes.d_state].iter_mut().enumerate() {
                to.0[i] = view.at([sequence.index, block.first + i, k]).into();
            }
        }
    }

    /// Where the states of the block's channels lie in a dense state.
    fn state_range(&self, sequence: Sequence, block: Block) -> std::ops::Range<usize> {
        let of_channel = 2 * self.sizes.d_state;
        let at = (sequence.index * self.sizes.d_inner + block.first) * of_channel;
        at..at + block.width * of_channel
    }

    /// Rounds a state into the block's part of a dense one.
    fn write_state(&self, state: &[Wide], to: &mut [f32]) {
        for (i, to) in to.chunks_exact_mut(2 * self.sizes.d_state).enumerate() {
            for (to, state) in to.iter_mut().zip(state) {
                *to = state.0[i] as f32;
            }
        }
    }
}
