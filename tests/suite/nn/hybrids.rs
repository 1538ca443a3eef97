//! Models whose layers are of several kinds: attention beside Mamba, MLPs and experts.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::{RNN, VarBuilder, VarMap};
use rand::Rng;
use rand::rngs::StdRng;
use selective_scan::nn::decode::{Decoder, DecoderOptions, Event, Generator, GeneratorOptions, Request};
use selective_scan::nn::train::{LossOptions, Trainer, TrainerConfig};
use selective_scan::nn::{
    Attention, AttentionConfig, AttentionState, BackboneConfig, Cache, CheckpointFormat, Experts, ExpertsConfig,
    LanguageModel, LanguageModelConfig, LayerConfig, MambaConfig, MixerConfig, Mlp, MlpConfig, Recurrent,
    RecurrentCell, RecurrentConfig, RopeScaling,
};
use selective_scan::sampling::Settings;

use crate::candle::values;

use super::{SAME, SAME_GRADIENTS, assert_close, cuts, ids, random, rebuilt, refusal, shake, tensor};

const VOCAB: usize = 11;
const CAPACITY: usize = 64;

/// Mamba, attention with grouped heads with and without positions, LSTM, GRU, MLPs and experts.
fn config(random: &mut StdRng) -> LanguageModelConfig {
    let mamba =
        MambaConfig { d_inner: 20, d_state: 5, d_conv: 3, dt_rank: 3, seed: random.random(), ..MambaConfig::new(12) };
    let attention = AttentionConfig { n_kv_head: 2, d_head: 4, capacity: CAPACITY, ..AttentionConfig::new(12, 4) };
    let plain = AttentionConfig { rope_theta: None, qkv_bias: true, out_bias: true, ..attention.clone() };
    let layers = BTreeMap::from([
        (1, LayerConfig::new(attention, ExpertsConfig::new(12, 7, 5, 2))),
        (2, LayerConfig::new(mamba.clone(), MlpConfig { bias: true, ..MlpConfig::new(12, 9) })),
        (3, plain.into()),
        (5, LayerConfig::new(RecurrentConfig::new(12, RecurrentCell::Lstm), MlpConfig::new(12, 5))),
        (6, RecurrentConfig { d_hidden: 7, ..RecurrentConfig::new(12, RecurrentCell::Gru) }.into()),
    ]);
    LanguageModelConfig {
        backbone: BackboneConfig { layers, ..BackboneConfig::with_mixer(7, mamba) },
        ..LanguageModelConfig::new(VOCAB, 7, 12)
    }
}

fn model(random: &mut StdRng) -> (LanguageModel, VarMap) {
    drawn(&config(random), random)
}

fn drawn(config: &LanguageModelConfig, random: &mut StdRng) -> (LanguageModel, VarMap) {
    let variables = VarMap::new();
    let build = || LanguageModel::new(config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)).unwrap();
    build();
    shake(&variables, random);
    (build(), variables)
}

/// The bits of all that a cache holds and means: of attention what is beyond a slot's length means nothing.
fn meaning(cache: &Cache) -> Vec<Vec<u32>> {
    let bits = |tensor: Tensor| -> Vec<u32> {
        tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect()
    };
    let mut all = Vec::new();
    for layer in cache.layers() {
        if let Some(state) = layer.as_mamba() {
            all.extend([bits(state.conv.clone()), bits(state.ssm.clone())]);
        }
        if let Some(state) = layer.as_recurrent() {
            all.extend([&state.h].into_iter().chain(&state.c).map(|pool| bits(pool.clone())));
        }
        if let Some(state) = layer.as_attention() {
            for (slot, length) in state.lengths().unwrap().into_iter().enumerate() {
                let there = |pool: &Tensor| bits(pool.get(slot).unwrap().narrow(0, 0, length as usize).unwrap());
                all.extend([vec![length], there(&state.k), there(&state.v)]);
            }
        }
    }
    all
}

#[test]
fn a_text_is_read_in_any_way() {
    let random = &mut random();
    (0..4).for_each(|_| is_read_in_any_way(&Device::Cpu, random));
}

/// Whole, in chunks of any size, packed, token by token, in any slots, and with padding between: as the processor reads it whole.
pub fn is_read_in_any_way(device: &Device, random: &mut StdRng) {
    let (model, _) = model(random);
    let (batch, length) = (3, 24);
    let ids = ids(random, batch, length);
    let whole = model.forward(&ids).unwrap();
    let model = rebuilt(&model, model.config(), DType::F32, device);
    let packed_ids = ids.flatten_all().unwrap().unsqueeze(0).unwrap();
    let packed = model.forward_packed(&packed_ids, &[0, length, 2 * length, 3 * length]).unwrap();
    assert_close(&packed.reshape(whole.shape()).unwrap(), &whole, SAME, "packed");
    let cache = model.new_cache(5, DType::F32).unwrap();
    let slots = [4, 0, 2];
    let cuts = cuts(random, length);
    for ends in cuts.windows(2) {
        let part = ids.narrow(1, ends[0], ends[1] - ends[0]).unwrap();
        let got = match random.random_range(0..4) {
            0 => model.prefill_all(&part, &cache, &slots[..]).unwrap().narrow(1, ends[1] - ends[0] - 1, 1).unwrap(),
            1 => {
                let count = ends[1] - ends[0];
                let (row, ends) = (part.flatten_all().unwrap(), [0, count, 2 * count, 3 * count]);
                let got = model.prefill_packed(&row.unsqueeze(0).unwrap(), &ends, &cache, &slots[..]).unwrap();
                got.unsqueeze(1).unwrap()
            }
            2 => {
                // A row of padding in front.
                let padded = Tensor::cat(&[&part.narrow(0, 0, 1).unwrap(), &part], 0).unwrap();
                let got = model.prefill(&padded, &cache, &[-1, 4, 0, 2][..]).unwrap();
                got.narrow(0, 1, 3).unwrap().unsqueeze(1).unwrap()
            }
            _ => {
                let step = |at| model.step(&ids.narrow(1, at, 1).unwrap().squeeze(1).unwrap(), &cache, &slots[..]);
                let steps: Vec<_> = (ends[0]..ends[1]).map(|at| step(at).unwrap()).collect();
                steps[steps.len() - 1].unsqueeze(1).unwrap()
            }
        };
        assert_close(&got, &whole.narrow(1, ends[1] - 1, 1).unwrap(), SAME, &format!("to {}", ends[1]));
    }
    let state = cache.layers()[1].as_attention().unwrap();
    assert_eq!(state.lengths().unwrap(), [24, 0, 24, 0, 24]);
}

/// A draft of which some is taken back goes on as if that had never been read.
#[test]
fn drafts_are_taken_back() {
    let random = &mut random();
    let (model, _) = model(random);
    let ids = ids(random, 2, 12);
    let whole = model.forward(&ids).unwrap();
    let cache = model.new_cache(2, DType::F32).unwrap();
    model.prefill(&ids.narrow(1, 0, 6).unwrap(), &cache, None).unwrap();
    let wrong = Tensor::cat(&[ids.narrow(1, 6, 2).unwrap(), super::ids(random, 2, 3)], 1).unwrap();
    let (logits, draft) = model.draft(&wrong, &cache, None).unwrap();
    assert_close(&logits.narrow(1, 0, 2).unwrap(), &whole.narrow(1, 6, 2).unwrap(), SAME, "the draft");
    draft.accept(&[2, 1]).unwrap();
    // The second row has one token less.
    let next = |row: usize, at: usize| ids.get(row).unwrap().narrow(0, at, 1).unwrap();
    let tokens = Tensor::cat(&[next(0, 8), next(1, 7)], 0).unwrap();
    let got = model.step(&tokens, &cache, None).unwrap();
    for (row, at) in [(0, 8), (1, 7)] {
        assert_close(&got.get(row).unwrap(), &whole.get(row).unwrap().get(at).unwrap(), SAME, "after the draft");
    }
}

/// Slots are copied, taken, put back, saved and read, kept and made ready, whatever is in the layers.
#[test]
fn slots_do_what_is_asked_of_them() {
    let random = &mut random();
    let (model, _) = model(random);
    let ids = ids(random, 2, 20);
    let cache = model.new_cache(2, DType::F32).unwrap();
    assert_eq!(cache.capacity(), Some(CAPACITY));
    model.prefill(&ids.narrow(1, 0, 19).unwrap(), &cache, None).unwrap();
    let last = ids.narrow(1, 19, 1).unwrap().squeeze(1).unwrap();
    let before = cache.snapshot().unwrap();
    let want = model.step(&last, &cache, None).unwrap();
    assert_ne!(meaning(&cache), meaning(&before));

    let folder = std::env::temp_dir().join(format!("selective-scan-hybrid-{}", random.random::<u64>()));
    std::fs::create_dir(&folder).unwrap();
    before.save(folder.join("cache")).unwrap();
    let read = Cache::load(folder.join("cache"), &Device::Cpu).unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    let (first, mut grown) = (before.take(&[1, 0]).unwrap(), before.snapshot().unwrap());
    let exchanged = model.new_cache(2, DType::F32).unwrap();
    exchanged.put(&first, &[1, 0]).unwrap();
    grown.grow(4).unwrap();
    grown.copy_slots(&[0, 1], &[3, 2]).unwrap();
    grown.reset(Some(&[0, 1])).unwrap();
    grown.copy_slots(&[3, 2], &[0, 1]).unwrap();
    for (what, other) in [("saved", read), ("put", exchanged), ("grown", grown.take(&[0, 1]).unwrap())] {
        assert_eq!(meaning(&other), meaning(&before), "{what}");
        let got = model.step(&last, &other, None).unwrap();
        assert_eq!(got.to_vec2::<f32>().unwrap(), want.to_vec2::<f32>().unwrap(), "{what}");
    }
    // A slot that was reset begins anew.
    grown.reset(Some(&[2])).unwrap();
    let (text, fresh) = (ids.narrow(0, 1, 1).unwrap(), model.new_cache(1, DType::F32).unwrap());
    let got = model.prefill(&text, &grown, &[2][..]).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(got, model.prefill(&text, &fresh, None).unwrap().to_vec2::<f32>().unwrap());
}

/// A slot that would have to hold more than it can is refused by name, and nothing is written, not even in the layers before.
#[test]
fn a_full_slot_is_an_error() {
    let random = &mut random();
    let (model, _) = model(random);
    let cache = model.new_cache_for(3, DType::F32, 10).unwrap();
    let text = ids(random, 2, 8);
    model.prefill(&text, &cache, &[1, 2][..]).unwrap();
    let before = meaning(&cache);
    let refused = |result: candle_core::Result<Tensor>, new: usize, slot: usize| {
        let text = format!("room for {new} more tokens in slot {slot}, whose capacity is 10, got 8 tokens there");
        assert!(refusal(result).contains(&text));
        assert_eq!(meaning(&cache), before);
    };
    refused(model.prefill(&text.narrow(1, 0, 3).unwrap(), &cache, &[0, 2][..]), 3, 2);
    let row = ids(random, 1, 7);
    refused(model.prefill_packed(&row, &[0, 4, 7], &cache, &[0, 1][..]), 3, 1);
    refused(model.forward_from(&text.narrow(1, 0, 3).unwrap(), &cache, &[1, 0][..]), 3, 1);
    refused(model.draft(&text.narrow(1, 0, 3).unwrap(), &cache, &[0, 1][..]).map(|(logits, _)| logits), 3, 1);
    for _ in 0..2 {
        model.step(&Tensor::new(&[1u32], &Device::Cpu).unwrap(), &cache, &[1][..]).unwrap();
    }
    let error = refusal(model.step(&Tensor::new(&[1u32], &Device::Cpu).unwrap(), &cache, &[1][..]));
    assert!(error.contains("room for 1 more tokens in slot 1, whose capacity is 10, got 10 tokens there"), "{error}");
    // A request that might not fit is refused before it begins.
    let options = GeneratorOptions { slots: 1, capacity: Some(10), ..Default::default() };
    let mut generator = Generator::new(&model, &options).unwrap();
    let mut request = Request { max_tokens: 8, ..Request::new([1, 2, 3]) };
    generator.submit(request.clone()).unwrap();
    request.max_tokens = 9;
    let error = generator.submit(request).unwrap_err().to_string();
    assert!(error.contains("at most 10 tokens of start, prompt and text together"), "{error}");
    while !generator.is_idle() {
        generator.turn().unwrap();
    }
}

/// Parts of a text that go on from a cache have the logits of the whole, and from an empty one its gradients too.
#[test]
fn training_goes_on_from_a_cache() {
    let random = &mut random();
    let (model, variables) = model(random);
    let (ids, weights) = (ids(random, 2, 20), tensor(random, &[2, 20, VOCAB], 1.0));
    let whole = model.forward(&ids).unwrap();
    let gradients = |logits: &Tensor| (logits * &weights).unwrap().sum_all().unwrap().backward().unwrap();
    let want = gradients(&whole);
    let cache = model.new_cache(2, DType::F32).unwrap();
    let carried = model.forward_from(&ids, &cache, None).unwrap();
    assert_close(&carried, &whole, SAME, "from nothing");
    let got = gradients(&carried);
    for (name, variable) in variables.data().lock().unwrap().iter() {
        let (got, want) = (got.get(variable).unwrap(), want.get(variable).unwrap());
        // Those of an expert that nobody chose are zero.
        if values(want).iter().any(|x| *x != 0.0) {
            assert_close(got, want, SAME_GRADIENTS, name);
        } else {
            assert!(values(got).iter().all(|x| *x == 0.0), "{name}");
        }
    }
    cache.reset(None).unwrap();
    for (from, count) in [(0, 7), (7, 1), (8, 12)] {
        let part = model.forward_from(&ids.narrow(1, from, count).unwrap(), &cache, None).unwrap();
        assert_close(&part, &whole.narrow(1, from, count).unwrap(), SAME, &format!("from {from}"));
        part.sum_all().unwrap().backward().unwrap();
    }
}

/// The loss falls, `loss_and_gradients` is `loss` and its gradients, and an expert that nobody chose has one of zero.
#[test]
fn hybrids_train() {
    let random = &mut random();
    let config = config(random);
    let trainer = TrainerConfig { learning_rate: 1e-2, steps: 60, ..TrainerConfig::default() };
    let mut trainer = Trainer::language_model(&config, DType::F32, &Device::Cpu, trainer).unwrap();
    let text: Vec<u32> = (0..41).map(|i| (i * i % VOCAB) as u32).collect();
    let batch = |length: usize| {
        let row = |at: usize| Tensor::new(&text[at..at + length], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        (row(0), row(1))
    };
    // A row of two tokens chooses four of the five experts at most.
    let (ids, targets) = batch(2);
    let model = trainer.model();
    let (loss, gradients) = model.loss_and_gradients(&ids, None, &targets, &LossOptions::default()).unwrap();
    let want = model.loss(&ids, &targets, &LossOptions::default()).unwrap();
    assert_eq!(loss.to_scalar::<f32>().unwrap(), want.to_scalar::<f32>().unwrap());
    assert!(trainer.variables().all_vars().iter().all(|variable| gradients.get(variable).is_some()));
    // A text of 40 tokens is learnt by heart.
    let losses: Vec<f32> = (0..60).map(|_| trainer.step_tokens(&[batch(40)]).unwrap().loss().unwrap()).collect();
    assert!(losses[59] < 0.5 * losses[0], "{losses:?}");
}

/// What a generator writes greedily is what the model's own steps choose.
#[test]
fn generators_write_with_hybrids() {
    let random = &mut random();
    let (model, _) = model(random);
    let prompts: Vec<Vec<u32>> =
        (1..6).map(|length| ids(random, 1, length).flatten_all().unwrap().to_vec1().unwrap()).collect();
    let mut generator = Generator::new(&model, &GeneratorOptions { slots: 2, ..Default::default() }).unwrap();
    for prompt in &prompts {
        let settings = Settings { temperature: 0.0, ..Settings::default() };
        generator.submit(Request { settings, max_tokens: 9, ..Request::new(prompt.clone()) }).unwrap();
    }
    let mut texts = vec![Vec::new(); prompts.len()];
    while !generator.is_idle() {
        for event in generator.turn().unwrap() {
            if let Event::Token { sequence, token, log_prob } = event {
                assert_eq!(log_prob, None, "nobody asked for it");
                texts[sequence as usize].push(token);
            }
        }
    }
    let mut decoder = Decoder::new(&model, &DecoderOptions::default()).unwrap();
    for (prompt, text) in prompts.iter().zip(texts) {
        decoder.cache().reset(None).unwrap();
        let mut logits = decoder.prefill(&[prompt], &[0]).unwrap();
        let mut want: Vec<u32> = Vec::new();
        for _ in 0..9 {
            let token = logits.argmax(D::Minus1).unwrap().to_vec1::<u32>().unwrap();
            want.extend(&token);
            logits = decoder.step(&token, &[0]).unwrap();
        }
        assert_eq!(text, want, "{prompt:?}");
    }
}

/// A hybrid of its own kind is written and read.
#[test]
fn hybrids_are_saved() {
    let random = &mut random();
    let mut config = config(random);
    let stretched = RopeScaling::Llama3 { factor: 8.0, low_turns: 1.0, high_turns: 4.0, original_length: 8192 };
    for (index, rope_scaling, causal) in [(1, Some(stretched), true), (3, None, false)] {
        if let Some(LayerConfig { mixer: MixerConfig::Attention(attention), .. }) =
            config.backbone.layers.get_mut(&index)
        {
            *attention = AttentionConfig { rope_scaling, causal, ..attention.clone() };
        }
    }
    let (model, _) = drawn(&config, random);
    let refused = refusal(model.prefill(&ids(random, 1, 3), &model.new_cache(1, DType::F32).unwrap(), None));
    assert!(refused.contains("`causal`: expected true, for prompts and steps of decoding, got false"), "{refused}");
    let folder = std::env::temp_dir().join(format!("selective-scan-own-hybrid-{}", random.random::<u64>()));
    model.save(&folder, CheckpointFormat::HuggingFace).unwrap();
    let again = LanguageModel::load(&folder, DType::F32, &Device::Cpu).unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    // The seed is no property of a model.
    let mut config = model.config().clone();
    let unseeded = |mixer: &mut MixerConfig| {
        if let Some(mamba) = mixer.as_mamba_mut() {
            mamba.seed = 0;
        }
    };
    unseeded(&mut config.backbone.mixer);
    config.backbone.layers.values_mut().for_each(|layer| unseeded(&mut layer.mixer));
    assert_eq!(again.config(), &config);
    let text = ids(random, 1, 9);
    let logits = |model: &LanguageModel| model.detach().unwrap().forward(&text).unwrap().to_vec3::<f32>().unwrap();
    assert_eq!(logits(&again), logits(&model));
    let error = model.config().to_json(CheckpointFormat::StateSpaces).unwrap_err().to_string();
    assert!(error.contains("state-spaces/mamba has no other"), "{error}");
}

/// Every expert of every row, weighted by its probability where that is among the greatest.
#[test]
fn experts_are_the_sum_that_they_stand_for() {
    let random = &mut random();
    for (count, top_k) in [(1, 1), (4, 1), (5, 3), (3, 3)] {
        let variables = VarMap::new();
        let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
        let config = ExpertsConfig::new(6, 8, count, top_k);
        let experts = Experts::new(&config, random.random(), vb.clone()).unwrap();
        let x = tensor(random, &[2, 15, 6], 2.0);
        let rows = x.flatten(0, 1).unwrap();
        let router = vb.get((count, 6), "router.weight").unwrap();
        let logits = rows.matmul(&router.t().unwrap()).unwrap();
        let probabilities = candle_nn::ops::softmax(&logits, D::Minus1).unwrap();
        let greatest: Vec<Vec<f32>> = probabilities
            .to_vec2::<f32>()
            .unwrap()
            .into_iter()
            .map(|row| {
                let mut sorted = row.clone();
                sorted.sort_by(|a, b| b.total_cmp(a));
                row.into_iter().map(|p| if p >= sorted[top_k - 1] { p } else { 0.0 }).collect()
            })
            .collect();
        let weights = Tensor::new(greatest, &Device::Cpu).unwrap();
        let mut want = rows.zeros_like().unwrap();
        for index in 0..count {
            let of = |name: &str, shape| vb.get(shape, &format!("experts.{index}.{name}.weight")).unwrap().t().unwrap();
            let gate = rows.matmul(&of("gate_proj", (8, 6))).unwrap().silu().unwrap();
            let inner = (gate * rows.matmul(&of("up_proj", (8, 6))).unwrap()).unwrap();
            let out = inner.matmul(&of("down_proj", (6, 8))).unwrap();
            want = (want + out.broadcast_mul(&weights.narrow(1, index, 1).unwrap()).unwrap()).unwrap();
        }
        assert_close(&experts.forward(&x).unwrap().flatten(0, 1).unwrap(), &want, SAME, &format!("{top_k} of {count}"));
        let mlp = Mlp::new(&MlpConfig::new(6, 8), 0, vb.pp("experts.0")).unwrap();
        assert_eq!(mlp.forward(&x).unwrap().dims(), x.dims());
    }
}

/// Keys and values are of the type that is asked for, unless that is wider than what the model computes; other states are.
#[test]
fn keys_are_no_wider_than_they_are_computed() {
    let (model, _) = model(&mut random());
    for (own, asked, keys) in [
        (DType::F32, DType::F32, DType::F32),
        (DType::F32, DType::BF16, DType::BF16),
        (DType::BF16, DType::F32, DType::BF16),
        (DType::BF16, DType::F16, DType::F16),
    ] {
        let cache = rebuilt(&model, model.config(), own, &Device::Cpu).new_cache(1, asked).unwrap();
        let attention = cache.layers()[1].as_attention().unwrap();
        assert_eq!([attention.k.dtype(), attention.v.dtype()], [keys; 2], "{own:?}, {asked:?}");
        assert_eq!(cache.layers()[0].as_mamba().unwrap().ssm.dtype(), asked);
    }
}

/// Keys and values of a half type round them once: some 2^-9 of an output.
#[test]
fn keys_and_values_may_be_of_a_half_type() {
    let random = &mut random();
    let config = AttentionConfig { n_kv_head: 1, ..AttentionConfig::new(16, 2) };
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let layer = Attention::new(&config, vb).unwrap();
    let x = tensor(random, &[2, 30, 16], 1.0);
    let whole = layer.forward(&x).unwrap();
    for (dtype, tolerance) in [(DType::F32, SAME), (DType::BF16, 2f64.powi(-7)), (DType::F16, 2f64.powi(-10))] {
        let state = AttentionState::new(&config, 2, 30, dtype, &Device::Cpu).unwrap();
        layer.prefill(&x.narrow(1, 0, 20).unwrap(), &state, None).unwrap();
        let rest = layer.step(&x.narrow(1, 20, 10).unwrap(), &state, None).unwrap();
        assert_close(&rest, &whole.narrow(1, 20, 10).unwrap(), tolerance, dtype.as_str());
        assert_eq!(state.k.dtype(), dtype);
    }
}

/// The layer is candle-nn's cell in candle's graph, and so are its gradients, though it goes through the steps by segments.
#[test]
fn recurrent_layers_are_candles() {
    let random = &mut random();
    for (cell, length) in [(RecurrentCell::Lstm, 150), (RecurrentCell::Gru, 150), (RecurrentCell::Lstm, 2)] {
        let variables = VarMap::new();
        let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
        let config = RecurrentConfig { d_hidden: 5, seed: random.random(), ..RecurrentConfig::new(4, cell) };
        let layer = Recurrent::new(&config, vb.clone()).unwrap();
        let x = candle_core::Var::from_tensor(&tensor(random, &[2, length, 4], 1.0)).unwrap();
        let weights = tensor(random, &[2, length, 4], 1.0);
        let out_proj = vb.get((4, 5), "out_proj.weight").unwrap();
        let steps: Vec<Tensor> = match cell {
            RecurrentCell::Lstm => {
                let cell = candle_nn::lstm(4, 5, Default::default(), vb.clone()).unwrap();
                cell.seq(&x).unwrap().iter().map(|state| state.h.clone()).collect()
            }
            _ => {
                let cell = candle_nn::gru(4, 5, Default::default(), vb.clone()).unwrap();
                cell.seq(&x).unwrap().iter().map(|state| state.h.clone()).collect()
            }
        };
        let hidden = Tensor::stack(&steps, 1).unwrap();
        let want = hidden.broadcast_matmul(&out_proj.t().unwrap()).unwrap();
        let got = layer.forward(&x).unwrap();
        assert_close(&got, &want, SAME, &format!("{cell:?}"));
        let gradients = |out: &Tensor| (out * &weights).unwrap().sum_all().unwrap().backward().unwrap();
        let (got, want) = (gradients(&got), gradients(&want));
        assert_close(got.get(&x).unwrap(), want.get(&x).unwrap(), SAME_GRADIENTS, "the input");
        for (name, variable) in variables.data().lock().unwrap().iter() {
            assert_close(got.get(variable).unwrap(), want.get(variable).unwrap(), SAME_GRADIENTS, name);
        }
    }
}

/// A list of layers is the same model as the first of them with the others by index.
#[test]
fn a_list_of_layers_is_a_backbone() {
    let config = config(&mut random()).backbone;
    let layers: Vec<_> = (0..config.n_layer).map(|index| config.layer(index)).collect();
    let listed = BackboneConfig::with_layers(layers.clone());
    assert_eq!(listed, config);
    // Another first one.
    let listed = BackboneConfig::with_layers(layers.iter().rev().cloned());
    assert_eq!(listed.n_layer, 7);
    assert!((0..7).all(|index| listed.layer(index) == layers[6 - index]));
    let none = LanguageModelConfig::with_layers(VOCAB, []);
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    assert!(refusal(LanguageModel::new(&none, vb)).contains("`n_layer`: expected at least 1, got 0"));
}

/// A layer that sees all steps, of heads that share keys, in candle's operators: results, and the gradients of the input and of
/// each parameter. Packed, each sequence has what it has alone.
#[test]
fn attention_that_is_not_causal() {
    let random = &mut random();
    let (batch, length, heads, d_head) = (2, 9, 4, 3);
    let config = AttentionConfig {
        n_kv_head: 2,
        d_head,
        qkv_bias: true,
        out_bias: true,
        rope_theta: None,
        causal: false,
        ..AttentionConfig::new(10, heads)
    };
    let variables = VarMap::new();
    let build = || Attention::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)).unwrap();
    build();
    shake(&variables, random);
    let layer = build();
    let x = Var::from_tensor(&tensor(random, &[batch, length, 10], 1.0)).unwrap();
    let plain = || -> candle_core::Result<Tensor> {
        let data = variables.data().lock().unwrap();
        let linear = |name: &str, x: &Tensor| {
            let [weight, bias] = ["weight", "bias"].map(|part| data[&format!("{name}.{part}")].as_tensor().clone());
            x.broadcast_matmul(&weight.t()?)?.broadcast_add(&bias)
        };
        let by_heads = |name, count: usize| {
            let rows = linear(name, &x)?.reshape((batch, length, count, d_head))?.transpose(1, 2)?;
            // Each head of keys and values is read by as many heads of queries as are its share.
            let shared = rows.unsqueeze(2)?.broadcast_as((batch, count, heads / count, length, d_head))?;
            shared.reshape((batch, heads, length, d_head))
        };
        let (q, k, v) = (by_heads("q_proj", 4)?, by_heads("k_proj", 2)?, by_heads("v_proj", 2)?);
        let scores = (q.matmul(&k.t()?)? / (d_head as f64).sqrt())?;
        let out = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
        linear("o_proj", &out.transpose(1, 2)?.reshape((batch, length, heads * d_head))?)
    };
    let (got, want) = (layer.forward(&x).unwrap(), plain().unwrap());
    assert_close(&got, &want, SAME, "out");
    let packed = x.as_tensor().reshape((1, batch * length, 10)).unwrap();
    let packed = layer.forward_packed(&packed, &[0, length, 2 * length]).unwrap();
    assert_close(&packed.reshape(got.shape()).unwrap(), &want, SAME, "packed");
    let weights = tensor(random, &[batch, length, 10], 1.0);
    let gradients = |out: &Tensor| (out * &weights).unwrap().sum_all().unwrap().backward().unwrap();
    let (got, want) = (gradients(&got), gradients(&want));
    assert_close(got.get(&x).unwrap(), want.get(&x).unwrap(), SAME_GRADIENTS, "the input");
    for (name, variable) in variables.data().lock().unwrap().iter() {
        // The same is added to the scores of all keys, so that nothing depends on it: what is there is rounding.
        if name != "k_proj.bias" {
            assert_close(got.get(variable).unwrap(), want.get(variable).unwrap(), SAME_GRADIENTS, name);
        }
    }
    let state = AttentionState::new(&config, 2, 20, DType::F32, &Device::Cpu).unwrap();
    for refused in [layer.prefill(&x, &state, None), layer.step(&x.narrow(1, 0, 1).unwrap(), &state, None)] {
        let error = refusal(refused);
        assert!(error.contains("`causal`: expected true, for prompts and steps of decoding, got false"), "{error}");
    }
    assert_eq!(state.lengths().unwrap(), [0, 0]);
}

#[test]
fn what_makes_no_hybrid_is_named() {
    let random = &mut random();
    let refused = |change: &dyn Fn(&mut BackboneConfig), text: &str, random: &mut StdRng| {
        let mut config = config(random);
        change(&mut config.backbone);
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
        let error = LanguageModel::new(&config, vb).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    };
    let attention = |change: &dyn Fn(&mut AttentionConfig)| {
        let mut config = AttentionConfig::new(12, 3);
        change(&mut config);
        LayerConfig::from(config)
    };
    let put = |layer: LayerConfig| {
        move |config: &mut BackboneConfig| {
            config.layers.insert(3, layer.clone());
        }
    };
    refused(&put(attention(&|a| a.n_kv_head = 2)), "`n_kv_head`: expected a divisor of n_head, 3, got 2", random);
    refused(&put(attention(&|a| a.d_head = 300)), "`d_head`: expected 1 to 256, got 300", random);
    refused(
        &put(attention(&|a| a.d_head = 3)),
        "`d_head`: expected an even number, for rotary positions, got 3",
        random,
    );
    let linear = |factor| Some(RopeScaling::Linear { factor });
    refused(
        &put(attention(&|a| (a.d_head, a.rope_scaling) = (4, linear(0.0)))),
        "`rope_scaling`: expected a factor above 0, got 0",
        random,
    );
    refused(
        &put(attention(&|a| (a.rope_theta, a.rope_scaling) = (None, linear(2.0)))),
        "`rope_scaling`: expected none where there is no rope_theta, got Linear { factor: 2.0 }",
        random,
    );
    let turns = RopeScaling::Llama3 { factor: 2.0, low_turns: 4.0, high_turns: 4.0, original_length: 8 };
    refused(
        &put(attention(&|a| (a.d_head, a.rope_scaling) = (4, Some(turns)))),
        "`rope_scaling`: expected 0 <= low_turns < high_turns, and an original_length of at least 1, got Llama3",
        random,
    );
    refused(&put(attention(&|a| a.rope_theta = Some(0.0))), "`rope_theta`: expected a base above 0, got 0", random);
    let wide = LayerConfig::new(AttentionConfig::new(12, 3), MlpConfig::new(13, 9));
    refused(&put(wide), "`feed_forward`: expected a width of 12, as the mixer's, got 13", random);
    let few = LayerConfig::new(AttentionConfig::new(12, 3), ExpertsConfig::new(12, 9, 2, 3));
    refused(&put(few), "`top_k`: expected 1 to 2, as there are experts, got 3", random);
    let (model, _) = model(random);
    let other = LanguageModel::new(
        &LanguageModelConfig::new(VOCAB, 7, 12),
        VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu),
    )
    .unwrap();
    let error = refusal(model.prefill(&ids(random, 1, 3), &other.new_cache(1, DType::F32).unwrap(), None));
    assert!(error.contains("`cache`"), "{error}");
}
