//! Tensors as strided views over storage that the caller owns.

use std::convert::Infallible;
use std::fmt;

use crate::simd::{BLOCK, Row};
use crate::{Element, Error, Result};

/// A kind of memory that tensors live in, and the type of a buffer there.
///
/// The checks of every operator read shapes, strides and buffer lengths only, so one set of checks serves every kind. The
/// kinds are those of this crate: [`Host`] and, with the feature `cuda`, `cuda::Cuda`.
pub trait Memory: Copy + Send + Sync + std::fmt::Debug + sealed::Sealed + 'static {
    /// A buffer of `T` in this memory.
    type Buffer<T: Element>: ?Sized;

    /// A buffer of token ids, `u32`, in this memory.
    type Tokens: ?Sized;
    /// A buffer of slots in this memory, which no host function can look at; see [`DeviceSlots`](crate::DeviceSlots).
    type SlotBuffer: ?Sized;

    /// The number of elements that `buffer` holds.
    fn len<T: Element>(buffer: &Self::Buffer<T>) -> usize;

    /// The number of ids that `tokens` holds.
    fn token_count(tokens: &Self::Tokens) -> usize;
    /// The number of slots that `buffer` holds.
    fn slot_count(buffer: &Self::SlotBuffer) -> usize;
}

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// The memory of this process: buffers are slices.
#[derive(Debug, Clone, Copy)]
pub struct Host;

impl sealed::Sealed for Host {}

impl Memory for Host {
    type Buffer<T: Element> = [T];
    type Tokens = [u32];

    /// There is none: slots on the host are a slice.
    type SlotBuffer = Infallible;

    fn len<T: Element>(buffer: &[T]) -> usize {
        buffer.len()
    }

    fn token_count(tokens: &[u32]) -> usize {
        tokens.len()
    }

    fn slot_count(buffer: &Infallible) -> usize {
        match *buffer {}
    }
}

/// A read-only tensor of `R` dimensions: element `[i, j, …]` is `data[offset + i·strides[0] + j·strides[1] + …]`.
///
/// Making a view checks nothing; the operator that reads it checks that every element lies inside `data`. A stride of
/// zero repeats one element along that dimension.
pub struct View<'a, T: Element, const R: usize, M: Memory = Host> {
    /// The storage.
    pub data: &'a M::Buffer<T>,
    /// Where the first element lies, in elements.
    pub offset: usize,
    /// The number of elements along each dimension.
    pub shape: [usize; R],
    /// The distance between neighbours along each dimension, in elements.
    pub strides: [usize; R],
}

impl<T: Element, const R: usize, M: Memory> Clone for View<'_, T, R, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element, const R: usize, M: Memory> Copy for View<'_, T, R, M> {}

impl<'a, T: Element, const R: usize> View<'a, T, R> {
    /// A dense row-major tensor over a slice.
    pub fn new(data: &'a [T], shape: [usize; R]) -> Self {
        Self { data, offset: 0, shape, strides: dense_strides(shape) }
    }
}

impl<'a, T: Element, const R: usize, M: Memory> View<'a, T, R, M> {
    /// The same storage read with other strides, starting at `offset`.
    pub fn with_layout(self, offset: usize, strides: [usize; R]) -> Self {
        Self { offset, strides, ..self }
    }

    /// The same elements with their dimensions in another order: dimension `i` of the result is dimension `order[i]` of
    /// this view. Nothing is copied. `(batch, d_inner, length)`, as mamba_ssm has its activations, becomes
    /// `(batch, length, d_inner)` by `[0, 2, 1]`.
    ///
    /// # Errors
    /// An order that does not name every dimension once.
    pub fn permuted(self, order: [usize; R]) -> Result<Self> {
        if !(0..R).all(|dim| order.contains(&dim)) {
            let expected = format_args!("each dimension from 0 to {} once", R - 1).to_string();
            return Err(Error::argument("order", expected, format_args!("{order:?}")));
        }
        Ok(Self { shape: order.map(|dim| self.shape[dim]), strides: order.map(|dim| self.strides[dim]), ..self })
    }

    /// Checks the shape and that all elements lie inside the storage.
    pub(crate) fn check(&self, argument: &'static str, names: &str, shape: [usize; R]) -> Result<()> {
        check_shape(argument, names, shape, self.shape)?;
        check_extent(argument, self.offset, self.shape, self.strides, M::len(self.data))
    }
}

impl<T: Element, const R: usize> View<'_, T, R> {
    /// The element at `index`, widened.
    #[inline(always)]
    pub(crate) fn at(&self, index: [usize; R]) -> f32 {
        self.data[self.index(index)].to_f32()
    }

    /// Where the element at `index` lies in the storage.
    #[inline(always)]
    pub(crate) fn index(&self, index: [usize; R]) -> usize {
        let mut at = self.offset;
        for (i, stride) in index.into_iter().zip(self.strides) {
            at += i * stride;
        }
        at
    }

    /// The elements at `index` and, `step` apart in the storage, after it, as something to ask for ahead of time.
    pub(crate) fn ahead(&self, index: [usize; R], step: isize) -> Ahead {
        let size = size_of::<T>();
        Ahead {
            at: self.data.as_ptr().wrapping_add(self.index(index)).cast(),
            step: step.wrapping_mul(size.cast_signed()),
        }
    }

    /// Widens the `width` elements that follow `index` along the last dimension; zeros fill the rest of the row.
    #[inline(always)]
    pub(crate) fn read_row(&self, index: [usize; R], width: usize, row: &mut Row) {
        // A whole block of channels is the common case, and its length is known to the compiler.
        if width == BLOCK {
            self.widen_row(index, &mut row.0);
        } else {
            *row = Row::ZERO;
            self.widen_row(index, &mut row.0[..width]);
        }
    }

    /// Widens the `dst.len()` elements that follow `index` along the last dimension.
    #[inline(always)]
    pub(crate) fn widen_row(&self, index: [usize; R], dst: &mut [f32]) {
        let at = self.index(index);
        match self.strides[R - 1] {
            1 => T::widen(&self.data[at..][..dst.len()], dst),
            stride => {
                for (i, dst) in dst.iter_mut().enumerate() {
                    *dst = self.data[at + i * stride].to_f32();
                }
            }
        }
    }
}

/// A writable tensor; see [`View`]. No two indices may name the same element.
pub struct ViewMut<'a, T: Element, const R: usize, M: Memory = Host> {
    /// The storage.
    pub data: &'a mut M::Buffer<T>,
    /// Where the first element lies, in elements.
    pub offset: usize,
    /// The number of elements along each dimension.
    pub shape: [usize; R],
    /// The distance between neighbours along each dimension, in elements.
    pub strides: [usize; R],
}

impl<'a, T: Element, const R: usize> ViewMut<'a, T, R> {
    /// A dense row-major tensor over a slice.
    pub fn new(data: &'a mut [T], shape: [usize; R]) -> Self {
        Self { data, offset: 0, shape, strides: dense_strides(shape) }
    }
}

impl<'a, T: Element, const R: usize, M: Memory> ViewMut<'a, T, R, M> {
    /// The same storage with other strides, starting at `offset`.
    pub fn with_layout(self, offset: usize, strides: [usize; R]) -> Self {
        Self { offset, strides, ..self }
    }

    /// Checks the shape, that all elements lie inside the storage, and that no two share a place.
    pub(crate) fn check(&self, argument: &'static str, names: &str, shape: [usize; R]) -> Result<()> {
        check_shape(argument, names, shape, self.shape)?;
        check_extent(argument, self.offset, self.shape, self.strides, M::len(self.data))?;
        if self.shape.contains(&0) {
            return Ok(());
        }
        // Sorted by stride, each dimension must step over all that the smaller strides reach. (Sufficient, and true of
        // every slice, transpose and column range of a dense tensor.)
        let mut dims: [usize; R] = std::array::from_fn(|i| i);
        dims.sort_by_key(|&i| self.strides[i]);
        let mut reach = 0;
        for i in dims.into_iter().filter(|&i| self.shape[i] > 1) {
            if self.strides[i] <= reach {
                return Err(Error::argument(
                    argument,
                    "strides that give every element a place of its own",
                    format!("shape {:?} with strides {:?}", self.shape, self.strides),
                ));
            }
            reach += (self.shape[i] - 1) * self.strides[i];
        }
        Ok(())
    }
}

/// Places in memory, a fixed distance apart, that are going to be read.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    at: *const u8,
    /// In bytes.
    step: isize,
}

/// A mapped address to prefetch where there is nothing to prefetch: unmapped ones are slow.
static NOTHING: u8 = 0;

impl Ahead {
    /// An element, and others `step` elements apart from there on.
    #[inline(always)]
    pub fn of<T>(first: &T, step: usize) -> Self {
        Self { at: (&raw const *first).cast(), step: (step * size_of::<T>()).cast_signed() }
    }

    /// Nothing.
    pub const NONE: Self = Self { at: &raw const NOTHING, step: 0 };

    /// Asks the processor to fetch the `i`-th place.
    #[inline(always)]
    pub fn prefetch(&self, i: usize) {
        let at = self.at.wrapping_offset(self.step.wrapping_mul(i.cast_signed()));
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        // SAFETY: prefetching reads nothing, so any address will do, and every x86-64 processor has the instruction.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(at.cast());
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        let _ = at;
    }
}

/// A view's layout; the elements are left out, for they may lie on a device and be many.
macro_rules! debug_layout {
    ($view:ident) => {
        impl<T: Element, const R: usize, M: Memory> fmt::Debug for $view<'_, T, R, M> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($view))
                    .field("dtype", &T::DTYPE)
                    .field("offset", &self.offset)
                    .field("shape", &self.shape)
                    .field("strides", &self.strides)
                    .finish_non_exhaustive()
            }
        }
    };
}

debug_layout!(View);
debug_layout!(ViewMut);

/// Row-major strides. Saturates where the shape overflows; the operator's check then refuses the view.
pub(crate) fn dense_strides<const R: usize>(shape: [usize; R]) -> [usize; R] {
    let mut strides = [1usize; R];
    for i in (1..R).rev() {
        strides[i - 1] = strides[i].saturating_mul(shape[i]);
    }
    strides
}

fn check_shape<const R: usize>(
    argument: &'static str,
    names: &str,
    expected: [usize; R],
    got: [usize; R],
) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::argument(argument, format_args!("shape {names} = {expected:?}"), format_args!("{got:?}")))
}

fn check_extent<const R: usize>(
    argument: &'static str,
    offset: usize,
    shape: [usize; R],
    strides: [usize; R],
    len: usize,
) -> Result<()> {
    if shape.contains(&0) {
        return Ok(());
    }
    let last =
        shape.iter().zip(strides).try_fold(offset, |last, (&n, stride)| last.checked_add((n - 1).checked_mul(stride)?));
    match last {
        Some(last) if last < len => Ok(()),
        _ => Err(Error::argument(
            argument,
            format_args!("a storage that holds offset {offset}, shape {shape:?}, strides {strides:?}"),
            format_args!("one of {len} elements"),
        )),
    }
}

/// Checks that a dense output buffer has exactly the elements of `shape`.
pub(crate) fn check_len(argument: &'static str, names: &str, shape: &[usize], len: usize) -> Result<()> {
    // The inputs that these shapes come from may be views with zero strides, so the product can overflow.
    let expected = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
    if expected == Some(len) {
        return Ok(());
    }
    Err(Error::argument(argument, format_args!("{names} = {shape:?} elements"), format_args!("{len} elements")))
}
