//! The gradient on candle's tensors.

use std::ops::Range;

use candle_core::{CpuStorage, DType, Result, Tensor};

use super::cpu;
use crate::candle::device::{Backend, Buffer, Cpu, Value, for_dtype, on_device};
use crate::candle::graph;
use crate::candle::tensors::{Arguments, Reader, has_rows};
use crate::{Error, View};

/// A device that sums the gradients of embeddings.
trait EmbeddingBackend: Backend {
    /// The ids are a range of a storage of `u32`.
    fn backward<T: Value>(
        &self,
        ids: (&Self::Storage, Range<usize>),
        d_out: &View<T, 2, Self::Memory>,
        vocab_size: usize,
        d_table: &mut Buffer<Self, f32>,
    ) -> Result<()>;
}

impl EmbeddingBackend for Cpu {
    fn backward<T: Value>(
        &self,
        (ids, range): (&CpuStorage, Range<usize>),
        d_out: &View<T, 2>,
        vocab_size: usize,
        d_table: &mut [f32],
    ) -> Result<()> {
        Ok(cpu::backward(&ids.as_slice::<u32>()?[range], d_out, vocab_size, d_table)?)
    }
}

#[cfg(feature = "candle-cuda")]
impl EmbeddingBackend for crate::candle::cuda::Gpu {
    fn backward<T: Value>(
        &self,
        (ids, range): (&Self::Storage, Range<usize>),
        d_out: &View<T, 2, Self::Memory>,
        vocab_size: usize,
        d_table: &mut Buffer<Self, f32>,
    ) -> Result<()> {
        let ids = (ids.as_cuda_slice::<u32>()?, range);
        Ok(super::cuda::backward_of_range(&self.stream, ids, d_out, vocab_size, d_table)?)
    }
}

/// The gradient of an embedding matrix of `vocab_size` rows, `(vocab_size, width)` of `f32`, from that of the rows that
/// `ids` name; see [`embedding`](crate::embedding) for what it computes.
///
/// `ids` are `u32` of any shape, `d_out` has that shape and one dimension more, `(.., width)`, of `f32`, `f16` or `bf16`. The
/// result is not part of candle's graph, whatever these are.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let ids = Tensor::new(&[2u32, 0, 2], &Device::Cpu)?;
/// let d_out = Tensor::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu)?;
/// let gradient = selective_scan::candle::embedding_gradient(&ids, &d_out, 4)?;
/// assert_eq!(gradient.to_vec2::<f32>()?, [[3.0, 4.0], [0.0, 0.0], [6.0, 8.0], [0.0, 0.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// An argument that does not fit, which the message names. What the device refuses.
pub fn embedding_gradient(ids: &Tensor, d_out: &Tensor, vocab_size: usize) -> Result<Tensor> {
    if ids.dtype() != DType::U32 {
        return Err(Error::argument("ids", "dtype U32", format_args!("{:?}", ids.dtype())).into());
    }
    let expected = |shape: &[usize]| {
        Error::argument("d_out", format_args!("shape {shape:?} and a width"), format_args!("{:?}", d_out.dims()))
    };
    let Some((&width, _)) = d_out.dims().split_last().filter(|(_, rows)| *rows == ids.dims()) else {
        return Err(expected(ids.dims()).into());
    };
    // What is read are ids without distance between them, and rows at one.
    let ids = if ids.is_contiguous() { ids.clone() } else { ids.contiguous()? };
    let d_out = if has_rows(d_out) { d_out.clone() } else { d_out.contiguous()? };
    let mut arguments = Arguments::default();
    arguments.add("ids", &ids);
    arguments.add("d_out", &d_out);
    let locked = arguments.lock()?;
    on_device!("d_out", d_out, |backend| for_dtype!("d_out", d_out.dtype(), |T| {
        compute::<_, T>(backend, locked.reader(), &ids, &d_out, [vocab_size, width])
    }))
}

fn compute<B: EmbeddingBackend, T: Value>(
    backend: &B,
    reader: Reader,
    ids: &Tensor,
    d_out: &Tensor,
    shape: [usize; 2],
) -> Result<Tensor> {
    let (start, count) = (ids.layout().start_offset(), ids.elem_count());
    let rows = reader.rows::<B, T>("d_out", d_out, d_out)?;
    let mut d_table = backend.allocate::<f32>("vocab_size", &shape)?;
    let ids = (reader.storage::<B>("ids", ids)?, start..start + count);
    backend.backward(ids, &rows, shape[0], B::borrow(&mut d_table))?;
    Ok(graph::untracked(backend.store(d_table), &shape))
}
