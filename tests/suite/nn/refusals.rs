//! Tokens beyond the vocabulary, calls without tokens, sizes beyond memory, caches made by hand.

use candle_core::{DType, Device, IndexOp, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use rand::Rng;
use selective_scan::nn::{Cache, LanguageModel, LanguageModelConfig, Mamba, MambaConfig, MambaState};

use super::{all_blocks, bits, block, causal_blocks, mamba_states, model, random, refusal, tensor};

fn states(cache: &Cache) -> Vec<Vec<u32>> {
    mamba_states(cache).into_iter().flat_map(|layer| [bits(&layer.conv), bits(&layer.ssm)]).collect()
}

/// Whether a call fails in naming the ids, each of the ways in which a model reads them, and leaves the states.
fn ids_are_refused(model: &LanguageModel, ids: &Tensor, words: &[&str]) {
    let (batch, length) = ids.dims2().unwrap();
    let cache = model.new_cache(batch, DType::F32).unwrap();
    let packed_cache = model.new_cache(1, DType::F32).unwrap();
    let before = (states(&cache), states(&packed_cache));
    let flat = ids.reshape((1, batch * length)).unwrap();
    let cu_seqlens = [0, batch * length];
    let mut messages = vec![
        refusal(model.forward(ids)),
        refusal(model.hidden_states(ids)),
        refusal(model.forward_packed(&flat, &cu_seqlens)),
        refusal(model.prefill(ids, &cache, None)),
        refusal(model.prefill_packed(&flat, &cu_seqlens, &packed_cache, None)),
    ];
    for t in 0..length {
        // One of the columns has the bad one.
        if let Err(error) = model.step(&ids.i((.., t)).unwrap(), &cache, None) {
            messages.push(error.to_string());
        } else {
            cache.reset(None).unwrap();
        }
    }
    assert_eq!(messages.len(), 6);
    for message in messages {
        assert!(message.contains("`ids`") && words.iter().all(|word| message.contains(word)), "{message}");
    }
    assert_eq!(before, (states(&cache), states(&packed_cache)));
}

#[test]
fn ids_beyond_the_vocabulary_are_refused() {
    let mut random = random();
    let (model, _) = model(&causal_blocks()[0].1, &mut random);
    let device = &Device::Cpu;
    for model in [&model, &model.detach().unwrap()] {
        // The vocabulary is 11.
        ids_are_refused(model, &Tensor::new(&[[1u8, 2], [3, u8::MAX]], device).unwrap(), &["0 to 10", "255"]);
        for id in [u32::MAX, 11] {
            ids_are_refused(model, &Tensor::new(&[[1u32, 2], [id, 3]], device).unwrap(), &[&id.to_string()]);
        }
        for id in [i64::MAX, 11, -1, i64::MIN] {
            ids_are_refused(model, &Tensor::new(&[[1i64, id], [0, 3]], device).unwrap(), &[&id.to_string()]);
        }
        for id in [i32::MAX, -1] {
            ids_are_refused(model, &Tensor::new(&[[1i32, id], [0, 3]], device).unwrap(), &[&id.to_string()]);
        }
        for id in [i16::MAX, 11, -1] {
            ids_are_refused(model, &Tensor::new(&[[1i16, id], [0, 3]], device).unwrap(), &[&id.to_string()]);
        }
    }
    let message = refusal(model.forward(&Tensor::new(&[[1u32, 2], [3, 99]], device).unwrap()));
    assert!(message.contains("99 at [1, 1]"), "{message}");
    assert!(refusal(model.forward(&tensor(&mut random, &[1, 3], 1.0))).contains("integers"));
    assert!(refusal(model.forward(&Tensor::new(&[1u32], device).unwrap())).contains("(batch, length)"));
    let cache = model.new_cache(1, DType::F32).unwrap();
    assert!(refusal(model.step(&Tensor::new(&[[1u32]], device).unwrap(), &cache, None)).contains("(batch)"));
}

/// 255 is a token like others where the vocabulary has it; every integer type reads the same rows, of any layout.
#[test]
fn ids_of_every_type_read_the_same() {
    let config = LanguageModelConfig::new(256, 1, 8);
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let model = LanguageModel::new(&config, vb).unwrap();
    let ids = Tensor::new(&[[1u32, 255, 2], [0, 254, 255]], &Device::Cpu).unwrap();
    let expected = bits(&model.forward(&ids).unwrap());
    for dtype in [DType::U8, DType::I16, DType::I32, DType::I64] {
        assert_eq!(bits(&model.forward(&ids.to_dtype(dtype).unwrap()).unwrap()), expected, "{dtype:?}");
    }
    let turned = ids.t().unwrap().contiguous().unwrap().t().unwrap();
    assert_eq!(bits(&model.forward(&turned).unwrap()), expected);
    let wide = Tensor::cat(&[&ids, &ids], 1).unwrap().narrow(1, 3, 3).unwrap();
    assert_eq!(bits(&model.forward(&wide).unwrap()), expected);
    // The row of 255 is its own, not zero.
    let row = &model.named_tensors()[0].1.i(255).unwrap();
    assert!(bits(row).iter().any(|bits| *bits != 0));
}

/// Prefill and steps write states in place, so nothing comes of a backward pass through them: not a part of the gradients.
#[test]
fn decoding_is_not_differentiable() {
    let mut random = random();
    for (name, config) in causal_blocks() {
        let (model, variables) = model(&config, &mut random);
        let cache = model.new_cache(2, DType::F32).unwrap();
        let token = Tensor::new(&[1u32, 5], &Device::Cpu).unwrap();
        let ids = super::ids(&mut random, 2, 6);
        let logits = [
            ("prefill", model.prefill(&ids, &cache, None).unwrap()),
            ("packed", model.prefill_packed(&ids.reshape((1, 12)).unwrap(), &[0, 5, 12], &cache, None).unwrap()),
            ("step", model.step(&token, &cache, None).unwrap()),
        ];
        for (call, logits) in logits {
            assert!(!logits.track_op(), "{name}, {call}");
            let gradients = logits.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            for (parameter, variable) in variables.data().lock().unwrap().iter() {
                assert!(gradients.get(variable).is_none(), "{name}, {call}: a gradient for {parameter}");
            }
        }
        assert!(mamba_states(&cache).iter().all(|layer| !layer.conv.track_op() && !layer.ssm.track_op()), "{name}");

        // A block, also where only its input is tracked.
        let (block, variables) = block(&config, &mut random);
        let x = Var::from_tensor(&tensor(&mut random, &[2, 3, 12], 1.0)).unwrap();
        for block in [&block, &block.detach().unwrap()] {
            let cache = MambaState::new(&config, 2, DType::F32, &Device::Cpu).unwrap();
            let outs = [
                block.prefill(&x, &cache, None).unwrap(),
                block.prefill_packed(&x.reshape((1, 6, 12)).unwrap(), &[0, 2, 6], &cache, None).unwrap(),
                block.step(&x, &cache, None).unwrap(),
            ];
            for out in outs {
                assert!(!out.track_op(), "{name}");
                let gradients = out.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                assert!(gradients.get(&x).is_none(), "{name}");
                assert!(variables.all_vars().iter().all(|variable| gradients.get(variable).is_none()), "{name}");
            }
        }
    }
}

/// Of nothing comes nothing, of the right shape, and states stay as they are.
#[test]
fn calls_without_tokens() {
    let mut random = random();
    let empty = |shape: &[usize]| Tensor::zeros(shape, DType::U32, &Device::Cpu).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        for (name, config) in all_blocks() {
            let (model, variables) = model(&config, &mut random);
            let config = model.config().clone();
            let half = VarBuilder::from_varmap(&variables, dtype, &Device::Cpu);
            let trained = LanguageModel::new(&config, half).unwrap();
            for model in [&trained, &trained.detach().unwrap()] {
                for shape in [[0, 5], [2, 0], [0, 0]] {
                    let what = format!("{name}, {dtype:?}, {shape:?}");
                    let logits = model.forward(&empty(&shape)).unwrap();
                    assert_eq!((logits.dims(), logits.dtype()), (&[shape[0], shape[1], 11][..], DType::F32), "{what}");
                    let states = model.hidden_states(&empty(&shape)).unwrap();
                    assert_eq!(states.len(), 3, "{what}");
                    assert!(states.iter().all(|state| state.dims() == [shape[0], shape[1], 12]), "{what}");
                    logits.sum_all().unwrap().backward().unwrap();
                }
                for cu_seqlens in [&[0][..], &[0, 0, 0]] {
                    assert_eq!(model.forward_packed(&empty(&[1, 0]), cu_seqlens).unwrap().dims(), [1, 0, 11], "{name}");
                }
                assert!(refusal(model.forward_packed(&empty(&[1, 0]), &[0, 1])).contains("cu_seqlens"), "{name}");
                assert!(refusal(model.forward_packed(&empty(&[1, 0]), &[])).contains("cu_seqlens"), "{name}");
                if super::mamba(&config).bidirectional {
                    continue;
                }
                let (none, some) = (model.new_cache(0, DType::F32).unwrap(), model.new_cache(2, DType::F32).unwrap());
                model.prefill(&super::ids(&mut random, 2, 3), &some, None).unwrap();
                let before = states(&some);
                for (cache, slots) in [(&none, None), (&some, Some(&[][..]))] {
                    for logits in [
                        model.prefill(&empty(&[0, 5]), cache, slots),
                        model.prefill(&empty(&[0, 0]), cache, slots),
                        model.prefill_packed(&empty(&[1, 0]), &[0], cache, slots),
                        model.step(&empty(&[0]), cache, slots),
                    ] {
                        assert_eq!(logits.unwrap().dims(), [0, 11], "{name}");
                    }
                }
                assert!(refusal(model.prefill(&empty(&[2, 0]), &some, None)).contains("at least one token"), "{name}");
                assert!(refusal(model.step(&empty(&[0]), &some, None)).contains("one slot for each of 0"), "{name}");
                none.reset(None).unwrap();
                some.reset(Some(&[])).unwrap();
                none.snapshot().unwrap();
                assert_eq!(before, states(&some), "{name}");
            }
        }
    }
}

#[test]
fn blocks_without_steps() {
    let mut random = random();
    let empty = |batch, length| Tensor::zeros((batch, length, 12), DType::F32, &Device::Cpu).unwrap();
    for (name, config) in all_blocks() {
        let (block, _) = block(&config, &mut random);
        for (batch, length) in [(0, 5), (2, 0), (0, 0)] {
            let out = block.forward(&empty(batch, length)).unwrap();
            assert_eq!(out.dims(), [batch, length, 12], "{name}");
            if !config.bidirectional {
                let cache = MambaState::new(&config, batch, DType::F32, &Device::Cpu).unwrap();
                for out in [
                    block.prefill(&empty(batch, length), &cache, None).unwrap(),
                    block.step(&empty(batch, length), &cache, None).unwrap(),
                ] {
                    assert_eq!(out.dims(), [batch, length, 12], "{name}");
                }
                assert!(bits(&cache.ssm).iter().all(|bits| *bits == 0), "{name}");
            }
        }
        assert_eq!(block.forward_packed(&empty(1, 0), &[0, 0]).unwrap().dims(), [1, 0, 12], "{name}");
        assert!(refusal(block.forward_packed(&empty(1, 0), &[0, 2])).contains("cu_seqlens"), "{name}");
    }
}

/// Sizes whose parameters no address space has, and such that no machine has memory for, are refused before a parameter
/// is made.
#[test]
fn sizes_beyond_memory_are_refused() {
    let refused = |build: &dyn Fn(VarBuilder) -> Result<()>, words: &[&str]| {
        let variables = VarMap::new();
        let message = refusal(build(VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)));
        assert!(words.iter().any(|word| message.contains(word)), "{message}");
        assert!(variables.all_vars().is_empty(), "{message}: nothing is made");
        let message = refusal(build(VarBuilder::zeros(DType::F32, &Device::Cpu)));
        assert!(words.iter().chain(&["`vb`"]).any(|word| message.contains(word)), "{message}");
    };
    // From what overflows to 2^44 bytes and more, beyond what a machine has.
    for size in [usize::MAX, usize::MAX / 2, 1 << 62, 1 << 40, 1 << 32, 1 << 24] {
        let block = MambaConfig::new(size);
        refused(&|vb| Mamba::new(&block, vb).map(|_| ()), &["d_model"]);
        refused(&|vb| LanguageModel::new(&LanguageModelConfig::new(5, 1, size), vb).map(|_| ()), &["d_model"]);
        let message = MambaState::new(&block, 1 << 40, DType::F32, &Device::Cpu).map(|_| ());
        assert!(["d_model", "slots"].iter().any(|word| refusal_of(&message).contains(word)));
    }
    for size in [usize::MAX, usize::MAX / 2, 1 << 62, 1 << 44] {
        let base = MambaConfig { d_inner: 16, ..MambaConfig::new(8) };
        for block in [
            MambaConfig { d_inner: size, ..base.clone() },
            MambaConfig { dt_rank: size, ..base.clone() },
            MambaConfig { d_inner: size, selective: false, ..base.clone() },
            MambaConfig { dt_rank: size, bidirectional: true, ..base.clone() },
        ] {
            refused(&|vb| Mamba::new(&block, vb).map(|_| ()), &["d_inner"]);
        }
        let model = LanguageModelConfig::with_mixer(5, 1, base.clone());
        let vocabulary = LanguageModelConfig { vocab_size: size, ..model.clone() };
        refused(&|vb| LanguageModel::new(&vocabulary, vb).map(|_| ()), &["vocab_size"]);
        let layers = LanguageModelConfig::with_mixer(5, size, base.clone());
        let variables = VarMap::new();
        let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
        assert!(refusal(LanguageModel::new(&layers, vb)).contains("n_layer"));
        assert!(variables.all_vars().is_empty());
        let message = MambaState::new(&base, size, DType::F32, &Device::Cpu).map(|_| ());
        assert!(refusal_of(&message).contains("slots"), "{size}");
    }
}

fn refusal_of(result: &Result<()>) -> String {
    result.as_ref().expect_err("this should have been an error").to_string()
}

/// Views of zero strides are small, but what is computed from them is not.
#[test]
fn inputs_that_are_larger_than_memory_are_refused() {
    let mut random = random();
    let (model, _) = model(&causal_blocks()[0].1, &mut random);
    let ids = Tensor::new(&[[1u32]], &Device::Cpu).unwrap();
    for rows in [1 << 44, 1 << 58] {
        let many = ids.broadcast_as((rows, 1)).unwrap();
        assert!(refusal(model.forward(&many)).contains("`ids`"));
        let (block, _) = block(&causal_blocks()[0].1, &mut random);
        let x = tensor(&mut random, &[1, 1, 12], 1.0).broadcast_as((rows, 1, 12)).unwrap();
        assert!(refusal(block.forward(&x)).contains("`x`"));
    }
}

/// A cache that was made by hand is refused whole: the states of the convolution stay where those of the scan do not fit.
#[test]
fn caches_that_do_not_fit_are_refused() {
    let mut random = random();
    let config = causal_blocks()[0].1.clone();
    let (block, _) = block(&config, &mut random);
    let x = tensor(&mut random, &[2, 1, 12], 1.0);
    let good = MambaState::new(&config, 2, DType::F32, &Device::Cpu).unwrap();
    block.prefill(&x, &good, None).unwrap();
    let refused = |cache: MambaState, word: &str| {
        let before = (bits(&cache.conv), bits(&cache.ssm));
        for message in [
            refusal(block.prefill(&x, &cache, None)),
            refusal(block.step(&x, &cache, None)),
            refusal(block.prefill_packed(&x.reshape((1, 2, 12)).unwrap(), &[0, 1, 2], &cache, None)),
        ] {
            assert!(message.contains("`cache") && message.contains(word), "{message}");
        }
        assert_eq!(before, (bits(&cache.conv), bits(&cache.ssm)));
    };
    for dtype in [DType::I64, DType::F64, DType::U8] {
        refused(MambaState { ssm: good.ssm.to_dtype(dtype).unwrap(), ..good.clone() }, "`cache.ssm`");
        refused(MambaState { conv: good.conv.to_dtype(dtype).unwrap(), ..good.clone() }, "`cache.conv`");
    }
    let scalar = Tensor::new(1f32, &Device::Cpu).unwrap();
    refused(MambaState { ssm: scalar.clone(), ..good.clone() }, "(slots, d_inner, d_state)");
    refused(MambaState { conv: scalar.clone(), ssm: scalar.clone() }, "(slots, d_conv - 1, d_inner)");
    assert_eq!(MambaState { conv: scalar.clone(), ssm: scalar }.slots(), 0);
    let turned = |t: &Tensor| t.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap();
    refused(MambaState { ssm: turned(&good.ssm), ..good.clone() }, "contiguous");
    refused(MambaState { conv: turned(&good.conv), ..good.clone() }, "contiguous");
    let half = MambaState { ssm: turned(&good.ssm), ..good.clone() };
    let before = bits(&half.conv);
    assert!(refusal(half.reset(Some(&[0]))).contains("contiguous"));
    assert_eq!(before, bits(&half.conv));
    let variable = Var::from_tensor(&good.ssm).unwrap();
    refused(MambaState { ssm: variable.as_tensor().clone(), ..good.clone() }, "detach");
    refused(MambaState { ssm: (variable.as_tensor() * 1.0).unwrap(), ..good.clone() }, "detach");
    let narrow = MambaState { ssm: good.ssm.narrow(0, 0, 1).unwrap(), ..good.clone() };
    refused(narrow, "slots");
    // States of two types are two types.
    let mixed = MambaState { ssm: good.ssm.to_dtype(DType::BF16).unwrap(), ..good };
    block.step(&x, &mixed, None).unwrap();
}

#[test]
fn inputs_of_another_type_are_refused() {
    let mut random = random();
    let (block, _) = block(&causal_blocks()[0].1, &mut random);
    let x = tensor(&mut random, &[1, 2, 12], 1.0).to_dtype(DType::BF16).unwrap();
    assert!(refusal(block.forward(&x)).contains("`x`: expected type f32"));
    let _ = random.random::<u8>();
}

/// A clone of a cache is the same cache.
#[test]
fn a_clone_shares_its_states() {
    let mut random = random();
    let (model, _) = model(&causal_blocks()[0].1, &mut random);
    let cache = model.new_cache(1, DType::F32).unwrap();
    let (clone, copy) = (cache.clone(), cache.snapshot().unwrap());
    model.prefill(&super::ids(&mut random, 1, 4), &cache, None).unwrap();
    assert_eq!(states(&clone), states(&cache));
    assert_ne!(states(&copy), states(&cache));
}
