//! The scan on the CPU: vectorised over channels, parallel over sequences and channels.
//!
//! The channels of each group are cut into blocks of 16, and a tile of some steps of one block is worked on at a time:
//!
//! 1. *stage*: read the tile, add the bias, apply softplus;
//! 2. *advance*: run the recurrence, a few states at a time in registers, all 16 channels in the lanes of a vector;
//! 3. *finish*: add the skip connection, apply the gate, round and write.
//!
//! A task works on a run of segments (a segment is a sequence or, where there are too few channels to occupy the
//! machine, a part of one) for a unit of neighbouring blocks. How work is divided depends on the shape alone, never on
//! the number of threads or the instruction set, and nothing that a sequence gets depends on its neighbours: results
//! are the same bits on any number of threads, in any batch, packed or alone. (Sums over the batch, which the gradients
//! of parameters are, follow the division of the whole batch.)

mod backward;
mod forward;
mod kernels;
mod split;
mod sums;

use crate::arguments::Dims;
use crate::sequences::{CHECKPOINT_STEPS, Sequence, runs};
use crate::simd::{BLOCK, Isa, Kernel, Lanes, Row, hold_inverse, softplus};
use crate::view::Ahead;
use crate::{Discretization, Element, Projection, Result, View};

use super::{GradientsMut, Inputs, OutputGradients, OutputMut, Problem};
use kernels::{Coefficients, PerChannel, PerStep, Tile};

/// Runs the scan with the widest instructions of this processor, on the threads of the current rayon pool.
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
    if !problem.is_nothing(outputs.final_state.is_some()) {
        forward::run(isa, problem, outputs);
    }
    Ok(())
}

/// Computes the gradient of every input that was given. `checkpoints` are those that [`forward`] kept.
///
/// The caller must see to it that they are those of the same inputs and options: of a bare buffer nothing but its length
/// can be checked, and with other states in it the gradients are wrong without an error. (Memory is safe whatever it
/// holds.) [`Inputs::backward`] checks.
pub fn backward<T: Element>(
    inputs: &Inputs<T>,
    checkpoints: &[f32],
    d_outputs: OutputGradients<T>,
    gradients: GradientsMut<T>,
) -> Result<()> {
    backward_with(Isa::best(), inputs, checkpoints, d_outputs, gradients)
}

/// [`backward`] with the instruction set given (plain code if this processor does not have it).
pub fn backward_with<T: Element>(
    isa: Isa,
    inputs: &Inputs<T>,
    checkpoints: &[f32],
    d_outputs: OutputGradients<T>,
    gradients: GradientsMut<T>,
) -> Result<()> {
    backward_checked(isa, &inputs.check()?, checkpoints, d_outputs, gradients)
}

/// [`backward_with`] of inputs that have been checked.
pub(crate) fn backward_checked<T: Element>(
    isa: Isa,
    problem: &Problem<T>,
    checkpoints: &[f32],
    d_outputs: OutputGradients<T>,
    gradients: GradientsMut<T>,
) -> Result<()> {
    problem.check_backward(checkpoints, &d_outputs, &gradients)?;
    backward::run(isa, problem, checkpoints, d_outputs, gradients);
    Ok(())
}

/// Neighbouring channels of one group, at most [`BLOCK`].
#[derive(Debug, Clone, Copy)]
struct Block {
    group: usize,
    first: usize,
    width: usize,
}

/// A sequence or a part of one: `len` steps from the `first`-th in the direction of the scan on.
#[derive(Debug, Clone, Copy)]
struct Segment {
    sequence: Sequence,
    first: usize,
    len: usize,
    index: usize,
}

impl Segment {
    fn ends_sequence(&self) -> bool {
        self.first + self.len == self.sequence.len
    }

    /// Tiles of `length` steps, the last excepted, as `(first step, steps)`, counted within the sequence.
    fn tiles(&self, length: usize) -> impl DoubleEndedIterator<Item = (usize, usize)> {
        let (first, end) = (self.first, self.first + self.len);
        (0..self.len.div_ceil(length)).map(move |i| {
            let start = first + i * length;
            (start, length.min(end - start))
        })
    }
}

/// The division of a problem's work.
struct Plan {
    blocks: Vec<Block>,
    segments: Vec<Segment>,
}

impl Plan {
    /// `needs_state`: the final (backward, the initial) state is requested, so that empty sequences count as work.
    fn new<T: Element>(problem: &Problem<T>, needs_state: bool) -> Self {
        let Dims { groups, .. } = problem.dims;
        let channels = problem.dims.group_channels();
        let blocks: Vec<_> = (0..groups)
            .flat_map(|group| {
                (0..channels).step_by(BLOCK).map(move |first| Block {
                    group,
                    first: group * channels + first,
                    width: BLOCK.min(channels - first),
                })
            })
            .collect();
        let mut segments = Vec::new();
        // Without steps and states the batch can be any number, and is not to be counted through.
        let idle = problem.dims.len == 0 && !needs_state;
        for sequence in problem.sequences.iter().take_while(|_| !idle) {
            let step = segment_steps(blocks.len(), sequence.len);
            // An empty sequence has one empty segment, which hands its state on.
            for first in (0..sequence.len.max(1)).step_by(step.max(1)) {
                let len = step.min(sequence.len - first);
                segments.push(Segment { sequence, first, len, index: segments.len() });
            }
        }
        Self { blocks, segments }
    }

    fn is_split(&self) -> bool {
        self.segments.iter().any(|segment| segment.first > 0)
    }

    /// Ranges of `per` neighbouring blocks, none of which spans two groups.
    fn units(&self, per: usize) -> Vec<&[Block]> {
        self.blocks.chunk_by(|a, b| a.group == b.group).flat_map(|group| group.chunks(per)).collect()
    }

    fn runs(&self, steps: usize) -> Vec<&[Segment]> {
        runs(&self.segments, |segment| segment.len, steps)
    }
}

/// The steps in each segment of a sequence: all, unless the channels make fewer than 16 blocks and the sequence is long.
///
/// A split costs a first pass over the segments, so it is made only where a machine of many cores would idle. It looks
/// at one sequence alone, so that its results do not depend on what it is batched with.
fn segment_steps(blocks: usize, len: usize) -> usize {
    const ENOUGH_BLOCKS: usize = 16;
    const LEAST_STEPS: usize = 1024;
    let segments = (ENOUGH_BLOCKS / blocks).min(len / LEAST_STEPS).max(1);
    len.div_ceil(segments).next_multiple_of(CHECKPOINT_STEPS)
}

/// Reads a checked problem tile by tile.
struct Reader<'p, 'a, T: Element> {
    problem: &'p Problem<'a, T>,
}

impl<T: Element> Reader<'_, '_, T> {
    /// The step of the batch row that stands `i`-th in the direction of the scan.
    #[inline(always)]
    fn step(&self, sequence: Sequence, i: usize) -> usize {
        sequence.step(i, self.problem.inputs.options.reverse)
    }

    /// Row `n` of a `(d_inner, d_state)` parameter for each of `out`: the block's channels, zero beyond.
    fn parameter(&self, view: &View<f32, 2>, block: Block, out: &mut [Row]) {
        out.fill(Row::ZERO);
        for i in 0..block.width {
            for (n, row) in out.iter_mut().enumerate() {
                row.0[i] = view.at([block.first + i, n]);
            }
        }
    }

    /// A `(d_inner)` parameter, zero if it is absent.
    fn channel_parameter(&self, view: &Option<View<f32, 1>>, block: Block) -> Row {
        let mut row = Row::ZERO;
        if let Some(view) = view {
            view.read_row([block.first], block.width, &mut row);
        }
        row
    }

    /// One sequence's row of a `(sequences, d_inner, d_state)` state; zero if it is absent.
    fn state(&self, view: &Option<View<f32, 3>>, sequence: Sequence, block: Block, out: &mut [Row]) {
        out.fill(Row::ZERO);
        let Some(view) = view else { return };
        for i in 0..block.width {
            for (n, row) in out.iter_mut().enumerate() {
                row.0[i] = view.at([sequence.index, block.first + i, n]);
            }
        }
    }

    /// The rows of an activation for a block from step `first` on, to be prefetched: those of one block lie
    /// too far apart for the processor to foresee them.
    fn ahead(&self, view: &View<T, 3>, sequence: Sequence, first: usize, block: Block) -> Ahead {
        if first >= sequence.len {
            return Ahead::NONE;
        }
        let stride = view.strides[1].cast_signed();
        let step = if self.problem.inputs.options.reverse { -stride } else { stride };
        view.ahead([sequence.batch, self.step(sequence, first), block.first + block.width - 1], step)
    }

    /// A tile of B or C, `(steps, d_state)`, if it varies.
    fn projection(
        &self,
        projection: &Projection<T>,
        sequence: Sequence,
        (first, steps): (usize, usize),
        group: usize,
        out: &mut [f32],
    ) {
        if let Projection::Varying(view) = projection {
            let rows = out.chunks_exact_mut(self.problem.dims.d_state);
            for (i, row) in rows.take(steps).enumerate() {
                view.widen_row([sequence.batch, self.step(sequence, first + i), group, 0], row);
            }
        }
    }
}

/// What stays the same for a block from tile to tile.
struct BlockParameters {
    block: Block,
    /// log2(e)·A, so that decays are binary exponentials.
    a: Vec<Row>,
    /// 1/A, and 0 where A is too small to divide by; empty with Euler's rule.
    inverse_a: Vec<Row>,
    /// B and C where they are constant, else empty.
    b: Vec<Row>,
    c: Vec<Row>,
    skip: Row,
    bias: Row,
}

impl BlockParameters {
    fn read<T: Element>(reader: &Reader<T>, block: Block) -> Self {
        let inputs = &reader.problem.inputs;
        let rows = || vec![Row::ZERO; reader.problem.dims.d_state];
        let mut a = rows();
        reader.parameter(&inputs.a, block, &mut a);
        let mut inverse_a = Vec::new();
        if inputs.options.discretization == Discretization::ZeroOrderHold {
            inverse_a = a.iter().map(|row| Row(row.0.map(hold_inverse))).collect();
        }
        for row in &mut a {
            row.0 = row.0.map(|a| a * std::f32::consts::LOG2_E);
        }
        let constant = |projection: &Projection<T>| match projection {
            Projection::Varying(_) => Vec::new(),
            Projection::Constant(view) => {
                let mut out = rows();
                reader.parameter(view, block, &mut out);
                out
            }
        };
        Self {
            block,
            a,
            inverse_a,
            b: constant(&inputs.b),
            c: constant(&inputs.c),
            skip: reader.channel_parameter(&inputs.d, block),
            bias: reader.channel_parameter(&inputs.delta_bias, block),
        }
    }

    /// What the recurrences read of a tile. `b` and `c` are the tile's, in use where they are not constant.
    fn tile<'t>(&'t self, b: &'t [f32], c: &'t [f32], delta: &'t [Row], input: &'t [Row]) -> Tile<'t> {
        let coefficients = |constant: &'t [Row], data| match constant.is_empty() {
            true => Coefficients::PerStep(PerStep { data, d_state: self.a.len() }),
            false => Coefficients::PerChannel(PerChannel(constant)),
        };
        let (b, c) = (coefficients(&self.b, b), coefficients(&self.c, c));
        Tile { a: &self.a, inverse_a: &self.inverse_a, b, c, delta, input }
    }
}

/// Reads a tile of u and delta for a unit of blocks, and computes the step sizes and what the recurrence takes in.
///
/// It goes row by row, so that memory is read in the order in which it lies, and leaves the tile block by block: row
/// `i·stride + t` holds step `t` of block `i`.
struct Stage<'t, 'a, T: Element> {
    reader: &'t Reader<'t, 'a, T>,
    sequence: Sequence,
    /// The tile's first step in the direction of the scan, and its length.
    tile: (usize, usize),
    unit: &'t [BlockParameters],
    stride: usize,
    /// Receives u itself, for the backward pass.
    u: Option<&'t mut [Row]>,
    delta: &'t mut [Row],
    /// Δ·u, or u with zero-order hold.
    input: &'t mut [Row],
    /// Receives D·u, to which the recurrence adds.
    y: &'t mut [Row],
}

impl<T: Element> Kernel for Stage<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(mut self, simd: S) {
        let inputs = &self.reader.problem.inputs;
        let hold = inputs.options.discretization == Discretization::ZeroOrderHold;
        let (first, steps) = self.tile;
        let mut u = Row::ZERO;
        for t in 0..steps {
            let step = self.reader.step(self.sequence, first + t);
            for (i, parameters) in self.unit.iter().enumerate() {
                let (index, width) = ([self.sequence.batch, step, parameters.block.first], parameters.block.width);
                let row = i * self.stride + t;
                inputs.u.read_row(index, width, &mut u);
                inputs.delta.read_row(index, width, &mut self.delta[row]);
                if let Some(rows) = &mut self.u {
                    rows[row] = u;
                }
                let (u, delta) = (u.vectors::<S>(), self.delta[row].vectors_mut::<S>());
                let (input, y) = (self.input[row].vectors_mut::<S>(), self.y[row].vectors_mut::<S>());
                for (lane, bias) in parameters.bias.vectors::<S>().iter().enumerate() {
                    delta[lane] = simd.add_f32s(delta[lane], *bias);
                    if inputs.options.delta_softplus {
                        delta[lane] = softplus(simd, delta[lane]);
                    }
                    input[lane] = if hold { u[lane] } else { simd.mul_f32s(delta[lane], u[lane]) };
                    // Without D nothing may come from u directly, not even the NaN of 0 times infinity.
                    y[lane] = match inputs.d {
                        Some(_) => simd.mul_f32s(parameters.skip.vectors::<S>()[lane], u[lane]),
                        None => simd.splat_f32s(0.0),
                    };
                }
            }
        }
    }
}
