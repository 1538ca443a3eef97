//! The recurrence on one tile of one block: the loops in which the time is spent.
//!
//! They see rows of `f32` only, so there is one instance of each for all element types.

use std::array::from_fn;

use crate::simd::{Decay, Kernel, Lanes, Row};

/// B or C of a tile.
#[derive(Clone, Copy)]
pub(super) enum Coefficients<'t> {
    /// `(steps, d_state)`, shared by all channels.
    PerStep { data: &'t [f32], d_state: usize },
    /// A row for each state, the same at every step.
    PerChannel(&'t [Row]),
}

/// [`Coefficients`] with the case known to the compiler.
pub(super) trait Coefficient: Copy {
    /// States `n..n + NS` at step `t`, for the `lane`-th vector of the block.
    fn get<S: Lanes, const NS: usize>(self, simd: S, t: usize, n: usize, lane: usize) -> [S::f32s; NS];
}

#[derive(Clone, Copy)]
struct PerStep<'t> {
    data: &'t [f32],
    d_state: usize,
}

impl Coefficient for PerStep<'_> {
    #[inline(always)]
    fn get<S: Lanes, const NS: usize>(self, simd: S, t: usize, n: usize, _: usize) -> [S::f32s; NS] {
        let values = &self.data[t * self.d_state + n..][..NS];
        from_fn(|i| simd.splat_f32s(values[i]))
    }
}

#[derive(Clone, Copy)]
struct PerChannel<'t>(&'t [Row]);

impl Coefficient for PerChannel<'_> {
    #[inline(always)]
    fn get<S: Lanes, const NS: usize>(self, _: S, _: usize, n: usize, lane: usize) -> [S::f32s; NS] {
        vectors::<S, NS>(&self.0[n..], lane)
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

/// Calls `$run::<S, B, C, ZOH>` for the kinds of B and C at hand.
macro_rules! specialise {
    ($tile:expr, $run:ident, $simd:expr) => {{
        let tile = $tile;
        let hold = !tile.inverse_a.is_empty();
        match (tile.b, tile.c) {
            (Coefficients::PerStep { data: b, d_state }, Coefficients::PerStep { data: c, .. }) => {
                let (b, c) = (PerStep { data: b, d_state }, PerStep { data: c, d_state });
                if hold { $run::<S, _, _, true>($simd, tile, b, c) } else { $run::<S, _, _, false>($simd, tile, b, c) }
            }
            (Coefficients::PerStep { data, d_state }, Coefficients::PerChannel(c)) => {
                let (b, c) = (PerStep { data, d_state }, PerChannel(c));
                if hold { $run::<S, _, _, true>($simd, tile, b, c) } else { $run::<S, _, _, false>($simd, tile, b, c) }
            }
            (Coefficients::PerChannel(b), Coefficients::PerStep { data, d_state }) => {
                let (b, c) = (PerChannel(b), PerStep { data, d_state });
                if hold { $run::<S, _, _, true>($simd, tile, b, c) } else { $run::<S, _, _, false>($simd, tile, b, c) }
            }
            (Coefficients::PerChannel(b), Coefficients::PerChannel(c)) => {
                let (b, c) = (PerChannel(b), PerChannel(c));
                if hold { $run::<S, _, _, true>($simd, tile, b, c) } else { $run::<S, _, _, false>($simd, tile, b, c) }
            }
        }
    }};
}

/// Calls `$run` on all states, as many at a time as there are registers for.
macro_rules! in_groups {
    ($wide:literal, $tile:ident, $run:ident::<$($generic:ident),*>($($argument:expr),*)) => {{
        let mut n = 0;
        while n + $wide <= $tile.h.len() {
            $run::<$($generic,)* $wide>($($argument,)* n);
            n += $wide;
        }
        while n < $tile.h.len() {
            $run::<$($generic,)* 1>($($argument,)* n);
            n += 1;
        }
    }};
}

/// Runs the recurrence through a tile, adding `Σ_n C h` to `y`.
pub(super) struct Advance<'t> {
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
    /// The states, advanced to the end of the tile.
    pub h: &'t mut [Row],
    pub y: &'t mut [Row],
}

impl Kernel for Advance<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        specialise!(self, advance, simd);
    }
}

#[inline(always)]
fn advance<S: Lanes, B: Coefficient, C: Coefficient, const HOLD: bool>(simd: S, mut tile: Advance, b: B, c: C) {
    let tile = &mut tile;
    for lane in 0..Row::ZERO.vectors::<S>().len() {
        if S::REGISTER_COUNT >= 32 {
            in_groups!(8, tile, advance_states::<S, B, C, HOLD>(simd, tile, b, c, lane));
        } else {
            in_groups!(4, tile, advance_states::<S, B, C, HOLD>(simd, tile, b, c, lane));
        }
    }
}

#[inline(always)]
fn advance_states<S: Lanes, B: Coefficient, C: Coefficient, const HOLD: bool, const NS: usize>(
    simd: S,
    tile: &mut Advance,
    b: B,
    c: C,
    lane: usize,
    n: usize,
) {
    let a = vectors::<S, NS>(&tile.a[n..], lane);
    let mut h = vectors::<S, NS>(&tile.h[n..], lane);
    let steps = tile.delta.iter().zip(tile.input).zip(tile.y.iter_mut()).enumerate();
    for (t, ((delta, input), y)) in steps {
        let (delta, input) = (delta.vectors::<S>()[lane], input.vectors::<S>()[lane]);
        let (b, c) = (b.get::<S, NS>(simd, t, n, lane), c.get::<S, NS>(simd, t, n, lane));
        let sum = &mut y.vectors_mut::<S>()[lane];
        for i in 0..NS {
            let decay = Decay::exp2(simd, simd.mul_f32s(delta, a[i]));
            let weighted = if HOLD {
                let inverse = tile.inverse_a[n + i].vectors::<S>()[lane];
                simd.mul_f32s(input, hold_weight(simd, decay.minus_one(simd), inverse, delta))
            } else {
                input
            };
            h[i] = simd.fma(weighted, b[i], decay.apply(simd, h[i]));
            *sum = simd.fma(c[i], h[i], *sum);
        }
    }
    store::<S, NS>(&mut tile.h[n..], lane, h);
}

/// `(exp(ΔA) - 1)/A`, or Δ where A is as good as zero.
#[inline(always)]
fn hold_weight<S: Lanes>(simd: S, decay_minus_one: S::f32s, inverse_a: S::f32s, delta: S::f32s) -> S::f32s {
    let vanishes = simd.equal_f32s(inverse_a, simd.splat_f32s(0.0));
    simd.select_f32s(vanishes, delta, simd.mul_f32s(decay_minus_one, inverse_a))
}
