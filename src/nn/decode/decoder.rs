//! Steps of decoding over buffers that stay where they are.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use candle_core::{DType, Result, Tensor};

use super::{Cache, check_tokens};
use crate::candle::{DecodeLinear, Repeated, Repetition, SamplingState, Slots, copy_from_host, embedding_lookup};
use crate::nn::mamba::{Buffers, JoinedLayer, full};
use crate::nn::{LanguageModel, NewTokens, argument, check_room};

/// A language model that is decoded with: its weights, the states of its sequences, and steps that are made ready once.
///
/// A step takes the next token of any of the sequences, each in a slot of its own, and gives the logits after it. On a GPU it is one
/// CUDA graph of three or four launches a layer, or of [one for all](crate::candle::Repeated), for each of a few numbers of rows;
/// sequences come and go without a new one, as slots and tokens lie on the device. The processor runs the same operators. Either way
/// a matrix is read once for all rows, and the logits of a sequence are the same bits whoever is decoded beside it.
///
/// ```
/// # use candle_core::{DType, Device};
/// # use candle_nn::{VarBuilder, VarMap};
/// # use selective_scan::nn::{LanguageModel, LanguageModelConfig};
/// use selective_scan::nn::decode::{Decoder, DecoderOptions};
///
/// # let config = LanguageModelConfig::new(16, 2, 32);
/// # let model = LanguageModel::new(&config, VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu))?;
/// let mut decoder = Decoder::new(&model, &DecoderOptions { slots: 2, ..Default::default() })?;
/// // Two prompts of different lengths, then a token of each.
/// let logits = decoder.prefill(&[&[3, 1, 4], &[1, 5]], &[0, 1])?;
/// assert_eq!(logits.dims(), [2, 16]);
/// let logits = decoder.step(&[1, 9], &[0, 1])?;
/// assert_eq!(logits.dims(), [2, 16]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Decoder {
    model: LanguageModel,
    cache: Cache,
    /// None if there is a layer whose steps cannot be joined: any but selective Mamba blocks alone.
    joined: Option<Joined>,
    /// Shared with the steps that choose tokens.
    sampling: Arc<SamplingState>,
    /// By the number of rows, and whether they choose the next token.
    steps: BTreeMap<(usize, bool), Step>,
    launches_plainly: bool,
}

/// How a [`Decoder`] is made.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderOptions {
    /// How many sequences there can be at a time.
    pub slots: usize,
    /// The type of their states, see [`LanguageModel::new_cache`].
    pub state_dtype: DType,
    /// The tokens that each has room for where states grow with them; if absent, as many as the layers' configurations say.
    pub capacity: Option<usize>,
    /// Whether tokens that are chosen on the device come with their log-probabilities ([`SamplingState::log_probs`]), for which every
    /// choice takes longer.
    pub log_probs: bool,
}

impl Default for DecoderOptions {
    /// One sequence, states of `f32`, no log-probabilities.
    fn default() -> Self {
        Self { slots: 1, state_dtype: DType::F32, capacity: None, log_probs: false }
    }
}

/// The model's tensors as a joined step reads them.
#[derive(Debug, Clone)]
struct Joined {
    embeddings: Tensor,
    layers: Vec<JoinedLayer>,
    norm_f: (Tensor, f64),
    head: Tensor,
    stream_dtype: DType,
}

/// A step of so many rows.
#[derive(Debug)]
struct Step {
    /// `(rows)` of `i32`, and what it holds.
    slots: Tensor,
    listed: Vec<i32>,
    /// `(rows, padded_vocab_size)` of `f32`.
    logits: Tensor,
    work: Repeated,
}

impl Decoder {
    /// Makes a model ready; it shares its parameters. Where training goes on, make a new one afterwards. A GPU keeps freed memory from then on
    /// ([`keep_freed_memory`](crate::candle::keep_freed_memory)).
    ///
    /// # Errors
    /// A bidirectional model, or attention that is not causal; no slots, or more than fit in memory; a type that states cannot have.
    pub fn new(model: &LanguageModel, options: &DecoderOptions) -> Result<Self> {
        if options.slots == 0 {
            return Err(argument("slots", "at least 1", 0));
        }
        let model = model.detach()?;
        let cache = model.backbone().cache(options.slots, options.state_dtype, options.capacity)?;
        model.backbone().check_decoding(&cache, options.slots, Slots::Rows, NewTokens::Each(0))?;
        let (vocab, columns) = (model.config().vocab_size, model.config().padded_vocab_size());
        let sampling = SamplingState::new(model.device(), options.slots, vocab, columns)?;
        let sampling = Arc::new(if options.log_probs { sampling.with_log_probs()? } else { sampling });
        let joined = Joined::new(&model)?;
        // What one prompt frees, the next takes.
        crate::candle::keep_freed_memory(model.device());
        Ok(Self { model, cache, joined, sampling, steps: BTreeMap::new(), launches_plainly: false })
    }

    /// The model.
    pub fn model(&self) -> &LanguageModel {
        &self.model
    }

    /// The states of its sequences: to reset slots, copy one onto another, keep some or put them back, see [`Cache`].
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// How tokens are chosen, and the last one of each slot.
    pub fn sampling(&self) -> &SamplingState {
        &self.sampling
    }

    /// How many sequences there can be.
    pub fn slots(&self) -> usize {
        self.cache.slots()
    }

    /// Reads prompts of any lengths, or the next chunks of them, each on from the state in its slot, and gives the logits after the
    /// last token of each, `(prompts, padded_vocab_size)` of `f32`. [`Cache::reset`] makes a slot ready for a new sequence.
    ///
    /// # Errors
    /// Other numbers of prompts and slots; a prompt without tokens; a token beyond the vocabulary; a slot that there is not, or
    /// twice. Nothing is written then. What the device refuses.
    pub fn prefill(&self, prompts: &[&[u32]], slots: &[i32]) -> Result<Tensor> {
        let mut ends = vec![0];
        for prompt in prompts {
            ends.push(ends[ends.len() - 1] + prompt.len());
        }
        let ids = Tensor::new(prompts.concat(), &candle_core::Device::Cpu)?.unsqueeze(0)?;
        self.model.prefill_packed(&ids, &ends, &self.cache, slots)
    }

    /// Takes the next token of each sequence, `tokens[i]` of that in slot `slots[i]`, and gives the logits after it,
    /// `(rows, padded_vocab_size)` of `f32`. The next step overwrites them, whose handle this is; `copy` keeps them. A row whose slot
    /// is negative is padding.
    ///
    /// # Errors
    /// Other numbers of tokens and slots; a token beyond the vocabulary; a slot that there is not, or twice. Nothing is written then.
    /// What the device refuses.
    pub fn step(&mut self, tokens: &[u32], slots: &[i32]) -> Result<Tensor> {
        if tokens.len() != slots.len() {
            return Err(argument("tokens", format_args!("{}, one for each slot", slots.len()), tokens.len()));
        }
        check_tokens("tokens", tokens, self.model.config().padded_vocab_size())?;
        self.model.backbone().check_decoding(&self.cache, slots.len(), Slots::Host(slots), NewTokens::Each(1))?;
        if self.joined.is_none() || slots.is_empty() {
            let ids = Tensor::new(tokens, &candle_core::Device::Cpu)?;
            return self.model.step(&ids, &self.cache, slots);
        }
        let mut of_slots = vec![0; self.slots()];
        for (&token, &slot) in tokens.iter().zip(slots) {
            if let Ok(slot) = usize::try_from(slot) {
                of_slots[slot] = token;
            }
        }
        copy_from_host(&of_slots, self.sampling.tokens())?;
        self.run(slots, false)
    }

    /// Takes the token that was chosen last in each of these slots ([`sampling`](Self::sampling)), and chooses the next one, all on the
    /// device: nothing waits for it. Gives the logits that it was chosen from, as [`step`](Self::step) does.
    ///
    /// # Errors
    /// A slot that there is not, or twice. Nothing is written then. What the device refuses.
    pub fn step_chosen(&mut self, slots: &[i32]) -> Result<Tensor> {
        self.model.backbone().check_decoding(&self.cache, slots.len(), Slots::Host(slots), NewTokens::Each(1))?;
        if !slots.is_empty() && self.joined.is_some() {
            return self.run(slots, true);
        }
        let tokens = self.sampling.tokens().to_vec1::<u32>()?;
        let ids: Vec<_> = slots.iter().map(|&slot| usize::try_from(slot).map_or(0, |slot| tokens[slot])).collect();
        let logits = self.model.step(&Tensor::new(ids, &candle_core::Device::Cpu)?, &self.cache, slots)?;
        self.sampling.sample(&logits, slots)?;
        Ok(logits)
    }

    /// Runs a step of checked slots, at least one.
    fn run(&mut self, slots: &[i32], chooses: bool) -> Result<Tensor> {
        let rows = rows_of_step(slots.len(), self.model.device().is_cpu());
        let launches_plainly = self.launches_plainly;
        let step = self.step_of(rows, chooses)?;
        let padded: Vec<_> = slots.iter().copied().chain(std::iter::repeat(-1)).take(rows).collect();
        if step.listed != padded {
            copy_from_host(&padded, &step.slots)?;
            step.listed = padded;
        }
        match launches_plainly {
            true => step.work.run_plainly()?,
            false => step.work.run()?,
        }
        step.logits.narrow(0, 0, slots.len())
    }

    /// How a step of so many rows is done. It is made ready if it was not.
    ///
    /// # Errors
    /// More rows than there are slots. What the device refuses.
    pub fn how(&mut self, rows: usize) -> Result<Repetition> {
        if rows > self.slots() {
            return Err(argument("rows", format_args!("at most {}, as there are slots", self.slots()), rows));
        }
        if self.joined.is_none() {
            return Ok(Repetition::Call);
        }
        let rows = rows_of_step(rows.max(1), self.model.device().is_cpu());
        Ok(self.step_of(rows, false)?.work.how())
    }

    /// Whether steps on a GPU are launched one kernel after another even where there is a graph: to compare the two, whose bits are
    /// the same.
    pub fn launch_plainly(&mut self, plainly: bool) {
        self.launches_plainly = plainly;
    }

    fn step_of(&mut self, rows: usize, chooses: bool) -> Result<&mut Step> {
        let joined =
            self.joined.as_ref().ok_or_else(|| argument("model", "layers whose steps can be joined", "others"))?;
        match self.steps.entry((rows, chooses)) {
            Entry::Occupied(step) => Ok(step.into_mut()),
            Entry::Vacant(place) => Ok(place.insert(joined.step(rows, &self.cache, &self.sampling, chooses)?)),
        }
    }
}

/// The rows of the step that takes so many: on a GPU there are graphs for a few numbers only.
fn rows_of_step(rows: usize, is_cpu: bool) -> usize {
    match rows {
        _ if is_cpu => rows,
        0..=8 => rows.next_power_of_two(),
        9..=64 => rows.next_multiple_of(8),
        _ => rows.next_multiple_of(64),
    }
}

impl Joined {
    fn new(model: &LanguageModel) -> Result<Option<Self>> {
        let backbone = model.backbone();
        let Some(layers) = backbone.joined()? else { return Ok(None) };
        let [embeddings, head] = model.ends()?;
        let norm = backbone.last_norm();
        let norm_f = (full(norm.parameter().tensor()?)?, norm.eps());
        let stream_dtype = if backbone.config().residual_in_f32 { DType::F32 } else { model.dtype() };
        Ok(Some(Self { embeddings, layers, norm_f, head, stream_dtype }))
    }

    /// A step over buffers of its own.
    fn step(&self, rows: usize, cache: &Cache, sampling: &Arc<SamplingState>, chooses: bool) -> Result<Step> {
        let (vocab, d_model) = self.head.dims2()?;
        let device = self.head.device();
        check_room("slots", &[rows, vocab], DType::F32, device)?;
        let slots = Tensor::new(vec![-1i32; rows], device)?;
        let stream = Tensor::zeros((rows, d_model), self.stream_dtype, device)?;
        let logits = Tensor::zeros((rows, vocab), DType::F32, device)?;
        let mut buffers: Vec<Buffers> = Vec::new();
        for layer in &self.layers {
            let found =
                buffers.iter().map(|buffers| buffers.serve(layer).map(|serves| serves.then(|| buffers.clone())));
            let found = found.collect::<Result<Vec<_>>>()?.into_iter().flatten().next();
            buffers.push(match found {
                Some(buffers) => buffers,
                None => layer.buffers(rows)?,
            });
        }
        let mut tensors = vec![slots.clone(), stream.clone(), logits.clone()];
        tensors.extend(sampling.tensors());
        tensors.extend([&self.embeddings, &self.head, &self.norm_f.0].map(Tensor::clone));
        tensors.extend(self.layers.iter().flat_map(JoinedLayer::tensors));
        tensors.extend(buffers.iter().flat_map(Buffers::tensors));
        tensors.extend(cache.layers().iter().flat_map(|layer| layer.pools()).cloned());
        let (joined, cache, sampling) = (self.clone(), cache.clone(), sampling.clone());
        let (step_slots, step_logits) = (slots.clone(), logits.clone());
        let work = move || {
            embedding_lookup(sampling.tokens(), &step_slots, &joined.embeddings, &stream)?;
            for ((layer, buffers), state) in joined.layers.iter().zip(&buffers).zip(cache.layers()) {
                layer.run(&stream, buffers, state.mamba()?, Slots::Device(&step_slots))?;
            }
            let norm = Some((&joined.norm_f.0, joined.norm_f.1));
            DecodeLinear { norm, ..DecodeLinear::new(&stream, &joined.head) }.write(&step_logits)?;
            if chooses { sampling.sample(&step_logits, &step_slots) } else { Ok(()) }
        };
        // SAFETY: all of these are operators of this crate, which read and write the tensors listed above, and what `sampling` has
        // for itself, which lives as long as the work.
        let work = unsafe { Repeated::new(device, tensors, work) }?;
        Ok(Step { slots, listed: vec![-1; rows], logits, work })
    }
}
