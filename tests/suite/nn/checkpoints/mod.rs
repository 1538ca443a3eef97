//! Models in files: what is saved is what is loaded, and what is wrong with a file is said.

mod atomic;
mod keys;
mod reading;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss};
use selective_scan::nn::{Checkpoint, CheckpointFormat, LanguageModel, LanguageModelConfig, MambaConfig, Norms};

use super::{all_blocks, bits, causal_blocks, checkpoint, ids, mamba_mut, model, random, refusal};

/// A folder that is empty at first and gone at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("nn-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// One with the files of a checkpoint.
    fn copy_of(checkpoint: &Path, name: &str) -> Self {
        let folder = Self::new(name);
        for file in fs::read_dir(checkpoint).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), folder.0.join(file.file_name())).unwrap();
        }
        folder
    }

    fn edit(&self, file: &str, edit: impl Fn(String) -> String) {
        let path = self.0.join(file);
        let (before, after) = {
            let text = fs::read_to_string(&path).unwrap();
            (text.clone(), edit(text))
        };
        assert_ne!(before, after, "the edit of {file} does something");
        fs::write(path, after).unwrap();
    }

    fn edit_tensors(&self, edit: impl Fn(&mut HashMap<String, Tensor>)) {
        let path = self.0.join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        edit(&mut tensors);
        candle_core::safetensors::save(&tensors, path).unwrap();
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names.into_iter().map(|name| name.into_string().unwrap()).collect()
    }

    /// The message with which loading fails.
    #[track_caller]
    fn refusal(&self) -> String {
        refusal(LanguageModel::load(&self.0, DType::F32, &Device::Cpu))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn named_bits(model: &LanguageModel) -> Vec<(String, DType, Vec<u32>)> {
    model.named_tensors().into_iter().map(|(name, tensor)| (name, tensor.dtype(), bits(&tensor))).collect()
}

#[test]
fn saved_and_loaded_is_the_same_model() {
    let mut random = random();
    let folder = Folder::new("round-trip");
    for (name, block) in all_blocks() {
        let (mut model, variables) = model(&block, &mut random);
        for tie in [true, false] {
            let config = LanguageModelConfig { tie_embeddings: tie, ..model.config().clone() };
            let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
            model = LanguageModel::new(&config, vb).unwrap();
            for naming in [CheckpointFormat::HuggingFace, CheckpointFormat::StateSpaces] {
                let known = block.selective && !block.bidirectional && block.norms == Norms::None;
                if naming == CheckpointFormat::StateSpaces && !known {
                    let message = refusal(model.save(&folder.0, naming));
                    assert!(message.contains("state-spaces/mamba"), "{name}: {message}");
                    continue;
                }
                model.save(&folder.0, naming).unwrap();
                let loaded = LanguageModel::load(&folder.0, DType::F32, &Device::Cpu).unwrap();
                let mut config = config.clone();
                mamba_mut(&mut config).seed = 0; // a file does not have it
                assert_eq!(*loaded.config(), config, "{name}, {naming:?}");
                assert_eq!(named_bits(&loaded), named_bits(&model), "{name}, {naming:?}");
                let ids = ids(&mut random, 2, 5);
                let logits = bits(&model.detach().unwrap().forward(&ids).unwrap());
                assert_eq!(bits(&loaded.forward(&ids).unwrap()), logits, "{name}, {naming:?}");
            }
        }
    }
}

#[test]
fn a_half_model_keeps_its_bits() {
    let folder = Folder::new("half");
    for dtype in [DType::BF16, DType::F16] {
        let model = LanguageModel::load(checkpoint("falcon_mamba"), dtype, &Device::Cpu).unwrap();
        model.save(&folder.0, CheckpointFormat::HuggingFace).unwrap();
        let loaded = LanguageModel::load(&folder.0, dtype, &Device::Cpu).unwrap();
        assert_eq!(named_bits(&loaded), named_bits(&model));
        // And widened when it is loaded as f32.
        let wide = LanguageModel::load(&folder.0, DType::F32, &Device::Cpu).unwrap();
        for ((name, got), (_, wanted)) in wide.named_tensors().into_iter().zip(model.named_tensors()) {
            assert_eq!(got.dtype(), DType::F32, "{name}");
            assert_eq!(bits(&got), bits(&wanted), "{name}");
        }
    }
}

/// The names in the files are those of the library that the naming is of.
#[test]
fn names_of_either_library() {
    let folder = Folder::new("names");
    for (source, naming) in [("mamba", CheckpointFormat::HuggingFace), ("state_spaces", CheckpointFormat::StateSpaces)]
    {
        let names = |folder: &Path| {
            let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
            let mut shapes: Vec<_> = tensors.into_iter().map(|(name, tensor)| (name, tensor.dims().to_vec())).collect();
            shapes.sort();
            shapes
        };
        for other in ["mamba", "state_spaces"] {
            let model = LanguageModel::load(checkpoint(other), DType::F32, &Device::Cpu).unwrap();
            model.save(&folder.0, naming).unwrap();
            assert_eq!(names(&folder.0), names(&checkpoint(source)));
        }
        // The keys too: those that transformers needs to know the model by.
        let text = fs::read_to_string(folder.0.join("config.json")).unwrap();
        let keys: HashMap<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
        let original = fs::read_to_string(checkpoint(source).join("config.json")).unwrap();
        let original: HashMap<String, serde_json::Value> = serde_json::from_str(&original).unwrap();
        for key in ["model_type", "architectures", "hidden_size", "state_size", "d_model", "n_layer", "rms_norm"] {
            assert_eq!(keys.get(key), original.get(key), "{key}");
        }
    }
}

#[test]
fn training_changes_no_checkpoint() {
    let read = Checkpoint::read(checkpoint("mamba"), &Device::Cpu).unwrap();
    let before = named_bits(&read.model(DType::F32).unwrap());
    let (model, variables) = read.trainable(DType::F32).unwrap();
    assert_eq!(before, named_bits(&model));
    for variable in variables.all_vars() {
        variable.set(&variable.zeros_like().unwrap()).unwrap();
    }
    assert_ne!(before, named_bits(&model));
    assert_eq!(before, named_bits(&read.model(DType::F32).unwrap()));
}

/// A run that was saved by `VarMap` goes on as if it had not stopped.
#[test]
fn training_resumes() {
    let mut random = random();
    let folder = Folder::new("resume");
    let path = folder.0.join("variables.safetensors");
    for (name, block) in causal_blocks() {
        let (model, variables) = model(&block, &mut random);
        let ids = ids(&mut random, 2, 9);
        let step = |model: &LanguageModel, variables: &VarMap| {
            let logits = model.forward(&ids).unwrap().flatten(0, 1).unwrap();
            let loss = loss::cross_entropy(&logits, &ids.flatten_all().unwrap()).unwrap();
            AdamW::new(variables.all_vars(), ParamsAdamW::default()).unwrap().backward_step(&loss).unwrap();
        };
        step(&model, &variables);
        variables.save(&path).unwrap();
        let mut again = VarMap::new();
        let resumed =
            LanguageModel::new(model.config(), VarBuilder::from_varmap(&again, DType::F32, &Device::Cpu)).unwrap();
        again.load(&path).unwrap();
        assert_eq!(named_bits(&resumed), named_bits(&model), "{name}");
        step(&model, &variables);
        step(&resumed, &again);
        assert_eq!(named_bits(&resumed), named_bits(&model), "{name}");
    }
}

#[test]
fn what_is_wrong_with_a_checkpoint_is_said() {
    let edited = |source: &str, edit: &dyn Fn(&Folder), words: &[&str]| {
        let folder = Folder::copy_of(&checkpoint(source), "wrong");
        edit(&folder);
        let message = folder.refusal();
        assert!(words.iter().all(|word| message.contains(word)), "{words:?} are not all in: {message}");
    };
    let tensors = |edit: fn(&mut HashMap<String, Tensor>)| move |folder: &Folder| folder.edit_tensors(edit);
    const D: &str = "backbone.layers.1.mixer.D";
    edited("mamba", &tensors(|all| drop(all.remove(D))), &[D]);
    edited("mamba", &tensors(|all| drop(all.remove("backbone.embeddings.weight"))), &["backbone.embeddings.weight"]);
    edited(
        "mamba",
        &tensors(|all| drop(all.insert(D.into(), Tensor::zeros(63, DType::F32, &Device::Cpu).unwrap()))),
        &[D, "[64]", "[63]"],
    );
    edited(
        "mamba",
        &tensors(|all| drop(all.insert("backbone.layers.3.mixer.D".into(), all[D].clone()))),
        &["backbone.layers.3.mixer.D"],
    );
    edited(
        "mamba",
        &tensors(|all| {
            let embeddings = all["backbone.embeddings.weight"].clone();
            all.insert("backbone.embedding.weight".into(), embeddings);
        }),
        &["backbone.embedding.weight", "both"],
    );
    edited(
        "state_spaces",
        &tensors(|all| {
            let head = (&all["lm_head.weight"] * 2.0).unwrap();
            all.insert("lm_head.weight".into(), head);
        }),
        &["lm_head.weight", "differs"],
    );
    let remove = |file: &'static str| move |folder: &Folder| fs::remove_file(folder.0.join(file)).unwrap();
    edited("mamba", &remove("config.json"), &["config.json"]);
    edited("mamba", &remove("model.safetensors"), &["model.safetensors", "neither"]);
    edited("mamba_untied", &remove("model-00002-of-00002.safetensors"), &["model-00002-of-00002.safetensors"]);
    let index = "model.safetensors.index.json";
    edited(
        "mamba_untied",
        &|f| f.edit(index, |text| text.replace("model-00001", "../model-00001")),
        &["../", "beside"],
    );
    edited("mamba_untied", &|f| f.edit(index, |text| text.replace("weight_map", "map")), &[index, "weight_map"]);
    let truncate = |folder: &Folder| {
        let path = folder.0.join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    };
    edited("mamba", &truncate, &["model.safetensors"]);

    let replaced = |source: &str, from: &str, to: &str, words: &[&str]| {
        edited(
            source,
            &|f: &Folder| f.edit("config.json", |text| text.replace(from, to)),
            &[words, &["config.json"]].concat(),
        );
    };
    replaced("mamba", "{", "", &["JSON"]);
    replaced("mamba", r#""model_type": "mamba""#, r#""model_type": "mamba2""#, &["model_type", "mamba2"]);
    replaced("mamba", r#""model_type": "mamba","#, "", &["model_type", "d_model"]);
    replaced("mamba", r#""hidden_act": "silu""#, r#""hidden_act": "gelu""#, &["hidden_act", "gelu"]);
    replaced("mamba", r#""hidden_size": 32"#, r#""hidden_size": "wide""#, &["wide"]);
    replaced("mamba", r#""conv_kernel": 4"#, r#""conv_kernel": 12"#, &["d_conv", "12"]);
    replaced("mamba", r#""time_step_rank": 2"#, r#""time_step_rank": "often""#, &["keys"]);
    replaced("state_spaces", r#""n_layer": 3,"#, "", &["n_layer"]);
    replaced("state_spaces", r#""ssm_cfg": {}"#, r#""ssm_cfg": {"layer": "Mamba2"}"#, &["layer", "Mamba2"]);
    replaced("state_spaces", r#""ssm_cfg": {}"#, r#""ssm_cfg": {"headdim": 64}"#, &["headdim"]);
    replaced("state_spaces", r#""ssm_cfg": {}"#, r#""ssm_cfg": {"expand": 0.01}"#, &["expand", "0.01"]);
    replaced("state_spaces", r#""rms_norm": true"#, r#""rms_norm": false"#, &["rms_norm"]);
    replaced("state_spaces", r#""rms_norm""#, r#""attn_layer_idx": [1], "rms_norm""#, &["attn_layer_idx"]);
    replaced("state_spaces", r#""rms_norm""#, r#""d_intermediate": 64, "rms_norm""#, &["d_intermediate"]);
    replaced("state_spaces", r#""pad_vocab_size_multiple": 8"#, r#""pad_vocab_size_multiple": 0"#, &["pad_vocab"]);
    let jamba = fs::read_to_string(checkpoint("jamba").join("config.json")).unwrap();
    let zamba = jamba.replace(r#""model_type": "jamba""#, r#""model_type": "zamba""#);
    assert!(refusal(LanguageModelConfig::from_json(&zamba)).contains("zamba"));
    assert!(
        refusal(MambaConfig::from_json(&jamba.replace(r#""mamba_d_conv": 4"#, r#""mamba_d_conv": 12"#)))
            .contains("d_conv")
    );
}

/// What the keys leave open is as the libraries have it.
#[test]
fn defaults_of_either_library() {
    let theirs = LanguageModelConfig::from_json(r#"{"model_type": "mamba"}"#).unwrap();
    let mut ours = LanguageModelConfig::new(50_280, 32, 768);
    ours.backbone.rescale_prenorm_residual = false;
    ours.extra.extend(["bos_token_id", "eos_token_id", "pad_token_id"].map(|token| (token.into(), 0.into())));
    assert_eq!(theirs, ours);
    let falcon = r#"{"model_type": "falcon_mamba", "hidden_size": 64, "expand": 16, "intermediate_size": 128}"#;
    let falcon = MambaConfig::from_json(falcon).unwrap();
    assert_eq!((falcon.d_inner, falcon.norms), (128, Norms::Unweighted { eps: 1e-6 }));
    let theirs =
        r#"{"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"dt_rank": "auto", "d_state": 8}}"#;
    let mut ours = LanguageModelConfig::new(50_277, 24, 768);
    ours.pad_vocab_size_multiple = 8;
    mamba_mut(&mut ours).d_state = 8;
    assert_eq!(LanguageModelConfig::from_json(theirs).unwrap(), ours);
}
