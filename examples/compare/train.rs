//! Training: a short run by each learning rate, and a long one by the best.

use candle_core::{DType, Device, Tensor};
use indicatif::ProgressBar;
use selective_scan::nn::train::{AdamWConfig, Drops, Schedule, Trainer, TrainerConfig};
use selective_scan::nn::{LanguageModel, LanguageModelConfig};

use crate::data::{Corpus, MARK, Position, Windows};
use crate::evaluate::bits_per_byte;
use crate::models::Kind;
use crate::{Plan, Result};

/// A model, and what became of it.
pub struct Trained {
    pub model: LanguageModel,
    /// The rate that was chosen.
    pub learning_rate: f64,
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

/// Trains a model by the learning rate that does best in short runs: by the mean loss of their last quarter.
pub fn tuned(
    kind: Kind,
    model: &LanguageModelConfig,
    plan: &Plan,
    corpus: &Corpus,
    device: &Device,
    bar: &ProgressBar,
) -> Result<Trained> {
    let mut best: Option<(f64, f64)> = None;
    for &rate in plan.rates {
        bar.set_message(format!("{}: learning rate {rate}", kind.name()));
        let (_, loss) = run(model, rate, plan.short_steps(), plan, corpus, device, bar)?;
        // One that is no number is never the least.
        if loss.is_finite() && best.is_none_or(|(_, least)| loss < least) {
            best = Some((rate, loss));
        }
    }
    let (learning_rate, _) = best.ok_or("no learning rate trains this model")?;
    bar.set_message(format!("{}: training", kind.name()));
    let (trainer, _) = run(model, learning_rate, plan.steps, plan, corpus, device, bar)?;
    let bits_per_byte = bits_per_byte(trainer.model(), &corpus.held_out)?;
    Ok(Trained { model: trainer.model().detach()?, learning_rate, bits_per_byte })
}

/// A run, and the mean loss of its last quarter.
fn run(
    model: &LanguageModelConfig,
    rate: f64,
    steps: usize,
    plan: &Plan,
    corpus: &Corpus,
    device: &Device,
    bar: &ProgressBar,
) -> Result<(Trainer, f64)> {
    let mut trainer = trainer(model, config(rate, steps), device)?;
    // The same windows in the same order for all.
    let mut windows = Windows::new(&corpus.train, plan.length, plan.seed, Position::default())?;
    let (mut sum, mut count) = (0.0, 0);
    for step in 0..steps {
        let (ids, targets) = windows.next(plan.batch);
        let tensor = |ids| Tensor::from_vec(ids, (plan.batch, plan.length), device);
        let report = trainer.step_tokens(&[(tensor(ids)?, tensor(targets)?)])?;
        if 4 * step >= 3 * steps {
            (sum, count) = (sum + f64::from(report.loss()?), count + 1);
        }
        bar.inc(1);
    }
    Ok((trainer, sum / f64::from(count)))
}
