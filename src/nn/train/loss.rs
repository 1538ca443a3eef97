//! Losses.

use candle_core::{Result, Tensor};

use crate::nn::argument;

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
    let vocab_size = logits.dim(candle_core::D::Minus1)?;
    candle_nn::loss::cross_entropy(&logits.reshape(((), vocab_size))?, &targets.flatten_all()?)
}
