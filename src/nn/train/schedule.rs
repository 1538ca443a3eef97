//! Learning rates by steps.

/// How the learning rate of a run goes from step to step.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Schedule {
    /// The same in every step.
    Constant,
    /// It rises linearly for `warmup` steps, then falls along half a cosine to the share `last` of the highest (Loshchilov
    /// and Hutter 2017, arXiv 1608.03983, without restarts).
    Cosine {
        /// Steps over which it rises.
        warmup: usize,
        /// The share that it ends at.
        last: f64,
    },
    /// It rises linearly for `warmup` steps, stays, and falls linearly to zero in the last `decay` steps (warmup, stable,
    /// decay: Hu et al. 2024, arXiv 2404.06395). If `decay` is 0 it is constant after the warmup.
    Trapezoid {
        /// Steps over which it rises.
        warmup: usize,
        /// Steps over which it falls.
        decay: usize,
    },
}

impl Schedule {
    /// The learning rate of a step of `steps`, counted from 0, where the highest is `highest`.
    pub fn rate(&self, highest: f64, step: usize, steps: usize) -> f64 {
        match *self {
            Self::Constant => highest,
            Self::Cosine { warmup, .. } if step < warmup => highest * (step + 1) as f64 / warmup as f64,
            Self::Cosine { warmup, last } => {
                let progress = (step - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
                let share = 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos());
                highest * (last + (1.0 - last) * share)
            }
            Self::Trapezoid { warmup, decay } => {
                let rise = (step + 1) as f64 / warmup.max(1) as f64;
                let fall = if decay == 0 { 1.0 } else { steps.saturating_sub(step) as f64 / decay as f64 };
                highest * rise.min(fall).min(1.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule;

    #[test]
    fn rates_rise_and_fall_where_they_should() {
        assert_eq!(Schedule::Constant.rate(3.0, 7, 8), 3.0);
        let cosine = Schedule::Cosine { warmup: 4, last: 0.1 };
        assert_eq!([0, 1, 3, 4].map(|step| cosine.rate(2.0, step, 24)), [0.5, 1.0, 2.0, 2.0]);
        // Half way down, at the end, and after it.
        for (step, rate) in [(14, 0.55), (24, 0.1), (30, 0.1)] {
            assert!((cosine.rate(1.0, step, 24) - rate).abs() < 1e-15, "{step}");
        }
        // A run that ends while the rate still rises.
        assert_eq!(cosine.rate(2.0, 2, 3), 1.5);
        assert!(Schedule::Cosine { warmup: 0, last: 0.0 }.rate(1.0, 0, 0).is_finite());

        let trapezoid = Schedule::Trapezoid { warmup: 2, decay: 4 };
        assert_eq!(
            [0, 1, 2, 6, 7, 8, 9, 10].map(|step| trapezoid.rate(4.0, step, 10)),
            [2.0, 4.0, 4.0, 4.0, 3.0, 2.0, 1.0, 0.0]
        );
        assert_eq!(Schedule::Trapezoid { warmup: 0, decay: 0 }.rate(4.0, 0, 1), 4.0);
        let constant = Schedule::Trapezoid { warmup: 2, decay: 0 };
        assert_eq!([0, 1, 9, 10, 11].map(|step| constant.rate(4.0, step, 10)), [2.0, 4.0, 4.0, 4.0, 4.0]);
    }
}
