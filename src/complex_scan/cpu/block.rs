//! A block of channels: what it reads, and one step of its states.

use super::Problem;
use super::math::{LANES, Wide, WideNumber, exp, sin_cos};
use crate::reference::softplus;
use crate::sequences::Sequence;
use crate::{Element, Projection, View};

/// Neighbouring channels of one group, at most [`LANES`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Block {
    pub group: usize,
    pub first: usize,
    pub width: usize,
}

impl Block {
    /// The number of blocks of a group of `channels` channels.
    pub fn count(channels: usize) -> usize {
        channels.div_ceil(LANES)
    }

    /// The `index`-th block of a group.
    pub fn of_group(channels: usize, group: usize, index: usize) -> Self {
        let first = index * LANES;
        Self { group, first: group * channels + first, width: LANES.min(channels - first) }
    }
}

/// B or C of a block: the same for all its channels at a step, or of each its own at all steps.
pub(super) enum Coefficients {
    Varying(Vec<f32>),
    Constant(Vec<WideNumber>),
}

impl Coefficients {
    fn new<T: Element>(projection: &Projection<T>, d_state: usize, block: Block) -> Self {
        match projection {
            Projection::Varying(_) => Self::Varying(vec![0.0; 2 * d_state]),
            Projection::Constant(view) => Self::Constant(numbers(view, d_state, block)),
        }
    }

    #[inline(always)]
    fn read<T: Element>(&mut self, projection: &Projection<T>, at: [usize; 4]) {
        if let (Self::Varying(row), Projection::Varying(view)) = (self, projection) {
            view.widen_row(at, row);
        }
    }

    #[inline(always)]
    pub fn at(&self, n: usize) -> WideNumber {
        match self {
            Self::Varying(row) => {
                let part = |k: usize| Wide([row[2 * n + k].into(); LANES]);
                WideNumber { re: part(0), im: part(1) }
            }
            Self::Constant(all) => all[n],
        }
    }
}

/// A block's complex parameters, by state.
fn numbers(view: &View<f32, 2>, d_state: usize, block: Block) -> Vec<WideNumber> {
    let mut all = vec![WideNumber::ZERO; d_state];
    for (n, number) in all.iter_mut().enumerate() {
        for i in 0..block.width {
            number.re.0[i] = view.at([block.first + i, 2 * n]).into();
            number.im.0[i] = view.at([block.first + i, 2 * n + 1]).into();
        }
    }
    all
}

/// What a block reads of a sequence.
pub(super) struct Channels<'p, 'a, T: Element> {
    pub problem: &'p Problem<'a, T>,
    pub block: Block,
    pub a: Vec<WideNumber>,
    pub b: Coefficients,
    pub c: Coefficients,
    pub d: Wide,
    bias: Wide,
}

/// What a step reads of activations.
pub(super) struct Step {
    pub u: Wide,
    pub delta: Wide,
    /// The derivative of `delta` by what it was before softplus.
    pub slope: Wide,
}

impl<'p, 'a, T: Element> Channels<'p, 'a, T> {
    pub fn new(problem: &'p Problem<'a, T>, block: Block) -> Self {
        let (inputs, d_state) = (&problem.inputs, problem.sizes.d_state);
        let of = |view: &Option<View<f32, 1>>| {
            let mut wide = Wide::ZERO;
            for (i, x) in wide.0.iter_mut().enumerate().take(block.width) {
                *x = view.map_or(0.0, |view| view.at([block.first + i]).into());
            }
            wide
        };
        Self {
            problem,
            block,
            a: numbers(&inputs.a, d_state, block),
            b: Coefficients::new(&inputs.b, d_state, block),
            c: Coefficients::new(&inputs.c, d_state, block),
            d: of(&inputs.d),
            bias: of(&inputs.delta_bias),
        }
    }

    /// The block's elements of an activation at step `t` of a batch row.
    #[inline(always)]
    pub fn row(&self, view: &View<T, 3>, sequence: Sequence, t: usize) -> Wide {
        let mut narrow = [0.0f32; LANES];
        view.widen_row([sequence.batch, t, self.block.first], &mut narrow[..self.block.width]);
        Wide(narrow.map(f64::from))
    }

    /// Reads what a step needs. B and C are kept.
    #[inline(always)]
    pub fn read(&mut self, sequence: Sequence, t: usize) -> Step {
        let inputs = &self.problem.inputs;
        let at = [sequence.batch, t, self.block.group, 0];
        self.b.read(&inputs.b, at);
        self.c.read(&inputs.c, at);
        let mut step = Step {
            u: self.row(&inputs.u, sequence, t),
            delta: self.row(&inputs.delta, sequence, t),
            slope: Wide([1.0; LANES]),
        };
        for i in 0..LANES {
            step.delta.0[i] += self.bias.0[i];
            if inputs.options.delta_softplus {
                (step.delta.0[i], step.slope.0[i]) = softplus(step.delta.0[i]);
            }
        }
        step
    }

    /// The states of a sequence in a tensor of states, zero if it is absent.
    pub fn read_states(&self, view: &Option<View<f32, 3>>, sequence: Sequence, to: &mut [WideNumber]) {
        to.fill(WideNumber::ZERO);
        let Some(view) = view else { return };
        for (n, state) in to.iter_mut().enumerate() {
            for i in 0..self.block.width {
                let part = |k| f64::from(view.at([sequence.index, self.block.first + i, 2 * n + k]));
                (state.re.0[i], state.im.0[i]) = (part(0), part(1));
            }
        }
    }

    /// Where the block's states of a sequence lie in a dense tensor of states.
    pub fn state_range(&self, sequence: Sequence) -> std::ops::Range<usize> {
        let states = 2 * self.problem.sizes.d_state;
        let first = (sequence.index * self.problem.sizes.d_inner + self.block.first) * states;
        first..first + self.block.width * states
    }

    /// Where the block's elements of step `t` lie in a dense activation.
    #[inline(always)]
    pub fn range(&self, sequence: Sequence, t: usize) -> std::ops::Range<usize> {
        let first = (sequence.batch * self.problem.sizes.length + t) * self.problem.sizes.d_inner + self.block.first;
        first..first + self.block.width
    }

    /// Writes states to their dense range.
    pub fn write_states(&self, states: &[WideNumber], to: &mut [f32]) {
        for (i, to) in to.chunks_exact_mut(2 * states.len()).enumerate() {
            for (to, state) in to.as_chunks_mut::<2>().0.iter_mut().zip(states) {
                *to = [state.re.0[i] as f32, state.im.0[i] as f32];
            }
        }
    }
}

/// `exp(ΔA)`.
#[inline(always)]
pub(super) fn decay(a: &WideNumber, delta: &Wide) -> WideNumber {
    let scaled = |x: &Wide| Wide(std::array::from_fn(|i| x.0[i] * delta.0[i]));
    let size = exp(&scaled(&a.re));
    let (sin, cos) = sin_cos(&scaled(&a.im));
    let times = |x: Wide| Wide(std::array::from_fn(|i| x.0[i] * size.0[i]));
    WideNumber { re: times(cos), im: times(sin) }
}

/// One step of all states.
#[inline(always)]
pub(super) fn advance(a: &[WideNumber], b: &Coefficients, step: &Step, states: &mut [WideNumber]) {
    for (n, state) in states.iter_mut().enumerate() {
        let (decay, b, before) = (decay(&a[n], &step.delta), b.at(n), *state);
        for i in 0..LANES {
            let input = step.delta.0[i] * step.u.0[i];
            state.re.0[i] = decay.re.0[i] * before.re.0[i] - decay.im.0[i] * before.im.0[i] + b.re.0[i] * input;
            state.im.0[i] = decay.re.0[i] * before.im.0[i] + decay.im.0[i] * before.re.0[i] + b.im.0[i] * input;
        }
    }
}

/// y of states.
#[inline(always)]
pub(super) fn read_out(c: &Coefficients, skip: Option<&Wide>, step: &Step, states: &[WideNumber]) -> Wide {
    let mut sum = Wide::ZERO;
    for (n, state) in states.iter().enumerate() {
        let c = c.at(n);
        for i in 0..LANES {
            sum.0[i] += c.re.0[i] * state.re.0[i] - c.im.0[i] * state.im.0[i];
        }
    }
    // Without D nothing goes past the states, not even the NaN of zero times infinity.
    Wide(std::array::from_fn(|i| 2.0 * sum.0[i] + skip.map_or(0.0, |d| d.0[i] * step.u.0[i])))
}
