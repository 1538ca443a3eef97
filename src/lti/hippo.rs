//! HiPPO: systems whose state holds the past of their input (Gu, Dao, Ermon, Rudra and Ré 2020, arXiv 2008.07669).
//!
//! Each is an orthonormal basis `p_n` of functions of how long ago something was, `s`, under a measure `ω`. The state
//! is what the past comes to in that basis, and the past is had from it:
//!
//! ```text
//! x_n(t) = ∫ u(t - s) p_n(s) ω(s) ds          u(t - s) ≈ Σ_n x_n(t) p_n(s)
//! ```
//!
//! | measure | `ω(s)` | `p_n(s)` | remembers |
//! |---|---|---|---|
//! | [`Measure::LegS`] | `e^-s` | `√(2n+1) P_n(2 e^-s - 1)` | all of the past, the more coarsely the longer ago |
//! | [`Measure::LegT`] | 1 on `[0, 1]` | `√(2n+1) P_n(1 - 2 s)` | the last unit of time, evenly |
//! | [`Measure::Fourier`] | 1 on `[0, 1]` | `1`, `√2 cos 2πks`, `√2 sin 2πks` | the same, as a Fourier series |
//!
//! `P_n` are Legendre's polynomials. LegS as a time-invariant system, and the Fourier measure, are as in Gu, Johnson,
//! Timalsina, Rudra and Ré 2022 (arXiv 2206.12037). The matrices are a normal matrix less one of low rank (Gu, Goel and
//! Ré 2022, arXiv 2111.00396), which [`Measure::low_rank`] diagonalises.

use std::f64::consts::{PI, SQRT_2};

use nalgebra::{DMatrix, DVector};
use num_complex::Complex64;

use super::system::{Dense, Diagonal, LowRank, Spectrum, check_states};
use crate::arguments::MAX_D_STATE;
use crate::{Error, Result};

/// What the state of a system remembers of the past.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Measure {
    /// Legendre polynomials in `e^-s`: all of the past, scaled exponentially.
    LegS,
    /// Legendre polynomials on the last unit of time.
    LegT,
    /// The Fourier series of the last unit of time. Of the constant's pair only one is a function; the other is always
    /// zero.
    Fourier,
}

/// Checks a number of states, which must be even where they come in pairs.
fn check_order(order: usize, even: bool) -> Result<()> {
    let most = 2 * MAX_D_STATE;
    if (1..=most).contains(&order) && (!even || order.is_multiple_of(2)) {
        return Ok(());
    }
    let kind = if even { "an even number of states" } else { "a number of states" };
    Err(Error::argument("order", format_args!("{kind} from 1 to {most}"), order))
}

impl Measure {
    /// The system of `order` states; its `C` is zero until it is given.
    ///
    /// # Errors
    /// An `order` of zero or above 512, or for [`Measure::Fourier`] an odd one.
    pub fn system(self, order: usize) -> Result<Dense> {
        check_order(order, self == Self::Fourier)?;
        let root = |n: usize| ((2 * n + 1) as f64).sqrt();
        let entry = |n: usize, k: usize| match self {
            Self::LegS if n > k => -root(n) * root(k),
            Self::LegS if n == k => -((n + 1) as f64),
            Self::LegS => 0.0,
            Self::LegT if k <= n || (k - n).is_multiple_of(2) => -root(n) * root(k),
            Self::LegT => root(n) * root(k),
            Self::Fourier => fourier_rotation(n, k) - 2.0 * fourier_at_zero(n) * fourier_at_zero(k),
        };
        let a: Vec<f64> = (0..order * order).map(|i| entry(i / order, i % order)).collect();
        let b: Vec<f64> = (0..order).map(|n| self.input(n)).collect();
        Dense::new(&a, &b, &vec![0.0; order], 0.0)
    }

    /// `B_n`.
    fn input(self, n: usize) -> f64 {
        match self {
            Self::LegS | Self::LegT => ((2 * n + 1) as f64).sqrt(),
            Self::Fourier => 2.0 * fourier_at_zero(n),
        }
    }

    /// The real vectors `P` whose products `P Pᵀ`, added to the matrix, make it normal.
    fn corrections(self, order: usize) -> Vec<Vec<f64>> {
        let root = |n: usize| ((2 * n + 1) as f64).sqrt();
        let vector = |of: &dyn Fn(usize) -> f64| (0..order).map(of).collect::<Vec<f64>>();
        match self {
            Self::LegS => vec![vector(&|n| root(n) / SQRT_2)],
            Self::LegT => vec![
                vector(&|n| if n % 2 == 0 { root(n) } else { 0.0 }),
                vector(&|n| if n % 2 == 1 { root(n) } else { 0.0 }),
            ],
            Self::Fourier => vec![vector(&|n| SQRT_2 * fourier_at_zero(n))],
        }
    }

    /// The system as S4 has it, diagonal less low rank: `A = V (Λ - P P*) V*` with a unitary `V`, whose states are `V*
    /// x`. Of each pair of conjugates the one with the positive imaginary part is kept, in the order of these parts.
    /// LegS and the Fourier measure have rank 1, LegT has rank 2. `C` is zero until it is given.
    ///
    /// # Errors
    /// An `order` that is odd, zero, or above 512.
    pub fn low_rank(self, order: usize) -> Result<LowRank> {
        check_order(order, true)?;
        let corrections = self.corrections(order);
        let (eigenvalues, vectors) = match self {
            Self::Fourier => fourier_eigen(order),
            _ => self.eigen(order, &corrections)?,
        };
        let project = |x: &[f64]| -> Vec<Complex64> {
            let dot = |v: &DVector<Complex64>| v.iter().zip(x).map(|(v, x)| v.conj() * x).sum();
            vectors.iter().map(dot).collect()
        };
        let b: Vec<f64> = (0..order).map(|n| self.input(n)).collect();
        let c = vec![Complex64::ZERO; order / 2];
        let diagonal = Diagonal::new(&eigenvalues, &project(&b), &c, 0.0, Spectrum::Pairs)?;
        let p: Vec<_> = corrections.iter().map(|vector| project(vector)).collect();
        LowRank::new(diagonal, &p, &p)
    }

    /// The eigenvalues of the normal part with positive imaginary parts, and their eigenvectors, of length 1.
    fn eigen(self, order: usize, corrections: &[Vec<f64>]) -> Result<(Vec<Complex64>, Vec<DVector<Complex64>>)> {
        let mut normal = self.system(order)?.matrix().clone();
        for vector in corrections {
            let vector = DVector::from_row_slice(vector);
            normal += &vector * vector.transpose();
        }
        // It is a multiple of the identity (-1/2 for LegS, 0 for LegT) plus a skew-symmetric S, and -iS is Hermitian.
        // Its halves are made of one triangle, so that rounding does not make them differ.
        let shift = if self == Self::LegS { -0.5 } else { 0.0 };
        let hermitian = DMatrix::from_fn(order, order, |i, j| match i.cmp(&j) {
            std::cmp::Ordering::Greater => Complex64::new(0.0, -normal[(i, j)]),
            std::cmp::Ordering::Equal => Complex64::ZERO,
            std::cmp::Ordering::Less => Complex64::new(0.0, normal[(j, i)]),
        });
        let eigen = hermitian.symmetric_eigen();
        let mut all: Vec<(f64, DVector<Complex64>)> = (0..order)
            .filter(|&n| eigen.eigenvalues[n] > 0.0)
            .map(|n| (eigen.eigenvalues[n], eigen.eigenvectors.column(n).into_owned()))
            .collect();
        all.sort_by(|(x, _), (y, _)| x.total_cmp(y));
        debug_assert_eq!(all.len(), order / 2, "the eigenvalues come in pairs");
        // -iS v = w v is S v = iw v.
        Ok(all.into_iter().map(|(w, v)| (Complex64::new(shift, w), v)).unzip())
    }

    /// `p_n(s)` for `n` below `order`.
    pub fn basis(self, order: usize, s: f64) -> Vec<f64> {
        let legendre = |x: f64| {
            // P_{n+1} = ((2n + 1) x P_n - n P_{n-1})/(n + 1).
            let (mut before, mut at) = (0.0, 1.0);
            (0..order)
                .map(|n| {
                    let (n, value) = (n as f64, at);
                    (before, at) = (at, ((2.0 * n + 1.0) * x * at - n * before) / (n + 1.0));
                    (2.0 * n + 1.0).sqrt() * value
                })
                .collect()
        };
        match self {
            Self::LegS => legendre(2.0 * (-s).exp() - 1.0),
            Self::LegT => legendre(1.0 - 2.0 * s),
            Self::Fourier => (0..order)
                .map(|n| {
                    let angle = 2.0 * PI * (n / 2) as f64 * s;
                    match n {
                        0 => 1.0,
                        1 => 0.0,
                        n if n % 2 == 0 => SQRT_2 * angle.cos(),
                        _ => SQRT_2 * angle.sin(),
                    }
                })
                .collect(),
        }
    }

    /// What the input was `ago` before now, for each of `ago`, from the state of [`Measure::system`] alone.
    pub fn reconstruct(self, state: &[f64], ago: &[f64]) -> Vec<f64> {
        let at = |s: &f64| state.iter().zip(self.basis(state.len(), *s)).map(|(x, p)| x * p).sum();
        ago.iter().map(at).collect()
    }

    /// The state of [`Measure::system`] from one of [`Measure::low_rank`], each of its `order/2` numbers as two.
    ///
    /// # Errors
    /// As [`Measure::low_rank`]; another size of the state.
    pub fn state_of_low_rank(self, order: usize, state: &[f64]) -> Result<Vec<f64>> {
        check_order(order, true)?;
        check_states("state", order, state.len())?;
        let (_, vectors) = match self {
            Self::Fourier => fourier_eigen(order),
            _ => self.eigen(order, &self.corrections(order))?,
        };
        let pairs = state.as_chunks().0.iter().map(|&[re, im]| Complex64::new(re, im));
        let mut all = vec![0.0; order];
        for (v, x) in vectors.iter().zip(pairs) {
            for (all, v) in all.iter_mut().zip(v.iter()) {
                *all += 2.0 * (v * x).re;
            }
        }
        Ok(all)
    }
}

/// `p_n(0)` of the Fourier series, the even `n` being cosines.
fn fourier_at_zero(n: usize) -> f64 {
    match n {
        0 => 1.0,
        n if n % 2 == 0 => SQRT_2,
        _ => 0.0,
    }
}

/// How cosine and sine turn into each other as time passes.
fn fourier_rotation(n: usize, k: usize) -> f64 {
    let rate = 2.0 * PI * (n / 2) as f64;
    match n % 2 {
        0 if k == n + 1 => -rate,
        1 if n == k + 1 => rate,
        _ => 0.0,
    }
}

/// The rotation has the eigenvalues ±2πik, with vectors in the plane of a cosine and its sine.
fn fourier_eigen(order: usize) -> (Vec<Complex64>, Vec<DVector<Complex64>>) {
    let pair = |k: usize| {
        let mut vector = DVector::from_element(order, Complex64::ZERO);
        vector[2 * k] = Complex64::new(1.0 / SQRT_2, 0.0);
        // (0 -w; w 0)(1, -i) = (iw, w) = iw (1, -i).
        vector[2 * k + 1] = Complex64::new(0.0, -1.0 / SQRT_2);
        (Complex64::new(0.0, 2.0 * PI * k as f64), vector)
    };
    (0..order / 2).map(pair).unzip()
}

/// The eigenvalues that a diagonal system starts from in training (Gu, Gupta, Goel and Ré 2022, arXiv 2206.11893).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Initial {
    /// The diagonal of LegS as S4 has it, without the low rank.
    LegS,
    /// `-1/2 + πi n`: the Fourier series of a window of time.
    #[default]
    Lin,
    /// `-1/2 + i N/π (N/(2n + 1) - 1)` with `N` for all states, of each pair both: what LegS comes to for many states.
    Inv,
    /// `-(n + 1)`, on the real line.
    Real,
}

impl Initial {
    /// `pairs` eigenvalues, of each pair the one that is stored.
    ///
    /// # Errors
    /// None of them, or more than [`MAX_D_STATE`].
    pub fn eigenvalues(self, pairs: usize) -> Result<Vec<Complex64>> {
        if !(1..=MAX_D_STATE).contains(&pairs) {
            return Err(Error::argument("pairs", format_args!("from 1 to {MAX_D_STATE}"), pairs));
        }
        let all = 2.0 * pairs as f64;
        let eigenvalue = |n: usize| match (self, n as f64) {
            (Self::Real, n) => Complex64::new(-(n + 1.0), 0.0),
            (Self::Inv, n) => Complex64::new(-0.5, all / PI * (all / (2.0 * n + 1.0) - 1.0)),
            (_, n) => Complex64::new(-0.5, PI * n),
        };
        match self {
            Self::LegS => Ok(Measure::LegS.low_rank(2 * pairs)?.diagonal().a().to_vec()),
            _ => Ok((0..pairs).map(eigenvalue).collect()),
        }
    }
}
