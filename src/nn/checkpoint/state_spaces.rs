//! The config.json of the repository state-spaces/mamba.

use candle_core::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::config_json::{Auto, Keys, Rank, expand, expanded, from_keys, others, to_keys, whole};
use crate::nn::{BackboneConfig, LanguageModelConfig, MambaConfig, MixerConfig, Norms, argument};

/// The keys of state-spaces/mamba.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct StateSpaces {
    d_model: usize,
    n_layer: usize,
    vocab_size: usize,
    #[serde(default)]
    ssm_cfg: SsmConfig,
    #[serde(default = "yes")]
    rms_norm: bool,
    #[serde(default = "yes")]
    residual_in_fp32: bool,
    #[serde(default = "yes")]
    fused_add_norm: bool,
    #[serde(default = "eight")]
    pad_vocab_size_multiple: usize,
    #[serde(default = "yes")]
    tie_embeddings: bool,
    #[serde(default, skip_serializing_if = "is_zero")]
    d_intermediate: usize,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    attn_layer_idx: Vec<usize>,
}

/// The arguments of that repository's block. It takes no others.
#[derive(Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
struct SsmConfig {
    layer: String,
    d_state: usize,
    d_conv: usize,
    #[serde(serialize_with = "whole")]
    expand: f64,
    dt_rank: Rank,
    dt_min: f64,
    dt_max: f64,
    dt_init: String,
    dt_scale: f64,
    dt_init_floor: f64,
    conv_bias: bool,
    bias: bool,
    use_fast_path: bool,
}

impl Default for SsmConfig {
    fn default() -> Self {
        Self {
            layer: "Mamba1".into(),
            d_state: 16,
            d_conv: 4,
            expand: 2.0,
            dt_rank: Rank::Auto(Auto::Auto),
            dt_min: 0.001,
            dt_max: 0.1,
            dt_init: "random".into(),
            dt_scale: 1.0,
            dt_init_floor: 1e-4,
            conv_bias: true,
            bias: false,
            use_fast_path: true,
        }
    }
}

fn yes() -> bool {
    true
}

fn eight() -> usize {
    8
}

fn is_zero(value: &usize) -> bool {
    *value == 0
}

/// The epsilon of the norms, which that config.json does not have.
const STATE_SPACES_EPS: f64 = 1e-5;

/// Those of its keys that the configuration has fields for.
const KEYS: [&str; 10] = [
    "d_model",
    "n_layer",
    "vocab_size",
    "ssm_cfg",
    "rms_norm",
    "residual_in_fp32",
    "pad_vocab_size_multiple",
    "tie_embeddings",
    "d_intermediate",
    "attn_layer_idx",
];
/// The others that it takes, at the top and in `ssm_cfg`.
const OTHERS: [&str; 2] = ["fused_add_norm", "attn_cfg"];
const SSM_OTHERS: [&str; 2] = ["dt_init", "use_fast_path"];

/// Copies the keys that there are.
fn copy(keys: &[&str], from: &Keys, to: &mut Keys) {
    for &key in keys {
        if let Some(value) = from.get(key) {
            to.insert(key.into(), value.clone());
        }
    }
}

impl StateSpaces {
    pub fn read(keys: &Keys) -> Result<LanguageModelConfig> {
        let mut config = from_keys::<Self>(keys)?.into_config()?;
        config.extra = others(keys, &KEYS);
        // What is as it always is need not be kept.
        config.extra.retain(|key, value| key != "fused_add_norm" || *value == false);
        if let Some(Value::Object(ssm)) = keys.get("ssm_cfg") {
            let mut kept = Keys::new();
            copy(&SSM_OTHERS, ssm, &mut kept);
            kept.retain(|_, value| *value != true && *value != "random");
            if !kept.is_empty() {
                config.extra.insert("ssm_cfg".into(), kept.into());
            }
        }
        Ok(config)
    }

    pub fn write(config: &LanguageModelConfig) -> Result<Keys> {
        let mut keys = to_keys(&Self::from_config(config)?)?;
        copy(&OTHERS, &config.extra, &mut keys);
        if let (Some(Value::Object(from)), Some(Value::Object(to))) =
            (config.extra.get("ssm_cfg"), keys.get_mut("ssm_cfg"))
        {
            copy(&SSM_OTHERS, from, to);
        }
        Ok(keys)
    }

    fn into_config(self) -> Result<LanguageModelConfig> {
        let ssm = self.ssm_cfg;
        if ssm.layer != "Mamba1" {
            return Err(argument("ssm_cfg.layer", "Mamba1", ssm.layer));
        }
        if !self.rms_norm {
            return Err(argument("rms_norm", "true", "false, which is LayerNorm"));
        }
        if self.d_intermediate != 0 {
            return Err(argument("d_intermediate", "0: no MLP beside the blocks", self.d_intermediate));
        }
        if !self.attn_layer_idx.is_empty() {
            return Err(argument("attn_layer_idx", "no attention", format_args!("{:?}", self.attn_layer_idx)));
        }
        let d_model = self.d_model;
        let mamba = MambaConfig {
            d_inner: expanded(ssm.expand, d_model)?,
            d_state: ssm.d_state,
            d_conv: ssm.d_conv,
            dt_rank: ssm.dt_rank.number(d_model),
            conv_bias: ssm.conv_bias,
            proj_bias: ssm.bias,
            dt_min: ssm.dt_min,
            dt_max: ssm.dt_max,
            dt_init_floor: ssm.dt_init_floor,
            dt_scale: ssm.dt_scale,
            ..MambaConfig::new(d_model)
        };
        Ok(LanguageModelConfig {
            vocab_size: self.vocab_size,
            pad_vocab_size_multiple: self.pad_vocab_size_multiple,
            backbone: BackboneConfig {
                norm_eps: STATE_SPACES_EPS,
                residual_in_f32: self.residual_in_fp32,
                ..BackboneConfig::with_mixer(self.n_layer, mamba)
            },
            tie_embeddings: self.tie_embeddings,
            extra: Keys::new(),
        })
    }

    fn from_config(config: &LanguageModelConfig) -> Result<Self> {
        let backbone = &config.backbone;
        let refuse = |name, expected: &str, got: &dyn std::fmt::Debug| {
            Err(argument(
                name,
                format_args!("{expected}, for state-spaces/mamba has no other"),
                format_args!("{got:?}"),
            ))
        };
        let MixerConfig::Mamba(mamba) = &backbone.mixer else {
            return refuse("mixer", "Mamba blocks", &"attention");
        };
        if let Some(feed_forward) = &backbone.feed_forward {
            return refuse("feed_forward", "none", feed_forward);
        }
        match mamba {
            MambaConfig { bidirectional: true, .. } => return refuse("bidirectional", "false", &true),
            MambaConfig { selective: false, .. } => return refuse("selective", "true", &false),
            MambaConfig { norms, .. } if *norms != Norms::None => return refuse("norms", "none", norms),
            _ => {}
        }
        if backbone.tie_layers != 1 {
            return refuse("tie_layers", "1: each layer has weights of its own", &backbone.tie_layers);
        }
        if !backbone.layers.is_empty() {
            return refuse("layers", "layers that are all alike", &backbone.layers.keys());
        }
        if backbone.norm_eps != STATE_SPACES_EPS {
            return refuse("norm_eps", "1e-5", &backbone.norm_eps);
        }
        Ok(Self {
            d_model: mamba.d_model,
            n_layer: backbone.n_layer,
            vocab_size: config.vocab_size,
            ssm_cfg: SsmConfig {
                d_state: mamba.d_state,
                d_conv: mamba.d_conv,
                expand: expand(mamba.d_inner, mamba.d_model),
                dt_rank: Rank::Number(mamba.dt_rank),
                dt_min: mamba.dt_min,
                dt_max: mamba.dt_max,
                dt_scale: mamba.dt_scale,
                dt_init_floor: mamba.dt_init_floor,
                conv_bias: mamba.conv_bias,
                bias: mamba.proj_bias,
                ..SsmConfig::default()
            },
            rms_norm: true,
            residual_in_fp32: backbone.residual_in_f32,
            fused_add_norm: true,
            pad_vocab_size_multiple: config.pad_vocab_size_multiple,
            tie_embeddings: config.tie_embeddings,
            d_intermediate: 0,
            attn_layer_idx: Vec::new(),
        })
    }
}
