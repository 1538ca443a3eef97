//! candle's NVIDIA GPUs. Operators work on the stream that candle works on.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Storage};
use cudarc::driver::{CudaSlice, CudaStream};

use super::device::{Backend, Value};
use super::write_all::StorageMut;
use crate::cuda::{Cuda, Slots};
use crate::{DeviceSlots, Error, Result};

/// A GPU of candle's.
pub(crate) struct Gpu {
    device: CudaDevice,
    pub stream: Arc<CudaStream>,
}

impl Gpu {
    pub fn new(device: &CudaDevice) -> Self {
        Self { device: device.clone(), stream: device.cuda_stream() }
    }
}

/// The storage of a token, beside the tensors of `storage`.
pub(super) fn token(storage: &CudaStorage) -> candle_core::Result<CudaStorage> {
    let device = storage.device();
    Ok(CudaStorage::wrap_cuda_slice(device.alloc_zeros::<f32>(1)?, device.clone()))
}

/// A storage of no elements on the same device.
pub(super) fn empty(storage: &CudaStorage) -> candle_core::Result<CudaStorage> {
    let device = storage.device();
    let buffer = device.cuda_stream().null::<f32>().map_err(|error| candle_core::Error::Cuda(Box::new(error)))?;
    Ok(CudaStorage::wrap_cuda_slice(buffer, device.clone()))
}

impl Backend for Gpu {
    type Memory = Cuda;
    type Owned<T: Value> = CudaSlice<T>;
    type Storage = CudaStorage;

    fn open(storage: &Storage) -> Option<&CudaStorage> {
        match storage {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        }
    }

    fn open_mut(storage: StorageMut<'_>) -> Option<&mut CudaStorage> {
        match storage {
            StorageMut::Cuda(storage) => Some(storage),
            StorageMut::Cpu(_) => None,
        }
    }

    fn dtype(storage: &CudaStorage) -> DType {
        storage.dtype()
    }

    fn elements<T: Value>(storage: &CudaStorage) -> candle_core::Result<&CudaSlice<T>> {
        storage.as_cuda_slice()
    }

    fn elements_mut<T: Value>(storage: &mut CudaStorage) -> candle_core::Result<&mut CudaSlice<T>> {
        storage.as_cuda_slice_mut()
    }

    fn slots(storage: &CudaStorage, offset: usize, len: usize) -> candle_core::Result<Slots<'_>> {
        Ok(DeviceSlots { data: storage.as_cuda_slice()?, offset, len }.into())
    }

    fn allocate<T: Value>(&self, argument: &'static str, shape: &[usize]) -> Result<CudaSlice<T>> {
        let len = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        let Some(len) = len.filter(|len| len.checked_mul(size_of::<T>()).is_some()) else {
            return Err(Error::argument(argument, "a shape that fits in memory", format_args!("{shape:?}")));
        };
        let buffer = match len {
            // The driver allocates no empty buffers.
            0 => self.stream.null(),
            // SAFETY: every bit pattern is a `T`, and whoever asks for a buffer overwrites it whole.
            _ => unsafe { self.stream.alloc(len) },
        };
        buffer.map_err(|error| Error::cuda(format_args!("allocating {shape:?} elements for `{argument}`"), error))
    }

    fn borrow<T: Value>(buffer: &mut CudaSlice<T>) -> &mut CudaSlice<T> {
        buffer
    }

    fn store<T: Value>(&self, buffer: CudaSlice<T>) -> Storage {
        Storage::Cuda(CudaStorage::wrap_cuda_slice(buffer, self.device.clone()))
    }
}
