//! What tensors are called: in a model, which has Hugging Face's names, and in the files of each library.

use candle_core::{Device, Result, Tensor};

use super::CheckpointFormat;
use super::config_json::Family;
use crate::nn::LanguageModel;

/// The embedding matrix, the only tensor of a Mamba model that the two libraries name differently: Hugging Face's name…
pub(super) const EMBEDDINGS: &str = "backbone.embeddings.weight";
/// … and state-spaces/mamba's, which also stores the head where it is the same matrix.
const STATE_SPACES_EMBEDDINGS: &str = "backbone.embedding.weight";
pub(super) const HEAD: &str = "lm_head.weight";

const BACKBONE: &str = "backbone.";
/// What PyTorch puts into names where a model is run on several devices, or is compiled.
const WRAPPERS: [&str; 2] = ["module", "_orig_mod"];

/// The embedding matrix of Jamba and Llama, whose names are others.
const TOKENS: &str = "embed_tokens.weight";

/// What a name of a layer in Jamba or Llama begins with, and what it begins with in a model.
const PARTS: [(&str, &str); 7] = [
    ("input_layernorm.", "norm."),
    ("pre_ff_layernorm.", "norm_ff."),
    ("post_attention_layernorm.", "norm_ff."),
    ("mamba.", "mixer."),
    ("self_attn.", "mixer."),
    ("feed_forward.", "feed_forward."),
    ("mlp.", "feed_forward."),
];

/// The model's name for a tensor of Jamba or Llama.
fn of_transformer(name: &str) -> String {
    let name = name.strip_prefix("model.").unwrap_or(name);
    let in_layer = |rest: &str| {
        let (index, part) = rest.split_once('.')?;
        let (theirs, ours) = PARTS.iter().find(|(theirs, _)| part.starts_with(theirs))?;
        Some(format!("{BACKBONE}layers.{index}.{ours}{}", &part[theirs.len()..]))
    };
    match name {
        TOKENS => EMBEDDINGS.into(),
        "final_layernorm.weight" | "norm.weight" => format!("{BACKBONE}norm_f.weight"),
        _ => name.strip_prefix("layers.").and_then(in_layer).unwrap_or_else(|| name.into()),
    }
}

/// The name that a tensor of a model has in Jamba or in Llama.
fn in_transformer(name: &str, model: &LanguageModel, is_jamba: bool) -> String {
    let Some(rest) = name.strip_prefix(BACKBONE) else { return name.into() };
    let in_layer = |rest: &str| {
        let (index, part) = rest.split_once('.')?;
        let is_mamba = model.mixers().nth(index.parse().ok()?)?.as_mamba().is_some();
        let (ours, part) = part.split_once('.')?;
        let theirs = match (ours, is_jamba) {
            ("norm", _) => "input_layernorm",
            ("norm_ff", true) => "pre_ff_layernorm",
            ("norm_ff", false) => "post_attention_layernorm",
            ("mixer", _) => {
                if is_mamba {
                    "mamba"
                } else {
                    "self_attn"
                }
            }
            ("feed_forward", false) => "mlp",
            (same, _) => same,
        };
        Some(format!("model.layers.{index}.{theirs}.{part}"))
    };
    match rest {
        "embeddings.weight" => format!("model.{TOKENS}"),
        "norm_f.weight" if is_jamba => "model.final_layernorm.weight".into(),
        "norm_f.weight" => "model.norm.weight".into(),
        _ => rest.strip_prefix("layers.").and_then(in_layer).unwrap_or_else(|| name.into()),
    }
}

/// The model's names for the tensors of a file, one for each.
pub(super) fn in_model<'a>(names: impl IntoIterator<Item = &'a String>) -> Vec<String> {
    let unwrapped = |name: &String| {
        let parts: Vec<_> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
        parts.join(".")
    };
    let plain: Vec<_> = names.into_iter().map(unwrapped).collect();
    if plain.iter().any(|name| name.strip_prefix("model.").unwrap_or(name) == TOKENS) {
        return plain.iter().map(|name| of_transformer(name)).collect();
    }
    // What transformers calls a `MambaModel` is a backbone alone.
    let bare = !plain.iter().any(|name| name.starts_with(BACKBONE));
    let full = |name| if bare && name != HEAD { format!("{BACKBONE}{name}") } else { name };
    let ours = |name| if name == STATE_SPACES_EMBEDDINGS { EMBEDDINGS.to_string() } else { name };
    plain.into_iter().map(full).map(ours).collect()
}

/// The model's tensors by their names in files, in the main memory.
pub(super) fn in_file(model: &LanguageModel, format: CheckpointFormat) -> Result<Vec<(String, Tensor)>> {
    let mut tensors = Vec::new();
    let is_jamba = match Family::of(model.config()) {
        Family::Jamba(_) => Some(true),
        Family::Llama(_) => Some(false),
        Family::Mamba | Family::Hybrid => None,
    };
    for (name, tensor) in model.named_tensors() {
        let tensor = tensor.to_device(&Device::Cpu)?;
        if format == CheckpointFormat::StateSpaces && name == EMBEDDINGS {
            if model.config().tie_embeddings {
                tensors.push((HEAD.into(), tensor.clone()));
            }
            tensors.push((STATE_SPACES_EMBEDDINGS.into(), tensor));
        } else if let Some(is_jamba) = is_jamba {
            tensors.push((in_transformer(&name, model, is_jamba), tensor));
        } else {
            tensors.push((name, tensor));
        }
    }
    Ok(tensors)
}
