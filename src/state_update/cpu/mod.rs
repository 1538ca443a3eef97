//! The state update on the CPU: vectorised over the states of a channel, parallel over batch rows and channels.
//!
//! An update reads and writes every state once and does little else, so it follows the order in which states lie in
//! memory, `d_state` innermost: the lanes of a vector are neighbouring states of one channel and nothing is transposed.
//! What there is one of per channel (softplus, the gate) is computed with 16 channels in the lanes, before and after.
//!
//! No sum runs over channels, rows or tokens, so the division of the work has no influence on the results.

mod kernels;

use std::ops::Range;

use crate::arguments::Dims;
use crate::pool::{Pool, Slots, UpdateMut};
use crate::shared::Shared;
use crate::simd::{BLOCK, Isa, Kernel, Lanes, Row, silu, softplus};
use crate::tasks;
use crate::{DType, Discretization, Element, Result};

use super::{Inputs, Problem};
use kernels::{Coefficients, Step, Tail, inverses, narrow_padded, parameter, sized, varying, widen_padded};

/// Tokens that a block of channels is carried through at a time, its states in the first-level cache.
const TOKENS: usize = 8;

/// States, counted once per token, in a task at least: a few microseconds of work.
const STATES_PER_TASK: usize = 4096;

/// Runs the update with the widest instructions of this processor, on the threads of the current rayon pool.
///
/// # Errors
/// An argument that does not fit; see [`Inputs`] and [`UpdateMut`]. Nothing is written then.
pub fn update<T: Element, St: Element>(inputs: &Inputs<T>, outputs: UpdateMut<T, St>) -> Result<()> {
    update_with(Isa::best(), inputs, outputs)
}

/// [`update`] with the instruction set given (plain code if this processor does not have it).
pub fn update_with<T: Element, St: Element>(isa: Isa, inputs: &Inputs<T>, outputs: UpdateMut<T, St>) -> Result<()> {
    update_checked(isa, &inputs.check()?, outputs)
}

/// [`update_with`] of inputs that have been checked.
pub(crate) fn update_checked<T: Element, St: Element>(
    isa: Isa,
    problem: &Problem<T>,
    outputs: UpdateMut<T, St>,
) -> Result<()> {
    problem.check_outputs(&outputs)?;
    let Dims { batch, len, d_inner, d_state, .. } = problem.dims;
    if batch == 0 || len == 0 {
        return Ok(());
    }
    let pass = Pass {
        problem,
        slots: problem.inputs.slots,
        state: Pool::new(outputs.state),
        out: Shared::new(outputs.out),
        token_states: outputs.token_states.map(Shared::new),
    };
    // At most TOKENS · MAX_D_STATE, so it cannot overflow.
    let channel_work = len.min(TOKENS) * d_state;
    let channels = STATES_PER_TASK.div_ceil(channel_work).next_multiple_of(BLOCK);
    let units = d_inner.div_ceil(channels);
    tasks::for_each_init(batch * units, 1, Scratch::default, |scratch, task| {
        let first = task % units * channels;
        let width = channels.min(d_inner - first);
        isa.run(Task { pass: &pass, row: task / units, first, width, scratch });
    });
    Ok(())
}

struct Pass<'p, 'a, T: Element, St: Element> {
    problem: &'p Problem<'a, T>,
    slots: Slots<'p>,
    state: Pool<'p, St>,
    out: Shared<'p, T>,
    token_states: Option<Shared<'p, St>>,
}

/// Buffers of one task, used again by the next. Where states are called *padded*, those of each channel are followed by
/// zeros up to a whole number of vectors.
struct Scratch<St> {
    /// The padded states of a block.
    h: Vec<f32>,
    /// The padded rows of A of a block.
    a: Vec<f32>,
    /// Those of 1/A with zero-order hold.
    inverse_a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    /// The states of a block as they are stored.
    rounded: Vec<St>,
    u: [Row; TOKENS],
    delta: [Row; TOKENS],
    y: [Row; TOKENS],
}

impl<St> Default for Scratch<St> {
    fn default() -> Self {
        let rows = [Row::ZERO; TOKENS];
        let (h, a, inverse_a, b, c, rounded) = Default::default();
        Self { h, a, inverse_a, b, c, rounded, u: rows, delta: rows, y: rows }
    }
}

/// All tokens of one batch row for a range of channels.
struct Task<'t, 'p, 'a, T: Element, St: Element> {
    pass: &'t Pass<'p, 'a, T, St>,
    row: usize,
    first: usize,
    width: usize,
    scratch: &'t mut Scratch<St>,
}

/// Neighbouring channels, at most [`BLOCK`], of neighbouring tokens, at most [`TOKENS`], of a batch row.
#[derive(Clone, Copy)]
struct Block {
    row: usize,
    slot: usize,
    first: usize,
    width: usize,
    token: usize,
    tokens: usize,
}

impl<T: Element, St: Element> Kernel for Task<'_, '_, '_, T, St> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { pass, row, first, width, scratch } = self;
        let Problem { inputs, dims } = pass.problem;
        let Some(slot) = pass.slots.get(row) else { return pass.zero(row, first, width) };
        let padded = dims.d_state.next_multiple_of(S::F32_LANES);
        let groups = first / dims.group_channels()..(first + width - 1) / dims.group_channels() + 1;
        for token in (0..dims.len).step_by(TOKENS) {
            let tokens = TOKENS.min(dims.len - token);
            varying(&inputs.b, row, token..token + tokens, groups.clone(), padded, &mut scratch.b);
            varying(&inputs.c, row, token..token + tokens, groups.clone(), padded, &mut scratch.c);
            for start in (first..first + width).step_by(BLOCK) {
                let width = BLOCK.min(first + width - start);
                let block = Block { row, slot, first: start, width, token, tokens };
                pass.stage(simd, block, scratch);
                if inputs.options.discretization == Discretization::ZeroOrderHold {
                    pass.advance::<S, true>(simd, block, groups.clone(), padded, scratch);
                } else {
                    pass.advance::<S, false>(simd, block, groups.clone(), padded, scratch);
                }
                pass.finish(simd, block, scratch);
            }
        }
    }
}

impl<T: Element, St: Element> Pass<'_, '_, T, St> {
    /// What a padding row gives.
    fn zero(&self, row: usize, first: usize, width: usize) {
        let Dims { len, d_inner, d_state, .. } = self.problem.dims;
        for token in 0..len {
            let at = (row * len + token) * d_inner + first;
            // SAFETY (both): this task alone works on these channels of this row.
            unsafe { self.out.part(at..at + width) }.fill(T::zeroed());
            if let Some(states) = &self.token_states {
                unsafe { states.part(at * d_state..(at + width) * d_state) }.fill(St::zeroed());
            }
        }
    }

    /// Reads u and computes the step sizes.
    #[inline(always)]
    fn stage<S: Lanes>(&self, simd: S, block: Block, scratch: &mut Scratch<St>) {
        let inputs = &self.problem.inputs;
        let mut bias = Row::ZERO;
        if let Some(view) = &inputs.delta_bias {
            view.widen_row([block.first], &mut bias.0[..block.width]);
        }
        for t in 0..block.tokens {
            let index = [block.row, block.token + t, block.first];
            inputs.u.widen_row(index, &mut scratch.u[t].0[..block.width]);
            let delta = &mut scratch.delta[t];
            inputs.delta.widen_row(index, &mut delta.0[..block.width]);
            for (delta, bias) in delta.vectors_mut::<S>().iter_mut().zip(bias.vectors::<S>()) {
                *delta = simd.add_f32s(*delta, *bias);
                if inputs.options.delta_softplus {
                    *delta = softplus(simd, *delta);
                }
            }
        }
    }

    /// Runs the recurrence, leaving `Σ_n C h` in `y` and the states where they belong.
    #[inline(always)]
    fn advance<S: Lanes, const HOLD: bool>(
        &self,
        simd: S,
        block: Block,
        groups: Range<usize>,
        padded: usize,
        scratch: &mut Scratch<St>,
    ) {
        let Problem { inputs, dims } = self.problem;
        let d_state = dims.d_state;
        let Scratch { h, a, inverse_a, b, c, rounded, u, delta, y } = scratch;
        let a = parameter(&inputs.a, block, padded, a);
        let inverse_a = if HOLD { inverses(a, inverse_a) } else { a };
        let b = Coefficients::new(&inputs.b, dims, block, groups.clone(), padded, b);
        let c = Coefficients::new(&inputs.c, dims, block, groups.clone(), padded, c);

        // f32 states that are whole vectors are worked on where they lie.
        let in_place = St::DTYPE == DType::F32 && padded == d_state;
        // SAFETY: slots of different rows differ, so this task alone works on these channels of this slot.
        let stored = unsafe { self.state.dense([block.slot, block.first], block.width, d_state) };
        let (h, in_place) = match stored {
            Some(stored) if in_place => (bytemuck::cast_slice_mut::<St, f32>(stored), true),
            _ => (self.load(block, padded, h), false),
        };
        let tail = Tail::new(d_state % S::F32_LANES);
        for t in 0..block.tokens {
            let (b, c, y) = (b.at(t), c.at(t), &mut y[t].0);
            let parameters = a.chunks_exact(padded).zip(inverse_a.chunks_exact(padded));
            let channels = h.chunks_exact_mut(padded).zip(parameters).zip(y.iter_mut());
            for (i, ((h, (a, inverse_a)), y)) in channels.enumerate() {
                let step = Step { a, inverse_a, b: b.row(i), c: c.row(i), delta: delta[t].0[i], u: u[t].0[i] };
                *y = step.run::<S, HOLD>(simd, h, &tail);
            }
            // Rounded after every token, so that any number of them at once gives the same bits.
            if St::DTYPE != DType::F32 || self.token_states.is_some() {
                let rounded = sized(rounded, block.width * d_state);
                narrow_padded(h, rounded, d_state, padded);
                if St::DTYPE != DType::F32 {
                    widen_padded(rounded, h, d_state, padded);
                }
                self.keep(block, t, rounded);
            }
        }
        if !in_place {
            self.store(block, padded, h);
        }
    }

    /// Reads the padded states of a block.
    #[inline(always)]
    fn load<'h>(&self, block: Block, padded: usize, h: &'h mut Vec<f32>) -> &'h mut [f32] {
        let d_state = self.problem.dims.d_state;
        let h = sized(h, block.width * padded);
        h.fill(0.0);
        // SAFETY (both): slots of different rows differ, so this task alone works on these channels of this slot.
        match unsafe { self.state.dense([block.slot, block.first], block.width, d_state) } {
            Some(stored) => widen_padded(stored, h, d_state, padded),
            None => {
                for (i, h) in h.chunks_exact_mut(padded).enumerate() {
                    unsafe { self.state.read([block.slot, block.first + i, 0], &mut h[..d_state]) };
                }
            }
        }
        h
    }

    /// Rounds the padded states of a block into the pool.
    #[inline(always)]
    fn store(&self, block: Block, padded: usize, h: &[f32]) {
        let d_state = self.problem.dims.d_state;
        // SAFETY (both): as in `load`, the results of which are gone.
        match unsafe { self.state.dense([block.slot, block.first], block.width, d_state) } {
            Some(stored) => narrow_padded(h, stored, d_state, padded),
            None => {
                for (i, h) in h.chunks_exact(padded).enumerate() {
                    unsafe { self.state.write([block.slot, block.first + i, 0], &h[..d_state]) };
                }
            }
        }
    }

    /// Writes the states after token `t` of the block, if they are requested.
    #[inline(always)]
    fn keep(&self, block: Block, t: usize, states: &[St]) {
        let Some(token_states) = &self.token_states else { return };
        let Dims { len, d_inner, d_state, .. } = self.problem.dims;
        let at = ((block.row * len + block.token + t) * d_inner + block.first) * d_state;
        // SAFETY: this task alone works on these channels of this row.
        unsafe { token_states.part(at..at + states.len()) }.copy_from_slice(states);
    }

    /// Adds the skip connection, applies the gate, rounds and writes.
    #[inline(always)]
    fn finish<S: Lanes>(&self, simd: S, block: Block, scratch: &mut Scratch<St>) {
        let Problem { inputs, dims } = self.problem;
        let (mut skip, mut gate) = (Row::ZERO, Row::ZERO);
        if let Some(view) = &inputs.d {
            view.widen_row([block.first], &mut skip.0[..block.width]);
        }
        for t in 0..block.tokens {
            let y = &mut scratch.y[t];
            if inputs.d.is_some() {
                let terms = skip.vectors::<S>().iter().zip(scratch.u[t].vectors::<S>());
                for (y, (skip, u)) in y.vectors_mut::<S>().iter_mut().zip(terms) {
                    *y = simd.fma(*skip, *u, *y);
                }
            }
            if let Some(z) = &inputs.z {
                z.widen_row([block.row, block.token + t, block.first], &mut gate.0[..block.width]);
                for (y, z) in y.vectors_mut::<S>().iter_mut().zip(gate.vectors::<S>()) {
                    *y = simd.mul_f32s(*y, silu(simd, *z));
                }
            }
            let at = (block.row * dims.len + block.token + t) * dims.d_inner + block.first;
            // SAFETY: this task alone works on these channels of this row.
            y.narrow(unsafe { self.out.part(at..at + block.width) });
        }
    }
}
