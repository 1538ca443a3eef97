//! The choice on candle's tensors.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor};

use super::{Inputs, Settings, StateMut, mark, words};
use crate::candle::device::{Backend, Buffer, Cpu, SlotsOf};
use crate::candle::tensors::Arguments;
use crate::candle::write_all::{Read, StorageMut, open, open_one, write_all};
use crate::candle::{Slots, copy_from_host_at};
use crate::{Error, View};

/// How the tokens of sequences are chosen, and the last of each, on a device: settings, positions, and which tokens have occurred, by
/// slot. See [`sampling`](crate::sampling) for what is computed.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use selective_scan::candle::SamplingState;
/// use selective_scan::sampling::Settings;
///
/// let state = SamplingState::new(&Device::Cpu, 2, 3, 3)?;
/// state.begin(0, &Settings::greedy(), &[])?;
/// state.begin(1, &Settings { repetition_penalty: 4.0, ..Settings::greedy() }, &[1])?;
/// let logits = Tensor::new(&[[1f32, 3.0, 2.0], [1.0, 3.0, 2.0]], &Device::Cpu)?;
/// state.sample(&logits, None)?;
/// assert_eq!(state.tokens().to_vec1::<u32>()?, [1, 2]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub struct SamplingState {
    vocab_size: usize,
    columns: usize,
    settings: Mutex<Stored>,
    /// `(slots, words)` of `u32`.
    occurred: Tensor,
    /// `(slots)` of `u32`.
    tokens: Tensor,
    /// `(slots)` of `f32`, if they are wanted.
    log_probs: Option<Tensor>,
}

/// The settings of each slot, where the device reads them.
enum Stored {
    Host(Vec<Settings>),
    #[cfg(feature = "candle-cuda")]
    Cuda {
        settings: cudarc::driver::CudaSlice<Settings>,
        workspace: super::cuda::Workspace,
    },
}

impl fmt::Debug for SamplingState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (slots, vocab_size) = (self.slots(), self.vocab_size);
        f.debug_struct("SamplingState").field("slots", &slots).field("vocab_size", &vocab_size).finish_non_exhaustive()
    }
}

impl SamplingState {
    /// Default settings for `slots` sequences, none of whose tokens has occurred. `columns` is the width of the logits, of which the
    /// first `vocab_size` are tokens.
    ///
    /// # Errors
    /// No slots, more than fit in memory; no tokens, or more than columns or than a vocabulary can have; a device that is neither the
    /// processor nor an NVIDIA GPU. What the device refuses.
    pub fn new(device: &Device, slots: usize, vocab_size: usize, columns: usize) -> Result<Self> {
        if slots == 0 {
            return Err(Error::argument("slots", "at least 1", 0).into());
        }
        if vocab_size == 0 || vocab_size > columns || columns > super::MAX_VOCAB_SIZE {
            let expected = format_args!("1 to {columns} tokens, at most {}", super::MAX_VOCAB_SIZE).to_string();
            return Err(Error::argument("vocab_size", expected, vocab_size).into());
        }
        let settings = match device {
            Device::Cpu => Stored::Host(vec![Settings::default(); slots]),
            #[cfg(feature = "candle-cuda")]
            Device::Cuda(device) => {
                let stream = device.cuda_stream();
                let settings = stream.clone_htod(&vec![Settings::default(); slots]);
                let settings = settings.map_err(|error| Error::cuda("allocating settings", error))?;
                // Rows of padding may come beside those that have a slot.
                let rows = slots.next_multiple_of(64);
                Stored::Cuda { settings, workspace: super::cuda::Workspace::new(&stream, rows, vocab_size)? }
            }
            device => {
                return Err(crate::candle::device::elsewhere("device", format_args!("{:?}", device.location())).into());
            }
        };
        Ok(Self {
            vocab_size,
            columns,
            settings: Mutex::new(settings),
            occurred: Tensor::zeros((slots, words(columns)), DType::U32, device)?,
            tokens: Tensor::zeros(slots, DType::U32, device)?,
            log_probs: None,
        })
    }

    /// The same, which also computes log-probabilities: a pass more over the logits of each choice.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn with_log_probs(self) -> Result<Self> {
        Ok(Self { log_probs: Some(Tensor::zeros(self.slots(), DType::F32, self.tokens.device())?), ..self })
    }

    /// The number of sequences.
    pub fn slots(&self) -> usize {
        self.tokens.elem_count()
    }

    /// The last token of each slot, `(slots)` of `u32`; [`INVALID`](super::INVALID) where the logits gave none.
    pub fn tokens(&self) -> &Tensor {
        &self.tokens
    }

    /// The log-probability of that token as the logits gave it, whatever the settings have made of that, `(slots)` of `f32`. None unless
    /// [asked for](Self::with_log_probs).
    pub fn log_probs(&self) -> Option<&Tensor> {
        self.log_probs.as_ref()
    }

    /// All tensors that [`sample`](Self::sample) writes: what has occurred, tokens, and log-probabilities if there are any.
    pub fn tensors(&self) -> Vec<Tensor> {
        [&self.occurred, &self.tokens].into_iter().chain(&self.log_probs).cloned().collect()
    }

    /// Begins a sequence in a slot: its settings, and the tokens of its prompt, which count as having occurred.
    ///
    /// # Errors
    /// A slot that there is not; settings by which nothing can be chosen; a token beyond the logits' columns. Nothing is written
    /// then. What the device refuses.
    pub fn begin(&self, slot: usize, settings: &Settings, prompt: &[u32]) -> Result<()> {
        self.check_slot(slot)?;
        settings.check()?;
        let mut bits = vec![0; words(self.columns)];
        mark(&mut bits, prompt)?;
        let mut stored = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *stored {
            Stored::Host(all) => all[slot] = *settings,
            #[cfg(feature = "candle-cuda")]
            Stored::Cuda { settings: all, .. } => {
                let stream = all.stream().clone();
                let copied = stream.memcpy_htod(&[*settings][..], &mut all.slice_mut(slot..=slot));
                copied.map_err(|error| Error::cuda("copying settings", error))?;
            }
        }
        copy_from_host_at(&bits, &self.occurred, slot * bits.len())
    }

    /// Overwrites the last token of a slot, as if it had been chosen; it counts as having occurred only if [`begin`](Self::begin) said so.
    ///
    /// # Errors
    /// A slot that there is not. What the device refuses.
    pub fn set_token(&self, slot: usize, token: u32) -> Result<()> {
        self.check_slot(slot)?;
        copy_from_host_at(&[token], &self.tokens, slot)
    }

    fn check_slot(&self, slot: usize) -> Result<()> {
        if slot < self.slots() {
            return Ok(());
        }
        Err(Error::argument("slot", format_args!("below {}", self.slots()), slot).into())
    }

    /// Chooses the next token of each row of `logits`, `(rows, columns)` of `f32`, dense, for the sequence of the row's slot. Nothing
    /// waits for the device.
    ///
    /// # Errors
    /// Logits of another shape, type or device; slots that do not fit. Nothing is written then. What the device refuses.
    pub fn sample<'s>(&self, logits: &Tensor, slots: impl Into<Slots<'s>>) -> Result<()> {
        let slots = slots.into();
        let (rows, columns) = logits.dims2()?;
        if columns != self.columns || logits.dtype() != DType::F32 {
            let expected = format_args!("shape (rows, {}) of F32", self.columns).to_string();
            return Err(Error::argument(
                "logits",
                expected,
                format_args!("{:?} of {:?}", logits.dims(), logits.dtype()),
            )
            .into());
        }
        let mut arguments = Arguments::default();
        arguments.add("settings", &self.tokens);
        arguments.add("logits", logits);
        arguments.add_slots(slots);
        arguments.check_devices()?;
        slots.check(rows, "settings", &self.tokens)?;
        let mut read = vec![logits];
        if let Slots::Device(slots) = slots {
            read.push(slots);
        }
        let mut stored = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        let written: Vec<_> = [&self.occurred, &self.tokens].into_iter().chain(&self.log_probs).collect();
        write_all("settings", &written, &read, |written, read| match &mut *stored {
            Stored::Host(settings) => {
                let ([occurred, tokens], log_probs) = opened::<Cpu>(written)?;
                let logits = view::<Cpu>(read.storage(0), logits)?;
                let inputs =
                    Inputs { vocab_size: self.vocab_size, slots: slots_of::<Cpu>(slots, read)?, ..Inputs::new(logits) };
                let (CpuStorage::U32(occurred), CpuStorage::U32(tokens)) = (occurred, tokens) else {
                    unreachable!("they were made so")
                };
                Ok(inputs.sample(StateMut { settings, occurred: Some(occurred), tokens, log_probs })?)
            }
            #[cfg(feature = "candle-cuda")]
            Stored::Cuda { settings, workspace } => {
                use crate::candle::cuda::Gpu;
                let ([occurred, tokens], log_probs) = opened::<Gpu>(written)?;
                let stream = tokens.device.cuda_stream();
                let logits = view::<Gpu>(read.storage(0), logits)?;
                let inputs =
                    Inputs { vocab_size: self.vocab_size, slots: slots_of::<Gpu>(slots, read)?, ..Inputs::new(logits) };
                let state = super::cuda::StateMut {
                    settings,
                    occurred: Some(occurred.as_cuda_slice_mut()?),
                    tokens: tokens.as_cuda_slice_mut()?,
                    log_probs,
                };
                Ok(super::cuda::sample(&stream, &inputs, state, workspace)?)
            }
        })
    }
}

/// What a choice writes: what has occurred and the tokens, and the log-probabilities if there are any.
type Opened<'t, B> = ([&'t mut <B as Backend>::Storage; 2], Option<&'t mut Buffer<B, f32>>);

/// The storages that are written, of which log-probabilities come third.
fn opened<B: Backend>(mut written: Vec<StorageMut<'_>>) -> Result<Opened<'_, B>> {
    let log_probs = written.drain(2..).next().map(|storage| open_one::<B>("settings", storage)).transpose()?;
    Ok((open::<B, 2>("settings", written)?, log_probs.map(B::elements_mut::<f32>).transpose()?))
}

fn elsewhere(argument: &'static str) -> Error {
    // The devices were checked, but another thread may move a variable between the two.
    Error::argument(argument, "a tensor on the device of the others", "one elsewhere")
}

fn view<'r, B: Backend>(storage: &'r Storage, tensor: &Tensor) -> Result<View<'r, f32, 2, B::Memory>> {
    let storage = B::open(storage).ok_or_else(|| elsewhere("logits"))?;
    let (shape, stride) = (tensor.dims2()?, tensor.stride());
    let (offset, strides) = (tensor.layout().start_offset(), [stride[0], stride[1]]);
    Ok(View { data: B::elements(storage)?, offset, shape: [shape.0, shape.1], strides })
}

/// The slots, which a tensor of them is read second of.
fn slots_of<'s, B: Backend>(slots: Slots<'s>, read: &'s Read<'s>) -> Result<SlotsOf<'s, B>> {
    match slots {
        Slots::Rows => Ok(crate::Slots::Rows),
        Slots::Host(list) => Ok(crate::Slots::Host(list)),
        Slots::Device(tensor) => {
            let storage = B::open(read.storage(1)).ok_or_else(|| elsewhere("slots"))?;
            B::slots(storage, tensor.layout().start_offset(), tensor.elem_count())
        }
    }
}
