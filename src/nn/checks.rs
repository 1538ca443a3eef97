//! The checks of arguments that the modules of `nn` share. Those of slots, sequences and pools of states are the crate's.

use std::fmt::Display;

use candle_core::{DType, Device, Result, Tensor};

/// An argument that does not fit.
pub(crate) fn argument(name: &'static str, expected: impl Display, got: impl Display) -> candle_core::Error {
    crate::Error::argument(name, expected, got).into()
}

/// Refuses types in which no model computes.
pub(crate) fn check_model_dtype(dtype: DType) -> Result<DType> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => Ok(dtype),
        other => Err(argument("dtype", "f32, f16 or bf16", other.as_str())),
    }
}

pub(crate) fn check_eps(name: &'static str, eps: f64) -> Result<()> {
    if eps >= 0.0 && eps.is_finite() { Ok(()) } else { Err(argument(name, "an epsilon of 0 or more", eps)) }
}

/// Refuses what does not fit in memory, by the name of the argument that asks for it: candle would panic or end the
/// program. The tensors of a device tell of this by themselves.
pub(crate) fn check_room(name: &'static str, shape: &[usize], dtype: DType, device: &Device) -> Result<()> {
    let bytes = shape.iter().try_fold(dtype.size_in_bytes(), |bytes, &size| bytes.checked_mul(size));
    let fits = match (bytes, device) {
        (Some(bytes), Device::Cpu) => {
            let mut room = Vec::<u8>::new();
            let fits = room.try_reserve_exact(bytes).is_ok();
            // Or the compiler leaves out what nobody uses.
            std::hint::black_box(&mut room);
            fits
        }
        (Some(bytes), _) => bytes <= isize::MAX as usize,
        (None, _) => false,
    };
    if fits {
        return Ok(());
    }
    let got = format_args!("{shape:?} of {}", dtype.as_str());
    Err(argument(name, "sizes that fit in memory", got))
}

/// How many tokens a call brings for each of its sequences.
#[derive(Debug, Clone, Copy)]
pub(crate) enum NewTokens<'a> {
    /// So many for each.
    Each(usize),
    /// Those between neighbouring offsets.
    Packed(&'a [usize]),
}

impl NewTokens<'_> {
    /// Those of sequence number `index`.
    pub fn of(self, index: usize) -> usize {
        match self {
            Self::Each(count) => count,
            Self::Packed(ends) => ends[index + 1].saturating_sub(ends[index]),
        }
    }
}

/// As many parameters as can have an address each, in any type.
pub(crate) const COUNTABLE: usize = isize::MAX as usize / 8;

/// The elements of all shapes together, if they can be counted.
pub(crate) fn sum(shapes: &[[usize; 3]]) -> Option<usize> {
    let product = |shape: &[usize; 3]| shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size));
    shapes.iter().try_fold(0usize, |total, shape| total.checked_add(product(shape)?))
}

/// Refuses to be differentiated twice: the gradients of our own operators are computed outside of candle's graph.
pub(crate) fn check_once(name: &'static str, gradient: &Tensor) -> Result<()> {
    if gradient.track_op() {
        return Err(candle_core::Error::Msg(format!(
            "{name}: cannot be differentiated twice, and its gradient is itself tracked (CANDLE_GRAD_DO_NOT_DETACH)"
        )));
    }
    Ok(())
}
