//! From checked arguments to launches.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::sys::CUfunction_attribute;
use cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, PushKernelArg, SyncOnDrop,
};

use super::params::{self, UPLOAD_VALUES};
use super::record::{begin_call, is_recording, note_written, record_launch};
use super::{Context, Cuda, Kernel, Module, Properties, Strided};
use crate::{DType, Element, Error, Result, View, ViewMut};

/// The device of a stream.
pub(crate) struct Device<'a> {
    pub stream: &'a Arc<CudaStream>,
    pub context: &'static Context,
}

impl<'a> Device<'a> {
    pub fn new(stream: &'a Arc<CudaStream>) -> Result<Self> {
        Ok(Self { stream, context: Context::of(stream.context())? })
    }

    pub fn properties(&self) -> Properties {
        self.context.properties
    }

    /// Whether a kernel was compiled for such a compute capability, as the driver numbers them, or a later one: what was compiled for
    /// an older device, and only translated for this one, does nothing that the older one could not.
    pub fn is_compiled_for(&self, kernel: &Kernel, capability: i32) -> Result<bool> {
        is_compiled_for(&self.context.function(kernel)?, kernel, capability)
    }

    /// Memory whose contents a kernel on this stream will write; freed in the order of the stream when it is dropped.
    pub fn workspace<T: DeviceRepr>(&self, what: &str, len: usize) -> Result<CudaSlice<T>> {
        // There is no allocation of nothing.
        if len > 0 && is_recording() {
            let action = format!("recording a call that allocates {len} elements for {what}");
            return Err(Error::Cuda { action, message: "they would be freed before they are used".into() });
        }
        let allocated = match len {
            0 => self.stream.null(),
            // SAFETY: T is plain data, and every kernel that reads a workspace runs after one that has written it.
            _ => unsafe { self.stream.alloc(len) },
        };
        allocated.map_err(|error| Error::cuda(format_args!("allocating {len} elements for {what}"), error))
    }

    /// Where a workspace lies. Its uses are all on this stream, and need no recording.
    pub fn address<T>(&self, workspace: &CudaSlice<T>) -> u64 {
        workspace.device_ptr(self.stream).0
    }

    /// A table in device memory, for one call.
    pub(super) fn upload(&self, what: &str, numbers: &[u64]) -> Result<CudaSlice<u64>> {
        let table = self.workspace(what, numbers.len())?;
        let kernel = Kernel::new(Module::UPLOAD, ["upload"]);
        let address = self.address(&table);
        for (i, part) in numbers.chunks(UPLOAD_VALUES).enumerate() {
            let mut params = params::Upload::zeroed_boxed();
            params.to = address + (i * UPLOAD_VALUES * size_of::<u64>()) as u64;
            params.count = part.len() as u64;
            params.values[..part.len()].copy_from_slice(part);
            // SAFETY: the kernel writes `count` values from `to` on, which lie in the table.
            unsafe { self.launch(&kernel, [1, 1], 128, 0, &*params) }?;
        }
        Ok(table)
    }

    /// Enqueues a kernel on `grid` blocks of `threads` threads, with `shared` bytes of dynamic shared memory each.
    ///
    /// # Safety
    /// `params` must be what the kernel takes, and all that it then reads and writes must be valid for that.
    pub unsafe fn launch<P: Pod>(
        &self,
        kernel: &Kernel,
        grid: [usize; 2],
        threads: usize,
        shared: usize,
        params: &P,
    ) -> Result<()> {
        // SAFETY: as the caller promises; nothing is read early.
        unsafe { self.launch_by(kernel, grid, threads, shared, params, None) }
    }

    /// [`launch`](Self::launch) of a kernel that waits by itself for those before it, as `kernels/common/launch.cuh` says. Where it
    /// is recorded it begins before they have ended, if none of earlier calls writes what lies in `early`.
    ///
    /// # Safety
    /// As [`launch`](Self::launch). What the kernel reads before it waits must lie in `early`, and no other launch of the same call
    /// may write it.
    pub unsafe fn launch_overlapping<P: Pod>(
        &self,
        kernel: &Kernel,
        grid: [usize; 2],
        threads: usize,
        shared: usize,
        params: &P,
        early: &[Range<u64>],
    ) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.launch_by(kernel, grid, threads, shared, params, Some(early)) }
    }

    /// # Safety
    /// As [`launch_overlapping`](Self::launch_overlapping), and as [`launch`](Self::launch) where nothing is read early.
    unsafe fn launch_by<P: Pod>(
        &self,
        kernel: &Kernel,
        grid: [usize; 2],
        threads: usize,
        shared: usize,
        params: &P,
        early: Option<&[Range<u64>]>,
    ) -> Result<()> {
        /// Any plain data can be a kernel's argument.
        #[repr(transparent)]
        struct Argument<P>(P);
        // SAFETY: P is Pod, so it can be copied byte by byte.
        unsafe impl<P: Pod> DeviceRepr for Argument<P> {}

        let function = self.context.function(kernel)?;
        if record_launch(&function, kernel, grid, threads, shared, params, early)? {
            return Ok(());
        }
        let argument = Argument(*params);
        let config = LaunchConfig {
            grid_dim: (grid[0] as u32, grid[1] as u32, 1),
            block_dim: (threads as u32, 1, 1),
            shared_mem_bytes: shared as u32,
        };
        // SAFETY: as the caller promises.
        unsafe { self.stream.launch_builder(&function).arg(&argument).launch(config) }
            .map_err(|error| Error::cuda(format_args!("launching {kernel}"), error))?;
        Ok(())
    }
}

/// The device memory that a call's kernels read and write. Streams wait for each other's use of a buffer when its address
/// is asked for, and the use is recorded when this is dropped, after the launches.
pub(crate) struct Arguments<'a> {
    stream: &'a Arc<CudaStream>,
    uses: Vec<SyncOnDrop<'a>>,
}

impl<'a> Arguments<'a> {
    pub fn new(stream: &'a Arc<CudaStream>) -> Self {
        begin_call();
        Self { stream, uses: Vec::new() }
    }

    fn check<T>(&self, argument: &'static str, slice: &CudaSlice<T>) -> Result<()> {
        if Arc::ptr_eq(slice.context(), self.stream.context()) {
            return Ok(());
        }
        let (ours, theirs) = (self.stream.context().ordinal(), slice.ordinal());
        let (expected, got) = match ours == theirs {
            true => (format!("memory of the stream's context on GPU {ours}"), "memory of another context".to_string()),
            false => (format!("memory of GPU {ours}, the stream's"), format!("memory of GPU {theirs}")),
        };
        Err(Error::argument(argument, expected, got))
    }

    /// The address of a buffer's element `offset`, to be read.
    pub fn read<T>(&mut self, argument: &'static str, slice: &'a CudaSlice<T>, offset: usize) -> Result<u64> {
        self.check(argument, slice)?;
        let (address, used) = slice.device_ptr(self.stream);
        self.uses.push(used);
        // An empty buffer is at no address, and a view of no elements may start anywhere.
        Ok(if slice.is_empty() { address } else { address.wrapping_add((offset * size_of::<T>()) as u64) })
    }

    /// The address of a buffer of token ids, to be read.
    pub fn tokens(&mut self, argument: &'static str, tokens: &'a CudaSlice<u32>) -> Result<u64> {
        self.check(argument, tokens)?;
        let (address, used) = tokens.device_ptr(self.stream);
        self.uses.push(used);
        Ok(address)
    }

    /// The address of a buffer to be written.
    pub fn write<T>(&mut self, argument: &'static str, slice: &'a mut CudaSlice<T>) -> Result<u64> {
        self.write_from(argument, slice, 0)
    }

    /// The address of a buffer's element `offset`, from which on it is to be written.
    pub fn write_from<T>(&mut self, argument: &'static str, slice: &'a mut CudaSlice<T>, offset: usize) -> Result<u64> {
        self.check(argument, slice)?;
        let bytes = (slice.len() * size_of::<T>()) as u64;
        let (address, used) = slice.device_ptr_mut(self.stream);
        self.uses.push(used);
        if is_recording() {
            note_written(address..address + bytes);
        }
        Ok(address.wrapping_add((offset * size_of::<T>()) as u64))
    }

    /// [`Arguments::write`] of a buffer that may be absent, which gives a null.
    pub fn write_optional<T: Element>(
        &mut self,
        argument: &'static str,
        slice: Option<&'a mut CudaSlice<T>>,
    ) -> Result<u64> {
        slice.map_or(Ok(0), |slice| self.write(argument, slice))
    }

    /// A view, to be read.
    pub fn view<T: Element, const R: usize>(
        &mut self,
        argument: &'static str,
        view: &View<'a, T, R, Cuda>,
    ) -> Result<Strided<R>> {
        let data = self.read(argument, view.data, view.offset)?;
        Ok(Strided { data, strides: view.strides.map(|stride| stride as i64) })
    }

    /// [`Arguments::view`] of a view that may be absent.
    pub fn optional_view<T: Element, const R: usize>(
        &mut self,
        argument: &'static str,
        view: &Option<View<'a, T, R, Cuda>>,
    ) -> Result<Option<Strided<R>>> {
        view.as_ref().map(|view| self.view(argument, view)).transpose()
    }
}

/// Where the storage of a view lies whose first element is at `data`: all that the view may reach.
pub(crate) fn storage<T: Element, const R: usize>(view: &View<T, R, Cuda>, data: u64) -> Range<u64> {
    let start = data.wrapping_sub((view.offset * size_of::<T>()) as u64);
    start..start.wrapping_add((view.data.len() * size_of::<T>()) as u64)
}

/// [`storage`] of a view that is written, once it is known where its first element is.
pub(crate) fn storage_mut<T: Element, const R: usize>(
    view: &ViewMut<T, R, Cuda>,
) -> impl Fn(u64) -> Range<u64> + use<T, R> {
    let (before, len) = ((view.offset * size_of::<T>()) as u64, (view.data.len() * size_of::<T>()) as u64);
    move |data| data.wrapping_sub(before)..data.wrapping_sub(before).wrapping_add(len)
}

/// See [`Device::is_compiled_for`].
pub(super) fn is_compiled_for(function: &CudaFunction, kernel: &Kernel, capability: i32) -> Result<bool> {
    let compiled_for = function.get_attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION);
    Ok(compiled_for.map_err(|error| Error::cuda(format_args!("asking what {kernel} is for"), error))? >= capability)
}

/// The blocks that cover `items`, `per_block` each.
pub(crate) fn blocks(items: usize, per_block: usize) -> usize {
    items.div_ceil(per_block)
}

/// The most blocks along each axis of a grid. Kernels loop where these are not enough.
pub(crate) const GRID_COLUMNS: usize = i32::MAX as usize;
pub(crate) const GRID_ROWS: usize = 65_535;

/// The rows of a grid of `columns` columns in which `steps` steps of work, for each column, are looped over: as few as give
/// the device `room` blocks, each with as many steps as any other.
pub(crate) fn grid_rows(columns: usize, steps: usize, room: usize) -> usize {
    let rounds = steps.div_ceil(room.div_ceil(columns).clamp(1, GRID_ROWS)).max(1);
    steps.div_ceil(rounds).clamp(1, GRID_ROWS)
}

/// How the instances of a kernel for an element type are named.
pub(crate) fn suffix(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::Bf16 => "bf16",
    }
}

/// True if base and strides allow aligned vector accesses of `count` elements of type `T`; a null (absent) tensor qualifies.
pub(crate) fn is_vectorizable<T>(address: u64, strides: &[i64], count: usize) -> bool {
    address.is_multiple_of((count * size_of::<T>()) as u64) && strides.iter().all(|stride| stride % count as i64 == 0)
}
