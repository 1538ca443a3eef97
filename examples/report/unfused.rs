//! The forward scan as tensor operations would do it: one pass over whole tensors after another, every discretized
//! quantity stored for all steps, channels and states.
//!
//! Kinder than an eager framework: buffers are reused from run to run, everything is done in place where it can be, and
//! every pass is vectorised for the processor and parallel.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use selective_scan::Element;

use crate::common::{ScanData, touched};
use crate::math::{exp, silu, softplus};

/// Inputs in `f32`, `(length, ...)`, and the tensors between the passes.
pub struct Unfused<'a> {
    d_inner: usize,
    d_state: usize,
    u: Vec<f32>,
    raw_delta: Vec<f32>,
    z: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    a: &'a [f32],
    d: &'a [f32],
    delta_bias: &'a [f32],
    /// Δ, `(length, d_inner)`.
    delta: Vec<f32>,
    /// exp(ΔA), `(length, d_inner, d_state)`.
    decay: Vec<f32>,
    /// ΔBu, then the states, `(length, d_inner, d_state)`.
    states: Vec<f32>,
    /// `(length, d_inner)`.
    pub out: Vec<f32>,
}

/// The bytes of the tensors that the fused scan does not store.
pub fn tensor_bytes(len: usize, d_inner: usize, d_state: usize) -> usize {
    2 * size_of::<f32>() * len * d_inner * d_state
}

impl<'a> Unfused<'a> {
    /// For the one batch row of `data`.
    pub fn new<T: Element>(data: &'a ScanData<T>) -> Self {
        assert_eq!(data.batch, 1);
        let widen = |data: &[T]| data.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
        let (activation, state) = (data.len * data.d_inner, data.len * data.d_inner * data.d_state);
        Self {
            d_inner: data.d_inner,
            d_state: data.d_state,
            u: widen(&data.u),
            raw_delta: widen(&data.delta),
            z: widen(&data.z),
            b: widen(&data.b),
            c: widen(&data.c),
            a: &data.a,
            d: &data.d,
            delta_bias: &data.delta_bias,
            delta: touched(activation),
            decay: touched(state),
            states: touched(state),
            out: touched(activation),
        }
    }

    pub fn forward(&mut self) {
        let (d_inner, d_state) = (self.d_inner, self.d_state);
        let row = d_inner * d_state;

        // Δ = softplus(delta + bias)
        let (raw, bias) = (&self.raw_delta, self.delta_bias);
        for_rows(&mut self.delta, raw, d_inner, |delta, raw| {
            for ((delta, raw), bias) in delta.iter_mut().zip(raw).zip(bias) {
                *delta = softplus(raw + bias);
            }
        });

        // ΔA, then exp(ΔA)
        for_rows(&mut self.decay, &self.delta, row, |decay, delta| {
            for ((decay, a), &delta) in decay.chunks_exact_mut(d_state).zip(self.a.chunks_exact(d_state)).zip(delta) {
                for (decay, a) in decay.iter_mut().zip(a) {
                    *decay = delta * a;
                }
            }
        });
        self.decay.par_chunks_mut(row).for_each(|decay| {
            vectorised(|| {
                for decay in decay {
                    *decay = exp(*decay);
                }
            });
        });

        // ΔBu
        let rows = self.u.par_chunks(d_inner).zip(self.b.par_chunks(d_state));
        let delta = self.delta.par_chunks(d_inner).zip(rows);
        self.states.par_chunks_mut(row).zip(delta).for_each(|(input, (delta, (u, b)))| {
            vectorised(|| {
                for ((input, delta), u) in input.chunks_exact_mut(d_state).zip(delta).zip(u) {
                    let input_weight = delta * u;
                    for (input, b) in input.iter_mut().zip(b) {
                        *input = input_weight * b;
                    }
                }
            });
        });

        self.recurrence(row);

        // y = Σ C h, then + Du, then · silu(z)
        let states = self.states.par_chunks(row).zip(self.c.par_chunks(d_state));
        self.out.par_chunks_mut(d_inner).zip(states).for_each(|(y, (states, c))| {
            vectorised(|| {
                for (y, h) in y.iter_mut().zip(states.chunks_exact(d_state)) {
                    *y = dot(h, c);
                }
            });
        });
        for_rows(&mut self.out, &self.u, d_inner, |y, u| {
            for ((y, u), d) in y.iter_mut().zip(u).zip(self.d) {
                *y += d * u;
            }
        });
        for_rows(&mut self.out, &self.z, d_inner, |y, z| {
            for (y, &z) in y.iter_mut().zip(z) {
                *y *= silu(z);
            }
        });
    }

    /// `h_t = exp(ΔA)_t h_{t-1} + (ΔBu)_t`, each thread taking a range of channels through all steps.
    fn recurrence(&mut self, row: usize) {
        let part = (self.d_inner.div_ceil(rayon::current_num_threads()) * self.d_state).max(1);
        let mut parts: Vec<Vec<(&[f32], &mut [f32])>> = (0..row.div_ceil(part)).map(|_| Vec::new()).collect();
        for (decay, states) in self.decay.chunks(row).zip(self.states.chunks_mut(row)) {
            for (i, step) in decay.chunks(part).zip(states.chunks_mut(part)).enumerate() {
                parts[i].push(step);
            }
        }
        parts.into_par_iter().for_each(|steps| {
            vectorised(|| {
                let mut before: Option<&[f32]> = None;
                for (decay, states) in steps {
                    if let Some(before) = before {
                        for ((h, decay), before) in states.iter_mut().zip(decay).zip(before) {
                            *h += decay * before;
                        }
                    }
                    before = Some(states);
                }
            });
        });
    }
}

/// Applies `pass` to each `row` elements of `out` with the matching row of `input`.
fn for_rows(out: &mut [f32], input: &[f32], row: usize, pass: impl Fn(&mut [f32], &[f32]) + Sync) {
    let rows = out.len() / row;
    out.par_chunks_mut(row)
        .zip(input.par_chunks(input.len() / rows))
        .for_each(|(out, input)| vectorised(|| pass(out, input)));
}

/// Eight partial sums, which a vector can hold.
#[inline(always)]
fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut sums = [0.0; 8];
    for (x, y) in x.chunks(8).zip(y.chunks(8)) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum += x * y;
        }
    }
    sums.iter().sum()
}

/// Runs `pass` compiled for this processor's widest vectors.
fn vectorised(pass: impl FnOnce()) {
    struct Pass<F>(F);
    impl<F: FnOnce()> WithSimd for Pass<F> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            (self.0)()
        }
    }
    Arch::new().dispatch(Pass(pass));
}
