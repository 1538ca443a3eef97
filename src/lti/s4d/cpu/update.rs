//! The update in place: the states of a channel one after another as they lie in memory, in `f64`.

use rayon::prelude::*;

use super::{UpdateMut, UpdateProblem};
use crate::lti::s4d::RECURRENCE_ROWS;
use crate::pool::Pool;
use crate::shared::Shared;
use crate::simd::{Isa, Kernel, Lanes};
use crate::{Element, View};

/// States, counted once per token, in a task at least: a few microseconds of work.
const STATES_PER_TASK: usize = 4096;

pub(super) fn run<T: Element, St: Element>(isa: Isa, problem: &UpdateProblem<T>, outputs: UpdateMut<T, St>) {
    let sizes = problem.sizes;
    if sizes.batch == 0 || sizes.length == 0 {
        return;
    }
    let pass = Pass {
        problem,
        state: Pool::new(outputs.state),
        out: Shared::new(outputs.out),
        token_states: outputs.token_states.map(Shared::new),
    };
    let channels = STATES_PER_TASK.div_ceil(sizes.d_state);
    let parts = sizes.d_inner.div_ceil(channels);
    (0..sizes.batch * parts).into_par_iter().for_each_init(
        || Scratch::new(sizes.d_state),
        |scratch, task| {
            let first = task % parts * channels;
            let last = (first + channels).min(sizes.d_inner);
            isa.run(Task { pass: &pass, row: task / parts, channels: first..last, scratch });
        },
    );
}

struct Pass<'p, 'a, T: Element, St: Element> {
    problem: &'p UpdateProblem<'a, T>,
    state: Pool<'p, St>,
    out: Shared<'p, T>,
    token_states: Option<Shared<'p, St>>,
}

/// Pairs that are worked on together. Zeros fill the last of them.
const PAIRS: usize = 8;

/// One channel's numbers, those of each row followed by zeros up to whole [`PAIRS`].
struct Scratch {
    d_state: usize,
    state: Vec<f32>,
    recurrence: Vec<f32>,
    c: Vec<f32>,
}

impl Scratch {
    fn new(d_state: usize) -> Self {
        let zeros = |count| vec![0.0; count * d_state.next_multiple_of(PAIRS)];
        Self { d_state, state: zeros(2), recurrence: zeros(RECURRENCE_ROWS), c: zeros(2) }
    }
}

/// All tokens of one batch row for some channels.
struct Task<'t, 'p, 'a, T: Element, St: Element> {
    pass: &'t Pass<'p, 'a, T, St>,
    row: usize,
    channels: std::ops::Range<usize>,
    scratch: &'t mut Scratch,
}

impl<T: Element, St: Element> Kernel for Task<'_, '_, '_, T, St> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let Self { pass, row, channels, scratch } = self;
        let inputs = &pass.problem.inputs;
        let sizes = pass.problem.sizes;
        let (slot, states) = (inputs.slots.get(row), 2 * sizes.d_state);
        for channel in channels {
            let at = |token: usize| (row * sizes.length + token) * sizes.d_inner + channel;
            let Some(slot) = slot else {
                for at in (0..sizes.length).map(at) {
                    // SAFETY (both): this task alone works on this channel of this row.
                    let out = unsafe { pass.out.part(at..at + 1) };
                    out[0] = T::zeroed();
                    if let Some(all) = &pass.token_states {
                        unsafe { all.part(at * states..(at + 1) * states) }.fill(St::zeroed());
                    }
                }
                continue;
            };
            scratch.read(&inputs.recurrence, &inputs.c, channel);
            let skip: f64 = inputs.d.map_or(0.0, |d| d.at([channel]).into());
            // SAFETY: the slots of different rows differ, so this task alone works on this channel of this slot.
            unsafe { pass.state.read([slot, channel, 0], scratch.numbers()) };
            for token in 0..sizes.length {
                let (u, at) = (f64::from(inputs.u.at([row, token, channel])), at(token));
                let y = scratch.step(u) + skip * u;
                // SAFETY: as above.
                unsafe { pass.state.write([slot, channel, 0], scratch.numbers()) };
                // As the pool holds it, for the next token.
                for x in scratch.numbers() {
                    *x = St::from_f32(*x).to_f32();
                }
                // SAFETY (both): this task alone works on this channel of this row.
                let out = unsafe { pass.out.part(at..at + 1) };
                out[0] = T::from_f32(y as f32);
                if let Some(all) = &pass.token_states {
                    St::narrow(scratch.numbers(), unsafe { all.part(at * states..(at + 1) * states) });
                }
            }
        }
    }
}

impl Scratch {
    #[inline(always)]
    fn read(&mut self, recurrence: &View<f32, 3>, c: &View<f32, 2>, channel: usize) {
        let padded = self.d_state.next_multiple_of(PAIRS);
        for (k, row) in self.recurrence.chunks_exact_mut(padded).enumerate() {
            recurrence.widen_row([channel, k, 0], &mut row[..self.d_state]);
        }
        c.widen_row([channel, 0], &mut self.c[..2 * self.d_state]);
    }

    /// The numbers of the state.
    #[inline(always)]
    fn numbers(&mut self) -> &mut [f32] {
        &mut self.state[..2 * self.d_state]
    }

    /// One step of all pairs: `2 Re(C x)` of the states before they are rounded.
    #[inline(always)]
    fn step(&mut self, u: f64) -> f64 {
        let padded = self.c.len() / 2;
        // A sum for each of the pairs that are worked on together, so that no addition waits for the one before.
        let mut sums = [0.0; PAIRS];
        let states = self.state.as_chunks_mut::<{ 2 * PAIRS }>().0;
        for (part, (x, c)) in states.iter_mut().zip(self.c.as_chunks::<{ 2 * PAIRS }>().0).enumerate() {
            let rows: [[f64; PAIRS]; RECURRENCE_ROWS] = std::array::from_fn(|k| {
                let row = &self.recurrence[k * padded + part * PAIRS..][..PAIRS];
                std::array::from_fn(|n| f64::from(row[n]))
            });
            for n in 0..PAIRS {
                let (a_re, a_im) = (rows[0][n] + rows[1][n], rows[2][n] + rows[3][n]);
                let (re, im) = (f64::from(x[2 * n]), f64::from(x[2 * n + 1]));
                let after = [a_re * re - a_im * im + rows[4][n] * u, a_re * im + a_im * re + rows[5][n] * u];
                sums[n] += f64::from(c[2 * n]) * after[0] - f64::from(c[2 * n + 1]) * after[1];
                (x[2 * n], x[2 * n + 1]) = (after[0] as f32, after[1] as f32);
            }
        }
        2.0 * sums.iter().sum::<f64>()
    }
}
