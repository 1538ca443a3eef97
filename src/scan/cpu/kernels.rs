//! The recurrence on one tile of one block: the loops in which the time is spent.
//!
//! They see rows of `f32` only, so there is one instance of each for all element types.

use std::array::from_fn;

use crate::simd::{Carried, Decay, Isa, Kernel, Lanes, Row, Sum, hold_weight, polynomial};
use crate::view::Ahead;

/// B or C of a tile.
#[derive(Clone, Copy)]
pub(super) enum Coefficients<'t> {
    PerStep(PerStep<'t>),
    PerChannel(PerChannel<'t>),
}

/// [`Coefficients`] with the case known to the compiler.
pub(super) trait Coefficient: Copy {
    /// States `n..n + NS` at step `t`, for the `lane`-th vector of the block.
    fn get<S: Lanes, const NS: usize>(self, simd: S, t: usize, n: usize, lane: usize) -> [S::f32s; NS];

    /// Where among the rows of the gradient that of state `n` at step `t` begins.
    fn gradient_row(self, t: usize, n: usize) -> usize;
}

/// `(steps, d_state)`, shared by all channels.
#[derive(Clone, Copy)]
pub(super) struct PerStep<'t> {
    pub data: &'t [f32],
    pub d_state: usize,
}

impl Coefficient for PerStep<'_> {
    #[inline(always)]
    fn get<S: Lanes, const NS: usize>(self, simd: S, t: usize, n: usize, _: usize) -> [S::f32s; NS] {
        let values = &self.data[t * self.d_state + n..][..NS];
        from_fn(|i| simd.splat_f32s(values[i]))
    }

    #[inline(always)]
    fn gradient_row(self, t: usize, n: usize) -> usize {
        t * self.d_state + n
    }
}

/// A row for each state, the same at every step.
#[derive(Clone, Copy)]
pub(super) struct PerChannel<'t>(pub &'t [Row]);

impl Coefficient for PerChannel<'_> {
    #[inline(always)]
    fn get<S: Lanes, const NS: usize>(self, _: S, _: usize, n: usize, lane: usize) -> [S::f32s; NS] {
        vectors::<S, NS>(&self.0[n..], lane)
    }

    #[inline(always)]
    fn gradient_row(self, _: usize, n: usize) -> usize {
        n
    }
}

/// The `lane`-th vector of each of the first `NS` rows.
#[inline(always)]
fn vectors<S: Lanes, const NS: usize>(rows: &[Row], lane: usize) -> [S::f32s; NS] {
    let rows = &rows[..NS];
    from_fn(|i| rows[i].vectors::<S>()[lane])
}

#[inline(always)]
fn store<S: Lanes, const NS: usize>(rows: &mut [Row], lane: usize, values: [S::f32s; NS]) {
    for (row, value) in rows[..NS].iter_mut().zip(values) {
        row.vectors_mut::<S>()[lane] = value;
    }
}

/// What both recurrences read of a tile.
#[derive(Clone, Copy)]
pub(super) struct Tile<'t> {
    /// log2(e)·A for each state.
    pub a: &'t [Row],
    /// 1/A for each state with zero-order hold, else empty.
    pub inverse_a: &'t [Row],
    pub b: Coefficients<'t>,
    pub c: Coefficients<'t>,
    /// Δ at each step.
    pub delta: &'t [Row],
    /// Δ·u at each step, or u with zero-order hold.
    pub input: &'t [Row],
}

/// Takes the gradient of a state and what rounding has cost it from tile to tile: past all steps of a tile at once, whose
/// decays together are `2^exponent`, and with what the tile makes of zero added.
///
/// Within a tile rounded decays do, and roundings that are not made good. From tile to tile they would add up, to 2^-25 for
/// each step of a sequence where all are rounded the same way. (Forward, states are compensated in each step: there this
/// would take longer, here less long.)
#[inline(always)]
fn carry<S: Lanes>(simd: S, lane: usize, d_h: &mut Row, lost: &mut Row, exponent: S::f32s, local: S::f32s) {
    let (d_h, lost) = (&mut d_h.vectors_mut::<S>()[lane], &mut lost.vectors_mut::<S>()[lane]);
    let after = Carried { value: *d_h, lost: *lost };
    let before = after.decayed(simd, Decay::exp2(simd, exponent)).plus(simd, local);
    (*d_h, *lost) = (before.value, before.lost);
}

/// Calls `$run::<S, B, C, HOLD>` for the kinds of B and C and the discretization at hand.
macro_rules! specialise {
    ($kernel:expr, $run:ident, $simd:expr) => {{
        use Coefficients::{PerChannel, PerStep};
        let (kernel, simd) = ($kernel, $simd);
        let Tile { inverse_a, b, c, .. } = kernel.tile;
        match (b, c, !inverse_a.is_empty()) {
            (PerStep(b), PerStep(c), false) => $run::<S, _, _, false>(simd, kernel, b, c),
            (PerStep(b), PerStep(c), true) => $run::<S, _, _, true>(simd, kernel, b, c),
            (PerStep(b), PerChannel(c), false) => $run::<S, _, _, false>(simd, kernel, b, c),
            (PerStep(b), PerChannel(c), true) => $run::<S, _, _, true>(simd, kernel, b, c),
            (PerChannel(b), PerStep(c), false) => $run::<S, _, _, false>(simd, kernel, b, c),
            (PerChannel(b), PerStep(c), true) => $run::<S, _, _, true>(simd, kernel, b, c),
            (PerChannel(b), PerChannel(c), false) => $run::<S, _, _, false>(simd, kernel, b, c),
            (PerChannel(b), PerChannel(c), true) => $run::<S, _, _, true>(simd, kernel, b, c),
        }
    }};
}

/// Calls `$run` on all states, as many at a time as there are registers for.
macro_rules! in_groups {
    ($wide:literal, $states:expr, $run:ident::<$($generic:ident),*>($($argument:expr),*)) => {{
        let (mut n, states) = (0, $states);
        while n + $wide <= states {
            $run::<$($generic,)* $wide>($($argument,)* n);
            n += $wide;
        }
        while n < states {
            $run::<$($generic,)* 1>($($argument,)* n);
            n += 1;
        }
    }};
}

/// Makes a kernel whose `on` runs it. That is not generic, so that it is compiled here and not again in every crate that
/// uses this one.
macro_rules! compiled_here {
    ($($kernel:ident),*) => {
        $(impl $kernel<'_> {
            pub fn on(self, isa: Isa) {
                isa.run(self);
            }
        })*
    };
}

compiled_here!(Advance, Retreat, RetreatStates);

/// Runs the recurrence through a tile.
pub(super) struct Advance<'t> {
    pub tile: Tile<'t>,
    /// The states, advanced to the end of the tile.
    pub h: &'t mut [Row],
    /// What rounding has cost each state in its last step, to be made good in the next (compensated summation). Without it
    /// a state that forgets nothing would be off by 2^-25 for each step where all are rounded the same way. It is a part
    /// of the state, and decays with it.
    pub lost: &'t mut [Row],
    /// `Σ_n C h` is added to this at each step.
    pub y: &'t mut [Row],
    /// What will be read next, prefetched one row in each step: all at once would hold up what is read now.
    pub ahead: [Ahead; 3],
}

impl Kernel for Advance<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        specialise!(self, advance, simd);
    }
}

#[inline(always)]
fn advance<S: Lanes, B: Coefficient, C: Coefficient, const HOLD: bool>(simd: S, mut kernel: Advance, b: B, c: C) {
    let (states, kernel) = (kernel.h.len(), &mut kernel);
    for lane in 0..Row::ZERO.vectors::<S>().len() {
        if S::REGISTER_COUNT >= 32 {
            in_groups!(8, states, advance_states::<S, B, C, HOLD>(simd, kernel, b, c, lane));
        } else {
            in_groups!(4, states, advance_states::<S, B, C, HOLD>(simd, kernel, b, c, lane));
        }
    }
}

#[inline(always)]
fn advance_states<S: Lanes, B: Coefficient, C: Coefficient, const HOLD: bool, const NS: usize>(
    simd: S,
    kernel: &mut Advance,
    b: B,
    c: C,
    lane: usize,
    n: usize,
) {
    let Tile { delta, input, .. } = kernel.tile;
    let a = vectors::<S, NS>(&kernel.tile.a[n..], lane);
    let mut h = vectors::<S, NS>(&kernel.h[n..], lane);
    let mut lost = vectors::<S, NS>(&kernel.lost[n..], lane);
    let steps = delta.iter().zip(input).zip(kernel.y.iter_mut()).enumerate();
    for (t, ((delta, input), y)) in steps {
        let (delta, input) = (delta.vectors::<S>()[lane], input.vectors::<S>()[lane]);
        let (b, c) = (b.get::<S, NS>(simd, t, n, lane), c.get::<S, NS>(simd, t, n, lane));
        if n + lane == 0 {
            kernel.ahead.iter().for_each(|ahead| ahead.prefetch(t));
        }
        let y = &mut y.vectors_mut::<S>()[lane];
        let mut sum = *y;
        for i in 0..NS {
            let decay = Decay::exp2(simd, simd.mul_f32s(delta, a[i]));
            let weighted = if HOLD {
                let inverse = kernel.tile.inverse_a[n + i].vectors::<S>()[lane];
                simd.mul_f32s(input, hold_weight(simd, decay.minus_one(simd), inverse, delta))
            } else {
                input
            };
            // h = 2^k·h + (w·2^k·h + B̄u + 2^k·lost), of which all but the first term is small where h changes little. (Of
            // 2^k·(1 + w)·lost, w·lost is less than the rounding of this step.)
            let power = decay.power(simd);
            let scaled = simd.mul_f32s(power, h[i]);
            let change = simd.fma(decay.w, scaled, simd.fma(weighted, b[i], simd.mul_f32s(power, lost[i])));
            h[i] = simd.add_f32s(scaled, change);
            lost[i] = simd.sub_f32s(change, simd.sub_f32s(h[i], scaled));
            sum = simd.fma(c[i], h[i], sum);
        }
        *y = sum;
    }
    store::<S, NS>(&mut kernel.h[n..], lane, h);
    store::<S, NS>(&mut kernel.lost[n..], lane, lost);
}

/// Takes the gradient of the states backwards through a tile, recomputing the states on the way there.
pub(super) struct Retreat<'t> {
    pub tile: Tile<'t>,
    /// ΣΔ.
    pub delta_sum: Row,
    /// The gradient of y at each step.
    pub d_y: &'t [Row],
    /// The states before the tile.
    pub h: &'t [Row],
    /// The gradient of the states after the tile; of those before it, on return.
    pub d_h: &'t mut [Row],
    /// What rounding has cost each of these, see [`carry`].
    pub lost: &'t mut [Row],
    /// `Σ_n C h` is added to this.
    pub y: &'t mut [Row],
    /// Receives the gradient of [`Tile::input`].
    pub d_input: &'t mut [Row],
    /// Receives log2(e) times the gradient of Δ, what it gets through `input` left out.
    pub d_delta: &'t mut [Row],
    /// The gradients of A, B and C, added to; of B and C a row for each step and state if they vary.
    pub d_a: &'t mut [Sum],
    pub d_b: &'t mut [Row],
    pub d_c: &'t mut [Row],
    pub history: &'t mut History,
    /// See [`Advance::ahead`].
    pub ahead: [Ahead; 4],
}

/// What the way back needs of each step: the state before it, its decay and, with zero-order hold, that less 1. (Neither can
/// be had from the other: the one has no digits left where it is near zero, the other near 1.)
pub(super) struct History {
    before: Vec<Row>,
    decay: Vec<Row>,
    decay_minus_one: Vec<Row>,
}

impl History {
    pub fn new(steps: usize) -> Self {
        let rows = |steps| vec![Row::ZERO; steps * WIDEST_RETREAT];
        Self { before: rows(steps + 1), decay: rows(steps), decay_minus_one: rows(steps) }
    }
}

/// States that [`Retreat`] works on at a time: more would push the history out of the first-level cache.
const WIDEST_RETREAT: usize = 4;

impl Kernel for Retreat<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        specialise!(self, retreat, simd);
    }
}

#[inline(always)]
fn retreat<S: Lanes, B: Coefficient, C: Coefficient, const HOLD: bool>(simd: S, mut kernel: Retreat, b: B, c: C) {
    let (states, kernel) = (kernel.h.len(), &mut kernel);
    for lane in 0..Row::ZERO.vectors::<S>().len() {
        in_groups!(4, states, retreat_states::<S, B, C, HOLD>(simd, kernel, b, c, lane));
    }
}

#[inline(always)]
fn retreat_states<S: Lanes, B: Coefficient, C: Coefficient, const HOLD: bool, const NS: usize>(
    simd: S,
    kernel: &mut Retreat,
    b: B,
    c: C,
    lane: usize,
    n: usize,
) {
    let steps = kernel.tile.delta.len();
    let zero = simd.splat_f32s(0.0);
    let a = vectors::<S, NS>(&kernel.tile.a[n..], lane);
    let inverse_a = if HOLD { vectors::<S, NS>(&kernel.tile.inverse_a[n..], lane) } else { [zero; NS] };
    let History { before, decay, decay_minus_one } = &mut *kernel.history;
    let (before, decay) = (&mut before[..(steps + 1) * NS], &mut decay[..steps * NS]);
    let decay_minus_one = &mut decay_minus_one[..steps * NS];

    let mut h = vectors::<S, NS>(&kernel.h[n..], lane);
    let decays = decay.chunks_exact_mut(NS).zip(decay_minus_one.chunks_exact_mut(NS));
    let past = before.chunks_exact_mut(NS).zip(decays);
    let rows = kernel.tile.delta.iter().zip(kernel.tile.input).zip(kernel.y.iter_mut());
    for (t, (((delta, input), y), (before, (decay, decay_minus_one)))) in rows.zip(past).enumerate() {
        let (delta, input) = (delta.vectors::<S>()[lane], input.vectors::<S>()[lane]);
        let (b, c) = (b.get::<S, NS>(simd, t, n, lane), c.get::<S, NS>(simd, t, n, lane));
        if n + lane == 0 {
            kernel.ahead.iter().for_each(|ahead| ahead.prefetch(t));
        }
        let y = &mut y.vectors_mut::<S>()[lane];
        let mut sum = *y;
        for i in 0..NS {
            let parts = Decay::exp2(simd, simd.mul_f32s(delta, a[i]));
            let value = parts.value(simd);
            before[i].vectors_mut::<S>()[lane] = h[i];
            decay[i].vectors_mut::<S>()[lane] = value;
            let weighted = if HOLD {
                let minus_one = parts.minus_one(simd);
                decay_minus_one[i].vectors_mut::<S>()[lane] = minus_one;
                simd.mul_f32s(input, hold_weight(simd, minus_one, inverse_a[i], delta))
            } else {
                input
            };
            h[i] = simd.fma(weighted, b[i], simd.mul_f32s(value, h[i]));
            sum = simd.fma(c[i], h[i], sum);
        }
        *y = sum;
    }
    store::<S, NS>(&mut before[steps * NS..], lane, h);

    let mut g = vectors::<S, NS>(&kernel.d_h[n..], lane);
    // What the tile makes of a zero gradient after it.
    let mut local = [zero; NS];
    let mut d_a = [zero; NS];
    for t in (0..steps).rev() {
        let (delta, input) = (kernel.tile.delta[t].vectors::<S>()[lane], kernel.tile.input[t].vectors::<S>()[lane]);
        let d_y = kernel.d_y[t].vectors::<S>()[lane];
        let at = b.gradient_row(t, n);
        let d_b = &mut kernel.d_b[at..at + NS];
        let at = c.gradient_row(t, n);
        let d_c = &mut kernel.d_c[at..at + NS];
        let (b, c) = (b.get::<S, NS>(simd, t, n, lane), c.get::<S, NS>(simd, t, n, lane));
        let (before, decay) = (&before[t * NS..][..2 * NS], &decay[t * NS..][..NS]);
        let decay_minus_one = &decay_minus_one[t * NS..][..NS];
        let d_input_row = &mut kernel.d_input[t].vectors_mut::<S>()[lane];
        let d_delta_row = &mut kernel.d_delta[t].vectors_mut::<S>()[lane];
        let (mut d_input, mut d_delta) = if n == 0 { (zero, zero) } else { (*d_input_row, *d_delta_row) };
        for i in 0..NS {
            let (before, after) = (before[i].vectors::<S>()[lane], before[NS + i].vectors::<S>()[lane]);
            let decay = decay[i].vectors::<S>()[lane];
            let weight = if HOLD {
                hold_weight(simd, decay_minus_one[i].vectors::<S>()[lane], inverse_a[i], delta)
            } else {
                zero
            };
            let weighted = if HOLD { simd.mul_f32s(weight, input) } else { input };
            let d_state = simd.fma(c[i], d_y, g[i]);

            let d_c = &mut d_c[i].vectors_mut::<S>()[lane];
            *d_c = simd.fma(d_y, after, *d_c);
            let d_b = &mut d_b[i].vectors_mut::<S>()[lane];
            *d_b = simd.fma(d_state, weighted, *d_b);

            // The gradient of the state before the step, and with it that of log(exp(ΔA)) = ΔA.
            g[i] = simd.mul_f32s(decay, d_state);
            local[i] = simd.mul_f32s(decay, simd.fma(c[i], d_y, local[i]));
            let d_log = simd.mul_f32s(g[i], before);
            d_a[i] = simd.fma(delta, d_log, d_a[i]);
            d_delta = simd.fma(a[i], d_log, d_delta);

            if HOLD {
                let d_weighted = simd.mul_f32s(d_state, b[i]);
                d_input = simd.fma(d_weighted, weight, d_input);
                let d_weight = simd.mul_f32s(d_weighted, input);
                let slope = hold_weight_slope(simd, a[i], inverse_a[i], delta, weight, decay);
                d_a[i] = simd.fma(d_weight, slope, d_a[i]);
                let by_delta = simd.mul_f32s(decay, simd.splat_f32s(std::f32::consts::LOG2_E));
                d_delta = simd.fma(d_weight, by_delta, d_delta);
            } else {
                d_input = simd.fma(d_state, b[i], d_input);
            }
        }
        (*d_input_row, *d_delta_row) = (d_input, d_delta);
    }
    let (d_h, lost) = (&mut kernel.d_h[n..n + NS], &mut kernel.lost[n..n + NS]);
    for (i, (d_h, lost)) in d_h.iter_mut().zip(lost).enumerate() {
        let exponent = simd.mul_f32s(kernel.delta_sum.vectors::<S>()[lane], a[i]);
        carry(simd, lane, d_h, lost, exponent, local[i]);
    }
    for (total, d_a) in kernel.d_a[n..][..NS].iter_mut().zip(d_a) {
        total.add(simd, lane, d_a);
    }
}

/// The derivative of `(exp(ΔA) - 1)/A` by A: `Δ² φ'(ΔA)` with `φ(x) = (e^x - 1)/x`, given that weight and `exp(ΔA)`.
#[inline(always)]
fn hold_weight_slope<S: Lanes>(
    simd: S,
    a: S::f32s,
    inverse_a: S::f32s,
    delta: S::f32s,
    weight: S::f32s,
    decay: S::f32s,
) -> S::f32s {
    let x = simd.mul_f32s(simd.mul_f32s(delta, a), simd.splat_f32s(std::f32::consts::LN_2));
    // φ'(x) = Σ x^k/(k! (k + 2)); the closed form loses as many digits as x has zeros.
    let series = polynomial(simd, x, [0.5, 1.0 / 3.0, 0.125, 1.0 / 30.0, 1.0 / 144.0, 1.0 / 840.0, 1.0 / 5760.0]);
    let near = simd.mul_f32s(simd.mul_f32s(delta, delta), series);
    let far = simd.mul_f32s(simd.sub_f32s(simd.mul_f32s(delta, decay), weight), inverse_a);
    simd.select_f32s(simd.less_than_f32s(simd.abs_f32s(x), simd.splat_f32s(0.5)), near, far)
}

/// Takes the gradient of the states backwards through a tile and computes nothing else.
pub(super) struct RetreatStates<'t> {
    pub tile: Tile<'t>,
    /// ΣΔ.
    pub delta_sum: Row,
    pub d_y: &'t [Row],
    pub d_h: &'t mut [Row],
    /// See [`Retreat::lost`].
    pub lost: &'t mut [Row],
}

impl Kernel for RetreatStates<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        for lane in 0..Row::ZERO.vectors::<S>().len() {
            let states = self.d_h.iter_mut().zip(self.lost.iter_mut()).zip(self.tile.a);
            for (n, ((d_h, lost), a)) in states.enumerate() {
                let (a, mut local) = (a.vectors::<S>()[lane], simd.splat_f32s(0.0));
                for t in (0..self.tile.delta.len()).rev() {
                    let [c] = match self.tile.c {
                        Coefficients::PerStep(c) => c.get::<S, 1>(simd, t, n, lane),
                        Coefficients::PerChannel(c) => c.get::<S, 1>(simd, t, n, lane),
                    };
                    let decay = Decay::exp2(simd, simd.mul_f32s(self.tile.delta[t].vectors::<S>()[lane], a));
                    local = decay.apply(simd, simd.fma(c, self.d_y[t].vectors::<S>()[lane], local));
                }
                let exponent = simd.mul_f32s(self.delta_sum.vectors::<S>()[lane], a);
                carry(simd, lane, d_h, lost, exponent, local);
            }
        }
    }
}
