//! The language model.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::layers::{Initial, Linear, Parameters};
use super::norm::rms_norm;
use super::{Cache, LanguageModelConfig, LayerCache, Mamba, argument};

/// A language model of Mamba blocks.
///
/// ```text
/// stream  = embeddings(ids)
/// stream += mixer(norm(stream))            for each of n_layer layers
/// logits  = head(norm_f(stream))           the head is the embedding matrix, or a matrix of its own
/// ```
///
/// Norms are RMS norms with weights. Parameters have Hugging Face's names: `backbone.embeddings.weight`,
/// `backbone.layers.N.norm.weight`, `backbone.layers.N.mixer.…`, `backbone.norm_f.weight`, `lm_head.weight`.
#[derive(Debug, Clone)]
pub struct LanguageModel {
    config: LanguageModelConfig,
    dtype: DType,
    /// `(padded_vocab_size, d_model)`.
    embeddings: Tensor,
    layers: Vec<Layer>,
    norm_f: Tensor,
    head: Linear,
}

#[derive(Debug, Clone)]
struct Layer {
    norm: Tensor,
    mixer: Mamba,
}

impl LanguageModel {
    /// A model with the parameters of `vb`, of its type (`f32`, `f16` or `bf16`) and on its device. Those that a
    /// [`VarMap`](candle_nn::VarMap) does not have yet are drawn, from the configuration's seed and their names.
    ///
    /// # Errors
    /// A size that makes no model; a parameter that is missing or of another shape, by name.
    pub fn new(config: &LanguageModelConfig, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        let dtype = vb.dtype();
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(argument("dtype", "f32, f16 or bf16", dtype.as_str()));
        }
        let (d_model, vocab) = (config.mamba.d_model, config.padded_vocab_size());
        let parameters = Parameters::new(vb, config.mamba.seed);
        let backbone = parameters.pp("backbone");
        let norm = |parameters: &Parameters| parameters.get(&[d_model], "weight", Initial::Constant(1.0));
        // The deviation that state-spaces/mamba begins with.
        let embeddings = backbone.pp("embeddings").get(&[vocab, d_model], "weight", Initial::Normal(0.02))?;
        let shrink = if config.rescale_prenorm_residual { (config.n_layer as f64).sqrt() } else { 1.0 };
        let layer = |index: usize| {
            let parameters = backbone.pp("layers").pp(index);
            let mixer = Mamba::with_shrunk_output(&config.mamba, &parameters.pp("mixer"), shrink)?;
            Ok(Layer { norm: norm(&parameters.pp("norm"))?, mixer })
        };
        let layers = (0..config.n_layer).map(layer).collect::<Result<_>>()?;
        let norm_f = norm(&backbone.pp("norm_f"))?;
        let head = if config.tie_embeddings {
            Linear::without_bias(embeddings.clone())
        } else {
            Linear::new(&parameters.pp("lm_head"), [d_model, vocab], false, 1.0)?
        };
        Ok(Self { config: config.clone(), dtype, embeddings, layers, norm_f, head })
    }

    /// The model's sizes and variants.
    pub fn config(&self) -> &LanguageModelConfig {
        &self.config
    }

    /// The type of its activations and of most parameters.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        self.embeddings.device()
    }

    /// The blocks, first to last.
    pub fn mixers(&self) -> impl ExactSizeIterator<Item = &Mamba> {
        self.layers.iter().map(|layer| &layer.mixer)
    }

    /// The logits behind every token: `ids` `(batch, length)` of `u32` to `(batch, length, vocab_size)` of `f32`.
    /// Differentiable.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let stream = self.run(ids, |mixer, _, x| mixer.forward(x), |_| ())?;
        self.logits(&stream)
    }

    /// The logits of sequences that lie one behind another: `ids` is `(1, length)`, and sequence `i` takes the tokens from
    /// `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Each gets what it would get alone. Differentiable.
    pub fn forward_packed(&self, ids: &Tensor, cu_seqlens: &[usize]) -> Result<Tensor> {
        let stream = self.run(ids, |mixer, _, x| mixer.forward_packed(x, cu_seqlens), |_| ())?;
        self.logits(&stream)
    }

    /// The residual stream behind each layer, and last the same normed, which the head reads: `n_layer + 1` tensors
    /// `(batch, length, d_model)`. Differentiable.
    pub fn hidden_states(&self, ids: &Tensor) -> Result<Vec<Tensor>> {
        let mut states = Vec::with_capacity(self.layers.len() + 1);
        let stream = self.run(ids, |mixer, _, x| mixer.forward(x), |stream| states.push(stream.clone()))?;
        states.push(self.norm(&stream, &self.norm_f)?);
        Ok(states)
    }

    /// Zero states for `slots` sequences. `dtype` is that of the states, see [`LayerCache::new`].
    pub fn new_cache(&self, slots: usize, dtype: DType) -> Result<Cache> {
        let layer = |_| LayerCache::new(&self.config.mamba, slots, dtype, self.device());
        Ok(Cache { layers: (0..self.layers.len()).map(layer).collect::<Result<_>>()? })
    }

    /// Reads prompts, or the next chunks of them, from the states of a cache on, and leaves there the states behind them:
    /// `ids` `(batch, length)` to the logits behind the last token of each, `(batch, vocab_size)` of `f32`.
    ///
    /// Row `i` uses slot `slots[i]` of the cache, or slot `i` if there are no `slots`, the cache then having one for each
    /// row. A row whose slot is negative is padding: it touches no state, and its logits mean nothing. [`Cache::reset`]
    /// makes a slot ready for a new sequence.
    ///
    /// # Errors
    /// A bidirectional model; no tokens; a cache or slots that do not fit. Nothing is written then.
    pub fn prefill(&self, ids: &Tensor, cache: &Cache, slots: Option<&[i32]>) -> Result<Tensor> {
        let (batch, length) = ids.dims2()?;
        if length == 0 {
            return Err(argument("ids", "at least one token in every row", "none"));
        }
        self.check_decoding(cache, batch, slots)?;
        let stream = self.run(ids, |mixer, layer, x| mixer.prefill(x, &cache.layers[layer], slots), |_| ())?;
        self.logits(&stream.narrow(1, length - 1, 1)?.squeeze(1)?)
    }

    /// As [`LanguageModel::prefill`], for prompts of several lengths that lie one behind another as in
    /// [`LanguageModel::forward_packed`]; prompt `i` uses slot `slots[i]`. Gives `(prompts, vocab_size)`.
    pub fn prefill_packed(
        &self,
        ids: &Tensor,
        cu_seqlens: &[usize],
        cache: &Cache,
        slots: Option<&[i32]>,
    ) -> Result<Tensor> {
        let mut last = Vec::with_capacity(cu_seqlens.len());
        for ends in cu_seqlens.windows(2) {
            if ends[0] >= ends[1] {
                return Err(argument("cu_seqlens", "at least one token in every prompt", format_args!("{ends:?}")));
            }
            last.push(ends[1] as u32 - 1);
        }
        // What else can be wrong with them is found before the first layer's states are written.
        self.check_decoding(cache, last.len(), slots)?;
        let stream =
            self.run(ids, |mixer, layer, x| mixer.prefill_packed(x, cu_seqlens, &cache.layers[layer], slots), |_| ())?;
        let last = Tensor::new(last, self.device())?;
        self.logits(&stream.squeeze(0)?.index_select(&last, 0)?)
    }

    /// Reads the next token of each sequence: `ids` `(batch)` to the logits behind it, `(batch, vocab_size)` of `f32`.
    /// Cache and slots are those of [`LanguageModel::prefill`].
    ///
    /// # Errors
    /// As [`LanguageModel::prefill`].
    pub fn step(&self, ids: &Tensor, cache: &Cache, slots: Option<&[i32]>) -> Result<Tensor> {
        let batch = ids.dims1()?;
        self.check_decoding(cache, batch, slots)?;
        let ids = ids.reshape((batch, 1))?;
        let stream = self.run(&ids, |mixer, layer, x| mixer.step(x, &cache.layers[layer], slots), |_| ())?;
        self.logits(&stream.squeeze(1)?)
    }

    /// Checks a cache and slots for all layers, before the first one writes.
    fn check_decoding(&self, cache: &Cache, sequences: usize, slots: Option<&[i32]>) -> Result<()> {
        if cache.layers.len() != self.layers.len() {
            let expected = format_args!("states of {} layers", self.layers.len());
            return Err(argument("cache", expected, cache.layers.len()));
        }
        for (layer, cache) in self.layers.iter().zip(&cache.layers) {
            layer.mixer.check_causal()?;
            cache.check(&self.config.mamba, sequences, slots)?;
        }
        Ok(())
    }

    /// Runs the layers with `mix` in the place of the mixer, and gives the residual stream, which `see` sees behind each.
    fn run(
        &self,
        ids: &Tensor,
        mix: impl Fn(&Mamba, usize, &Tensor) -> Result<Tensor>,
        mut see: impl FnMut(&Tensor),
    ) -> Result<Tensor> {
        let (batch, length) = ids.dims2()?;
        let d_model = self.config.mamba.d_model;
        let stream_dtype = if self.config.residual_in_f32 { DType::F32 } else { self.dtype };
        let embedded = self.embeddings.index_select(&ids.flatten_all()?, 0)?;
        let mut stream = embedded.reshape((batch, length, d_model))?.to_dtype(stream_dtype)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let mixed = mix(&layer.mixer, index, &self.norm(&stream, &layer.norm)?)?;
            stream = (stream + mixed.to_dtype(stream_dtype)?)?;
            see(&stream);
        }
        Ok(stream)
    }

    fn norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        rms_norm(x, Some(weight), self.config.norm_eps, self.dtype)
    }

    fn logits(&self, stream: &Tensor) -> Result<Tensor> {
        self.head.forward(&self.norm(stream, &self.norm_f)?)?.to_dtype(DType::F32)
    }

    /// The same model, sharing its parameters, without gradients: prefill and decoding with it record nothing. Where
    /// training goes on, take a new one after a step.
    pub fn detach(&self) -> Result<Self> {
        let layer = |layer: &Layer| Ok(Layer { norm: layer.norm.detach(), mixer: layer.mixer.detach()? });
        Ok(Self {
            config: self.config.clone(),
            dtype: self.dtype,
            embeddings: self.embeddings.detach(),
            layers: self.layers.iter().map(layer).collect::<Result<_>>()?,
            norm_f: self.norm_f.detach(),
            head: self.head.map(&Tensor::detach),
        })
    }

    /// All parameters by Hugging Face's names, in the order in which the model uses them; `lm_head.weight` only if it is
    /// not the embedding matrix.
    pub fn named_tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = vec![("backbone.embeddings.weight".to_string(), self.embeddings.clone())];
        for (index, layer) in self.layers.iter().enumerate() {
            tensors.push((format!("backbone.layers.{index}.norm.weight"), layer.norm.clone()));
            layer.mixer.name_tensors(&format!("backbone.layers.{index}.mixer"), &mut tensors);
        }
        tensors.push(("backbone.norm_f.weight".into(), self.norm_f.clone()));
        if !self.config.tie_embeddings {
            self.head.name_tensors("lm_head", &mut tensors);
        }
        tensors
    }
}
