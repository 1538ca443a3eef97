//! Linear time-invariant systems, which Mamba grew from: HiPPO, S4 and S4D.
//!
//! A system of one input and one output,
//!
//! ```text
//! x'(t) = A x(t) + B u(t)          y(t) = C x(t) + D u(t)
//! ```
//!
//! has a matrix that is [`Dense`], a [`Diagonal`], or a diagonal less one of [`LowRank`]. With a step size it becomes a
//! recurrence by a [`Rule`], `discretize` of each. It can be seen in three ways, of which [`Continuous`] has one and
//! [`Recurrent`] two; they agree. [`hippo`] has the systems that remember, and the eigenvalues that training starts
//! from.
//!
//! All this is of single systems in `f64`, whose inputs are read by the end of each step: `x_k = Ā x_{k-1} + B̄ u_k`,
//! `y_k = C x_k + D u_k`.
//!
//! ```
//! use selective_scan::lti::hippo::Measure;
//! use selective_scan::lti::{Recurrent, Rule};
//!
//! // 32 Legendre polynomials remember a second of a signal, of which there are 1000 steps.
//! let steps = Measure::LegT.system(32)?.discretize(1e-3, Rule::ZeroOrderHold)?;
//! let mut state = vec![0.0; 32];
//! let signal: Vec<f64> = (0..3000).map(|k| (0.01 * k as f64).sin()).collect();
//! steps.sequence(&signal, &mut state)?;
//! // A quarter of a second ago: nothing is left of the signal but the state.
//! let past = Measure::LegT.reconstruct(&state, &[0.25]);
//! assert!((past[0] - signal[2749]).abs() < 0.02);
//! # Ok::<(), selective_scan::Error>(())
//! ```

#[cfg(feature = "candle")]
pub(crate) mod candle;
mod complex;
mod fft;
pub mod hippo;
pub mod long_conv;
pub mod s4;
pub mod s4d;
mod system;
mod views;

pub use num_complex::Complex64;
pub use system::{Dense, DenseSteps, Diagonal, DiagonalSteps, LowRank, LowRankSteps, Rule, Spectrum};
pub use views::{Continuous, Recurrent};
