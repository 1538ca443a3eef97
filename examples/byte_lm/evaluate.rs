//! How well a model predicts text that it has not seen.

use candle_core::{Result, Tensor};
use selective_scan::nn::LanguageModel;
use selective_scan::nn::train::cross_entropy;

/// Bytes that are run together, unless one piece has more.
const PACK: usize = 8192;

/// Bits per byte of pieces of text, each of which begins with a mark: every byte is predicted from all before it in its
/// piece.
pub fn bits_per_byte(model: &LanguageModel, pieces: &[Vec<u8>]) -> Result<f64> {
    // Nothing is recorded for gradients.
    let model = model.detach()?;
    let (mut nats, mut bytes) = (0.0, 0);
    let mut pieces = pieces.iter().peekable();
    while pieces.peek().is_some() {
        let (mut ids, mut targets, mut offsets) = (Vec::new(), Vec::new(), vec![0]);
        while let Some(piece) = pieces.next_if(|piece| ids.is_empty() || ids.len() + piece.len() - 1 <= PACK) {
            ids.extend(piece[..piece.len() - 1].iter().map(|&byte| u32::from(byte)));
            targets.extend(piece[1..].iter().map(|&byte| u32::from(byte)));
            offsets.push(ids.len());
        }
        let count = ids.len();
        let ids = Tensor::from_vec(ids, (1, count), model.device())?;
        let targets = Tensor::from_vec(targets, count, model.device())?;
        let mean = cross_entropy(&model.forward_packed(&ids, &offsets)?.squeeze(0)?, &targets)?;
        nats += f64::from(mean.to_scalar::<f32>()?) * count as f64;
        bytes += count;
    }
    Ok(nats / bytes as f64 / std::f64::consts::LN_2)
}
