//! A Transformer on patches (Dosovitskiy et al. 2021, arXiv 2010.11929), in candle's own operators, with RMS norms as the
//! other model has.
//!
//! ```text
//! stream += out_proj(attention(qkv_proj(norm1(stream))))
//! stream += down_proj(gelu(up_proj(norm2(stream))))          hidden size 3 d_model
//! ```
//!
//! Patches, the token, positions, the last norm and the head are those of the other model, whose layers are none here.

use candle_core::{D, Error, Result, Tensor};
use candle_nn::ops::softmax_last_dim;
use candle_nn::{Linear, Module, VarBuilder, linear_no_bias};
use selective_scan::nn::{RmsNorm, VisionConfig};

/// The width of a head.
const HEAD: usize = 32;

/// The numbers of a block of rows of the attention matrix, 64 MiB of them.
const BLOCK: usize = 1 << 24;

#[derive(Clone)]
pub struct Transformer {
    config: VisionConfig,
    embed: Linear,
    token: Tensor,
    positions: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
}

#[derive(Clone)]
struct Layer {
    norm1: RmsNorm,
    qkv: Linear,
    out: Linear,
    norm2: RmsNorm,
    up: Linear,
    down: Linear,
}

impl Transformer {
    /// One with the patches, the width and the depth of the other model.
    pub fn new(config: &VisionConfig, vb: VarBuilder) -> Result<Self> {
        let (d_model, eps) = (config.backbone.d_model(), config.backbone.norm_eps);
        if !d_model.is_multiple_of(HEAD) {
            return Err(Error::msg(format_args!("--d-model: expected a multiple of {HEAD}, for heads, got {d_model}")));
        }
        let layer = |i: usize| -> Result<_> {
            let vb = vb.pp("layers").pp(i);
            Ok(Layer {
                norm1: RmsNorm::new(d_model, eps, vb.pp("norm1"))?,
                qkv: linear_no_bias(d_model, 3 * d_model, vb.pp("qkv_proj"))?,
                out: linear_no_bias(d_model, d_model, vb.pp("out_proj"))?,
                norm2: RmsNorm::new(d_model, eps, vb.pp("norm2"))?,
                up: linear_no_bias(d_model, 3 * d_model, vb.pp("up_proj"))?,
                down: linear_no_bias(3 * d_model, d_model, vb.pp("down_proj"))?,
            })
        };
        let small = candle_nn::Init::Randn { mean: 0.0, stdev: 0.02 };
        Ok(Self {
            config: config.clone(),
            embed: candle_nn::linear(config.patch * config.patch, d_model, vb.pp("patch_embed"))?,
            token: vb.get_with_hints((1, 1, d_model), "cls_token", small)?,
            positions: vb.get_with_hints((1, config.steps(), d_model), "pos_embed", small)?,
            layers: (0..config.backbone.n_layer).map(layer).collect::<Result<_>>()?,
            norm: RmsNorm::new(d_model, eps, vb.pp("norm_f"))?,
            head: candle_nn::linear(d_model, config.classes, vb.pp("head"))?,
        })
    }

    /// Images of one channel in patches side by side, `(images, 1, rows, columns)`, to logits `(images, classes)`.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let ([down, across], patch) = (self.config.grid(), self.config.patch);
        let (count, _, rows, columns) = images.dims4()?;
        let whole = images.narrow(2, 0, rows - rows % patch)?.narrow(3, 0, columns - columns % patch)?;
        let cells = whole.reshape((count, down, patch, across, patch))?.transpose(2, 3)?;
        let patches = self.embed.forward(&cells.reshape((count * down * across, patch * patch))?)?;
        let patches = patches.reshape((count, down * across, ()))?;
        let token = self.token.broadcast_as((count, 1, patches.dim(2)?))?;
        let mut stream = Tensor::cat(&[&token, &patches], 1)?.broadcast_add(&self.positions)?;
        for layer in &self.layers {
            stream = layer.forward(&stream)?;
        }
        self.head.forward(&self.norm.forward(&stream.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?)?)
    }
}

impl Layer {
    fn forward(&self, stream: &Tensor) -> Result<Tensor> {
        let (images, steps, d_model) = stream.dims3()?;
        let rows = |x: &Tensor| x.reshape((images * steps, ()));
        let qkv = self.qkv.forward(&rows(&self.norm1.forward(stream)?)?)?;
        let heads = |from: usize| -> Result<Tensor> {
            let part = qkv.narrow(1, from * d_model, d_model)?.contiguous()?;
            part.reshape((images, steps, d_model / HEAD, HEAD))?.transpose(1, 2)?.contiguous()
        };
        let y = attention(&heads(0)?, &heads(1)?, &heads(2)?)?.transpose(1, 2)?.contiguous()?;
        let stream = (stream + self.out.forward(&rows(&y)?)?.reshape((images, steps, d_model))?)?;
        let hidden = self.up.forward(&rows(&self.norm2.forward(&stream)?)?)?.gelu_erf()?;
        stream + self.down.forward(&hidden)?.reshape((images, steps, d_model))?
    }
}

/// `softmax(q kᵀ / √HEAD) v` of `(images, heads, steps, HEAD)`, as many rows of the matrix at a time as a block holds.
fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (images, heads, steps, _) = q.dims4()?;
    let block = (BLOCK / (images * heads * steps)).clamp(1, steps);
    let transposed = k.transpose(2, 3)?.contiguous()?;
    let mut out = Vec::with_capacity(steps.div_ceil(block));
    for from in (0..steps).step_by(block) {
        let q = q.narrow(2, from, block.min(steps - from))?.contiguous()?;
        let scores = (q.matmul(&transposed)? * (1.0 / (HEAD as f64).sqrt()))?;
        // candle's fused softmax has no gradient.
        let shares = match scores.track_op() {
            true => candle_nn::ops::softmax(&scores, D::Minus1)?,
            false => softmax_last_dim(&scores)?,
        };
        out.push(shares.matmul(v)?);
    }
    Tensor::cat(&out, 2)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use candle_nn::VarMap;

    use super::*;

    /// Rows in blocks are rows of the whole matrix: some 1e-6 apart, which a sum of 60 numbers in `f32` may be.
    #[test]
    fn attention_in_blocks_is_attention() {
        let draw = || Tensor::randn(0f32, 1.0, (2, 3, 60, HEAD), &Device::Cpu).unwrap();
        let [q, k, v] = [draw(), draw(), draw()];
        let got = attention(&q, &k, &v).unwrap();
        let values = |x: &Tensor| x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let (q, k, v, got) = (values(&q), values(&k), values(&v), values(&got));
        for (head, row) in (0..6).flat_map(|head| (0..60).map(move |row| (head, row))) {
            let at = |of: &[f64], step: usize, i: usize| of[(head * 60 + step) * HEAD + i];
            let score = |step: usize| (0..HEAD).map(|i| at(&q, row, i) * at(&k, step, i)).sum::<f64>();
            let shares: Vec<_> = (0..60).map(|step| (score(step) / (HEAD as f64).sqrt()).exp()).collect();
            let total: f64 = shares.iter().sum();
            for i in 0..HEAD {
                let want: f64 = (0..60).map(|step| shares[step] / total * at(&v, step, i)).sum();
                assert!((at(&got, row, i) - want).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn every_parameter_learns() {
        let config = VisionConfig { channels: 1, ..VisionConfig::new([4, 6], 2, 3, 2, HEAD) };
        let variables = VarMap::new();
        let model = Transformer::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)).unwrap();
        let logits = model.forward(&Tensor::randn(0f32, 1.0, (2, 1, 4, 6), &Device::Cpu).unwrap()).unwrap();
        assert_eq!(logits.dims(), [2, 3]);
        let gradients = logits.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        for (name, variable) in variables.data().lock().unwrap().iter() {
            assert!(gradients.get(variable).is_some(), "{name}");
        }
    }
}
