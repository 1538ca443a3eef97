//! The config.json of Jamba (Lieber et al. 2024, arXiv 2403.19887): Mamba layers with attention between them, and experts in
//! place of some MLPs.

use std::collections::BTreeMap;

use candle_core::Result;
use serde::{Deserialize, Serialize};

use super::config_json::{Auto, Keys, Rank, expanded, from_keys, others, to_keys, whole};
use crate::nn::{
    AttentionConfig, BackboneConfig, ExpertsConfig, FeedForwardConfig, LanguageModelConfig, LayerConfig, MambaConfig,
    MixerConfig, MlpConfig, Norms, argument,
};

pub(super) const TYPE: &str = "jamba";

/// The keys of [`Jamba`].
const KEYS: [&str; 24] = [
    "model_type",
    "architectures",
    "vocab_size",
    "tie_word_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "num_experts_per_tok",
    "num_experts",
    "expert_layer_period",
    "expert_layer_offset",
    "attn_layer_period",
    "attn_layer_offset",
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_expand",
    "mamba_dt_rank",
    "mamba_conv_bias",
    "mamba_proj_bias",
];

/// The special tokens that transformers takes where nothing is said.
pub(super) const TOKENS: [(&str, Option<u32>); 3] =
    [("bos_token_id", Some(1)), ("eos_token_id", Some(2)), ("pad_token_id", Some(0))];

/// The keys, and what transformers takes for those that are absent.
#[derive(Debug, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Jamba {
    model_type: String,
    architectures: Vec<String>,
    vocab_size: usize,
    tie_word_embeddings: bool,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    /// `hidden_size / num_attention_heads` if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    head_dim: Option<usize>,
    hidden_act: String,
    rms_norm_eps: f64,
    num_experts_per_tok: usize,
    num_experts: usize,
    expert_layer_period: usize,
    expert_layer_offset: usize,
    attn_layer_period: usize,
    attn_layer_offset: usize,
    mamba_d_state: usize,
    mamba_d_conv: usize,
    #[serde(serialize_with = "whole")]
    mamba_expand: f64,
    mamba_dt_rank: Rank,
    mamba_conv_bias: bool,
    mamba_proj_bias: bool,
    /// What else the caches of other libraries are limited to; kept among the other keys.
    #[serde(skip_serializing)]
    max_position_embeddings: usize,
}

impl Default for Jamba {
    fn default() -> Self {
        Self {
            model_type: TYPE.into(),
            architectures: vec!["JambaForCausalLM".into()],
            vocab_size: 65_536,
            tie_word_embeddings: false,
            hidden_size: 4096,
            intermediate_size: 14_336,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 8,
            head_dim: None,
            hidden_act: "silu".into(),
            rms_norm_eps: 1e-6,
            num_experts_per_tok: 2,
            num_experts: 16,
            expert_layer_period: 2,
            expert_layer_offset: 1,
            attn_layer_period: 8,
            attn_layer_offset: 4,
            mamba_d_state: 16,
            mamba_d_conv: 4,
            mamba_expand: 2.0,
            mamba_dt_rank: Rank::Auto(Auto::Auto),
            mamba_conv_bias: true,
            mamba_proj_bias: false,
            max_position_embeddings: 262_144,
        }
    }
}

impl Jamba {
    pub fn read(keys: &Keys) -> Result<LanguageModelConfig> {
        let jamba = from_keys::<Self>(keys)?;
        let mut config = jamba.language_model()?;
        config.extra = others(keys, &KEYS);
        Ok(config)
    }

    /// The Mamba layers.
    pub fn mamba(&self) -> Result<MambaConfig> {
        if self.hidden_act != "silu" {
            return Err(argument("hidden_act", "silu", &self.hidden_act));
        }
        Ok(MambaConfig {
            d_inner: expanded(self.mamba_expand, self.hidden_size)?,
            d_state: self.mamba_d_state,
            d_conv: self.mamba_d_conv,
            dt_rank: self.mamba_dt_rank.number(self.hidden_size),
            conv_bias: self.mamba_conv_bias,
            proj_bias: self.mamba_proj_bias,
            norms: Norms::Weighted { eps: self.rms_norm_eps },
            ..MambaConfig::new(self.hidden_size)
        })
    }

    fn language_model(&self) -> Result<LanguageModelConfig> {
        let periods = [
            ("attn_layer_offset", self.attn_layer_offset, self.attn_layer_period),
            ("expert_layer_offset", self.expert_layer_offset, self.expert_layer_period),
        ];
        for (name, offset, period) in periods {
            if offset >= period {
                return Err(argument(name, format_args!("less than its period, {period}"), offset));
            }
        }
        let d_model = self.hidden_size;
        let heads = AttentionConfig::new(d_model, self.num_attention_heads);
        let attention = AttentionConfig {
            n_kv_head: self.num_key_value_heads,
            d_head: self.head_dim.unwrap_or(heads.d_head),
            rope_theta: None,
            capacity: heads.capacity.min(self.max_position_embeddings),
            ..heads
        };
        let mlp = FeedForwardConfig::Mlp(MlpConfig::new(d_model, self.intermediate_size));
        let (count, top_k) = (self.num_experts, self.num_experts_per_tok);
        let experts = FeedForwardConfig::Experts(ExpertsConfig::new(d_model, self.intermediate_size, count, top_k));
        let mamba = MixerConfig::Mamba(self.mamba()?);
        let mut layers = BTreeMap::new();
        for index in 0..self.num_hidden_layers {
            let is_attention = index % self.attn_layer_period == self.attn_layer_offset;
            let has_experts = count > 1 && index % self.expert_layer_period == self.expert_layer_offset;
            if is_attention || has_experts {
                let mixer = if is_attention { attention.clone().into() } else { mamba.clone() };
                let feed_forward = if has_experts { &experts } else { &mlp };
                layers.insert(index, LayerConfig { mixer, feed_forward: Some(feed_forward.clone()) });
            }
        }
        Ok(LanguageModelConfig {
            tie_embeddings: self.tie_word_embeddings,
            backbone: BackboneConfig {
                feed_forward: Some(mlp),
                layers,
                norm_eps: self.rms_norm_eps,
                residual_in_f32: false,
                rescale_prenorm_residual: false,
                ..BackboneConfig::with_mixer(self.num_hidden_layers, mamba)
            },
            ..LanguageModelConfig::new(self.vocab_size, self.num_hidden_layers, d_model)
        })
    }

    /// The keys of a model that is a Jamba; none of another.
    pub fn of(config: &LanguageModelConfig) -> Option<Self> {
        let backbone = &config.backbone;
        let layers: Vec<LayerConfig> = (0..backbone.n_layer).map(|index| backbone.layer(index)).collect();
        let mamba = layers.iter().find_map(|layer| layer.mixer.as_mamba())?;
        let attention = layers.iter().find_map(|layer| layer.mixer.as_attention());
        let experts = layers.iter().find_map(|layer| match &layer.feed_forward {
            Some(FeedForwardConfig::Experts(experts)) => Some(experts),
            _ => None,
        });
        let d_inner = layers.iter().find_map(|layer| match layer.feed_forward.as_ref()? {
            FeedForwardConfig::Mlp(config) => Some(config.d_inner),
            FeedForwardConfig::Experts(config) => Some(config.d_inner),
        })?;
        let is_mamba = |layer: &LayerConfig| layer.mixer.as_mamba().is_some();
        let has_experts = |layer: &LayerConfig| matches!(layer.feed_forward, Some(FeedForwardConfig::Experts(_)));
        let places = |of: &dyn Fn(&LayerConfig) -> bool| {
            layers.iter().enumerate().filter(|(_, layer)| of(layer)).map(|(index, _)| index).collect::<Vec<_>>()
        };
        let [attn_layer_period, attn_layer_offset] = period(&places(&|layer| !is_mamba(layer)), layers.len());
        let [expert_layer_period, expert_layer_offset] = period(&places(&has_experts), layers.len());
        let d_model = config.d_model();
        let heads = attention.cloned().unwrap_or_else(|| AttentionConfig::new(d_model, 1));
        let jamba = Self {
            vocab_size: config.vocab_size,
            tie_word_embeddings: config.tie_embeddings,
            hidden_size: d_model,
            intermediate_size: d_inner,
            num_hidden_layers: layers.len(),
            num_attention_heads: heads.n_head,
            num_key_value_heads: heads.n_kv_head,
            head_dim: (Some(heads.d_head) != d_model.checked_div(heads.n_head)).then_some(heads.d_head),
            rms_norm_eps: backbone.norm_eps,
            num_experts: experts.map_or(1, |experts| experts.count),
            num_experts_per_tok: experts.map_or(1, |experts| experts.top_k),
            expert_layer_period,
            expert_layer_offset,
            attn_layer_period,
            attn_layer_offset,
            mamba_d_state: mamba.d_state,
            mamba_d_conv: mamba.d_conv,
            mamba_expand: (mamba.d_inner / mamba.d_model.max(1)) as f64,
            mamba_dt_rank: Rank::Number(mamba.dt_rank),
            mamba_conv_bias: mamba.conv_bias,
            mamba_proj_bias: mamba.proj_bias,
            ..Self::default()
        };
        // What they stand for is the model, or it is none of these.
        let said = jamba.language_model().ok()?;
        let is_same = said.tie_embeddings == config.tie_embeddings
            && config.padded_vocab_size() == config.vocab_size
            && !backbone.residual_in_f32
            && (0..layers.len()).all(|index| same_layer(&said.backbone.layer(index), &layers[index]));
        is_same.then_some(jamba)
    }

    pub fn keys(&self) -> Result<Keys> {
        to_keys(self)
    }
}

/// The period and offset of layers at these places, of `count`.
fn period(places: &[usize], count: usize) -> [usize; 2] {
    match places {
        // None of them is that.
        [] => [count + 1, count],
        [only] => [count.max(1), *only],
        [first, second, ..] => [second - first, *first],
    }
}

/// Whether two layers compute the same: how weights begin and what room a cache has does not count.
pub(super) fn same_layer(a: &LayerConfig, b: &LayerConfig) -> bool {
    let mixers = match (&a.mixer, &b.mixer) {
        (MixerConfig::Mamba(a), MixerConfig::Mamba(b)) => {
            let &MambaConfig { recompute, checkpoint_steps, dt_min, dt_max, dt_init_floor, dt_scale, seed, .. } = b;
            let speed = MambaConfig { recompute, checkpoint_steps, ..a.clone() };
            *b == MambaConfig { dt_min, dt_max, dt_init_floor, dt_scale, seed, ..speed }
        }
        (MixerConfig::Attention(a), MixerConfig::Attention(b)) => {
            *b == AttentionConfig { capacity: b.capacity, seed: b.seed, ..a.clone() }
        }
        (MixerConfig::Recurrent(a), MixerConfig::Recurrent(b)) => a.d_hidden == b.d_hidden && a.cell == b.cell,
        _ => false,
    };
    mixers && a.feed_forward == b.feed_forward
}
