//! What tensors are called: in a model, which has Hugging Face's names, and in the files of each library.

use candle_core::{Device, Result, Tensor};

use super::CheckpointFormat;
use crate::nn::LanguageModel;

/// The embedding matrix, the only tensor that the two libraries name differently: Hugging Face's name…
pub(super) const EMBEDDINGS: &str = "backbone.embeddings.weight";
/// … and state-spaces/mamba's, which also stores the head where it is the same matrix.
const STATE_SPACES_EMBEDDINGS: &str = "backbone.embedding.weight";
pub(super) const HEAD: &str = "lm_head.weight";

const BACKBONE: &str = "backbone.";
/// What PyTorch puts into names where a model is run on several devices, or is compiled.
const WRAPPERS: [&str; 2] = ["module", "_orig_mod"];

/// The model's names for the tensors of a file, one for each.
pub(super) fn in_model<'a>(names: impl IntoIterator<Item = &'a String>) -> Vec<String> {
    let unwrapped = |name: &String| {
        let parts: Vec<_> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
        parts.join(".")
    };
    let plain: Vec<_> = names.into_iter().map(unwrapped).collect();
    // What transformers calls a `MambaModel` is a backbone alone.
    let bare = !plain.iter().any(|name| name.starts_with(BACKBONE));
    let full = |name| if bare && name != HEAD { format!("{BACKBONE}{name}") } else { name };
    let ours = |name| if name == STATE_SPACES_EMBEDDINGS { EMBEDDINGS.to_string() } else { name };
    plain.into_iter().map(full).map(ours).collect()
}

/// The model's tensors by their names in files, in the main memory.
pub(super) fn in_file(model: &LanguageModel, format: CheckpointFormat) -> Result<Vec<(String, Tensor)>> {
    let mut tensors = Vec::new();
    for (name, tensor) in model.named_tensors() {
        let tensor = tensor.to_device(&Device::Cpu)?;
        if format == CheckpointFormat::StateSpaces && name == EMBEDDINGS {
            if model.config().tie_embeddings {
                tensors.push((HEAD.into(), tensor.clone()));
            }
            tensors.push((STATE_SPACES_EMBEDDINGS.into(), tensor));
        } else {
            tensors.push((name, tensor));
        }
    }
    Ok(tensors)
}
