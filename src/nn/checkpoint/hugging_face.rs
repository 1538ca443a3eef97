//! The config.json of Hugging Face's transformers.

use std::collections::BTreeMap;

use candle_core::{DType, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::config_json::{Auto, Keys, Rank, expand, expanded, from_keys, others, to_keys, whole};
use crate::nn::{BackboneConfig, LanguageModelConfig, MambaConfig, MixerConfig, Norms, argument};

/// The `model_type` of what no other library knows.
const OURS: &str = "selective_scan";
/// Those that are read.
pub(super) const TYPES: [&str; 3] = ["mamba", "falcon_mamba", OURS];

/// The special tokens, with what transformers takes of a Mamba model where nothing is said.
const TOKENS: [(&str, Option<u32>); 3] =
    [("bos_token_id", Some(0)), ("eos_token_id", Some(0)), ("pad_token_id", Some(0))];
/// The type of the weights, in older versions of transformers and in newer ones.
const DTYPES: [&str; 2] = ["torch_dtype", "dtype"];

/// The keys of [`HuggingFace`].
const KEYS: [&str; 28] = [
    "model_type",
    "architectures",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "state_size",
    "conv_kernel",
    "expand",
    "intermediate_size",
    "time_step_rank",
    "use_bias",
    "use_conv_bias",
    "hidden_act",
    "layer_norm_epsilon",
    "residual_in_fp32",
    "rescale_prenorm_residual",
    "tie_word_embeddings",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
    "time_step_scale",
    "mixer_rms_eps",
    "bidirectional",
    "average_directions",
    "selective",
    "mixer_norms",
    "layers",
    "tie_layers",
];
/// Those of them that are about a mixer, which a layer may have of its own.
pub(super) const MIXER_KEYS: [&str; 16] = [
    "state_size",
    "conv_kernel",
    "expand",
    "intermediate_size",
    "time_step_rank",
    "use_bias",
    "use_conv_bias",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
    "time_step_scale",
    "mixer_rms_eps",
    "bidirectional",
    "average_directions",
    "selective",
    "mixer_norms",
];
/// What says that the vocabulary is padded, which transformers has no words for.
const PADDING: [&str; 2] = ["unpadded_vocab_size", "pad_vocab_size_multiple"];

/// Hugging Face's keys. What is absent has the value that transformers gives it.
#[derive(Debug, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct HuggingFace {
    model_type: String,
    architectures: Vec<String>,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    state_size: usize,
    conv_kernel: usize,
    #[serde(serialize_with = "whole")]
    expand: f64,
    /// Falcon Mamba's goes its own way from `expand`.
    #[serde(skip_serializing_if = "Option::is_none")]
    intermediate_size: Option<usize>,
    time_step_rank: Rank,
    use_bias: bool,
    use_conv_bias: bool,
    hidden_act: String,
    layer_norm_epsilon: f64,
    residual_in_fp32: bool,
    rescale_prenorm_residual: bool,
    tie_word_embeddings: bool,
    time_step_min: f64,
    time_step_max: f64,
    time_step_floor: f64,
    time_step_scale: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    mixer_rms_eps: Option<f64>,
    // The rest is ours, and read only where `model_type` says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    bidirectional: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    average_directions: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    selective: Option<bool>,
    /// `none`, `weighted` or `unweighted`.
    #[serde(skip_serializing_if = "Option::is_none")]
    mixer_norms: Option<String>,
    /// By the number of a layer, the keys of its mixer that are not as the others'.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    layers: BTreeMap<usize, Keys>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tie_layers: Option<usize>,
    /// The rows of the embedding matrix that are tokens, where `vocab_size` counts padding too. With it goes the multiple;
    /// alone that is somebody else's key.
    #[serde(skip_serializing_if = "Option::is_none")]
    unpadded_vocab_size: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pad_vocab_size_multiple: Option<usize>,
}

impl Default for HuggingFace {
    fn default() -> Self {
        Self {
            model_type: "mamba".into(),
            architectures: Vec::new(),
            vocab_size: 50_280,
            hidden_size: 768,
            num_hidden_layers: 32,
            state_size: 16,
            conv_kernel: 4,
            expand: 2.0,
            intermediate_size: None,
            time_step_rank: Rank::Auto(Auto::Auto),
            use_bias: false,
            use_conv_bias: true,
            hidden_act: "silu".into(),
            layer_norm_epsilon: 1e-5,
            residual_in_fp32: true,
            rescale_prenorm_residual: false,
            tie_word_embeddings: true,
            time_step_min: 0.001,
            time_step_max: 0.1,
            time_step_floor: 1e-4,
            time_step_scale: 1.0,
            mixer_rms_eps: None,
            bidirectional: None,
            average_directions: None,
            selective: None,
            mixer_norms: None,
            layers: BTreeMap::new(),
            tie_layers: None,
            unpadded_vocab_size: None,
            pad_vocab_size_multiple: None,
        }
    }
}

impl HuggingFace {
    pub fn read(keys: &Keys) -> Result<LanguageModelConfig> {
        let mut config = from_keys::<Self>(keys)?.into_config(keys)?;
        config.extra = others(keys, &KEYS);
        if config.extra.contains_key(PADDING[0]) {
            config.extra = others(&config.extra, &PADDING);
        }
        let defaults = if keys["model_type"] == OURS { TOKENS.map(|(token, _)| (token, None)) } else { TOKENS };
        Ok(with_tokens(config, &defaults))
    }

    pub fn write(config: &LanguageModelConfig, dtype: Option<DType>) -> Result<Keys> {
        Ok(all_keys(config, to_keys(&Self::from_config(config)?)?, dtype))
    }

    /// A Mamba block by the keys of a mixer alone.
    pub fn mixer(keys: &Keys, d_model: usize) -> Result<MambaConfig> {
        let mut keys = keys.clone();
        keys.insert("hidden_size".into(), d_model.into());
        keys.insert("model_type".into(), OURS.into());
        from_keys::<Self>(&keys)?.mamba()
    }

    /// The keys of which those of a mixer are about this block.
    pub fn of_mixer(config: &LanguageModelConfig, mamba: &MambaConfig) -> Self {
        Self::from_mixer(config, mamba, OURS)
    }

    /// `keys` are those from which `self` was read.
    fn into_config(self, keys: &Keys) -> Result<LanguageModelConfig> {
        if !["silu", "swish"].contains(&self.hidden_act.as_str()) {
            return Err(argument("hidden_act", "silu", self.hidden_act));
        }
        let mut layers = BTreeMap::new();
        if self.model_type == OURS {
            for (&index, own) in &self.layers {
                let mut keys = keys.clone();
                keys.extend(own.clone());
                layers.insert(index, from_keys::<Self>(&keys)?.mamba()?.into());
            }
        }
        let (vocab_size, pad_vocab_size_multiple) = self.padding()?;
        Ok(LanguageModelConfig {
            vocab_size,
            pad_vocab_size_multiple,
            backbone: BackboneConfig {
                n_layer: self.num_hidden_layers,
                mixer: self.mamba()?.into(),
                feed_forward: None,
                layers,
                tie_layers: self.tie_layers.filter(|_| self.model_type == OURS).unwrap_or(1),
                norm_eps: self.layer_norm_epsilon,
                residual_in_f32: self.residual_in_fp32,
                rescale_prenorm_residual: self.rescale_prenorm_residual,
            },
            tie_embeddings: self.tie_word_embeddings,
            extra: Keys::new(),
        })
    }

    fn mamba(&self) -> Result<MambaConfig> {
        let eps = self.mixer_rms_eps.unwrap_or(1e-6);
        let ours = self.model_type == OURS;
        let norms = match (self.model_type.as_str(), self.mixer_norms.as_deref()) {
            ("falcon_mamba", _) | (OURS, Some("unweighted")) => Norms::Unweighted { eps },
            (OURS, Some("weighted")) => Norms::Weighted { eps },
            (OURS, Some("none") | None) | ("mamba", _) => Norms::None,
            (_, other) => {
                return Err(argument("mixer_norms", "none, weighted or unweighted", format_args!("{other:?}")));
            }
        };
        let d_model = self.hidden_size;
        let d_inner = match self.intermediate_size {
            Some(size) => size,
            None => expanded(self.expand, d_model)?,
        };
        Ok(MambaConfig {
            d_model,
            d_inner,
            d_state: self.state_size,
            d_conv: self.conv_kernel,
            dt_rank: self.time_step_rank.number(d_model),
            conv_bias: self.use_conv_bias,
            proj_bias: self.use_bias,
            norms,
            bidirectional: ours && self.bidirectional.unwrap_or(false),
            average_directions: ours && self.average_directions.unwrap_or(false),
            selective: !ours || self.selective.unwrap_or(true),
            dt_min: self.time_step_min,
            dt_max: self.time_step_max,
            dt_init_floor: self.time_step_floor,
            dt_scale: self.time_step_scale,
            // What is no property of the model.
            ..MambaConfig::new(d_model)
        })
    }

    /// The number of tokens, and to a multiple of what it is padded.
    fn padding(&self) -> Result<(usize, usize)> {
        let rows = self.vocab_size;
        match (self.unpadded_vocab_size, self.pad_vocab_size_multiple) {
            (None, _) => Ok((rows, 1)),
            (Some(tokens), Some(multiple))
                if multiple > 0 && tokens.checked_next_multiple_of(multiple) == Some(rows) =>
            {
                Ok((tokens, multiple))
            }
            (Some(tokens), None) if (1..=rows).contains(&tokens) => Ok((tokens, rows)),
            (Some(tokens), multiple) => {
                let got = format_args!("{tokens}, padded to a multiple of {multiple:?}");
                Err(argument("unpadded_vocab_size", format_args!("a number that is padded to {rows}"), got))
            }
        }
    }

    fn from_config(config: &LanguageModelConfig) -> Result<Self> {
        let mamba = mamba_of(&config.backbone.mixer)?;
        let known = !mamba.bidirectional
            && mamba.selective
            && mamba.d_inner.is_multiple_of(mamba.d_model)
            && config.backbone.layers.is_empty()
            && config.backbone.tie_layers == 1;
        let (model_type, architecture) = match mamba.norms {
            Norms::None if known => ("mamba", Some("MambaForCausalLM")),
            Norms::Unweighted { .. } if known => ("falcon_mamba", Some("FalconMambaForCausalLM")),
            _ => (OURS, None),
        };
        let mut all = Self::from_mixer(config, mamba, model_type);
        all.architectures.extend(architecture.map(str::to_string));
        let common = to_keys(&all)?;
        for (&index, layer) in &config.backbone.layers {
            let mut own = to_keys(&Self::from_mixer(config, mamba_of(&layer.mixer)?, model_type))?;
            own.retain(|key, value| MIXER_KEYS.contains(&key.as_str()) && common.get(key) != Some(value));
            all.layers.insert(index, own);
        }
        Ok(all)
    }

    fn from_mixer(config: &LanguageModelConfig, mamba: &MambaConfig, model_type: &str) -> Self {
        let (norms, eps) = match mamba.norms {
            Norms::None => ("none", None),
            Norms::Weighted { eps } => ("weighted", Some(eps)),
            Norms::Unweighted { eps } => ("unweighted", Some(eps)),
        };
        let ours = model_type == OURS;
        let padded = config.padded_vocab_size() != config.vocab_size;
        Self {
            model_type: model_type.into(),
            architectures: Vec::new(),
            vocab_size: config.padded_vocab_size(),
            hidden_size: mamba.d_model,
            num_hidden_layers: config.backbone.n_layer,
            state_size: mamba.d_state,
            conv_kernel: mamba.d_conv,
            expand: expand(mamba.d_inner, mamba.d_model),
            intermediate_size: Some(mamba.d_inner),
            time_step_rank: Rank::Number(mamba.dt_rank),
            use_bias: mamba.proj_bias,
            use_conv_bias: mamba.conv_bias,
            hidden_act: "silu".into(),
            layer_norm_epsilon: config.backbone.norm_eps,
            residual_in_fp32: config.backbone.residual_in_f32,
            // transformers 5.24 would shrink what it has just loaded.
            rescale_prenorm_residual: ours && config.backbone.rescale_prenorm_residual,
            tie_word_embeddings: config.tie_embeddings,
            time_step_min: mamba.dt_min,
            time_step_max: mamba.dt_max,
            time_step_floor: mamba.dt_init_floor,
            time_step_scale: mamba.dt_scale,
            mixer_rms_eps: eps,
            bidirectional: ours.then_some(mamba.bidirectional),
            average_directions: ours.then_some(mamba.average_directions),
            selective: ours.then_some(mamba.selective),
            mixer_norms: ours.then(|| norms.into()),
            layers: BTreeMap::new(),
            tie_layers: (config.backbone.tie_layers > 1).then_some(config.backbone.tie_layers),
            unpadded_vocab_size: padded.then_some(config.vocab_size),
            pad_vocab_size_multiple: padded.then_some(config.pad_vocab_size_multiple),
        }
    }
}

/// The Mamba block that a mixer is.
fn mamba_of(mixer: &MixerConfig) -> Result<&MambaConfig> {
    mixer.as_mamba().ok_or_else(|| argument("mixer", "Mamba blocks", "another mixer"))
}

/// A configuration that was read: without the type of weights, and with the tokens that its library takes where nothing is said.
pub(super) fn with_tokens(mut config: LanguageModelConfig, defaults: &[(&str, Option<u32>)]) -> LanguageModelConfig {
    config.extra = others(&config.extra, &DTYPES);
    for &(token, default) in defaults {
        // A token that is none is not in `extra`.
        match (config.extra.get(token), default) {
            (Some(Value::Null), _) => drop(config.extra.remove(token)),
            (None, Some(default)) => drop(config.extra.insert(token.into(), default.into())),
            _ => {}
        }
    }
    config
}

/// All keys of a config.json: those of a model, the special tokens, the type of its weights, and what else there is.
pub(super) fn all_keys(config: &LanguageModelConfig, mut of_model: Keys, dtype: Option<DType>) -> Keys {
    let mut keys = config.extra.clone();
    keys.append(&mut of_model);
    for (token, _) in TOKENS {
        keys.entry(token).or_insert(Value::Null);
    }
    if let Some(dtype) = dtype {
        let name = match dtype {
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            _ => "float32",
        };
        keys.extend(DTYPES.map(|key| (key.to_string(), name.into())));
    }
    keys
}
