//! The operators on candle's NVIDIA GPUs, on the stream that candle works on.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Storage};
use cudarc::driver::{CudaSlice, CudaStream};

use super::device::{Backend, Value};
use crate::cuda::Cuda;
use crate::{Error, Result, View, ViewMut, conv, scan, state_update};

/// A GPU of candle's.
pub(super) struct Gpu {
    device: CudaDevice,
    stream: Arc<CudaStream>,
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

    fn dtype(storage: &CudaStorage) -> DType {
        storage.dtype()
    }

    fn elements<T: Value>(storage: &CudaStorage) -> candle_core::Result<&CudaSlice<T>> {
        storage.as_cuda_slice()
    }

    fn elements_mut<T: Value>(storage: &mut CudaStorage) -> candle_core::Result<&mut CudaSlice<T>> {
        storage.as_cuda_slice_mut()
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

    fn storage_of<T: Value>(&self, buffer: CudaSlice<T>) -> Storage {
        Storage::Cuda(CudaStorage::wrap_cuda_slice(buffer, self.device.clone()))
    }

    fn scan_forward<T: Value>(&self, inputs: &scan::Inputs<T, Cuda>, outputs: scan::OutputMut<T, Cuda>) -> Result<()> {
        scan::cuda::forward(&self.stream, inputs, outputs)
    }

    fn scan_backward<T: Value>(
        &self,
        inputs: &scan::Inputs<T, Cuda>,
        checkpoints: &CudaSlice<f32>,
        d_outputs: scan::OutputGradients<T, Cuda>,
        gradients: scan::GradientsMut<T, Cuda>,
    ) -> Result<()> {
        scan::cuda::backward(&self.stream, inputs, checkpoints, d_outputs, gradients)
    }

    fn conv_forward<T: Value>(&self, inputs: &conv::Inputs<T, Cuda>, outputs: conv::OutputMut<T, Cuda>) -> Result<()> {
        conv::cuda::forward(&self.stream, inputs, outputs)
    }

    fn conv_backward<T: Value>(
        &self,
        inputs: &conv::Inputs<T, Cuda>,
        d_outputs: conv::OutputGradients<T, Cuda>,
        gradients: conv::GradientsMut<T, Cuda>,
    ) -> Result<()> {
        conv::cuda::backward(&self.stream, inputs, d_outputs, gradients)
    }

    fn conv_update<T: Value, St: Value>(
        &self,
        inputs: &conv::UpdateInputs<T, Cuda>,
        outputs: conv::UpdateMut<T, St, Cuda>,
    ) -> Result<()> {
        conv::cuda::update(&self.stream, inputs, outputs)
    }

    fn state_update<T: Value, St: Value>(
        &self,
        inputs: &state_update::Inputs<T, Cuda>,
        outputs: state_update::UpdateMut<T, St, Cuda>,
    ) -> Result<()> {
        state_update::cuda::update(&self.stream, inputs, outputs)
    }

    fn rollback<St: Value>(
        &self,
        state: ViewMut<St, 3, Cuda>,
        token_states: View<St, 4, Cuda>,
        slots: Option<&[i32]>,
        accepted: &[usize],
    ) -> Result<()> {
        state_update::cuda::rollback(&self.stream, state, token_states, slots, accepted)
    }
}
