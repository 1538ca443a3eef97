//! The operators on NVIDIA GPUs, through [cudarc](https://docs.rs/cudarc).
//!
//! Tensors are [`View`]s over [`CudaSlice`]s: the same argument types, and the same checks of them, as on the
//! CPU, with [`Cuda`] as their kind of memory. Every function takes the stream that it is to work on, enqueues its kernels
//! there and returns; none waits for the device. What a call needs beside its arguments is allocated and freed in the
//! order of the stream, and tables travel inside the launches, so that a call can be captured in a CUDA graph (with
//! cudarc's event tracking off, as any capture needs). An update whose slots lie on the device ([`Slots`]) reads them when it
//! runs: a graph of it is replayed with other slots. [`record`] makes such graphs without a capture.
//!
//! ```no_run
//! use selective_scan::{View, cuda, scan};
//!
//! fn main() -> selective_scan::Result<()> {
//!     let stream = cuda::context(0)?.default_stream();
//!     let (batch, length, d_inner, d_state) = (1, 512, 1536, 16);
//!     let u = stream.clone_htod(&vec![1.0f32; batch * length * d_inner])?;
//!     let delta = stream.clone_htod(&vec![0.1f32; batch * length * d_inner])?;
//!     let a = stream.clone_htod(&vec![-1.0f32; d_inner * d_state])?;
//!     let b = stream.clone_htod(&vec![1.0f32; batch * length * d_state])?;
//!     let mut out = stream.alloc_zeros(batch * length * d_inner)?;
//!
//!     let activation = [batch, length, d_inner];
//!     let b = View::on_device(&b, [batch, length, 1, d_state]);
//!     let inputs = scan::Inputs::new(
//!         View::on_device(&u, activation),
//!         View::on_device(&delta, activation),
//!         View::on_device(&a, [d_inner, d_state]),
//!         b,
//!         b, // C is B here
//!     );
//!     scan::cuda::forward(&stream, &inputs, scan::OutputMut::new(&mut out))
//! }
//! ```
//!
//! The kernels are compiled when this crate is (its `build.rs` says for which devices) and loaded once for each context,
//! which then lives as long as the process; so does a stream on which packed sequences or many slots were worked on, as the
//! last 16 of its tables are kept for the next call.

mod context;
#[cfg(feature = "candle-cuda")]
mod convert;
mod entries;
mod launch;
mod module;
pub(crate) mod params;
mod record;
mod segments;
mod sum;
mod tensor_map;
mod tensors;

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, sys};

use crate::view::dense_strides;
use crate::{DeviceSlots, Element, Error, Memory, Result, View, ViewMut};

pub(crate) use context::{Context, Kernel, Properties};
#[cfg(feature = "candle-cuda")]
pub(crate) use convert::convert_all;
pub(crate) use entries::{launches, place};
pub(crate) use launch::{
    Arguments, Device, GRID_COLUMNS, GRID_ROWS, blocks, grid_rows, is_vectorizable, storage, storage_mut, suffix,
};
pub(crate) use module::Module;
pub use record::{Graph, Recording, record};
pub(crate) use record::{Launch, Table};
pub(crate) use segments::packed_segments;
pub(crate) use sum::Sum;
#[cfg(feature = "lti")]
pub(crate) use tensor_map::COPIES_BOXES;
pub(crate) use tensors::{DeviceBuffers, DeviceViews, Strided, or_null};

/// The memory of an NVIDIA GPU: buffers are [`CudaSlice`]s.
#[derive(Debug, Clone, Copy)]
pub struct Cuda;

impl crate::view::sealed::Sealed for Cuda {}

impl Memory for Cuda {
    type Buffer<T: Element> = CudaSlice<T>;
    type Tokens = CudaSlice<u32>;

    type SlotBuffer = CudaSlice<i32>;

    fn len<T: Element>(buffer: &CudaSlice<T>) -> usize {
        buffer.len()
    }

    fn token_count(tokens: &CudaSlice<u32>) -> usize {
        tokens.len()
    }

    fn slot_count(buffer: &CudaSlice<i32>) -> usize {
        buffer.len()
    }
}

/// The slots of an update on a GPU: a list on the host, or one in its memory.
pub type Slots<'a> = crate::Slots<'a, DeviceSlots<'a, Cuda>>;

impl<'a> DeviceSlots<'a, Cuda> {
    /// All of a buffer. A part of it is `DeviceSlots { offset, len, ..DeviceSlots::new(&buffer) }`.
    pub fn new(data: &'a CudaSlice<i32>) -> Self {
        Self { data, offset: 0, len: data.len() }
    }
}

impl<'a> From<&'a CudaSlice<i32>> for Slots<'a> {
    fn from(data: &'a CudaSlice<i32>) -> Self {
        Self::Device(DeviceSlots::new(data))
    }
}

impl<'a, T: Element, const R: usize> View<'a, T, R, Cuda> {
    /// A dense row-major tensor over device memory.
    pub fn on_device(data: &'a CudaSlice<T>, shape: [usize; R]) -> Self {
        Self { data, offset: 0, shape, strides: dense_strides(shape) }
    }
}

impl<'a, T: Element, const R: usize> ViewMut<'a, T, R, Cuda> {
    /// A dense row-major tensor over device memory.
    pub fn on_device(data: &'a mut CudaSlice<T>, shape: [usize; R]) -> Self {
        Self { data, offset: 0, shape, strides: dense_strides(shape) }
    }
}

/// The context of GPU number `ordinal`: [`CudaContext::new`], but an error instead of a panic where there is no driver.
///
/// It also lets the device keep freed memory for the next allocation ([`keep_freed_memory`]).
pub fn context(ordinal: usize) -> Result<Arc<CudaContext>> {
    let names = if cfg!(windows) { ["nvcuda.dll", "nvcuda"] } else { ["libcuda.so.1", "libcuda.so"] };
    // SAFETY: loading the driver runs its initialisation, which is what cudarc is about to do; the handle is not used.
    if !names.iter().any(|name| unsafe { libloading::Library::new(*name) }.is_ok()) {
        return Err(Error::Cuda { action: "loading the CUDA driver".into(), message: format!("no {}", names[0]) });
    }
    let context =
        CudaContext::new(ordinal).map_err(|error| Error::cuda(format_args!("opening GPU {ordinal}"), error))?;
    keep_freed_memory(&context);
    Ok(context)
}

/// A device's stream, for unit tests, which say so where there is none.
#[cfg(test)]
pub(crate) fn stream_or_skip() -> Option<Arc<cudarc::driver::CudaStream>> {
    let context = context(0).inspect_err(|_| println!("there is no device: skipped"));
    Some(context.ok()?.default_stream())
}

/// Lets the device keep memory that is freed in the order of a stream, for the next allocation. By default all of it goes
/// back to the driver whenever the device is waited for, and a backward pass that then has to have 100 MB mapped again
/// waits longer for that than it computes. For contexts that [`context`] has not made.
pub fn keep_freed_memory(context: &CudaContext) {
    let mut pool = std::mem::MaybeUninit::uninit();
    let mut threshold = u64::MAX;
    // SAFETY: the first call writes the handle of the device's pool or fails, and the second reads a 64-bit number, as its
    // attribute is. A driver without pools refuses the first; then nothing is kept and nothing is lost.
    unsafe {
        if sys::cuDeviceGetDefaultMemPool(pool.as_mut_ptr(), context.cu_device()) == sys::CUresult::CUDA_SUCCESS {
            let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            let _ = sys::cuMemPoolSetAttribute(pool.assume_init(), attribute, (&raw mut threshold).cast());
        }
    }
}
