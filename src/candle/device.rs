//! Where tensors lie: what the operators need of candle's devices, and the choice of one at run time.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Storage, WithDType};

use super::write_all::StorageMut;
use crate::arguments::zeroed;
use crate::{DeviceSlots, Element, Error, Host, Memory, Result, Slots};

/// An element type that both this crate and candle know.
#[cfg(not(feature = "candle-cuda"))]
pub(crate) trait Value: Element + WithDType {}
#[cfg(not(feature = "candle-cuda"))]
impl<T: Element + WithDType> Value for T {}

/// An element type that both this crate and candle know.
#[cfg(feature = "candle-cuda")]
pub(crate) trait Value: Element + WithDType + candle_core::cuda::CudaDType {}
#[cfg(feature = "candle-cuda")]
impl<T: Element + WithDType + candle_core::cuda::CudaDType> Value for T {}

/// A buffer in a device's memory.
pub(crate) type Buffer<B, T> = <<B as Backend>::Memory as Memory>::Buffer<T>;

/// The slots of an update beside views of a device's memory.
pub(crate) type SlotsOf<'a, B> = Slots<'a, DeviceSlots<'a, <B as Backend>::Memory>>;

/// A kind of device: what is asked of its memory. What runs there each operator adds by a trait of its own.
pub(crate) trait Backend: 'static {
    type Memory: Memory;
    /// A buffer that owns its memory.
    type Owned<T: Value>;
    /// candle's storage there.
    type Storage: 'static;

    /// The storage, if it lies on this kind of device.
    fn open(storage: &Storage) -> Option<&Self::Storage>;

    /// [`Backend::open`] of a storage that is to be written.
    fn open_mut(storage: StorageMut<'_>) -> Option<&mut Self::Storage>;

    fn dtype(storage: &Self::Storage) -> DType;

    /// The elements of a storage; an error if they are of another type.
    fn elements<T: Value>(storage: &Self::Storage) -> candle_core::Result<&Buffer<Self, T>>;

    /// The elements of a storage, to be written.
    fn elements_mut<T: Value>(storage: &mut Self::Storage) -> candle_core::Result<&mut Buffer<Self, T>>;

    /// The `len` slots of a storage of `i32` from `offset` on.
    fn slots(storage: &Self::Storage, offset: usize, len: usize) -> candle_core::Result<SlotsOf<'_, Self>>;

    /// A buffer of `shape` that is going to be overwritten whole. An error names `argument`, whose shape asks for it.
    fn allocate<T: Value>(&self, argument: &'static str, shape: &[usize]) -> Result<Self::Owned<T>>;

    fn borrow<T: Value>(buffer: &mut Self::Owned<T>) -> &mut Buffer<Self, T>;

    fn store<T: Value>(&self, buffer: Self::Owned<T>) -> Storage;
}

/// The processor.
pub(crate) struct Cpu;

impl Backend for Cpu {
    type Memory = Host;
    type Owned<T: Value> = Vec<T>;
    type Storage = CpuStorage;

    fn open(storage: &Storage) -> Option<&CpuStorage> {
        match storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        }
    }

    fn open_mut(storage: StorageMut<'_>) -> Option<&mut CpuStorage> {
        match storage {
            StorageMut::Cpu(storage) => Some(storage),
            #[cfg(feature = "candle-cuda")]
            StorageMut::Cuda(_) => None,
        }
    }

    fn dtype(storage: &CpuStorage) -> DType {
        BackendStorage::dtype(storage)
    }

    fn elements<T: Value>(storage: &CpuStorage) -> candle_core::Result<&[T]> {
        storage.as_slice()
    }

    fn elements_mut<T: Value>(storage: &mut CpuStorage) -> candle_core::Result<&mut [T]> {
        // candle has no generic way to write to a storage, but the type is known at run time.
        fn cast<T: Value, U: Value>(data: &mut [U]) -> Option<&mut [T]> {
            (<T as WithDType>::DTYPE == <U as WithDType>::DTYPE).then(|| bytemuck::cast_slice_mut(data))
        }
        let got = Self::dtype(storage);
        match storage {
            CpuStorage::F32(data) => cast(data),
            CpuStorage::F16(data) => cast(data),
            CpuStorage::BF16(data) => cast(data),
            _ => None,
        }
        .ok_or(candle_core::Error::UnexpectedDType {
            msg: "unexpected dtype",
            expected: <T as WithDType>::DTYPE,
            got,
        })
    }

    fn slots(storage: &CpuStorage, offset: usize, len: usize) -> candle_core::Result<Slots<'_>> {
        Ok(Slots::Host(&storage.as_slice()?[offset..][..len]))
    }

    fn allocate<T: Value>(&self, argument: &'static str, shape: &[usize]) -> Result<Vec<T>> {
        zeroed(argument, shape)
    }

    fn borrow<T: Value>(buffer: &mut Vec<T>) -> &mut [T] {
        buffer
    }

    fn store<T: Value>(&self, buffer: Vec<T>) -> Storage {
        Storage::Cpu(T::to_cpu_storage_owned(buffer))
    }
}

/// A type that is none of the operators'.
pub(crate) fn unsupported(argument: &'static str, dtype: DType) -> Error {
    Error::argument(argument, "dtype F32, F16 or BF16", format_args!("{dtype:?}"))
}

/// Calls a generic method for the element type that a tensor has.
macro_rules! for_dtype {
    ($argument:literal, $dtype:expr, |$T:ident| $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            dtype => Err($crate::candle::device::unsupported($argument, dtype).into()),
        }
    };
}

/// Calls a generic method on the device that a tensor lies on.
macro_rules! on_device {
    ($argument:literal, $tensor:expr, |$backend:ident| $body:expr) => {
        match $tensor.device() {
            candle_core::Device::Cpu => {
                let $backend = &$crate::candle::device::Cpu;
                $body
            }
            #[cfg(feature = "candle-cuda")]
            candle_core::Device::Cuda(device) => {
                let $backend = &$crate::candle::cuda::Gpu::new(device);
                $body
            }
            device => Err($crate::candle::device::elsewhere($argument, format_args!("{:?}", device.location())).into()),
        }
    };
}

pub(crate) use {for_dtype, on_device};

/// A device that the operators do not run on.
pub(crate) fn elsewhere(argument: &'static str, location: impl std::fmt::Display) -> Error {
    let expected = match cfg!(feature = "candle-cuda") {
        true => "the processor or an NVIDIA GPU",
        false => "the processor (or, with the feature `candle-cuda`, an NVIDIA GPU)",
    };
    Error::argument(argument, expected, location)
}
