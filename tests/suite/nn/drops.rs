//! Dropout and stochastic depth. What was left out is read off the streams between layers; with that, the layers are written in
//! candle's graph.

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use rand::Rng;
use rand::rngs::StdRng;
use selective_scan::nn::train::{Drops, LossOptions};
use selective_scan::nn::{
    AttentionConfig, Backbone, BackboneConfig, LanguageModel, LayerConfig, MambaConfig, MlpConfig, RmsNorm, S4Model,
    S4ModelConfig, VisionConfig, VisionModel,
};

use super::{
    SAME, SAME_GRADIENTS, all_blocks, assert_close, bits, causal_blocks, ids, random, refusal, shake, tensor, values,
};

fn backbone(config: &BackboneConfig, random: &mut StdRng) -> (Backbone, VarMap) {
    let variables = VarMap::new();
    let build = || Backbone::new(config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)).unwrap();
    build();
    shake(&variables, random);
    (build(), variables)
}

/// What layer `index` gives to a stream, in candle's graph.
fn layer(backbone: &Backbone, variables: &VarMap, index: usize, stream: &Tensor) -> Tensor {
    let vb = VarBuilder::from_varmap(variables, DType::F32, &Device::Cpu);
    let norm = RmsNorm::new(12, backbone.config().norm_eps, vb.pp(format!("layers.{index}.norm"))).unwrap();
    let mixer = backbone.mixers().nth(index).unwrap().as_mamba().unwrap();
    mixer.forward(&norm.forward(stream).unwrap()).unwrap()
}

/// What each layer's output was multiplied by in a pass that leaves something out: 0 or the factor of the layer, whichever
/// is nearer. It must be near: what is read off is a difference of streams of some units in `f32`.
fn read_off(backbone: &Backbone, variables: &VarMap, x: &Tensor, factors: &[f64]) -> Vec<Tensor> {
    let states = backbone.hidden_states(x).unwrap();
    let mut stream = x.detach();
    let mut kept = Vec::new();
    for (index, factor) in factors.iter().enumerate() {
        let out = values(&layer(backbone, variables, index, &stream));
        let added = values(&(&states[index] - &stream).unwrap());
        let size = values(&states[index]).iter().fold(1f64, |size, number| size.max(number.abs()));
        let choose = |(added, out): (&f64, &f64)| {
            let [none, some] = [added.abs(), (added - factor * out).abs()];
            assert!(none.min(some) <= 1e-5 * size, "layer {index}: {added} of {out}");
            if some < none { *factor as f32 } else { 0.0 }
        };
        let chosen: Vec<f32> = added.iter().zip(&out).map(choose).collect();
        kept.push(Tensor::from_vec(chosen, stream.shape(), &Device::Cpu).unwrap());
        stream = states[index].detach();
    }
    kept
}

/// Both kinds at once, in one direction and in two: results, and the gradients of every parameter and of the input, are those
/// of layers that candle multiplies by what was left out, operator by operator.
#[test]
fn what_is_left_out_is_left_out_of_gradients_too() {
    let mut random = random();
    for (name, block) in all_blocks() {
        let mixer = MambaConfig { seed: random.random(), ..block };
        let (plain, variables) = backbone(&BackboneConfig::with_mixer(3, mixer), &mut random);
        // Of dropout alone, so that each number says what became of it.
        let drops = Drops { dropout: 0.3, seed: random.random(), ..Drops::default() }.at(7, 1);
        let dropping = plain.with_drops(drops).unwrap();
        let x = Var::from_tensor(&tensor(&mut random, &[4, 20, 12], 1.0)).unwrap();
        let kept = read_off(&dropping, &variables, &x, &[1.0 / 0.7; 3]);
        // Of 2,880 numbers the share has a deviation of 0.0085; six of them.
        let share = kept.iter().flat_map(values).filter(|&factor| factor == 0.0).count() as f64 / 2880.0;
        assert!((share - 0.3).abs() < 0.051, "{name}: {share}");
        assert_ne!(bits(&kept[0]), bits(&kept[1]), "{name}: layers leave out the same");

        let mut stream = x.as_tensor().clone();
        for (index, kept) in kept.iter().enumerate() {
            stream = (&stream + (layer(&plain, &variables, index, &stream) * kept).unwrap()).unwrap();
        }
        let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
        let want = RmsNorm::new(12, plain.config().norm_eps, vb.pp("norm_f")).unwrap().forward(&stream).unwrap();
        let got = dropping.forward(&x).unwrap();
        assert_close(&got, &want, SAME, name);
        let mask = tensor(&mut random, &[4, 20, 12], 1.0);
        let gradients = |out: &Tensor| (out * &mask).unwrap().sum_all().unwrap().backward().unwrap();
        let (got, want) = (gradients(&got), gradients(&want));
        for (parameter, variable) in variables.data().lock().unwrap().iter() {
            let what = format!("{name}: {parameter}");
            assert_close(got.get(variable).unwrap(), want.get(variable).unwrap(), SAME_GRADIENTS, &what);
        }
        assert_close(got.get(&x).unwrap(), want.get(&x).unwrap(), SAME_GRADIENTS, name);
    }
}

/// Sequences skip layers as wholes, never the first layer, and the last as often as was asked for.
#[test]
fn depth_is_left_out_by_sequences() {
    let mut random = random();
    let mixer = MambaConfig { seed: random.random(), ..causal_blocks()[0].1.clone() };
    let (plain, variables) = backbone(&BackboneConfig::with_mixer(3, mixer), &mut random);
    let drops = Drops { stochastic_depth: 0.5, seed: random.random(), ..Drops::default() };
    let dropping = plain.with_drops(drops).unwrap();
    let x = tensor(&mut random, &[400, 3, 12], 1.0);
    let kept = read_off(&dropping, &variables, &x, &[1.0, 1.0 / 0.75, 2.0]);
    for (kept, rate) in kept.iter().zip([0.0, 0.25, 0.5]) {
        let kept = values(kept);
        let skips: Vec<_> = kept.chunks(36).map(|row| row.iter().filter(|&&factor| factor == 0.0).count()).collect();
        // A number that is nothing but rounding may be read off either way.
        assert!(skips.iter().all(|&zeros| zeros <= 1 || zeros >= 35), "{skips:?}");
        // Of 400 sequences the share has a deviation of 0.025 at most; six of them.
        let share = skips.iter().filter(|&&zeros| zeros >= 35).count() as f64 / 400.0;
        assert!((share - rate).abs() < if rate == 0.0 { 1e-9 } else { 0.15 }, "{share} for {rate}");
    }
}

/// Sequences one after another leave out what they do as the rows of a batch.
#[test]
fn packed_sequences_leave_out_the_same() {
    let mut random = random();
    let mixer = MambaConfig { seed: random.random(), ..causal_blocks()[0].1.clone() };
    let (plain, _) = backbone(&BackboneConfig::with_mixer(3, mixer), &mut random);
    let drops = Drops { dropout: 0.2, stochastic_depth: 0.6, seed: random.random(), ..Drops::default() };
    let dropping = plain.with_drops(drops).unwrap();
    let x = tensor(&mut random, &[6, 5, 12], 1.0);
    let packed = dropping.forward_packed(&x.reshape((1, 30, 12)).unwrap(), &[0, 5, 10, 15, 20, 25, 30]).unwrap();
    assert_close(&packed.reshape((6, 5, 12)).unwrap(), &dropping.forward(&x).unwrap(), SAME, "packed");
}

/// The same in every repetition; another seed, step or part leaves out something else, and without rates nothing is.
#[test]
fn it_follows_from_seed_step_and_part() {
    let mut random = random();
    let mixer = MambaConfig { seed: random.random(), ..causal_blocks()[0].1.clone() };
    let (plain, _) = backbone(&BackboneConfig::with_mixer(2, mixer), &mut random);
    let x = tensor(&mut random, &[3, 9, 12], 1.0);
    let out = |drops: Drops| bits(&plain.with_drops(drops).unwrap().forward(&x).unwrap());
    let drops = Drops { dropout: 0.4, stochastic_depth: 0.1, seed: random.random(), step: 3, part: 4 };
    assert_eq!(out(drops), out(drops));
    let others = [drops.at(4, 4), drops.at(3, 3), drops.at(4, 3), Drops { seed: drops.seed ^ 1, ..drops }];
    for other in others {
        assert_ne!(out(drops), out(other), "{other:?}");
    }
    assert_eq!(out(Drops { dropout: 0.0, stochastic_depth: 0.0, ..drops }), bits(&plain.forward(&x).unwrap()));
    for (bad, name) in [
        (Drops { dropout: 1.0, ..drops }, "dropout"),
        (Drops { dropout: f64::NAN, ..drops }, "dropout"),
        (Drops { stochastic_depth: -0.1, ..drops }, "stochastic_depth"),
    ] {
        assert!(refusal(plain.with_drops(bad)).contains(name));
    }
}

/// A loss through candle's graph and the same without it leave out the same, and so does a text that goes on from a cache of
/// zeros. What is read to be decoded leaves out nothing.
#[test]
fn all_ways_to_a_loss_agree() {
    let mut random = random();
    let (plain, variables) = super::model(&causal_blocks()[0].1, &mut random);
    let drops = Drops { dropout: 0.25, stochastic_depth: 0.5, seed: random.random(), ..Drops::default() };
    let dropping: LanguageModel = plain.with_drops(drops).unwrap();
    let (text, targets) = (ids(&mut random, 3, 14), ids(&mut random, 3, 14));
    let by_graph = dropping.loss(&text, &targets, &LossOptions::default()).unwrap();
    let gradients = by_graph.backward().unwrap();
    let (loss, store) = dropping.loss_and_gradients(&text, None, &targets, &LossOptions::default()).unwrap();
    assert_eq!(values(&loss), values(&by_graph));
    for (name, variable) in variables.data().lock().unwrap().iter() {
        assert_eq!(values(store.get(variable).unwrap()), values(gradients.get(variable).unwrap()), "{name}");
    }
    assert_ne!(values(&loss), values(&plain.loss(&text, &targets, &LossOptions::default()).unwrap()));
    let cache = plain.new_cache(3, DType::F32).unwrap();
    let carried = dropping.forward_from(&text, &cache, None).unwrap();
    assert_close(&carried, &dropping.forward(&text).unwrap(), SAME, "carried");
    let [first, second] = [&plain, &dropping].map(|model| {
        let cache = model.new_cache(3, DType::F32).unwrap();
        bits(&model.prefill(&text, &cache, None).unwrap())
    });
    assert_eq!(first, second);
    // What is made of the model leaves out the same.
    assert_eq!(bits(&dropping.detach().unwrap().forward(&text).unwrap()), bits(&dropping.forward(&text).unwrap()));
}

/// Where every sequence skips the last of two layers, that layer might as well not be there.
#[test]
fn other_models_skip_layers_too() {
    let mut random = random();
    let drops = Drops { stochastic_depth: 1.0 - 1e-9, seed: random.random(), ..Drops::default() };
    let some = Drops { dropout: 0.5, seed: random.random(), ..Drops::default() };
    let variables = VarMap::new();
    let vb = || VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);

    let s4 = |n_layer| S4Model::new(&S4ModelConfig::new(2, 3, n_layer, 8), vb().pp("s4")).unwrap();
    let x = tensor(&mut random, &[4, 10, 2], 1.0);
    s4(2);
    shake(&variables, &mut random);
    let skipping = s4(2).with_drops(drops).unwrap().forward(&x).unwrap();
    assert_eq!(bits(&skipping), bits(&s4(1).forward(&x).unwrap()));
    assert_ne!(bits(&skipping), bits(&s4(2).forward(&x).unwrap()));
    assert_ne!(bits(&s4(1).with_drops(some).unwrap().forward(&x).unwrap()), bits(&s4(1).forward(&x).unwrap()));

    let vision = |n_layer| VisionModel::new(&VisionConfig::new([4, 6], 2, 3, n_layer, 8), vb().pp("vision")).unwrap();
    let images = tensor(&mut random, &[4, 3, 4, 6], 1.0);
    vision(2);
    shake(&variables, &mut random);
    let skipping = vision(2).with_drops(drops).unwrap().forward(&images).unwrap();
    assert_eq!(bits(&skipping), bits(&vision(1).forward(&images).unwrap()));
    assert_ne!(bits(&skipping), bits(&vision(2).forward(&images).unwrap()));
}

/// Of layers of any kind, and of their feed-forward parts: where all but one number in 10^9 is left out, the stream stays as it
/// was; where every other one is, a pass that is repeated gives the same bits.
#[test]
fn all_parts_of_hybrids_are_left_out() {
    let mut random = random();
    let config = BackboneConfig {
        feed_forward: Some(MlpConfig::new(12, 9).into()),
        layers: [(1, LayerConfig::new(AttentionConfig::new(12, 3), MlpConfig::new(12, 7)))].into(),
        ..BackboneConfig::with_mixer(3, MambaConfig::new(12))
    };
    let (backbone, _) = backbone(&config, &mut random);
    let x = tensor(&mut random, &[2, 5, 12], 1.0);
    let states = |dropout| {
        let drops = Drops { dropout, seed: 7, ..Default::default() };
        backbone.with_drops(drops).unwrap().hidden_states(&x).unwrap()
    };
    let nothing = states(1.0 - 1e-9);
    nothing[..3].iter().for_each(|stream| assert_eq!(bits(stream), bits(&x)));
    let half = states(0.5);
    half.iter().zip(states(0.5)).for_each(|(stream, again)| assert_eq!(bits(stream), bits(&again)));
    assert_ne!(bits(&half[2]), bits(&states(0.0)[2]));
}

/// What mixers add and what feed-forward parts add is left out by choices of their own: half of the time the same is chosen for
/// both. What a mixer added is seen where the feed-forward parts are nothing, and what a part added beside that.
#[test]
fn mixers_and_feed_forward_parts_are_left_out_by_themselves() {
    let mut random = random();
    let mamba = MambaConfig { seed: random.random(), ..MambaConfig::new(12) };
    let attention = AttentionConfig { seed: random.random(), ..AttentionConfig::new(12, 3) };
    for mixer in [mamba.into(), attention.into()] {
        let config = BackboneConfig {
            feed_forward: Some(MlpConfig::new(12, 9).into()),
            ..BackboneConfig::with_mixer(2, MambaConfig::new(12))
        };
        let config = BackboneConfig { mixer, ..config };
        let (backbone, variables) = backbone(&config, &mut random);
        let x = tensor(&mut random, &[400, 3, 12], 1.0);
        let dropout = Drops { dropout: 0.5, seed: random.random(), ..Drops::default() };
        let depth = Drops { stochastic_depth: 0.5, seed: random.random(), ..Drops::default() };
        let states = || [dropout, depth].map(|drops| backbone.with_drops(drops).unwrap().hidden_states(&x).unwrap());
        let set = |name: &str, change: &dyn Fn(&Tensor) -> Tensor| {
            let variables = variables.data().lock().unwrap();
            variables[name].set(&change(variables[name].as_tensor())).unwrap();
        };
        let zero = |weight: &Tensor| weight.zeros_like().unwrap();
        let last = "layers.1.feed_forward.down_proj.weight";
        let weight = variables.data().lock().unwrap()[last].as_tensor().copy().unwrap();
        set("layers.0.feed_forward.down_proj.weight", &zero);
        set(last, &zero);
        let without = states();
        set(last, &|_| weight.clone());
        let with = states();
        // Of a layer in whose place depth 0.5 is reached, whether each number was kept.
        let kept = |after: &Tensor, before: &Tensor| -> Vec<bool> {
            values(after).iter().zip(values(before)).map(|(after, before)| *after != before).collect()
        };
        for (index, step) in [(0, 1), (1, 36)] {
            let of_mixer = kept(&without[index][1], &without[index][0]);
            let of_part = kept(&with[index][1], &without[index][1]);
            let any = |kept: &[bool]| kept.chunks(step).map(|chunk| chunk.contains(&true)).collect::<Vec<_>>();
            let (of_mixer, of_part) = (any(&of_mixer), any(&of_part));
            let count = of_mixer.len() as f64;
            let share = |chosen: &mut dyn Iterator<Item = bool>| chosen.filter(|chosen| *chosen).count() as f64 / count;
            // Six deviations of a share of so many choices.
            let bound = 6.0 * 0.5 / count.sqrt();
            for (what, share) in [
                ("of mixers", share(&mut of_mixer.iter().copied())),
                ("of parts", share(&mut of_part.iter().copied())),
                ("of both the same", share(&mut of_mixer.iter().zip(&of_part).map(|(a, b)| a == b))),
            ] {
                assert!((share - 0.5).abs() < bound, "{what}, {index}: {share}");
            }
        }
    }
}
