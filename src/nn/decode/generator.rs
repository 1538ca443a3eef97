//! Texts of many sequences that come and go.

use std::collections::VecDeque;

use candle_core::{DType, Result, Tensor};

use super::{Cache, Decoder, DecoderOptions, check_tokens};
use crate::candle::HostCopy;
use crate::nn::{LanguageModel, argument};
use crate::sampling::{INVALID, Settings};

/// Writes the texts of many sequences at once, which join and leave between its turns: continuous batching.
///
/// A turn reads prompts, of which at most so many tokens that those who write do not wait long, and takes a step of all sequences that
/// have read theirs. Tokens are chosen on the device and stay there; what has been chosen comes to the host while the next turn runs
/// already, so that on a GPU a turn gives the tokens of the one before.
///
/// A sequence gets the text that it would get alone, by its seed alone: its steps are the same bits in any company, and so is the choice
/// of tokens. What its prompt leaves is the same within rounding.
///
/// ```
/// # use candle_core::{DType, Device};
/// # use candle_nn::{VarBuilder, VarMap};
/// # use selective_scan::nn::{LanguageModel, LanguageModelConfig};
/// use selective_scan::nn::decode::{Event, Generator, GeneratorOptions, Request};
/// use selective_scan::sampling::Settings;
///
/// # let config = LanguageModelConfig::new(16, 2, 32);
/// # let model = LanguageModel::new(&config, VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu))?;
/// let mut generator = Generator::new(&model, &GeneratorOptions { slots: 2, ..Default::default() })?;
/// // Three requests share two slots.
/// for prompt in [[3, 1], [4, 1], [5, 9]] {
///     let settings = Settings { temperature: 0.8, seed: 7, ..Settings::default() };
///     generator.submit(Request { settings, max_tokens: 5, ..Request::new(prompt) })?;
/// }
/// let mut tokens = 0;
/// while !generator.is_idle() {
///     for event in generator.turn()? {
///         match event {
///             Event::Token { sequence, token, .. } => {
///                 assert!(sequence < 3 && token < 16);
///                 tokens += 1;
///             }
///             _ => {}
///         }
///     }
/// }
/// assert_eq!(tokens, 15);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Generator {
    decoder: Decoder,
    options: GeneratorOptions,
    submitted: u64,
    waiting: VecDeque<Waiting>,
    /// By slot.
    running: Vec<Option<Running>>,
    /// Slots in the order in which they begin to read.
    reading: VecDeque<usize>,
    /// What was chosen in turns whose tokens have not come to the host, the oldest first.
    underway: VecDeque<Underway>,
    /// Copies that are not underway.
    copies: Vec<Copies>,
}

/// How a [`Generator`] is made.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratorOptions {
    /// How many sequences there can be at a time; others wait.
    pub slots: usize,
    /// The type of their states, see [`MambaState::new`](crate::nn::MambaState::new).
    pub state_dtype: DType,
    /// The tokens that each has room for where states grow with them, those of its prompt among them; if absent, as many as the
    /// layers' configurations say.
    pub capacity: Option<usize>,
    /// The most tokens of prompts that a turn reads. Fewer let those that write wait less, more read prompts faster.
    pub prompt_tokens: usize,
    /// Whether tokens come with their log-probabilities ([`Event::Token`]), for which every choice takes longer.
    pub log_probs: bool,
}

impl Default for GeneratorOptions {
    /// 8 sequences, states of `f32`, 2,048 tokens of prompts in a turn, no log-probabilities.
    fn default() -> Self {
        Self { slots: 8, state_dtype: DType::F32, capacity: None, prompt_tokens: 2048, log_probs: false }
    }
}

/// A text to be written.
#[derive(Debug, Clone)]
pub struct Request {
    /// What it begins with: at least one token.
    pub prompt: Vec<u32>,
    /// The states that the prompt is read on from, of one slot: what is kept of a beginning that many requests share ([`Cache::take`]).
    /// None for zero states.
    pub start: Option<Cache>,
    /// How tokens are chosen. Of several samples of one prompt, the seed goes up by one from each to the next.
    pub settings: Settings,
    /// The number of texts. The prompt is read once for all of them, each of which takes a slot.
    pub samples: usize,
    /// The most tokens of a text; at least one.
    pub max_tokens: usize,
    /// Tokens at which a text ends. They are no part of it.
    pub stop_tokens: Vec<u32>,
}

impl Request {
    /// One text of at most 256 tokens, each taken with the probability that the model gives it.
    pub fn new(prompt: impl Into<Vec<u32>>) -> Self {
        let (prompt, stop_tokens) = (prompt.into(), Vec::new());
        Self { prompt, start: None, settings: Settings::default(), samples: 1, max_tokens: 256, stop_tokens }
    }
}

/// What has become of a sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A token of its text.
    Token {
        /// The sequence's number.
        sequence: u64,
        /// The token.
        token: u32,
        /// The logarithm of the probability that the model gave it, whatever the settings have made of that; none unless
        /// [asked for](GeneratorOptions::log_probs).
        log_prob: Option<f32>,
    },
    /// It has ended, and its slot is free.
    Finished {
        /// The sequence's number.
        sequence: u64,
        /// Why.
        reason: FinishReason,
    },
}

/// Why a text has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// It has as many tokens as were asked for.
    Length,
    /// The model has chosen this token, one of those to stop at.
    Stop(u32),
    /// The model's logits were no numbers, and no token could be chosen.
    Invalid,
    /// [`Generator::cancel`] was called.
    Cancelled,
}

/// A request without slots yet.
#[derive(Debug)]
struct Waiting {
    first: u64,
    request: Request,
    is_cancelled: bool,
}

/// A sequence in its slot.
#[derive(Debug)]
struct Running {
    sequence: u64,
    max_tokens: usize,
    stop_tokens: Vec<u32>,
    /// Tokens that have been chosen, those underway included.
    chosen: usize,
    /// Tokens that have been given out.
    given: usize,
    is_cancelled: bool,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// The prompt, how much of it has been read, and the slots of the other samples of it.
    Reading {
        prompt: Vec<u32>,
        at: usize,
        others: Vec<usize>,
    },
    /// It waits for the sequence that reads the prompt of both.
    Following,
    Writing,
    /// All of its tokens have been chosen; some may be underway.
    Chosen,
}

/// A turn's tokens on their way.
#[derive(Debug)]
struct Underway {
    /// The sequences that they are of, and their slots.
    of: Vec<(u64, usize)>,
    copies: Copies,
}

/// The tokens and log-probabilities of all slots.
#[derive(Debug)]
struct Copies {
    tokens: HostCopy<u32>,
    log_probs: Option<HostCopy<f32>>,
}

impl Generator {
    /// Makes a model ready; it shares its parameters.
    ///
    /// # Errors
    /// As [`Decoder::new`]; no tokens of prompts in a turn.
    pub fn new(model: &LanguageModel, options: &GeneratorOptions) -> Result<Self> {
        if options.prompt_tokens == 0 {
            return Err(argument("prompt_tokens", "at least 1", 0));
        }
        let &GeneratorOptions { slots, state_dtype, capacity, log_probs, .. } = options;
        let decoder = Decoder::new(model, &DecoderOptions { slots, state_dtype, capacity, log_probs })?;
        // On a processor nothing is gained by letting tokens wait for a turn.
        let turns = if model.device().is_cpu() { 1 } else { 2 };
        let copies = (0..turns).map(|_| Copies::new(&decoder)).collect::<Result<_>>()?;
        Ok(Self {
            decoder,
            options: options.clone(),
            submitted: 0,
            waiting: VecDeque::new(),
            running: (0..slots).map(|_| None).collect(),
            reading: VecDeque::new(),
            underway: VecDeque::new(),
            copies,
        })
    }

    /// The decoder, whose slots are this generator's own while there is anything to do.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Takes a request, and gives the number of its sequence; of several samples the first, which the others follow. Numbers go up from
    /// 0.
    ///
    /// # Errors
    /// A prompt without tokens or with one beyond the vocabulary; settings by which nothing can be chosen; no tokens to write; no
    /// samples, or more than there are slots; states of another model, or not of one slot; more tokens than a slot has room for.
    pub fn submit(&mut self, request: Request) -> Result<u64> {
        if request.prompt.is_empty() {
            return Err(argument("prompt", "at least one token", "none"));
        }
        check_tokens("prompt", &request.prompt, self.decoder.model().config().padded_vocab_size())?;
        request.settings.check()?;
        if request.max_tokens == 0 {
            return Err(argument("max_tokens", "at least 1", 0));
        }
        let slots = self.running.len();
        if !(1..=slots).contains(&request.samples) {
            return Err(argument("samples", format_args!("1 to {slots}, the number of slots"), request.samples));
        }
        if let Some(start) = &request.start {
            self.decoder.cache().check_states("start", start)?;
            if start.slots() != 1 {
                return Err(argument("start", "states of one slot", start.slots()));
            }
        }
        self.check_capacity(&request)?;
        let first = self.submitted;
        self.submitted += request.samples as u64;
        self.waiting.push_back(Waiting { first, request, is_cancelled: false });
        Ok(first)
    }

    /// Checks that the longest text that a request allows fits where states grow with it. Its last token is not read.
    fn check_capacity(&self, request: &Request) -> Result<()> {
        let Some(capacity) = self.decoder.cache().capacity() else { return Ok(()) };
        let start = request.start.as_ref().map_or(Ok(0), Cache::tokens)?;
        let tokens = (start + request.prompt.len()).saturating_add(request.max_tokens - 1);
        match tokens <= capacity {
            true => Ok(()),
            false => {
                let expected = format_args!(
                    "at most {capacity} tokens of start, prompt and text together, as a slot has room for"
                );
                Err(argument("max_tokens", expected, tokens))
            }
        }
    }

    /// Ends a sequence, which gives no more tokens; its next event is that it has finished. Says whether there is such a sequence: one
    /// that waits or runs. Of several samples whose prompt has not been read none can be ended, and the answer is no.
    pub fn cancel(&mut self, sequence: u64) -> bool {
        let is_it = |waiting: &&mut Waiting| waiting.first == sequence && waiting.request.samples == 1;
        if let Some(waiting) = self.waiting.iter_mut().find(is_it) {
            waiting.is_cancelled = true;
            return true;
        }
        let Some(running) = self.running.iter_mut().flatten().find(|running| running.sequence == sequence) else {
            return false;
        };
        running.is_cancelled = match &running.stage {
            Stage::Reading { others, .. } => others.is_empty(),
            Stage::Following => false,
            Stage::Writing | Stage::Chosen => true,
        };
        running.is_cancelled
    }

    /// Whether there is nothing left to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.underway.is_empty() && self.running.iter().all(Option::is_none)
    }

    /// The sequences that wait for a slot, and those that have one.
    pub fn load(&self) -> (usize, usize) {
        let waiting = self.waiting.iter().map(|waiting| waiting.request.samples).sum();
        (waiting, self.running.iter().flatten().count())
    }

    /// Takes a turn, and says what has become of sequences: on a GPU by the turn before.
    ///
    /// # Errors
    /// What the device refuses. The generator is of no use then.
    pub fn turn(&mut self) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        self.admit(&mut events)?;
        // Those that have read their prompt by now; who reads its end in this turn has a token from that.
        let mut chosen = self.writing(&mut events);
        if !chosen.is_empty() {
            let slots: Vec<_> = chosen.iter().map(|&(_, slot)| slot as i32).collect();
            self.decoder.step_chosen(&slots)?;
        }
        chosen.extend(self.read()?);
        for &(_, slot) in &chosen {
            if let Some(running) = &mut self.running[slot] {
                running.chosen += 1;
                if running.chosen == running.max_tokens {
                    running.stage = Stage::Chosen;
                }
            }
        }
        let is_quiet = chosen.is_empty();
        if !is_quiet {
            let Some(mut copies) = self.copies.pop() else { unreachable!("a turn gives one back before the next") };
            copies.start()?;
            self.underway.push_back(Underway { of: chosen, copies });
        }
        // A turn that has chosen nothing has no other to run beside.
        while self.copies.is_empty() || (is_quiet && !self.underway.is_empty()) {
            self.receive(&mut events)?;
        }
        Ok(events)
    }

    /// Gives slots to those that wait, in their order.
    fn admit(&mut self, events: &mut Vec<Event>) -> Result<()> {
        while let Some(waiting) = self.waiting.front() {
            let free = self.running.iter().enumerate().filter(|(_, running)| running.is_none()).map(|(slot, _)| slot);
            let slots: Vec<_> = free.take(waiting.request.samples).collect();
            if slots.len() < waiting.request.samples {
                return Ok(());
            }
            let Some(Waiting { first, request, is_cancelled }) = self.waiting.pop_front() else { return Ok(()) };
            if is_cancelled {
                events.push(Event::Finished { sequence: first, reason: FinishReason::Cancelled });
                continue;
            }
            let reader = [slots[0] as i32];
            match &request.start {
                Some(start) => self.decoder.cache().put(start, &reader)?,
                None => self.decoder.cache().reset(Some(&reader))?,
            }
            for (i, &slot) in slots.iter().enumerate() {
                let settings = Settings { seed: request.settings.seed.wrapping_add(i as u64), ..request.settings };
                self.decoder.sampling().begin(slot, &settings, &request.prompt)?;
                self.running[slot] = Some(Running {
                    sequence: first + i as u64,
                    max_tokens: request.max_tokens,
                    stop_tokens: request.stop_tokens.clone(),
                    chosen: 0,
                    given: 0,
                    is_cancelled: false,
                    stage: Stage::Following,
                });
            }
            if let Some(running) = &mut self.running[slots[0]] {
                running.stage = Stage::Reading { prompt: request.prompt, at: 0, others: slots[1..].to_vec() };
            }
            self.reading.push_back(slots[0]);
        }
        Ok(())
    }

    /// The sequences that take a step, with their slots. Those that were cancelled leave.
    fn writing(&mut self, events: &mut Vec<Event>) -> Vec<(u64, usize)> {
        let mut writing = Vec::new();
        for (slot, place) in self.running.iter_mut().enumerate() {
            let Some(running) = place else { continue };
            if !matches!(running.stage, Stage::Writing) {
                continue;
            }
            if running.is_cancelled {
                events.push(Event::Finished { sequence: running.sequence, reason: FinishReason::Cancelled });
                *place = None;
                continue;
            }
            writing.push((running.sequence, slot));
        }
        writing
    }

    /// Reads the next parts of prompts, and chooses the first token of those that have been read.
    fn read(&mut self) -> Result<Vec<(u64, usize)>> {
        let mut room = self.options.prompt_tokens;
        let (mut parts, mut slots): (Vec<Vec<u32>>, Vec<i32>) = Default::default();
        let mut finished = Vec::new();
        for &slot in &self.reading {
            let Some(Running { stage: Stage::Reading { prompt, at, .. }, .. }) = &mut self.running[slot] else {
                continue;
            };
            if room == 0 {
                break;
            }
            let part = &prompt[*at..prompt.len().min(*at + room)];
            (room, *at) = (room - part.len(), *at + part.len());
            if *at == prompt.len() {
                finished.push((parts.len(), slot));
            }
            parts.push(part.to_vec());
            slots.push(slot as i32);
        }
        if parts.is_empty() {
            return Ok(Vec::new());
        }
        let parts: Vec<_> = parts.iter().map(Vec::as_slice).collect();
        let logits = self.decoder.prefill(&parts, &slots)?;
        self.reading.drain(..finished.len());
        let mut chosen = Vec::new();
        let (mut rows, mut of_rows) = (Vec::new(), Vec::new());
        for (row, slot) in finished {
            let Some(Running { stage, .. }) = &mut self.running[slot] else { continue };
            let Stage::Reading { others, .. } = std::mem::replace(stage, Stage::Writing) else { continue };
            let copies: Vec<_> = others.iter().map(|&slot| slot as i32).collect();
            self.decoder.cache().copy_slots(&vec![slot as i32; copies.len()], &copies)?;
            for slot in [slot].into_iter().chain(others) {
                rows.push(row as u32);
                of_rows.push(slot as i32);
                if let Some(running) = &mut self.running[slot] {
                    running.stage = Stage::Writing;
                    chosen.push((running.sequence, slot));
                }
            }
        }
        if !rows.is_empty() {
            let is_each = rows.iter().enumerate().all(|(i, row)| i == *row as usize) && rows.len() == parts.len();
            let logits = match is_each {
                true => logits,
                false => logits.index_select(&Tensor::new(rows, logits.device())?, 0)?,
            };
            self.decoder.sampling().sample(&logits, &of_rows)?;
        }
        Ok(chosen)
    }

    /// Waits for the oldest tokens underway.
    fn receive(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let Some(Underway { of, copies }) = self.underway.pop_front() else { return Ok(()) };
        let tokens = copies.tokens.wait()?;
        let log_probs = copies.log_probs.as_ref().map(HostCopy::wait).transpose()?;
        for (sequence, slot) in of {
            // It may have ended by the token before, and another have its slot.
            let Some(running) = self.running[slot].as_mut().filter(|running| running.sequence == sequence) else {
                continue;
            };
            let (token, log_prob) = (tokens[slot], log_probs.as_ref().map(|values| values[slot]));
            let ended = if running.is_cancelled {
                Some(FinishReason::Cancelled)
            } else if token == INVALID {
                Some(FinishReason::Invalid)
            } else if running.stop_tokens.contains(&token) {
                Some(FinishReason::Stop(token))
            } else {
                running.given += 1;
                events.push(Event::Token { sequence, token, log_prob });
                (running.given == running.max_tokens).then_some(FinishReason::Length)
            };
            if let Some(reason) = ended {
                events.push(Event::Finished { sequence, reason });
                self.running[slot] = None;
            }
        }
        self.copies.push(copies);
        Ok(())
    }
}

impl Copies {
    fn new(decoder: &Decoder) -> Result<Self> {
        let sampling = decoder.sampling();
        let log_probs = sampling.log_probs().map(HostCopy::new).transpose()?;
        Ok(Self { tokens: HostCopy::new(sampling.tokens())?, log_probs })
    }

    fn start(&mut self) -> Result<()> {
        self.tokens.start()?;
        self.log_probs.as_mut().map_or(Ok(()), HostCopy::start)
    }
}
