//! Training of a model that tells images apart.

use std::time::{Duration, Instant};

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng;
use rand::rngs::StdRng;
use selective_scan::nn::train::{AdamWConfig, Drops, Group, Schedule, Trainer, TrainerConfig, cross_entropy};

use super::{Batch, Digits, Options, shuffled};

/// How a model is trained.
pub struct Recipe<'a> {
    pub name: &'a str,
    pub epochs: usize,
    pub learning_rate: f64,
    /// The group of a parameter by its name.
    pub group: &'a dyn Fn(&str) -> Group,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Trained {
    pub parameters: usize,
    /// Of the held-out images.
    pub right: usize,
    pub asked: usize,
    /// The mean loss of the last epoch of training.
    pub loss: f64,
    /// That of training alone, without looks at what is held out.
    pub time: Duration,
    pub images: usize,
}

/// A model that tells images apart.
pub trait Model: Sized {
    /// Images `(images, rows, columns)` to logits `(images, classes)`.
    fn forward(&self, pixels: &Tensor) -> Result<Tensor>;

    /// The same model, which leaves that out.
    fn with_drops(&self, drops: Drops) -> Result<Self>;
}

/// Trains a model that `build` makes of variables.
pub fn train<M: Model>(
    recipe: &Recipe,
    digits: &Digits,
    options: &Options,
    device: &Device,
    build: impl Fn(VarBuilder) -> Result<M>,
) -> Result<Trained> {
    let variables = VarMap::new();
    let model = build(VarBuilder::from_varmap(&variables, DType::F32, device))?;
    let (count, size) = (digits.train.len(), options.batch());
    let steps = recipe.epochs.saturating_mul(count.div_ceil(size));
    let config = TrainerConfig {
        learning_rate: recipe.learning_rate,
        schedule: Schedule::Cosine { warmup: steps / 20, last: 0.0 },
        steps,
        drops: options.drops(),
        optimizer: AdamWConfig { clip: Some(1.0), beta2: 0.999, ..AdamWConfig::default() },
    };
    let mut trainer = Trainer::with_groups(model, &variables, config, recipe.group)?;
    let held_out = digits.test_batches(size, device)?;

    let bar = ProgressBar::new(steps as u64).with_prefix(recipe.name.to_string());
    bar.set_style(ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len} {msg} ({eta} left)").expect("valid"));
    let mut random = StdRng::seed_from_u64(options.seed());
    let (mut time, mut loss, mut right) = (Duration::ZERO, f64::NAN, 0);
    for epoch in 1..=recipe.epochs {
        let begin = Instant::now();
        let mut sum = 0.0;
        for picks in shuffled(count, &mut random).chunks(size) {
            let batch = digits.training_batch(picks, options.shift(), &mut random, device)?;
            let drops = trainer.drops();
            let report = trainer.step(&[batch], |model, Batch { pixels, labels }| {
                cross_entropy(&model.with_drops(drops)?.forward(pixels)?, labels)
            })?;
            sum += f64::from(report.loss()?) * picks.len() as f64;
            bar.inc(1);
        }
        time += begin.elapsed();
        loss = sum / count as f64;
        right = score(&held_out, trainer.model())?;
        let accuracy = 100.0 * right as f64 / digits.test.len() as f64;
        let message = format!("epoch {epoch}, loss {loss:.4}, held-out accuracy {accuracy:.1} %");
        // A line for those who read a log; a terminal has the bar.
        if bar.is_hidden() {
            eprintln!("{}: {message}", recipe.name);
        }
        bar.set_message(message);
    }
    bar.finish();
    let parameters = variables.all_vars().iter().map(|variable| variable.elem_count()).sum();
    let images = recipe.epochs * count;
    Ok(Trained { parameters, right, asked: digits.test.len(), loss, time, images })
}

/// How many of the images get the highest logit for their own label.
fn score(batches: &[Batch], model: &impl Model) -> Result<usize> {
    let mut right = 0;
    for Batch { pixels, labels } in batches {
        let best = model.forward(pixels)?.detach().argmax(D::Minus1)?;
        right += best.eq(labels)?.to_vec1::<u8>()?.iter().filter(|&&right| right == 1).count();
    }
    Ok(right)
}
