//! Training: a short run by each learning rate, and a long one by the best.

use candle_core::{DType, Device, Tensor};
use indicatif::ProgressBar;
use selective_scan::nn::train::{AdamWConfig, Drops, LossOptions, Schedule, Trainer, TrainerConfig};
use selective_scan::nn::{LanguageModel, LanguageModelConfig};

use crate::data::{Corpus, MARK, Position, Windows};
use crate::models::Kind;
use crate::{Plan, Result};

/// A model, and what became of it.
pub struct Trained {
    pub model: LanguageModel,
    /// The rate that was chosen.
    pub learning_rate: f64,
    /// The rates of the short runs, and the bits per byte at the end of each.
    pub rates: Vec<(f64, f64)>,
    pub bits_per_byte: f64,
}

/// Cuts pieces into parts of a length, a mark before each, and takes as many of them as have so many bytes: by texts longer than
/// those of training, a Transformer would be measured by how it fails beyond them.
pub fn shorten(pieces: &mut Vec<Vec<u8>>, [total, length]: [usize; 2]) {
    let parts = pieces.iter().flat_map(|piece| piece[1..].chunks_exact(length));
    *pieces = parts.take(total / length).map(|part| [&[MARK], part].concat()).collect();
}

pub fn config(learning_rate: f64, steps: usize) -> TrainerConfig {
    TrainerConfig {
        learning_rate,
        schedule: Schedule::Cosine { warmup: steps.div_ceil(10), last: 0.1 },
        steps,
        optimizer: AdamWConfig { weight_decay: 0.1, clip: Some(1.0), ..AdamWConfig::default() },
        drops: Drops::default(),
    }
}

/// A trainer of a new model: on a GPU its arithmetic is `bf16`.
pub fn trainer(config: &LanguageModelConfig, of: TrainerConfig, device: &Device) -> Result<Trainer> {
    let dtype = if device.is_cpu() { DType::F32 } else { DType::BF16 };
    Ok(Trainer::language_model(config, dtype, device, of)?)
}

/// What all runs of a model share.
struct Runs<'a> {
    model: &'a LanguageModelConfig,
    plan: &'a Plan,
    corpus: &'a Corpus,
    device: &'a Device,
    bar: &'a ProgressBar,
}

/// Trains a model by the learning rate that does best in short runs: by the mean loss of their last quarter.
pub fn tuned(
    kind: Kind,
    model: &LanguageModelConfig,
    plan: &Plan,
    corpus: &Corpus,
    device: &Device,
    bar: &ProgressBar,
) -> Result<Trained> {
    let runs = Runs { model, plan, corpus, device, bar };
    let mut rates = Vec::new();
    for &rate in plan.rates {
        bar.set_message(format!("{}: learning rate {rate}", kind.name()));
        rates.push((rate, runs.train(rate, plan.short_steps())?.1));
    }
    // A run that came to no number is never the least.
    let tried = rates.iter().filter(|(_, bits)| bits.is_finite());
    let &(learning_rate, _) = tried.min_by(|a, b| a.1.total_cmp(&b.1)).ok_or("no learning rate trains this model")?;
    bar.set_message(format!("{}: training", kind.name()));
    let (trainer, _) = runs.train(learning_rate, plan.steps)?;
    let model = trainer.model().detach()?;
    let bits_per_byte = bits_per_byte(&model, &corpus.held_out, plan.batch)?;
    Ok(Trained { model, learning_rate, rates, bits_per_byte })
}

impl Runs<'_> {
    /// A run, and the bits per byte of its last quarter.
    fn train(&self, rate: f64, steps: usize) -> Result<(Trainer, f64)> {
        let &Self { plan, corpus, .. } = self;
        let mut trainer = trainer(self.model, config(rate, steps), self.device)?;
        // The same windows in the same order for all.
        let mut windows = Windows::new(&corpus.train, plan.length, plan.seed, Position::default())?;
        let mut losses = Vec::new();
        for step in 0..steps {
            let (ids, targets) = windows.next(plan.batch);
            // On the processor, where ids are looked at: a step then waits for no GPU.
            let tensor = |ids| Tensor::from_vec(ids, (plan.batch, plan.length), &Device::Cpu);
            let report = trainer.step_tokens(&[(tensor(ids)?, tensor(targets)?)])?;
            if 4 * (step + 1) > 3 * steps {
                losses.push(report.loss);
            }
            self.bar.inc(1);
        }
        let mean = Tensor::stack(&losses, 0)?.mean_all()?.to_scalar::<f32>()?;
        Ok((trainer, f64::from(mean) / std::f64::consts::LN_2))
    }
}

/// Bits per byte of texts of one length, a mark before each, `batch` of them at a time: every byte is predicted from all
/// before it in its text.
fn bits_per_byte(model: &LanguageModel, texts: &[Vec<u8>], batch: usize) -> Result<f64> {
    let mut nats = 0.0;
    for texts in texts.chunks(batch) {
        let length = texts[0].len() - 1;
        let tensor = |from: usize| {
            let ids = texts.iter().flat_map(|text| text[from..from + length].iter().map(|&byte| u32::from(byte)));
            Tensor::from_vec(ids.collect(), (texts.len(), length), &Device::Cpu)
        };
        let loss = model.loss(&tensor(0)?, &tensor(1)?, &LossOptions::default())?;
        nats += f64::from(loss.to_scalar::<f32>()?) * texts.len() as f64;
    }
    Ok(nats / texts.len() as f64 / std::f64::consts::LN_2)
}
