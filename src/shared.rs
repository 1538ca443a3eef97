//! Writing to disjoint parts of one slice from several threads.

use std::marker::PhantomData;
use std::ops::Range;

/// A slice whose parts are handed out to different threads.
///
/// The columns of a channels-last tensor interleave in memory, so no safe split of the slice gives each task its own.
pub(crate) struct Shared<'a, T> {
    data: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a mutable slice that is only ever used in disjoint parts (the contract of `part`), so sharing it is
// sending each thread its parts, which `T: Send` allows.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as for a mutable slice.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { data: slice.as_mut_ptr(), len: slice.len(), lifetime: PhantomData }
    }

    /// The elements of `range`. Panics if it does not lie in the slice.
    ///
    /// # Safety
    /// While the result lives, no other call may give out any of the same elements.
    #[allow(clippy::mut_from_ref, reason = "the caller keeps the parts disjoint")]
    #[inline(always)]
    pub unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part {range:?} of {}", self.len);
        // SAFETY: the range lies in the slice that `new` borrowed mutably for 'a, which outlives `self`, and the caller
        // promises that nobody else holds these elements.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }
}
