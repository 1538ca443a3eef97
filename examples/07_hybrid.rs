//! A hybrid of one's own: Mamba layers with attention between them and experts after some, which learns to look things up.
//!
//! ```text
//! cargo run --release --features nn --example 07_hybrid
//! ```

use candle_core::{D, DType, Device, Result, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selective_scan::nn::train::{Schedule, Trainer, TrainerConfig};
use selective_scan::nn::{AttentionConfig, ExpertsConfig, LanguageModelConfig, LayerConfig, MambaConfig, MlpConfig};

/// Pairs of a key and a value in each text, of 8 keys and 8 values; then a key again, after which comes its value.
const PAIRS: usize = 4;

fn texts(batch: usize, random: &mut StdRng, device: &Device) -> Result<(Tensor, Tensor)> {
    let (mut ids, mut targets) = (Vec::new(), Vec::new());
    for _ in 0..batch {
        let values: Vec<u32> = (0..8).map(|_| random.random_range(8..16)).collect();
        let keys: Vec<usize> = (0..PAIRS).map(|_| random.random_range(0..8)).collect();
        ids.extend(keys.iter().flat_map(|&key| [key as u32, values[key]]));
        let asked = keys[random.random_range(0..PAIRS)];
        ids.push(asked as u32);
        // Nothing else can be known.
        targets.extend([-100; 2 * PAIRS]);
        targets.push(i64::from(values[asked]));
    }
    let shape = (batch, 2 * PAIRS + 1);
    Ok((Tensor::from_vec(ids, shape, device)?, Tensor::from_vec(targets, shape, device)?))
}

fn main() -> Result<()> {
    let (device, mut random) = (Device::Cpu, StdRng::seed_from_u64(1));
    let mut config = LanguageModelConfig::with_mixer(16, 3, MambaConfig::new(32));
    config.backbone.feed_forward = Some(MlpConfig::new(32, 64).into());
    let attention = AttentionConfig { n_kv_head: 2, ..AttentionConfig::new(32, 4) };
    // In the second layer attention, and four experts, two of which each token goes through.
    config.backbone.layers.insert(1, LayerConfig::new(attention, ExpertsConfig::new(32, 32, 4, 2)));
    println!("{} parameters", config.parameter_count()?);

    let (steps, schedule) = (800, Schedule::Cosine { warmup: 50, last: 0.1 });
    let options = TrainerConfig { learning_rate: 5e-3, schedule, steps, ..TrainerConfig::default() };
    let mut trainer = Trainer::language_model(&config, DType::F32, &device, options)?;
    for step in 0..steps {
        let loss = trainer.step_tokens(&[texts(64, &mut random, &device)?])?.loss()?;
        if step % 200 == 0 || step + 1 == steps {
            println!("step {step}: loss {loss:.3}");
        }
    }
    // New texts, read into one cache for all layers; the answer is the token that comes next.
    let (ids, targets) = texts(100, &mut random, &device)?;
    let model = trainer.model().detach()?;
    let cache = model.new_cache_for(100, DType::F32, 2 * PAIRS + 1)?;
    let answers = model.prefill(&ids, &cache, None)?.argmax(D::Minus1)?.to_vec1::<u32>()?;
    let wanted = targets.to_vec2::<i64>()?;
    let right = answers.iter().zip(&wanted).filter(|(got, row)| i64::from(**got) == row[2 * PAIRS]).count();
    println!("{right} of 100 answers are right; guessing gets 12");
    Ok(())
}
