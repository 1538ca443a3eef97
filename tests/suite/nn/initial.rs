//! A new model begins as in the paper.

use std::collections::BTreeMap;

use candle_core::{DType, Device};
use candle_nn::{VarBuilder, VarMap};
use rand::Rng;
use selective_scan::nn::{LanguageModel, LanguageModelConfig};

use super::{all_blocks, mamba_mut, random, values};

/// The parameters of a new model, by name.
fn new(config: &LanguageModelConfig) -> BTreeMap<String, Vec<f64>> {
    let variables = VarMap::new();
    let model = LanguageModel::new(config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)).unwrap();
    let names = variables.data().lock().unwrap().len();
    let tensors: BTreeMap<_, _> =
        model.named_tensors().into_iter().map(|(name, tensor)| (name, values(&tensor))).collect();
    assert_eq!(tensors.len(), names, "as many names as variables");
    tensors
}

fn config(seed: u64) -> LanguageModelConfig {
    let mut config = LanguageModelConfig::new(300, 4, 64);
    config.tie_embeddings = false;
    mamba_mut(&mut config).seed = seed;
    config
}

/// Holds values to be uniform between two bounds: all within, and their mean and mean square where those of that many draws
/// are but once in 10^9 (six deviations).
fn assert_uniform(values: &[f64], low: f64, high: f64, what: &str) {
    assert!(values.iter().all(|x| (low..=high).contains(x)), "{what}: beyond {low} to {high}");
    let unit: Vec<_> = values.iter().map(|x| (x - low) / (high - low)).collect();
    let count = unit.len() as f64;
    let mean = unit.iter().sum::<f64>() / count;
    let square = unit.iter().map(|x| x * x).sum::<f64>() / count;
    assert!((mean - 0.5).abs() < 6.0 * (1.0 / 12.0 / count).sqrt(), "{what}: mean {mean}");
    assert!((square - 1.0 / 3.0).abs() < 6.0 * (4.0 / 45.0 / count).sqrt(), "{what}: mean square {square}");
}

#[test]
fn as_in_the_paper() {
    let config = config(random().random());
    let all = new(&config);
    for layer in 0..4 {
        let get = |name: &str| &all[&format!("backbone.layers.{layer}.mixer.{name}")];
        for (index, a_log) in get("A_log").iter().enumerate() {
            assert_eq!(*a_log, f64::from(((index % 16 + 1) as f64).ln() as f32));
        }
        assert!(get("D").iter().all(|d| *d == 1.0));
        let steps: Vec<_> = get("dt_proj.bias").iter().map(|bias| bias.exp().ln_1p().ln()).collect();
        // The bias is rounded to f32, which moves a step by up to 1e-6 of its size.
        assert_uniform(&steps, 0.001f64.ln() - 1e-5, 0.1f64.ln() + 1e-5, "log of the steps");
        let bound = |fan_in: f64| 1.0 / fan_in.sqrt();
        for (name, bound) in [
            ("in_proj.weight", bound(64.0)),
            ("x_proj.weight", bound(128.0)),
            ("dt_proj.weight", bound(4.0)),
            ("conv1d.weight", bound(4.0)),
            ("conv1d.bias", bound(4.0)),
            // Four layers.
            ("out_proj.weight", bound(128.0) / 2.0),
        ] {
            assert_uniform(get(name), -bound, bound, name);
        }
        assert!(all[&format!("backbone.layers.{layer}.norm.weight")].iter().all(|weight| *weight == 1.0));
    }
    assert!(all["backbone.norm_f.weight"].iter().all(|weight| *weight == 1.0));
    assert_uniform(&all["lm_head.weight"], -0.125, 0.125, "lm_head");
    // Of 19,200 normal numbers: the deviation within 6/√(2·19200), and about 4.55 % beyond twice that.
    let embeddings = &all["backbone.embeddings.weight"];
    let count = embeddings.len() as f64;
    let deviation = (embeddings.iter().map(|x| x * x).sum::<f64>() / count).sqrt();
    assert!((deviation / 0.02 - 1.0).abs() < 6.0 / (2.0 * count).sqrt(), "{deviation}");
    let beyond = embeddings.iter().filter(|x| x.abs() > 0.04).count() as f64 / count;
    assert!((beyond - 0.0455).abs() < 6.0 * (0.0455 * 0.9545 / count).sqrt(), "{beyond}");
}

#[test]
fn steps_respect_their_bounds_and_floor() {
    let mut config = config(random().random());
    let mamba = mamba_mut(&mut config);
    (mamba.dt_min, mamba.dt_max, mamba.dt_init_floor) = (0.01, 0.5, 0.05);
    config.backbone.rescale_prenorm_residual = false;
    let all = new(&config);
    let steps: Vec<_> = all["backbone.layers.1.mixer.dt_proj.bias"].iter().map(|bias| bias.exp().ln_1p()).collect();
    assert!(steps.iter().all(|step| (0.049999..=0.500001).contains(step)));
    // 41 % would have been below the floor.
    assert!(steps.iter().filter(|step| **step < 0.050001).count() > steps.len() / 5);
    let bound = 1.0 / 128f64.sqrt();
    assert_uniform(&all["backbone.layers.1.mixer.out_proj.weight"], -bound, bound, "not shrunk");
}

#[test]
fn a_seed_is_a_model() {
    let seed: u64 = random().random();
    let first = new(&config(seed));
    assert_eq!(first, new(&config(seed)));
    let other = new(&config(seed.wrapping_add(1)));
    let drawn = |name: &String| !name.ends_with("A_log") && !name.ends_with(".D") && !name.contains("norm");
    for (name, values) in &first {
        assert_eq!(drawn(name), *values != other[name], "{name}");
    }
    let layers = [0, 1].map(|layer| &first[&format!("backbone.layers.{layer}.mixer.in_proj.weight")]);
    assert_ne!(layers[0], layers[1]);
}

#[test]
fn what_is_there_is_not_drawn_again() {
    for (name, block) in all_blocks() {
        let config = LanguageModelConfig::with_mixer(11, 2, block);
        let variables = VarMap::new();
        let build =
            |config| LanguageModel::new(config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)).unwrap();
        build(&config);
        for variable in variables.all_vars() {
            variable.set(&(variable.as_tensor() + 1.0).unwrap()).unwrap();
        }
        let before: BTreeMap<_, _> =
            variables.data().lock().unwrap().iter().map(|(name, variable)| (name.clone(), values(variable))).collect();
        let mut again = config.clone();
        mamba_mut(&mut again).seed = 1;
        for (parameter, tensor) in build(&again).named_tensors() {
            assert_eq!(before[&parameter], values(&tensor), "{name}, {parameter}");
        }
    }
}
