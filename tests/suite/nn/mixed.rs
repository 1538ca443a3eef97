//! Half arithmetic on `f32` variables, and sums that a half type would lose.

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss};
use rand::Rng;
use rand::rngs::StdRng;
use selective_scan::nn::{Checkpoint, LanguageModel, LanguageModelConfig, Mamba, MambaConfig};

use super::{all_blocks, bits, checkpoint, ids, random, relative_error, shake, tensor, values};

const HALF: [DType; 2] = [DType::BF16, DType::F16];

/// The distance from 1 to the next number.
fn epsilon(dtype: DType) -> f64 {
    if dtype == DType::BF16 { 2f64.powi(-7) } else { 2f64.powi(-10) }
}

fn model_on(config: &LanguageModelConfig, variables: &VarMap, dtype: DType) -> LanguageModel {
    LanguageModel::new(config, VarBuilder::from_varmap(variables, dtype, &Device::Cpu)).unwrap()
}

/// Variables of `f32`, moved a little, and the configuration that they are of.
fn variables(block: &MambaConfig, random: &mut StdRng) -> (LanguageModelConfig, VarMap) {
    let mamba = MambaConfig { seed: random.random(), ..block.clone() };
    let config = LanguageModelConfig { tie_embeddings: false, ..LanguageModelConfig::with_mixer(11, 2, mamba) };
    let variables = VarMap::new();
    model_on(&config, &variables, DType::F32);
    shake(&variables, random);
    (config, variables)
}

/// Counts to 16 as the example of the module does, and gives the last loss and how many variables it has changed.
fn learn_to_count(dtype: DType, variables_dtype: DType) -> (f64, usize, usize) {
    let config = LanguageModelConfig::new(16, 2, 32);
    let variables = VarMap::new();
    model_on(&config, &variables, variables_dtype);
    let before: Vec<_> = variables.all_vars().iter().map(|variable| variable.as_tensor().copy().unwrap()).collect();
    let model = model_on(&config, &variables, dtype);
    let text: Vec<u32> = (0..33).map(|i| i % 16).collect();
    let ids = Tensor::new(&text[..32], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let next = Tensor::new(&text[1..], &Device::Cpu).unwrap();
    let all = variables.all_vars();
    let mut optimizer = AdamW::new(all.clone(), ParamsAdamW { lr: 1e-2, ..Default::default() }).unwrap();
    let mut last = f64::NAN;
    for _ in 0..30 {
        let loss = loss::cross_entropy(&model.forward(&ids).unwrap().squeeze(0).unwrap(), &next).unwrap();
        optimizer.backward_step(&loss).unwrap();
        last = values(&loss)[0];
    }
    let changed = all.iter().zip(&before).filter(|(variable, before)| values(variable) != values(before)).count();
    (last, changed, before.len())
}

/// The loss of `f32` training is 0.020, from 2.8. Rounding moves a loss that falls so fast by a good part of itself, so
/// half of it either way is granted; where most of the variables stand still it ends at 2.49.
#[test]
fn half_arithmetic_on_f32_variables_trains_as_f32_does() {
    let (expected, changed, count) = learn_to_count(DType::F32, DType::F32);
    assert_eq!(changed, count);
    assert!((0.01..0.04).contains(&expected), "{expected}");
    for dtype in HALF {
        let (loss, changed, _) = learn_to_count(dtype, DType::F32);
        println!("{dtype:?}: {loss:.4}, f32: {expected:.4}");
        assert_eq!(changed, count, "{dtype:?}: variables that training moves");
        assert!((loss - expected).abs() <= 0.5 * expected, "{dtype:?}: {loss} for {expected}");
    }
}

fn gradients(model: &LanguageModel, ids: &Tensor, weights: &Tensor) -> GradStore {
    (model.forward(ids).unwrap() * weights).unwrap().sum_all().unwrap().backward().unwrap()
}

/// Gradients of a half model come to the variables, whatever their type, and are those of `f32` but for rounding.
///
/// The two layers have some twenty operators one after another, each of which rounds by half an epsilon, forward and
/// backward: √40 of these if they are independent, and 16 times as much where terms cancel. There are 1,024 rows, so that
/// sums over rows in a half type would be off by more than that.
#[test]
fn gradients_reach_variables_of_every_type() {
    let mut random = random();
    for (name, block) in all_blocks() {
        let (config, variables) = variables(&block, &mut random);
        let ids = ids(&mut random, 2, 512);
        let weights = tensor(&mut random, &[2, 512, 11], 1.0);
        let exact = gradients(&model_on(&config, &variables, DType::F32), &ids, &weights);
        for (dtype, on) in
            [(DType::BF16, DType::F32), (DType::F16, DType::F32), (DType::BF16, DType::BF16), (DType::F32, DType::BF16)]
        {
            let (named, stand_in) = (variables.data().lock().unwrap(), VarMap::new());
            for (parameter, variable) in named.iter() {
                let variable = if on == DType::F32 {
                    variable.clone()
                } else {
                    Var::from_tensor(&variable.to_dtype(on).unwrap()).unwrap()
                };
                stand_in.data().lock().unwrap().insert(parameter.clone(), variable);
            }
            let found = gradients(&model_on(&config, &stand_in, dtype), &ids, &weights);
            for (parameter, variable) in stand_in.data().lock().unwrap().iter() {
                let what = format!("{name}, {dtype:?} on {on:?}, {parameter}");
                let gradient = found.get(variable).unwrap_or_else(|| panic!("{what}: no gradient"));
                assert_eq!(gradient.dtype(), on, "{what}");
                let error = relative_error(gradient, exact.get(&named[parameter]).unwrap());
                let rounding = epsilon(if dtype == DType::F32 { on } else { dtype });
                assert!(error <= 16.0 * 40f64.sqrt() * rounding / 2.0, "{what}: error {error:.1e}");
            }
        }
    }
}

#[test]
fn what_is_loaded_into_variables_takes_effect() {
    let mut random = random();
    let path = std::env::temp_dir().join(format!("selective-scan-{}-variables.safetensors", std::process::id()));
    for (name, block) in all_blocks() {
        let (config, mut here) = variables(&block, &mut random);
        let (_, other) = variables(&block, &mut random);
        let ids = ids(&mut random, 1, 9);
        for dtype in [DType::F32, DType::BF16] {
            let model = model_on(&config, &here, dtype);
            let before = bits(&model.forward(&ids).unwrap());
            shake(&other, &mut random);
            other.save(&path).unwrap();
            here.load(&path).unwrap();
            let after = bits(&model.forward(&ids).unwrap());
            assert_ne!(before, after, "{name}, {dtype:?}");
            assert_eq!(after, bits(&model_on(&config, &other, dtype).forward(&ids).unwrap()), "{name}, {dtype:?}");
            // Decoding computes with the same.
            let prefill = |model: &LanguageModel| {
                bits(&model.prefill(&ids, &model.new_cache(1, DType::F32).unwrap(), None).unwrap())
            };
            if !block.bidirectional {
                assert_eq!(prefill(&model), prefill(&model_on(&config, &other, dtype)), "{name}, {dtype:?}");
            }
        }
    }
    std::fs::remove_file(&path).unwrap();
}

/// A backend other than `VarMap` gives what it is asked for in another type, a copy. The model stands on the variables
/// all the same.
#[test]
fn variables_of_any_backend_are_trained() {
    let mut random = random();
    let (config, map) = variables(&all_blocks()[2].1, &mut random);
    let named: HashMap<_, _> = map.data().lock().unwrap().clone();
    let tensors = named.iter().map(|(name, variable)| (name.clone(), variable.as_tensor().clone())).collect();
    let vb = VarBuilder::from_tensors(tensors, DType::BF16, &Device::Cpu);
    let model = LanguageModel::new(&config, vb).unwrap();
    let ids = ids(&mut random, 1, 9);
    shake(&map, &mut random);
    let expected = model_on(&config, &map, DType::BF16).forward(&ids).unwrap();
    assert_eq!(bits(&model.forward(&ids).unwrap()), bits(&expected));
}

/// An AdamW step of 1e-5 is a thousandth of an epsilon of bf16 at 0.3: without masters in `f32`, 50 of them change only
/// weights that are next to nothing.
#[test]
fn a_checkpoint_is_trained_on_f32_masters() {
    let mut random = random();
    let read = Checkpoint::read(checkpoint("mamba_untied"), &Device::Cpu).unwrap();
    for dtype in HALF {
        let (model, variables) = read.trainable(dtype).unwrap();
        assert_eq!(model.dtype(), dtype);
        let ids = ids(&mut random, 2, 20);
        let plain = read.model(dtype).unwrap();
        assert_eq!(bits(&model.forward(&ids).unwrap()), bits(&plain.forward(&ids).unwrap()), "{dtype:?}");
        let named = variables.data().lock().unwrap();
        let before: HashMap<_, _> =
            named.iter().map(|(name, variable)| (name, variable.as_tensor().copy().unwrap())).collect();
        let all: Vec<_> = named.values().cloned().collect();
        assert!(all.iter().all(|variable| variable.dtype() == DType::F32), "{dtype:?}: masters");
        let parameters = ParamsAdamW { lr: 1e-5, weight_decay: 0.0, ..Default::default() };
        let mut optimizer = AdamW::new(all, parameters).unwrap();
        let target = ids.flatten_all().unwrap();
        for _ in 0..50 {
            let logits = model.forward(&ids).unwrap().flatten(0, 1).unwrap();
            optimizer.backward_step(&loss::cross_entropy(&logits, &target).unwrap()).unwrap();
        }
        for (name, variable) in named.iter().filter(|(name, _)| name.ends_with("in_proj.weight")) {
            let (before, after) = (values(&before[name]), values(variable));
            let changed = before.iter().zip(&after).filter(|(before, after)| before != after).count();
            assert!(changed * 100 > before.len() * 99, "{dtype:?}, {name}: {changed} of {} change", before.len());
        }
        // What is saved is what was trained.
        for (name, tensor) in model.detach().unwrap().named_tensors() {
            assert_eq!(bits(&tensor), bits(&named[&name]), "{name}");
        }
    }
}

/// The gradient of one token's embedding, 4,096 times in a text, is the sum of 4,096 rows that are as many tokens with that
/// embedding. Each of those is rounded once, and so is the sum: by an epsilon together.
#[test]
fn the_gradient_of_embeddings_is_rounded_once() {
    const TOKENS: usize = 4096;
    let mut random = random();
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let mamba = MambaConfig { d_inner: 8, d_state: 2, seed: random.random(), ..MambaConfig::new(4) };
        let mut config =
            LanguageModelConfig { tie_embeddings: false, ..LanguageModelConfig::with_mixer(TOKENS, 1, mamba) };
        // The gradient of the stream is then of the model's type.
        config.backbone.residual_in_f32 = dtype != DType::F16;
        let variables = VarMap::new();
        let model = model_on(&config, &variables, dtype);
        let embeddings = variables.data().lock().unwrap()["backbone.embeddings.weight"].clone();
        let row = tensor(&mut random, &[1, 4], 1.0).to_dtype(dtype).unwrap();
        embeddings.set(&row.repeat((TOKENS, 1)).unwrap()).unwrap();
        let gradient = |ids: Vec<u32>| {
            let ids = Tensor::from_vec(ids, (1, TOKENS), &Device::Cpu).unwrap();
            // All alike, so that nothing cancels and a sum in a half type stands still; of a size that f16 holds.
            let states = model.hidden_states(&ids).unwrap();
            let loss = (states[0].to_dtype(DType::F32).unwrap().sum_all().unwrap() * 0.1).unwrap();
            loss.backward().unwrap().get(&embeddings).unwrap().clone()
        };
        let apart = gradient((0..TOKENS as u32).collect());
        let together = gradient(vec![7; TOKENS]);
        let expected = apart.to_dtype(DType::F64).unwrap().sum(0).unwrap();
        let sum = together.get(7).unwrap();
        let bound = if dtype == DType::F32 { 1e-6 } else { epsilon(dtype) };
        let error = relative_error(&sum, &expected);
        assert!(error <= bound, "{dtype:?}: error {error:.1e}");
        let size = |tensor: &Tensor| values(tensor).iter().map(|x| x.abs()).sum::<f64>();
        let elsewhere = size(&together) - size(&sum);
        assert!(elsewhere.abs() <= 1e-9, "{dtype:?}: other tokens have no gradient");
    }
}

/// The same bits on any number of threads.
#[test]
fn the_gradient_of_embeddings_does_not_depend_on_threads() {
    let mut random = random();
    let (config, variables) = variables(&all_blocks()[0].1, &mut random);
    let (ids, weights) = (ids(&mut random, 4, 300), tensor(&mut random, &[4, 300, 11], 1.0));
    let model = model_on(&config, &variables, DType::F32);
    let embeddings = variables.data().lock().unwrap()["backbone.embeddings.weight"].clone();
    let all: Vec<_> = [1, 2, 5]
        .into_iter()
        .map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| bits(gradients(&model, &ids, &weights).get(&embeddings).unwrap()))
        })
        .collect();
    assert!(all.iter().all(|bits| *bits == all[0]));
}

/// A bias is added to every row, so its gradient is their number if that of each output is 1; 4,096 is a number of both
/// types, and a sum of ones stands still at 256 in bf16 and at 2,048 in f16.
#[test]
fn the_gradient_of_a_bias_counts_all_rows() {
    let mut random = random();
    let config = MambaConfig { proj_bias: true, ..all_blocks()[0].1.clone() };
    for dtype in HALF {
        let variables = VarMap::new();
        let block = Mamba::new(&config, VarBuilder::from_varmap(&variables, dtype, &Device::Cpu)).unwrap();
        let x = tensor(&mut random, &[1, 4096, 12], 1.0).to_dtype(dtype).unwrap();
        let sum = block.forward(&x).unwrap().to_dtype(DType::F32).unwrap().sum_all().unwrap();
        let gradients = sum.backward().unwrap();
        let bias = gradients.get(&variables.data().lock().unwrap()["out_proj.bias"]).unwrap();
        assert_eq!(values(bias), [4096.0; 12], "{dtype:?}");
    }
}

/// The gradient of a matrix is a sum over rows as well, within candle's product. With 16,384 rows of one sign a sum in a half
/// type would stand still far below the end; what the block computes is off by a few epsilons at each row.
#[test]
fn the_gradient_of_a_matrix_counts_all_rows() {
    let mut random = random();
    let config = all_blocks()[0].1.clone();
    let variables = VarMap::new();
    let build = |dtype| Mamba::new(&config, VarBuilder::from_varmap(&variables, dtype, &Device::Cpu)).unwrap();
    build(DType::F32);
    shake(&variables, &mut random);
    let row = tensor(&mut random, &[1, 1, 12], 1.0);
    let gradient = |dtype| {
        let x = row.repeat((1, 16_384, 1)).unwrap().to_dtype(dtype).unwrap();
        // Each row has a share of the sum, so that f16 can hold all of it.
        let mean = (build(dtype).forward(&x).unwrap().to_dtype(DType::F32).unwrap().sum_all().unwrap() / 64.0).unwrap();
        mean.backward().unwrap().get(&variables.data().lock().unwrap()["out_proj.weight"]).unwrap().clone()
    };
    let exact = gradient(DType::F32);
    for dtype in HALF {
        let error = relative_error(&gradient(dtype), &exact);
        println!("{dtype:?}: {error:.1e}");
        assert!(error <= 8.0 * epsilon(dtype), "{dtype:?}: error {error:.1e}");
    }
}

#[test]
fn parameters_are_changed_by_name() {
    let mut random = random();
    for (name, block) in all_blocks() {
        let (config, variables) = variables(&block, &mut random);
        let ids = ids(&mut random, 1, 9);
        let model = model_on(&config, &variables, DType::F32);
        let mut names = Vec::new();
        let doubled = model
            .map_parameters(|name, tensor| {
                names.push(name.to_string());
                tensor * 2.0
            })
            .unwrap();
        let expected: Vec<_> = model.named_tensors().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, expected, "{name}");
        // What is given is computed with, and its gradients come to the variables, twice over.
        let other = VarMap::new();
        for (name, variable) in variables.data().lock().unwrap().iter() {
            let twice = Var::from_tensor(&(variable.as_tensor() * 2.0).unwrap()).unwrap();
            other.data().lock().unwrap().insert(name.clone(), twice);
        }
        let weights = tensor(&mut random, &[1, 9, 11], 1.0);
        let plain = model_on(&config, &other, DType::F32);
        assert_eq!(bits(&doubled.forward(&ids).unwrap()), bits(&plain.forward(&ids).unwrap()), "{name}");
        let (found, wanted) = (gradients(&doubled, &ids, &weights), gradients(&plain, &ids, &weights));
        for (parameter, variable) in variables.data().lock().unwrap().iter() {
            let wanted = (wanted.get(&other.data().lock().unwrap()[parameter]).unwrap() * 2.0).unwrap();
            let error = relative_error(found.get(variable).unwrap(), &wanted);
            assert!(error <= super::SAME_GRADIENTS, "{name}, {parameter}: error {error:.1e}");
        }
        // A half tensor in the place of an `f32` one is computed with in the model's type.
        let half = model.map_parameters(|_, tensor| tensor.detach().to_dtype(DType::BF16)).unwrap();
        assert_eq!(half.forward(&ids).unwrap().dtype(), DType::F32);
        let message = super::refusal(model.map_parameters(|_, tensor| tensor.unsqueeze(0)));
        assert!(message.contains("backbone.embeddings.weight"), "{message}");
        let message = super::refusal(model.map_parameters(|_, tensor| tensor.to_dtype(DType::U8)));
        assert!(message.contains("backbone.embeddings.weight"), "{message}");
    }
}
