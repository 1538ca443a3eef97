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

/// One channel's numbers.
struct Scratch {
    state: Vec<f32>,
    recurrence: Vec<f32>,
    c: Vec<f32>,
}

impl Scratch {
    fn new(d_state: usize) -> Self {
        let zeros = |count| vec![0.0; count * d_state];
        Self { state: zeros(2), recurrence: zeros(RECURRENCE_ROWS), c: zeros(2) }
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
            unsafe { pass.state.read([slot, channel, 0], &mut scratch.state) };
            for token in 0..sizes.length {
                let (u, at) = (f64::from(inputs.u.at([row, token, channel])), at(token));
                let y = scratch.step(u) + skip * u;
                // SAFETY: as above.
                unsafe { pass.state.write([slot, channel, 0], &scratch.state) };
                // As the pool holds it, for the next token.
                for x in &mut scratch.state {
                    *x = St::from_f32(*x).to_f32();
                }
                // SAFETY (both): this task alone works on this channel of this row.
                let out = unsafe { pass.out.part(at..at + 1) };
                out[0] = T::from_f32(y as f32);
                if let Some(all) = &pass.token_states {
                    St::narrow(&scratch.state, unsafe { all.part(at * states..(at + 1) * states) });
                }
            }
        }
    }
}

impl Scratch {
    #[inline(always)]
    fn read(&mut self, recurrence: &View<f32, 3>, c: &View<f32, 2>, channel: usize) {
        let d_state = recurrence.shape[2];
        for (k, row) in self.recurrence.chunks_exact_mut(d_state).enumerate() {
            recurrence.widen_row([channel, k, 0], row);
        }
        c.widen_row([channel, 0], &mut self.c);
    }

    /// One step of all pairs: `2 Re(C x)` of the states before they are rounded.
    #[inline(always)]
    fn step(&mut self, u: f64) -> f64 {
        let d_state = self.c.len() / 2;
        let mut rows = self.recurrence.chunks_exact(d_state);
        let rows: [&[f32]; RECURRENCE_ROWS] = std::array::from_fn(|_| rows.next().unwrap_or_default());
        let wide = |k: usize, n: usize| f64::from(rows[k][n]);
        // Sums of every eighth pair, so that no addition waits for the one before.
        let mut sums = [0.0; 8];
        let pairs = self.state.as_chunks_mut::<2>().0.iter_mut().zip(self.c.as_chunks::<2>().0);
        for (n, (x, c)) in pairs.enumerate() {
            let (a_re, a_im) = (wide(0, n) + wide(1, n), wide(2, n) + wide(3, n));
            let (re, im) = (f64::from(x[0]), f64::from(x[1]));
            let after = [a_re * re - a_im * im + wide(4, n) * u, a_re * im + a_im * re + wide(5, n) * u];
            sums[n % 8] += f64::from(c[0]) * after[0] - f64::from(c[1]) * after[1];
            *x = [after[0] as f32, after[1] as f32];
        }
        2.0 * sums.iter().sum::<f64>()
    }
}
