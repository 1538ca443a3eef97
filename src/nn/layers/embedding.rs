//! Token ids, and the rows of the embedding matrix that they name.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Device, Error, Layout, Result, Shape, Storage, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::Parameter;
use crate::candle::embedding_gradient;
use crate::loss::IGNORED;
use crate::nn::{argument, check_once, check_room};

/// Token ids that are all in the vocabulary.
pub(crate) struct Tokens(Arc<[u32]>);

impl Tokens {
    /// Reads ids of any integer type, and checks each: candle takes the greatest number of each type for "no token" and
    /// reads zeros there, and on a GPU any other that is too large ends the program's use of the device.
    ///
    /// Ids that lie on a GPU are copied here, for which everything before them on its stream is waited for.
    pub fn read(ids: &Tensor, vocab_size: usize) -> Result<Self> {
        Ok(Self(read_ids("ids", ids, vocab_size, None)?.into()))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The ids on a device, `(tokens)` of `u32`.
    pub fn on_device(&self, device: &Device) -> Result<Tensor> {
        Tensor::new(&*self.0, device)
    }

    /// Their embeddings, `(tokens, d_model)` in `f32`: rows of `table`, rounded to the type in which the model computes
    /// with them. Differentiable.
    pub fn embed(&self, table: &Parameter) -> Result<Tensor> {
        let stored = table.stored().contiguous()?;
        let on_device = match stored.device() {
            Device::Cpu => None,
            device => Some(self.on_device(device)?),
        };
        stored.apply_op1(Embedding { ids: self.0.clone(), on_device, dtype: table.dtype() })
    }
}

/// Reads what [`Tokens::read`] does from the argument `name`. Ids that are `ignored` may be any number, and are given as
/// [`IGNORED`].
pub(crate) fn read_ids(name: &'static str, ids: &Tensor, vocab_size: usize, ignored: Option<i64>) -> Result<Vec<u32>> {
    if ids.elem_count() == 0 {
        return Ok(Vec::new());
    }
    check_room(name, ids.dims(), DType::I64, &Device::Cpu)?;
    let host = match ids.device() {
        Device::Cpu => ids.clone(),
        // What is read is the whole storage: of a few ids from many, only those.
        _ => ids.force_contiguous()?.to_device(&Device::Cpu)?,
    };
    let (storage, _) = host.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        return Err(argument(name, "a tensor that can be read on the processor", "one that cannot"));
    };
    let allowed = Allowed { name, vocab_size, ignored };
    match storage {
        CpuStorage::U8(ids) => allowed.check(ids, &host),
        CpuStorage::U32(ids) => allowed.check(ids, &host),
        CpuStorage::I16(ids) => allowed.check(ids, &host),
        CpuStorage::I32(ids) => allowed.check(ids, &host),
        CpuStorage::I64(ids) => allowed.check(ids, &host),
        other => Err(argument(name, "integers", BackendStorage::dtype(other).as_str())),
    }
}

/// The ids that an argument may have.
struct Allowed {
    name: &'static str,
    vocab_size: usize,
    ignored: Option<i64>,
}

impl Allowed {
    /// Reads the elements of `tensor`, whose storage has `ids`.
    fn check<I: Copy + Into<i64>>(&self, ids: &[I], tensor: &Tensor) -> Result<Vec<u32>> {
        let read = |(position, index): (usize, usize)| {
            let id: i64 = ids[index].into();
            if self.ignored == Some(id) {
                return Ok(IGNORED);
            }
            match u32::try_from(id) {
                Ok(token) if (token as usize) < self.vocab_size => Ok(token),
                _ => {
                    let expected = format_args!("tokens from 0 to {}", self.vocab_size - 1).to_string();
                    let expected = match self.ignored {
                        Some(ignored) => format!("{expected}, or {ignored} for those that are left out"),
                        None => expected,
                    };
                    Err(argument(self.name, expected, format_args!("{id} at {:?}", place(position, tensor.dims()))))
                }
            }
        };
        tensor.strided_index().enumerate().map(read).collect()
    }
}

/// The indices of an element, from its place in row-major order.
fn place(mut position: usize, dims: &[usize]) -> Vec<usize> {
    let mut indices = vec![0; dims.len()];
    for (index, size) in indices.iter_mut().zip(dims).rev() {
        (*index, position) = (position % size, position / size);
    }
    indices
}

/// A matrix to those of its rows that `ids` name, in `f32`.
///
/// candle's own operator sums the gradient in the matrix's type: 4,096 times one token came to 9 % of the sum in bf16.
struct Embedding {
    ids: Arc<[u32]>,
    /// The same on the device, if that is no processor.
    on_device: Option<Tensor>,
    /// To which the rows are rounded.
    dtype: DType,
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, table: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, width) = layout.shape().dims2()?;
        let (start, end) =
            layout.contiguous_offsets().ok_or_else(|| Error::RequiresContiguous { op: "embedding" }.bt())?;
        let round = |x: f32| match self.dtype {
            DType::BF16 => bf16::from_f32(x).to_f32(),
            DType::F16 => f16::from_f32(x).to_f32(),
            _ => x,
        };
        let rows = match table {
            CpuStorage::F32(table) => self.gather(&table[start..end], width, round),
            CpuStorage::F64(table) => self.gather(&table[start..end], width, |x| round(x as f32)),
            CpuStorage::F16(table) => self.gather(&table[start..end], width, |x| round(x.to_f32())),
            CpuStorage::BF16(table) => self.gather(&table[start..end], width, |x| round(x.to_f32())),
            other => return Err(Error::UnsupportedDTypeForOp(BackendStorage::dtype(other), "embedding").bt()),
        };
        Ok((CpuStorage::F32(rows), (self.ids.len(), width).into()))
    }

    fn cuda_fwd(&self, table: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let shape = Shape::from((self.ids.len(), layout.shape().dims2()?.1));
        let ids = self.on_device.as_ref().ok_or_else(|| Error::Msg("embedding: the ids are elsewhere".into()))?;
        let (ids, ids_layout) = ids.storage_and_layout();
        let Storage::Cuda(ids) = &*ids else {
            return Err(Error::Msg("embedding: the ids are elsewhere".into()));
        };
        let dense = Layout::contiguous(&shape);
        let mut rows = table.index_select(ids, layout, ids_layout, 0)?;
        for dtype in [self.dtype, DType::F32] {
            if BackendStorage::dtype(&rows) != dtype {
                rows = rows.to_dtype(&dense, dtype)?;
            }
        }
        Ok((rows, shape))
    }

    fn bwd(&self, table: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        check_once(self.name(), grad)?;
        let ids = match &self.on_device {
            Some(ids) => ids.clone(),
            None => Tensor::new(&*self.ids, grad.device())?,
        };
        Ok(Some(embedding_gradient(&ids, grad, table.dim(0)?)?.to_dtype(table.dtype())?))
    }
}

impl Embedding {
    fn gather<T: Copy + Sync>(&self, table: &[T], width: usize, value: impl Fn(T) -> f32 + Sync) -> Vec<f32> {
        let mut rows = vec![0.0; self.ids.len() * width];
        rows.par_chunks_mut(width).zip(&self.ids[..]).with_min_len(64).for_each(|(row, &id)| {
            let from = &table[id as usize * width..][..width];
            for (to, &from) in row.iter_mut().zip(from) {
                *to = value(from);
            }
        });
        rows
    }
}
