//! The config.json of Llama: a plain Transformer.

use candle_core::Result;
use serde::{Deserialize, Serialize};

use super::config_json::{Keys, from_keys, others, to_keys};
use super::jamba::same_layer;
use crate::nn::{
    AttentionConfig, BackboneConfig, FeedForwardConfig, LanguageModelConfig, LayerConfig, MixerConfig, MlpConfig,
    RopeScaling, argument,
};

pub(super) const TYPE: &str = "llama";

/// The keys of [`Llama`].
const KEYS: [&str; 17] = [
    "model_type",
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "attention_bias",
    "mlp_bias",
];

/// The special tokens that transformers takes where nothing is said.
pub(super) const TOKENS: [(&str, Option<u32>); 3] =
    [("bos_token_id", Some(1)), ("eos_token_id", Some(2)), ("pad_token_id", None)];

/// The keys, and what transformers takes for those that are absent.
#[derive(Debug, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct Llama {
    model_type: String,
    architectures: Vec<String>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    /// As many as of queries if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    num_key_value_heads: Option<usize>,
    /// `hidden_size / num_attention_heads` if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    head_dim: Option<usize>,
    hidden_act: String,
    rms_norm_eps: f64,
    tie_word_embeddings: bool,
    /// In older versions of transformers.
    #[serde(skip_serializing_if = "Option::is_none")]
    rope_theta: Option<f64>,
    /// In newer ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    rope_parameters: Option<Rope>,
    /// What older ones say of stretched positions.
    #[serde(skip_serializing_if = "Option::is_none")]
    rope_scaling: Option<Rope>,
    attention_bias: bool,
    mlp_bias: bool,
    #[serde(skip_serializing)]
    max_position_embeddings: usize,
}

/// How positions turn heads.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
pub(super) struct Rope {
    #[serde(alias = "type", default = "plain")]
    rope_type: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    rope_theta: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    factor: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    low_freq_factor: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    high_freq_factor: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    original_max_position_embeddings: Option<usize>,
}

fn plain() -> String {
    "default".into()
}

impl Rope {
    /// Positions of this base.
    pub fn of(rope_theta: Option<f64>, scaling: Option<RopeScaling>) -> Self {
        let rope = Self {
            rope_type: plain(),
            rope_theta,
            factor: None,
            low_freq_factor: None,
            high_freq_factor: None,
            original_max_position_embeddings: None,
        };
        match scaling {
            None => rope,
            Some(RopeScaling::Linear { factor }) => Self { rope_type: "linear".into(), factor: Some(factor), ..rope },
            Some(RopeScaling::Llama3 { factor, low_turns, high_turns, original_length }) => Self {
                rope_type: "llama3".into(),
                factor: Some(factor),
                low_freq_factor: Some(low_turns),
                high_freq_factor: Some(high_turns),
                original_max_position_embeddings: Some(original_length),
                ..rope
            },
        }
    }

    /// What the key `name` says of stretched positions, in a model of texts of this length where it does not say the original
    /// one.
    pub fn scaling(&self, name: &'static str, length: Option<usize>) -> Result<Option<RopeScaling>> {
        let absent = |key: &str| argument(name, format_args!("a number `{key}` beside {}", self.rope_type), "none");
        let number = |key, number: Option<f64>| number.ok_or_else(|| absent(key));
        match self.rope_type.as_str() {
            "default" => Ok(None),
            "linear" => Ok(Some(RopeScaling::Linear { factor: number("factor", self.factor)? })),
            "llama3" => Ok(Some(RopeScaling::Llama3 {
                factor: number("factor", self.factor)?,
                low_turns: number("low_freq_factor", self.low_freq_factor)?,
                high_turns: number("high_freq_factor", self.high_freq_factor)?,
                original_length: self
                    .original_max_position_embeddings
                    .or(length)
                    .ok_or_else(|| absent("original_max_position_embeddings"))?,
            })),
            other => Err(argument(name, "rotary positions of the type default, linear or llama3", other)),
        }
    }
}

impl Default for Llama {
    fn default() -> Self {
        Self {
            model_type: TYPE.into(),
            architectures: vec!["LlamaForCausalLM".into()],
            vocab_size: 32_000,
            hidden_size: 4096,
            intermediate_size: 11_008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: "silu".into(),
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            rope_theta: None,
            rope_parameters: None,
            rope_scaling: None,
            attention_bias: false,
            mlp_bias: false,
            max_position_embeddings: 2048,
        }
    }
}

impl Llama {
    pub fn read(keys: &Keys) -> Result<LanguageModelConfig> {
        let mut config = from_keys::<Self>(keys)?.language_model()?;
        config.extra = others(keys, &KEYS);
        Ok(config)
    }

    fn language_model(&self) -> Result<LanguageModelConfig> {
        if self.hidden_act != "silu" {
            return Err(argument("hidden_act", "silu", &self.hidden_act));
        }
        let rope_scaling = self.scaling()?;
        let theta = self.rope_parameters.as_ref().and_then(|rope| rope.rope_theta).or(self.rope_theta);
        let heads = AttentionConfig::new(self.hidden_size, self.num_attention_heads);
        let attention = AttentionConfig {
            n_kv_head: self.num_key_value_heads.unwrap_or(heads.n_head),
            d_head: self.head_dim.unwrap_or(heads.d_head),
            qkv_bias: self.attention_bias,
            out_bias: self.attention_bias,
            rope_theta: Some(theta.unwrap_or(10_000.0)),
            rope_scaling,
            capacity: heads.capacity.min(self.max_position_embeddings),
            ..heads
        };
        let mlp = MlpConfig { bias: self.mlp_bias, ..MlpConfig::new(self.hidden_size, self.intermediate_size) };
        Ok(LanguageModelConfig {
            tie_embeddings: self.tie_word_embeddings,
            backbone: BackboneConfig {
                feed_forward: Some(mlp.into()),
                norm_eps: self.rms_norm_eps,
                residual_in_f32: false,
                rescale_prenorm_residual: false,
                ..BackboneConfig::with_mixer(self.num_hidden_layers, attention)
            },
            ..LanguageModelConfig::new(self.vocab_size, self.num_hidden_layers, self.hidden_size)
        })
    }

    /// How positions are stretched, which new and old versions of transformers say in different places.
    fn scaling(&self) -> Result<Option<RopeScaling>> {
        let length = Some(self.max_position_embeddings);
        let of = |name, rope: &Option<Rope>| rope.as_ref().map(|rope| rope.scaling(name, length)).transpose();
        match (of("rope_parameters", &self.rope_parameters)?, of("rope_scaling", &self.rope_scaling)?) {
            (Some(new), Some(old)) if new != old => {
                let expected = format_args!("the same as rope_parameters, {new:?}");
                Err(argument("rope_scaling", expected, format_args!("{old:?}")))
            }
            (new, old) => Ok(new.or(old).flatten()),
        }
    }

    /// The keys of a model that is such a Transformer; none of another.
    pub fn of(config: &LanguageModelConfig) -> Option<Self> {
        let backbone = &config.backbone;
        let LayerConfig { mixer: MixerConfig::Attention(attention), feed_forward } = backbone.layer(0) else {
            return None;
        };
        let Some(FeedForwardConfig::Mlp(mlp)) = feed_forward else { return None };
        let d_model = config.d_model();
        let AttentionConfig { rope_theta, rope_scaling, .. } = attention;
        let llama = Self {
            vocab_size: config.vocab_size,
            hidden_size: d_model,
            intermediate_size: mlp.d_inner,
            num_hidden_layers: backbone.n_layer,
            num_attention_heads: attention.n_head,
            num_key_value_heads: Some(attention.n_kv_head),
            head_dim: Some(attention.d_head),
            rms_norm_eps: backbone.norm_eps,
            tie_word_embeddings: config.tie_embeddings,
            rope_theta,
            rope_parameters: Some(Rope::of(rope_theta, rope_scaling)),
            rope_scaling: rope_scaling.map(|scaling| Rope::of(None, Some(scaling))),
            attention_bias: attention.qkv_bias,
            mlp_bias: mlp.bias,
            ..Self::default()
        };
        // What they stand for is the model, or it is none of these.
        let said = llama.language_model().ok()?;
        let is_same = config.padded_vocab_size() == config.vocab_size
            && !backbone.residual_in_f32
            && (0..backbone.n_layer).all(|index| same_layer(&said.backbone.layer(index), &backbone.layer(index)));
        is_same.then_some(llama)
    }

    pub fn keys(&self) -> Result<Keys> {
        to_keys(self)
    }
}
