//! The language model.

use std::borrow::Cow;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::embedding::Tokens;
use super::layers::Linear;
use super::norm::rms_norm;
use super::parameters::{Change, Initial, Parameter, Parameters, named};
use super::{Cache, LanguageModelConfig, LayerCache, Mamba, argument, check_room};

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
///
/// # Token ids
/// `ids` are integers of any type that candle has, each below
/// [`padded_vocab_size`](LanguageModelConfig::padded_vocab_size); every call looks at all of them before it does anything,
/// and an error names the first that is none. They may lie on the processor
/// whatever the model's device: there the look costs nothing. Ids that lie on a GPU are copied from it, for which the call
/// waits until the device has done all that comes before them, once in a call.
#[derive(Debug, Clone)]
pub struct LanguageModel {
    config: LanguageModelConfig,
    dtype: DType,
    /// `(padded_vocab_size, d_model)`.
    embeddings: Parameter,
    layers: Vec<Layer>,
    norm_f: Parameter,
    /// None if the embedding matrix is the head.
    head: Option<Linear>,
    /// Whether candle tracks a parameter.
    tracked: bool,
}

#[derive(Debug, Clone)]
struct Layer {
    norm: Parameter,
    mixer: Mamba,
}

impl LanguageModel {
    /// A model with the parameters of `vb`, which computes in its type (`f32`, `f16` or `bf16`) and on its device. Those
    /// that a [`VarMap`](candle_nn::VarMap) does not have yet are drawn, from the configuration's seed and their names;
    /// variables of another type that it has are trained as they are, see [types](super#types).
    ///
    /// # Errors
    /// A size that makes no model, or one that does not fit in memory; a parameter that is missing or of another shape, by
    /// name.
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
        backbone.pp("embeddings").check_room("weight", "n_layer, d_model, d_inner", config.parameter_count()?)?;
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
        let untied = || Linear::new(&parameters.pp("lm_head"), [d_model, vocab], false, 1.0);
        let head = (!config.tie_embeddings).then(untied).transpose()?;
        let model = Self { config: config.clone(), dtype, embeddings, layers, norm_f, head, tracked: false };
        model.map(&mut |_, parameter| Ok(parameter.clone()))
    }

    /// The model's sizes and variants.
    pub fn config(&self) -> &LanguageModelConfig {
        &self.config
    }

    /// The type in which it computes: that of activations and matrices. The variables of one that is trained may be of
    /// another.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        self.embeddings.stored().device()
    }

    /// The blocks, first to last.
    pub fn mixers(&self) -> impl ExactSizeIterator<Item = &Mamba> {
        self.layers.iter().map(|layer| &layer.mixer)
    }

    /// The logits behind every token: `ids` `(batch, length)` to `(batch, length, vocab_size)` of `f32`. Differentiable.
    /// Of no tokens there are no logits.
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
    /// Not differentiable, since the states are written in place: candle tracks neither the logits nor the states, and a
    /// backward pass from them reaches no parameter. To train, use [`forward`](Self::forward). A model that is decoded with
    /// for long is best [detached](Self::detach) once, or else every call does that.
    ///
    /// # Errors
    /// A bidirectional model; a row without tokens; ids beyond the vocabulary; a cache or slots that do not fit. Nothing is
    /// written then.
    pub fn prefill(&self, ids: &Tensor, cache: &Cache, slots: Option<&[i32]>) -> Result<Tensor> {
        let (batch, length) = check_ids(ids)?;
        if length == 0 && batch > 0 {
            return Err(argument("ids", "at least one token in every row", "none"));
        }
        self.check_decoding(cache, batch, slots)?;
        let model = self.untracked()?;
        let stream = model.run(ids, |mixer, layer, x| mixer.prefill(x, &cache.layers[layer], slots), |_| ())?;
        match batch {
            0 => model.no_logits(&[0]),
            _ => model.logits(&stream.narrow(1, length - 1, 1)?.squeeze(1)?),
        }
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
        check_ids(ids)?;
        let mut last = Vec::with_capacity(cu_seqlens.len());
        for ends in cu_seqlens.windows(2) {
            if ends[0] >= ends[1] {
                return Err(argument("cu_seqlens", "at least one token in every prompt", format_args!("{ends:?}")));
            }
            last.push(ends[1] as i64 - 1);
        }
        // What else can be wrong with them is found before the first layer's states are written.
        self.check_decoding(cache, last.len(), slots)?;
        let model = self.untracked()?;
        let prefill =
            |mixer: &Mamba, layer: usize, x: &Tensor| mixer.prefill_packed(x, cu_seqlens, &cache.layers[layer], slots);
        let stream = model.run(ids, prefill, |_| ())?;
        if last.is_empty() {
            return model.no_logits(&[0]);
        }
        model.logits(&stream.squeeze(0)?.index_select(&Tensor::new(last, self.device())?, 0)?)
    }

    /// Reads the next token of each sequence: `ids` `(batch)` to the logits behind it, `(batch, vocab_size)` of `f32`.
    /// Cache and slots are those of [`LanguageModel::prefill`]; not differentiable, as that.
    ///
    /// # Errors
    /// As [`LanguageModel::prefill`].
    pub fn step(&self, ids: &Tensor, cache: &Cache, slots: Option<&[i32]>) -> Result<Tensor> {
        let &[batch] = ids.dims() else {
            return Err(argument("ids", "shape (batch)", format_args!("{:?}", ids.dims())));
        };
        self.check_decoding(cache, batch, slots)?;
        let (model, ids) = (self.untracked()?, ids.reshape((batch, 1))?);
        let stream = model.run(&ids, |mixer, layer, x| mixer.step(x, &cache.layers[layer], slots), |_| ())?;
        model.logits(&stream.squeeze(1)?)
    }

    /// Checks a cache and slots for all layers, before the first one writes.
    fn check_decoding(&self, cache: &Cache, sequences: usize, slots: Option<&[i32]>) -> Result<()> {
        if cache.layers.len() != self.layers.len() {
            let expected = format_args!("states of {} layers", self.layers.len());
            return Err(argument("cache", expected, cache.layers.len()));
        }
        for (layer, cache) in self.layers.iter().zip(&cache.layers) {
            layer.mixer.check_causal()?;
            cache.check(&self.config.mamba, self.device(), sequences, slots)?;
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
        let ((batch, length), d_model) = (check_ids(ids)?, self.config.mamba.d_model);
        let shape = [batch, length, d_model];
        check_room("ids", &shape, DType::F32, self.device())?;
        let tokens = Tokens::read(ids, self.config.padded_vocab_size())?;
        let stream_dtype = if self.config.residual_in_f32 { DType::F32 } else { self.dtype };
        if tokens.len() == 0 {
            // Nothing is computed, for candle's operators do not all take it, but the mixers check their arguments.
            let (x, stream) = (
                Tensor::zeros(&shape, self.dtype, self.device())?,
                Tensor::zeros(&shape, stream_dtype, self.device())?,
            );
            for (index, layer) in self.layers.iter().enumerate() {
                mix(&layer.mixer, index, &x)?;
                see(&stream);
            }
            return Ok(stream);
        }
        let mut stream = tokens.embed(&self.embeddings)?.reshape(&shape)?.to_dtype(stream_dtype)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let mixed = mix(&layer.mixer, index, &self.norm(&stream, &layer.norm)?)?;
            stream = (stream + mixed.to_dtype(stream_dtype)?)?;
            see(&stream);
        }
        Ok(stream)
    }

    fn norm(&self, x: &Tensor, weight: &Parameter) -> Result<Tensor> {
        rms_norm(x, Some(&weight.tensor()?), self.config.norm_eps, self.dtype)
    }

    fn logits(&self, stream: &Tensor) -> Result<Tensor> {
        let rows = &stream.dims()[..stream.rank() - 1];
        if stream.elem_count() == 0 {
            return self.no_logits(rows);
        }
        check_room("ids", &[rows, &[self.config.padded_vocab_size()]].concat(), DType::F32, self.device())?;
        let normed = self.norm(stream, &self.norm_f)?;
        let logits = match &self.head {
            Some(head) => head.forward(&normed)?,
            None => Linear::without_bias(self.embeddings.clone()).forward(&normed)?,
        };
        logits.to_dtype(DType::F32)
    }

    /// The logits of rows of which there are none.
    fn no_logits(&self, rows: &[usize]) -> Result<Tensor> {
        Tensor::zeros([rows, &[self.config.padded_vocab_size()]].concat(), DType::F32, self.device())
    }

    /// The model itself where candle tracks nothing, else one without gradients.
    fn untracked(&self) -> Result<Cow<'_, Self>> {
        Ok(if self.tracked { Cow::Owned(self.detach()?) } else { Cow::Borrowed(self) })
    }

    fn map(&self, f: &mut Change) -> Result<Self> {
        let mut tracked = false;
        let mut f = |name: &str, parameter: &Parameter| {
            let changed = f(name, parameter)?;
            tracked |= changed.is_tracked();
            Ok(changed)
        };
        let embeddings = f("backbone.embeddings.weight", &self.embeddings)?;
        let mut layers = Vec::with_capacity(self.layers.len());
        for (index, Layer { norm, mixer }) in self.layers.iter().enumerate() {
            let prefix = format!("backbone.layers.{index}");
            let norm = f(&format!("{prefix}.norm.weight"), norm)?;
            layers.push(Layer { norm, mixer: mixer.map(&format!("{prefix}.mixer."), &mut f)? });
        }
        let norm_f = f("backbone.norm_f.weight", &self.norm_f)?;
        let head = self.head.as_ref().map(|head| head.map("lm_head.", &mut f)).transpose()?;
        Ok(Self { config: self.config.clone(), dtype: self.dtype, embeddings, layers, norm_f, head, tracked })
    }

    /// The same model, sharing its parameters, without gradients. Where training goes on, take a new one after a step: A,
    /// and what the model needs in another type than the variables have, are computed here.
    pub fn detach(&self) -> Result<Self> {
        self.map(&mut |_, parameter| parameter.detach())
    }

    /// The same model with other parameters: `f` gets each with the name that [`named_tensors`](Self::named_tensors) gives
    /// it, and what it gives stands in its place, of the same shape and on the same device. The types in which the model
    /// computes stay as they are. Where `f` computes its result from variables, gradients come to these:
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor, Var};
    /// # use candle_nn::{VarBuilder, VarMap};
    /// # use selective_scan::nn::{LanguageModel, LanguageModelConfig};
    /// # let device = Device::Cpu;
    /// # let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &device);
    /// # let model = LanguageModel::new(&LanguageModelConfig::new(16, 1, 32), vb)?.detach()?;
    /// // An adapter of rank 2 beside a frozen matrix (Hu et al. 2021, arXiv 2106.09685).
    /// let name = "backbone.layers.0.mixer.out_proj.weight"; // (32, 64)
    /// let (up, down) = (Var::zeros((32, 2), DType::F32, &device)?, Var::randn(0f32, 0.1, (2, 64), &device)?);
    /// // Anew in every step of training, for what `f` gives is computed once.
    /// let adapted = model.map_parameters(|n, w| if n == name { w + up.matmul(&down)? } else { Ok(w.clone()) })?;
    /// let loss = adapted.forward(&Tensor::new(&[[1u32, 2, 3]], &device)?)?.sqr()?.mean_all()?;
    /// assert!(loss.backward()?.get(&up).is_some());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of `f`; a tensor of another shape, on another device, or of a type that is none of `f32`, `f16`, `bf16` and
    /// `f64`, by the parameter's name.
    pub fn map_parameters(&self, mut f: impl FnMut(&str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        self.map(&mut |name, parameter| parameter.replace(name, f(name, parameter.stored())?))
    }

    /// All parameters by Hugging Face's names, in the order in which the model uses them; `lm_head.weight` only if it is
    /// not the embedding matrix. They are what the model was built on, of their own types.
    pub fn named_tensors(&self) -> Vec<(String, Tensor)> {
        named(|f| self.map(f))
    }
}

/// The shape of ids of whole sequences.
fn check_ids(ids: &Tensor) -> Result<(usize, usize)> {
    match ids.dims() {
        &[batch, length] => Ok((batch, length)),
        dims => Err(argument("ids", "shape (batch, length)", format_args!("{dims:?}"))),
    }
}
