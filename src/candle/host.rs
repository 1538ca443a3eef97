//! Small copies between the host and tensors, which wait for nothing.

use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Result, Storage, Tensor, WithDType};

use crate::Error;

/// Numbers that tensors hold and that are copied to and from them.
#[cfg(not(feature = "candle-cuda"))]
pub trait Number: WithDType {}
#[cfg(not(feature = "candle-cuda"))]
impl<T: WithDType> Number for T {}

/// Numbers that tensors hold and that are copied to and from them.
#[cfg(feature = "candle-cuda")]
pub trait Number:
    WithDType + candle_core::cuda::CudaDType + cudarc::driver::DeviceRepr + cudarc::driver::ValidAsZeroBits
{
}
#[cfg(feature = "candle-cuda")]
impl<T> Number for T where
    T: WithDType + candle_core::cuda::CudaDType + cudarc::driver::DeviceRepr + cudarc::driver::ValidAsZeroBits
{
}

/// Overwrites a tensor with numbers of the host, where it lies: every handle to it sees them, and a recorded launch reads them when it
/// is repeated. On a GPU the copy is enqueued, and the numbers may be dropped at once.
///
/// # Errors
/// Another number of elements than `tensor` has; a tensor of another type, with gaps, or that is a part of another; one that candle
/// tracks. Nothing is written then. What the device refuses.
pub fn copy_from_host<T: Number>(values: &[T], tensor: &Tensor) -> Result<()> {
    check("tensor", tensor, T::DTYPE)?;
    if values.len() != tensor.elem_count() {
        let expected = format_args!("{} elements, as `tensor`", tensor.elem_count()).to_string();
        return Err(Error::argument("values", expected, values.len()).into());
    }
    if tensor.track_op() {
        let expected = "one outside of candle's graph, since it is overwritten";
        return Err(Error::argument("tensor", expected, "one in it").into());
    }
    match values.len() {
        0 => Ok(()),
        _ => tensor.inplace_op1(&Overwrite(values)),
    }
}

/// Checks that a tensor is dense, the whole of its storage, and of a type.
fn check(name: &'static str, tensor: &Tensor, dtype: candle_core::DType) -> Result<()> {
    if tensor.dtype() != dtype {
        let got = format_args!("{:?}", tensor.dtype()).to_string();
        return Err(Error::argument(name, format_args!("dtype {dtype:?}"), got).into());
    }
    if !tensor.is_contiguous() || tensor.layout().start_offset() > 0 {
        let got = format_args!("{:?}", tensor.layout()).to_string();
        return Err(Error::argument(name, "a dense tensor, the whole of its storage", got).into());
    }
    Ok(())
}

/// Writes these numbers to the beginning of a storage.
struct Overwrite<'v, T>(&'v [T]);

impl<T: Number> InplaceOp1 for Overwrite<'_, T> {
    fn name(&self) -> &'static str {
        "copy-from-host"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        // candle has no generic way to write to a storage, but one to make it.
        match layout.shape().elem_count() == BackendLen::len(storage) {
            true => *storage = T::to_cpu_storage(self.0),
            false => return Err(Error::argument("tensor", "the whole of its storage", "a part").into()),
        }
        Ok(())
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        let stream = storage.device.cuda_stream();
        let to = storage.as_cuda_slice_mut::<T>()?;
        if to.len() != self.0.len() {
            return Err(Error::argument("tensor", "the whole of its storage", "a part").into());
        }
        stream.memcpy_htod(self.0, to).map_err(|error| Error::cuda("copying to the device", error).into())
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

/// The elements of a storage.
trait BackendLen {
    fn len(&self) -> usize;
}

impl BackendLen for CpuStorage {
    fn len(&self) -> usize {
        match self {
            Self::U8(data) => data.len(),
            Self::U32(data) => data.len(),
            Self::I16(data) => data.len(),
            Self::I32(data) => data.len(),
            Self::I64(data) => data.len(),
            Self::BF16(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::F32(data) => data.len(),
            Self::F64(data) => data.len(),
            _ => usize::MAX,
        }
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
    Pinned(cudarc::driver::PinnedHostSlice<T>),
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
                let stream = device.cuda_stream();
                // SAFETY: what is read of it is zeros, or what a copy has written. Not write-combined memory, which is slow to read.
                let allocated = unsafe { stream.context().alloc_pinned_with_flags::<T>(tensor.elem_count(), 0) };
                let mut values = allocated.map_err(|error| Error::cuda("allocating memory for copies", error))?;
                let zeroed = values.as_mut_slice().map_err(|error| Error::cuda("clearing memory for copies", error))?;
                zeroed.fill(T::zero());
                Values::Pinned(values)
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
        let (storage, _) = self.tensor.storage_and_layout();
        match (&*storage, &mut self.values) {
            (Storage::Cpu(storage), Values::Host(values)) => values.copy_from_slice(storage.as_slice::<T>()?),
            #[cfg(feature = "candle-cuda")]
            (Storage::Cuda(storage), Values::Pinned(values)) => {
                let (stream, from) = (storage.device.cuda_stream(), storage.as_cuda_slice::<T>()?);
                stream.memcpy_dtoh(from, values).map_err(|error| Error::cuda("copying from the device", error))?;
            }
            _ => return Err(Error::argument("tensor", "a tensor that stays where it was", "one elsewhere").into()),
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
            Values::Pinned(values) => {
                Ok(values.as_slice().map_err(|error| Error::cuda("waiting for a copy from the device", error))?)
            }
        }
    }
}
