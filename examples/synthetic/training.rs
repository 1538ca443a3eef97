//! Training on a task, with a look at held-out sequences now and then.

use std::time::{Duration, Instant};

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use indicatif::{ProgressBar, ProgressStyle};
use rand::rngs::StdRng;
use selective_scan::nn::train::{AdamWConfig, Trainer, TrainerConfig, cross_entropy};

use super::options::Settings;
use super::{Batch, Kind, Model, Streams, Task};

/// How many held-out sequences are looked at during training.
const VALIDATION: usize = 256;

/// A model after its training.
pub struct Trained {
    pub kind: Kind,
    pub model: Model,
    pub parameters: usize,
    pub steps: usize,
    pub time: Duration,
}

/// Trains a model until held-out accuracy reaches the target or the steps are over.
pub fn train(kind: Kind, task: &impl Task, settings: &Settings, device: &Device) -> Result<Trained> {
    let Streams { mut training, mut validation, .. } = Streams::new(settings.seed);
    let config = TrainerConfig {
        learning_rate: settings.lr,
        schedule: settings.schedule(),
        steps: settings.steps,
        // Adam, as the paper says: no weights decay.
        optimizer: AdamWConfig { beta2: 0.999, weight_decay: 0.0, ..AdamWConfig::default() },
        ..TrainerConfig::default()
    };
    let (variables, longest) = (VarMap::new(), settings.length.saturating_add(task.answers()));
    let model = Model::new(kind, settings, longest, VarBuilder::from_varmap(&variables, DType::F32, device))?;
    let mut trainer = Trainer::with_groups(model, &variables, config, |name| kind.group(name))?;
    let held_out = batches(task, &mut validation, VALIDATION, settings, device)?;

    let bar = ProgressBar::new(settings.steps as u64).with_prefix(kind.name());
    bar.set_style(ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len} {msg} ({eta} left)").expect("valid"));
    let (begin, mut taken, mut mean) = (Instant::now(), settings.steps, Mean::default());
    let mut curriculum = Curriculum::new(settings);
    for step in 1..=settings.steps {
        let batch = task.batch([settings.batch, curriculum.length], &mut training, device)?;
        let report = trainer
            .step(&[batch], |model, Batch { ids, targets }| cross_entropy(&answers(model, ids, task)?, targets))?;
        let loss = report.loss()?;
        mean.add(loss);
        let length = curriculum.length;
        curriculum.step(loss, settings);
        bar.inc(1);
        if step % settings.evaluate == 0 || step == settings.steps {
            let Score { right, asked, .. } = score(trainer.model(), &held_out, task)?;
            let accuracy = right as f64 / asked as f64;
            let message =
                format!("length {length}, loss {:.4}, held-out accuracy {:.1} %", mean.take(), 100.0 * accuracy);
            // A line for those who read a log; a terminal has the bar.
            if bar.is_hidden() {
                eprintln!("{} step {step}: {message}", kind.name());
            }
            bar.set_message(message);
            if accuracy >= settings.target {
                taken = step;
                break;
            }
        }
    }
    let time = begin.elapsed();
    bar.finish();
    let parameters = trainer.variables().all_vars().iter().map(|variable| variable.elem_count()).sum();
    Ok(Trained { kind, model: trainer.model().detach()?, parameters, steps: taken, time })
}

/// How many answers are right.
#[derive(Debug, Clone, Copy, Default)]
pub struct Score {
    pub right: usize,
    pub asked: usize,
    /// The sequences that are right in every answer.
    pub whole: usize,
    pub sequences: usize,
}

impl Trained {
    /// The score on as many fresh sequences.
    pub fn test(&self, task: &impl Task, sequences: usize, settings: &Settings) -> Result<Score> {
        let mut random = Streams::new(settings.seed).test;
        score(&self.model, &batches(task, &mut random, sequences, settings, self.model.device())?, task)
    }
}

fn batches(
    task: &impl Task,
    random: &mut StdRng,
    sequences: usize,
    settings: &Settings,
    device: &Device,
) -> Result<Vec<Batch>> {
    let &Settings { batch, length, .. } = settings;
    // All are kept.
    super::room("--test, --length", [sequences, length, task.answers()])?;
    let batch = |from: usize| task.batch([(sequences - from).min(batch), length], random, device);
    (0..sequences).step_by(settings.batch).map(batch).collect()
}

/// The logits where the model is asked: `(sequences, answers, vocab)`.
fn answers(model: &Model, ids: &Tensor, task: &impl Task) -> Result<Tensor> {
    let count = task.answers();
    model.forward(ids)?.narrow(1, ids.dim(1)? - count, count)
}

fn score(model: &Model, batches: &[Batch], task: &impl Task) -> Result<Score> {
    let model = model.detach()?;
    let mut score = Score::default();
    for Batch { ids, targets } in batches {
        let right = answers(&model, ids, task)?.argmax(D::Minus1)?.eq(targets)?.to_vec2::<u8>()?;
        for sequence in right {
            let count = sequence.iter().filter(|&&right| right == 1).count();
            score.right += count;
            score.asked += sequence.len();
            score.whole += usize::from(count == sequence.len());
            score.sequences += 1;
        }
    }
    Ok(score)
}

/// Sequences that grow longer: what is hard to find at full length is found in short sequences first.
struct Curriculum {
    length: usize,
    steps: usize,
    recent: Mean,
}

impl Curriculum {
    fn new(settings: &Settings) -> Self {
        Self { length: settings.start.min(settings.length), steps: 0, recent: Mean::default() }
    }

    fn step(&mut self, loss: f32, settings: &Settings) {
        self.steps += 1;
        self.recent.add(loss);
        let learned = self.steps.is_multiple_of(25) && self.recent.take() < 0.3;
        if learned || self.steps >= settings.stage {
            *self =
                Self { length: self.length.saturating_mul(2).min(settings.length), steps: 0, recent: Mean::default() };
        }
    }
}

/// The mean since it was last taken.
#[derive(Debug, Default)]
struct Mean {
    sum: f64,
    count: usize,
}

impl Mean {
    fn add(&mut self, value: f32) {
        self.sum += f64::from(value);
        self.count += 1;
    }

    fn take(&mut self) -> f64 {
        let Self { sum, count } = std::mem::take(self);
        sum / count as f64
    }
}
