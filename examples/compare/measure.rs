//! How fast a model trains, reads and writes, and how much it keeps.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use indicatif::ProgressBar;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selective_scan::nn::decode::{Cache, Decoder, DecoderOptions};
use serde::{Deserialize, Serialize};

use crate::models::Kind;
use crate::train::{self, Trained};
use crate::{Plan, Result};

/// A model at a length.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    pub model: String,
    pub parameters: usize,
    pub bits_per_byte: f64,
    pub length: usize,
    pub train_tokens_per_s: Option<f64>,
    pub prefill_tokens_per_s: f64,
    pub decode_tokens_per_s: f64,
    /// What is kept of one sequence of this length.
    pub state_bytes: usize,
    /// None of what another run has measured.
    #[serde(skip)]
    pub learning_rate: Option<f64>,
}

/// Tokens of a step of training at least, so that short sequences come in batches.
const STEP: usize = 2048;
/// Tokens of a prompt that are read at a time.
const CHUNK: usize = 4096;
/// How long something is timed at least, and how often at least.
const LEAST: (Duration, u32) = (Duration::from_millis(500), 3);

pub fn all(kind: Kind, trained: &Trained, plan: &Plan, device: &Device, bar: &ProgressBar) -> Result<Vec<Row>> {
    let model = &trained.model;
    let mut random = StdRng::seed_from_u64(plan.seed);
    bar.set_message(format!("{}: steps of training", kind.name()));
    let mut rates = Vec::new();
    for &length in plan.train_lengths {
        let mut trainer = train::trainer(model.config(), train::config(1e-3, 1000), device)?;
        let batch = STEP.div_ceil(length);
        let mut tensor = || -> Result<Tensor> {
            let ids: Vec<u32> = (0..batch * length).map(|_| random.random_range(1..256)).collect();
            // As in training, on the processor.
            Ok(Tensor::from_vec(ids, (batch, length), &Device::Cpu)?)
        };
        let part = (tensor()?, tensor()?);
        let mut step = || -> Result<()> {
            // Reading the loss waits for the device.
            trainer.step_tokens(std::slice::from_ref(&part))?.loss()?;
            Ok(())
        };
        step()?;
        rates.push((length, (batch * length) as f64 / seconds(step)?));
        bar.inc(1);
    }
    bar.set_message(format!("{}: reading and writing", kind.name()));
    let parameters = model.named_tensors().iter().map(|(_, tensor)| tensor.elem_count()).sum();
    let capacity = plan.contexts.iter().max().ok_or("no length")? + 4096;
    let options = DecoderOptions { capacity: Some(capacity), ..DecoderOptions::default() };
    let mut decoder = Decoder::new(model, &options)?;
    let text: Vec<u32> = (0..capacity).map(|_| random.random_range(1..256)).collect();
    // What is only done once, such as finding out what the processor can.
    decoder.prefill(&[&text[..64]], &[0])?;
    decoder.step(&[1], &[0])?;
    let mut rows = Vec::new();
    for &length in plan.contexts {
        let reading = seconds(|| {
            decoder.cache().reset(None)?;
            text[..length].chunks(CHUNK).try_for_each(|chunk| waited(&decoder.prefill(&[chunk], &[0])?))
        })?;
        // What is written is taken back.
        let there = decoder.cache().take(&[0])?;
        let state_bytes = bytes(decoder.cache())?;
        let mut steps = 0;
        let decoding = seconds(|| {
            steps += 1;
            // As far as there is room; the state then has as many tokens as at the beginning.
            if steps % 1024 == 0 {
                decoder.cache().put(&there, &[0])?;
            }
            waited(&decoder.step(&[1 + steps % 255], &[0])?)
        })?;
        rows.push(Row {
            model: kind.name().into(),
            parameters,
            bits_per_byte: trained.bits_per_byte,
            length,
            train_tokens_per_s: rates.iter().find(|(at, _)| *at == length).map(|(_, rate)| *rate),
            prefill_tokens_per_s: length as f64 / reading,
            decode_tokens_per_s: 1.0 / decoding,
            state_bytes,
            learning_rate: Some(trained.learning_rate),
        });
        bar.inc(1);
    }
    Ok(rows)
}

/// Waits until logits are there: their greatest is chosen, as decoding does.
fn waited(logits: &Tensor) -> Result<()> {
    logits.argmax(1)?.to_vec1::<u32>()?;
    Ok(())
}

/// Seconds of a call, the least of as many as take long enough: what else runs on the machine only adds to it.
fn seconds(mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let (start, mut calls, mut least) = (Instant::now(), 0, f64::INFINITY);
    loop {
        let before = start.elapsed();
        call()?;
        let passed = start.elapsed();
        calls += 1;
        least = least.min((passed - before).as_secs_f64());
        // What takes seconds is timed once.
        if passed >= LEAST.0 && (calls >= LEAST.1 || passed >= 5 * LEAST.0) {
            return Ok(least);
        }
    }
}

/// The bytes of what a cache of one slot keeps: of attention the keys and values that are there.
fn bytes(cache: &Cache) -> Result<usize> {
    let size = |dtype: DType| dtype.size_in_bytes();
    let mut sum = 0;
    for layer in cache.layers() {
        if let Some(state) = layer.as_mamba() {
            sum += (state.conv.elem_count() + state.ssm.elem_count()) * size(state.ssm.dtype());
        }
        if let Some(state) = layer.as_recurrent() {
            let count = state.h.elem_count() + state.c.as_ref().map_or(0, Tensor::elem_count);
            sum += count * size(state.h.dtype());
        }
        if let Some(state) = layer.as_attention() {
            let tokens: u32 = state.lengths()?.iter().sum();
            sum += 2 * tokens as usize * state.k.dim(2)? * size(state.k.dtype());
        }
    }
    Ok(sum)
}
