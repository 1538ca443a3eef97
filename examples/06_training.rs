//! Training: a small language model learns to go on with patterns such as 3 7 1 3 7 1 3 7. A pattern is three to five random
//! digits, drawn again in every step, so that there is nothing to learn by heart: the model has to find the pattern in what
//! it has read. It is tested on texts that are longer than those that it learns from.
//!
//! `cargo run --release --features nn --example 06_training`

use candle_core::{D, DType, Device, Result, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selective_scan::nn::train::{Schedule, Trainer, TrainerConfig, cross_entropy};
use selective_scan::nn::{LanguageModel, LanguageModelConfig, Sampler, Sampling};

/// The first place that is predicted: the longest pattern has been seen whole by then, and has begun again.
const KNOWN: usize = 6;

fn main() -> Result<()> {
    let device = Device::Cpu;
    // A trainer has the model, its variables, an optimizer for these, and learning rates.
    let (steps, schedule) = (300, Schedule::Cosine { warmup: 20, last: 0.05 });
    let config = TrainerConfig { learning_rate: 1e-2, schedule, steps, ..TrainerConfig::default() };
    let mut trainer = Trainer::language_model(&LanguageModelConfig::new(10, 2, 48), DType::F32, &device, config)?;
    let parameters: usize = trainer.variables().all_vars().iter().map(|variable| variable.elem_count()).sum();
    println!("{parameters} parameters");

    let mut random = StdRng::seed_from_u64(1);
    let test = patterns(&mut random, 64, 60)?;
    for step in 0..=steps {
        let right = if step % 50 == 0 { Some(accuracy(trainer.model(), &test)?) } else { None };
        // A batch may come in parts; here it is one. The loss is any function of the model and a part.
        let rows = patterns(&mut random, 32, 24)?;
        let report = trainer.step(&[rows], |model, rows| {
            let (logits, next) = predictions(model, rows)?;
            cross_entropy(&logits, &next)
        })?;
        if let Some(right) = right {
            let loss = report.loss()?;
            println!("step {step:3}: loss {loss:.3}; of texts of 60 digits, {:5.1} % are right", 100.0 * right);
        }
    }

    // The beginnings of four texts as prompts; the rest by the state update.
    let model = trainer.model().detach()?;
    let (rows, cache) = (test.narrow(0, 0, 4)?, model.new_cache(4, DType::F32)?);
    let prompts = rows.narrow(1, 0, 10)?;
    let mut logits = model.prefill(&prompts, &cache, None)?;
    let mut sampler = Sampler::new(Sampling::greedy())?;
    let mut written = vec![String::new(); 4];
    for _ in 10..30 {
        let tokens = sampler.sample(&logits)?;
        written.iter_mut().zip(&tokens).for_each(|(row, token)| *row += &token.to_string());
        logits = model.step(&Tensor::new(&tokens[..], &device)?, &cache, None)?;
    }
    for (prompt, written) in prompts.to_vec2::<u32>()?.iter().zip(&written) {
        println!("{} goes on {written}", prompt.iter().map(u32::to_string).collect::<String>());
    }
    Ok(())
}

/// Texts of repeated patterns, `(count, length)`.
fn patterns(random: &mut StdRng, count: usize, length: usize) -> Result<Tensor> {
    let mut text = || {
        let pattern: Vec<u32> = (0..random.random_range(3..=5)).map(|_| random.random_range(0..10)).collect();
        pattern.into_iter().cycle().take(length).collect::<Vec<_>>()
    };
    Tensor::new((0..count).map(|_| text()).collect::<Vec<_>>(), &Device::Cpu)
}

/// The share of digits that are predicted right.
fn accuracy(model: &LanguageModel, rows: &Tensor) -> Result<f32> {
    // Detached from its variables, the model keeps nothing for a backward pass.
    let (logits, next) = predictions(&model.detach()?, rows)?;
    logits.argmax(D::Minus1)?.eq(&next)?.to_dtype(DType::F32)?.mean_all()?.to_scalar()
}

/// The logits from the place on where patterns are known, and the digits that they are to predict, each from those before it.
fn predictions(model: &LanguageModel, rows: &Tensor) -> Result<(Tensor, Tensor)> {
    let length = rows.dim(1)?;
    let logits = model.forward(&rows.narrow(1, 0, length - 1)?)?;
    let logits = logits.narrow(1, KNOWN - 1, length - KNOWN)?.contiguous()?;
    Ok((logits, rows.narrow(1, KNOWN, length - KNOWN)?.contiguous()?))
}
