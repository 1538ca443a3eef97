//! The optimizer and the losses of `nn::train`.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW, VarMap};
use rand::rngs::StdRng;
use selective_scan::nn::train::{AdamW, AdamWConfig, Group, LossScale, cross_entropy};

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
    (loss(map) * scale).unwrap().backward().unwrap()
}

fn loss(map: &VarMap) -> Tensor {
    let named = named(map);
    let [a, b, c] = ["a.in_proj.weight", "b.norm.weight", "c.out_proj.weight"]
        .map(|name| named[name].as_tensor().to_dtype(DType::F32).unwrap());
    let product = a.broadcast_mul(&b).unwrap().matmul(&c).unwrap().tanh().unwrap();
    product.sum_all().unwrap()
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
    for (name, moment) in optimizer.state().unwrap() {
        assert!(!moment.track_op(), "{name}");
    }
}

/// Only the size of clipped gradients is lost: what is 1,000 times as large makes the same step. Gradients below the norm
/// are left alone.
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
        let norm = optimizer.step(&gradients(&map, scale), 0.1).unwrap().to_scalar::<f32>().unwrap().into();
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
        let (state, steps) = (optimizer.state().unwrap(), optimizer.steps());
        let masters = state.keys().filter(|name| name.ends_with(".master")).count();
        assert_eq!((masters, state.len()), if dtype == DType::F32 { (0, 7) } else { (3, 10) }, "{dtype:?}");
        let moments = state.iter().filter(|(name, _)| *name != "status");
        assert!(moments.into_iter().all(|(_, moment)| moment.dtype() == DType::F32), "{dtype:?}");
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
        restored.restore(state.clone(), steps).unwrap();
        assert_eq!(go_on(&mut restored), expected, "{dtype:?}");

        // What does not fit changes nothing.
        let before: BTreeMap<_, _> =
            restored.state().unwrap().into_iter().map(|(name, moment)| (name, bits(&moment))).collect();
        let mut other = state.clone();
        other.insert("c.out_proj.weight.mean".into(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
        assert!(refusal(restored.restore(other, steps)).contains("c.out_proj.weight.mean"));
        let mut fewer = state.clone();
        fewer.remove("b.norm.weight.mean_square");
        assert!(refusal(restored.restore(fewer, steps)).contains("b.norm.weight.mean_square"));
        assert!(refusal(restored.restore(state.clone(), steps + 1)).contains("steps"));
        assert!(restored.state().unwrap().iter().all(|(name, moment)| bits(moment) == before[name]));
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
    assert!(refusal(optimizer.step(&gradients(&map, 1.0), f64::NAN)).contains("learning_rate"));
    let others = gradients(&variables(&mut random, DType::F32), 1.0);
    assert!(refusal(optimizer.step(&others, 0.1)).contains("a.in_proj.weight"));
    assert!(named(&map).iter().all(|(name, variable)| bits(variable) == before[name]));
    assert_eq!(optimizer.steps(), 0);
}

/// The step that a gradient which is not finite spoils is left out and counted, and the next goes on as if it had not been.
#[test]
fn a_step_that_is_not_finite_is_skipped() {
    let mut random = random();
    let map = variables(&mut random, DType::BF16);
    let state_of = |optimizer: &AdamW| {
        let all = named(&map).into_iter().map(|(name, v)| (name, bits(&v)));
        let state = optimizer.state().unwrap().into_iter().filter(|(name, _)| name != "status");
        all.chain(state.map(|(name, moment)| (name, bits(&moment)))).collect::<BTreeMap<_, _>>()
    };
    let mut optimizer = AdamW::new(&map, AdamWConfig { clip: Some(1.0), ..AdamWConfig::default() }).unwrap();
    optimizer.step(&gradients(&map, 1.0), 0.1).unwrap();
    let before = state_of(&optimizer);
    let norm = optimizer.step(&gradients(&map, f64::NAN), 0.1).unwrap().to_scalar::<f32>().unwrap();
    assert!(!norm.is_finite());
    assert_eq!(state_of(&optimizer), before);
    let status = optimizer.status().unwrap();
    assert_eq!((status.taken, status.skipped, optimizer.steps()), (1, 1, 2));
    // A run that is resumed after it goes on alike.
    let (state, good) = (optimizer.state().unwrap(), gradients(&map, 1.0));
    optimizer.step(&good, 0.1).unwrap();
    let expected = state_of(&optimizer);
    assert_ne!(expected, before);
    for (name, variable) in named(&map) {
        let before: Vec<f32> = before[&name].iter().map(|&bits| f32::from_bits(bits)).collect();
        let before = Tensor::from_vec(before, variable.shape(), &Device::Cpu).unwrap();
        variable.set(&before.to_dtype(DType::BF16).unwrap()).unwrap();
    }
    optimizer.restore(state, 2).unwrap();
    optimizer.step(&good, 0.1).unwrap();
    assert_eq!(state_of(&optimizer), expected);
}

/// A loss that is scaled by a power of two has the steps of one that is not, to the bit, in `f32`.
#[test]
fn the_scale_of_a_loss_is_divided_out() {
    let mut random = random();
    let (plain, scaled) = (variables(&mut random, DType::F32), VarMap::new());
    for (name, variable) in named(&plain) {
        scaled.data().lock().unwrap().insert(name, Var::from_tensor(&variable.copy().unwrap()).unwrap());
    }
    let config = AdamWConfig { clip: Some(0.5), ..AdamWConfig::default() };
    let with_scale = AdamWConfig { loss_scale: Some(LossScale { first: 4.0, interval: 2 }), ..config };
    let mut optimizers = [AdamW::new(&plain, config).unwrap(), AdamW::new(&scaled, with_scale).unwrap()];
    for step in 0..5 {
        let norms = [&plain, &scaled].into_iter().zip(&mut optimizers).map(|(map, optimizer)| {
            let loss = optimizer.scaled(&loss(map)).unwrap();
            let norm = optimizer.step(&loss.backward().unwrap(), 0.01).unwrap();
            bits(&norm.unsqueeze(0).unwrap())
        });
        let norms: Vec<_> = norms.collect();
        assert_eq!(norms[0], norms[1], "step {step}");
    }
    assert_eq!(optimizers[1].status().unwrap().scale, 16.0);
    for (name, variable) in named(&plain) {
        assert_eq!(bits(&variable), bits(&named(&scaled)[&name]), "{name}");
    }
    let bad = AdamWConfig { loss_scale: Some(LossScale { first: 3.0, interval: 2 }), ..config };
    assert!(refusal(AdamW::new(&plain, bad)).contains("scale"));
}

/// One variable under two names is stepped once, and one of a type that nothing computes in is refused by name.
#[test]
fn variables_are_trained_once() {
    let mut random = random();
    let map = variables(&mut random, DType::F32);
    let tied = named(&map)["b.norm.weight"].clone();
    map.data().lock().unwrap().insert("d.tied.weight".into(), tied.clone());
    let before = values(&tied);
    let mut optimizer = AdamW::with_groups(&map, AdamWConfig::default(), all_alike(0.0)).unwrap();
    optimizer.step(&gradients(&map, 1.0), 0.01).unwrap();
    for (after, before) in values(&tied).into_iter().zip(before) {
        // The first step is as long as the learning rate.
        assert!(((after - before).abs() - 0.01).abs() < 1e-5, "{after} from {before}");
    }
    assert!(!optimizer.state().unwrap().contains_key("d.tied.weight.mean"));
    map.data().lock().unwrap().insert("e.wide".into(), Var::zeros(2, DType::F64, &Device::Cpu).unwrap());
    assert!(refusal(AdamW::new(&map, AdamWConfig::default())).contains("e.wide"));
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
