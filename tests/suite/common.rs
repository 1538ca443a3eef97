//! Random tensors and the norm by which results are compared.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selective_scan::{DType, Element, Isa, View};

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

/// A tensor with its layout.
pub struct Strided<T> {
    pub data: Vec<T>,
    pub offset: usize,
    pub shape: [usize; 3],
    pub strides: [usize; 3],
}

impl<T: Element> Strided<T> {
    pub fn view(&self) -> View<'_, T, 3> {
        View::new(&self.data, self.shape).with_layout(self.offset, self.strides)
    }
}

/// Asserts that the norm of the error is at most `tolerance` times the norm of what is wanted, and for a half type twice
/// what rounding the wanted values to it gives besides.
#[track_caller]
pub fn assert_close<T: Element>(got: &[T], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: the number of elements");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(want).map(|(got, want)| f64::from(got.to_f32()) - want));
    let rounding = match T::DTYPE {
        DType::F32 => 0.0,
        _ => norm(&mut want.iter().map(|want| f64::from(T::from_f32(*want as f32).to_f32()) - want)),
    };
    let size = norm(&mut want.iter().copied());
    assert!(
        error <= tolerance * size + 2.0 * rounding,
        "{what}: error {error:e}, rounding {rounding:e}, norm {size:e}"
    );
}

/// The bits of a tensor, which unlike its values compare equal for NaN.
pub fn bits<T: Element>(values: &[T]) -> Vec<u32> {
    values.iter().map(|x| x.to_f32().to_bits()).collect()
}

/// Whether two 16-bit states of a pool that different blocks of a kernel work on may share a word. A simulated device that
/// keeps account of its memory by words takes that for a race.
pub fn shares_words<St>(offset: usize, strides: [usize; 3]) -> bool {
    size_of::<St>() == 2 && (offset % 2 == 1 || strides.iter().any(|&stride| stride != 1 && stride % 2 == 1))
}
