//! The loss on candle's tensors.

use std::cell::RefCell;

use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, InplaceOp1, Layout, Result, Shape, Storage, Tensor};

use super::{Inputs, InputsMut, Options, cpu};
use crate::candle::device::{Backend, Buffer, Cpu, Value, for_dtype, unsupported};
use crate::candle::graph::untracked;
use crate::{Error, Memory, View, ViewMut};

const NAME: &str = "cross-entropy";

/// A device that computes losses.
trait LossBackend: Backend {
    fn losses<T: Value>(&self, inputs: &Inputs<T, Self::Memory>, losses: &mut Buffer<Self, f32>) -> crate::Result<()>;

    fn losses_and_gradient<T: Value>(
        &self,
        inputs: InputsMut<T, Self::Memory>,
        losses: &mut Buffer<Self, f32>,
    ) -> crate::Result<()>;

    /// The elements of a storage of token ids.
    fn tokens(storage: &Self::Storage) -> Result<&<Self::Memory as Memory>::Tokens>;
}

impl LossBackend for Cpu {
    fn losses<T: Value>(&self, inputs: &Inputs<T>, losses: &mut [f32]) -> crate::Result<()> {
        cpu::losses(inputs, losses)
    }

    fn losses_and_gradient<T: Value>(&self, inputs: InputsMut<T>, losses: &mut [f32]) -> crate::Result<()> {
        cpu::losses_and_gradient(inputs, losses)
    }

    fn tokens(storage: &CpuStorage) -> Result<&[u32]> {
        storage.as_slice()
    }
}

#[cfg(feature = "candle-cuda")]
impl LossBackend for crate::candle::cuda::Gpu {
    fn losses<T: Value>(&self, inputs: &Inputs<T, Self::Memory>, losses: &mut Buffer<Self, f32>) -> crate::Result<()> {
        super::cuda::losses(&self.stream, inputs, losses)
    }

    fn losses_and_gradient<T: Value>(
        &self,
        inputs: InputsMut<T, Self::Memory>,
        losses: &mut Buffer<Self, f32>,
    ) -> crate::Result<()> {
        super::cuda::losses_and_gradient(&self.stream, inputs, losses)
    }

    fn tokens(storage: &CudaStorage) -> Result<&<Self::Memory as Memory>::Tokens> {
        storage.as_cuda_slice()
    }
}

/// The cross entropy of rows of logits; see [`loss`](crate::loss) for what it computes.
///
/// It is no operator of candle's graph: what it gives is not tracked. A loss in the graph is made of it with the product that
/// gives the logits, chunk by chunk, so that they are never there at once; `nn::train::linear_cross_entropy` does that.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use selective_scan::candle::CrossEntropy;
///
/// let logits = Tensor::new(&[[0f32, 0.0], [1.0, 3.0]], &Device::Cpu)?;
/// let targets = Tensor::new(&[1u32, u32::MAX], &Device::Cpu)?; // the second row is left out
/// let losses = CrossEntropy::new(&logits, &targets).losses_and_gradient(1.0)?;
/// assert_eq!(losses.to_vec1::<f32>()?, [2f32.ln(), 0.0]);
/// assert_eq!(logits.to_vec2::<f32>()?, [[0.5, -0.5], [0.0, 0.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct CrossEntropy<'a> {
    /// `(rows, vocab)` of `f32`, `f16` or `bf16`, the last dimension of stride 1.
    pub logits: &'a Tensor,
    /// `(rows)` of `u32`, each below `vocab` or [`IGNORED`](crate::loss::IGNORED). Nobody looks whether they are: any other
    /// gives NaN.
    pub targets: &'a Tensor,
    /// Terms beside the likelihood.
    pub options: Options,
}

impl<'a> CrossEntropy<'a> {
    /// The plain loss.
    pub fn new(logits: &'a Tensor, targets: &'a Tensor) -> Self {
        Self { logits, targets, options: Options::default() }
    }

    /// The loss of each row, `(rows)` of `f32`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names. What the device refuses.
    pub fn losses(&self) -> Result<Tensor> {
        self.logits.apply_op1_no_bwd(&Losses { targets: self.targets()?, options: self.options })
    }

    /// The loss of each row, `(rows)` of `f32`, whose gradient times `scale` takes the place of the logits, rounded once to
    /// their type.
    ///
    /// # Errors
    /// As [`losses`](Self::losses); nothing is written then. Logits that candle tracks, since they are overwritten.
    pub fn losses_and_gradient(&self, scale: f32) -> Result<Tensor> {
        if self.logits.track_op() {
            let expected = "a tensor outside of candle's graph, since it is overwritten";
            return Err(Error::argument("logits", expected, "one in it").into());
        }
        let losses = Losses { targets: self.targets()?, options: self.options };
        let running = InPlace { losses, scale, result: RefCell::new(None) };
        self.logits.inplace_op1(&running)?;
        match running.result.into_inner() {
            Some(losses) => Ok(losses),
            None => unreachable!("candle ran the operator"),
        }
    }

    /// The targets in a storage of their own.
    fn targets(&self) -> Result<Tensor> {
        let (location, found) = (self.logits.device().location(), self.targets.device().location());
        if location != found {
            let expected = format_args!("a tensor on {location:?}, as `logits`").to_string();
            return Err(Error::argument("targets", expected, format_args!("one on {found:?}")).into());
        }
        if self.targets.dtype() != DType::U32 {
            return Err(Error::argument("targets", "dtype U32", format_args!("{:?}", self.targets.dtype())).into());
        }
        if self.targets.rank() != 1 {
            return Err(Error::argument("targets", "shape (rows)", format_args!("{:?}", self.targets.dims())).into());
        }
        self.targets.detach().force_contiguous()
    }
}

/// The losses of a tensor of logits.
struct Losses {
    /// Dense, and all of its storage.
    targets: Tensor,
    options: Options,
}

impl Losses {
    fn run<B: LossBackend>(&self, backend: &B, storage: &B::Storage, layout: &Layout) -> Result<(Storage, Shape)> {
        let (shape, strides) = matrix(layout)?;
        let mut losses = backend.allocate::<f32>("logits", &shape[..1])?;
        self.with_targets::<B, _>(|targets| {
            for_dtype!("logits", B::dtype(storage), |T| {
                let data = B::elements::<T>(storage)?;
                let logits = View { data, offset: layout.start_offset(), shape, strides };
                let inputs = Inputs { options: self.options, ..Inputs::new(logits, targets) };
                Ok(backend.losses(&inputs, B::borrow(&mut losses))?)
            })
        })?;
        Ok((backend.store(losses), shape[0].into()))
    }

    fn with_targets<B: LossBackend, R>(
        &self,
        f: impl FnOnce(&<B::Memory as Memory>::Tokens) -> Result<R>,
    ) -> Result<R> {
        let (storage, _) = self.targets.storage_and_layout();
        // Their device has been compared.
        let storage =
            B::open(&storage).ok_or_else(|| Error::argument("targets", "a tensor beside `logits`", "another"));
        f(B::tokens(storage?)?)
    }
}

/// The shape and the strides of the logits.
fn matrix(layout: &Layout) -> Result<([usize; 2], [usize; 2])> {
    let rank = || Error::argument("logits", "shape (rows, vocab)", format_args!("{:?}", layout.dims()));
    Ok((layout.dims().try_into().map_err(|_| rank())?, layout.stride().try_into().map_err(|_| rank())?))
}

impl CustomOp1 for Losses {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.run(&Cpu, storage, layout)? {
            (Storage::Cpu(losses), shape) => Ok((losses, shape)),
            _ => Err(unsupported("logits", DType::F32).into()),
        }
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        match self.run(&crate::candle::cuda::Gpu::new(storage.device()), storage, layout)? {
            (Storage::Cuda(losses), shape) => Ok((losses, shape)),
            _ => Err(unsupported("logits", DType::F32).into()),
        }
    }

    #[cfg(not(feature = "candle-cuda"))]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        // candle may have been built for GPUs by another crate's wish.
        Err(crate::candle::device::elsewhere("logits", "an NVIDIA GPU").into())
    }
}

/// The same with the gradient in the logits' place.
struct InPlace {
    losses: Losses,
    scale: f32,
    result: RefCell<Option<Tensor>>,
}

impl InPlace {
    fn run<B: LossBackend>(&self, backend: &B, storage: &mut B::Storage, layout: &Layout) -> Result<()> {
        let (shape, strides) = matrix(layout)?;
        let mut losses = backend.allocate::<f32>("logits", &shape[..1])?;
        self.losses.with_targets::<B, _>(|targets| {
            for_dtype!("logits", B::dtype(storage), |T| {
                let data = B::elements_mut::<T>(storage)?;
                let logits = ViewMut { data, offset: layout.start_offset(), shape, strides };
                let inputs = InputsMut { options: self.losses.options, ..InputsMut::new(logits, targets, self.scale) };
                Ok(backend.losses_and_gradient(inputs, B::borrow(&mut losses))?)
            })
        })?;
        *self.result.borrow_mut() = Some(untracked(backend.store(losses), shape[0]));
        Ok(())
    }
}

impl InplaceOp1 for InPlace {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        self.run(&Cpu, storage, layout)
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        use candle_core::backend::BackendStorage;
        let backend = crate::candle::cuda::Gpu::new(storage.device());
        self.run(&backend, storage, layout)
    }

    #[cfg(not(feature = "candle-cuda"))]
    fn cuda_fwd(&self, _: &mut CudaStorage, _: &Layout) -> Result<()> {
        Err(crate::candle::device::elsewhere("logits", "an NVIDIA GPU").into())
    }
}
