//! A hybrid of one's own: Mamba layers with attention between them and experts after it, which learns to look things up.
//!
//! ```text
//! cargo run --release --features nn --example 07_hybrid
//! ```

use candle_core::{D, DType, Device, Result, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};
use selective_scan::nn::train::{Schedule, Trainer, TrainerConfig};
use selective_scan::nn::{AttentionConfig, ExpertsConfig, LanguageModelConfig, LayerConfig, MambaConfig, MlpConfig};

/// Texts of four pairs, of 8 keys and 8 values, then a key again, after which comes its value; and what is to be learnt.
fn texts(batch: usize, random: &mut StdRng, device: &Device) -> Result<(Tensor, Tensor)> {
    let (mut ids, mut targets) = (Vec::new(), Vec::new());
    for _ in 0..batch {
        let values: [u32; 8] = std::array::from_fn(|_| random.random_range(8..16));
        let keys: [u32; 4] = std::array::from_fn(|_| random.random_range(0..8));
        let asked = keys[random.random_range(0..4)];
        ids.extend(keys.iter().flat_map(|&key| [key, values[key as usize]]).chain([asked]));
        // Nothing but the last can be known.
        targets.extend([-100; 8]);
        targets.push(i64::from(values[asked as usize]));
    }
    Ok((Tensor::from_vec(ids, (batch, 9), device)?, Tensor::from_vec(targets, (batch, 9), device)?))
}

fn main() -> Result<()> {
    let (device, mut random) = (Device::Cpu, StdRng::seed_from_u64(1));
    let mamba = LayerConfig::new(MambaConfig::new(32), MlpConfig::new(32, 64));
    // Four heads, two of keys; four experts, two of which each token goes through.
    let attention = AttentionConfig { n_kv_head: 2, ..AttentionConfig::new(32, 4) };
    let attention = LayerConfig::new(attention, ExpertsConfig::new(32, 32, 4, 2));
    let config = LanguageModelConfig::with_layers(16, [mamba.clone(), attention, mamba]);

    let (steps, schedule) = (800, Schedule::Cosine { warmup: 50, last: 0.1 });
    let options = TrainerConfig { learning_rate: 5e-3, schedule, steps, ..TrainerConfig::default() };
    let mut trainer = Trainer::language_model(&config, DType::F32, &device, options)?;
    for step in 1..=steps {
        let report = trainer.step_tokens(&[texts(64, &mut random, &device)?])?;
        if step % 200 == 0 {
            println!("step {step}: loss {:.3}", report.loss()?);
        }
    }
    // New texts, read into one cache for all layers; the answer is the token that comes next.
    let (model, (ids, targets)) = (trainer.model().detach()?, texts(100, &mut random, &device)?);
    let answers = model.prefill(&ids, &model.new_cache(100, DType::F32)?, None)?.argmax(D::Minus1)?;
    let right = answers.to_dtype(DType::I64)?.eq(&targets.narrow(1, 8, 1)?.squeeze(1)?)?;
    let right = right.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()?;
    println!("{right} of 100 answers are right; guessing gets 12");
    Ok(())
}
