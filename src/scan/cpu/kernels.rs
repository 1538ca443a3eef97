//! The recurrence on one tile of one block: the loops in which the time is spent.
//!
//! They see rows of `f32` only, so there is one instance of each for all element types.

use std::array::from_fn;

use crate::simd::{Decay, Isa, Kernel, Lanes, Row, hold_weight, polynomial};
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
    /// What rounding has cost each state in its last step, to be made good in the next (compensated summation). Without
    /// it a state that forgets nothing would be off by 2^-25 times the root of the number of steps, 1e-5 after 65,536.
    pub lost: &'t mut [Row],
    /// `Σ_n C h` is added to this at each step.
    pub y: &'t mut [Row],
    /// What will be read next, asked for one row in each step: asked for at once it would hold up what is read now.
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
            // h = 2^k·h + (w·2^k·h + B̄u + lost), of which all but the first addition is small where h changes little.
            let scaled = simd.scale(h[i], decay.k);
            let change = simd.fma(decay.w, scaled, simd.fma(weighted, b[i], lost[i]));
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
    /// The gradient of y at each step.
    pub d_y: &'t [Row],
    /// The states before the tile.
    pub h: &'t [Row],
    /// The gradient of the states behind the tile; of those before it, on return.
    pub d_h: &'t mut [Row],
    /// `Σ_n C h` is added to this.
    pub y: &'t mut [Row],
    /// Receives the gradient of [`Tile::input`].
    pub d_input: &'t mut [Row],
    /// Receives log2(e) times the gradient of Δ, what it gets through `input` left out.
    pub d_delta: &'t mut [Row],
    /// The gradients of A, B and C, added to; of B and C a row for each step and state if they vary.
    pub d_a: &'t mut [Row],
    pub d_b: &'t mut [Row],
    pub d_c: &'t mut [Row],
    pub history: &'t mut History,
    /// See [`Advance::ahead`].
    pub ahead: [Ahead; 4],
}

/// What the way back needs of each step: `exp(ΔA) h` and `exp(ΔA) - 1`.
///
/// The decay is kept less 1 because a rounded decay drifts, see [`Decay`]. A gradient that is multiplied by it gets an
/// error of 2^-25 of what it was before the step, which is more than rounding alone would give only if the step all but
/// erases it.
pub(super) struct History {
    carried: Vec<Row>,
    decay_minus_one: Vec<Row>,
}

impl History {
    pub fn new(steps: usize) -> Self {
        let rows = || vec![Row::ZERO; steps * WIDEST_RETREAT];
        Self { carried: rows(), decay_minus_one: rows() }
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
    let History { carried, decay_minus_one } = &mut *kernel.history;
    let (carried, decay_minus_one) = (&mut carried[..steps * NS], &mut decay_minus_one[..steps * NS]);

    let mut h = vectors::<S, NS>(&kernel.h[n..], lane);
    let past = carried.chunks_exact_mut(NS).zip(decay_minus_one.chunks_exact_mut(NS));
    let rows = kernel.tile.delta.iter().zip(kernel.tile.input).zip(kernel.y.iter_mut());
    for (t, (((delta, input), y), (carried, decay_minus_one))) in rows.zip(past).enumerate() {
        let (delta, input) = (delta.vectors::<S>()[lane], input.vectors::<S>()[lane]);
        let (b, c) = (b.get::<S, NS>(simd, t, n, lane), c.get::<S, NS>(simd, t, n, lane));
        if n + lane == 0 {
            kernel.ahead.iter().for_each(|ahead| ahead.prefetch(t));
        }
        let y = &mut y.vectors_mut::<S>()[lane];
        let mut sum = *y;
        for i in 0..NS {
            let decay = Decay::exp2(simd, simd.mul_f32s(delta, a[i]));
            let minus_one = decay.minus_one(simd);
            decay_minus_one[i].vectors_mut::<S>()[lane] = minus_one;
            h[i] = decay.apply(simd, h[i]);
            carried[i].vectors_mut::<S>()[lane] = h[i];
            let weighted =
                if HOLD { simd.mul_f32s(input, hold_weight(simd, minus_one, inverse_a[i], delta)) } else { input };
            h[i] = simd.fma(weighted, b[i], h[i]);
            sum = simd.fma(c[i], h[i], sum);
        }
        *y = sum;
    }

    let mut g = vectors::<S, NS>(&kernel.d_h[n..], lane);
    let mut d_a = [zero; NS];
    for t in (0..steps).rev() {
        let (delta, input) = (kernel.tile.delta[t].vectors::<S>()[lane], kernel.tile.input[t].vectors::<S>()[lane]);
        let d_y = kernel.d_y[t].vectors::<S>()[lane];
        let at = b.gradient_row(t, n);
        let d_b = &mut kernel.d_b[at..at + NS];
        let at = c.gradient_row(t, n);
        let d_c = &mut kernel.d_c[at..at + NS];
        let (b, c) = (b.get::<S, NS>(simd, t, n, lane), c.get::<S, NS>(simd, t, n, lane));
        let (carried, decay_minus_one) = (&carried[t * NS..][..NS], &decay_minus_one[t * NS..][..NS]);
        let d_input_row = &mut kernel.d_input[t].vectors_mut::<S>()[lane];
        let d_delta_row = &mut kernel.d_delta[t].vectors_mut::<S>()[lane];
        let (mut d_input, mut d_delta) = if n == 0 { (zero, zero) } else { (*d_input_row, *d_delta_row) };
        for i in 0..NS {
            let (carried, minus_one) = (carried[i].vectors::<S>()[lane], decay_minus_one[i].vectors::<S>()[lane]);
            let weight = if HOLD { hold_weight(simd, minus_one, inverse_a[i], delta) } else { zero };
            let weighted = if HOLD { simd.mul_f32s(weight, input) } else { input };
            g[i] = simd.fma(c[i], d_y, g[i]);

            let d_c = &mut d_c[i].vectors_mut::<S>()[lane];
            *d_c = simd.fma(d_y, simd.fma(weighted, b[i], carried), *d_c);
            let d_b = &mut d_b[i].vectors_mut::<S>()[lane];
            *d_b = simd.fma(g[i], weighted, *d_b);

            // The gradient of log(exp(ΔA)) = ΔA.
            let d_log = simd.mul_f32s(g[i], carried);
            d_a[i] = simd.fma(delta, d_log, d_a[i]);
            d_delta = simd.fma(a[i], d_log, d_delta);

            if HOLD {
                let d_weighted = simd.mul_f32s(g[i], b[i]);
                d_input = simd.fma(d_weighted, weight, d_input);
                let d_weight = simd.mul_f32s(d_weighted, input);
                let decay = simd.add_f32s(minus_one, simd.splat_f32s(1.0));
                let slope = hold_weight_slope(simd, a[i], inverse_a[i], delta, weight, decay);
                d_a[i] = simd.fma(d_weight, slope, d_a[i]);
                let by_delta = simd.mul_f32s(decay, simd.splat_f32s(std::f32::consts::LOG2_E));
                d_delta = simd.fma(d_weight, by_delta, d_delta);
            } else {
                d_input = simd.fma(g[i], b[i], d_input);
            }
            g[i] = simd.fma(minus_one, g[i], g[i]);
        }
        (*d_input_row, *d_delta_row) = (d_input, d_delta);
    }
    store::<S, NS>(&mut kernel.d_h[n..], lane, g);
    for (total, d_a) in kernel.d_a[n..][..NS].iter_mut().zip(d_a) {
        let total = &mut total.vectors_mut::<S>()[lane];
        *total = simd.add_f32s(*total, d_a);
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
    pub d_y: &'t [Row],
    pub d_h: &'t mut [Row],
}

impl Kernel for RetreatStates<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        for lane in 0..Row::ZERO.vectors::<S>().len() {
            for (n, (d_h, a)) in self.d_h.iter_mut().zip(self.tile.a).enumerate() {
                let (g, a) = (&mut d_h.vectors_mut::<S>()[lane], a.vectors::<S>()[lane]);
                for t in (0..self.tile.delta.len()).rev() {
                    let [c] = match self.tile.c {
                        Coefficients::PerStep(c) => c.get::<S, 1>(simd, t, n, lane),
                        Coefficients::PerChannel(c) => c.get::<S, 1>(simd, t, n, lane),
                    };
                    let decay = Decay::exp2(simd, simd.mul_f32s(self.tile.delta[t].vectors::<S>()[lane], a));
                    *g = decay.apply(simd, simd.fma(c, self.d_y[t].vectors::<S>()[lane], *g));
                }
            }
        }
    }
}
