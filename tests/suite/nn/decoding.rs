//! Prefill and steps on a cache give what one pass over the whole gives, and touch the slots they should.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use rand::Rng;
use rand::seq::SliceRandom;
use selective_scan::candle::Slots;
use selective_scan::nn::{Cache, LanguageModel, MambaConfig, MambaState};

use super::{
    SAME, all_blocks, assert_close, bits, block, causal_blocks, cuts, ids, mamba_states, model, random, refusal, tensor,
};

#[test]
fn chunked_prefill_is_one_pass() {
    let mut random = random();
    for (name, config) in causal_blocks() {
        let (block, _) = block(&config, &mut random);
        let length = random.random_range(65..140);
        let x = tensor(&mut random, &[2, length, 12], 1.0);
        let cache = MambaState::new(&config, 2, DType::F32, &Device::Cpu).unwrap();
        let chunks: Vec<_> = cuts(&mut random, length)
            .windows(2)
            .map(|ends| {
                block.prefill(&x.narrow(1, ends[0], ends[1] - ends[0]).unwrap().contiguous().unwrap(), &cache, None)
            })
            .collect::<Result<_, _>>()
            .unwrap();
        assert_close(&Tensor::cat(&chunks, 1).unwrap(), &block.forward(&x).unwrap(), SAME, name);
    }
}

#[test]
fn steps_are_one_pass() {
    let mut random = random();
    for (name, config) in causal_blocks() {
        let (block, _) = block(&config, &mut random);
        let length = 24;
        let x = tensor(&mut random, &[2, length, 12], 1.0);
        let cache = MambaState::new(&config, 2, DType::F32, &Device::Cpu).unwrap();
        let first = random.random_range(1..5);
        let mut outs =
            vec![block.prefill(&x.narrow(1, 0, first).unwrap().contiguous().unwrap(), &cache, None).unwrap()];
        let mut at = first;
        while at < length {
            let tokens = random.random_range(1..=3.min(length - at));
            let x = x.narrow(1, at, tokens).unwrap().contiguous().unwrap();
            outs.push(block.step(&x, &cache, None).unwrap());
            at += tokens;
        }
        assert_close(&Tensor::cat(&outs, 1).unwrap(), &block.forward(&x).unwrap(), SAME, name);
    }
}

#[test]
fn a_model_decodes_what_it_reads_at_once() {
    let mut random = random();
    for (name, config) in causal_blocks() {
        let (model, _) = model(&config, &mut random);
        let ids = ids(&mut random, 3, 20);
        let whole = model.forward(&ids).unwrap();
        let at = |t: usize| whole.narrow(1, t, 1).unwrap().squeeze(1).unwrap();
        // By what training records and by what it does not.
        for model in [&model, &model.detach().unwrap()] {
            let cache = model.new_cache(3, DType::F32).unwrap();
            for ends in [0, 7, 12].windows(2) {
                let chunk = ids.narrow(1, ends[0], ends[1] - ends[0]).unwrap();
                let logits = model.prefill(&chunk, &cache, None).unwrap();
                assert_close(&logits, &at(ends[1] - 1), SAME, name);
            }
            for t in 12..20 {
                let logits = model.step(&ids.narrow(1, t, 1).unwrap().squeeze(1).unwrap(), &cache, None).unwrap();
                assert_close(&logits, &at(t), SAME, name);
            }
        }
    }
}

/// The bits of every slot of every state.
fn states(cache: &Cache) -> Vec<Vec<Vec<u32>>> {
    let pools = mamba_states(cache).into_iter().flat_map(|layer| [&layer.conv, &layer.ssm]);
    pools.map(|pool| (0..cache.slots()).map(|slot| bits(&pool.get(slot).unwrap())).collect()).collect()
}

#[test]
fn slots_hold_sequences_of_their_own() {
    let mut random = random();
    for (name, config) in causal_blocks() {
        let (model, _) = model(&config, &mut random);
        let ids = ids(&mut random, 3, 12);
        let whole = model.forward(&ids).unwrap();
        let cache = model.new_cache(6, DType::F32).unwrap();
        // States that a call must not touch are not zero, so that zeroing them would show.
        for layer in mamba_states(&cache) {
            for pool in [&layer.conv, &layer.ssm] {
                pool.slice_set(&tensor(&mut random, pool.dims(), 1.0), 0, 0).unwrap();
            }
        }
        let mut order = [0i32, 1, 2, 3, 4, 5];
        order.shuffle(&mut random);
        // Row 1 is padding; the other two have slots anywhere.
        let slots = [order[0], -1, order[1]];
        cache.reset(Some(&order[..2])).unwrap();
        let before = states(&cache);
        let rows = Tensor::new(&[0u32, 2], &Device::Cpu).unwrap();
        let check = |logits: Tensor, t: usize| {
            let got = logits.index_select(&rows, 0).unwrap();
            let wanted = whole
                .narrow(1, t, 1)
                .unwrap()
                .contiguous()
                .unwrap()
                .squeeze(1)
                .unwrap()
                .index_select(&rows, 0)
                .unwrap();
            assert_close(&got, &wanted, SAME, name);
        };
        check(model.prefill(&ids.narrow(1, 0, 8).unwrap(), &cache, &slots).unwrap(), 7);
        for t in 8..12 {
            let token = ids.narrow(1, t, 1).unwrap().squeeze(1).unwrap();
            check(model.step(&token, &cache, &slots).unwrap(), t);
        }
        for (before, after) in before.iter().zip(states(&cache)) {
            for &slot in &order[2..] {
                assert_eq!(before[slot as usize], after[slot as usize], "{name}: slot {slot} belongs to no row");
            }
            for &slot in &order[..2] {
                assert_ne!(
                    before[slot as usize], after[slot as usize],
                    "{name}: slot {slot} is where a row's state goes"
                );
            }
        }
        // A call with nothing but padding writes nothing at all.
        let before = states(&cache);
        model.prefill(&ids, &cache, &[-1, -1, -7]).unwrap();
        model.step(&ids.narrow(1, 0, 1).unwrap().squeeze(1).unwrap(), &cache, &[-1, -1, -1]).unwrap();
        assert_eq!(before, states(&cache));
    }
}

/// Steps whose slots are a tensor give the bits of those with a list, in blocks, stacks and models; a prompt needs a list that
/// the host can read.
pub fn slots_as_tensors(device: &Device) {
    let mut random = random();
    let config = &causal_blocks()[0].1;
    let (model, _) = model(config, &mut random);
    let vb = VarBuilder::from_tensors(
        model.named_tensors().into_iter().map(|(name, tensor)| (name, tensor.to_device(device).unwrap())).collect(),
        DType::F32,
        device,
    );
    let model = LanguageModel::new(model.config(), vb).unwrap();
    let on_device = |tensor: Tensor| tensor.to_device(device).unwrap();
    let prompts = on_device(ids(&mut random, 3, 4));
    let embedded = on_device(tensor(&mut random, &[3, 1, 12], 1.0));
    let tokens = Tensor::new(&[3u32, 1, 4], device).unwrap();
    let caches = [(); 2].map(|()| {
        let cache = model.new_cache(5, DType::F32).unwrap();
        model.prefill(&prompts, &cache, &[4, 0, 2]).unwrap();
        cache
    });
    let list = [2, -1, 4];
    let slots = Tensor::new(&list, device).unwrap();
    let block = model.mixers().next().unwrap().as_mamba().unwrap();
    let run = |cache: &Cache, slots: Slots| {
        let results = [
            model.step(&tokens, cache, slots).unwrap(),
            model.backbone().step(&embedded, cache, slots).unwrap(),
            block.step(&embedded, mamba_states(cache)[0], slots).unwrap(),
        ];
        results.iter().map(bits).collect::<Vec<_>>()
    };
    assert_eq!(run(&caches[0], (&slots).into()), run(&caches[1], (&list).into()));
    assert_eq!(states(&caches[0]), states(&caches[1]));

    let before = states(&caches[0]);
    let refused = |slots: &Tensor, words: &str| {
        for message in [
            refusal(model.step(&tokens, &caches[0], slots)),
            refusal(model.prefill(&prompts, &caches[0], slots)),
            refusal(model.backbone().step(&embedded, &caches[0], slots)),
            refusal(block.step(&embedded, mamba_states(&caches[0])[0], slots)),
        ] {
            assert!(message.starts_with(words), "{message}");
        }
        assert_eq!(states(&caches[0]), before);
    };
    refused(&tokens, "`slots`: expected dtype I32, got U32");
    refused(&slots.narrow(0, 0, 2).unwrap(), "`slots`: expected one for each of 3 batch rows, got 2");
    if device.is_cpu() {
        refused(&Tensor::new(&[0i32, 1, 5], device).unwrap(), "`slots`: expected slots below 5");
        let logits = caches.each_ref().map(|cache| bits(&model.prefill(&prompts, cache, &slots).unwrap()));
        assert_eq!(logits[0], logits[1]);
    } else {
        let message = refusal(model.prefill(&prompts, &caches[0], &slots));
        assert!(message.starts_with("`slots`: expected a list on the host"), "{message}");
        let elsewhere = Tensor::new(&list, &Device::Cpu).unwrap();
        refused(&elsewhere, "`slots`: expected a tensor on Cuda { gpu_id: 0 }, as `cache`, got one on Cpu");
    }
}

#[test]
fn slots_may_be_a_tensor() {
    slots_as_tensors(&Device::Cpu);
}

#[test]
fn a_reset_slot_begins_anew_and_a_snapshot_stays() {
    let mut random = random();
    let (model, _) = model(&causal_blocks()[0].1, &mut random);
    let ids = ids(&mut random, 2, 9);
    let cache = model.new_cache(2, DType::F32).unwrap();
    let first = model.prefill(&ids, &cache, None).unwrap();
    let snapshot = cache.snapshot().unwrap();
    let second = model.prefill(&ids, &cache, None).unwrap();
    assert_ne!(states(&snapshot), states(&cache));
    cache.reset(Some(&[1])).unwrap();
    let third = model.prefill(&ids, &cache, None).unwrap();
    let row = |logits: &Tensor, row: usize| bits(&logits.get(row).unwrap());
    assert_eq!(row(&third, 1), row(&first, 1), "reset");
    assert_ne!(row(&second, 1), row(&first, 1), "not reset");
    assert_ne!(row(&third, 0), row(&first, 0), "the other slot was not reset");
    assert_eq!(
        bits(&model.prefill(&ids, &snapshot, None).unwrap()),
        bits(&second),
        "from where the snapshot was taken"
    );
    cache.reset(None).unwrap();
    assert_eq!(bits(&model.prefill(&ids, &cache, None).unwrap()), bits(&first), "all reset");
}

/// Slots are copied onto others as beams are, taken as what many sequences begin with, put back, and become more.
#[test]
fn slots_are_copied_taken_and_put() {
    let mut random = random();
    let (model, _) = model(&causal_blocks()[0].1, &mut random);
    let mut cache = model.new_cache(4, DType::F32).unwrap();
    model.prefill(&ids(&mut random, 4, 6), &cache, None).unwrap();
    // Of each pool, the slots in an order.
    let picked = |pools: &[Vec<Vec<u32>>], slots: &[usize]| -> Vec<Vec<Vec<u32>>> {
        pools.iter().map(|pool| slots.iter().map(|&slot| pool[slot].clone()).collect()).collect()
    };
    let before = states(&cache);
    // 0 and 1 change places, and 3 becomes a second 0.
    cache.copy_slots(&[1, 0, 0], &[0, 1, 3]).unwrap();
    assert_eq!(states(&cache), picked(&before, &[1, 0, 2, 0]));
    let (taken, before) = (cache.take(&[2, 0, 2]).unwrap(), states(&cache));
    assert_eq!(states(&taken), picked(&before, &[2, 0, 2]));
    // Taken is taken: what happens to the cache afterwards does not matter, nor the other way round.
    cache.reset(Some(&[0, -1, 2])).unwrap();
    taken.reset(Some(&[0])).unwrap();
    assert!(states(&cache).iter().all(|pool| pool[0].iter().chain(&pool[2]).all(|bits| *bits == 0)));
    assert_eq!(picked(&states(&cache), &[1, 3]), picked(&before, &[1, 3]));
    cache.put(&taken, &[1, 0, 2]).unwrap();
    assert_eq!(picked(&states(&cache), &[0, 2, 3]), picked(&before, &[0, 2, 3]));
    assert!(states(&cache).iter().all(|pool| pool[1].iter().all(|bits| *bits == 0)));

    let (handle, small) = (cache.clone(), states(&cache));
    cache.grow(6).unwrap();
    assert_eq!((cache.slots(), handle.slots()), (6, 4));
    assert_eq!(picked(&states(&cache), &[0, 1, 2, 3]), small);
    assert!(states(&cache).iter().all(|pool| pool[4].iter().chain(&pool[5]).all(|bits| *bits == 0)));
    model.step(&Tensor::new(&[1u32], &Device::Cpu).unwrap(), &cache, &[5]).unwrap();

    // A cache of narrow states rounds what is put there.
    let narrow = model.new_cache(1, DType::BF16).unwrap();
    narrow.put(&cache.take(&[3]).unwrap(), &[0]).unwrap();
    let (wide, narrow) = (mamba_states(&cache)[0].ssm.get(3).unwrap(), mamba_states(&narrow)[0].ssm.get(0).unwrap());
    assert_eq!(bits(&narrow), bits(&wide.to_dtype(DType::BF16).unwrap()));

    let before = states(&cache);
    for (message, word) in [
        (refusal(cache.copy_slots(&[0, 1], &[2])), "`to`: expected 2 slots"),
        (refusal(cache.copy_slots(&[0, 6], &[2, 3])), "`from`"),
        (refusal(cache.copy_slots(&[0, -1], &[2, 3])), "`from`"),
        (refusal(cache.copy_slots(&[0, 1], &[2, 2])), "2 twice"),
        (refusal(cache.copy_slots(&[0, 1], &[2, -3])), "`to`"),
        (refusal(cache.take(&[6])), "below 6"),
        (refusal(cache.put(&taken, &[0, 1])), "3 slots"),
        (refusal(cache.put(&taken, &[0, 1, 6])), "below 6"),
        (refusal(cache.clone().grow(5)), "6 or more"),
        (refusal(cache.reset(Some(&[-1, 6]))), "below 6"),
    ] {
        assert!(message.contains(word), "{message}");
    }
    let other = super::model(&MambaConfig { d_state: 4, ..causal_blocks()[0].1.clone() }, &mut random).0;
    let message = refusal(cache.put(&other.new_cache(1, DType::F32).unwrap(), &[0]));
    assert!(message.contains("the same model"), "{message}");
    assert_eq!(states(&cache), before);
    cache.copy_slots(&[], &[]).unwrap();
    assert_eq!(cache.take(&[]).unwrap().slots(), 0);
    assert_eq!(states(&cache), before);
}

#[test]
fn what_does_not_fit_is_refused_and_writes_nothing() {
    let mut random = random();
    let blocks = all_blocks();
    let (model, _) = super::model(&blocks[0].1, &mut random);
    let (ids, token) = (ids(&mut random, 2, 5), Tensor::new(&[1u32, 2], &Device::Cpu).unwrap());
    let cache = model.new_cache(3, DType::F32).unwrap();
    model.prefill(&ids, &cache, &[2, 0]).unwrap();
    let before = states(&cache);
    let refused = |slots: Option<&[i32]>, words: &[&str]| {
        for message in [
            refusal(model.prefill(&ids, &cache, slots)),
            refusal(model.step(&token, &cache, slots)),
            refusal(model.prefill_packed(&ids.reshape((1, 10)).unwrap(), &[0, 4, 10], &cache, slots)),
        ] {
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
            assert_eq!(before, states(&cache));
        }
    };
    refused(None, &["`cache`", "one slot for each of 2"]);
    refused(Some(&[0, 3]), &["slots", "below 3"]);
    refused(Some(&[1, 1]), &["slots", "1 twice"]);
    refused(Some(&[1]), &["slots", "each of 2"]);
    let message = refusal(model.prefill(&ids.narrow(1, 0, 0).unwrap(), &cache, &[0, 1]));
    assert!(message.contains("ids"), "{message}");
    let message = refusal(model.prefill_packed(&ids.reshape((1, 10)).unwrap(), &[0, 4, 4, 10], &cache, &[0, 1, 2]));
    assert!(message.contains("cu_seqlens"), "{message}");
    let message = refusal(model.prefill_packed(&ids.reshape((1, 10)).unwrap(), &[0, 4, 9], &cache, &[0, 1]));
    assert!(message.contains("cu_seqlens"), "{message}");
    let wild = Tensor::new(&[1u32, 11], &Device::Cpu).unwrap();
    refusal(model.step(&wild, &cache, &[0, 1]));
    assert!(refusal(cache.reset(Some(&[0, 3]))).contains("below 3"));
    assert_eq!(before, states(&cache));

    let other = super::model(&MambaConfig { d_state: 4, ..blocks[0].1.clone() }, &mut random).0;
    let message = refusal(model.step(&token, &other.new_cache(2, DType::F32).unwrap(), None));
    assert!(message.contains("cache") && message.contains("[2, 20, 5]"), "{message}");
    assert!(refusal(model.new_cache(2, DType::F64)).contains("f32, f16 or bf16"));
}

#[test]
fn a_bidirectional_block_does_not_decode() {
    let mut random = random();
    for (name, config) in all_blocks().into_iter().filter(|(_, config)| config.bidirectional) {
        let (block, _) = block(&config, &mut random);
        let cache = MambaState::new(&config, 1, DType::F32, &Device::Cpu).unwrap();
        let x = tensor(&mut random, &[1, 1, 12], 1.0);
        for message in [refusal(block.prefill(&x, &cache, None)), refusal(block.step(&x, &cache, None))] {
            assert!(message.contains("bidirectional"), "{name}: {message}");
        }
        let (model, _) = model(&config, &mut random);
        let cache = model.new_cache(1, DType::F32).unwrap();
        assert!(refusal(model.prefill(&ids(&mut random, 1, 3), &cache, None)).contains("bidirectional"));
    }
}

/// Tokens of a draft have the logits of single steps, and after some were taken back decoding goes on as if they had not been read.
#[test]
fn drafts_are_taken_back() {
    let mut random = random();
    for (name, config) in causal_blocks() {
        let (model, _) = model(&config, &mut random);
        let (cache, plain) = (model.new_cache(5, DType::F32).unwrap(), model.new_cache(5, DType::F32).unwrap());
        let slots = [4i32, -1, 2];
        let prompt = ids(&mut random, 3, 6);
        for cache in [&cache, &plain] {
            model.prefill(&prompt, cache, &slots).unwrap();
        }
        let untouched = |cache: &Cache| {
            [0, 1, 3].map(|slot| states(cache).into_iter().map(|pool| pool[slot].clone()).collect::<Vec<_>>())
        };
        let before = untouched(&cache);
        let drafted = ids(&mut random, 3, 4);
        let column = |t: usize| drafted.narrow(1, t, 1).unwrap().squeeze(1).unwrap();
        let (logits, draft) = model.draft(&drafted, &cache, &slots).unwrap();
        assert_eq!(logits.dims(), [3, 4, 11]);
        let accepted = [random.random_range(1..=4), 9, random.random_range(1..=4)];
        // Rows go on alone, each through as many tokens as were accepted.
        for row in [0, 2] {
            for t in 0..accepted[row] {
                let token = column(t).narrow(0, row, 1).unwrap();
                let expected = model.step(&token, &plain, &slots[row..=row]).unwrap();
                let got = logits.narrow(0, row, 1).unwrap().narrow(1, t, 1).unwrap().squeeze(1).unwrap();
                assert_close(&got, &expected, SAME, name);
            }
        }
        draft.accept(&accepted).unwrap();
        let next = Tensor::new(&[3u32, 7], &Device::Cpu).unwrap();
        let [got, expected] = [&cache, &plain].map(|cache| model.step(&next, cache, &[4, 2]).unwrap());
        assert_close(&got, &expected, SAME, name);
        assert_eq!(untouched(&cache), before, "{name}");
        let (_, draft) = model.draft(&drafted, &cache, &slots).unwrap();
        assert!(refusal(draft.accept(&[5, 1, 1])).starts_with("`accepted`: expected from 1 to 4 tokens"), "{name}");
        let none = drafted.narrow(1, 0, 0).unwrap();
        assert!(refusal(model.draft(&none, &cache, &slots)).starts_with("`ids`: expected at least one token"));
    }
}

/// A text that is scored chunk by chunk has the logits of one pass.
#[test]
fn logits_of_every_token_from_a_state() {
    let mut random = random();
    for (name, config) in causal_blocks() {
        let (model, _) = model(&config, &mut random);
        let ids = ids(&mut random, 2, 30);
        let cache = model.new_cache(2, DType::F32).unwrap();
        let chunks: Vec<_> = cuts(&mut random, 30)
            .windows(2)
            .map(|ends| model.prefill_all(&ids.narrow(1, ends[0], ends[1] - ends[0]).unwrap(), &cache, None).unwrap())
            .collect();
        assert_close(&Tensor::cat(&chunks, 1).unwrap(), &model.forward(&ids).unwrap(), SAME, name);
    }
}

/// Parts of a text from carried states: the logits of one pass, and in the last part the gradients that its loss has there where those
/// of the parts before are cut off, which is one pass whose first steps count for nothing less what goes through the states.
#[test]
fn parts_of_a_text_are_trained_on() {
    let mut random = random();
    for (index, (name, config)) in causal_blocks().into_iter().enumerate() {
        let (model, variables) = model(&config, &mut random);
        let ids = ids(&mut random, 2, 90);
        let cache = model.new_cache(4, DType::F32).unwrap();
        // Slots that follow each other, whose states are read where they lie, and others.
        let slots = if index % 2 == 0 { [1i32, 2] } else { [3, 0] };
        let part = |start, len| ids.narrow(1, start, len).unwrap();
        let first = model.forward_from(&part(0, 70), &cache, &slots).unwrap();
        let before = cache.snapshot().unwrap();
        let second = model.forward_from(&part(70, 20), &cache, &slots).unwrap();
        let whole = model.forward(&ids).unwrap();
        assert_close(&Tensor::cat(&[&first, &second], 1).unwrap(), &whole, SAME, name);
        let gradients = second.sqr().unwrap().mean_all().unwrap().backward().unwrap();
        // By differences along a random direction of each variable, in which the states before stay as they are.
        for variable in variables.all_vars() {
            let direction = tensor(&mut random, variable.dims(), 1.0);
            let original = variable.as_tensor().copy().unwrap();
            let loss = |step: f64| {
                variable.set(&(&original + (&direction * step).unwrap()).unwrap()).unwrap();
                let cache = before.snapshot().unwrap();
                let out = model.forward_from(&part(70, 20), &cache, &slots).unwrap();
                f64::from(out.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap())
            };
            // Two steps, of which the difference takes the third derivative away.
            let step = 5e-3;
            let near = loss(step) - loss(-step);
            let far = loss(2.0 * step) - loss(-2.0 * step);
            let (expected, size) = ((8.0 * near - far) / (12.0 * step), loss(0.0));
            variable.set(&original).unwrap();
            let gradient = gradients.get(&variable).cloned().unwrap_or(original.zeros_like().unwrap());
            let sum = |x: Tensor| f64::from(x.sum_all().unwrap().to_scalar::<f32>().unwrap());
            let got = sum((&gradient * &direction).unwrap());
            // What is left of the differences, beside what a sum of so many terms usually comes to (it may cancel); and losses of f32,
            // each within 1e-6 of itself, of which 18 are divided by 12 steps.
            let usual = (sum(gradient.sqr().unwrap()) / 3.0).sqrt();
            let allowed = 1e-2 * usual.max(expected.abs()) + 3e-4 * size;
            assert!((got - expected).abs() <= allowed, "{name}, {:?}: {got} and {expected}", variable.dims());
        }
    }
}

#[test]
fn states_go_to_files_and_back() {
    let mut random = random();
    let folder = std::env::temp_dir().join(format!("selective-scan-states-{}", random.random::<u64>()));
    std::fs::create_dir(&folder).unwrap();
    let path = folder.join("states.safetensors");
    let (model, _) = model(&causal_blocks()[0].1, &mut random);
    for dtype in [DType::F32, DType::BF16] {
        let cache = model.new_cache(3, dtype).unwrap();
        model.prefill(&ids(&mut random, 3, 5), &cache, None).unwrap();
        cache.save(&path).unwrap();
        let read = Cache::load(&path, &Device::Cpu).unwrap();
        assert_eq!(states(&read), states(&cache));
        assert_eq!(mamba_states(&read)[0].ssm.dtype(), dtype);
    }
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing unfinished is left");
    let strange = std::collections::HashMap::from([(
        "layers.0.conv".to_string(),
        Tensor::ones(3, DType::F32, &Device::Cpu).unwrap(),
    )]);
    candle_core::safetensors::save(&strange, &path).unwrap();
    let message = refusal(Cache::load(&path, &Device::Cpu));
    assert!(message.contains("layers.N.ssm") && message.contains("states.safetensors"), "{message}");
    assert!(Cache::load(folder.join("none"), &Device::Cpu).is_err());
    std::fs::remove_dir_all(&folder).unwrap();
}
