//! Losses.

use candle_core::{D, DType, Result, Tensor};

use crate::candle::{CrossEntropy, gemm, node};
use crate::loss::{IGNORED, Options};
use crate::nn::layers::read_ids;
use crate::nn::{argument, check_model_dtype, check_once, check_room};

/// The mean negative log-likelihood of `targets`, in nats: logits `(.., vocab_size)` and tokens `(..)` of an integer type
/// to a scalar. Differentiable in the logits.
///
/// Where only the last steps of a sequence are predicted, `narrow` the logits to them.
///
/// # Errors
/// Shapes that do not fit each other; no token at all; what candle refuses, such as a token beyond the vocabulary.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let Some((_, rows)) = logits.dims().split_last() else {
        return Err(argument("logits", "shape (.., vocab_size)", "a scalar"));
    };
    if targets.dims() != rows {
        return Err(argument(
            "targets",
            format_args!("shape {rows:?}, as `logits`"),
            format_args!("{:?}", targets.dims()),
        ));
    }
    if logits.elem_count() == 0 {
        return Err(argument("logits", "at least one token", format_args!("{:?}", logits.dims())));
    }
    let vocab_size = logits.dim(D::Minus1)?;
    candle_nn::loss::cross_entropy(&logits.reshape(((), vocab_size))?, &targets.flatten_all()?)
}

/// What [`linear_cross_entropy`] and [`LanguageModel::loss`](crate::nn::LanguageModel::loss) are to compute.
#[derive(Debug, Clone, PartialEq)]
pub struct LossOptions {
    /// Targets of this number are left out: of the sum, of the number of tokens that it is divided by, and of the gradient.
    /// PyTorch's -100; for targets of an unsigned type some other number that is none of the vocabulary, or is one that is
    /// never to be learnt.
    pub ignore_index: i64,
    /// From 0 to 1: how much of each target is spread evenly over the vocabulary, as PyTorch's `label_smoothing`.
    pub label_smoothing: f64,
    /// 0 or more: this times the square of log Σ exp(logits) is added, which keeps logits from growing all together. Models
    /// are trained with 1e-4.
    pub z_loss: f64,
    /// The rows of hidden states whose logits there are at a time. By default as many as have 512 MiB of them. Fewer take
    /// less memory, and more time where a matrix product is too small to fill the device.
    pub chunk_rows: Option<usize>,
}

impl Default for LossOptions {
    fn default() -> Self {
        Self { ignore_index: -100, label_smoothing: 0.0, z_loss: 0.0, chunk_rows: None }
    }
}

impl LossOptions {
    /// The rows of a chunk, of `rows` whose logits have `row_bytes` bytes each.
    fn chunk(&self, rows: usize, row_bytes: usize) -> Result<usize> {
        /// Matrix products are fast on multiples of this.
        const TILE: usize = 128;
        const CHUNK_BYTES: usize = 512 << 20;
        match self.chunk_rows {
            Some(0) => Err(argument("chunk_rows", "at least one row", 0)),
            Some(chunk) => Ok(chunk.min(rows)),
            None => {
                let most = (CHUNK_BYTES / row_bytes).max(1);
                let most = if most >= TILE { most / TILE * TILE } else { most };
                // Chunks of one size, nearly.
                let even = rows.div_ceil(rows.div_ceil(most));
                Ok(even.next_multiple_of(TILE).min(most).min(rows))
            }
        }
    }
}

/// The mean cross entropy, in nats, of a linear layer's outputs, which are never there all at once: a language model's loss
/// from what feeds its head.
///
/// ```text
/// logits = hidden · weightᵀ                     a chunk of rows at a time
/// loss   = mean over valid rows of cross entropy(logits, target), see crate::loss
/// ```
///
/// `hidden` is `(.., d_model)` of `f32`, `f16` or `bf16`, in which the products are taken; `weight` is `(vocab, d_model)`, of
/// `hidden`'s type or brought into it; `targets` are `(..)` integers of any type, each below `vocab` or
/// [`ignore_index`](LossOptions::ignore_index), on `hidden`'s device or on the processor, where the look that every call takes
/// at all of them costs nothing. (Those that lie on a GPU are copied from it, for which the call waits.) Gives a scalar of
/// `f32`, on `hidden`'s device.
///
/// Differentiable in `hidden` and `weight`. Their gradients are computed with the loss, chunk by chunk from logits that are at
/// hand, and kept for the backward pass, which multiplies them by the loss's own; where candle tracks neither, only the loss
/// is computed. That of `weight` is summed over all rows in `f32` and rounded once to the weight's type.
///
/// Where all targets are left out there is nothing to learn: the loss is 0, not NaN as PyTorch has it, and so are the
/// gradients, so that a batch of padding does no harm among others.
///
/// # Errors
/// Shapes that do not fit each other; no token at all; a target that is none of the vocabulary; options out of their range;
/// tensors on two devices; what the device refuses.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use selective_scan::nn::train::{LossOptions, cross_entropy, linear_cross_entropy};
///
/// let device = Device::Cpu;
/// let hidden = Var::randn(0f32, 1.0, (2, 3, 4), &device)?;
/// let weight = Var::randn(0f32, 1.0, (11, 4), &device)?;
/// let targets = Tensor::new(&[[1i64, 10, -100], [3, -100, 0]], &device)?; // two are left out
/// let options = LossOptions { chunk_rows: Some(2), ..LossOptions::default() };
/// let loss = linear_cross_entropy(&hidden, &weight, &targets, &options)?;
/// let gradients = loss.backward()?;
/// assert_eq!(gradients.get(&weight).unwrap().dims(), [11, 4]);
///
/// let rows = Tensor::new(&[0u32, 1, 3, 5], &device)?;
/// let logits = hidden.reshape((6, 4))?.index_select(&rows, 0)?.matmul(&weight.t()?)?;
/// let plain = cross_entropy(&logits, &Tensor::new(&[1u32, 10, 3, 0], &device)?)?;
/// assert!((loss.to_scalar::<f32>()? - plain.to_scalar::<f32>()?).abs() < 1e-5);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    options: &LossOptions,
) -> Result<Tensor> {
    let Some((_, rows)) = hidden.dims().split_last() else {
        return Err(argument("hidden", "shape (.., d_model)", "a scalar"));
    };
    if weight.rank() != 2 {
        return Err(argument("weight", "shape (vocab, d_model)", format_args!("{:?}", weight.dims())));
    }
    Targets::read(targets, rows, weight.dims()[0], options)?.loss(hidden, weight)
}

/// Targets that are all in the vocabulary or left out, and what is computed of them.
pub(crate) struct Targets<'a> {
    /// Rows that are left out have [`IGNORED`].
    tokens: Vec<u32>,
    valid: usize,
    options: &'a LossOptions,
}

impl<'a> Targets<'a> {
    /// Reads the targets of rows of hidden states, `shape` without the last dimension.
    pub fn read(targets: &Tensor, shape: &[usize], vocab_size: usize, options: &'a LossOptions) -> Result<Self> {
        if targets.dims() != shape {
            return Err(argument("targets", format_args!("shape {shape:?}"), format_args!("{:?}", targets.dims())));
        }
        if targets.elem_count() == 0 {
            return Err(argument("targets", "at least one token", format_args!("{shape:?}")));
        }
        if vocab_size == 0 {
            return Err(argument("weight", "a vocabulary of at least one token", "none"));
        }
        let tokens = read_ids("targets", targets, vocab_size, Some(options.ignore_index))?;
        let valid = tokens.iter().filter(|&&token| token != IGNORED).count();
        Ok(Self { tokens, valid, options })
    }

    /// How many are not left out.
    pub fn valid(&self) -> usize {
        self.valid
    }

    /// The loss of [`linear_cross_entropy`]. The weight has as many rows as the vocabulary has tokens.
    pub fn loss(&self, hidden: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let d_model = hidden.dim(D::Minus1)?;
        if weight.dims()[1] != d_model || d_model == 0 {
            let expected = format_args!("shape (vocab, d_model) with d_model = {d_model}, as `hidden`, and not 0");
            return Err(argument("weight", expected, format_args!("{:?}", weight.dims())));
        }
        let (location, found) = (hidden.device().location(), weight.device().location());
        if location != found {
            let expected = format_args!("a tensor on {location:?}, as `hidden`");
            return Err(argument("weight", expected, format_args!("one on {found:?}")));
        }
        check_model_dtype(hidden.dtype())?;
        let wanted = [hidden.track_op(), weight.track_op()];
        let Computed { loss, d_hidden, d_weight, rest } = self.compute(hidden, weight, wanted)?;
        let (shape, dtypes) = (hidden.shape().clone(), [hidden.dtype(), weight.dtype()]);
        let backward = move |d_loss: &Tensor| {
            check_once("linear-cross-entropy", d_loss)?;
            let factor = (d_loss.to_dtype(DType::F32)? * rest)?;
            let scaled = |gradient: &Tensor, dtype| {
                let flat = gradient.flatten_all()?.to_dtype(DType::F32)?.broadcast_mul(&factor)?;
                flat.to_dtype(dtype)?.reshape(gradient.shape())
            };
            let d_hidden =
                d_hidden.as_ref().map(|d_hidden| scaled(d_hidden, dtypes[0])?.reshape(&shape)).transpose()?;
            let d_weight = d_weight.as_ref().map(|d_weight| scaled(d_weight, dtypes[1])).transpose()?;
            Ok(vec![d_hidden, d_weight])
        };
        // SAFETY: the loss was computed here, and nothing else reads it.
        unsafe { node("linear-cross-entropy", &[hidden, weight], loss, backward) }
    }

    /// The loss with its gradients, that of `hidden` as its rows in its type and that of the weight in `f32`, outside of
    /// candle's graph. Both fit each other.
    pub fn loss_and_gradients(&self, hidden: &Tensor, weight: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let Computed { loss, d_hidden, d_weight, rest } = self.compute(hidden, weight, [true; 2])?;
        let (Some(d_hidden), Some(d_weight)) = (d_hidden, d_weight) else {
            return Err(candle_core::Error::Msg("a gradient was left out".into()));
        };
        match rest {
            1.0 => Ok((loss, d_hidden, d_weight)),
            rest => Ok((loss, (d_hidden.to_dtype(DType::F32)? * rest)?, (d_weight * rest)?)),
        }
    }

    fn compute(&self, hidden: &Tensor, weight: &Tensor, wanted: [bool; 2]) -> Result<Computed> {
        let (dtype, device) = (hidden.dtype(), hidden.device());
        let (rows, [vocab, d_model]) = (self.tokens.len(), [weight.dims()[0], weight.dims()[1]]);
        let chunk = self.options.chunk(rows, vocab.saturating_mul(dtype.size_in_bytes()))?;
        check_room("weight", &[chunk, vocab], dtype, device)?;
        // SAFETY (all): every element is written by a product before it is read.
        let empty = |shape: [usize; 2], dtype| unsafe { Tensor::empty((shape[0], shape[1]), dtype, device) };
        let d_hidden = wanted[0].then(|| empty([rows, d_model], dtype)).transpose()?;
        let d_weight = wanted[1].then(|| empty([vocab, d_model], DType::F32)).transpose()?;
        let with_gradient = d_hidden.is_some() || d_weight.is_some();
        let mean = 1.0 / self.valid.max(1) as f64;
        // Of the mean over many rows, small gradients would vanish in an f16: they get its factor with that of the loss.
        let (scale, rest) = if dtype == DType::F16 { (1.0, mean) } else { (mean, 1.0) };

        let hidden = hidden.detach().reshape((rows, d_model))?;
        let weight = weight.detach().to_dtype(dtype)?;
        let all_logits = empty([chunk, vocab], dtype)?;
        let options =
            Options { label_smoothing: self.options.label_smoothing as f32, z_loss: self.options.z_loss as f32 };
        let mut losses = Vec::with_capacity(rows.div_ceil(chunk));
        for (i, targets) in self.tokens.chunks(chunk).enumerate() {
            let (start, count) = (i * chunk, targets.len());
            let (hidden, logits) = (hidden.narrow(0, start, count)?, all_logits.narrow(0, 0, count)?);
            gemm(&logits, &hidden, &weight.t()?, false)?;
            let targets = Tensor::new(targets, device)?;
            let loss = CrossEntropy { options, ..CrossEntropy::new(&logits, &targets) };
            losses.push(if with_gradient { loss.losses_and_gradient(scale as f32)? } else { loss.losses()? });
            if let Some(d_hidden) = &d_hidden {
                gemm(&d_hidden.narrow(0, start, count)?, &logits, &weight, false)?;
            }
            if let Some(d_weight) = &d_weight {
                gemm(d_weight, &logits.t()?, &hidden, i > 0)?;
            }
        }
        // In f64, where the order of the sum has no say in the loss's digits.
        let sum = Tensor::cat(&losses, 0)?.to_dtype(DType::F64)?.sum_all()?;
        Ok(Computed { loss: (sum * mean)?.to_dtype(DType::F32)?, d_hidden, d_weight, rest })
    }
}

/// A loss and its gradients.
struct Computed {
    loss: Tensor,
    /// `(rows, d_model)` in the type of the hidden states, if candle tracks them.
    d_hidden: Option<Tensor>,
    /// `(vocab, d_model)` in `f32`, if candle tracks the weight.
    d_weight: Option<Tensor>,
    /// What both have yet to be multiplied by.
    rest: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_have_512_mib_at_most() {
        let chunk = |rows, row_bytes| LossOptions::default().chunk(rows, row_bytes).unwrap();
        // 16,384 rows of 50,280 bf16: 1.6 GB, in four.
        assert_eq!(chunk(16_384, 2 * 50_280), 4096);
        assert_eq!(chunk(16_385, 2 * 50_280), 4224);
        // All at once.
        assert_eq!([1, 100, 5000].map(|rows| chunk(rows, 4 * 256)), [1, 100, 5000]);
        // A row is larger than that, or nearly so.
        assert_eq!([1 << 29, 1 << 30, 3 << 27].map(|row_bytes| chunk(1000, row_bytes)), [1; 3]);
        assert_eq!(chunk(1000, 6 << 20), 85);
        for rows in [1, 127, 128, 129, 5248, 5249, 100_000] {
            for row_bytes in [4, 1000, 50_280, 100_560, 1 << 20, 1 << 25] {
                let chunk = chunk(rows, row_bytes);
                assert!(chunk >= 1 && chunk <= rows && (chunk == 1 || chunk * row_bytes <= 512 << 20));
            }
        }
        let of = |chunk_rows| LossOptions { chunk_rows: Some(chunk_rows), ..LossOptions::default() }.chunk(10, 4);
        assert_eq!((of(3).unwrap(), of(30).unwrap()), (3, 10));
        assert!(of(0).is_err());
    }
}
