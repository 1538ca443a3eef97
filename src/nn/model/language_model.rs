//! The language model.

use std::borrow::Cow;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Module, VarBuilder};

use super::{Backbone, Drops, LanguageModelConfig, LayerDraft, Mixer};
use crate::candle::Slots;
use crate::count_sequences;
use crate::nn::decode::Draft;
use crate::nn::layers::{Change, Initial, Linear, Parameter, ParameterList, Parameters, Tokens};
use crate::nn::mamba::CachePass;
use crate::nn::train::{LossOptions, Targets};
use crate::nn::{Cache, NewTokens, argument, check_model_dtype, check_room};

/// A language model.
///
/// ```text
/// stream  = embeddings(ids)
/// stream += mixer(norm(stream))            for each of n_layer layers
/// stream += feed_forward(norm_ff(stream))  where there is one
/// logits  = head(norm_f(stream))           the head is the embedding matrix, or a matrix of its own
/// ```
///
/// Norms are RMS norms with weights. Parameters have Hugging Face's names: `backbone.embeddings.weight`,
/// `backbone.layers.N.norm.weight`, `backbone.layers.N.mixer.…`, `backbone.norm_f.weight`, `lm_head.weight`; a feed-forward part is
/// `backbone.layers.N.norm_ff.weight` and `backbone.layers.N.feed_forward.…`.
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
    /// `(padded_vocab_size, d_model)`.
    embeddings: Parameter,
    backbone: Backbone,
    /// None if the embedding matrix is the head.
    head: Option<Linear>,
    parameters: ParameterList,
}

impl LanguageModel {
    /// A model with the parameters of `vb`, which computes in its type (`f32`, `f16` or `bf16`) and on its device. Those
    /// that a [`VarMap`](candle_nn::VarMap) does not have yet are drawn, from the configuration's seed and their names;
    /// variables of another type that it has are trained as they are, see [types](crate::nn#types).
    ///
    /// # Errors
    /// A size that makes no model, or one that does not fit in memory; a parameter that is missing or of another shape, by
    /// name.
    pub fn new(config: &LanguageModelConfig, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        let (dtype, device) = (check_model_dtype(vb.dtype())?, vb.device().clone());
        let parameters = Parameters::new(vb, config.backbone.mixer.seed());
        let embeddings = parameters.pp("backbone").pp("embeddings");
        embeddings.check_room("weight", "n_layer, d_model, d_inner", config.parameter_count()?)?;
        Self::build(config, dtype, &device, &parameters)
    }

    fn build(config: &LanguageModelConfig, dtype: DType, device: &Device, parameters: &Parameters) -> Result<Self> {
        let (count, d_model, vocab) = (parameters.count(), config.d_model(), config.padded_vocab_size());
        let backbone = parameters.pp("backbone");
        // The deviation that state-spaces/mamba begins with.
        let embeddings = backbone.pp("embeddings").get(&[vocab, d_model], "weight", Initial::Normal(0.02))?;
        let backbone = Backbone::build(&config.backbone, dtype, device, &backbone)?;
        let untied = || Linear::new(&parameters.pp("lm_head"), [d_model, vocab], false, 1.0);
        let head = (!config.tie_embeddings).then(untied).transpose()?;
        let parameters = parameters.taken_since(count);
        Ok(Self { config: config.clone(), embeddings, backbone, head, parameters })
    }

    /// The same model, each parameter as `change` gives it.
    fn changed(&self, change: &mut Change) -> Result<Self> {
        let parameters = Parameters::changed(&self.parameters, change);
        let changed = Self::build(&self.config, self.dtype(), self.device(), &parameters)?;
        changed.with_drops(self.backbone.drops())
    }

    /// The same model, sharing its parameters with their gradients, whose whole passes and losses leave that out of what layers add:
    /// for a step of training. [`Trainer::step_tokens`](crate::nn::train::Trainer::step_tokens) does so by itself. With
    /// [`Drops::default`] nothing is left out.
    ///
    /// # Errors
    /// A probability below 0, or of 1 or more.
    pub fn with_drops(&self, drops: Drops) -> Result<Self> {
        Ok(Self { backbone: self.backbone.with_drops(drops)?, ..self.clone() })
    }

    /// The model's sizes and variants.
    pub fn config(&self) -> &LanguageModelConfig {
        &self.config
    }

    /// The type in which it computes: that of activations and matrices. The variables of one that is trained may be of
    /// another.
    pub fn dtype(&self) -> DType {
        self.backbone.dtype()
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        self.backbone.device()
    }

    /// The embedding matrix.
    pub(super) fn embeddings(&self) -> &Parameter {
        &self.embeddings
    }

    /// The embedding matrix and the matrix of the head, in the type in which the model computes.
    pub(crate) fn ends(&self) -> Result<[Tensor; 2]> {
        let head = self.head.as_ref().map_or(&self.embeddings, Linear::weight);
        Ok([self.embeddings.tensor()?, head.tensor()?])
    }

    /// The head, if it is a matrix of its own.
    pub(super) fn head(&self) -> Option<&Linear> {
        self.head.as_ref()
    }

    /// The parameters.
    pub(super) fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.parameters.iter()
    }

    /// The parameters that a backward pass could reach.
    pub(super) fn tracked(&self) -> Vec<Tensor> {
        self.parameters.tracked()
    }

    /// The layers between embeddings and head.
    pub fn backbone(&self) -> &Backbone {
        &self.backbone
    }

    /// The mixers, first to last.
    pub fn mixers(&self) -> impl ExactSizeIterator<Item = &Mixer> {
        self.backbone.mixers()
    }

    /// The embeddings of tokens: `ids` `(batch, length)` to `(batch, length, d_model)` of `f32`. Differentiable.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let ((batch, length), d_model) = (check_ids(ids)?, self.config.d_model());
        let shape = [batch, length, d_model];
        check_room("ids", &shape, DType::F32, self.device())?;
        let tokens = Tokens::read(ids, self.config.padded_vocab_size())?;
        match tokens.len() {
            // candle's operators do not all take tensors of no elements.
            0 => Tensor::zeros(&shape, DType::F32, self.device()),
            _ => tokens.embed(&self.embeddings)?.reshape(&shape),
        }
    }

    /// The logits after every token: `ids` `(batch, length)` to `(batch, length, padded_vocab_size)` of `f32`.
    /// Differentiable. Of no tokens there are no logits.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        self.forward_embeddings(&self.embed(ids)?)
    }

    /// The logits of sequences that lie one after another: `ids` is `(1, length)`, and sequence `i` takes the tokens from
    /// `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Each gets what it would get alone. Differentiable.
    pub fn forward_packed(&self, ids: &Tensor, cu_seqlens: &[usize]) -> Result<Tensor> {
        self.logits(&self.backbone.stream(&self.embed(ids)?, Some(cu_seqlens))?)
    }

    /// The logits of what stands in the place of embeddings, such as [`embed`](Self::embed) gives and a learned prompt or an
    /// image may be joined with: `(batch, length, d_model)` of `f32`, `f16` or `bf16` to
    /// `(batch, length, padded_vocab_size)` of `f32`. Differentiable.
    pub fn forward_embeddings(&self, embeddings: &Tensor) -> Result<Tensor> {
        self.logits(&self.backbone.stream(embeddings, None)?)
    }

    /// The mean cross entropy of the tokens that follow, in nats: `ids` and `targets` `(batch, length)` to a scalar of `f32`,
    /// where `targets` has for each token the one that comes after it, or
    /// [`ignore_index`](LossOptions::ignore_index) where that does not count. Differentiable.
    ///
    /// It is what [`cross_entropy`](crate::nn::train::cross_entropy) gives of the logits, within rounding, but the logits are
    /// there a chunk at a time only, and with the gradients in their place: see
    /// [`linear_cross_entropy`](crate::nn::train::linear_cross_entropy), whose options these are. Of 16,384 tokens and a
    /// vocabulary of 50,280 that saves 6 GB and more.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); targets of another shape, or that are none of the vocabulary; no token at all; options
    /// out of their range.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{VarBuilder, VarMap};
    /// # use selective_scan::nn::{LanguageModel, LanguageModelConfig};
    /// use selective_scan::nn::train::LossOptions;
    ///
    /// # let (device, variables) = (Device::Cpu, VarMap::new());
    /// # let config = LanguageModelConfig::new(16, 1, 32);
    /// # let model = LanguageModel::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &device))?;
    /// let text = [3i64, 1, 4, 1, 5, 9, 2, 6];
    /// let ids = Tensor::new(&text[..7], &device)?.unsqueeze(0)?;
    /// // Each token's target is the next one. The first two cannot be known.
    /// let mut next = text[1..].to_vec();
    /// next[..2].fill(-100);
    /// let targets = Tensor::new(next, &device)?.unsqueeze(0)?;
    /// let loss = model.loss(&ids, &targets, &LossOptions::default())?;
    /// let gradients = loss.backward()?;
    /// assert!(variables.all_vars().iter().all(|variable| gradients.get(variable).is_some()));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn loss(&self, ids: &Tensor, targets: &Tensor, options: &LossOptions) -> Result<Tensor> {
        self.loss_of(ids, None, targets, options)
    }

    /// [`loss`](Self::loss) of sequences that lie one after another, as in [`forward_packed`](Self::forward_packed): `ids` and
    /// `targets` are `(1, length)`, and the mean is over the tokens of all. The last of a sequence has nothing to predict
    /// unless the targets say so.
    ///
    /// # Errors
    /// As [`loss`](Self::loss) and [`forward_packed`](Self::forward_packed).
    pub fn loss_packed(
        &self,
        ids: &Tensor,
        cu_seqlens: &[usize],
        targets: &Tensor,
        options: &LossOptions,
    ) -> Result<Tensor> {
        self.loss_of(ids, Some(cu_seqlens), targets, options)
    }

    pub(super) fn loss_of(
        &self,
        ids: &Tensor,
        cu_seqlens: Option<&[usize]>,
        targets: &Tensor,
        options: &LossOptions,
    ) -> Result<Tensor> {
        let (batch, length) = check_ids(ids)?;
        // Before the device has anything to do that reading them would wait for.
        let targets = Targets::read(targets, &[batch, length], self.config.padded_vocab_size(), options)?;
        let hidden = self.backbone.norm_f(&self.backbone.stream(&self.embed(ids)?, cu_seqlens)?)?;
        let head = self.head.as_ref().map_or(&self.embeddings, Linear::weight);
        // The gradient comes to what candle tracks. What it does not, is there in the model's type already.
        let weight = if head.is_tracked() { head.stored().clone() } else { head.tensor()? };
        targets.loss(&hidden, &weight)
    }

    /// The residual stream after each layer, then the normalised stream that feeds the head: `n_layer + 1` tensors
    /// `(batch, length, d_model)`. Differentiable.
    pub fn hidden_states(&self, ids: &Tensor) -> Result<Vec<Tensor>> {
        self.backbone.hidden_states(&self.embed(ids)?)
    }

    /// Zero states for `slots` sequences. `dtype` is that of the states, see
    /// [`MambaState::new`](crate::nn::MambaState::new); keys and values are no wider than the model computes them. Attention has room
    /// for as many tokens of each as its configuration says
    /// ([`AttentionConfig::capacity`](crate::nn::AttentionConfig::capacity)).
    pub fn new_cache(&self, slots: usize, dtype: DType) -> Result<Cache> {
        self.backbone.new_cache(slots, dtype)
    }

    /// [`new_cache`](Self::new_cache) with room for `capacity` tokens of each sequence, where states grow with them.
    ///
    /// # Errors
    /// States that do not fit in memory.
    pub fn new_cache_for(&self, slots: usize, dtype: DType, capacity: usize) -> Result<Cache> {
        self.backbone.new_cache_for(slots, dtype, capacity)
    }

    /// Reads prompts, or the next chunks of them, from the states of a cache on, and leaves there the states after them:
    /// `ids` `(batch, length)` to the logits after the last token of each, `(batch, vocab_size)` of `f32`.
    ///
    /// Row `i` uses slot `slots[i]` of the cache, or slot `i` if `slots` is `None`, the cache then having one for each row. A
    /// row whose slot is negative is padding: it touches no state, and its logits mean nothing. [`Cache::reset`] makes a slot
    /// ready for a new sequence. Slots are on the host here; a [tensor](Slots) on a GPU is for [`step`](Self::step).
    ///
    /// Not differentiable, since the states are written in place: candle tracks neither the logits nor the states, and a
    /// backward pass from them reaches no parameter. To train, use [`forward`](Self::forward). A model that is decoded with
    /// for long is best [detached](Self::detach) once, or else every call does that.
    ///
    /// # Errors
    /// A bidirectional model, or attention that is not causal; a row without tokens; ids beyond the vocabulary; a cache or
    /// slots that do not fit, or without room for the tokens, see [`new_cache_for`](Self::new_cache_for). Nothing is
    /// written then.
    pub fn prefill<'s>(&self, ids: &Tensor, cache: &Cache, slots: impl Into<Slots<'s>>) -> Result<Tensor> {
        let slots = slots.into();
        let (batch, length) = check_ids(ids)?;
        if length == 0 && batch > 0 {
            return Err(argument("ids", "at least one token in every row", "none"));
        }
        let (model, stream, _) = self.read(ids, cache, batch, CachePass::Prefill { cu_seqlens: None, slots })?;
        match batch {
            0 => model.no_logits(&[0]),
            _ => model.logits(&stream.narrow(1, length - 1, 1)?.squeeze(1)?),
        }
    }

    /// As [`LanguageModel::prefill`], for prompts of several lengths that lie one after another as in
    /// [`LanguageModel::forward_packed`]; prompt `i` uses slot `slots[i]`. Gives `(prompts, vocab_size)`.
    pub fn prefill_packed<'s>(
        &self,
        ids: &Tensor,
        cu_seqlens: &[usize],
        cache: &Cache,
        slots: impl Into<Slots<'s>>,
    ) -> Result<Tensor> {
        let slots = slots.into();
        check_ids(ids)?;
        let mut last = Vec::with_capacity(cu_seqlens.len());
        for ends in cu_seqlens.windows(2) {
            if ends[0] >= ends[1] {
                return Err(argument("cu_seqlens", "at least one token in every prompt", format_args!("{ends:?}")));
            }
            last.push(ends[1] as i64 - 1);
        }
        // What else can be wrong with them is found before the first layer's states are written.
        let pass = CachePass::Prefill { cu_seqlens: Some(cu_seqlens), slots };
        let (model, stream, _) = self.read(ids, cache, last.len(), pass)?;
        if last.is_empty() {
            return model.no_logits(&[0]);
        }
        model.logits(&stream.squeeze(0)?.index_select(&Tensor::new(last, self.device())?, 0)?)
    }

    /// Reads the next token of each sequence: `ids` `(batch)` to the logits after it, `(batch, vocab_size)` of `f32`.
    /// Cache and slots are those of [`LanguageModel::prefill`], and slots may also be a tensor of `i32` where the states are,
    /// `(batch)`, which on a GPU is read when the step runs there; not differentiable, as that. The ids are read and checked on
    /// the host; [`Backbone::step`] has none.
    ///
    /// # Errors
    /// As [`LanguageModel::prefill`].
    pub fn step<'s>(&self, ids: &Tensor, cache: &Cache, slots: impl Into<Slots<'s>>) -> Result<Tensor> {
        let slots = slots.into();
        let &[batch] = ids.dims() else {
            return Err(argument("ids", "shape (batch)", format_args!("{:?}", ids.dims())));
        };
        let (model, stream, _) = self.read(&ids.reshape((batch, 1))?, cache, batch, CachePass::Step { slots })?;
        model.logits(&stream.squeeze(1)?)
    }

    /// [`forward`](Self::forward) of the next part of long texts: row `i` goes on from the state in slot `slots[i]` of a cache, which
    /// afterwards has the state after it. Differentiable in the parameters; the states are numbers to it, so that no gradient goes back
    /// to the parts before (truncated backpropagation through time).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{VarBuilder, VarMap};
    /// # use selective_scan::nn::{LanguageModel, LanguageModelConfig};
    /// # let (device, variables) = (Device::Cpu, VarMap::new());
    /// # let config = LanguageModelConfig::new(16, 1, 32);
    /// # let model = LanguageModel::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &device))?;
    /// let text = Tensor::new(&[[3u32, 1, 4, 1, 5, 9, 2, 6]], &device)?;
    /// let cache = model.new_cache(1, DType::F32)?;
    /// for part in [text.narrow(1, 0, 4)?, text.narrow(1, 4, 4)?] {
    ///     let loss = model.forward_from(&part, &cache, None)?.sqr()?.mean_all()?;
    ///     assert!(loss.backward()?.get(&variables.all_vars()[0]).is_some());
    /// }
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`LanguageModel::prefill`].
    pub fn forward_from<'s>(&self, ids: &Tensor, cache: &Cache, slots: impl Into<Slots<'s>>) -> Result<Tensor> {
        let slots = slots.into();
        let (batch, length) = check_ids(ids)?;
        if length == 0 || batch == 0 {
            return Err(argument("ids", "at least one token in at least one row", format_args!("{:?}", ids.dims())));
        }
        self.backbone.check_decoding(cache, batch, slots, NewTokens::Each(length))?;
        self.logits(&self.backbone.stream_from(&self.embed(ids)?, cache, slots)?)
    }

    /// Reads the next tokens of each sequence, of which some may be taken back: `ids` `(batch, tokens)` to the logits after each,
    /// `(batch, tokens, vocab_size)` of `f32`, and a [`Draft`] that keeps the states after every token. Cache and slots are those of
    /// [`LanguageModel::step`], whose results these are token by token; not differentiable, as that.
    ///
    /// A model that is asked once about several tokens that a smaller one has drafted does so in little more time than about one
    /// (speculative decoding; Leviathan et al. 2022, arXiv 2211.17192). The first of them is the last that is known to be right.
    ///
    /// # Errors
    /// As [`LanguageModel::prefill`].
    pub fn draft<'s>(&self, ids: &Tensor, cache: &Cache, slots: impl Into<Slots<'s>>) -> Result<(Tensor, Draft)> {
        let slots = slots.into();
        let (batch, tokens) = check_ids(ids)?;
        if tokens == 0 || batch == 0 {
            return Err(argument("ids", "at least one token in at least one row", format_args!("{:?}", ids.dims())));
        }
        let (model, stream, layers) = self.read(ids, cache, batch, CachePass::Draft { slots })?;
        let slots = match slots {
            Slots::Rows => None,
            Slots::Host(list) => Some(list.to_vec()),
            Slots::Device(list) => Some(list.to_vec1()?),
        };
        Ok((model.logits(&stream)?, Draft::new(cache.clone(), slots, layers)))
    }

    /// Reads tokens from the states of a cache on, as [`LanguageModel::prefill`] does, and gives the logits after every one of them,
    /// `(batch, length, vocab_size)` of `f32`: of a text that is scored chunk by chunk, for instance.
    ///
    /// # Errors
    /// As [`LanguageModel::prefill`].
    pub fn prefill_all<'s>(&self, ids: &Tensor, cache: &Cache, slots: impl Into<Slots<'s>>) -> Result<Tensor> {
        let slots = slots.into();
        let (batch, length) = check_ids(ids)?;
        if length == 0 && batch > 0 {
            return Err(argument("ids", "at least one token in every row", "none"));
        }
        let (model, stream, _) = self.read(ids, cache, batch, CachePass::Prefill { cu_seqlens: None, slots })?;
        model.logits(&stream)
    }

    /// Reads tokens on from the states of a cache, outside of candle's graph: the model that does, the residual stream after its layers,
    /// and of a draft what takes some of it back. Cache and slots are checked, for so many sequences.
    fn read(
        &self,
        ids: &Tensor,
        cache: &Cache,
        sequences: usize,
        pass: CachePass,
    ) -> Result<(Cow<'_, Self>, Tensor, Vec<LayerDraft>)> {
        let (batch, length) = check_ids(ids)?;
        if let Some(ends) = pass.cu_seqlens() {
            count_sequences(batch, length, Some(ends))?;
        }
        let new = pass.cu_seqlens().map_or(NewTokens::Each(length), NewTokens::Packed);
        self.backbone.check_decoding(cache, sequences, pass.slots(), new)?;
        let model = self.untracked()?;
        let (stream, drafts) = model.backbone.run(&model.embed(ids)?, cache, pass)?;
        Ok((model, stream, drafts))
    }

    fn logits(&self, stream: &Tensor) -> Result<Tensor> {
        let rows = &stream.dims()[..stream.rank() - 1];
        if stream.elem_count() == 0 {
            return self.no_logits(rows);
        }
        check_room("ids", &[rows, &[self.config.padded_vocab_size()]].concat(), DType::F32, self.device())?;
        let normed = self.backbone.norm_f(stream)?;
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
        Ok(if self.parameters.is_tracked() { Cow::Owned(self.detach()?) } else { Cow::Borrowed(self) })
    }

    /// The same model, sharing its parameters, without gradients. Where training goes on, take a new one after a step: A,
    /// and what the model needs in another type than the variables have, are computed here.
    pub fn detach(&self) -> Result<Self> {
        self.changed(&mut |_, parameter| parameter.detach())
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
    /// // Again in every step of training, for what `f` gives is computed once.
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
        self.changed(&mut |name, parameter| parameter.replace(name, f(name, parameter.stored())?))
    }

    /// Calls `f` with each parameter and its name, as [`named_tensors`](Self::named_tensors) gives them.
    pub fn visit(&self, f: &mut dyn FnMut(&str, &Tensor)) {
        self.parameters.visit(f);
    }

    /// All parameters by Hugging Face's names, in the order in which the model uses them; `lm_head.weight` only if it is
    /// not the embedding matrix. They are what the model was built on, of their own types.
    pub fn named_tensors(&self) -> Vec<(String, Tensor)> {
        self.parameters.named_tensors()
    }
}

impl Module for LanguageModel {
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        Self::forward(self, ids)
    }
}

/// The shape of ids of whole sequences.
pub(super) fn check_ids(ids: &Tensor) -> Result<(usize, usize)> {
    match ids.dims() {
        &[batch, length] => Ok((batch, length)),
        dims => Err(argument("ids", "shape (batch, length)", format_args!("{dims:?}"))),
    }
}
