//! Layers that differ from one another, and the parts of a model that stand for themselves.

use candle_core::{D, DType, Device, Module, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use rand::Rng;
use rand::rngs::StdRng;
use selective_scan::nn::{
    Backbone, BackboneConfig, CheckpointFormat, LanguageModel, LanguageModelConfig, MambaConfig, RmsNorm,
};

use super::{SAME, SAME_GRADIENTS, all_blocks, assert_close, bits, causal_blocks, cuts, ids, mamba, mamba_states};
use super::{model, random, refusal, shake, tensor, values};

/// A model of three layers, each with another block and other sizes of its state.
fn hybrid(random: &mut StdRng) -> (LanguageModel, VarMap) {
    let blocks = causal_blocks();
    let mixer = MambaConfig { seed: random.random(), ..blocks[0].1.clone() };
    let mut config = LanguageModelConfig::with_mixer(11, 3, mixer);
    config.backbone.layers.insert(1, MambaConfig { d_state: 7, d_inner: 9, ..blocks[2].1.clone() }.into());
    config.backbone.layers.insert(2, MambaConfig { d_conv: 2, proj_bias: true, ..blocks[4].1.clone() }.into());
    let variables = VarMap::new();
    let build = || LanguageModel::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)).unwrap();
    build();
    shake(&variables, random);
    (build(), variables)
}

#[test]
fn layers_that_differ_decode_what_they_read_at_once() {
    let mut random = random();
    let (model, variables) = hybrid(&mut random);
    let ids = ids(&mut random, 2, 12);
    let whole = model.forward(&ids).unwrap();
    let cache = model.new_cache(2, DType::F32).unwrap();
    let shapes: Vec<_> =
        mamba_states(&cache).iter().map(|state| (state.conv.dims().to_vec(), state.ssm.dims().to_vec())).collect();
    assert_eq!(shapes[0], (vec![2, 2, 20], vec![2, 20, 5]));
    assert_eq!(shapes[1], (vec![2, 2, 9], vec![2, 9, 7]));
    assert_eq!(shapes[2], (vec![2, 1, 20], vec![2, 20, 5]));
    let at = |t: usize| whole.narrow(1, t, 1).unwrap().squeeze(1).unwrap();
    assert_close(&model.prefill(&ids.narrow(1, 0, 8).unwrap(), &cache, None).unwrap(), &at(7), SAME, "prefill");
    for t in 8..12 {
        let token = ids.narrow(1, t, 1).unwrap().squeeze(1).unwrap();
        assert_close(&model.step(&token, &cache, None).unwrap(), &at(t), SAME, "step");
    }
    // Every parameter has a name of its own and a gradient.
    let gradients = whole.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    for (name, variable) in variables.data().lock().unwrap().iter() {
        assert!(gradients.get(variable).is_some(), "{name}");
    }
    assert_eq!(model.named_tensors().len(), variables.data().lock().unwrap().len());
    let others = model.map_parameters(|_, tensor| tensor.affine(1.0, 0.0)).unwrap();
    assert_eq!(bits(&others.forward(&ids).unwrap()), bits(&whole));
    // A cache of layers that are alike is none of this model's.
    let alike = super::model(&causal_blocks()[0].1, &mut random).0.new_cache(2, DType::F32).unwrap();
    assert!(refusal(model.prefill(&ids, &alike, None)).contains("cache"));
}

#[test]
fn layers_that_differ_are_kept_in_checkpoints() {
    let mut random = random();
    let (model, _) = hybrid(&mut random);
    let text = model.config().to_json(CheckpointFormat::HuggingFace).unwrap();
    let mut again = LanguageModelConfig::from_json(&text).unwrap();
    super::mamba_mut(&mut again).seed = mamba(model.config()).seed;
    assert_eq!(again, *model.config(), "{text}");
    let folder = std::env::temp_dir().join(format!("selective-scan-{}-hybrid", std::process::id()));
    model.save(&folder, CheckpointFormat::HuggingFace).unwrap();
    let loaded = LanguageModel::load(&folder, DType::F32, &Device::Cpu);
    std::fs::remove_dir_all(&folder).unwrap();
    let ids = ids(&mut random, 1, 9);
    assert_eq!(bits(&loaded.unwrap().forward(&ids).unwrap()), bits(&model.forward(&ids).unwrap()));
    assert!(refusal(model.config().to_json(CheckpointFormat::StateSpaces)).contains("`layers`"));
    assert!(refusal(MambaConfig::from_json(&text)).contains("alike"));
}

#[test]
fn layers_that_do_not_fit_are_refused() {
    let mut config = LanguageModelConfig::new(11, 2, 12);
    let build = |config: &LanguageModelConfig| {
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
        refusal(LanguageModel::new(config, vb))
    };
    config.backbone.layers.insert(2, MambaConfig::new(12).into());
    assert!(build(&config).contains("`layers`: expected layers below 2"));
    config.backbone.layers.clear();
    config.backbone.layers.insert(1, MambaConfig::new(16).into());
    assert!(build(&config).contains("width 12"));
    config.backbone.layers.insert(1, MambaConfig { d_state: 0, ..MambaConfig::new(12) }.into());
    assert!(build(&config).contains("d_state"));
}

#[test]
fn a_backbone_is_the_middle_of_a_model() {
    let mut random = random();
    for (name, config) in all_blocks() {
        let (model, _) = model(&config, &mut random);
        let ids = ids(&mut random, 2, 9);
        let logits = model.forward(&ids).unwrap();
        let embeddings = model.embed(&ids).unwrap();
        assert_eq!(bits(&model.forward_embeddings(&embeddings).unwrap()), bits(&logits), "{name}");
        assert_eq!(bits(&Module::forward(&model, &ids).unwrap()), bits(&logits), "{name}");
        let hidden = model.hidden_states(&ids).unwrap();
        let out = model.backbone().forward(&embeddings).unwrap();
        assert_eq!(bits(&out), bits(hidden.last().unwrap()), "{name}");
        assert_eq!(bits(&embeddings.apply(model.backbone()).unwrap()), bits(&out), "{name}");

        // One that is built on the same tensors is the same, by names that are its own.
        let tensors = model.backbone().named_tensors();
        assert_eq!(tensors[0].0, "layers.0.norm.weight");
        let mut seen = Vec::new();
        model.backbone().visit(&mut |name, _| seen.push(format!("backbone.{name}")));
        let all: Vec<_> = model.named_tensors().into_iter().map(|(name, _)| name).collect();
        assert_eq!(all, [&["backbone.embeddings.weight".to_string()], &seen[..]].concat(), "{name}");
        let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
        let alone = Backbone::new(&model.config().backbone, vb).unwrap();
        assert_eq!(bits(&alone.forward(&embeddings).unwrap()), bits(&out), "{name}");
        let packed = embeddings.reshape((1, 18, 12)).unwrap();
        let cu_seqlens = cuts(&mut random, 18);
        let whole = alone.forward_packed(&packed, &cu_seqlens).unwrap();
        for ends in cu_seqlens.windows(2) {
            let part = |x: &Tensor| x.narrow(1, ends[0], ends[1] - ends[0]).unwrap().contiguous().unwrap();
            assert_close(&part(&whole), &alone.forward(&part(&packed)).unwrap(), SAME, name);
        }
        if config.bidirectional {
            let cache = alone.new_cache(2, DType::F32).unwrap();
            assert!(refusal(alone.prefill(&embeddings, &cache, None)).contains("bidirectional"));
            continue;
        }
        let cache = alone.new_cache(2, DType::F32).unwrap();
        let read = alone.prefill(&embeddings.narrow(1, 0, 6).unwrap(), &cache, None).unwrap();
        let next = alone.step(&embeddings.narrow(1, 6, 3).unwrap(), &cache, None).unwrap();
        assert_close(&Tensor::cat(&[&read, &next], 1).unwrap(), &out, SAME, name);
        let count = cu_seqlens.len() - 1;
        let cache = alone.new_cache(count, DType::F32).unwrap();
        assert_close(&alone.prefill_packed(&packed, &cu_seqlens, &cache, None).unwrap(), &whole, SAME, name);
    }
}

#[test]
fn a_backbone_refuses_what_does_not_fit() {
    let vb = || VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let backbone = Backbone::new(&BackboneConfig::new(2, 8), vb()).unwrap();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    for x in [zeros(&[2, 3, 9], DType::F32), zeros(&[3, 8], DType::F32), zeros(&[], DType::F32)] {
        assert!(refusal(backbone.forward(&x)).contains("(batch, length, 8)"));
        let cache = backbone.new_cache(2, DType::F32).unwrap();
        assert!(refusal(backbone.step(&x, &cache, None)).contains("(batch, length, 8)"));
        assert!(refusal(backbone.prefill(&x, &cache, None)).contains("(batch, length, 8)"));
    }
    assert!(refusal(backbone.forward(&zeros(&[1, 2, 8], DType::U32))).contains("f32, f16 or bf16"));
    assert!(refusal(backbone.forward_packed(&zeros(&[1, 2, 8], DType::F32), &[0, 3])).contains("cu_seqlens"));
    assert_eq!(backbone.forward(&zeros(&[0, 2, 8], DType::F32)).unwrap().dims(), [0, 2, 8]);
    assert!(refusal(Backbone::new(&BackboneConfig::new(0, 8), vb())).contains("n_layer"));
}

/// The norm and its gradients are those of candle's operators, one by one, in every type; candle's fused norm gives no
/// gradients for dense input.
#[test]
fn the_norm_is_that_of_plain_operators() {
    let mut random = random();
    for (dtype, tolerance) in [(DType::F32, SAME), (DType::BF16, 0.02), (DType::F16, 0.002)] {
        let variables = VarMap::new();
        let norm = RmsNorm::new(24, 1e-4, VarBuilder::from_varmap(&variables, dtype, &Device::Cpu)).unwrap();
        let weight = variables.all_vars()[0].clone();
        weight.set(&tensor(&mut random, &[24], 1.5).to_dtype(dtype).unwrap()).unwrap();
        let x = Var::from_tensor(&tensor(&mut random, &[3, 5, 24], 2.0)).unwrap();
        let weights = tensor(&mut random, &[3, 5, 24], 1.0);
        let loss = |out: &Tensor| (out.to_dtype(DType::F32).unwrap() * &weights).unwrap().sum_all().unwrap();
        let out = norm.forward(&x).unwrap();
        assert_eq!((out.dtype(), norm.weight().dims()), (dtype, &[24][..]));
        let wide = weight.as_tensor().to_dtype(DType::F32).unwrap();
        let mean_square = x.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
        let plain =
            x.broadcast_div(&(mean_square + 1e-4).unwrap().sqrt().unwrap()).unwrap().broadcast_mul(&wide).unwrap();
        assert_close(&out, &plain, tolerance, "forward");
        assert_eq!(bits(&x.apply(&norm).unwrap()), bits(&out));
        let (ours, theirs) = (loss(&out).backward().unwrap(), loss(&plain).backward().unwrap());
        let tolerance = tolerance.max(SAME_GRADIENTS);
        for variable in [x.as_tensor(), weight.as_tensor()] {
            assert_close(ours.get(variable).unwrap(), theirs.get(variable).unwrap(), tolerance, "gradient");
        }
    }
    let vb = || VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    assert!(refusal(RmsNorm::new(0, 1e-5, vb())).contains("size"));
    assert!(refusal(RmsNorm::new(4, f64::NAN, vb())).contains("eps"));
    let norm = RmsNorm::new(4, 1e-5, vb()).unwrap();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    assert!(refusal(norm.forward(&zeros(&[2, 5], DType::F32))).contains("rows of 4"));
    assert!(refusal(norm.forward(&zeros(&[2, 4], DType::U8))).contains("f32, f16 or bf16"));
    assert!(values(&norm.forward(&zeros(&[2, 4], DType::F32)).unwrap()).iter().all(|x| *x == 0.0));
}
