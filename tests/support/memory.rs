//! An allocator that counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

thread_local! {
    /// Whether what this thread allocates is counted. Other tests run beside this one.
    static COUNTED: Cell<bool> = const { Cell::new(false) };
    /// What this thread has allocated and not freed, counted always.
    static HELD_HERE: Cell<usize> = const { Cell::new(0) };
    /// The most that this has been since it was last set.
    static PEAK_HERE: Cell<usize> = const { Cell::new(0) };
}

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

struct Counting;

impl Counting {
    fn add(size: usize) {
        HELD_HERE.set(HELD_HERE.get().wrapping_add(size));
        // As a difference, which may be below zero: what another thread allocated is freed here too.
        if (HELD_HERE.get().wrapping_sub(PEAK_HERE.get()) as isize) > 0 {
            PEAK_HERE.set(HELD_HERE.get());
        }
        if COUNTED.get() {
            PEAK.fetch_max(HELD.fetch_add(size, Relaxed) + size, Relaxed);
        }
    }
}

// SAFETY: every call is handed to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::add(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::add(layout.size());
        // SAFETY: the caller keeps the contract of `alloc_zeroed`, which is that of `alloc`. (Without this method zeros
        // would be written where the system has pages of them.)
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD_HERE.set(HELD_HERE.get().wrapping_sub(layout.size()));
        if COUNTED.get() {
            HELD.fetch_sub(layout.size(), Relaxed);
        }
        // SAFETY: the caller keeps the contract of `dealloc`, and `at` came from `System`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The bytes that what `f` returns holds, all of which this thread must have allocated.
#[cfg(feature = "candle")]
pub fn held_by<R>(f: impl FnOnce() -> R) -> (usize, R) {
    let before = HELD_HERE.get();
    let result = f();
    (HELD_HERE.get().wrapping_sub(before), result)
}

/// The most bytes that `f` holds at a time, all of which this thread must allocate.
#[cfg(feature = "candle")]
pub fn peak_of<R>(f: impl FnOnce() -> R) -> (usize, R) {
    let before = HELD_HERE.get();
    PEAK_HERE.set(before);
    let result = f();
    (PEAK_HERE.get().wrapping_sub(before), result)
}

/// Has what this thread allocates from here on counted by [`peak_of_counted_threads`].
pub fn count_this_thread() {
    COUNTED.set(true);
}

/// The most bytes that the counted threads have held at a time, all together.
pub fn peak_of_counted_threads() -> usize {
    PEAK.load(Relaxed)
}
