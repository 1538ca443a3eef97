//! Layers one after the other as one node of candle's graph.
//!
//! Between them nothing goes through the graph: the residual stream is added to where it lies, and on the way back its
//! gradient is handed from layer to layer. That is so of Mamba blocks alone; other layers are nodes between such stacks.

use candle_core::{DType, Result, Tensor};

use super::backbone::Layer;
use super::drops::{Keep, LeftOut};
use super::mixer::LayerState;
use crate::candle::{RmsNorm, Slots};
use crate::nn::layers::{Converted, Gradients, Parameter, each_once, node_over};
use crate::nn::mamba::{Kept, Parts, rows};
use crate::nn::{Cache, Mamba, argument};
use crate::norm;

/// A layer outside of candle's graph.
struct Detached {
    norm: Parameter,
    /// The norm's weight in `f32`, as it is computed with.
    norm_weight: Tensor,
    eps: f64,
    parts: Parts,
}

/// What a layer leaves for the way back.
struct KeptLayer {
    layer: Detached,
    /// The stream before the layer.
    stream: Tensor,
    block: Kept,
    /// What its output was multiplied by, where something of it was left out.
    keep: Option<Keep>,
}

/// Runs a residual stream, `(batch, length, d_model)` with at least one element, through layers. Differentiable.
pub(super) fn forward(
    layers: &[Layer],
    stream: &Tensor,
    cu_seqlens: Option<&[usize]>,
    left_out: LeftOut,
) -> Result<Tensor> {
    let mut stream = stream.clone();
    for (first, layers) in pieces(layers) {
        let left_out = left_out.from(first);
        match layers {
            [layer] if layer.mixer.as_mamba().is_none() => {
                let y = layer.mixer.forward(&layer.norm.forward(&stream)?, cu_seqlens)?;
                stream = left_out.add(0, &stream, &y, cu_seqlens)?;
            }
            _ => stream = joined(layers, &stream, cu_seqlens, left_out)?,
        }
        stream = add_last_feed_forward(layers, stream, cu_seqlens, left_out)?;
    }
    Ok(stream)
}

/// Layers by what is done at once: Mamba blocks that follow each other, up to one with more than a block; or another layer. With the
/// index of the first of them.
fn pieces(layers: &[Layer]) -> impl Iterator<Item = (usize, &[Layer])> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let layers = &layers[first..];
        let alone = layers.iter().take_while(|layer| layer.mamba_alone().is_some()).count();
        let count = match layers.get(alone) {
            Some(layer) if alone == 0 || layer.mixer.as_mamba().is_some() => alone + 1,
            _ => alone,
        };
        let piece = (first, &layers[..count]);
        first += count;
        (count > 0).then_some(piece)
    })
}

/// What the feed-forward part of a piece's last layer adds; the others of it have none.
fn add_last_feed_forward(
    layers: &[Layer],
    stream: Tensor,
    cu_seqlens: Option<&[usize]>,
    left_out: LeftOut,
) -> Result<Tensor> {
    let Some(y) = layers.last().map(|layer| layer.feed_forward(&stream)).transpose()?.flatten() else {
        return Ok(stream);
    };
    left_out.of_feed_forward().add(layers.len() - 1, &stream, &y, cu_seqlens)
}

/// [`forward`] through the Mamba blocks of layers as one node.
fn joined(layers: &[Layer], stream: &Tensor, cu_seqlens: Option<&[usize]>, left_out: LeftOut) -> Result<Tensor> {
    let tracked: Vec<_> = layers.iter().flat_map(tracked).collect();
    let (out, way_back) = pass(layers, stream, cu_seqlens, stream.track_op(), left_out, &converted(layers)?)?;
    let backward = move |d_stream: &Tensor, gradients: &mut Gradients| way_back.backward(d_stream, gradients);
    // SAFETY: the stream after the last layer is a tensor of its own, of which no other handle is left.
    unsafe { node_over("layers", stream, &each_once(&tracked), out, backward) }
}

/// [`forward`] of `(batch, length, d_model)` from the states of a cache on, whose slots then have those afterwards: candle does not
/// track these. All has been checked.
pub(super) fn forward_carried(
    layers: &[Layer],
    stream: &Tensor,
    cache: &Cache,
    slots: Slots,
    left_out: LeftOut,
) -> Result<Tensor> {
    let mut stream = stream.clone();
    for (first, layers) in pieces(layers) {
        let (left_out, states) = (left_out.from(first), &cache.layers[first..first + layers.len()]);
        match (layers, states) {
            ([layer], [state]) if layer.mixer.as_mamba().is_none() => {
                let y = layer.mixer.forward_carried(&layer.norm.forward(&stream)?, state, slots)?;
                stream = left_out.add(0, &stream, &y, None)?;
            }
            _ => stream = joined_carried(layers, &stream, states, slots, left_out)?,
        }
        stream = add_last_feed_forward(layers, stream, None, left_out)?;
    }
    Ok(stream)
}

/// [`forward_carried`] through the Mamba blocks of layers as one node.
fn joined_carried(
    layers: &[Layer],
    stream: &Tensor,
    states: &[LayerState],
    slots: Slots,
    left_out: LeftOut,
) -> Result<Tensor> {
    let tracked: Vec<_> = layers.iter().flat_map(tracked).collect();
    let converted = converted(layers)?;
    let mut current = stream.detach().contiguous()?;
    let mut kept = Vec::new();
    for (i, (layer, state)) in layers.iter().zip(states).enumerate() {
        let keep = left_out.keep(i, &current, None)?;
        let (next, layer) = Detached::new(layer, &converted)?.run_carried(current, state, slots, keep)?;
        kept.push(layer);
        current = next;
    }
    let way_back = WayBack { layers: kept, is_stream_wanted: stream.track_op() };
    let backward = move |d_stream: &Tensor, gradients: &mut Gradients| way_back.backward(d_stream, gradients);
    // SAFETY: the stream after the last layer is a tensor of its own, of which no other handle is left.
    unsafe { node_over("layers", stream, &each_once(&tracked), current, backward) }
}

/// The parameters of a layer's block, and of the norm before it, that a backward pass could reach.
fn tracked(layer: &Layer) -> Vec<Tensor> {
    let norm = layer.norm.weight();
    let block = layer.mixer.as_mamba().map(Mamba::tracked).unwrap_or_default();
    norm.track_op().then(|| norm.clone()).into_iter().chain(block).collect()
}

/// Those of the layers' parameters that have another type than they are computed with in.
fn converted(layers: &[Layer]) -> Result<Converted> {
    Converted::of(layers.iter().flat_map(|layer| {
        let block = layer.mixer.as_mamba().into_iter().flat_map(|block| block.parameters().iter());
        block.chain([layer.norm.parameter()])
    }))
}

/// The way back through layers.
pub(super) struct WayBack {
    /// None of those before the first whose gradients are wanted.
    layers: Vec<KeptLayer>,
    is_stream_wanted: bool,
}

impl WayBack {
    /// Adds the gradients of the parameters, and gives that of the stream before the first layer if it is wanted.
    pub fn backward(&self, d_stream: &Tensor, gradients: &mut Gradients) -> Result<Option<Tensor>> {
        let mut d_stream = (d_stream.contiguous()?, d_stream.clone());
        for layer in self.layers.iter().rev() {
            d_stream = layer.backward(d_stream, gradients)?;
        }
        Ok(self.is_stream_wanted.then_some(d_stream.0))
    }
}

/// [`forward`] of Mamba blocks outside of candle's graph.
pub(super) fn pass(
    layers: &[Layer],
    stream: &Tensor,
    cu_seqlens: Option<&[usize]>,
    is_stream_wanted: bool,
    left_out: LeftOut,
    converted: &Converted,
) -> Result<(Tensor, WayBack)> {
    let first = match is_stream_wanted {
        true => 0,
        false => layers.iter().position(|layer| !tracked(layer).is_empty()).unwrap_or(layers.len()),
    };
    let mut current = stream.detach().contiguous()?;
    if first > 0 {
        current = current.copy()?;
    }
    for (i, layer) in layers[..first].iter().enumerate() {
        let keep = left_out.keep(i, &current, cu_seqlens)?;
        current = Detached::new(layer, converted)?.run(current, cu_seqlens, keep)?;
    }
    let mut kept = Vec::new();
    for (i, layer) in layers.iter().enumerate().skip(first) {
        let keep = left_out.keep(i, &current, cu_seqlens)?;
        let (next, layer) = Detached::new(layer, converted)?.run_kept(current, cu_seqlens, keep)?;
        kept.push(layer);
        current = next;
    }
    Ok((current, WayBack { layers: kept, is_stream_wanted }))
}

impl Detached {
    fn new(layer: &Layer, converted: &Converted) -> Result<Self> {
        let block = layer.mixer.as_mamba();
        let block = block.ok_or_else(|| argument("layers", "Mamba blocks, of one node", "others"))?;
        let norm = layer.norm.parameter().leave_graph(converted)?;
        let norm_weight = norm.tensor()?.to_dtype(DType::F32)?;
        Ok(Self { norm, norm_weight, eps: layer.norm.eps(), parts: block.parts().leave_graph(converted)? })
    }

    /// The norm of the stream, in the type in which the layer computes.
    fn norm<'a>(&'a self, stream: &'a Tensor) -> RmsNorm<'a> {
        let options = norm::Options { eps: self.eps, ..Default::default() };
        RmsNorm { weight: Some(&self.norm_weight), options, dtype: self.norm.dtype(), ..RmsNorm::new(stream) }
    }

    /// The stream with what the layer adds, where it lies if nothing is left out.
    fn run(&self, stream: Tensor, cu_seqlens: Option<&[usize]>, keep: Option<Keep>) -> Result<Tensor> {
        let normed = self.norm(&stream).forward()?;
        let y = self.parts.forward(&normed, cu_seqlens)?;
        self.add(stream, &y, keep.as_ref())
    }

    /// Adds what `out_proj` makes of `y` to the stream where it lies, or what is kept of it to another.
    fn add(&self, stream: Tensor, y: &Tensor, keep: Option<&Keep>) -> Result<Tensor> {
        let Some(keep) = keep else {
            self.parts.out_proj.apply_onto(&rows(&stream)?, y)?;
            return Ok(stream);
        };
        let out = self.parts.out_proj.apply(y)?.reshape(stream.shape())?;
        &stream + keep.of(&out.to_dtype(stream.dtype())?)?
    }

    /// The stream after the layer, and what the way back needs.
    fn run_kept(self, stream: Tensor, cu_seqlens: Option<&[usize]>, keep: Option<Keep>) -> Result<(Tensor, KeptLayer)> {
        let (normed, next) = self.norm(&stream).forward_with_residual()?;
        let block = self.parts.forward_kept(&normed, cu_seqlens)?;
        let next = self.add(next, &block.y, keep.as_ref())?;
        Ok((next, KeptLayer { layer: self, stream, block, keep }))
    }

    /// [`run_kept`](Self::run_kept) from the states of a cache on.
    fn run_carried(
        self,
        stream: Tensor,
        state: &LayerState,
        slots: Slots,
        keep: Option<Keep>,
    ) -> Result<(Tensor, KeptLayer)> {
        let (normed, next) = self.norm(&stream).forward_with_residual()?;
        let block = self.parts.forward_carried(&normed, state.mamba()?, slots)?;
        let next = self.add(next, &block.y, keep.as_ref())?;
        Ok((next, KeptLayer { layer: self, stream, block, keep }))
    }
}

impl KeptLayer {
    /// The gradient of the stream before the layer, from that of the stream after it: in the stream's type, and in that of
    /// the layer that wrote it.
    fn backward(&self, d_stream: (Tensor, Tensor), gradients: &mut Gradients) -> Result<(Tensor, Tensor)> {
        let (layer, norm) = (&self.layer, self.layer.norm(&self.stream));
        let d_out = match &self.keep {
            Some(keep) => keep.of(&d_stream.0)?,
            None => d_stream.1,
        };
        let d_out = d_out.to_dtype(norm.dtype)?;
        let d_normed = layer.parts.backward(&self.block, &d_out, true, gradients)?;
        let d_normed = d_normed.ok_or_else(|| candle_core::Error::Msg("a block without a gradient".into()))?;
        let of_norm = norm.backward(&d_normed.reshape(self.stream.shape())?, Some(&d_stream.0))?;
        if let Some(d_weight) = of_norm.weight {
            gradients.add(&layer.norm, |_| Ok(d_weight))?;
        }
        Ok((of_norm.sum, of_norm.x))
    }
}
