//! A GPU or a simulated one, whatever the CUDA driver's library that is found leads to, and copies of tensors there.

use std::any::Any;
use std::cell::Cell;
use std::sync::{Arc, OnceLock};

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr};
use selective_scan::cuda::{self, Cuda, Slots};
use selective_scan::{DeviceSlots, Element, Projection, View};

thread_local! {
    /// Another stream that this thread is to work on.
    static STREAM: Cell<Option<Arc<CudaStream>>> = const { Cell::new(None) };

    /// Whether this thread puts lists of slots on the device.
    static SLOTS_ON_DEVICE: Cell<bool> = const { Cell::new(false) };
}

/// The stream that tests work on, or nothing (said once) where there is no device.
pub fn stream() -> Option<Arc<CudaStream>> {
    static DEFAULT: OnceLock<Option<Arc<CudaStream>>> = OnceLock::new();
    let open = || match cuda::context(0) {
        Ok(context) => Some(context.default_stream()),
        Err(error) => {
            eprintln!("no GPU, and none simulated ({error}): the tests that need one are skipped");
            None
        }
    };
    let own = STREAM.take();
    STREAM.set(own.clone());
    own.or_else(|| DEFAULT.get_or_init(open).clone())
}

/// Lets this thread work on another stream from here on.
pub fn work_on(stream: Arc<CudaStream>) {
    STREAM.set(Some(stream));
}

/// Runs a test whose lists of slots lie on the device.
pub fn with_slots_on_device(test: impl FnOnce()) {
    SLOTS_ON_DEVICE.set(true);
    test();
    SLOTS_ON_DEVICE.set(false);
}

/// Whether the device is simulated, which takes a second for what a GPU does in a microsecond.
pub fn is_simulated(stream: &CudaStream) -> bool {
    stream.context().name().is_ok_and(|name| name.to_lowercase().contains("sim"))
}

/// Device copies of host tensors, for as long as the arena lives.
pub struct Copies {
    stream: Arc<CudaStream>,
    slices: typed_arena::Arena<Box<dyn Any>>,
}

impl Copies {
    pub fn new(stream: &Arc<CudaStream>) -> Self {
        Self { stream: stream.clone(), slices: typed_arena::Arena::new() }
    }

    /// The stream on which they are made.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub fn slice<T: DeviceRepr + 'static>(&self, data: &[T]) -> &mut CudaSlice<T> {
        let slice = match data.len() {
            0 => self.stream.null(),
            _ => self.stream.clone_htod(data),
        };
        let kept = self.slices.alloc(Box::new(slice.expect("the device has room")));
        kept.downcast_mut().expect("it is what was put there")
    }

    pub fn view<T: Element, const R: usize>(&self, view: &View<T, R>) -> View<'_, T, R, Cuda> {
        let View { data, offset, shape, strides } = *view;
        View { data: self.slice(data), offset, shape, strides }
    }

    pub fn projection<T: Element>(&self, projection: &Projection<T>) -> Projection<'_, T, Cuda> {
        match projection {
            Projection::Varying(view) => Projection::Varying(self.view(view)),
            Projection::Constant(view) => Projection::Constant(self.view(view)),
        }
    }

    /// Slots as they are given or, within [`with_slots_on_device`], on the device: in the middle of a buffer in which there is
    /// something else before and after.
    pub fn slots<'a>(&'a self, slots: selective_scan::Slots<'a>) -> Slots<'a> {
        match slots {
            selective_scan::Slots::Host(list) if SLOTS_ON_DEVICE.get() => {
                let data = self.slice(&[&[0, 1], list, &[2]].concat());
                DeviceSlots { data, offset: 2, len: list.len() }.into()
            }
            selective_scan::Slots::Host(list) => list.into(),
            _ => Slots::Rows,
        }
    }

    /// Copies back what a kernel has written.
    pub fn download<T: Element>(&self, from: &CudaSlice<T>, to: &mut [T]) {
        assert_eq!(from.len(), to.len());
        if !to.is_empty() {
            self.stream.memcpy_dtoh(from, to).expect("the kernels that wrote it succeeded");
        }
    }

    /// A buffer of `len` elements that hold something else than what is going to be written.
    pub fn poisoned<T: Element>(&self, len: usize) -> &mut CudaSlice<T> {
        self.slice(&vec![T::from_f32(f32::NAN); len])
    }
}
