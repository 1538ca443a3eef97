//! Linear time-invariant systems, and the operators that are made of them.

mod agreement;
#[cfg(feature = "candle")]
mod candle;
mod hippo;
mod long_conv;
pub mod s4d;
mod systems;
mod vectors;

use rand::Rng;
use rand::rngs::StdRng;
use selective_scan::lti::{Complex64, Dense, Diagonal, LowRank, Spectrum};

/// Numbers that are evenly distributed over a square of side 2.
pub fn numbers(rng: &mut StdRng, count: usize) -> Vec<Complex64> {
    (0..count).map(|_| Complex64::new(rng.random_range(-1.0..1.0), rng.random_range(-1.0..1.0))).collect()
}

pub fn reals(rng: &mut StdRng, count: usize) -> Vec<f64> {
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// A stable diagonal system of `n` pairs: decay rates from 0.2 to 1, frequencies to `fastest`.
pub fn diagonal(rng: &mut StdRng, n: usize, fastest: f64) -> Diagonal {
    let a: Vec<_> =
        (0..n).map(|_| Complex64::new(-rng.random_range(0.2..1.0), rng.random_range(-1.0..1.0) * fastest)).collect();
    let (b, c) = (numbers(rng, n), numbers(rng, n));
    Diagonal::new(&a, &b, &c, rng.random_range(-1.0..1.0), Spectrum::Pairs).unwrap()
}

/// The same with vectors of low rank on top: with `Q = P` the system stays stable, as `-P P*` takes energy out.
pub fn low_rank(rng: &mut StdRng, n: usize, rank: usize, fastest: f64) -> LowRank {
    let p: Vec<_> = (0..rank).map(|_| numbers(rng, n)).collect();
    LowRank::new(diagonal(rng, n, fastest), &p, &p).unwrap()
}

/// A dense system that is stable, `-I/2 + S - R Rᵀ` with a skew-symmetric `S` of entries up to `fastest`.
pub fn dense(rng: &mut StdRng, n: usize, fastest: f64) -> Dense {
    let (skew, root) = (reals(rng, n * n), reals(rng, n * n));
    let a: Vec<f64> = (0..n * n)
        .map(|at| {
            let (i, j) = (at / n, at % n);
            let product: f64 = (0..n).map(|k| root[i * n + k] * root[j * n + k]).sum();
            let own = if i == j { -0.5 } else { 0.0 };
            own + fastest * (skew[i * n + j] - skew[j * n + i]) - 0.1 * product
        })
        .collect();
    let (b, c) = (reals(rng, n), reals(rng, n));
    Dense::new(&a, &b, &c, rng.random_range(-1.0..1.0)).unwrap()
}

pub fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Asserts that two results differ by at most `tolerance` times `scale`, in the norm.
#[track_caller]
pub fn assert_same(got: &[f64], want: &[f64], tolerance: f64, scale: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: the number of elements");
    let difference: Vec<f64> = got.iter().zip(want).map(|(got, want)| got - want).collect();
    let error = norm(&difference) / scale;
    assert!(error <= tolerance, "{what}: error {error:e} of {scale:e}, tolerance {tolerance:e}");
}
