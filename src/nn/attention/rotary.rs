//! Rotary positions.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::rotary_emb::rope_thd;

use crate::candle::node;

/// The angles of so many steps of sequences: the cosines and sines, `(batch, length, d_head / 2)` of `f32`.
pub(super) struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    /// Those of these positions, `batch · length` of them, for pairs that are turned so much from one to the next.
    pub fn new(rates: &[f64], positions: &[usize], batch: usize, device: &Device) -> Result<Self> {
        // In f64, as in f32 a position of some ten thousand turns is off by more than the rounding of the result.
        let angles = || positions.iter().flat_map(|&position| rates.iter().map(move |rate| position as f64 * rate));
        let table = |f: fn(f64) -> f64| {
            let numbers: Vec<f32> = angles().map(|angle| f(angle) as f32).collect();
            Tensor::from_vec(numbers, (batch, positions.len() / batch.max(1), rates.len()), device)
        };
        Ok(Self { cos: table(f64::cos)?, sin: table(f64::sin)? })
    }

    /// Turns the heads of `x`, `(batch, length, heads, d_head)`, in its type. Differentiable.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let turned = turn(&x.detach(), &self.cos, &self.sin)?;
        // The way back turns the other way.
        let (cos, back) = (self.cos.clone(), self.sin.neg()?);
        // SAFETY: the result is a tensor of its own, of which no other handle is left.
        unsafe { node("rotary", &[x], turned, move |d_out| Ok(vec![Some(turn(d_out, &cos, &back)?)])) }
    }
}

fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?.contiguous()?;
    rope_thd(&wide, cos, sin)?.to_dtype(x.dtype())
}
