//! How long a run takes, and how far its results are from exact ones.

use std::time::{Duration, Instant};

use selective_scan::{DType, Element};

/// The seconds that `run` takes: the median of several runs after a warm-up. A run of more than a second is its own
/// warm-up and is not repeated.
pub fn seconds(budget: Duration, mut run: impl FnMut()) -> f64 {
    const LONG: f64 = 1.0;
    let mut time = || {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    let first = time();
    if first > LONG {
        return first;
    }
    let runs = (budget.as_secs_f64() / first).clamp(3.0, 201.0) as usize;
    let mut times: Vec<_> = (0..runs).map(|_| time()).collect();
    times.sort_by(f64::total_cmp);
    times[runs / 2]
}

/// Sums of squares over the elements of one tensor.
#[derive(Debug, Clone, Copy, Default)]
pub struct Deviation {
    error: f64,
    exact: f64,
    /// What rounding the exact values to the tensor's type would have cost; 0 for `f32`, whose bound includes it.
    rounding: f64,
}

impl Deviation {
    pub fn add<T: Element>(&mut self, got: T, exact: f64) {
        self.error += (f64::from(got.to_f32()) - exact).powi(2);
        self.exact += exact * exact;
        if T::DTYPE != DType::F32 {
            self.rounding += (f64::from(T::from_f32(exact as f32).to_f32()) - exact).powi(2);
        }
    }

    pub fn of<T: Element>(got: &[T], exact: &[f64]) -> Self {
        let mut deviation = Self::default();
        for (&got, &exact) in got.iter().zip(exact) {
            deviation.add(got, exact);
        }
        deviation
    }

    /// The channels `picks` of a `(rows, channels, width)` tensor against the `(rows, width)` tensors of each.
    pub fn of_channels<'e, T: Element>(
        got: &[T],
        [channels, width]: [usize; 2],
        picks: &[usize],
        exact: impl Iterator<Item = &'e [f64]>,
    ) -> Self {
        let mut deviation = Self::default();
        for (&pick, exact) in picks.iter().zip(exact) {
            for (row, exact) in got.chunks(channels * width).zip(exact.chunks(width)) {
                for (&got, &exact) in row[pick * width..].iter().zip(exact) {
                    deviation.add(got, exact);
                }
            }
        }
        deviation
    }

    /// `‖x - exact‖ / ‖exact‖`; the norm of `x` itself if all should be zero.
    fn relative(sum: f64, exact: f64) -> f64 {
        if exact == 0.0 { sum.sqrt() } else { (sum / exact).sqrt() }
    }

    /// The error against its bound: `arithmetic`, and twice the rounding of the results where they are narrower.
    pub fn check(&self, arithmetic: f64) -> Check {
        let error = Self::relative(self.error, self.exact);
        let bound = arithmetic + 2.0 * Self::relative(self.rounding, self.exact);
        Check { error, within: error <= bound }
    }
}

/// The bounds on what arithmetic in `f32` may cost.
pub const FORWARD_BOUND: f64 = 1e-5;
pub const GRADIENT_BOUND: f64 = 1e-4;

/// A relative error, and whether it is small enough.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    pub error: f64,
    pub within: bool,
}

impl Check {
    /// The worst of several.
    pub fn worst(checks: impl IntoIterator<Item = Self>) -> Self {
        checks.into_iter().fold(Self { error: 0.0, within: true }, |worst, check| Self {
            // `f64::max` would drop a NaN.
            error: if check.error > worst.error || check.error.is_nan() { check.error } else { worst.error },
            within: worst.within && check.within,
        })
    }
}

/// What one operator did at one shape.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    pub seconds: f64,
    pub check: Check,
}
