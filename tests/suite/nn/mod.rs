//! The Mamba block and the language model.

mod checkpoints;
pub mod decoder;
pub mod decoding;
mod drops;
mod generation;
#[cfg(feature = "candle-cuda")]
mod gpu;
mod hybrids;
mod initial;
mod layers;
mod loss;
mod mixed;
mod nodes;
mod packed;
mod parity;
mod refusals;
mod s4;
mod sampler;
pub mod serving;
mod tied;
mod trainer;
mod training;
mod variants;
mod vision;

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selective_scan::nn::{
    Cache, LanguageModel, LanguageModelConfig, LayerState, Mamba, MambaConfig, MambaState, Norms,
};

use crate::candle::values;
use crate::support::draw::seeded;

/// Two ways to one result in `f32`: each is within what the crate promises of the exact one.
const SAME: f64 = 1e-5;
/// That of gradients.
const SAME_GRADIENTS: f64 = 1e-4;

/// A random source that prints its seed, so that a failing test shows it.
fn random() -> StdRng {
    let (_, seed) = seeded();
    println!("SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Blocks that decode, each with something of its own.
fn causal_blocks() -> Vec<(&'static str, MambaConfig)> {
    let base = MambaConfig { d_inner: 20, d_state: 5, d_conv: 3, dt_rank: 3, ..MambaConfig::new(12) };
    vec![
        ("plain", base.clone()),
        ("biases", MambaConfig { conv_bias: false, proj_bias: true, ..base.clone() }),
        ("Jamba's norms", MambaConfig { norms: Norms::Weighted { eps: 1e-4 }, ..base.clone() }),
        ("Falcon's norms", MambaConfig { norms: Norms::Unweighted { eps: 1e-4 }, ..base.clone() }),
        ("time-invariant", MambaConfig { selective: false, ..base }),
    ]
}

/// Those and bidirectional ones.
fn all_blocks() -> Vec<(&'static str, MambaConfig)> {
    let mut blocks = causal_blocks();
    let both = |config: &MambaConfig| MambaConfig { bidirectional: true, ..config.clone() };
    blocks.extend([
        ("bidirectional", both(&blocks[0].1)),
        ("bidirectional with norms", both(&blocks[2].1)),
        ("bidirectional and time-invariant", both(&blocks[4].1)),
        ("bidirectional, averaged", MambaConfig { average_directions: true, ..both(&blocks[0].1) }),
    ]);
    blocks
}

/// Moves every variable a little, so that none is at the one or zero where it began.
fn shake(variables: &VarMap, random: &mut StdRng) {
    let data = variables.data().lock().unwrap();
    let ordered: BTreeMap<_, _> = data.iter().collect();
    for variable in ordered.values() {
        let noise = tensor(random, variable.dims(), 0.3);
        variable.set(&(variable.as_tensor() + noise).unwrap()).unwrap();
    }
}

fn tensor(random: &mut StdRng, shape: &[usize], scale: f32) -> Tensor {
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.random_range(-scale..scale)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn block(config: &MambaConfig, random: &mut StdRng) -> (Mamba, VarMap) {
    let (config, variables) = (MambaConfig { seed: random.random(), ..config.clone() }, VarMap::new());
    let build = || Mamba::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)).unwrap();
    build();
    shake(&variables, random);
    (build(), variables)
}

/// A model of two layers, with a vocabulary of 11.
fn model(block: &MambaConfig, random: &mut StdRng) -> (LanguageModel, VarMap) {
    let mamba = MambaConfig { seed: random.random(), ..block.clone() };
    let config = LanguageModelConfig::with_mixer(11, 2, mamba);
    let variables = VarMap::new();
    let build = || LanguageModel::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)).unwrap();
    build();
    shake(&variables, random);
    (build(), variables)
}

/// The same parameters in a model of another type, elsewhere, or of another configuration that has the same.
fn rebuilt(model: &LanguageModel, config: &LanguageModelConfig, dtype: DType, device: &Device) -> LanguageModel {
    let tensors = model.named_tensors().into_iter();
    let tensors = tensors.map(|(name, tensor)| (name, tensor.detach().to_device(device).unwrap())).collect();
    LanguageModel::new(config, VarBuilder::from_tensors(tensors, dtype, device)).unwrap()
}

/// The configuration of a model's Mamba blocks.
fn mamba(config: &LanguageModelConfig) -> &MambaConfig {
    config.backbone.mixer.as_mamba().unwrap()
}

/// The same, to be changed.
fn mamba_mut(config: &mut LanguageModelConfig) -> &mut MambaConfig {
    config.backbone.mixer.as_mamba_mut().unwrap()
}

/// The states of a model's Mamba blocks.
fn mamba_states(cache: &Cache) -> Vec<&MambaState> {
    cache.layers().iter().map(|layer| LayerState::as_mamba(layer).unwrap()).collect()
}

fn ids(random: &mut StdRng, batch: usize, length: usize) -> Tensor {
    let ids: Vec<u32> = (0..batch * length).map(|_| random.random_range(0..11)).collect();
    Tensor::from_vec(ids, (batch, length), &Device::Cpu).unwrap()
}

/// Offsets that cut a length into random pieces, none empty.
fn cuts(random: &mut StdRng, length: usize) -> Vec<usize> {
    let mut cuts = vec![0];
    while *cuts.last().unwrap() < length {
        let rest = length - cuts.last().unwrap();
        cuts.push(cuts.last().unwrap() + random.random_range(1..=rest.min(9)));
    }
    cuts
}

/// The norm of the difference over the norm of what is expected.
fn relative_error(got: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(got.dims(), expected.dims());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let (got, expected) = (values(got), values(expected));
    let error = norm(&mut got.iter().zip(&expected).map(|(got, expected)| got - expected));
    error / norm(&mut expected.into_iter())
}

#[track_caller]
fn assert_close(got: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
    let error = relative_error(got, expected);
    // Not `error > tolerance`, which NaN would pass.
    assert!(error <= tolerance, "{what}: error {error:.1e}");
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// The message of what must fail.
#[track_caller]
fn refusal<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("this should have been an error"),
        Err(error) => error.to_string(),
    }
}

/// The folder of a checkpoint that generate_models.py wrote.
fn checkpoint(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/models").join(name)
}
