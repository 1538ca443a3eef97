//! Attention of candle's operators, a block of scores at a time: on devices for which there is no code of our own.
//!
//! Everything is `f32`. Queries stand as `(kv_heads, group · steps, d_head)`, so that one product serves all heads.

use std::cell::OnceCell;

use candle_core::{D, DType, Device, Result, Tensor};

use super::check::Part;
use super::tensors::Sizes;

/// The steps of a block of queries, and of keys: a block of scores takes 2 MB for each head.
const QUERIES: usize = 256;
const KEYS: usize = 2048;

/// What is taken from the score of a hidden key, for each step that it is away from the last that is seen: more than any
/// score, and times a block's steps less than the largest `f32`.
const HIDDEN: f64 = 1e34;

/// A checked call.
pub(super) struct Blocks<'a> {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub sizes: Sizes,
    pub parts: Vec<Part>,
    pub scale: f32,
    pub device: &'a Device,
    /// See [`distances`](Self::distances).
    pub distances: OnceCell<Tensor>,
}

/// A block of queries and the keys that it sees.
#[derive(Clone, Copy)]
struct QueryBlock {
    part: Part,
    start: usize,
    steps: usize,
}

impl QueryBlock {
    fn all(part: Part) -> impl Iterator<Item = Self> {
        let len = part.queries.len;
        (0..len).step_by(QUERIES).map(move |start| Self { part, start, steps: QUERIES.min(len - start) })
    }

    /// The blocks of keys that it sees: the first key and the number of each.
    fn keys(self) -> impl Iterator<Item = (usize, usize)> {
        let seen = self.part.seen(self.start + self.steps - 1);
        (0..seen).step_by(KEYS).map(move |first| (first, KEYS.min(seen - first)))
    }
}

impl Blocks<'_> {
    /// `out`, of the type of the queries, and `lse`.
    pub fn forward(&self) -> Result<(Tensor, Tensor)> {
        let Sizes { batch, length, heads, d_head, .. } = self.sizes;
        let (mut outs, mut lses) = (Vec::new(), Vec::new());
        for block in self.parts.iter().flat_map(|&part| QueryBlock::all(part)) {
            let q = (self.queries(&self.q, block)? * f64::from(self.scale))?;
            let (kv_heads, rows, _) = q.dims3()?;
            let mut most = Tensor::full(f32::NEG_INFINITY, (kv_heads, rows, 1), self.device)?;
            let mut sum = Tensor::zeros((kv_heads, rows, 1), DType::F32, self.device)?;
            let mut out = q.zeros_like()?;
            for keys in block.keys() {
                let scores = self.scores(&q, block, keys)?;
                let top = most.maximum(&scores.max_keepdim(D::Minus1)?)?;
                let (weights, decay) = (scores.broadcast_sub(&top)?.exp()?, (most - &top)?.exp()?);
                sum = ((sum * &decay)? + weights.sum_keepdim(D::Minus1)?)?;
                out = (out.broadcast_mul(&decay)? + weights.matmul(&self.keys(&self.v, block.part, keys)?)?)?;
                most = top;
            }
            outs.push(self.steps(&out.broadcast_div(&sum)?, block)?);
            lses.push(self.steps(&(most + sum.log()?)?, block)?);
        }
        // Blocks follow each other as the steps of the batch do.
        let joined = |blocks: Vec<Tensor>, width: usize| match blocks.is_empty() {
            true => Tensor::zeros((batch, length, heads, width), DType::F32, self.device),
            false => Tensor::cat(&blocks, 0)?.reshape((batch, length, heads, width)),
        };
        Ok((joined(outs, d_head)?.to_dtype(self.q.dtype())?, joined(lses, 1)?.squeeze(3)?))
    }

    /// The gradients of queries, keys and values, of their type.
    pub fn backward(&self, out: &Tensor, lse: &Tensor, d_out: &Tensor) -> Result<[Tensor; 3]> {
        let scale = f64::from(self.scale);
        let lse = lse.unsqueeze(3)?;
        let mut d_qs = Vec::new();
        let [d_k, d_v] = [(); 2].map(|()| Tensor::zeros(self.k.shape(), DType::F32, self.device));
        let (d_k, d_v) = (d_k?, d_v?);
        for &part in &self.parts {
            // The sums over queries, block by block of keys.
            let mut sums: Vec<[Tensor; 2]> = Vec::new();
            for block in QueryBlock::all(part) {
                let q = (self.queries(&self.q, block)? * scale)?;
                let (d_out, lse) = (self.queries(d_out, block)?, self.queries(&lse, block)?);
                let mean = match self.q.dtype() {
                    DType::F32 => (&d_out * self.queries(out, block)?)?.sum_keepdim(D::Minus1)?,
                    // An output of a half type has it only to its own rounding.
                    _ => self.mean(block, [&q, &lse, &d_out])?,
                };
                let mut d_q = q.zeros_like()?;
                for (index, keys) in block.keys().enumerate() {
                    let weights = self.scores(&q, block, keys)?.broadcast_sub(&lse)?.exp()?;
                    let slopes = self.slopes(&d_out, part, keys)?;
                    let slopes = (&weights * slopes.broadcast_sub(&mean)?)?;
                    d_q = (d_q + slopes.matmul(&self.keys(&self.k, part, keys)?)?)?;
                    let transposed = |x: &Tensor| x.transpose(1, 2)?.contiguous();
                    let of_keys = [transposed(&slopes)?.matmul(&q)?, transposed(&weights)?.matmul(&d_out)?];
                    match sums.get_mut(index) {
                        // The last block of keys may have been cut shorter for the queries before.
                        Some(sums) => {
                            for (sum, more) in sums.iter_mut().zip(of_keys) {
                                let missing = more.dim(1)? - sum.dim(1)?;
                                *sum = (sum.pad_with_zeros(1, 0, missing)? + more)?;
                            }
                        }
                        None => sums.push(of_keys),
                    }
                }
                d_qs.push(self.steps(&(d_q * scale)?, block)?);
            }
            for (index, sums) in sums.iter().enumerate() {
                for (sum, to) in sums.iter().zip([&d_k, &d_v]) {
                    let steps = sum.transpose(0, 1)?.contiguous()?.unsqueeze(0)?;
                    let row = to.narrow(0, part.keys.row, 1)?;
                    row.slice_set(&steps, 1, part.keys.start + index * KEYS)?;
                }
            }
        }
        let dtype = self.q.dtype();
        let d_q = match d_qs.is_empty() {
            true => Tensor::zeros(self.q.shape(), DType::F32, self.device)?,
            false => Tensor::cat(&d_qs, 0)?.reshape(self.q.shape())?,
        };
        Ok([d_q.to_dtype(dtype)?, d_k.to_dtype(dtype)?, d_v.to_dtype(dtype)?])
    }

    /// For every query the mean of the slopes by its weights.
    fn mean(&self, block: QueryBlock, [q, lse, d_out]: [&Tensor; 3]) -> Result<Tensor> {
        let mut mean = lse.zeros_like()?;
        for keys in block.keys() {
            let weights = self.scores(q, block, keys)?.broadcast_sub(lse)?.exp()?;
            mean = (mean + (weights * self.slopes(d_out, block.part, keys)?)?.sum_keepdim(D::Minus1)?)?;
        }
        Ok(mean)
    }

    /// The slopes by the weights of a block of keys.
    fn slopes(&self, d_out: &Tensor, part: Part, keys: (usize, usize)) -> Result<Tensor> {
        d_out.matmul(&self.keys(&self.v, part, keys)?.transpose(1, 2)?.contiguous()?)
    }

    /// The rows of a block in a tensor of the queries' shape, or of as many heads: `(kv_heads, group · steps, ..)`.
    fn queries(&self, tensor: &Tensor, block: QueryBlock) -> Result<Tensor> {
        let Sizes { kv_heads, .. } = self.sizes;
        let (group, width) = (self.sizes.group(), tensor.dim(3)?);
        let queries = block.part.queries;
        let steps = tensor.narrow(0, queries.batch, 1)?.narrow(1, queries.start + block.start, block.steps)?;
        let steps = steps.detach().contiguous()?.reshape((block.steps, kv_heads, group, width))?;
        let heads = steps.permute((1, 2, 0, 3))?.to_dtype(DType::F32)?.contiguous()?;
        heads.reshape((kv_heads, group * block.steps, width))
    }

    /// The way back of [`queries`](Self::queries): `(steps, heads, ..)`.
    fn steps(&self, rows: &Tensor, block: QueryBlock) -> Result<Tensor> {
        let Sizes { kv_heads, heads, .. } = self.sizes;
        let width = rows.dim(2)?;
        let rows = rows.reshape((kv_heads, self.sizes.group(), block.steps, width))?;
        rows.permute((2, 0, 1, 3))?.contiguous()?.reshape((block.steps, heads, width))
    }

    /// A block of keys or values, `(kv_heads, keys, d_head)`.
    fn keys(&self, tensor: &Tensor, part: Part, (first, count): (usize, usize)) -> Result<Tensor> {
        let row = tensor.narrow(0, part.keys.row, 1)?.narrow(1, part.keys.start + first, count)?.squeeze(0)?;
        row.transpose(0, 1)?.to_dtype(DType::F32)?.contiguous()
    }

    /// `j - i` for query `i` and key `j` of a block, `(QUERIES, KEYS)` at most. It is made on the device, once in a call, so that
    /// nothing is copied there for each block.
    fn distances(&self) -> Result<Tensor> {
        if let Some(distances) = self.distances.get() {
            return Ok(distances.clone());
        }
        let most = |of: &dyn Fn(&Part) -> usize| self.parts.iter().map(of).max().unwrap_or(0);
        let [rows, columns] = [most(&|part| part.queries.len).min(QUERIES), most(&|part| part.keys.length).min(KEYS)];
        let count = |to: usize| Tensor::arange(0f32, to as f32, self.device);
        let distances = count(columns)?.unsqueeze(0)?.broadcast_sub(&count(rows)?.unsqueeze(1)?)?;
        Ok(self.distances.get_or_init(|| distances).clone())
    }

    /// The scores of queries that are scaled already, `(kv_heads, group · steps, keys)`: so low for what is not seen that its
    /// weight is 0.
    fn scores(&self, q: &Tensor, block: QueryBlock, keys: (usize, usize)) -> Result<Tensor> {
        let scores = q.matmul(&self.keys(&self.k, block.part, keys)?.transpose(1, 2)?.contiguous()?)?;
        let (first, count) = keys;
        if first + count <= block.part.seen(block.start) {
            return Ok(scores);
        }
        // Query i sees the keys of the block whose j is less than `seen + i`, which may be none.
        let seen = block.part.seen(block.start) as f64 - first as f64;
        let distances = self.distances()?.narrow(0, 0, block.steps)?.narrow(1, 0, count)?;
        let mask = (distances.affine(1.0, 1.0 - seen)?.relu()? * -HIDDEN)?.reshape((1, 1, block.steps, count))?;
        let (kv_heads, rows, _) = scores.dims3()?;
        let by_heads = scores.reshape((kv_heads, self.sizes.group(), block.steps, count))?;
        by_heads.broadcast_add(&mask)?.reshape((kv_heads, rows, count))
    }
}
