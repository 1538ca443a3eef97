//! Checkpoints of transformers, loaded as anyone would, against what transformers computes from them in `f64`
//! (tests/vectors/generate_models.py).
//!
//! The tolerances are the crate's for `f32`. A model has two or three layers of four matrix products with sums of up to 72
//! terms, each of which adds an error of about 1e-7 relative, and the stored results are rounded by 6e-8: what is forward
//! comes to some 1e-6, and gradients, which run through all of it twice, to several times that.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap, loss};
use selective_scan::nn::{Checkpoint, CheckpointFormat, LanguageModel, LanguageModelConfig, Mamba, MambaConfig, Norms};

use super::{checkpoint, relative_error};

const FORWARD: f64 = 1e-5;
const GRADIENTS: f64 = 1e-4;

/// The checkpoints, and where what is expected of them stands.
const MODELS: [(&str, &str); 8] = [
    ("mamba", "mamba"),
    ("mamba_untied", "mamba_untied"),
    ("falcon_mamba", "falcon_mamba"),
    ("state_spaces", "mamba"),
    ("jamba_model", "jamba_model"),
    ("llama", "llama"),
    ("llama_linear", "llama_linear"),
    ("llama3", "llama3"),
];

/// What a parameter is called in a checkpoint of transformers.
fn stored_name(model: &str, name: &str) -> String {
    let parts: &[[&str; 2]] = match model {
        "jamba_model" => &[
            ["norm_f", "final_layernorm"],
            [".norm.", ".input_layernorm."],
            [".norm_ff.", ".pre_ff_layernorm."],
            [".1.mixer.", ".1.self_attn."],
            [".mixer.", ".mamba."],
        ],
        "llama" | "llama_linear" | "llama3" => &[
            ["norm_f", "norm"],
            [".norm.weight", ".input_layernorm.weight"],
            [".norm_ff.", ".post_attention_layernorm."],
            [".mixer.", ".self_attn."],
            [".feed_forward.", ".mlp."],
        ],
        _ => return name.into(),
    };
    if name == "lm_head.weight" {
        return name.into();
    }
    let within = name.strip_prefix("backbone.").unwrap().replace("embeddings", "embed_tokens");
    let last = "backbone.norm_f.weight" == name;
    let parts = parts.iter().filter(|[ours, _]| last == (*ours == "norm_f"));
    format!("model.{}", parts.fold(within, |name, [ours, theirs]| name.replace(ours, theirs)))
}

type Tensors = HashMap<String, Tensor>;

fn expected(name: &str) -> Tensors {
    candle_core::safetensors::load(checkpoint(name).join("expected.safetensors"), &Device::Cpu).unwrap()
}

/// Holds a result to its bound, and says how far off the worst was.
struct Bound {
    what: String,
    tolerance: f64,
    worst: f64,
}

impl Bound {
    fn new(what: String, tolerance: f64) -> Self {
        Self { what, tolerance, worst: 0.0 }
    }

    fn hold(&mut self, name: &str, got: &Tensor, expected: &Tensor) {
        let error = relative_error(got, expected);
        assert!(error <= self.tolerance, "{}, {name}: error {error:.1e}", self.what);
        self.worst = self.worst.max(error);
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        println!("{}: largest error {:.1e}, tolerance {:.0e}", self.what, self.worst, self.tolerance);
    }
}

#[test]
fn logits_and_hidden_states() {
    for (name, results) in MODELS {
        let expected = expected(results);
        let model = LanguageModel::load(checkpoint(name), DType::F32, &Device::Cpu).unwrap();
        let ids = expected["ids"].to_dtype(DType::U32).unwrap();
        let mut bound = Bound::new(format!("{name}: logits"), FORWARD);
        bound.hold("logits", &model.forward(&ids).unwrap(), &expected["logits"]);
        let mut bound = Bound::new(format!("{name}: hidden states"), FORWARD);
        let hidden = model.hidden_states(&ids).unwrap();
        assert_eq!(hidden.len(), model.config().backbone.n_layer + 1);
        let (last, layers) = hidden.split_last().unwrap();
        for (index, state) in layers.iter().enumerate() {
            bound.hold(&format!("layer {index}"), state, &expected[&format!("hidden/{index}")]);
        }
        bound.hold("final", last, &expected["hidden/final"]);
    }
}

#[test]
fn gradients() {
    for (name, results) in MODELS {
        let expected = expected(results);
        let (model, variables) =
            Checkpoint::read(checkpoint(name), &Device::Cpu).unwrap().trainable(DType::F32).unwrap();
        let ids = expected["ids"].to_dtype(DType::U32).unwrap();
        let length = ids.dim(1).unwrap();
        let logits = model.forward(&ids).unwrap().narrow(1, 0, length - 1).unwrap().flatten(0, 1).unwrap();
        let next = ids.narrow(1, 1, length - 1).unwrap().flatten_all().unwrap();
        let loss = loss::cross_entropy(&logits, &next).unwrap();
        Bound::new(format!("{name}: loss"), FORWARD).hold("loss", &loss, &expected["loss"]);
        compare_gradients(name, &variables, &loss.backward().unwrap(), &expected);
    }
}

fn compare_gradients(name: &str, variables: &VarMap, got: &candle_core::backprop::GradStore, expected: &Tensors) {
    let mut bound = Bound::new(format!("{name}: gradients"), GRADIENTS);
    let variables = variables.data().lock().unwrap();
    let count = expected.keys().filter(|name| name.starts_with("grad/") && *name != "grad/x").count();
    assert_eq!(variables.len(), count, "{name}: a gradient for each parameter");
    for (parameter, variable) in variables.iter() {
        let gradient = got.get(variable).unwrap_or_else(|| panic!("{name}: no gradient for {parameter}"));
        bound.hold(parameter, gradient, &expected[&format!("grad/{}", stored_name(name, parameter))]);
    }
}

#[test]
fn greedy_generation_by_prefill_and_steps() {
    for (name, results) in MODELS {
        let expected = expected(results);
        let model = LanguageModel::load(checkpoint(name), DType::F32, &Device::Cpu).unwrap();
        let prompt = expected["prompt"].to_dtype(DType::U32).unwrap();
        let wanted: Vec<Vec<i64>> = expected["generated"].to_vec2().unwrap();
        let cache = model.new_cache(prompt.dim(0).unwrap(), DType::F32).unwrap();
        let mut logits = model.prefill(&prompt, &cache, None).unwrap();
        for step in 0..wanted[0].len() {
            let tokens = logits.argmax(D::Minus1).unwrap();
            let want: Vec<_> = wanted.iter().map(|row| row[step] as u32).collect();
            assert_eq!(tokens.to_vec1::<u32>().unwrap(), want, "{name}, token {step}");
            logits = model.step(&tokens, &cache, None).unwrap();
        }
    }
}

#[test]
fn a_jamba_layer() {
    let (folder, expected) = (checkpoint("jamba"), expected("jamba"));
    let config = MambaConfig::from_json(&std::fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
    assert_eq!(config.norms, Norms::Weighted { eps: 1e-4 });
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let variables = VarMap::new();
    for (name, tensor) in tensors {
        variables.data().lock().unwrap().insert(name, candle_core::Var::from_tensor(&tensor).unwrap());
    }
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    let mixer = Mamba::new(&config, vb.pp("model.layers.2.mamba")).unwrap();
    let x = candle_core::Var::from_tensor(&expected["x"]).unwrap();
    let out = mixer.forward(&x).unwrap();
    Bound::new("jamba: output".into(), FORWARD).hold("out", &out, &expected["out"]);
    let loss = (out * &expected["d_out"]).unwrap().sum_all().unwrap();
    let gradients = loss.backward().unwrap();
    compare_gradients("jamba", &variables, &gradients, &expected);
    Bound::new("jamba: gradient of the input".into(), GRADIENTS).hold(
        "x",
        gradients.get(&x).unwrap(),
        &expected["grad/x"],
    );
}

/// What is saved has transformers' names and keys, and is the same model again.
#[test]
fn jamba_and_llama_are_saved_as_such() {
    for name in ["jamba_model", "llama", "llama_linear", "llama3"] {
        let model = LanguageModel::load(checkpoint(name), DType::F32, &Device::Cpu).unwrap();
        let folder = std::env::temp_dir().join(format!("selective-scan-{}-{name}", std::process::id()));
        model.save(&folder, CheckpointFormat::HuggingFace).unwrap();
        let [theirs, ours] = [checkpoint(name), folder.clone()].map(|folder: std::path::PathBuf| {
            let read = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
            let keys = std::fs::read_to_string(folder.join("config.json")).unwrap();
            (read, serde_json::from_str::<serde_json::Map<_, _>>(&keys).unwrap())
        });
        assert_eq!(theirs.0.len(), ours.0.len(), "{name}");
        for (tensor, values) in theirs.0 {
            let bits = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(bits(&values), bits(&ours.0[&tensor]), "{name}: {tensor}");
        }
        for (key, value) in theirs.1 {
            // There is one layer of attention, of which any period that leads beyond the last says the same.
            if key == "attn_layer_period" {
                continue;
            }
            // Ours has the name of the base in older versions beside that in newer ones.
            assert_eq!(ours.1.get(&key), Some(&value), "{name}: {key}");
        }
        let again = LanguageModel::load(&folder, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(again.config(), model.config(), "{name}");
        std::fs::remove_dir_all(folder).unwrap();
    }
}

#[test]
fn both_schemes_of_config_are_one_configuration() {
    let read = |name| Checkpoint::read(checkpoint(name), &Device::Cpu).unwrap();
    let (theirs, mut ours) = (read("state_spaces"), read("mamba"));
    assert_eq!((theirs.format, ours.format), (CheckpointFormat::StateSpaces, CheckpointFormat::HuggingFace));
    // Only this one has a default of its own in each library.
    assert!(theirs.config.backbone.rescale_prenorm_residual && !ours.config.backbone.rescale_prenorm_residual);
    ours.config.backbone.rescale_prenorm_residual = true;
    // That one pads the vocabulary, which this one has no word for, and this one has keys of its own.
    assert_eq!((theirs.config.vocab_size, theirs.config.padded_vocab_size()), (61, ours.config.vocab_size));
    (ours.config.vocab_size, ours.config.pad_vocab_size_multiple) = (61, 8);
    assert!(theirs.config.eos_token_ids().is_empty());
    assert_eq!(theirs.config, LanguageModelConfig { extra: theirs.config.extra.clone(), ..ours.config });
    let untied = read("mamba_untied").config;
    let mamba = super::mamba(&untied);
    assert_eq!((untied.vocab_size, untied.backbone.n_layer, untied.backbone.norm_eps), (50, 2, 1e-3));
    assert_eq!((mamba.d_inner, mamba.d_state, mamba.d_conv, mamba.dt_rank), (72, 5, 3, 7));
    assert!(mamba.proj_bias && !mamba.conv_bias && !untied.tie_embeddings && !untied.backbone.residual_in_f32);
    assert_eq!(super::mamba(&read("falcon_mamba").config).norms, Norms::Unweighted { eps: 1e-4 });
}

/// A model of a half type rounds some ten times in each layer, by up to 2^-9 (bf16) or 2^-12 (f16) each time. Three layers
/// add up to √30 of that, and what follows may enlarge it a few times.
#[test]
fn half_types() {
    let expected = expected("mamba");
    let ids = expected["ids"].to_dtype(DType::U32).unwrap();
    for (dtype, tolerance) in [(DType::BF16, 0.05), (DType::F16, 0.05 / 8.0)] {
        let model = LanguageModel::load(checkpoint("mamba"), dtype, &Device::Cpu).unwrap();
        for (name, tensor) in model.named_tensors() {
            let single = ["A_log", "D", "dt_proj.bias", "conv1d.weight", "conv1d.bias"];
            let wanted = if single.iter().any(|end| name.ends_with(&format!(".{end}"))) { DType::F32 } else { dtype };
            assert_eq!(tensor.dtype(), wanted, "{name}");
        }
        let logits = model.forward(&ids).unwrap();
        assert_eq!(logits.dtype(), DType::F32);
        let mut bound = Bound::new(format!("mamba in {dtype:?}: logits"), tolerance);
        bound.hold("logits", &logits, &expected["logits"]);
        // The residual stream is kept in f32: what a layer leaves has more bits than the type.
        let stream = &model.hidden_states(&ids).unwrap()[1];
        assert_eq!(stream.dtype(), DType::F32);
        let cache = model.new_cache(2, dtype).unwrap();
        model.prefill(&ids.narrow(1, 0, 70).unwrap(), &cache, None).unwrap();
        for at in 70..75 {
            let token = ids.narrow(1, at, 1).unwrap().squeeze(1).unwrap();
            let logits = model.step(&token, &cache, None).unwrap();
            let wanted = expected["logits"].narrow(1, at, 1).unwrap().squeeze(1).unwrap();
            bound.hold("a step on states of that type", &logits, &wanted);
        }
    }
}
