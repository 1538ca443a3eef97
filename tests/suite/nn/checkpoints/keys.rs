//! The keys of config.json: what is written is what other libraries read, and what they have written is kept.

use std::fs;

use candle_core::{DType, Device, Tensor};
use rand::Rng;
use selective_scan::nn::{
    Checkpoint, CheckpointFormat, LanguageModel, LanguageModelConfig, MambaConfig, Norms, RopeScaling, Sampler,
    Sampling, SaveOptions,
};
use serde_json::{Map, Value};

use super::super::{checkpoint, mamba, mamba_mut, random, refusal};
use super::{Folder, named_bits};

fn keys(folder: &Folder) -> Map<String, Value> {
    serde_json::from_str(&fs::read_to_string(folder.0.join("config.json")).unwrap()).unwrap()
}

fn of_width(d_model: usize, d_inner: usize) -> LanguageModelConfig {
    let mamba = MambaConfig { d_inner, ..MambaConfig::new(d_model) };
    LanguageModelConfig::with_mixer(11, 1, mamba)
}

/// transformers refuses an `expand` of `2.0`, and knows no `d_inner` that `expand` does not say.
#[test]
fn transformers_gets_an_integer_or_is_not_addressed() {
    for norms in [Norms::None, Norms::Unweighted { eps: 1e-6 }] {
        for (d_model, d_inner) in (1..=24).flat_map(|d_model| (1..=72).map(move |d_inner| (d_model, d_inner))) {
            let mut config = of_width(d_model, d_inner);
            mamba_mut(&mut config).norms = norms;
            let text = config.to_json(CheckpointFormat::HuggingFace).unwrap();
            let keys: Map<String, Value> = serde_json::from_str(&text).unwrap();
            let known = keys["model_type"] != "selective_scan";
            assert_eq!(known, d_inner % d_model == 0, "{text}");
            if known {
                assert_eq!(keys["expand"].as_u64(), Some((d_inner / d_model) as u64), "{text}");
            }
            let again = LanguageModelConfig::from_json(&text).unwrap();
            assert_eq!(mamba(&again), mamba(&config), "{text}");
        }
    }
}

/// transformers 5.24 rescales `out_proj` after it has loaded it, where config.json says that an initial one would be.
#[test]
fn loaded_weights_are_not_to_be_rescaled() {
    for (norms, bidirectional) in [(Norms::None, false), (Norms::Unweighted { eps: 1e-6 }, false), (Norms::None, true)]
    {
        let mut config = of_width(8, 16);
        config.backbone.rescale_prenorm_residual = true;
        let mamba = mamba_mut(&mut config);
        (mamba.norms, mamba.bidirectional) = (norms, bidirectional);
        let text = config.to_json(CheckpointFormat::HuggingFace).unwrap();
        let keys: Map<String, Value> = serde_json::from_str(&text).unwrap();
        assert_eq!(keys["rescale_prenorm_residual"], keys["model_type"] == "selective_scan", "{text}");
    }
}

#[test]
fn state_spaces_has_every_width() {
    let mut fractions = 0;
    for (d_model, d_inner) in (1..=40).flat_map(|d_model| (1..=120).map(move |d_inner| (d_model, d_inner))) {
        let text = of_width(d_model, d_inner).to_json(CheckpointFormat::StateSpaces).unwrap();
        let keys: Map<String, Value> = serde_json::from_str(&text).unwrap();
        let expand = &keys["ssm_cfg"]["expand"];
        // As that repository does: int(expand * d_model).
        assert_eq!((expand.as_f64().unwrap() * d_model as f64) as usize, d_inner, "{text}");
        fractions += usize::from(!expand.is_u64());
        assert_eq!(MambaConfig::from_json(&text).unwrap().d_inner, d_inner, "{text}");
    }
    assert!(fractions > 1000);
}

/// A number in a file is the same number when it is read, to the last bit.
#[test]
fn numbers_keep_their_bits() {
    let mut random = random();
    for _ in 0..2000 {
        let mut draw = || f64::from_bits(random.random_range(1e-9f64.to_bits()..1e-2f64.to_bits()));
        let mut config = of_width(8, 16);
        config.backbone.norm_eps = draw();
        let drawn = mamba_mut(&mut config);
        drawn.norms = Norms::Unweighted { eps: draw() };
        (drawn.dt_min, drawn.dt_scale, drawn.dt_init_floor) = (draw(), draw(), draw());
        let again = LanguageModelConfig::from_json(&config.to_json(CheckpointFormat::HuggingFace).unwrap()).unwrap();
        assert_eq!(
            again.backbone.norm_eps.to_bits(),
            config.backbone.norm_eps.to_bits(),
            "{:e}",
            config.backbone.norm_eps
        );
        assert_eq!(mamba(&again), mamba(&config));
    }
}

#[test]
fn what_a_config_says_beside_is_kept() {
    let (source, target) = (Folder::copy_of(&checkpoint("mamba"), "extra"), Folder::new("extra-saved"));
    source.edit("config.json", |text| {
        let mut keys: Map<String, Value> = serde_json::from_str(&text).unwrap();
        for (key, value) in [
            ("eos_token_id", serde_json::json!([7, 9])),
            ("bos_token_id", 3.into()),
            ("pad_token_id", Value::Null),
            ("dtype", "float64".into()),
            ("somebody_elses", serde_json::json!({"deep": [1, 2.5, null]})),
        ] {
            keys.insert(key.into(), value);
        }
        serde_json::to_string(&keys).unwrap()
    });
    let before = keys(&source);
    let model = LanguageModel::load(&source.0, DType::BF16, &Device::Cpu).unwrap();
    let config = model.config();
    assert_eq!((config.eos_token_ids(), config.bos_token_id(), config.pad_token_id()), (vec![7, 9], Some(3), None));
    model.save(&target.0, CheckpointFormat::HuggingFace).unwrap();
    let mut after = keys(&target);
    // Which type the weights have is said to the transformers of any version.
    for key in ["dtype", "torch_dtype"] {
        assert_eq!(after.remove(key).unwrap(), "bfloat16");
    }
    for (key, value) in &before {
        assert!(key == "dtype" || after.get(key) == Some(value), "{key}: {value}, then {:?}", after.get(key));
    }
    let text = LanguageModelConfig::new(11, 1, 8).to_json(CheckpointFormat::HuggingFace).unwrap();
    assert!(!text.contains("dtype"), "{text}");

    // A model of ours has no special tokens, and says so: transformers takes token 0 for them where nothing is said.
    let fresh: Map<String, Value> = serde_json::from_str(&text).unwrap();
    for token in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        assert_eq!(fresh.get(token), Some(&Value::Null), "{token}");
    }
    let silent = LanguageModelConfig::from_json(r#"{"model_type": "mamba"}"#).unwrap();
    assert_eq!((silent.eos_token_ids(), silent.bos_token_id()), (vec![0], Some(0)));
}

/// state-spaces/mamba takes no unknown key, so it gets none, and its own are kept.
#[test]
fn state_spaces_gets_its_own_keys_only() {
    let (source, target) = (Folder::copy_of(&checkpoint("state_spaces"), "own"), Folder::new("own-saved"));
    source.edit("config.json", |text| {
        text.replace(r#""fused_add_norm": true"#, r#""fused_add_norm": false, "attn_cfg": {}"#)
            .replace(r#""ssm_cfg": {}"#, r#""ssm_cfg": {"use_fast_path": false, "dt_init": "constant"}"#)
    });
    let mut config = LanguageModel::load(&source.0, DType::F32, &Device::Cpu).unwrap().config().clone();
    config.extra.insert("somebody_elses".into(), 1.into());
    fs::write(target.0.join("config.json"), config.to_json(CheckpointFormat::StateSpaces).unwrap()).unwrap();
    let after = keys(&target);
    assert_eq!((&after["fused_add_norm"], &after["attn_cfg"]), (&false.into(), &serde_json::json!({})));
    assert_eq!(after["ssm_cfg"]["use_fast_path"], false);
    assert_eq!(after["ssm_cfg"]["dt_init"], "constant");
    assert!(!after.contains_key("somebody_elses"));
}

/// 61 tokens in a matrix of 64 rows.
#[test]
fn the_padding_of_a_vocabulary_is_kept() {
    let folder = Folder::new("padded");
    let model = LanguageModel::load(checkpoint("state_spaces"), DType::F32, &Device::Cpu).unwrap();
    for naming in [CheckpointFormat::StateSpaces, CheckpointFormat::HuggingFace, CheckpointFormat::StateSpaces] {
        model.save(&folder.0, naming).unwrap();
        let (keys, name) = (keys(&folder), "vocab_size");
        match naming {
            // transformers wants as many as there are rows.
            CheckpointFormat::HuggingFace => assert_eq!(keys[name], 64),
            _ => assert_eq!((&keys[name], &keys["pad_vocab_size_multiple"]), (&61.into(), &8.into())),
        }
        let loaded = LanguageModel::load(&folder.0, DType::F32, &Device::Cpu).unwrap();
        assert_eq!((loaded.config().vocab_size, loaded.config().padded_vocab_size()), (61, 64));
        assert_eq!(named_bits(&loaded), named_bits(&model));
    }

    // The rows of padding answer too, and a sampler that knows of them never takes one.
    let ids = Tensor::new(&[[1u32, 2, 3]], &Device::Cpu).unwrap();
    let logits = model.forward(&ids).unwrap();
    assert_eq!(logits.dims(), [1, 3, 64]);
    let rows: Vec<f32> = (0..64).map(|token| if token >= 61 { 9.0 } else { 0.0 }).collect();
    let rows = Tensor::new(rows, &Device::Cpu).unwrap().broadcast_as((500, 64)).unwrap();
    for temperature in [0.0, 1.0] {
        let choose = |vocab_size| {
            let sampling = Sampling { temperature, vocab_size, ..Sampling::default() };
            Sampler::new(sampling).unwrap().sample(&rows).unwrap()
        };
        assert!(choose(Some(model.config().vocab_size)).iter().all(|&token| token < 61));
        assert!(choose(None).iter().any(|&token| token >= 61));
    }
    assert!(refusal(Sampler::new(Sampling { vocab_size: Some(0), ..Sampling::default() })).contains("vocab_size"));
}

/// A matrix that has as many rows as there are tokens, whatever the configuration says of padding.
#[test]
fn embeddings_without_the_padding() {
    let folder = Folder::copy_of(&checkpoint("state_spaces"), "unpadded");
    folder.edit_tensors(|all| {
        for tensor in all.iter_mut().filter(|(name, _)| !name.contains("layers") && !name.contains("norm")) {
            *tensor.1 = tensor.1.narrow(0, 0, 61).unwrap().copy().unwrap();
        }
    });
    let model = LanguageModel::load(&folder.0, DType::F32, &Device::Cpu).unwrap();
    assert_eq!((model.config().vocab_size, model.config().padded_vocab_size()), (61, 61));
    // Where nothing has to be padded, what it would be padded to is kept.
    let whole = Folder::copy_of(&checkpoint("state_spaces"), "whole");
    whole.edit("config.json", |text| text.replace(r#""vocab_size": 61"#, r#""vocab_size": 64"#));
    let config = LanguageModel::load(&whole.0, DType::F32, &Device::Cpu).unwrap().config().clone();
    assert_eq!((config.vocab_size, config.pad_vocab_size_multiple), (64, 8));
    let padded = LanguageModel::load(checkpoint("state_spaces"), DType::F32, &Device::Cpu).unwrap();
    let ids = Tensor::new(&[[1u32, 60, 3]], &Device::Cpu).unwrap();
    let logits = padded.forward(&ids).unwrap().narrow(2, 0, 61).unwrap();
    super::super::assert_close(&model.forward(&ids).unwrap(), &logits, super::super::SAME, "logits");
    // Neither is a padding that no matrix can have.
    let mut config = LanguageModelConfig::new(61, 1, 8);
    for (tokens, multiple) in [(61, 0), (usize::MAX, 8)] {
        (config.vocab_size, config.pad_vocab_size_multiple) = (tokens, multiple);
        let message = refusal(config.to_json(CheckpointFormat::StateSpaces));
        assert!(message.contains("vocab_size"), "{message}");
    }
}

/// `null` says nothing, as in Python, and what is not said is as the library has it.
#[test]
fn nothing_is_said() {
    let theirs = LanguageModelConfig::from_json(
        r#"{"model_type": "mamba", "hidden_size": null, "expand": null, "intermediate_size": null,
            "time_step_rank": null, "hidden_act": null, "quantization_config": null, "eos_token_id": null}"#,
    );
    let theirs = theirs.unwrap();
    assert_eq!(*mamba(&theirs), MambaConfig::new(768));
    // Of this one, `null` says that there is none.
    assert!(theirs.eos_token_ids().is_empty());
    let theirs = LanguageModelConfig::from_json(
        r#"{"d_model": 32, "n_layer": 2, "vocab_size": 64, "ssm_cfg": null, "attn_layer_idx": null,
            "rms_norm": null, "pad_vocab_size_multiple": null, "attn_cfg": null}"#,
    );
    assert_eq!(*mamba(&theirs.unwrap()), MambaConfig::new(32));
    let jamba = MambaConfig::from_json(r#"{"model_type": "jamba", "hidden_size": 64}"#).unwrap();
    assert_eq!(jamba, MambaConfig { norms: Norms::Weighted { eps: 1e-6 }, ..MambaConfig::new(64) });
}

/// Stretched positions as newer versions of transformers write them, as older ones do, and as the oldest.
#[test]
fn stretched_positions_are_read() {
    let read = |keys: &str| {
        let sizes = r#""num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4"#;
        let text = format!(r#"{{"model_type": "llama", {sizes}, {keys}}}"#);
        let config = LanguageModelConfig::from_json(&text)?;
        let attention = config.backbone.mixer.as_attention().unwrap();
        Ok((attention.rope_theta.unwrap(), attention.rope_scaling))
    };
    // As Llama 3.1 has them.
    let numbers = r#""factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0"#;
    let original = r#""original_max_position_embeddings": 8192"#;
    let llama3 = RopeScaling::Llama3 { factor: 8.0, low_turns: 1.0, high_turns: 4.0, original_length: 8192 };
    let linear = RopeScaling::Linear { factor: 2.5 };
    for (keys, theta, scaling) in [
        (
            format!(r#""rope_theta": 5e5, "rope_scaling": {{"rope_type": "llama3", {numbers}, {original}}}"#),
            5e5,
            Some(llama3),
        ),
        (
            format!(r#""rope_parameters": {{"rope_theta": 5e5, "rope_type": "llama3", {numbers}, {original}}}"#),
            5e5,
            Some(llama3),
        ),
        (
            format!(r#""max_position_embeddings": 8192, "rope_scaling": {{"rope_type": "llama3", {numbers}}}"#),
            1e4,
            Some(llama3),
        ),
        (r#""rope_scaling": {"type": "linear", "factor": 2.5}"#.into(), 1e4, Some(linear)),
        (r#""rope_scaling": null, "rope_theta": 3e4"#.into(), 3e4, None),
        (r#""rope_scaling": {"rope_type": "default"}"#.into(), 1e4, None),
    ] {
        assert_eq!(read(&keys).unwrap(), (theta, scaling), "{keys}");
    }
    for (keys, text) in [
        (r#""rope_scaling": {"rope_type": "yarn", "factor": 2.0}"#, "of the type default, linear or llama3, got yarn"),
        (r#""rope_scaling": {"type": "linear"}"#, "`rope_scaling`: expected a number `factor` beside linear, got none"),
        (
            r#""rope_parameters": {"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0}"#,
            "`rope_parameters`: expected a number `low_freq_factor` beside llama3, got none",
        ),
        (
            r#""rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}"#,
            "`rope_scaling`: expected the same as rope_parameters",
        ),
    ] {
        let message = refusal(read(keys));
        assert!(message.contains(text), "{message}");
    }
}

#[test]
fn quantised_models_are_refused() {
    for text in [
        r#"{"model_type": "mamba", "quantization_config": {"bits": 4}}"#,
        r#"{"model_type": "jamba", "quantization_config": {}}"#,
        r#"{"d_model": 32, "n_layer": 2, "vocab_size": 64, "quantization_config": "fp8"}"#,
    ] {
        let message = refusal(MambaConfig::from_json(text));
        assert!(message.contains("quantization_config"), "{message}");
    }
}

/// The tokenizer goes with the model.
#[test]
fn companions_go_along() {
    let (source, target) = (Folder::copy_of(&checkpoint("mamba"), "companions"), Folder::new("companions-saved"));
    for name in ["tokenizer.json", "generation_config.json", "notes.txt"] {
        fs::write(source.0.join(name), name).unwrap();
    }
    fs::write(target.0.join("tokenizer.json"), "another").unwrap();
    fs::write(target.0.join("notes.txt"), "mine").unwrap();
    let read = Checkpoint::read(&source.0, &Device::Cpu).unwrap();
    let model = read.model(DType::F32).unwrap();
    read.save(&model, &target.0, &SaveOptions::new(CheckpointFormat::HuggingFace)).unwrap();
    let text = |name: &str| fs::read_to_string(target.0.join(name)).unwrap();
    assert_eq!(["tokenizer.json", "generation_config.json"].map(text), ["tokenizer.json", "generation_config.json"]);
    assert_eq!(text("notes.txt"), "mine");
    // Into its own folder too.
    read.save(&model, &source.0, &SaveOptions::new(CheckpointFormat::HuggingFace)).unwrap();
    assert_eq!(fs::read_to_string(source.0.join("tokenizer.json")).unwrap(), "tokenizer.json");
}
