//! What models are made of: sizes and variants.

use std::collections::BTreeMap;

use candle_core::Result;
use serde_json::{Map, Value};

use super::MixerConfig;
use crate::nn::{
    AttentionConfig, COUNTABLE, FeedForwardConfig, MambaConfig, RecurrentConfig, argument, check_eps, sum,
};

/// A layer: what it mixes its sequence with, and what follows for every step by itself. Each has a norm before it.
///
/// A hybrid is a list of them, whose widths are one:
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::{VarBuilder, VarMap};
/// use selective_scan::nn::{AttentionConfig, ExpertsConfig, LanguageModel, LanguageModelConfig, LayerConfig};
/// use selective_scan::nn::{MambaConfig, MlpConfig};
///
/// // Mamba with an MLP after it, and between two of these attention, four heads of which share two of keys, with four experts
/// // of which each token goes through two.
/// let mamba = LayerConfig::new(MambaConfig::new(32), MlpConfig::new(32, 64));
/// let attention = AttentionConfig { n_kv_head: 2, ..AttentionConfig::new(32, 4) };
/// let attention = LayerConfig::new(attention, ExpertsConfig::new(32, 48, 4, 2));
/// let config = LanguageModelConfig::with_layers(16, [mamba.clone(), attention, mamba]);
///
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let model = LanguageModel::new(&config, vb)?;
/// let logits = model.forward(&Tensor::new(&[[3u32, 1, 4, 1, 5]], &Device::Cpu)?)?;
/// assert_eq!(logits.dims(), [1, 5, 16]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// A layer without a feed-forward part comes [`from`](From) a mixer's configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerConfig {
    /// The mixer.
    pub mixer: MixerConfig,
    /// What follows, if anything does.
    pub feed_forward: Option<FeedForwardConfig>,
}

impl LayerConfig {
    /// A layer with a feed-forward part.
    pub fn new(mixer: impl Into<MixerConfig>, feed_forward: impl Into<FeedForwardConfig>) -> Self {
        Self { mixer: mixer.into(), feed_forward: Some(feed_forward.into()) }
    }

    fn check(&self) -> Result<()> {
        self.mixer.check()?;
        let Some(feed_forward) = &self.feed_forward else { return Ok(()) };
        feed_forward.check()?;
        if feed_forward.d_model() != self.mixer.d_model() {
            let expected = format_args!("a width of {}, as the mixer's", self.mixer.d_model());
            return Err(argument("feed_forward", expected, feed_forward.d_model()));
        }
        Ok(())
    }

    /// The number of parameters, its norms' among them.
    fn parameter_count(&self) -> Result<usize> {
        let of_rest = self.feed_forward.as_ref().map_or(Ok(0), FeedForwardConfig::parameter_count)?;
        let norms = if self.feed_forward.is_some() { 2 } else { 1 };
        let count = self.mixer.parameter_count()?.checked_add(of_rest);
        count
            .and_then(|count| count.checked_add(self.mixer.d_model().checked_mul(norms)?))
            .ok_or_else(|| argument("layers", "layers whose parameters can be counted", self.mixer.d_model()))
    }
}

/// A mixer alone, as in Mamba.
impl From<MixerConfig> for LayerConfig {
    fn from(mixer: MixerConfig) -> Self {
        Self { mixer, feed_forward: None }
    }
}

impl From<MambaConfig> for LayerConfig {
    fn from(config: MambaConfig) -> Self {
        MixerConfig::from(config).into()
    }
}

impl From<RecurrentConfig> for LayerConfig {
    fn from(config: RecurrentConfig) -> Self {
        MixerConfig::from(config).into()
    }
}

impl From<AttentionConfig> for LayerConfig {
    fn from(config: AttentionConfig) -> Self {
        MixerConfig::from(config).into()
    }
}

/// A stack of layers: `n_layer` times a norm and a mixer around which the residual stream runs, with or without a norm and a
/// feed-forward part after it, and a last norm.
#[derive(Debug, Clone, PartialEq)]
pub struct BackboneConfig {
    /// The number of layers.
    pub n_layer: usize,
    /// What the layers mix their sequences with.
    pub mixer: MixerConfig,
    /// What follows after a mixer, if anything does.
    pub feed_forward: Option<FeedForwardConfig>,
    /// The layers that are others, by index from 0. Their width is that of `mixer`, from whose seed the weights of all layers are
    /// drawn.
    pub layers: BTreeMap<usize, LayerConfig>,
    /// So many layers one after the other have one set of weights, all of a layer's (immediate sharing; Liu et al. 2024, *MobileLLM*,
    /// arXiv 2402.14905): a deeper model of no more parameters. 1 where each has its own; as many as there are where all have one
    /// (Lan et al. 2020, *ALBERT*, arXiv 1909.11942). The first of each such group gives its parameters their names; each layer
    /// has a state of its own when decoding. It divides `n_layer`.
    pub tie_layers: usize,
    /// Added to the mean square in the RMS norms before the mixers and the feed-forward parts, 1e-5 in Mamba's paper.
    pub norm_eps: f64,
    /// Keep the residual stream in `f32` where the model is of a half type.
    pub residual_in_f32: bool,
    /// At initialization, shrink what projects back to the residual stream by the root of how many such projections there are
    /// (`n_layer`, or twice that where there are feed-forward parts), so that the stream does not grow with depth.
    pub rescale_prenorm_residual: bool,
}

impl BackboneConfig {
    /// `n_layer` blocks as Mamba's paper has them.
    pub fn new(n_layer: usize, d_model: usize) -> Self {
        Self::with_mixer(n_layer, MambaConfig::new(d_model))
    }

    /// `n_layer` layers with this mixer.
    pub fn with_mixer(n_layer: usize, mixer: impl Into<MixerConfig>) -> Self {
        Self {
            n_layer,
            mixer: mixer.into(),
            feed_forward: None,
            layers: BTreeMap::new(),
            tie_layers: 1,
            norm_eps: 1e-5,
            residual_in_f32: true,
            rescale_prenorm_residual: true,
        }
    }

    /// These layers one after the other: [`mixer`](Self::mixer) and [`feed_forward`](Self::feed_forward) are the first's, and
    /// [`layers`](Self::layers) has those that differ from it.
    pub fn with_layers(layers: impl IntoIterator<Item = LayerConfig>) -> Self {
        let layers: Vec<_> = layers.into_iter().collect();
        // A model of no layers is refused when it is made, whatever they would have been.
        let first = layers.first().cloned().unwrap_or_else(|| MambaConfig::new(1).into());
        let n_layer = layers.len();
        let others = layers.into_iter().enumerate().filter(|(_, layer)| *layer != first).collect();
        Self { feed_forward: first.feed_forward, layers: others, ..Self::with_mixer(n_layer, first.mixer) }
    }

    /// The width of the residual stream.
    pub fn d_model(&self) -> usize {
        self.mixer.d_model()
    }

    /// Layer number `index`.
    pub fn layer(&self, index: usize) -> LayerConfig {
        self.layers.get(&index).cloned().unwrap_or_else(|| self.common())
    }

    /// The layers that are not listed.
    fn common(&self) -> LayerConfig {
        LayerConfig { mixer: self.mixer.clone(), feed_forward: self.feed_forward.clone() }
    }

    /// By what initial projections back to the residual stream are divided.
    pub(super) fn divisor(&self) -> f64 {
        if !self.rescale_prenorm_residual {
            return 1.0;
        }
        let others = self.layers.values().map(|layer| &layer.feed_forward);
        let has_more = others.chain([&self.feed_forward]).any(Option::is_some);
        (self.n_layer as f64 * if has_more { 2.0 } else { 1.0 }).sqrt()
    }

    /// The layer whose weights layer number `index` has: itself, or one before it.
    pub(crate) fn owner(&self, index: usize) -> usize {
        // A step of 0 is refused by `check`.
        index - index % self.tie_layers.max(1)
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.n_layer == 0 {
            return Err(argument("n_layer", "at least 1", 0));
        }
        if self.tie_layers == 0 || !self.n_layer.is_multiple_of(self.tie_layers) {
            let expected = format_args!("a divisor of n_layer = {}", self.n_layer);
            return Err(argument("tie_layers", expected, self.tie_layers));
        }
        check_eps("norm_eps", self.norm_eps)?;
        self.common().check()?;
        for (&index, layer) in &self.layers {
            if index >= self.n_layer {
                return Err(argument("layers", format_args!("layers below {}", self.n_layer), index));
            }
            layer.check()?;
            if layer.mixer.d_model() != self.d_model() {
                let expected = format_args!("layers of width {}, as `mixer`", self.d_model());
                return Err(argument("layers", expected, format_args!("{} for layer {index}", layer.mixer.d_model())));
            }
            let group = self.owner(index)..self.owner(index) + self.tie_layers;
            if let Some(other) = group.into_iter().find(|&other| self.layer(other) != *layer) {
                let expected = format_args!("layers {other} and {index}, which share their weights, to be alike");
                return Err(argument("layers", expected, "two that differ"));
            }
        }
        self.parameter_count().map(|_| ())
    }

    /// The number of parameters.
    ///
    /// # Errors
    /// More than can be counted.
    pub(crate) fn parameter_count(&self) -> Result<usize> {
        let (d_model, owners) = (self.d_model(), self.n_layer / self.tie_layers.max(1));
        let own = self.layers.iter().filter(|(index, _)| self.owner(**index) == **index);
        let alike = owners.saturating_sub(own.clone().count());
        let mut count = sum(&[[alike, self.common().parameter_count()?, 1], [d_model, 1, 1]]);
        for (_, layer) in own {
            let others = layer.parameter_count()?;
            count = count.and_then(|count| count.checked_add(others));
        }
        count
            .filter(|count| *count <= COUNTABLE)
            .ok_or_else(|| argument("n_layer", "layers whose parameters can be counted", self.n_layer))
    }
}

/// A language model: embeddings, a backbone, and the head.
#[derive(Debug, Clone, PartialEq)]
pub struct LanguageModelConfig {
    /// The number of tokens. Where the embedding matrix has more rows, see
    /// [`padded_vocab_size`](Self::padded_vocab_size), those from here on are padding, and no token.
    pub vocab_size: usize,
    /// The embedding matrix has as many rows as the vocabulary rounded up to a multiple of this: 1 without padding.
    pub pad_vocab_size_multiple: usize,
    /// The layers.
    pub backbone: BackboneConfig,
    /// Use the embedding matrix as the head.
    pub tie_embeddings: bool,
    /// What else a config.json says, key by key: the ids of special tokens, what other programs have left there. It is
    /// written again where the format has room for it, see [`to_json`](Self::to_json). Keys that the other fields stand
    /// for are ignored here, and a special token that is not here is none.
    pub extra: Map<String, Value>,
}

impl LanguageModelConfig {
    /// A model of `n_layer` blocks as Mamba's paper has them.
    pub fn new(vocab_size: usize, n_layer: usize, d_model: usize) -> Self {
        Self::with_mixer(vocab_size, n_layer, MambaConfig::new(d_model))
    }

    /// A model of `n_layer` layers with this mixer.
    pub fn with_mixer(vocab_size: usize, n_layer: usize, mixer: impl Into<MixerConfig>) -> Self {
        Self {
            vocab_size,
            pad_vocab_size_multiple: 1,
            backbone: BackboneConfig::with_mixer(n_layer, mixer),
            tie_embeddings: true,
            extra: Map::new(),
        }
    }

    /// A model of these layers, see [`LayerConfig`].
    pub fn with_layers(vocab_size: usize, layers: impl IntoIterator<Item = LayerConfig>) -> Self {
        let backbone = BackboneConfig::with_layers(layers);
        Self { backbone, ..Self::new(vocab_size, 1, 1) }
    }

    /// The width of the residual stream.
    pub fn d_model(&self) -> usize {
        self.backbone.d_model()
    }

    /// The rows of the embedding matrix and of the head, and so the width of the logits: `vocab_size` rounded up to a
    /// multiple of `pad_vocab_size_multiple`. What the rows from `vocab_size` on answer means nothing;
    /// [`Sampling::vocab_size`](crate::nn::Sampling::vocab_size) keeps a sampler from choosing them.
    pub fn padded_vocab_size(&self) -> usize {
        // What overflows is refused by `check`.
        self.vocab_size.checked_next_multiple_of(self.pad_vocab_size_multiple).unwrap_or(self.vocab_size)
    }

    /// The tokens that end a text, by the key `eos_token_id` of [`extra`](Self::extra), which has one or a list.
    pub fn eos_token_ids(&self) -> Vec<u32> {
        match self.extra.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.iter().filter_map(token).collect(),
            id => id.and_then(token).into_iter().collect(),
        }
    }

    /// The token that begins a text, by the key `bos_token_id` of [`extra`](Self::extra).
    pub fn bos_token_id(&self) -> Option<u32> {
        self.extra.get("bos_token_id").and_then(token)
    }

    /// The token that fills up shorter rows of a batch, by the key `pad_token_id` of [`extra`](Self::extra).
    pub fn pad_token_id(&self) -> Option<u32> {
        self.extra.get("pad_token_id").and_then(token)
    }

    pub(crate) fn check(&self) -> Result<()> {
        let sizes = [("vocab_size", self.vocab_size), ("pad_vocab_size_multiple", self.pad_vocab_size_multiple)];
        for (name, size) in sizes {
            if size == 0 {
                return Err(argument(name, "at least 1", size));
            }
        }
        if self.vocab_size.checked_next_multiple_of(self.pad_vocab_size_multiple).is_none() {
            let got = format_args!("{} rounded up to a multiple of {}", self.vocab_size, self.pad_vocab_size_multiple);
            return Err(argument("vocab_size", "a size that a matrix can have", got));
        }
        self.backbone.check()?;
        // Samplers give tokens as `u32`.
        if u32::try_from(self.vocab_size).is_err() {
            return Err(argument("vocab_size", "less than 2^32", self.vocab_size));
        }
        self.parameter_count().map(|_| ())
    }

    /// The number of parameters of a model.
    ///
    /// # Errors
    /// More than can be counted.
    pub fn parameter_count(&self) -> Result<usize> {
        let d_model = self.d_model();
        let matrices = if self.tie_embeddings { 1 } else { 2 };
        let embeddings = sum(&[[self.padded_vocab_size(), d_model, matrices]]).filter(|count| *count <= COUNTABLE);
        let embeddings = embeddings.ok_or_else(|| {
            let got = format_args!("{} and {d_model}", self.vocab_size);
            argument("vocab_size, d_model", "sizes whose parameters can be counted", got)
        })?;
        let count = self.backbone.parameter_count()?.checked_add(embeddings);
        count
            .filter(|count| *count <= COUNTABLE)
            .ok_or_else(|| argument("n_layer", "layers whose parameters can be counted", self.backbone.n_layer))
    }
}

fn token(id: &Value) -> Option<u32> {
    id.as_u64()?.try_into().ok()
}
