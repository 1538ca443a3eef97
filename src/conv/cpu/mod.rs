//! The convolution on the CPU: vectorised over channels, parallel over tiles of steps and ranges of channels.
//!
//! The *line* of a channel is its initial state followed by its inputs, in the direction of the convolution: output `t`
//! is made of the line from `t` to `t + width - 1`. A tile of 32 steps of up to 128 channels is worked on at a time:
//!
//! 1. *stage*: read the rows of the line that the tile needs, in the order in which they lie in memory;
//! 2. *convolve*, 16 channels in the lanes of a vector, their weights in registers, in the first-level cache;
//! 3. *finish*: round and write, row by row again.
//!
//! A tile reads the `width - 1` rows before it once more, while they are still in a cache; so tiles do not depend on
//! each other, and what a sequence gets depends neither on the division of the work nor on its neighbours. Only the
//! gradients of the parameters are sums over steps: over those of a tile, then over the tiles of a run, then over the
//! runs, all of which follow from the shape alone.

mod backward;
mod forward;
mod update;

use crate::arguments::reserved;
use crate::sequences::{self, Sequence, Sequences};
use crate::simd::{BLOCK, Isa, Row};
use crate::{Element, Result, View, ViewMut};

use super::update::UpdateProblem;
use super::{GradientsMut, Inputs, OutputGradients, OutputMut, Problem, UpdateInputs, UpdateMut, WIDTHS};

/// Steps in a tile.
const TILE: usize = 32;

/// Blocks of channels that are worked on together. A row of them is contiguous in memory and long enough for the
/// processor to fetch ahead.
const BLOCKS: usize = 8;

/// Steps in a task at least, so that short sequences share the cost of reading the weights.
const STEPS_PER_RUN: usize = 512;

/// The most rows of the line that come before a step.
const MOST_BEFORE: usize = *WIDTHS.end() - 1;

/// Runs the convolution with the widest instructions of this processor, on the threads of the current rayon pool.
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
    update::run(isa, problem, outputs, problem.inputs.x.shape[2]);
    Ok(())
}

/// An update whose output is the first channels of rows of `columns`, dense, of which the others are left. The caller has
/// checked what is written.
pub(crate) fn update_in_rows<T: Element, St: Element>(
    isa: Isa,
    problem: &UpdateProblem<T>,
    state: ViewMut<St, 3>,
    out: &mut [T],
    columns: usize,
) {
    assert!(columns >= problem.inputs.x.shape[2], "the tasks' channels are disjoint");
    update::run(isa, problem, UpdateMut::new(state, out), columns);
}

/// `len` steps of a sequence from the `first`-th in the direction of the convolution on, at most [`TILE`].
#[derive(Debug, Clone, Copy)]
struct Tile {
    sequence: Sequence,
    first: usize,
    len: usize,
}

impl Tile {
    fn ends_sequence(&self) -> bool {
        self.first + self.len == self.sequence.len
    }
}

/// Neighbouring channels, at most [`BLOCKS`] blocks.
#[derive(Debug, Clone, Copy)]
struct Unit {
    first: usize,
    width: usize,
}

impl Unit {
    fn blocks(&self) -> usize {
        self.width.div_ceil(BLOCK)
    }
}

/// The units of `d_inner` channels.
fn units(d_inner: usize) -> Vec<Unit> {
    let step = BLOCKS * BLOCK;
    (0..d_inner).step_by(step).map(|first| Unit { first, width: step.min(d_inner - first) }).collect()
}

/// The tiles of all sequences. One without steps has an empty tile if `keep_empty`, to hand its state on.
fn tiles<T: Element>(problem: &Problem<T>, keep_empty: bool) -> Result<Vec<Tile>> {
    // Batch rows without a step could be more than can be counted.
    if problem.inputs.x.shape[1] == 0 && !keep_empty {
        return Ok(Vec::new());
    }
    let least = usize::from(keep_empty);
    let count = match problem.sequences {
        Sequences::Dense { batch, len } => batch * len.max(least).div_ceil(TILE),
        Sequences::Packed(offsets) => {
            offsets.windows(2).map(|pair| (pair[1] - pair[0]).max(least).div_ceil(TILE)).sum()
        }
    };
    let mut all = reserved("x", &problem.inputs.x.shape, count)?;
    let tiles = |sequence: Sequence| {
        (0..sequence.len.max(least)).step_by(TILE).map(move |first| {
            let len = TILE.min(sequence.len - first);
            Tile { sequence, first, len }
        })
    };
    all.extend(problem.sequences.iter().flat_map(tiles));
    Ok(all)
}

fn runs(tiles: &[Tile]) -> Vec<&[Tile]> {
    sequences::runs(tiles, |tile| tile.len, STEPS_PER_RUN)
}

/// A buffer of `rows` rows of a unit: block `i` of row `r` stands at `r·BLOCKS + i`.
fn unit_rows(rows: usize) -> Vec<Row> {
    vec![Row::ZERO; rows * BLOCKS]
}

/// The channels of row `r` of such a buffer.
#[inline(always)]
fn channels(rows: &[Row], r: usize, unit: Unit) -> &[f32] {
    &bytemuck::cast_slice(&rows[r * BLOCKS..][..BLOCKS])[..unit.width]
}

/// [`channels`], to be written.
#[inline(always)]
fn channels_mut(rows: &mut [Row], r: usize, unit: Unit) -> &mut [f32] {
    &mut bytemuck::cast_slice_mut(&mut rows[r * BLOCKS..][..BLOCKS])[..unit.width]
}

/// The filters of a unit.
struct Filters {
    /// Row `k` holds weight `k`.
    weight: Vec<Row>,
    bias: [Row; BLOCKS],
}

impl Filters {
    fn read(weight: &View<f32, 2>, bias: &Option<View<f32, 1>>, unit: Unit) -> Self {
        let width = weight.shape[1];
        let mut filters = Self { weight: unit_rows(width), bias: [Row::ZERO; BLOCKS] };
        for k in 0..width {
            for (i, to) in channels_mut(&mut filters.weight, k, unit).iter_mut().enumerate() {
                *to = weight.at([unit.first + i, k]);
            }
        }
        if let Some(bias) = bias {
            bias.widen_row([unit.first], channels_mut(&mut filters.bias, 0, unit));
        }
        filters
    }
}

impl<T: Element> Problem<'_, T> {
    /// Reads the row of the line at `position`.
    #[inline(always)]
    fn read_line(&self, sequence: Sequence, position: usize, unit: Unit, to: &mut [f32]) {
        match position.checked_sub(self.width - 1) {
            Some(i) => {
                let step = sequence.step(i, self.inputs.options.reverse);
                self.inputs.x.widen_row([sequence.batch, step, unit.first], to);
            }
            None => match &self.inputs.initial_state {
                Some(state) => state.widen_row([sequence.index, position, unit.first], to),
                None => to.fill(0.0),
            },
        }
    }

    /// Where the channels of the unit lie in a dense activation at the `i`-th step of a sequence.
    #[inline(always)]
    fn activation_range(&self, sequence: Sequence, i: usize, unit: Unit) -> std::ops::Range<usize> {
        let step = sequence.step(i, self.inputs.options.reverse);
        let at = (sequence.batch * self.inputs.x.shape[1] + step) * self.d_inner() + unit.first;
        at..at + unit.width
    }

    /// Where the channels of the unit lie in row `j` of a dense state.
    #[inline(always)]
    fn state_range(&self, sequence: Sequence, j: usize, unit: Unit) -> std::ops::Range<usize> {
        let at = (sequence.index * (self.width - 1) + j) * self.d_inner() + unit.first;
        at..at + unit.width
    }
}

/// Calls `$run::<S, $($generic,)* W>` for the width at hand.
macro_rules! with_width {
    ($width:expr, $run:ident::<$($generic:tt),*>($($argument:expr),*)) => {
        match $width {
            2 => $run::<$($generic,)* 2>($($argument),*),
            3 => $run::<$($generic,)* 3>($($argument),*),
            4 => $run::<$($generic,)* 4>($($argument),*),
            5 => $run::<$($generic,)* 5>($($argument),*),
            6 => $run::<$($generic,)* 6>($($argument),*),
            7 => $run::<$($generic,)* 7>($($argument),*),
            _ => $run::<$($generic,)* 8>($($argument),*),
        }
    };
}
use with_width;
