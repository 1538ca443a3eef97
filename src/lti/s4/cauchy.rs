//! The kernel of S4: a diagonal less a low-rank matrix, by the Cauchy kernel and Woodbury's identity (Gu, Goel and Ré
//! 2022, arXiv 2111.00396, appendix C.3), with its gradients.
//!
//! The kernel's transform at the roots of minus one, `z = e^{-iθ}`, `θ = π(2j + 1)/L`, is
//!
//! ```text
//! K̂(z) = Σ_{k<L} C Ā^k B̄ z^k = C̃ (I - Ā z)⁻¹ B̄         C̃ = C (I + Ā^L), since z^L = -1
//!       = 2/(1 + z) · C̃ (g - A)⁻¹ B                       g = 2/Δ · (1 - z)/(1 + z), by the bilinear rule
//! ```
//!
//! and `(g - Λ + P Q*)⁻¹` is a diagonal matrix with a correction of the rank of `P`: sums over the states of
//! `a_n b_n/(g - λ_n)`, the Cauchy kernel, for each pair of `a` from `C̃`, `Q*` and `b` from `B`, `P`. So a kernel of
//! `L` steps takes `L N` operations and a transform, and no power of a matrix.
//!
//! The paper takes the roots of one, and `C̃ = C (I - Ā^L)`. There a system that remembers for longer than `L` steps
//! has a `C̃` near zero, from which `C` cannot be had again, and the Fourier measure, which has an eigenvalue of zero
//! and others where the roots of one lie, divides by zero or nearly.
//!
//! With half the angle, `1 - z = e^{-iθ/2} 2i sin(θ/2)` and `1 + z = e^{-iθ/2} 2 cos(θ/2)`: written so, nothing cancels
//! for small angles, and nothing is divided by zero at `z = -1`.

use nalgebra::DVector;
use num_complex::Complex64;
use realfft::RealFftPlanner;

use crate::lti::system::{LowRankSteps, matrix_power};

/// The largest rank that kernels are made for. HiPPO's matrices have 1 and 2.
pub const MAX_RANK: usize = 4;

/// The most rows and columns of the small matrix: of `C̃` and `Q*`, of `B` and `P`.
const SIZE: usize = MAX_RANK + 1;

type Small = [[Complex64; SIZE]; SIZE];

/// One channel's kernel as the Cauchy kernel has it.
#[derive(Debug, Clone)]
pub(crate) struct Cauchy<'a> {
    pub delta: f64,
    pub lambda: &'a [Complex64],
    /// `C̃`, then the conjugates of the vectors `Q`.
    pub rows: Vec<Vec<Complex64>>,
    /// `B`, then the vectors `P`.
    pub columns: Vec<&'a [Complex64]>,
}

/// What a loss changes by: `Re(g·dx)` for every complex `x`.
#[derive(Debug, Clone)]
pub(crate) struct CauchyGradients {
    pub delta: f64,
    pub lambda: Vec<Complex64>,
    pub rows: Vec<Vec<Complex64>>,
    pub columns: Vec<Vec<Complex64>>,
}

/// What one root of unity gives.
struct Root {
    /// `e^{iθ/2}`.
    turn: Complex64,
    /// `4 sin(θ/2)`: over Δ, and times i, it is what the eigenvalues are subtracted from.
    sine: f64,
    /// `2 cos(θ/2)`.
    cosine: f64,
}

impl Root {
    /// The root of angle `π odd/len`.
    fn new(odd: usize, len: usize) -> Self {
        let (sin, cos) = (0.5 * std::f64::consts::PI * odd as f64 / len as f64).sin_cos();
        // At z = -1 the cosine is zero, and not what is left of rounding π/2.
        let cos = if odd == len { 0.0 } else { cos };
        Self { turn: Complex64::new(cos, sin), sine: 4.0 * sin, cosine: 2.0 * cos }
    }
}

impl Cauchy<'_> {
    fn rank(&self) -> usize {
        self.columns.len() - 1
    }

    /// The reciprocals that one eigenvalue and its conjugate give at a root.
    fn reciprocals(&self, root: &Root, lambda: Complex64) -> (Complex64, Complex64) {
        let at = Complex64::new(0.0, root.sine / self.delta);
        ((at - lambda * root.cosine).inv(), (at - lambda.conj() * root.cosine).inv())
    }

    /// The Cauchy kernels of all rows with all columns.
    fn small(&self, root: &Root) -> Small {
        let mut small = Small::default();
        for (n, &lambda) in self.lambda.iter().enumerate() {
            let (own, conjugate) = self.reciprocals(root, lambda);
            for (row, small) in self.rows.iter().zip(&mut small) {
                for (column, small) in self.columns.iter().zip(small) {
                    let v = row[n] * column[n];
                    *small += v * own + v.conj() * conjugate;
                }
            }
        }
        small
    }

    /// Woodbury's correction: what solves the small system for the column of `B`, and for the row of `C̃`.
    fn solve(&self, root: &Root, small: &Small) -> ([Complex64; SIZE], [Complex64; SIZE]) {
        let rank = self.rank();
        let (mut matrix, mut transposed) = (Small::default(), Small::default());
        for i in 0..rank {
            for j in 0..rank {
                let identity = if i == j { 1.0 } else { 0.0 };
                matrix[i][j] = root.cosine * small[i + 1][j + 1] + identity;
                transposed[j][i] = matrix[i][j];
            }
        }
        let (mut column, mut row) = ([Complex64::ZERO; SIZE], [Complex64::ZERO; SIZE]);
        for i in 0..rank {
            (column[i], row[i]) = (small[i + 1][0], small[0][i + 1]);
        }
        eliminate(&mut matrix, &mut column, rank);
        eliminate(&mut transposed, &mut row, rank);
        (column, row)
    }

    /// The kernel, of `len` steps.
    pub fn kernel(&self, len: usize) -> Vec<f64> {
        if len == 0 {
            return Vec::new();
        }
        // Followed by itself with the other sign, a kernel is a sequence whose transform is zero at all roots of one.
        let inverse = RealFftPlanner::<f64>::new().plan_fft_inverse(2 * len);
        let mut spectrum = inverse.make_input_vec();
        for odd in (1..=len).step_by(2) {
            let root = Root::new(odd, len);
            let small = self.small(&root);
            let (column, _) = self.solve(&root, &small);
            let correction: Complex64 = (0..self.rank()).map(|i| small[0][i + 1] * column[i]).sum();
            spectrum[odd] = 2.0 * root.turn * (small[0][0] - root.cosine * correction);
        }
        // At z = -1 the transform of a real kernel is real.
        spectrum[len].im = 0.0;
        let mut kernel = inverse.make_output_vec();
        inverse.process(&mut spectrum, &mut kernel).expect("the ends are real, and the lengths the plan's");
        kernel.truncate(len);
        for k in &mut kernel {
            *k /= len as f64;
        }
        kernel
    }

    /// The gradients from that of the kernel.
    pub fn backward(&self, d_kernel: &[f64]) -> CauchyGradients {
        let (len, states) = (d_kernel.len(), self.lambda.len());
        let zeros = |count: usize| vec![vec![Complex64::ZERO; states]; count];
        let mut gradients = CauchyGradients {
            delta: 0.0,
            lambda: vec![Complex64::ZERO; states],
            rows: zeros(self.rows.len()),
            columns: zeros(self.columns.len()),
        };
        if len == 0 {
            return gradients;
        }
        let forward = RealFftPlanner::<f64>::new().plan_fft_forward(2 * len);
        let (mut input, mut spectrum) = (forward.make_input_vec(), forward.make_output_vec());
        input[..len].copy_from_slice(d_kernel);
        forward.process(&mut input, &mut spectrum).expect("the lengths are the plan's");
        for odd in (1..=len).step_by(2) {
            let root = Root::new(odd, len);
            // K is 1/L of the sum over all roots; of those that have a conjugate, one stands for both.
            let weight = if odd == len { 1.0 } else { 2.0 } / len as f64;
            self.backward_at(&root, spectrum[odd].conj() * weight * 2.0 * root.turn, &mut gradients);
        }
        gradients
    }

    /// Adds what one root gives. `d` is the gradient of what is in the brackets of the transform there.
    fn backward_at(&self, root: &Root, d: Complex64, gradients: &mut CauchyGradients) {
        let small = self.small(root);
        let (column, row) = self.solve(root, &small);
        // small[0][0] - cos · small[0][1..] (1 + cos · small[1..][1..])⁻¹ small[1..][0].
        let mut d_small = Small::default();
        d_small[0][0] = d;
        for i in 0..self.rank() {
            d_small[0][i + 1] = -d * root.cosine * column[i];
            d_small[i + 1][0] = -d * root.cosine * row[i];
            for j in 0..self.rank() {
                d_small[i + 1][j + 1] = d * root.cosine * root.cosine * row[i] * column[j];
            }
        }
        for (n, &lambda) in self.lambda.iter().enumerate() {
            let (own, conjugate) = self.reciprocals(root, lambda);
            // What the two reciprocals are multiplied by, times the gradients of the sums.
            let (mut d_own, mut d_conjugate) = (Complex64::ZERO, Complex64::ZERO);
            for (i, d_small) in d_small.iter().enumerate().take(self.rows.len()) {
                for (j, d_small) in d_small.iter().enumerate().take(self.columns.len()) {
                    let (a, b) = (self.rows[i][n], self.columns[j][n]);
                    let d_v = d_small * own + (d_small * conjugate).conj();
                    gradients.rows[i][n] += d_v * b;
                    gradients.columns[j][n] += d_v * a;
                    d_own += d_small * a * b;
                    d_conjugate += d_small * (a * b).conj();
                }
            }
            // A reciprocal of x changes by minus its square.
            let (d_own, d_conjugate) = (-d_own * own * own, -d_conjugate * conjugate * conjugate);
            gradients.lambda[n] -= (d_own + d_conjugate.conj()) * root.cosine;
            let slope = Complex64::new(0.0, -root.sine / (self.delta * self.delta));
            gradients.delta += ((d_own + d_conjugate) * slope).re;
        }
    }
}

/// Solves a small system in place, with the largest pivots. One that is singular gives what is not finite.
fn eliminate(matrix: &mut Small, right: &mut [Complex64; SIZE], size: usize) {
    for k in 0..size {
        let pivot = (k..size).max_by(|&i, &j| matrix[i][k].norm().total_cmp(&matrix[j][k].norm())).unwrap_or(k);
        matrix.swap(k, pivot);
        right.swap(k, pivot);
        let (above, right_above) = (matrix[k], right[k]);
        for (row, right) in matrix[..size].iter_mut().zip(&mut *right).skip(k + 1) {
            let factor = row[k] / above[k];
            for (x, above) in row[k..size].iter_mut().zip(&above[k..size]) {
                *x -= factor * above;
            }
            *right -= factor * right_above;
        }
    }
    for k in (0..size).rev() {
        for j in k + 1..size {
            let known = matrix[k][j] * right[j];
            right[k] -= known;
        }
        right[k] /= matrix[k][k];
    }
}

/// The kernel of a recurrence, of `len` steps.
pub(crate) fn kernel_of(steps: &LowRankSteps, len: usize) -> Vec<f64> {
    let system = steps.system();
    let truncated = truncate(steps, system.diagonal().c(), len);
    let mut rows = vec![truncated];
    rows.extend(system.q().iter().map(|q| q.iter().map(Complex64::conj).collect()));
    let mut columns = vec![system.diagonal().b()];
    columns.extend(system.p().iter().map(Vec::as_slice));
    Cauchy { delta: steps.delta(), lambda: system.diagonal().a(), rows, columns }.kernel(len)
}

/// `C (I + Ā^len)`.
pub(crate) fn truncate(steps: &LowRankSteps, c: &[Complex64], len: usize) -> Vec<Complex64> {
    let power = matrix_power(steps.to_dense().matrix(), len);
    let row = real_row(c);
    let truncated = &row + power.transpose() * &row;
    complex_row(&truncated)
}

/// The `C` of which [`truncate`] makes `truncated`; none if -1 is an eigenvalue of `Ā^len`.
pub(crate) fn restore(steps: &LowRankSteps, truncated: &[Complex64], len: usize) -> Option<Vec<Complex64>> {
    let power = matrix_power(steps.to_dense().matrix(), len);
    let identity = nalgebra::DMatrix::identity(power.nrows(), power.ncols());
    let solved = (identity + power).transpose().lu().solve(&real_row(truncated))?;
    Some(complex_row(&solved))
}

/// `C` as what multiplies the real numbers of a state.
fn real_row(c: &[Complex64]) -> DVector<f64> {
    DVector::from_iterator(2 * c.len(), c.iter().flat_map(|c| [c.re, -c.im]))
}

fn complex_row(row: &DVector<f64>) -> Vec<Complex64> {
    row.as_slice().as_chunks().0.iter().map(|&[re, im]| Complex64::new(re, -im)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, mut seed: f64) -> Vec<Complex64> {
        let mut draw = || {
            seed = (seed * 16807.0) % 2147483647.0;
            seed / 2147483647.0 - 0.5
        };
        (0..count).map(|_| Complex64::new(draw(), draw())).collect()
    }

    /// Of a loss Σ g K, against differences of the kernel itself. A difference of 1e-6 is off by its square, 1e-12 of
    /// third derivatives that are up to 1e4 here, and by 1e-16/1e-6 of rounding.
    #[test]
    fn gradients_are_those_of_finite_differences() {
        for (rank, len) in [(0, 16), (1, 16), (1, 15), (2, 12)] {
            let states = 3;
            let lambda: Vec<_> = numbers(states, 5.0).iter().map(|x| Complex64::new(-0.6 + x.re, 4.0 * x.im)).collect();
            let columns: Vec<_> = (0..=rank).map(|i| numbers(states, 7.0 + i as f64)).collect();
            let rows: Vec<_> = (0..=rank).map(|i| numbers(states, 17.0 + i as f64)).collect();
            let d_kernel: Vec<f64> = numbers(len, 3.0).iter().map(|x| x.re).collect();
            let loss = |delta: f64, lambda: &[Complex64], rows: &[Vec<Complex64>], columns: &[Vec<Complex64>]| -> f64 {
                let columns = columns.iter().map(Vec::as_slice).collect();
                let kernel = Cauchy { delta, lambda, rows: rows.to_vec(), columns }.kernel(len);
                kernel.iter().zip(&d_kernel).map(|(k, g)| k * g).sum()
            };
            let slices = columns.iter().map(Vec::as_slice).collect();
            let kernel = Cauchy { delta: 0.3, lambda: &lambda, rows: rows.clone(), columns: slices };
            let got = kernel.backward(&d_kernel);
            let h = 1e-6;
            let check = |got: f64, change: &dyn Fn(f64) -> f64, what: &str| {
                let want = (change(h) - change(-h)) / (2.0 * h);
                assert!(
                    (got - want).abs() <= 1e-7 * (1.0 + want.abs()),
                    "rank {rank}, {what}: {got} instead of {want}"
                );
            };
            check(got.delta, &|h| loss(0.3 + h, &lambda, &rows, &columns), "delta");
            for n in 0..states {
                for unit in [Complex64::ONE, Complex64::I] {
                    let moved = |all: &[Complex64], h: f64| {
                        let mut all = all.to_vec();
                        all[n] += unit * h;
                        all
                    };
                    let of = |g: Complex64| (g * unit).re;
                    check(of(got.lambda[n]), &|h| loss(0.3, &moved(&lambda, h), &rows, &columns), "lambda");
                    for i in 0..=rank {
                        let with = |all: &[Vec<Complex64>], h: f64| {
                            let mut all = all.to_vec();
                            all[i] = moved(&all[i], h);
                            all
                        };
                        check(of(got.rows[i][n]), &|h| loss(0.3, &lambda, &with(&rows, h), &columns), "a row");
                        check(of(got.columns[i][n]), &|h| loss(0.3, &lambda, &rows, &with(&columns, h)), "a column");
                    }
                }
            }
        }
    }
}
