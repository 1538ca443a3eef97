//! Small copies between the host and tensors, which wait for nothing.

use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Result, Storage, Tensor, WithDType};

use crate::Error;

/// Numbers that tensors hold and that are copied to and from them.
#[cfg(not(feature = "candle-cuda"))]
pub trait Number: WithDType + bytemuck::Pod {}
#[cfg(not(feature = "candle-cuda"))]
impl<T: WithDType + bytemuck::Pod> Number for T {}

/// Numbers that tensors hold and that are copied to and from them.
#[cfg(feature = "candle-cuda")]
pub trait Number:
    WithDType + bytemuck::Pod + candle_core::cuda::CudaDType + cudarc::driver::DeviceRepr + cudarc::driver::ValidAsZeroBits
{
}
#[cfg(feature = "candle-cuda")]
impl<T> Number for T where
    T: WithDType
        + bytemuck::Pod
        + candle_core::cuda::CudaDType
        + cudarc::driver::DeviceRepr
        + cudarc::driver::ValidAsZeroBits
{
}

/// Overwrites a tensor with numbers of the host, where it lies: every handle to it sees them, and a recorded launch reads them when it
/// is repeated. On a GPU the copy is enqueued, and the numbers may be dropped at once.
///
/// # Errors
/// Another number of elements than `tensor` has; a tensor of another type, with gaps, or that is a part of another; one that candle
/// tracks. Nothing is written then. What the device refuses.
pub fn copy_from_host<T: Number>(values: &[T], tensor: &Tensor) -> Result<()> {
    if values.len() != tensor.elem_count() {
        let expected = format_args!("{} elements, as `tensor`", tensor.elem_count()).to_string();
        return Err(Error::argument("values", expected, values.len()).into());
    }
    copy_from_host_at(values, tensor, 0)
}

/// [`copy_from_host`] of some elements, in row-major order, from element `first` on.
///
/// # Errors
/// As there; more elements than there are from `first` on.
pub fn copy_from_host_at<T: Number>(values: &[T], tensor: &Tensor, first: usize) -> Result<()> {
    check("tensor", tensor, T::DTYPE)?;
    if first.checked_add(values.len()).is_none_or(|end| end > tensor.elem_count()) {
        let expected =
            format_args!("at most {} elements, as `tensor`, from {first} on", tensor.elem_count()).to_string();
        return Err(Error::argument("values", expected, values.len()).into());
    }
    if tensor.track_op() {
        let expected = "one outside of candle's graph, since it is overwritten";
        return Err(Error::argument("tensor", expected, "one in it").into());
    }
    match values.len() {
        0 => Ok(()),
        _ => tensor.inplace_op1(&Overwrite { values, first }),
    }
}

/// Checks that a tensor is dense, from the beginning of its storage on, and of a type.
fn check(name: &'static str, tensor: &Tensor, dtype: candle_core::DType) -> Result<()> {
    if tensor.dtype() != dtype {
        let got = format_args!("{:?}", tensor.dtype()).to_string();
        return Err(Error::argument(name, format_args!("dtype {dtype:?}"), got).into());
    }
    if !tensor.is_contiguous() || tensor.layout().start_offset() > 0 {
        let got = format_args!("{:?}", tensor.layout()).to_string();
        return Err(Error::argument(name, "a dense tensor that begins where its storage does", got).into());
    }
    Ok(())
}

/// Writes these numbers to a storage from element `first` on.
struct Overwrite<'v, T> {
    values: &'v [T],
    first: usize,
}

impl<T: Number> InplaceOp1 for Overwrite<'_, T> {
    fn name(&self) -> &'static str {
        "copy-from-host"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        // candle has no generic way to write to a storage. The type has been checked.
        let to: &mut [T] = match storage {
            CpuStorage::U8(data) => bytemuck::cast_slice_mut(data),
            CpuStorage::U32(data) => bytemuck::cast_slice_mut(data),
            CpuStorage::I16(data) => bytemuck::cast_slice_mut(data),
            CpuStorage::I32(data) => bytemuck::cast_slice_mut(data),
            CpuStorage::I64(data) => bytemuck::cast_slice_mut(data),
            CpuStorage::BF16(data) => bytemuck::cast_slice_mut(data),
            CpuStorage::F16(data) => bytemuck::cast_slice_mut(data),
            CpuStorage::F32(data) => bytemuck::cast_slice_mut(data),
            CpuStorage::F64(data) => bytemuck::cast_slice_mut(data),
            _ => return Err(Error::argument("tensor", "a tensor of plain numbers", "another").into()),
        };
        to[self.first..][..self.values.len()].copy_from_slice(self.values);
        Ok(())
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        let stream = storage.device.cuda_stream();
        let mut to = storage.as_cuda_slice_mut::<T>()?.slice_mut(self.first..self.first + self.values.len());
        stream.memcpy_htod(self.values, &mut to).map_err(|error| Error::cuda("copying to the device", error).into())
    }

    #[cfg(not(feature = "candle-cuda"))]
    fn cuda_fwd(&self, _: &mut CudaStorage, _: &Layout) -> Result<()> {
        // candle may have been built for GPUs by another crate's wish.
        Err(super::device::elsewhere("tensor", "an NVIDIA GPU").into())
    }

    fn metal_fwd(&self, _: &mut candle_core::MetalStorage, _: &Layout) -> Result<()> {
        Err(super::device::elsewhere("tensor", "a Metal device").into())
    }
}

/// Copies of a tensor on the host, one at a time, in memory that is kept for the next.
///
/// A copy is asked for after the work that writes the tensor has been enqueued. Work that overwrites it can be enqueued at once: on
/// a GPU the copy stands before that in the order of the stream, and only [`wait`](Self::wait) waits for it.
#[derive(Debug)]
pub struct HostCopy<T: Number> {
    tensor: Tensor,
    values: Values<T>,
}

#[derive(Debug)]
enum Values<T: Number> {
    Host(Vec<T>),
    #[cfg(feature = "candle-cuda")]
    Pinned(Pinned<T>),
}

/// Memory of the host that a device copies to by itself.
#[cfg(feature = "candle-cuda")]
#[derive(Debug)]
struct Pinned<T: Number> {
    values: cudarc::driver::PinnedHostSlice<T>,
    /// The end of the copy that was asked for last. (The slice has an event of its own, which cudarc records only where a program has
    /// several streams.)
    done: cudarc::driver::CudaEvent,
}

#[cfg(feature = "candle-cuda")]
impl<T: Number> Pinned<T> {
    fn new(stream: &cudarc::driver::CudaStream, len: usize) -> Result<Self> {
        let error = |error| Error::cuda("allocating memory for copies", error);
        // SAFETY: what is read of it is zeros, or what a copy has written. Not write-combined memory, which is slow to read.
        let mut values = unsafe { stream.context().alloc_pinned_with_flags::<T>(len, 0) }.map_err(error)?;
        values.as_mut_slice().map_err(error)?.fill(T::zero());
        Ok(Self { values, done: stream.context().new_event(None).map_err(error)? })
    }
}

#[cfg(feature = "candle-cuda")]
impl<T: Number> Drop for Pinned<T> {
    /// The memory is not given back while it is written. There is nobody to tell of an error.
    fn drop(&mut self) {
        let _ = self.done.synchronize();
    }
}

impl<T: Number> HostCopy<T> {
    /// Room for copies of `tensor`, of at least one element.
    ///
    /// # Errors
    /// A tensor of another type, with gaps, or that is a part of another. What the device refuses.
    pub fn new(tensor: &Tensor) -> Result<Self> {
        check("tensor", tensor, T::DTYPE)?;
        let values = match tensor.device() {
            candle_core::Device::Cpu => Values::Host(vec![T::zero(); tensor.elem_count()]),
            #[cfg(feature = "candle-cuda")]
            candle_core::Device::Cuda(device) => {
                Values::Pinned(Pinned::new(&device.cuda_stream(), tensor.elem_count())?)
            }
            device => return Err(super::device::elsewhere("tensor", format_args!("{:?}", device.location())).into()),
        };
        Ok(Self { tensor: tensor.clone(), values })
    }

    /// Asks for what the tensor holds once all is done that has been enqueued so far. The copy before is overwritten.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn start(&mut self) -> Result<()> {
        let elsewhere = || Error::argument("tensor", "a tensor that stays where it was", "one elsewhere");
        let (storage, _) = self.tensor.storage_and_layout();
        match (&*storage, &mut self.values) {
            (Storage::Cpu(storage), Values::Host(values)) => {
                // More than the tensor may lie in its storage.
                let from = storage.as_slice::<T>()?.get(..values.len()).ok_or_else(elsewhere)?;
                values.copy_from_slice(from);
            }
            #[cfg(feature = "candle-cuda")]
            (Storage::Cuda(storage), Values::Pinned(Pinned { values, done })) => {
                let stream = storage.device.cuda_stream();
                let from = storage.as_cuda_slice::<T>()?.try_slice(..values.len()).ok_or_else(elsewhere)?;
                let copied = stream.memcpy_dtoh(&from, values).and_then(|()| done.record(&stream));
                copied.map_err(|error| Error::cuda("copying from the device", error))?;
            }
            _ => return Err(elsewhere().into()),
        }
        Ok(())
    }

    /// Waits for the copy that was asked for last, and gives the numbers; zeros if none was.
    ///
    /// # Errors
    /// What the device has met since.
    pub fn wait(&self) -> Result<&[T]> {
        match &self.values {
            Values::Host(values) => Ok(values),
            #[cfg(feature = "candle-cuda")]
            Values::Pinned(Pinned { values, done }) => {
                let waited = done.synchronize().and_then(|()| values.as_slice());
                Ok(waited.map_err(|error| Error::cuda("waiting for a copy from the device", error))?)
            }
        }
    }
}
