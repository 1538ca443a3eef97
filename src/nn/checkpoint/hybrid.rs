//! The config.json of hybrids that no other library knows, which this crate alone reads.

use std::collections::BTreeMap;

use candle_core::Result;
use serde::{Deserialize, Serialize};

use super::config_json::{Keys, from_keys, others, to_keys};
use super::hugging_face::{HuggingFace, MIXER_KEYS};
use super::llama::Rope;
use crate::nn::{
    AttentionConfig, BackboneConfig, ExpertsConfig, FeedForwardConfig, LanguageModelConfig, LayerConfig, MixerConfig,
    MlpConfig, RecurrentCell, RecurrentConfig, argument,
};

pub(super) const TYPE: &str = "selective_scan_hybrid";

/// The keys of [`Hybrid`].
const KEYS: [&str; 14] = [
    "model_type",
    "architectures",
    "vocab_size",
    "pad_vocab_size_multiple",
    "hidden_size",
    "num_hidden_layers",
    "tie_layers",
    "norm_epsilon",
    "residual_in_fp32",
    "rescale_prenorm_residual",
    "tie_word_embeddings",
    "mixer",
    "feed_forward",
    "layers",
];

/// All of a model.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Hybrid {
    model_type: String,
    /// Without padding.
    vocab_size: usize,
    pad_vocab_size_multiple: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    /// Absent if each layer has weights of its own.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    tie_layers: usize,
    norm_epsilon: f64,
    residual_in_fp32: bool,
    rescale_prenorm_residual: bool,
    tie_word_embeddings: bool,
    #[serde(flatten)]
    common: Layer,
    #[serde(default)]
    layers: BTreeMap<usize, Layer>,
}

fn yes() -> bool {
    true
}

fn is_yes(yes: &bool) -> bool {
    *yes
}

fn one() -> usize {
    1
}

fn is_one(number: &usize) -> bool {
    *number == 1
}

#[derive(Debug, Deserialize, Serialize)]
struct Layer {
    mixer: MixerKeys,
    /// Absent if nothing follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    feed_forward: Option<FeedForwardKeys>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum MixerKeys {
    /// By the keys that Hugging Face has for a Mamba block.
    Mamba {
        #[serde(flatten)]
        keys: Keys,
    },
    Attention {
        num_attention_heads: usize,
        num_key_value_heads: usize,
        head_dim: usize,
        qkv_bias: bool,
        out_bias: bool,
        /// Absent if there are no positions.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rope_theta: Option<f64>,
        /// As transformers has it in Llama's config.json.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rope_scaling: Option<Rope>,
        /// Absent if it is.
        #[serde(default = "yes", skip_serializing_if = "is_yes")]
        causal: bool,
        capacity: usize,
    },
    Recurrent {
        /// `lstm` or `gru`.
        cell: String,
        state_size: usize,
    },
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum FeedForwardKeys {
    Mlp { intermediate_size: usize, bias: bool },
    Experts { intermediate_size: usize, num_experts: usize, num_experts_per_tok: usize },
}

impl Layer {
    fn of(layer: &LayerConfig, config: &LanguageModelConfig) -> Result<Self> {
        let mixer = match &layer.mixer {
            MixerConfig::Mamba(mamba) => {
                let mut keys = to_keys(&HuggingFace::of_mixer(config, mamba))?;
                keys.retain(|key, _| MIXER_KEYS.contains(&key.as_str()));
                MixerKeys::Mamba { keys }
            }
            MixerConfig::Attention(attention) => {
                let &AttentionConfig { n_head, n_kv_head, d_head, qkv_bias, out_bias, rope_theta, .. } = attention;
                let &AttentionConfig { rope_scaling, causal, capacity, .. } = attention;
                MixerKeys::Attention {
                    num_attention_heads: n_head,
                    num_key_value_heads: n_kv_head,
                    head_dim: d_head,
                    qkv_bias,
                    out_bias,
                    rope_theta,
                    rope_scaling: rope_scaling.map(|scaling| Rope::of(None, Some(scaling))),
                    causal,
                    capacity,
                }
            }
            MixerConfig::Recurrent(recurrent) => MixerKeys::Recurrent {
                cell: match recurrent.cell {
                    RecurrentCell::Lstm => "lstm".into(),
                    RecurrentCell::Gru => "gru".into(),
                },
                state_size: recurrent.d_hidden,
            },
        };
        let feed_forward = layer.feed_forward.as_ref().map(|feed_forward| match feed_forward {
            FeedForwardConfig::Mlp(mlp) => FeedForwardKeys::Mlp { intermediate_size: mlp.d_inner, bias: mlp.bias },
            FeedForwardConfig::Experts(experts) => FeedForwardKeys::Experts {
                intermediate_size: experts.d_inner,
                num_experts: experts.count,
                num_experts_per_tok: experts.top_k,
            },
        });
        Ok(Self { mixer, feed_forward })
    }

    fn layer(&self, d_model: usize) -> Result<LayerConfig> {
        let mixer = match &self.mixer {
            MixerKeys::Mamba { keys } => MixerConfig::Mamba(HuggingFace::mixer(keys, d_model)?),
            &MixerKeys::Attention {
                num_attention_heads,
                num_key_value_heads,
                head_dim,
                qkv_bias,
                out_bias,
                rope_theta,
                ref rope_scaling,
                causal,
                capacity,
            } => MixerConfig::Attention(AttentionConfig {
                n_kv_head: num_key_value_heads,
                d_head: head_dim,
                qkv_bias,
                out_bias,
                rope_theta,
                rope_scaling: match rope_scaling {
                    Some(rope) => rope.scaling("rope_scaling", None)?,
                    None => None,
                },
                causal,
                capacity,
                ..AttentionConfig::new(d_model, num_attention_heads)
            }),
            MixerKeys::Recurrent { cell, state_size } => {
                let cell = match cell.as_str() {
                    "lstm" => RecurrentCell::Lstm,
                    "gru" => RecurrentCell::Gru,
                    other => return Err(argument("cell", "lstm or gru", other)),
                };
                MixerConfig::Recurrent(RecurrentConfig { d_hidden: *state_size, ..RecurrentConfig::new(d_model, cell) })
            }
        };
        let feed_forward = self.feed_forward.as_ref().map(|feed_forward| match *feed_forward {
            FeedForwardKeys::Mlp { intermediate_size, bias } => {
                FeedForwardConfig::Mlp(MlpConfig { bias, ..MlpConfig::new(d_model, intermediate_size) })
            }
            FeedForwardKeys::Experts { intermediate_size, num_experts, num_experts_per_tok } => {
                let experts = ExpertsConfig::new(d_model, intermediate_size, num_experts, num_experts_per_tok);
                FeedForwardConfig::Experts(experts)
            }
        });
        Ok(LayerConfig { mixer, feed_forward })
    }
}

impl Hybrid {
    pub fn read(keys: &Keys) -> Result<LanguageModelConfig> {
        let hybrid = from_keys::<Self>(keys)?;
        let d_model = hybrid.hidden_size;
        let LayerConfig { mixer, feed_forward } = hybrid.common.layer(d_model)?;
        let layers = hybrid.layers.iter().map(|(&index, layer)| Ok((index, layer.layer(d_model)?)));
        Ok(LanguageModelConfig {
            vocab_size: hybrid.vocab_size,
            pad_vocab_size_multiple: hybrid.pad_vocab_size_multiple,
            backbone: BackboneConfig {
                n_layer: hybrid.num_hidden_layers,
                mixer,
                feed_forward,
                layers: layers.collect::<Result<_>>()?,
                tie_layers: hybrid.tie_layers,
                norm_eps: hybrid.norm_epsilon,
                residual_in_f32: hybrid.residual_in_fp32,
                rescale_prenorm_residual: hybrid.rescale_prenorm_residual,
            },
            tie_embeddings: hybrid.tie_word_embeddings,
            extra: others(keys, &KEYS),
        })
    }

    pub fn keys(config: &LanguageModelConfig) -> Result<Keys> {
        let backbone = &config.backbone;
        let common = LayerConfig { mixer: backbone.mixer.clone(), feed_forward: backbone.feed_forward.clone() };
        let layers = backbone.layers.iter().map(|(&index, layer)| Ok((index, Layer::of(layer, config)?)));
        to_keys(&Self {
            model_type: TYPE.into(),
            vocab_size: config.vocab_size,
            pad_vocab_size_multiple: config.pad_vocab_size_multiple,
            hidden_size: config.d_model(),
            num_hidden_layers: backbone.n_layer,
            tie_layers: backbone.tie_layers,
            norm_epsilon: backbone.norm_eps,
            residual_in_fp32: backbone.residual_in_f32,
            rescale_prenorm_residual: backbone.rescale_prenorm_residual,
            tie_word_embeddings: config.tie_embeddings,
            common: Layer::of(&common, config)?,
            layers: layers.collect::<Result<_>>()?,
        })
    }
}
