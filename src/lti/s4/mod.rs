//! S4: a diagonal matrix less one of low rank for every channel, `A = Λ - P P*`, discretized by the bilinear rule (Gu,
//! Goel and Ré 2022, arXiv 2111.00396; with `Q = P`, by which the system stays stable, as Goel, Gu, Donahue and Ré
//! 2022, arXiv 2202.09729, have it).
//!
//! Training sees a system of this kind through its kernel alone, [`Kernel`], which
//! [`long_conv`](crate::lti::long_conv) convolves with, and the state that inputs lead to ([`Kernel::final_state`]); decoding
//! through its recurrence, [`Recurrence`].
//!
//! The parameter that reads the state is not `C` but `C̃ = C (I + Ā^L)` for the kernel's length `L`, as in the paper
//! but for the sign (`cauchy.rs` says why): so a kernel needs no power of a matrix. [`Kernel::truncate`] makes one of
//! the other, and [`Recurrence`] finds `C` again.

#[cfg(feature = "candle")]
pub(crate) mod candle;
mod cauchy;
mod state;

use num_complex::Complex64;
use rayon::prelude::*;

use super::system::{Diagonal, LowRank, LowRankSteps, Spectrum};
use super::views::Recurrent;
use crate::arguments::{MAX_D_STATE, zeroed};
use crate::lti::Rule;
use crate::{Error, Result, View};
use cauchy::Cauchy;

pub use cauchy::MAX_RANK;
pub(super) use cauchy::kernel_of;
pub use state::StateGradients;

/// The parameters of `d_inner` kernels of S4. Complex numbers are two neighbours, the real and the imaginary part, and
/// of each conjugate pair of states one is stored.
#[derive(Debug, Clone, Copy)]
pub struct Kernel<'a> {
    /// The logarithms of the step sizes, `(d_inner)`.
    pub log_delta: View<'a, f32, 1>,
    /// `Λ`, `(d_inner, 2 * d_state)`.
    pub a: View<'a, f32, 2>,
    /// `P`, `(d_inner, rank, 2 * d_state)`, of a rank up to [`MAX_RANK`].
    pub p: View<'a, f32, 3>,
    /// `B`, `(d_inner, 2 * d_state)`.
    pub b: View<'a, f32, 2>,
    /// `C̃`, `(d_inner, 2 * d_state)`.
    pub c: View<'a, f32, 2>,
}

/// The gradients of a [`Kernel`]'s tensors, dense, each of its tensor's shape. That of a complex number is made of the
/// slopes by its real and by its imaginary part.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// `(d_inner)`.
    pub log_delta: Vec<f32>,
    /// `(d_inner, 2 * d_state)`.
    pub a: Vec<f32>,
    /// `(d_inner, rank, 2 * d_state)`.
    pub p: Vec<f32>,
    /// `(d_inner, 2 * d_state)`.
    pub b: Vec<f32>,
    /// `(d_inner, 2 * d_state)`.
    pub c: Vec<f32>,
}

/// One channel's parameters in `f64`.
struct Channel {
    delta: f64,
    lambda: Vec<Complex64>,
    p: Vec<Vec<Complex64>>,
    b: Vec<Complex64>,
    c: Vec<Complex64>,
}

impl Channel {
    fn cauchy(&self) -> Cauchy<'_> {
        let conjugates = |p: &Vec<Complex64>| p.iter().map(Complex64::conj).collect();
        let rows = [self.c.clone()].into_iter().chain(self.p.iter().map(conjugates)).collect();
        let columns = [&self.b[..]].into_iter().chain(self.p.iter().map(Vec::as_slice)).collect();
        Cauchy { delta: self.delta, lambda: &self.lambda, rows, columns }
    }

    /// The recurrence, read by `c`.
    fn steps(&self, c: &[Complex64]) -> Result<LowRankSteps> {
        let diagonal = Diagonal::new(&self.lambda, &self.b, c, 0.0, Spectrum::Pairs)?;
        LowRank::new(diagonal, &self.p, &self.p)?.discretize(self.delta, Rule::Bilinear)
    }
}

impl Kernel<'_> {
    /// Checks every argument, and gives `d_inner`, the rank and `d_state`.
    fn check(&self) -> Result<[usize; 3]> {
        let ([d_inner, both], rank) = (self.a.shape, self.p.shape[1]);
        if both % 2 != 0 || !(1..=MAX_D_STATE).contains(&(both / 2)) {
            let expected =
                format_args!("2 * d_state as its last dimension, d_state from 1 to {MAX_D_STATE}").to_string();
            return Err(Error::argument("a", expected, format_args!("shape {:?}", self.a.shape)));
        }
        if rank > MAX_RANK {
            let expected = format_args!("a rank of {MAX_RANK} at most as its second dimension").to_string();
            return Err(Error::argument("p", expected, format_args!("shape {:?}", self.p.shape)));
        }
        let complex = "(d_inner, 2 * d_state)";
        self.a.check("a", complex, self.a.shape)?;
        self.log_delta.check("log_delta", "(d_inner)", [d_inner])?;
        self.p.check("p", "(d_inner, rank, 2 * d_state)", [d_inner, rank, both])?;
        self.b.check("b", complex, self.a.shape)?;
        self.c.check("c", complex, self.a.shape)?;
        Ok([d_inner, rank, both / 2])
    }

    fn channel(&self, channel: usize) -> Channel {
        let d_state = self.a.shape[1] / 2;
        let read = |view: &View<f32, 2>| -> Vec<Complex64> {
            (0..d_state).map(|n| [0, 1].map(|k| f64::from(view.at([channel, 2 * n + k])))).map(complex).collect()
        };
        let vector = |i: usize| -> Vec<Complex64> {
            (0..d_state).map(|n| [0, 1].map(|k| f64::from(self.p.at([channel, i, 2 * n + k])))).map(complex).collect()
        };
        Channel {
            delta: f64::from(self.log_delta.at([channel])).exp(),
            lambda: read(&self.a),
            p: (0..self.p.shape[1]).map(vector).collect(),
            b: read(&self.b),
            c: read(&self.c),
        }
    }

    /// The kernels, `(d_inner, length)`, computed in `f64`.
    ///
    /// # Errors
    /// An argument that does not fit.
    pub fn kernel(&self, length: usize) -> Result<Vec<f32>> {
        let [d_inner, ..] = self.check()?;
        let mut all: Vec<f32> = zeroed("length", &[d_inner, length])?;
        if length > 0 {
            all.par_chunks_exact_mut(length).enumerate().for_each(|(channel, row)| {
                for (to, k) in row.iter_mut().zip(self.channel(channel).cauchy().kernel(length)) {
                    *to = k as f32;
                }
            });
        }
        Ok(all)
    }

    /// The gradients of the tensors from that of the kernels, `(d_inner, length)`.
    ///
    /// # Errors
    /// An argument that does not fit.
    pub fn backward(&self, d_kernel: View<f32, 2>) -> Result<Gradients> {
        let [d_inner, rank, d_state] = self.check()?;
        let length = d_kernel.shape[1];
        d_kernel.check("d_kernel", "(d_inner, length)", [d_inner, length])?;
        let channels: Vec<_> = (0..d_inner)
            .into_par_iter()
            .map(|channel| {
                let d_kernel: Vec<f64> = (0..length).map(|k| d_kernel.at([channel, k]).into()).collect();
                let of = self.channel(channel);
                (of.delta, of.cauchy().backward(&d_kernel))
            })
            .collect();
        let rows = |count: usize| Vec::with_capacity(d_inner * count * 2 * d_state);
        let mut all = Gradients { log_delta: Vec::new(), a: rows(1), p: rows(rank), b: rows(1), c: rows(1) };
        for (delta, d) in channels {
            all.log_delta.push((delta * d.delta) as f32);
            // A slope g, by which a loss changes by Re(g dx), is (Re g, -Im g) by the two parts of x.
            let slopes = |g: &Complex64| [g.re as f32, -g.im as f32];
            all.a.extend(d.lambda.iter().flat_map(slopes));
            all.b.extend(d.columns[0].iter().flat_map(slopes));
            all.c.extend(d.rows[0].iter().flat_map(slopes));
            for (row, column) in d.rows[1..].iter().zip(&d.columns[1..]) {
                // The rows are the conjugates of P.
                all.p.extend(row.iter().zip(column).flat_map(|(row, column)| slopes(&(row.conj() + column))));
            }
        }
        Ok(all)
    }

    /// `C̃` of length `length` for the numbers of `c` as `C`: `(d_inner, 2 * d_state)`. From here training begins.
    ///
    /// # Errors
    /// An argument that does not fit; a system for which the bilinear rule has no recurrence.
    pub fn truncate(&self, length: usize) -> Result<Vec<f32>> {
        let [d_inner, ..] = self.check()?;
        let rows: Vec<Vec<Complex64>> = (0..d_inner)
            .into_par_iter()
            .map(|channel| {
                let channel = self.channel(channel);
                Ok(cauchy::truncate(&channel.steps(&channel.c)?, &channel.c, length))
            })
            .collect::<Result<_>>()?;
        Ok(rows.iter().flatten().flat_map(|c| [c.re as f32, c.im as f32]).collect())
    }

    /// The recurrence of the systems whose kernels these are, of `length` steps.
    ///
    /// # Errors
    /// An argument that does not fit; a system for which the bilinear rule has no recurrence, or whose `C` cannot be
    /// had from `C̃`.
    pub fn recurrence(&self, length: usize) -> Result<Recurrence> {
        let [d_inner, _, d_state] = self.check()?;
        let channels = (0..d_inner)
            .into_par_iter()
            .map(|channel| {
                let channel = self.channel(channel);
                let c = cauchy::restore(&channel.steps(&channel.c)?, &channel.c, length);
                let c = c.ok_or_else(|| Error::argument("c", "one from which `C` can be had", "a singular I + Ā^L"))?;
                channel.steps(&c)
            })
            .collect::<Result<_>>()?;
        Ok(Recurrence { channels, d_state })
    }
}

fn complex([re, im]: [f64; 2]) -> Complex64 {
    Complex64::new(re, im)
}

/// The recurrence of `d_inner` systems: a step takes as many operations as there are states, in `f64`.
#[derive(Debug, Clone, PartialEq)]
pub struct Recurrence {
    channels: Vec<LowRankSteps>,
    d_state: usize,
}

impl Recurrence {
    /// The size of a state: `d_inner` and `2 * d_state`.
    pub fn state_shape(&self) -> [usize; 2] {
        [self.channels.len(), 2 * self.d_state]
    }

    /// One step of `batch` sequences: brings the states, `(batch, d_inner, 2 * d_state)` and dense, up to date from the
    /// inputs `u`, `(batch, d_inner)`, and gives the outputs without a skip connection, of that shape.
    ///
    /// # Errors
    /// Other numbers of inputs or states.
    pub fn step(&self, u: &[f32], state: &mut [f32]) -> Result<Vec<f32>> {
        let [d_inner, states] = self.state_shape();
        if d_inner == 0 || !u.len().is_multiple_of(d_inner) {
            return Err(Error::argument("u", format_args!("(batch, d_inner = {d_inner}) numbers"), u.len()));
        }
        if state.len() != u.len() * states {
            let expected = format_args!("{} numbers, {states} for each of `u`", u.len() * states).to_string();
            return Err(Error::argument("state", expected, state.len()));
        }
        let mut out = vec![0.0; u.len()];
        out.par_iter_mut().zip(state.par_chunks_exact_mut(states)).enumerate().for_each(|(i, (out, state))| {
            let mut wide: Vec<f64> = state.iter().map(|&x| x.into()).collect();
            *out = self.channels[i % d_inner].step(&mut wide, u[i].into()) as f32;
            for (to, x) in state.iter_mut().zip(wide) {
                *to = x as f32;
            }
        });
        Ok(out)
    }
}
