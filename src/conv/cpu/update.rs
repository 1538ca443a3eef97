//! The update in place.

use crate::Element;
use crate::conv::update::UpdateProblem;
use crate::pool::{Pool, Slots};
use crate::shared::Shared;
use crate::simd::{BLOCK, Isa, Kernel, Lanes, Row, silu};
use crate::tasks;

use super::{BLOCKS, Filters, MOST_BEFORE, Unit, UpdateMut, channels, channels_mut, unit_rows, units};

/// Units, counted once per token, in a task at least: a microsecond or more of work.
const UNITS_PER_TASK: usize = 8;

/// The output of each token is the first channels of a row of `columns`, of which the others are left.
pub(super) fn run<T: Element, St: Element>(
    isa: Isa,
    problem: &UpdateProblem<T>,
    outputs: UpdateMut<T, St>,
    columns: usize,
) {
    let [batch, tokens, d_inner] = problem.inputs.x.shape;
    if batch == 0 || tokens == 0 {
        return;
    }
    let pass = Pass {
        problem,
        slots: problem.inputs.slots,
        state: Pool::new(outputs.state),
        out: Shared::new(outputs.out),
        columns,
        token_states: outputs.token_states.map(Shared::new),
    };
    let units = units(d_inner);
    // Units are the outer loop, so that a task reads the weights of few.
    tasks::for_each_init(units.len() * batch, UNITS_PER_TASK.div_ceil(tokens), Scratch::new, |scratch, task| {
        isa.run(Task { pass: &pass, unit: units[task / batch], row: task % batch, scratch });
    });
}

struct Pass<'p, 'a, T: Element, St: Element> {
    problem: &'p UpdateProblem<'a, T>,
    slots: Slots<'p>,
    state: Pool<'p, St>,
    out: Shared<'p, T>,
    columns: usize,
    token_states: Option<Shared<'p, St>>,
}

/// Buffers of one task, used again by the next.
struct Scratch<St> {
    /// The filters of the unit that starts at this channel.
    filters: Option<(usize, Filters)>,
    /// The state, oldest row first.
    state: Vec<Row>,
    /// The input of a token, then its output.
    x: Vec<Row>,
    /// That input as it goes into the state.
    rounded: Vec<Row>,
    stored: Vec<St>,
}

impl<St: Element> Scratch<St> {
    fn new() -> Self {
        let stored = vec![St::zeroed(); BLOCKS * BLOCK];
        Self { filters: None, state: unit_rows(MOST_BEFORE), x: unit_rows(1), rounded: unit_rows(1), stored }
    }
}

/// All tokens of one batch row for a unit of channels.
struct Task<'t, 'p, 'a, T: Element, St: Element> {
    pass: &'t Pass<'p, 'a, T, St>,
    unit: Unit,
    row: usize,
    scratch: &'t mut Scratch<St>,
}

impl<T: Element, St: Element> Kernel for Task<'_, '_, '_, T, St> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { pass, unit, row, scratch } = self;
        let inputs = &pass.problem.inputs;
        let ([_, tokens, d_inner], before) = (inputs.x.shape, pass.problem.width - 1);
        let Some(slot) = pass.slots.get(row) else { return pass.zero(row, unit) };
        let Scratch { filters, state, x, rounded, stored } = scratch;
        let filters = match filters {
            Some((first, filters)) if *first == unit.first => filters,
            _ => &filters.insert((unit.first, Filters::read(&inputs.weight, &inputs.bias, unit))).1,
        };
        for j in 0..before {
            // SAFETY: slots of different rows differ, so this task alone works on these channels of this slot.
            unsafe { pass.state.read([slot, j, unit.first], channels_mut(state, j, unit)) };
        }
        for t in 0..tokens {
            inputs.x.widen_row([row, t, unit.first], channels_mut(x, 0, unit));
            let stored = &mut stored[..unit.width];
            St::narrow(channels(x, 0, unit), stored);
            St::widen(stored, channels_mut(rounded, 0, unit));
            step(simd, filters, unit, inputs.silu, state, x, rounded);
            let at = (row * tokens + t) * pass.columns + unit.first;
            // SAFETY: this task alone works on these channels of this row.
            T::narrow(channels(x, 0, unit), unsafe { pass.out.part(at..at + unit.width) });
            let Some(states) = &pass.token_states else { continue };
            for j in 0..before {
                let at = ((row * tokens + t) * before + j) * d_inner + unit.first;
                // SAFETY: as above.
                St::narrow(channels(state, j, unit), unsafe { states.part(at..at + unit.width) });
            }
        }
        for j in 0..before {
            // SAFETY: as for reading.
            unsafe { pass.state.write([slot, j, unit.first], channels(state, j, unit)) };
        }
    }
}

impl<T: Element, St: Element> Pass<'_, '_, T, St> {
    /// What a padding row gives.
    fn zero(&self, row: usize, unit: Unit) {
        let ([_, tokens, d_inner], before) = (self.problem.inputs.x.shape, self.problem.width - 1);
        for t in row * tokens..(row + 1) * tokens {
            let at = t * self.columns + unit.first;
            // SAFETY (both): this task alone works on these channels of this row.
            unsafe { self.out.part(at..at + unit.width) }.fill(T::zeroed());
            let Some(states) = &self.token_states else { continue };
            for j in 0..before {
                let at = (t * before + j) * d_inner + unit.first;
                unsafe { states.part(at..at + unit.width) }.fill(St::zeroed());
            }
        }
    }
}

/// Replaces the input `x` of a token by its output, and moves the state on by `rounded`.
#[inline(always)]
fn step<S: Lanes>(
    simd: S,
    filters: &Filters,
    unit: Unit,
    activate: bool,
    state: &mut [Row],
    x: &mut [Row],
    rounded: &[Row],
) {
    let newest = filters.weight.len() / BLOCKS - 1;
    for i in 0..unit.blocks() {
        for lane in 0..Row::ZERO.vectors::<S>().len() {
            let mut sum = filters.bias[i].vectors::<S>()[lane];
            for k in 0..newest {
                let line = state[k * BLOCKS + i].vectors::<S>()[lane];
                sum = simd.fma(filters.weight[k * BLOCKS + i].vectors::<S>()[lane], line, sum);
                if k > 0 {
                    state[(k - 1) * BLOCKS + i].vectors_mut::<S>()[lane] = line;
                }
            }
            state[(newest - 1) * BLOCKS + i].vectors_mut::<S>()[lane] = rounded[i].vectors::<S>()[lane];
            let x = &mut x[i].vectors_mut::<S>()[lane];
            sum = simd.fma(filters.weight[newest * BLOCKS + i].vectors::<S>()[lane], *x, sum);
            *x = if activate { silu(simd, sum) } else { sum };
        }
    }
}
