//! Layers that share their weights, beside copies of them that do not.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use rand::Rng;
use selective_scan::nn::train::LossOptions;
use selective_scan::nn::{CheckpointFormat, LanguageModel, LanguageModelConfig, MambaConfig};

use super::{SAME, SAME_GRADIENTS, assert_close, bits, causal_blocks, ids, random, refusal, shake, values};

fn build(config: &LanguageModelConfig, variables: &VarMap) -> LanguageModel {
    LanguageModel::new(config, VarBuilder::from_varmap(variables, DType::F32, &Device::Cpu)).unwrap()
}

/// Results are those of a model whose layers have copies of the weights, and gradients the sums over the copies, with candle's
/// graph and without it.
#[test]
fn shared_weights_are_copies_whose_gradients_are_added() {
    let mut random = random();
    for tie_layers in [2, 4] {
        let mixer = MambaConfig { seed: random.random(), ..causal_blocks()[0].1.clone() };
        let mut config = LanguageModelConfig::with_mixer(11, 4, mixer);
        let apart = config.clone();
        config.backbone.tie_layers = tie_layers;
        let variables = VarMap::new();
        let drawn: BTreeMap<_, _> = build(&config, &variables).named_tensors().into_iter().collect();
        // Those that have weights begin as they do in a model that shares none.
        for (name, tensor) in build(&apart, &VarMap::new()).named_tensors() {
            if let Some(shared) = drawn.get(&name) {
                assert_eq!(bits(shared), bits(&tensor), "{name}");
            }
        }
        assert_eq!(drawn.len(), 2 + 4 / tie_layers * 10);
        shake(&variables, &mut random);
        let tied = build(&config, &variables);

        let copies = VarMap::new();
        let owner = |name: &str| match name.strip_prefix("backbone.layers.") {
            Some(rest) => {
                let (index, rest) = rest.split_once('.').unwrap();
                let index: usize = index.parse().unwrap();
                format!("backbone.layers.{}.{rest}", index / tie_layers * tie_layers)
            }
            None => name.to_string(),
        };
        let shared: BTreeMap<_, _> = tied.named_tensors().into_iter().collect();
        for (name, _) in build(&apart, &VarMap::new()).named_tensors() {
            let copy = Var::from_tensor(&shared[&owner(&name)].copy().unwrap()).unwrap();
            copies.data().lock().unwrap().insert(name, copy);
        }
        let untied = build(&apart, &copies);

        let (text, targets) = (ids(&mut random, 2, 9), ids(&mut random, 2, 9));
        assert_eq!(bits(&tied.forward(&text).unwrap()), bits(&untied.forward(&text).unwrap()));
        let loss = |model: &LanguageModel| model.loss(&text, &targets, &LossOptions::default()).unwrap();
        let apart = loss(&untied).backward().unwrap();
        let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
        for (name, variable) in copies.data().lock().unwrap().iter() {
            let gradient = apart.get(variable).unwrap().clone();
            let sum = match sums.remove(&owner(name)) {
                Some(sum) => (sum + gradient).unwrap(),
                None => gradient,
            };
            sums.insert(owner(name), sum);
        }
        let by_graph = loss(&tied).backward().unwrap();
        let (_, without) = tied.loss_and_gradients(&text, None, &targets, &LossOptions::default()).unwrap();
        for (name, variable) in variables.data().lock().unwrap().iter() {
            assert_close(by_graph.get(variable).unwrap(), &sums[name], SAME_GRADIENTS, name);
            assert_eq!(values(without.get(variable).unwrap()), values(by_graph.get(variable).unwrap()), "{name}");
        }

        // Each layer has a state of its own.
        let cache = tied.new_cache(2, DType::F32).unwrap();
        assert_eq!(cache.layers().len(), 4);
        tied.prefill(&text.narrow(1, 0, 8).unwrap(), &cache, None).unwrap();
        let stepped = tied.step(&text.narrow(1, 8, 1).unwrap().squeeze(1).unwrap(), &cache, None).unwrap();
        let whole = tied.forward(&text).unwrap().narrow(1, 8, 1).unwrap().squeeze(1).unwrap();
        assert_close(&stepped, &whole, SAME, "step");
    }
}

#[test]
fn shared_weights_are_kept_in_checkpoints() {
    let mut random = random();
    let mut config = LanguageModelConfig::with_mixer(11, 4, causal_blocks()[0].1.clone());
    config.backbone.tie_layers = 2;
    // Layers 2 and 3 are others.
    let other = MambaConfig { d_state: 7, ..causal_blocks()[0].1.clone() };
    config.backbone.layers.extend([2, 3].map(|index| (index, other.clone().into())));
    let variables = VarMap::new();
    build(&config, &variables);
    shake(&variables, &mut random);
    let model = build(&config, &variables);
    let text = model.config().to_json(CheckpointFormat::HuggingFace).unwrap();
    assert_eq!(LanguageModelConfig::from_json(&text).unwrap(), config, "{text}");
    let folder = std::env::temp_dir().join(format!("selective-scan-{}-tied", std::process::id()));
    model.save(&folder, CheckpointFormat::HuggingFace).unwrap();
    let loaded = LanguageModel::load(&folder, DType::F32, &Device::Cpu);
    std::fs::remove_dir_all(&folder).unwrap();
    let ids = ids(&mut random, 1, 9);
    assert_eq!(bits(&loaded.unwrap().forward(&ids).unwrap()), bits(&model.forward(&ids).unwrap()));

    config.backbone.layers.clear();
    assert!(refusal(config.to_json(CheckpointFormat::StateSpaces)).contains("tie_layers"));
    for bad in [0, 3, 5] {
        config.backbone.tie_layers = bad;
        let message = refusal(LanguageModel::new(&config, VarBuilder::zeros(DType::F32, &Device::Cpu)));
        assert!(message.contains("`tie_layers`: expected a divisor of n_layer = 4"), "{message}");
    }
    config.backbone.tie_layers = 2;
    config.backbone.layers.insert(3, other.into());
    let message = refusal(LanguageModel::new(&config, VarBuilder::zeros(DType::F32, &Device::Cpu)));
    assert!(message.contains("which share their weights"), "{message}");
}
