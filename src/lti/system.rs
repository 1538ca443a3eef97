//! Systems with a dense, a diagonal and a diagonal plus low rank matrix, and their discretizations.
//!
//! All of them are of one input and one output, with real numbers in and out, and in `f64`: they are small, and what is
//! made of them is used many times.

use nalgebra::{DMatrix, DVector};
use num_complex::Complex64;

use super::complex::{exp_m1_over, exp_steps};
use super::s4::MAX_RANK;
use super::views::{Continuous, Recurrent};
use crate::{Error, Result};

/// How a continuous system `x' = A x + B u` becomes a recurrence `x_k = Ā x_{k-1} + B̄ u_k` of steps of size Δ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Rule {
    /// `Ā = exp(ΔA)`, `B̄ = A⁻¹ (exp(ΔA) - I) B`: exact for an input that is held over each step. Singular `A` are no
    /// exception.
    #[default]
    ZeroOrderHold,
    /// `Ā = (I - Δ/2 A)⁻¹ (I + Δ/2 A)`, `B̄ = (I - Δ/2 A)⁻¹ Δ B` (Tustin): of second order, and stable if the system
    /// is. S4 uses it.
    Bilinear,
    /// `Ā = I + Δ A`, `B̄ = Δ B`: of first order, and stable for small steps only.
    Euler,
}

/// What the eigenvalues that are stored of a diagonal matrix stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Spectrum {
    /// Half of them: each one's complex conjugate belongs to the system too, with the conjugates of its `B` and `C`, so
    /// that `y = 2 Re(C x) + D u` is that of a real system.
    Pairs,
    /// All of them, and they are real: `y = Re(C x) + D u`.
    Real,
}

impl Spectrum {
    /// By what `Re(C x)` is multiplied.
    fn weight(self) -> f64 {
        match self {
            Self::Pairs => 2.0,
            Self::Real => 1.0,
        }
    }
}

/// Checks a step size.
pub(super) fn check_delta(delta: f64) -> Result<()> {
    if delta > 0.0 && delta.is_finite() {
        return Ok(());
    }
    Err(Error::argument("delta", "a positive and finite step", delta))
}

/// Checks that there is one number for each state.
pub(super) fn check_states(argument: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(Error::argument(argument, format_args!("{expected} numbers, one for each state"), got))
}

/// Checks the number of states, which may be as many as the operators take.
fn check_order(argument: &'static str, order: usize) -> Result<()> {
    if order > 0 {
        return Ok(());
    }
    Err(Error::argument(argument, "at least one state", "none"))
}

/// `x' = A x + B u`, `y = C x + D u` with a dense real matrix of `N` x `N`.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    a: DMatrix<f64>,
    b: DVector<f64>,
    c: DVector<f64>,
    d: f64,
}

impl Dense {
    /// The system of a matrix `a`, row after row, and of `N` numbers each in `b` and `c`.
    ///
    /// # Errors
    /// No state; another number of elements in `a` than `N²`, or in `c` than `N`.
    pub fn new(a: &[f64], b: &[f64], c: &[f64], d: f64) -> Result<Self> {
        let order = b.len();
        check_order("b", order)?;
        if order.checked_mul(order) != Some(a.len()) {
            return Err(Error::argument("a", format_args!("{order} x {order} numbers, as `b` has {order}"), a.len()));
        }
        check_states("c", order, c.len())?;
        let a = DMatrix::from_row_slice(order, order, a);
        Ok(Self { a, b: DVector::from_row_slice(b), c: DVector::from_row_slice(c), d })
    }

    /// The same system with the `N` numbers of `c`.
    ///
    /// # Errors
    /// Another number of them.
    pub fn with_c(mut self, c: &[f64]) -> Result<Self> {
        check_states("c", self.b.len(), c.len())?;
        self.c = DVector::from_row_slice(c);
        Ok(self)
    }

    /// The number of states.
    pub fn order(&self) -> usize {
        self.b.len()
    }

    /// `A`, row after row.
    pub fn a(&self) -> Vec<f64> {
        self.a.transpose().as_slice().to_vec()
    }

    /// `B`.
    pub fn b(&self) -> &[f64] {
        self.b.as_slice()
    }

    /// `C`.
    pub fn c(&self) -> &[f64] {
        self.c.as_slice()
    }

    /// `D`.
    pub fn d(&self) -> f64 {
        self.d
    }

    pub(super) fn matrix(&self) -> &DMatrix<f64> {
        &self.a
    }

    /// The recurrence with steps of `delta`.
    ///
    /// # Errors
    /// A `delta` that is not positive and finite. With [`Rule::Bilinear`], a system that has the eigenvalue `2/delta`,
    /// for which it has no recurrence.
    pub fn discretize(&self, delta: f64, rule: Rule) -> Result<DenseSteps> {
        check_delta(delta)?;
        let order = self.order();
        let identity = DMatrix::identity(order, order);
        let (a, b) = match rule {
            Rule::ZeroOrderHold => {
                // exp of Δ·(A B; 0 0) is (Ā B̄; 0 1): nothing is divided by A (Van Loan 1978).
                let mut both = DMatrix::zeros(order + 1, order + 1);
                both.view_mut((0, 0), (order, order)).copy_from(&(&self.a * delta));
                both.view_mut((0, order), (order, 1)).copy_from(&(&self.b * delta));
                let both = both.exp();
                (
                    both.view((0, 0), (order, order)).into_owned(),
                    both.view((0, order), (order, 1)).column(0).into_owned(),
                )
            }
            Rule::Bilinear => {
                let half = &self.a * (0.5 * delta);
                let solver = (&identity - &half).lu();
                let solved = solver.solve(&(&identity + &half)).zip(solver.solve(&(&self.b * delta)));
                solved.ok_or_else(|| {
                    let expected =
                        format_args!("no eigenvalue of the system to be 2/delta, for delta = {delta}").to_string();
                    Error::argument("delta", expected, "one that is")
                })?
            }
            Rule::Euler => (identity + &self.a * delta, &self.b * delta),
        };
        Ok(DenseSteps { a, b, c: self.c.clone(), d: self.d })
    }
}

impl Continuous for Dense {
    fn state_len(&self) -> usize {
        self.order()
    }

    fn derivative(&self, state: &[f64], u: f64, derivative: &mut [f64]) {
        for (i, derivative) in derivative.iter_mut().enumerate() {
            let row = self.a.row(i);
            *derivative = self.b[i] * u + row.iter().zip(state).map(|(a, x)| a * x).sum::<f64>();
        }
    }

    fn output(&self, state: &[f64], u: f64) -> f64 {
        self.d * u + self.c.iter().zip(state).map(|(c, x)| c * x).sum::<f64>()
    }
}

/// A [`Dense`] system's recurrence.
#[derive(Debug, Clone, PartialEq)]
pub struct DenseSteps {
    a: DMatrix<f64>,
    b: DVector<f64>,
    c: DVector<f64>,
    d: f64,
}

impl DenseSteps {
    /// `Ā`, row after row.
    pub fn a(&self) -> Vec<f64> {
        self.a.transpose().as_slice().to_vec()
    }

    /// `B̄`.
    pub fn b(&self) -> &[f64] {
        self.b.as_slice()
    }

    pub(super) fn matrix(&self) -> &DMatrix<f64> {
        &self.a
    }
}

impl Recurrent for DenseSteps {
    fn state_len(&self) -> usize {
        self.b.len()
    }

    fn step(&self, state: &mut [f64], u: f64) -> f64 {
        let before = DVector::from_row_slice(state);
        let after = &self.a * before + &self.b * u;
        state.copy_from_slice(after.as_slice());
        self.d * u + self.c.dot(&after)
    }

    fn feed_through(&self) -> f64 {
        self.d
    }

    /// By powers of `Ā`: 64 vectors `Ā^k B̄`, each read by 64 rows `C Ā^(64 j)`, and so on.
    fn kernel(&self, len: usize) -> Vec<f64> {
        self.responses(&self.b, len)
    }

    fn state_response(&self, state: &[f64], len: usize) -> Vec<f64> {
        self.responses(&(&self.a * DVector::from_row_slice(state)), len)
    }

    /// By halves: what every pair of neighbours comes to, and then every pair of these.
    fn final_state(&self, u: &[f64], state: &[f64]) -> Vec<f64> {
        let mut power = self.a.clone();
        let mut parts: Vec<DVector<f64>> = u.iter().map(|u| &self.b * *u).collect();
        let mut total = DVector::from_row_slice(state);
        if !parts.is_empty() {
            total = matrix_power(&self.a, parts.len()) * total;
        }
        while parts.len() > 1 {
            // An odd one stands alone at the front, so that all that follow reach over the same number of steps.
            let odd = parts.len() % 2;
            let mut next: Vec<_> = parts[..odd].to_vec();
            next.extend(parts[odd..].chunks_exact(2).map(|pair| &power * &pair[0] + &pair[1]));
            power = &power * &power;
            parts = next;
        }
        if let Some(part) = parts.pop() {
            total += part;
        }
        total.as_slice().to_vec()
    }
}

impl DenseSteps {
    /// `C Ā^k v` for `k` below `len`.
    fn responses(&self, v: &DVector<f64>, len: usize) -> Vec<f64> {
        // √len vectors and as many rows: √len products with a matrix each, instead of len.
        let vectors = (len as f64).sqrt().ceil().max(1.0) as usize;
        let mut columns = DMatrix::zeros(v.len(), vectors);
        let mut column = v.clone();
        for k in 0..vectors {
            columns.set_column(k, &column);
            column = &self.a * column;
        }
        let far = matrix_power(&self.a, vectors);
        let mut row = self.c.transpose();
        let mut all = Vec::with_capacity(len);
        while all.len() < len {
            let part = &row * &columns;
            all.extend(part.iter().take(len - all.len()));
            row = &row * &far;
        }
        all
    }
}

/// `a` to the power of `exponent`, by squaring.
pub(super) fn matrix_power(a: &DMatrix<f64>, mut exponent: usize) -> DMatrix<f64> {
    let mut result = DMatrix::identity(a.nrows(), a.ncols());
    let mut square = a.clone();
    while exponent > 0 {
        if exponent % 2 == 1 {
            result = &result * &square;
        }
        exponent /= 2;
        if exponent > 0 {
            square = &square * &square;
        }
    }
    result
}

/// `x' = Λ x + B u` with a diagonal complex matrix, `y` as its [`Spectrum`] says. A state is `n` complex numbers, each
/// the two real numbers that it is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Diagonal {
    a: Vec<Complex64>,
    b: Vec<Complex64>,
    c: Vec<Complex64>,
    d: f64,
    spectrum: Spectrum,
}

impl Diagonal {
    /// The system of the eigenvalues `a`, with as many numbers in `b` and `c`.
    ///
    /// # Errors
    /// No state; other numbers of them; with [`Spectrum::Real`] one of `a` that is not real.
    pub fn new(a: &[Complex64], b: &[Complex64], c: &[Complex64], d: f64, spectrum: Spectrum) -> Result<Self> {
        check_order("a", a.len())?;
        check_states("b", a.len(), b.len())?;
        check_states("c", a.len(), c.len())?;
        if spectrum == Spectrum::Real
            && let Some(a) = a.iter().find(|a| a.im != 0.0)
        {
            return Err(Error::argument("a", "real eigenvalues, as the spectrum says", a));
        }
        Ok(Self { a: a.to_vec(), b: b.to_vec(), c: c.to_vec(), d, spectrum })
    }

    /// The eigenvalues that are stored.
    pub fn a(&self) -> &[Complex64] {
        &self.a
    }

    /// `B`.
    pub fn b(&self) -> &[Complex64] {
        &self.b
    }

    /// `C`.
    pub fn c(&self) -> &[Complex64] {
        &self.c
    }

    /// `D`.
    pub fn d(&self) -> f64 {
        self.d
    }

    /// What the eigenvalues stand for.
    pub fn spectrum(&self) -> Spectrum {
        self.spectrum
    }

    /// The recurrence with steps of `delta`.
    ///
    /// # Errors
    /// A `delta` that is not positive and finite. With [`Rule::Bilinear`], an eigenvalue of `2/delta`.
    pub fn discretize(&self, delta: f64, rule: Rule) -> Result<DiagonalSteps> {
        check_delta(delta)?;
        if rule == Rule::Bilinear
            && let Some(a) = self.a.iter().find(|a| *a * (0.5 * delta) == Complex64::ONE)
        {
            return Err(Error::argument("delta", "no eigenvalue to be 2/delta", a));
        }
        let steps = self.a.iter().zip(&self.b).map(|(&a, &b)| {
            let (power, weight) = discretize_number(a, delta, rule);
            (power, weight * b)
        });
        let (a, b) = steps.unzip();
        // Of the other rules exp(ΔA) is not the power, whose logarithm would have to be taken.
        let rates = (rule == Rule::ZeroOrderHold).then(|| (self.a.clone(), delta));
        Ok(DiagonalSteps { a, b, c: self.c.clone(), d: self.d, spectrum: self.spectrum, rates })
    }

    /// The same system with a real dense matrix, whose state has the real and the imaginary part of each number.
    pub fn to_dense(&self) -> Dense {
        let none = LowRank { diagonal: self.clone(), p: Vec::new(), q: Vec::new() };
        none.to_dense()
    }
}

/// `Ā` and what multiplies `B` in `B̄`, for one eigenvalue.
pub(crate) fn discretize_number(a: Complex64, delta: f64, rule: Rule) -> (Complex64, Complex64) {
    let z = a * delta;
    match rule {
        Rule::ZeroOrderHold => (exp_steps(a, delta, 1.0), exp_m1_over(z) * delta),
        Rule::Bilinear => {
            let inverse = (Complex64::ONE - z * 0.5).inv();
            ((Complex64::ONE + z * 0.5) * inverse, inverse * delta)
        }
        Rule::Euler => (Complex64::ONE + z, Complex64::from(delta)),
    }
}

/// The complex numbers of a state.
fn numbers(state: &[f64]) -> impl Iterator<Item = Complex64> + '_ {
    state.as_chunks().0.iter().map(|&[re, im]| Complex64::new(re, im))
}

impl Continuous for Diagonal {
    fn state_len(&self) -> usize {
        2 * self.a.len()
    }

    fn derivative(&self, state: &[f64], u: f64, derivative: &mut [f64]) {
        let parts = self.a.iter().zip(&self.b).zip(numbers(state));
        for (((a, b), x), to) in parts.zip(derivative.as_chunks_mut().0) {
            let value = a * x + b * u;
            *to = [value.re, value.im];
        }
    }

    fn output(&self, state: &[f64], u: f64) -> f64 {
        self.d * u + self.spectrum.weight() * read(&self.c, state)
    }
}

/// `Re(C x)`.
fn read(c: &[Complex64], state: &[f64]) -> f64 {
    c.iter().zip(numbers(state)).map(|(c, x)| c.re * x.re - c.im * x.im).sum()
}

/// A [`Diagonal`] system's recurrence.
#[derive(Debug, Clone, PartialEq)]
pub struct DiagonalSteps {
    a: Vec<Complex64>,
    b: Vec<Complex64>,
    c: Vec<Complex64>,
    d: f64,
    spectrum: Spectrum,
    /// The eigenvalues and the step size, of which `a` are the exponentials with zero-order hold.
    rates: Option<(Vec<Complex64>, f64)>,
}

impl DiagonalSteps {
    /// `Ā`.
    pub fn a(&self) -> &[Complex64] {
        &self.a
    }

    /// `B̄`.
    pub fn b(&self) -> &[Complex64] {
        &self.b
    }

    /// `Ā^k` of the `n`-th number.
    fn power(&self, n: usize, k: usize) -> Complex64 {
        match &self.rates {
            Some((rates, delta)) => exp_steps(rates[n], *delta, k as f64),
            None => self.a[n].powu(u32::try_from(k).unwrap_or(u32::MAX)),
        }
    }

    /// `weight · Re Σ_n v_n Ā_n^k` for `k` below `len`: a product with a Vandermonde matrix, of which every 64th row is
    /// made from the exponential and the rows between by 63 steps at most.
    fn vandermonde(&self, v: &[Complex64], len: usize) -> Vec<f64> {
        const ROWS: usize = 64;
        let mut all = vec![0.0; len];
        for (n, v) in v.iter().enumerate() {
            for (part, out) in all.chunks_mut(ROWS).enumerate() {
                let mut term = v * self.power(n, part * ROWS);
                for out in out {
                    *out += self.spectrum.weight() * term.re;
                    term *= self.a[n];
                }
            }
        }
        all
    }
}

impl Recurrent for DiagonalSteps {
    fn state_len(&self) -> usize {
        2 * self.a.len()
    }

    fn step(&self, state: &mut [f64], u: f64) -> f64 {
        for ((a, b), x) in self.a.iter().zip(&self.b).zip(state.as_chunks_mut().0) {
            let after = a * Complex64::new(x[0], x[1]) + b * u;
            *x = [after.re, after.im];
        }
        self.d * u + self.spectrum.weight() * read(&self.c, state)
    }

    fn feed_through(&self) -> f64 {
        self.d
    }

    /// The Vandermonde kernel of S4D (Gu, Gupta, Goel and Ré 2022, arXiv 2206.11893).
    fn kernel(&self, len: usize) -> Vec<f64> {
        let v: Vec<_> = self.c.iter().zip(&self.b).map(|(c, b)| c * b).collect();
        self.vandermonde(&v, len)
    }

    fn state_response(&self, state: &[f64], len: usize) -> Vec<f64> {
        let v: Vec<_> = self.c.iter().zip(&self.a).zip(numbers(state)).map(|((c, a), x)| c * a * x).collect();
        self.vandermonde(&v, len)
    }

    fn final_state(&self, u: &[f64], state: &[f64]) -> Vec<f64> {
        let mut all = Vec::with_capacity(state.len());
        for (n, x) in numbers(state).enumerate() {
            let mut sum = x * self.power(n, u.len());
            for (part, inputs) in u.rchunks(64).enumerate() {
                let mut weight = self.power(n, part * 64) * self.b[n];
                for u in inputs.iter().rev() {
                    sum += weight * u;
                    weight *= self.a[n];
                }
            }
            all.extend([sum.re, sum.im]);
        }
        all
    }
}

/// `x' = (Λ - P Q*) x + B u`, `y = 2 Re(C x) + D u`: diagonal plus low rank, in conjugate pairs of which one each is
/// stored. That is S4's form of HiPPO's matrices (Gu, Goel and Ré 2022, arXiv 2111.00396).
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    pub(super) diagonal: Diagonal,
    /// Vectors, as many as the rank is.
    pub(super) p: Vec<Vec<Complex64>>,
    pub(super) q: Vec<Vec<Complex64>>,
}

impl LowRank {
    /// The system of `diagonal` less the sum of the products of each vector of `p` with the conjugate transpose of that
    /// of `q`.
    ///
    /// # Errors
    /// Eigenvalues of `diagonal` that are not in pairs, other numbers of states in a vector of `p` or `q`, other
    /// numbers of vectors, and more than [`MAX_RANK`] of them.
    pub fn new(diagonal: Diagonal, p: &[Vec<Complex64>], q: &[Vec<Complex64>]) -> Result<Self> {
        if diagonal.spectrum != Spectrum::Pairs {
            return Err(Error::argument("diagonal", "eigenvalues in conjugate pairs", "real ones"));
        }
        if p.len() > MAX_RANK {
            return Err(Error::argument("p", format_args!("{MAX_RANK} vectors at most"), p.len()));
        }
        if p.len() != q.len() {
            return Err(Error::argument("q", format_args!("{} vectors, as `p` has", p.len()), q.len()));
        }
        for (name, vectors) in [("p", p), ("q", q)] {
            for vector in vectors {
                check_states(name, diagonal.a.len(), vector.len())?;
            }
        }
        Ok(Self { diagonal, p: p.to_vec(), q: q.to_vec() })
    }

    /// The diagonal part with `B`, `C` and `D`.
    pub fn diagonal(&self) -> &Diagonal {
        &self.diagonal
    }

    /// The vectors `P`.
    pub fn p(&self) -> &[Vec<Complex64>] {
        &self.p
    }

    /// The vectors `Q`.
    pub fn q(&self) -> &[Vec<Complex64>] {
        &self.q
    }

    /// The same system with another `C`.
    ///
    /// # Errors
    /// Another number of states.
    pub fn with_c(mut self, c: &[Complex64]) -> Result<Self> {
        check_states("c", self.diagonal.a.len(), c.len())?;
        self.diagonal.c = c.to_vec();
        Ok(self)
    }

    /// The same system with a real dense matrix, whose state has the real and the imaginary part of each number.
    pub fn to_dense(&self) -> Dense {
        let Diagonal { a, b, c, d, spectrum } = &self.diagonal;
        let order = 2 * a.len();
        let mut matrix = DMatrix::zeros(order, order);
        for (n, a) in a.iter().enumerate() {
            let part = [[a.re, -a.im], [a.im, a.re]];
            for (i, row) in part.iter().enumerate() {
                for (j, value) in row.iter().enumerate() {
                    matrix[(2 * n + i, 2 * n + j)] = *value;
                }
            }
        }
        // Q* x over a pair is 2 Re(conj(q) x).
        for (p, q) in self.p.iter().zip(&self.q) {
            for (i, p) in p.iter().enumerate() {
                for (j, q) in q.iter().enumerate() {
                    for (row, p) in [p.re, p.im].into_iter().enumerate() {
                        for (column, q) in [q.re, q.im].into_iter().enumerate() {
                            matrix[(2 * i + row, 2 * j + column)] -= 2.0 * p * q;
                        }
                    }
                }
            }
        }
        let weight = spectrum.weight();
        let b = DVector::from_iterator(order, b.iter().flat_map(|b| [b.re, b.im]));
        let c = DVector::from_iterator(order, c.iter().flat_map(|c| [weight * c.re, -weight * c.im]));
        Dense { a: matrix, b, c, d: *d }
    }

    /// The recurrence with steps of `delta` by [`Rule::Bilinear`], which keeps the form: each step takes as many
    /// operations as there are states.
    ///
    /// # Errors
    /// Another rule: the exponential of such a matrix is a dense one, that of [`LowRank::to_dense`]. A `delta` that is
    /// not positive and finite, or for which `2/delta` is an eigenvalue of the system or of its diagonal.
    pub fn discretize(&self, delta: f64, rule: Rule) -> Result<LowRankSteps> {
        check_delta(delta)?;
        if rule != Rule::Bilinear {
            let expected = "Bilinear (for a matrix with low rank; `to_dense` takes all)";
            return Err(Error::argument("rule", expected, format_args!("{rule:?}")));
        }
        LowRankSteps::new(self.clone(), delta)
    }
}

impl Continuous for LowRank {
    fn state_len(&self) -> usize {
        self.diagonal.state_len()
    }

    fn derivative(&self, state: &[f64], u: f64, derivative: &mut [f64]) {
        self.diagonal.derivative(state, u, derivative);
        for (p, q) in self.p.iter().zip(&self.q) {
            let along = pair_product(q, state);
            for (p, to) in p.iter().zip(derivative.as_chunks_mut().0) {
                *to = [to[0] - p.re * along, to[1] - p.im * along];
            }
        }
    }

    fn output(&self, state: &[f64], u: f64) -> f64 {
        self.diagonal.output(state, u)
    }
}

/// `Q* x` over all pairs, which is real.
fn pair_product(q: &[Complex64], state: &[f64]) -> f64 {
    2.0 * q.iter().zip(numbers(state)).map(|(q, x)| q.re * x.re + q.im * x.im).sum::<f64>()
}

/// `(D⁻¹ + P Q*)⁻¹ v` for a diagonal matrix, whose numbers are `inverse`, and `small`, `(I + Q* D P)⁻¹`.
fn woodbury(inverse: &[Complex64], small: &DMatrix<f64>, [p, q]: [&[Vec<Complex64>]; 2], v: &[f64]) -> Vec<f64> {
    let mut solved: Vec<f64> = Vec::with_capacity(v.len());
    for (inverse, v) in inverse.iter().zip(numbers(v)) {
        let value = inverse * v;
        solved.extend([value.re, value.im]);
    }
    let along = small * DVector::from_iterator(q.len(), q.iter().map(|q| pair_product(q, &solved)));
    for (p, along) in p.iter().zip(along.iter()) {
        for ((p, inverse), to) in p.iter().zip(inverse).zip(solved.as_chunks_mut().0) {
            let part = p * inverse * *along;
            *to = [to[0] - part.re, to[1] - part.im];
        }
    }
    solved
}

/// A [`LowRank`] system's recurrence.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRankSteps {
    system: LowRank,
    delta: f64,
    /// `(2/Δ - Λ)⁻¹`.
    inverse: Vec<Complex64>,
    /// `(I + Q* (2/Δ - Λ)⁻¹ P)⁻¹`, which is real.
    small: DMatrix<f64>,
    /// `B̄`.
    b: Vec<f64>,
}

impl LowRankSteps {
    fn new(system: LowRank, delta: f64) -> Result<Self> {
        let inverse: Vec<_> = system.diagonal.a.iter().map(|a| (2.0 / delta - a).inv()).collect();
        let rank = system.p.len();
        let mut small = DMatrix::identity(rank, rank);
        for (i, q) in system.q.iter().enumerate() {
            for (j, p) in system.p.iter().enumerate() {
                let terms = q.iter().zip(p).zip(&inverse).map(|((q, p), inverse)| (q.conj() * p * inverse).re);
                small[(i, j)] += 2.0 * terms.sum::<f64>();
            }
        }
        let small = small.try_inverse().filter(|_| inverse.iter().all(|x| x.is_finite()));
        let Some(small) = small else {
            let expected = format_args!("no eigenvalue of the system to be 2/delta, for delta = {delta}").to_string();
            return Err(Error::argument("delta", expected, "one that is"));
        };
        let mut steps = Self { system, delta, inverse, small, b: Vec::new() };
        // B̄ = (I - Δ/2 A)⁻¹ Δ B = 2 (2/Δ - A)⁻¹ B.
        let b: Vec<f64> = steps.system.diagonal.b.iter().flat_map(|b| [2.0 * b.re, 2.0 * b.im]).collect();
        steps.b = steps.solve(&b);
        Ok(steps)
    }

    /// `(2/Δ - A)⁻¹ v` by Woodbury's identity.
    fn solve(&self, v: &[f64]) -> Vec<f64> {
        let system = &self.system;
        woodbury(&self.inverse, &self.small, [&system.p, &system.q], v)
    }

    /// `(2/Δ - A)⁻* v`, of the adjoint: in which the conjugates of the eigenvalues stand, and `P` and `Q` for each other.
    pub(super) fn solve_adjoint(&self, v: &[f64]) -> Vec<f64> {
        let system = &self.system;
        let inverse: Vec<_> = self.inverse.iter().map(Complex64::conj).collect();
        woodbury(&inverse, &self.small.transpose(), [&system.q, &system.p], v)
    }

    pub(super) fn system(&self) -> &LowRank {
        &self.system
    }

    pub(super) fn delta(&self) -> f64 {
        self.delta
    }

    /// The same recurrence of a dense system.
    pub(super) fn to_dense(&self) -> DenseSteps {
        let Dense { c, d, .. } = self.system.to_dense();
        let order = self.b.len();
        let mut a = DMatrix::zeros(order, order);
        for column in 0..order {
            let mut unit = vec![0.0; order];
            unit[column] = 1.0;
            self.step(&mut unit, 0.0);
            a.set_column(column, &DVector::from_vec(unit));
        }
        DenseSteps { a, b: DVector::from_row_slice(&self.b), c, d }
    }
}

impl Recurrent for LowRankSteps {
    fn state_len(&self) -> usize {
        self.b.len()
    }

    fn step(&self, state: &mut [f64], u: f64) -> f64 {
        // Ā x = (2/Δ - A)⁻¹ (2/Δ + A) x.
        let mut sum = vec![0.0; state.len()];
        self.system.derivative(state, 0.0, &mut sum);
        for (sum, x) in sum.iter_mut().zip(&*state) {
            *sum += 2.0 / self.delta * x;
        }
        let moved = self.solve(&sum);
        for ((x, moved), b) in state.iter_mut().zip(moved).zip(&self.b) {
            *x = moved + b * u;
        }
        self.system.output(state, u)
    }

    fn feed_through(&self) -> f64 {
        self.system.diagonal.d
    }

    /// The kernel of S4, by the Cauchy kernel and Woodbury's identity; see [`s4`](super::s4).
    fn kernel(&self, len: usize) -> Vec<f64> {
        super::s4::kernel_of(self, len)
    }

    fn state_response(&self, state: &[f64], len: usize) -> Vec<f64> {
        self.to_dense().state_response(state, len)
    }

    fn final_state(&self, u: &[f64], state: &[f64]) -> Vec<f64> {
        self.to_dense().final_state(u, state)
    }
}
