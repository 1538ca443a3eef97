//! The optimizer and the losses of `nn::train`.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW, VarMap};
use rand::rngs::StdRng;
use selective_scan::nn::train::{AdamW, AdamWConfig, Group, cross_entropy};

use super::{assert_close, bits, random, refusal, relative_error, tensor, values};

/// Variables of some shapes, and a loss over all of them that is not a sum of their own.
fn variables(random: &mut StdRng, dtype: DType) -> VarMap {
    let map = VarMap::new();
    for (name, shape) in [("a.in_proj.weight", &[3, 4][..]), ("b.norm.weight", &[4]), ("c.out_proj.weight", &[4, 2])] {
        let variable = Var::from_tensor(&tensor(random, shape, 1.0).to_dtype(dtype).unwrap()).unwrap();
        map.data().lock().unwrap().insert(name.into(), variable);
    }
    map
}

fn named(map: &VarMap) -> BTreeMap<String, Var> {
    map.data().lock().unwrap().clone().into_iter().collect()
}

fn gradients(map: &VarMap, scale: f64) -> GradStore {
    let named = named(map);
    let [a, b, c] = ["a.in_proj.weight", "b.norm.weight", "c.out_proj.weight"]
        .map(|name| named[name].as_tensor().to_dtype(DType::F32).unwrap());
    let product = a.broadcast_mul(&b).unwrap().matmul(&c).unwrap().tanh().unwrap();
    (product.sum_all().unwrap() * scale).unwrap().backward().unwrap()
}

fn all_alike(weight_decay: f64) -> impl Fn(&str) -> Group {
    move |_| Group { learning_rate: 1.0, weight_decay }
}

/// The steps of candle-nn's optimizer, which divides and multiplies in another order: a few roundings of each step apart.
#[test]
fn steps_are_those_of_candle() {
    let mut random = random();
    let ours = variables(&mut random, DType::F32);
    let theirs = VarMap::new();
    for (name, variable) in named(&ours) {
        theirs.data().lock().unwrap().insert(name, Var::from_tensor(&variable.copy().unwrap()).unwrap());
    }
    let config = AdamWConfig { beta2: 0.99, ..AdamWConfig::default() };
    let mut optimizer = AdamW::with_groups(&ours, config, all_alike(0.2)).unwrap();
    let parameters = ParamsAdamW { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.2 };
    let mut candles = candle_nn::AdamW::new(theirs.all_vars(), parameters).unwrap();
    for _ in 0..20 {
        optimizer.step(&gradients(&ours, 1.0), 0.01).unwrap();
        candles.step(&gradients(&theirs, 1.0)).unwrap();
    }
    for (name, theirs) in named(&theirs) {
        assert_close(named(&ours)[&name].as_tensor(), theirs.as_tensor(), 1e-5, &name);
    }
    assert_eq!(optimizer.steps(), 20);
}

/// Only the size of clipped gradients is lost: what is 1,000 times as large makes the same step. Gradients below the norm
/// are left alone.
/// Gradients hold the graph of the step that they come from: a product's does that of its other factor. Were moments made of
/// them within the graph, each step's would be kept for as long as there is an optimizer.
#[test]
fn moments_keep_no_graph_of_the_steps() {
    let mut random = random();
    let variables = variables(&mut random, DType::F32);
    let mut optimizer = AdamW::new(&variables, AdamWConfig::default()).unwrap();
    let gradients = gradients(&variables, 1.0);
    assert!(named(&variables).values().any(|variable| gradients.get(variable).unwrap().track_op()));
    optimizer.step(&gradients, 0.01).unwrap();
    for (name, moment) in optimizer.moments() {
        assert!(!moment.track_op(), "{name}");
    }
}

#[test]
fn large_gradients_are_clipped_to_a_norm() {
    let mut random = random();
    let map = variables(&mut random, DType::F32);
    let before: BTreeMap<_, _> = named(&map).into_iter().map(|(name, v)| (name, v.copy().unwrap())).collect();
    let after = |clip: Option<f64>, scale: f64| {
        for (name, variable) in named(&map) {
            variable.set(&before[&name]).unwrap();
        }
        // With a large epsilon a step goes with the gradient rather than with its sign.
        let config = AdamWConfig { clip, eps: 1.0, ..AdamWConfig::default() };
        let mut optimizer = AdamW::new(&map, config).unwrap();
        let norm = optimizer.step(&gradients(&map, scale), 0.1).unwrap();
        let all: Vec<_> = named(&map).values().map(|variable| variable.flatten_all().unwrap()).collect();
        (norm, Tensor::cat(&all, 0).unwrap())
    };
    let (norm, unclipped) = after(None, 1.0);
    let (thousandfold, large) = after(Some(norm), 1000.0);
    assert!((thousandfold / norm - 1000.0).abs() < 1e-2, "{thousandfold}, {norm}");
    assert_close(&large, &unclipped, 1e-6, "clipped to the norm of the other");
    assert_eq!(bits(&after(Some(2.0 * norm), 1.0).1), bits(&unclipped), "below the norm");
    assert!(relative_error(&after(Some(norm / 2.0), 1.0).1, &unclipped) > 1e-4, "above it");
}

#[test]
fn groups_have_their_own_rates_and_decay() {
    let mut random = random();
    let map = variables(&mut random, DType::F32);
    let before: BTreeMap<_, _> = named(&map).into_iter().map(|(name, v)| (name, values(&v))).collect();
    // Gradients of zero, so that decay alone is seen.
    let mut nothing = gradients(&map, 1.0);
    for variable in named(&map).values() {
        nothing.insert(variable, variable.zeros_like().unwrap());
    }
    AdamW::new(&map, AdamWConfig::default()).unwrap().step(&nothing, 0.5).unwrap();
    for (name, variable) in named(&map) {
        let factor = if name.ends_with("_proj.weight") { 1.0 - 0.5 * 0.1 } else { 1.0 };
        for (after, before) in values(&variable).into_iter().zip(&before[&name]) {
            assert!((after - before * factor).abs() <= 1e-6 * before.abs(), "{name}: {after} from {before}");
        }
    }
    // A group whose rate is 0 stands still.
    let before: BTreeMap<_, _> = named(&map).into_iter().map(|(name, v)| (name, bits(&v))).collect();
    let group = |name: &str| Group { learning_rate: if name.starts_with('b') { 0.0 } else { 1.0 }, weight_decay: 0.1 };
    let mut optimizer = AdamW::with_groups(&map, AdamWConfig::default(), group).unwrap();
    optimizer.step(&gradients(&map, 1.0), 0.01).unwrap();
    for (name, variable) in named(&map) {
        assert_eq!(name.starts_with('b'), bits(&variable) == before[&name], "{name}");
    }
}

#[test]
fn a_restored_optimizer_goes_on_to_the_bit() {
    let mut random = random();
    for dtype in [DType::F32, DType::BF16] {
        let map = variables(&mut random, dtype);
        let mut optimizer = AdamW::new(&map, AdamWConfig { clip: Some(1.0), ..AdamWConfig::default() }).unwrap();
        for _ in 0..3 {
            optimizer.step(&gradients(&map, 1.0), 0.01).unwrap();
        }
        let (moments, steps) = (optimizer.moments(), optimizer.steps());
        assert!(moments.values().all(|moment| moment.dtype() == DType::F32), "{dtype:?}");
        let saved: BTreeMap<_, _> = named(&map).into_iter().map(|(name, v)| (name, v.copy().unwrap())).collect();
        let go_on = |optimizer: &mut AdamW| {
            for _ in 0..3 {
                optimizer.step(&gradients(&map, 1.0), 0.01).unwrap();
            }
            named(&map).values().map(|variable| bits(variable)).collect::<Vec<_>>()
        };
        let expected = go_on(&mut optimizer);
        for (name, variable) in named(&map) {
            variable.set(&saved[&name]).unwrap();
        }
        let mut restored = AdamW::new(&map, AdamWConfig { clip: Some(1.0), ..AdamWConfig::default() }).unwrap();
        restored.restore(moments.clone(), steps).unwrap();
        assert_eq!(go_on(&mut restored), expected, "{dtype:?}");

        // What does not fit changes nothing.
        let before: BTreeMap<_, _> =
            restored.moments().into_iter().map(|(name, moment)| (name, bits(&moment))).collect();
        let mut other = moments.clone();
        other.insert("c.out_proj.weight.mean".into(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
        assert!(refusal(restored.restore(other, 1)).contains("c.out_proj.weight.mean"));
        let mut fewer = moments;
        fewer.remove("b.norm.weight.mean_square");
        assert!(refusal(restored.restore(fewer, 1)).contains("b.norm.weight.mean_square"));
        assert!(restored.moments().iter().all(|(name, moment)| bits(moment) == before[name]));
    }
}

#[test]
fn accumulated_gradients_are_those_of_the_sum() {
    let mut random = random();
    let map = variables(&mut random, DType::F32);
    let optimizer = AdamW::new(&map, AdamWConfig::default()).unwrap();
    let mut total = gradients(&map, 0.25);
    optimizer.accumulate(&mut total, &gradients(&map, 0.75)).unwrap();
    let whole = gradients(&map, 1.0);
    for (name, variable) in named(&map) {
        assert_close(total.get(&variable).unwrap(), whole.get(&variable).unwrap(), 1e-6, &name);
    }
}

#[test]
fn what_makes_no_step_is_refused() {
    let mut random = random();
    let map = variables(&mut random, DType::F32);
    let refused = |config, word: &str| assert!(refusal(AdamW::new(&map, config)).contains(word), "{word}");
    refused(AdamWConfig { beta1: 1.0, ..AdamWConfig::default() }, "beta1");
    refused(AdamWConfig { beta2: f64::NAN, ..AdamWConfig::default() }, "beta2");
    refused(AdamWConfig { eps: -1.0, ..AdamWConfig::default() }, "eps");
    refused(AdamWConfig { clip: Some(0.0), ..AdamWConfig::default() }, "clip");
    refused(AdamWConfig { weight_decay: f64::INFINITY, ..AdamWConfig::default() }, "weight_decay");
    let before: BTreeMap<_, _> = named(&map).into_iter().map(|(name, v)| (name, bits(&v))).collect();
    let mut optimizer = AdamW::new(&map, AdamWConfig::default()).unwrap();
    assert!(refusal(optimizer.step(&gradients(&map, f64::NAN), 0.1)).contains("not finite"));
    assert!(refusal(optimizer.step(&gradients(&map, 1.0), f64::NAN)).contains("learning_rate"));
    let others = gradients(&variables(&mut random, DType::F32), 1.0);
    assert!(refusal(optimizer.step(&others, 0.1)).contains("a.in_proj.weight"));
    assert!(named(&map).iter().all(|(name, variable)| bits(variable) == before[name]));
    assert_eq!(optimizer.steps(), 0);
}

/// By hand: the logarithm of the softmax, in `f64`.
#[test]
fn cross_entropy_is_the_mean_of_the_negative_logarithms() {
    let mut random = random();
    let logits = tensor(&mut random, &[2, 3, 7], 4.0);
    let targets: Vec<u32> = vec![0, 6, 3, 3, 1, 5];
    let rows = values(&logits);
    let nats = rows
        .chunks(7)
        .zip(&targets)
        .map(|(row, &target)| row.iter().map(|logit| logit.exp()).sum::<f64>().ln() - row[target as usize]);
    let expected = nats.sum::<f64>() / 6.0;
    let got = cross_entropy(&logits, &Tensor::from_vec(targets.clone(), (2, 3), &Device::Cpu).unwrap()).unwrap();
    // Six roundings of sums of a size of at most 10.
    assert!((values(&got)[0] - expected).abs() <= 1e-5, "{got} for {expected}");
    let flat = Tensor::new(&targets[..], &Device::Cpu).unwrap();
    assert!(refusal(cross_entropy(&logits, &flat)).contains("targets"));
    assert!(
        refusal(cross_entropy(&logits.narrow(0, 0, 0).unwrap(), &flat.reshape((2, 3)).unwrap())).contains("targets")
    );
}
