//! Tensors whose elements lie as models leave them.

use std::ops::Range;

use selective_scan::{Element, View};

/// How the elements of an activation lie.
#[derive(Debug, Clone, Copy, Default)]
pub struct Layout {
    /// The steps of a channel are neighbours, not the channels of a step.
    pub time_contiguous: bool,
    /// It is a part of something wider.
    pub column_slice: bool,
}

/// A tensor `(batch, length, channels)` with its layout.
#[derive(Debug, Clone)]
pub struct Strided<T> {
    pub data: Vec<T>,
    pub offset: usize,
    pub shape: [usize; 3],
    pub strides: [usize; 3],
}

impl<T: Element> Strided<T> {
    /// The values that `value` gives, row after row, in this layout; NaN between them.
    pub fn new(shape: [usize; 3], layout: Layout, mut value: impl FnMut() -> f32) -> Self {
        let [batch, len, d] = shape;
        let (offset, strides) = match layout {
            Layout { time_contiguous: false, column_slice: false } => (0, [len * d, d, 1]),
            Layout { time_contiguous: true, column_slice: false } => (0, [d * len, 1, len]),
            // Columns 3.. of a matrix that is 5 wider.
            Layout { time_contiguous: false, column_slice: true } => (3, [len * (d + 5), d + 5, 1]),
            // Rows of a transposed matrix with room after each.
            Layout { time_contiguous: true, column_slice: true } => (7, [d * (len + 2), 1, len + 2]),
        };
        let span: usize = shape.iter().zip(strides).map(|(&n, stride)| n.saturating_sub(1) * stride).sum();
        // What lies between the elements must not be read: NaN would show.
        let data = vec![T::from_f32(f32::NAN); offset + span + 1];
        let mut tensor = Self { data, shape, offset, strides };
        for i in 0..batch * len * d {
            tensor.set([i / (len * d), i / d % len, i % d], value());
        }
        tensor
    }

    pub fn view(&self) -> View<'_, T, 3> {
        View::new(&self.data, self.shape).with_layout(self.offset, self.strides)
    }

    /// The same values dense and channels-last.
    pub fn dense(&self) -> Self {
        let [batch, len, d] = self.shape;
        let at = |i: usize| self.data[self.index([i / (len * d), i / d % len, i % d])];
        let data = (0..batch * len * d).map(at).collect();
        Self { data, shape: self.shape, offset: 0, strides: [len * d, d, 1] }
    }

    /// The stored elements.
    pub fn values(&self) -> &[T] {
        &self.data
    }

    /// Batch row `batch` as a tensor of its own.
    pub fn row(&self, batch: usize) -> Self {
        let offset = self.offset + batch * self.strides[0];
        Self { shape: [1, self.shape[1], self.shape[2]], offset, ..self.clone() }
    }

    /// Steps `range` as a tensor of its own.
    pub fn steps(&self, range: Range<usize>) -> Self {
        let offset = self.offset + range.start * self.strides[1];
        Self { shape: [self.shape[0], range.len(), self.shape[2]], offset, ..self.clone() }
    }

    pub fn set(&mut self, index: [usize; 3], value: f32) {
        *self.at_mut(index) = T::from_f32(value);
    }

    pub fn at_mut(&mut self, index: [usize; 3]) -> &mut T {
        let at = self.index(index);
        &mut self.data[at]
    }

    fn index(&self, index: [usize; 3]) -> usize {
        self.offset + index.iter().zip(self.strides).map(|(i, stride)| i * stride).sum::<usize>()
    }
}

/// Whether two 16-bit states of a pool that different blocks of a kernel work on may share a word. A simulated device that
/// keeps account of its memory by words takes that for a race.
pub fn shares_words<St>(offset: usize, strides: [usize; 3]) -> bool {
    size_of::<St>() == 2 && (offset % 2 == 1 || strides.iter().any(|&stride| stride != 1 && stride % 2 == 1))
}
