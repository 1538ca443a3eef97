//! Memory that a forward and a backward pass take beside their inputs, outputs and gradients.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use selective_scan::scan::{Gradients, OutputMut, cpu};

use crate::case::{Case, Flags, Shape, seeded};

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
#[cfg(feature = "nn")]
pub fn peak_of<R>(f: impl FnOnce() -> R) -> (usize, R) {
    let before = HELD_HERE.get();
    PEAK_HERE.set(before);
    let result = f();
    (PEAK_HERE.get().wrapping_sub(before), result)
}

#[test]
fn peak_of_a_long_sequence() {
    let shape = Shape { batch: 1, len: 16_384, d_inner: 1536, d_state: 16 };
    let case = Case::<f32>::new(&mut seeded().0, shape, Flags::mamba());
    let inputs = case.inputs();
    let mut out = vec![0.0f32; 16_384 * 1536];
    let mut state = vec![0.0; 1536 * 16];
    let mut gradients = Gradients::zeroed(&inputs).expect("valid");
    // u, delta, z and their gradients, out and its gradient; B, C and theirs; what is left is small.
    let given = 4 * (8 * 16_384 * 1536 + 4 * 16_384 * 16);

    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).start_handler(|_| COUNTED.set(true));
    let pool = pool.build().expect("a pool of threads");
    pool.install(|| {
        let mut checkpoints = vec![0.0; inputs.checkpoint_len().expect("valid")];
        let to =
            OutputMut { out: &mut out[..], final_state: Some(&mut state[..]), checkpoints: Some(&mut checkpoints[..]) };
        cpu::forward(&inputs, to).expect("valid");
        cpu::backward(&inputs, &checkpoints, case.d_outputs(), gradients.as_mut()).expect("valid");
    });
    let extra = PEAK.load(Relaxed) as f64 / given as f64;
    println!("{extra:.3} of the bytes of inputs, outputs and gradients");
    // The checkpoints are 1/64 · 16 states for 8 values of each step and channel, 3 %; the partial sums of B and C as
    // much; the buffers of a tile next to nothing. The requirement is 1.5.
    assert!(extra < 0.1, "{extra:.3} of the bytes of inputs, outputs and gradients");
}
