//! Random numbers and tensors.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selective_scan::{Element, Isa};

use super::strided::Strided;

/// A generator whose seed is new in every run, or that of the variable SEED. Failures name the seed.
pub fn seeded() -> (StdRng, u64) {
    let seed = match std::env::var("SEED") {
        Ok(seed) => seed.parse().expect("SEED is a number"),
        Err(_) => rand::rng().random(),
    };
    (StdRng::seed_from_u64(seed), seed)
}

/// The sum of four uniform numbers, scaled to variance 1.
pub fn normal(rng: &mut StdRng) -> f32 {
    (0..4).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() * 0.866
}

/// A source of random tensors that draws the same for the same seed.
pub struct Draw(StdRng);

impl Draw {
    pub fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    /// Uniform between `low` and `high`.
    pub fn uniform<T: Element>(&mut self, len: usize, low: f32, high: f32) -> Vec<T> {
        (0..len).map(|_| T::from_f32(self.0.random_range(low..high))).collect()
    }

    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.0.random_range(0..choices.len())]
    }

    pub fn flag(&mut self) -> bool {
        self.0.random()
    }

    pub fn isa(&mut self) -> Isa {
        self.one_of(&Isa::available().collect::<Vec<_>>())
    }

    /// An activation `(batch, len, d)` with one of the layouts that models produce: dense, a column slice of something
    /// wider, or time-contiguous.
    pub fn activation<T: Element>(&mut self, [batch, len, d]: [usize; 3]) -> Strided<T> {
        let (size, offset, strides) = match self.one_of(&[0, 1, 2]) {
            0 => (batch * len * d, 0, [len * d, d, 1]),
            1 => (batch * len * (2 * d + 3), d + 1, [len * (2 * d + 3), 2 * d + 3, 1]),
            _ => (batch * len * d, 0, [len * d, 1, len]),
        };
        Strided { data: self.uniform(size, -1.0, 1.0), offset, shape: [batch, len, d], strides }
    }
}
