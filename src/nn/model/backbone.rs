//! A stack of layers, without embeddings.

use std::borrow::Cow;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Module, VarBuilder};

use super::drops::LeftOut;
use super::stack::{self, WayBack};
use super::{BackboneConfig, Drops, LayerConfig, LayerDraft, Mixer};
use crate::candle::Slots;
use crate::count_sequences;
use crate::nn::decode::PoolWrites;
use crate::nn::layers::{Change, Converted, ParameterList, Parameters};
use crate::nn::mamba::{CachePass, JoinedLayer, Mamba};
use crate::nn::{Cache, FeedForward, NewTokens, RmsNorm, argument, check_model_dtype, check_room};

/// The layers of a model between its embeddings and its head:
///
/// ```text
/// stream  = x
/// stream += mixer(norm(stream))            for each of n_layer layers
/// stream += feed_forward(norm_ff(stream))  where there is one
/// output  = norm_f(stream)
/// ```
///
/// For sequences of anything that has `d_model` features: patches of an image, frames of audio, the embeddings of another
/// model. Parameters have the names `layers.N.norm.weight`, `layers.N.mixer.…`, `layers.N.norm_ff.weight`,
/// `layers.N.feed_forward.…` and `norm_f.weight`.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::{VarBuilder, VarMap};
/// use selective_scan::nn::{Backbone, BackboneConfig, MambaConfig};
///
/// let device = Device::Cpu;
/// let mixer = MambaConfig { bidirectional: true, ..MambaConfig::new(32) };
/// let variables = VarMap::new();
/// let vb = VarBuilder::from_varmap(&variables, DType::F32, &device);
/// let backbone = Backbone::new(&BackboneConfig::with_mixer(2, mixer), vb)?;
/// let patches = Tensor::randn(0f32, 1.0, (3, 49, 32), &device)?;
/// assert_eq!(backbone.forward(&patches)?.dims(), [3, 49, 32]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Backbone {
    config: BackboneConfig,
    dtype: DType,
    device: Device,
    layers: Vec<Layer>,
    norm_f: RmsNorm,
    parameters: ParameterList,
    drops: Drops,
}

#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub norm: RmsNorm,
    pub mixer: Mixer,
    /// With the norm before it.
    pub feed_forward: Option<(RmsNorm, FeedForward)>,
}

impl Layer {
    fn build(config: &LayerConfig, norm_eps: f64, parameters: &Parameters, divisor: f64) -> Result<Self> {
        let norm = |name| RmsNorm::build(config.mixer.d_model(), norm_eps, &parameters.pp(name));
        let (of_mixer, mixer) = (norm("norm")?, Mixer::build(&config.mixer, &parameters.pp("mixer"), divisor)?);
        let feed_forward = match &config.feed_forward {
            Some(config) => {
                let of_part = norm("norm_ff")?;
                Some((of_part, FeedForward::build(config, &parameters.pp("feed_forward"), divisor)?))
            }
            None => None,
        };
        Ok(Self { norm: of_mixer, mixer, feed_forward })
    }

    /// The Mamba block of a layer that is nothing else.
    pub fn mamba_alone(&self) -> Option<&Mamba> {
        if self.feed_forward.is_some() { None } else { self.mixer.as_mamba() }
    }

    /// What the feed-forward part, if there is one, gives to be added to the stream. Differentiable.
    pub fn feed_forward(&self, stream: &Tensor) -> Result<Option<Tensor>> {
        let Some((norm, feed_forward)) = &self.feed_forward else { return Ok(None) };
        feed_forward.forward(&norm.forward(stream)?).map(Some)
    }
}

impl Backbone {
    /// A stack with the parameters of `vb`, which computes in its type (`f32`, `f16` or `bf16`) and on its device. Those
    /// that a [`VarMap`](candle_nn::VarMap) does not have yet are drawn, from the seed of the configuration's `mixer` and
    /// their names; variables of another type that it has are trained as they are, see [types](crate::nn#types).
    ///
    /// # Errors
    /// A size that makes no model, or one that does not fit in memory; a parameter that is missing or of another shape, by
    /// name.
    pub fn new(config: &BackboneConfig, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        let (dtype, device) = (check_model_dtype(vb.dtype())?, vb.device().clone());
        let parameters = Parameters::new(vb, config.mixer.seed());
        parameters.pp("norm_f").check_room("weight", "n_layer, d_model, d_inner", config.parameter_count()?)?;
        Self::build(config, dtype, &device, &parameters)
    }

    pub(crate) fn build(
        config: &BackboneConfig,
        dtype: DType,
        device: &Device,
        parameters: &Parameters,
    ) -> Result<Self> {
        let (count, d_model) = (parameters.count(), config.d_model());
        let mut layers: Vec<Layer> = Vec::new();
        for index in 0..config.n_layer {
            let owner = config.owner(index);
            if owner < index {
                layers.push(layers[owner].clone());
                continue;
            }
            let (layer, parameters) = (config.layer(index), parameters.pp("layers").pp(index));
            layers.push(Layer::build(&layer, config.norm_eps, &parameters, config.divisor())?);
        }
        let norm_f = RmsNorm::build(d_model, config.norm_eps, &parameters.pp("norm_f"))?;
        let parameters = parameters.taken_since(count);
        let drops = Drops::default();
        Ok(Self { config: config.clone(), dtype, device: device.clone(), layers, norm_f, parameters, drops })
    }

    /// The same layers, each parameter as `change` gives it.
    fn changed(&self, change: &mut Change) -> Result<Self> {
        let changed =
            Self::build(&self.config, self.dtype, &self.device, &Parameters::changed(&self.parameters, change))?;
        Ok(Self { drops: self.drops, ..changed })
    }

    /// The same layers, sharing their parameters with their gradients, which leave that out in every whole pass from now on: for a
    /// step of training. With [`Drops::default`] they leave nothing out.
    ///
    /// # Errors
    /// A probability below 0, or of 1 or more.
    pub fn with_drops(&self, drops: Drops) -> Result<Self> {
        drops.check()?;
        Ok(Self { drops, ..self.clone() })
    }

    /// What a whole pass leaves out.
    pub fn drops(&self) -> Drops {
        self.drops
    }

    /// The same, of the layers from number `first` on.
    fn left_out(&self, first: usize) -> LeftOut {
        LeftOut { drops: self.drops, first, layers: self.layers.len(), branch: 0 }
    }

    /// The sizes and variants.
    pub fn config(&self) -> &BackboneConfig {
        &self.config
    }

    /// The type in which it computes: that of activations and matrices. The variables of one that is trained may be of
    /// another.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The mixers, first to last.
    pub fn mixers(&self) -> impl ExactSizeIterator<Item = &Mixer> {
        self.layers.iter().map(|layer| &layer.mixer)
    }

    /// Runs whole sequences, `(batch, length, d_model)` of `f32`, `f16` or `bf16`, to the normalised stream that feeds a
    /// head, of the same shape and of the type in which the layers compute. Differentiable. Of no steps there are no
    /// outputs.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.norm_f.forward(&self.stream(x, None)?)
    }

    /// Runs sequences that lie one after another: `x` is `(1, length, d_model)`, and sequence `i` takes the steps from
    /// `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Each gets what it would get alone. Differentiable.
    pub fn forward_packed(&self, x: &Tensor, cu_seqlens: &[usize]) -> Result<Tensor> {
        self.norm_f.forward(&self.stream(x, Some(cu_seqlens))?)
    }

    /// The residual stream after each layer, then the normalised stream that feeds a head: `n_layer + 1` tensors
    /// `(batch, length, d_model)`. Differentiable.
    pub fn hidden_states(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let mut states = Vec::with_capacity(self.layers.len() + 1);
        let mut stream = self.begin(x)?;
        for (i, layer) in self.layers.iter().enumerate() {
            if stream.elem_count() > 0 {
                stream = stack::forward(std::slice::from_ref(layer), &stream, None, self.left_out(i))?;
            }
            states.push(stream.clone());
        }
        states.push(self.norm_f.forward(&stream)?);
        Ok(states)
    }

    /// Zero states for `slots` sequences. `dtype` is that of the states, see
    /// [`MambaState::new`](crate::nn::MambaState::new); keys and values are no wider than the model computes them. Attention has room
    /// for as many tokens of each as its configuration says
    /// ([`AttentionConfig::capacity`](crate::nn::AttentionConfig::capacity)).
    pub fn new_cache(&self, slots: usize, dtype: DType) -> Result<Cache> {
        self.cache(slots, dtype, None)
    }

    /// [`new_cache`](Self::new_cache) with room for `capacity` tokens of each sequence, where states grow with them.
    ///
    /// # Errors
    /// States that do not fit in memory.
    pub fn new_cache_for(&self, slots: usize, dtype: DType, capacity: usize) -> Result<Cache> {
        self.cache(slots, dtype, Some(capacity))
    }

    pub(crate) fn cache(&self, slots: usize, dtype: DType, capacity: Option<usize>) -> Result<Cache> {
        let layers = self.mixers().map(|mixer| mixer.new_state(slots, dtype, capacity, &self.device));
        Ok(Cache { layers: layers.collect::<Result<_>>()? })
    }

    /// Runs sequences, or the next chunks of them, on from the states of a cache, and leaves there the states after them:
    /// `(batch, length, d_model)` to what [`forward`](Self::forward) gives. Row `i` uses slot `slots[i]`, as in
    /// [`LanguageModel::prefill`](super::LanguageModel::prefill); not differentiable, as that.
    ///
    /// # Errors
    /// A layer that is bidirectional; a cache or slots that do not fit. Nothing is written then.
    pub fn prefill<'s>(&self, x: &Tensor, cache: &Cache, slots: impl Into<Slots<'s>>) -> Result<Tensor> {
        self.decode(x, None, cache, slots.into())
    }

    /// As [`Backbone::prefill`], for sequences that lie one after another as in [`Backbone::forward_packed`]; sequence `i`
    /// uses slot `slots[i]`.
    pub fn prefill_packed<'s>(
        &self,
        x: &Tensor,
        cu_seqlens: &[usize],
        cache: &Cache,
        slots: impl Into<Slots<'s>>,
    ) -> Result<Tensor> {
        self.decode(x, Some(cu_seqlens), cache, slots.into())
    }

    fn decode(&self, x: &Tensor, cu_seqlens: Option<&[usize]>, cache: &Cache, slots: Slots) -> Result<Tensor> {
        let (batch, length) = self.check_input(x)?;
        let sequences = count_sequences(batch, length, cu_seqlens)?;
        let new = cu_seqlens.map_or(NewTokens::Each(length), NewTokens::Packed);
        self.check_decoding(cache, sequences, slots, new)?;
        let layers = self.untracked()?;
        let (stream, _) = layers.run(&x.detach(), cache, CachePass::Prefill { cu_seqlens, slots })?;
        layers.norm_f.forward(&stream)
    }

    /// Carries the states of a cache through the next step of each row, or through a few: `x` is
    /// `(batch, steps, d_model)`. Slots may also be a tensor of `i32` where the states are, as in
    /// [`Mamba::step`](crate::nn::Mamba::step). Otherwise as [`Backbone::prefill`].
    ///
    /// # Errors
    /// As [`Backbone::prefill`].
    pub fn step<'s>(&self, x: &Tensor, cache: &Cache, slots: impl Into<Slots<'s>>) -> Result<Tensor> {
        let slots = slots.into();
        let (batch, steps) = self.check_input(x)?;
        self.check_decoding(cache, batch, slots, NewTokens::Each(steps))?;
        let layers = self.untracked()?;
        layers.norm_f.forward(&layers.run(&x.detach(), cache, CachePass::Step { slots })?.0)
    }

    /// Checks a cache and slots for all layers, before the first one writes.
    pub(crate) fn check_decoding(&self, cache: &Cache, sequences: usize, slots: Slots, new: NewTokens) -> Result<()> {
        if cache.layers.len() != self.layers.len() {
            let expected = format_args!("states of {} layers", self.layers.len());
            return Err(argument("cache", expected, cache.layers.len()));
        }
        let mut layers = self.layers.iter().zip(&cache.layers);
        layers.try_for_each(|(layer, state)| layer.mixer.check_decoding(state, &self.device, sequences, slots, new))
    }

    /// Checks an input, and gives its batch and length.
    fn check_input(&self, x: &Tensor) -> Result<(usize, usize)> {
        let d_model = self.config.d_model();
        let &[batch, length, width] = x.dims() else {
            return Err(argument("x", format_args!("(batch, length, {d_model})"), format_args!("{:?}", x.dims())));
        };
        if width != d_model {
            return Err(argument("x", format_args!("(batch, length, {d_model})"), format_args!("{:?}", x.dims())));
        }
        if !matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            return Err(argument("x", "f32, f16 or bf16", x.dtype().as_str()));
        }
        check_room("x", x.dims(), DType::F32, &self.device)?;
        Ok((batch, length))
    }

    /// The residual stream before the first layer.
    fn begin(&self, x: &Tensor) -> Result<Tensor> {
        self.check_input(x)?;
        let dtype = if self.config.residual_in_f32 { DType::F32 } else { self.dtype };
        match x.elem_count() {
            0 => Tensor::zeros(x.shape(), dtype, &self.device),
            _ => x.to_dtype(dtype),
        }
    }

    /// The residual stream after the last layer, of whole sequences. Differentiable.
    pub(super) fn stream(&self, x: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<Tensor> {
        let (batch, length) = self.check_input(x)?;
        count_sequences(batch, length, cu_seqlens)?;
        let stream = self.begin(x)?;
        // Of no steps there are no outputs, and candle's operators do not all take such tensors.
        if stream.elem_count() == 0 {
            Ok(stream)
        } else {
            stack::forward(&self.layers, &stream, cu_seqlens, self.left_out(0))
        }
    }

    /// [`stream`](Self::stream) from the states of a cache on, which have been checked, of at least one step.
    pub(super) fn stream_from(&self, x: &Tensor, cache: &Cache, slots: Slots) -> Result<Tensor> {
        self.check_input(x)?;
        stack::forward_carried(&self.layers, &self.begin(x)?, cache, slots, self.left_out(0))
    }

    /// Whether all layers are Mamba blocks alone, for which [`pass`](Self::pass) is.
    pub(super) fn is_mamba(&self) -> bool {
        self.layers.iter().all(|layer| layer.mamba_alone().is_some())
    }

    /// [`stream`](Self::stream) outside of candle's graph, of an input of at least one element, and the way back. Of Mamba blocks.
    pub(super) fn pass(
        &self,
        x: &Tensor,
        cu_seqlens: Option<&[usize]>,
        is_input_wanted: bool,
        converted: &Converted,
    ) -> Result<(Tensor, WayBack)> {
        let (batch, length) = self.check_input(x)?;
        count_sequences(batch, length, cu_seqlens)?;
        stack::pass(&self.layers, &self.begin(x)?, cu_seqlens, is_input_wanted, self.left_out(0), converted)
    }

    /// The layers as a joined step of decoding takes them, first to last; none if there is one that it does not take.
    pub(crate) fn joined(&self) -> Result<Option<Vec<JoinedLayer>>> {
        let joined = |layer: &Layer| match layer.mamba_alone() {
            Some(block) => JoinedLayer::new(&layer.norm, block),
            None => Ok(None),
        };
        self.layers.iter().map(joined).collect::<Result<Option<Vec<_>>>>()
    }

    /// The norm after the last layer.
    pub(crate) fn last_norm(&self) -> &RmsNorm {
        &self.norm_f
    }

    /// Runs the layers on from the states of a cache, which have been checked, and gives the residual stream, and of a draft what each
    /// layer needs to take some of it back.
    pub(super) fn run(&self, x: &Tensor, cache: &Cache, pass: CachePass) -> Result<(Tensor, Vec<LayerDraft>)> {
        let (batch, length) = self.check_input(x)?;
        if let CachePass::Prefill { cu_seqlens, .. } = pass {
            count_sequences(batch, length, cu_seqlens)?;
        }
        let (begin, mut drafts) = (self.begin(x)?, Vec::new());
        if begin.elem_count() == 0 {
            return Ok((begin, drafts));
        }
        // What the layers add is added in place, which must not be seen in the input.
        let stream = begin.detach().force_contiguous()?;
        let mut writes = PoolWrites::default();
        for (layer, state) in self.layers.iter().zip(&cache.layers) {
            let normed = layer.norm.forward(&stream)?;
            drafts.extend(layer.mixer.extend_onto(&stream, &normed, pass, state, &mut writes)?);
            if let Some(y) = layer.feed_forward(&stream)? {
                // In place, as mixers add theirs: the sum is a tensor of its own.
                stream.slice_set(&(&stream + y.to_dtype(stream.dtype())?)?, 0, 0)?;
            }
        }
        writes.write()?;
        Ok((stream, drafts))
    }

    /// The normalised stream that feeds a head, from the residual stream after the last layer.
    pub(super) fn norm_f(&self, stream: &Tensor) -> Result<Tensor> {
        self.norm_f.forward(stream)
    }

    /// The layers themselves where candle tracks nothing, else those without gradients.
    fn untracked(&self) -> Result<Cow<'_, Self>> {
        Ok(if self.parameters.is_tracked() { Cow::Owned(self.detach()?) } else { Cow::Borrowed(self) })
    }

    /// The same layers, sharing their parameters, without gradients. Where training goes on, take new ones after a step.
    pub fn detach(&self) -> Result<Self> {
        self.changed(&mut |_, parameter| parameter.detach())
    }

    /// The same layers with other parameters, see
    /// [`LanguageModel::map_parameters`](super::LanguageModel::map_parameters).
    ///
    /// # Errors
    /// Those of `f`; a tensor of another shape, on another device, or of a type that is none of `f32`, `f16`, `bf16` and
    /// `f64`, by the parameter's name.
    pub fn map_parameters(&self, mut f: impl FnMut(&str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        self.changed(&mut |name, parameter| parameter.replace(name, f(name, parameter.stored())?))
    }

    /// Calls `f` with each parameter and its name, in the order in which the layers use them.
    pub fn visit(&self, f: &mut dyn FnMut(&str, &Tensor)) {
        self.parameters.visit(f);
    }

    /// All parameters by name, in the order in which the layers use them.
    pub fn named_tensors(&self) -> Vec<(String, Tensor)> {
        self.parameters.named_tensors()
    }
}

impl Module for Backbone {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Self::forward(self, x)
    }
}
