//! config.json, by the keys of each library.

use candle_core::{DType, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::CheckpointFormat;
use super::hugging_face::{self, HuggingFace, all_keys, with_tokens};
use super::hybrid::Hybrid;
use super::jamba::Jamba;
use super::llama::Llama;
use super::state_spaces::StateSpaces;
use super::{hybrid, jamba, llama};
use crate::nn::{LanguageModelConfig, LayerConfig, MambaConfig, argument};

impl LanguageModelConfig {
    /// Reads a config.json, of Hugging Face's (`model_type` is `mamba`, `falcon_mamba`, `jamba` or `llama`) or of state-spaces/mamba's. A key
    /// that is `null` has its library's default, and one that has no field here is kept in [`extra`](Self::extra).
    ///
    /// # Errors
    /// Text that is no such configuration, or one of a model that this is not; the message names the key.
    pub fn from_json(text: &str) -> Result<Self> {
        Ok(read(text)?.0)
    }

    /// Writes a config.json.
    ///
    /// Hugging Face's keys have words for every model. What transformers does not know is written with the `model_type`
    /// `selective_scan`, which this crate alone reads: `bidirectional`, time-invariant, Jamba's norms, a `d_inner` that
    /// is no whole multiple of `d_model`, Mamba layers that differ from one another, and layers that share their weights; or, with
    /// attention or feed-forward parts in other places than in Jamba or Llama, `selective_scan_hybrid`. All of
    /// [`extra`](Self::extra) is kept. A special token that is not there is written as `null`, as transformers takes token 0 where
    /// nothing is said.
    ///
    /// state-spaces/mamba takes no key that it does not know: of [`extra`](Self::extra) only `fused_add_norm` and `attn_cfg`
    /// are written, and of its `ssm_cfg` only `dt_init` and `use_fast_path`.
    ///
    /// # Errors
    /// A model that the format has no words for; sizes that make no model.
    pub fn to_json(&self, format: CheckpointFormat) -> Result<String> {
        write(self, format, None)
    }
}

impl MambaConfig {
    /// Reads the part of a config.json that is about the Mamba blocks: those that [`LanguageModelConfig::from_json`]
    /// takes where all layers are Mamba blocks alike, and those among Jamba's layers. One of these is then
    /// `Mamba::new(&config, vb.pp("model.layers.N.mamba"))`.
    ///
    /// # Errors
    /// As [`LanguageModelConfig::from_json`].
    pub fn from_json(text: &str) -> Result<Self> {
        let keys = parse(text)?;
        if keys.get("model_type").is_some_and(|name| name == jamba::TYPE) {
            let config = from_keys::<Jamba>(&keys)?.mamba()?;
            config.check()?;
            return Ok(config);
        }
        let config = LanguageModelConfig::from_json(text)?.backbone;
        match (config.mixer.as_mamba(), config.layers.first_key_value(), &config.feed_forward) {
            (Some(mamba), None, None) => Ok(mamba.clone()),
            _ => Err(argument("config.json", "Mamba blocks that are all alike", "layers that differ")),
        }
    }
}

pub(super) type Keys = Map<String, Value>;

/// The configuration, and by whose keys it was written.
pub(super) fn read(text: &str) -> Result<(LanguageModelConfig, CheckpointFormat)> {
    let keys = parse(text)?;
    let (config, format) = match keys.get("model_type").filter(|value| !value.is_null()) {
        None if keys.contains_key("d_model") => (StateSpaces::read(&keys)?, CheckpointFormat::StateSpaces),
        None => {
            return Err(argument("config.json", "`model_type`, or `d_model` as state-spaces/mamba has it", "neither"));
        }
        Some(Value::String(name)) if hugging_face::TYPES.contains(&name.as_str()) => {
            (HuggingFace::read(&keys)?, CheckpointFormat::HuggingFace)
        }
        Some(Value::String(name)) if name == jamba::TYPE => {
            (with_tokens(Jamba::read(&keys)?, &jamba::TOKENS), CheckpointFormat::HuggingFace)
        }
        Some(Value::String(name)) if name == llama::TYPE => {
            (with_tokens(Llama::read(&keys)?, &llama::TOKENS), CheckpointFormat::HuggingFace)
        }
        Some(Value::String(name)) if name == hybrid::TYPE => {
            let none = ["bos_token_id", "eos_token_id", "pad_token_id"].map(|token| (token, None));
            (with_tokens(Hybrid::read(&keys)?, &none), CheckpointFormat::HuggingFace)
        }
        Some(other) => {
            let expected = "`model_type` mamba, falcon_mamba, jamba or llama";
            return Err(argument("config.json", expected, other));
        }
    };
    config.check()?;
    Ok((config, format))
}

/// A config.json of a model whose activations and matrices are of type `dtype`.
pub(super) fn write(config: &LanguageModelConfig, format: CheckpointFormat, dtype: Option<DType>) -> Result<String> {
    config.check()?;
    let keys = match format {
        CheckpointFormat::HuggingFace => match Family::of(config) {
            Family::Mamba => HuggingFace::write(config, dtype)?,
            Family::Jamba(jamba) => all_keys(config, jamba.keys()?, dtype),
            Family::Llama(llama) => all_keys(config, llama.keys()?, dtype),
            Family::Hybrid => all_keys(config, Hybrid::keys(config)?, dtype),
        },
        CheckpointFormat::StateSpaces => StateSpaces::write(config)?,
    };
    Ok(serde_json::to_string_pretty(&keys).map_err(candle_core::Error::wrap)? + "\n")
}

/// Whose words Hugging Face has for a model.
pub(super) enum Family {
    /// Mamba's and Falcon Mamba's, or ours for what is made of such blocks.
    Mamba,
    Jamba(Box<Jamba>),
    Llama(Box<Llama>),
    /// Nobody's but ours.
    Hybrid,
}

impl Family {
    pub fn of(config: &LanguageModelConfig) -> Self {
        let backbone = &config.backbone;
        let is_alone = |layer: &LayerConfig| layer.mixer.as_mamba().is_some() && layer.feed_forward.is_none();
        let is_mamba = backbone.mixer.as_mamba().is_some() && backbone.feed_forward.is_none();
        if is_mamba && backbone.layers.values().all(is_alone) {
            return Self::Mamba;
        }
        // Neither of the others shares weights between layers.
        if backbone.tie_layers > 1 {
            return Self::Hybrid;
        }
        if let Some(llama) = Llama::of(config) {
            return Self::Llama(Box::new(llama));
        }
        Jamba::of(config).map_or(Self::Hybrid, |jamba| Self::Jamba(Box::new(jamba)))
    }
}

fn parse(text: &str) -> Result<Keys> {
    let keys: Keys = serde_json::from_str(text).map_err(|error| argument("config.json", "an object in JSON", error))?;
    match keys.get("quantization_config") {
        None | Some(Value::Null) => Ok(keys),
        Some(got) => Err(argument("quantization_config", "none: quantised weights are not read", got)),
    }
}

pub(super) fn from_keys<T: for<'de> Deserialize<'de>>(keys: &Keys) -> Result<T> {
    serde_json::from_value(Value::Object(without_nulls(keys)))
        .map_err(|error| argument("config.json", "the keys of a Mamba model", error))
}

/// The keys that say something: `null` is how Python writes that nothing is said.
fn without_nulls(keys: &Keys) -> Keys {
    let inner = |value: &Value| match value {
        Value::Object(keys) => Value::Object(without_nulls(keys)),
        other => other.clone(),
    };
    keys.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), inner(value))).collect()
}

pub(super) fn to_keys(value: &impl Serialize) -> Result<Keys> {
    match serde_json::to_value(value).map_err(candle_core::Error::wrap)? {
        Value::Object(keys) => Ok(keys),
        other => Err(argument("config.json", "an object", other)),
    }
}

/// The keys that are not among `known`.
pub(super) fn others(keys: &Keys, known: &[&str]) -> Keys {
    keys.iter()
        .filter(|(key, _)| !known.contains(&key.as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// A rank: a number, or `"auto"`.
#[derive(Debug, Deserialize, Serialize)]
#[serde(untagged)]
pub(super) enum Rank {
    Number(usize),
    Auto(Auto),
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Auto {
    Auto,
}

impl Rank {
    pub fn number(&self, d_model: usize) -> usize {
        match self {
            Self::Number(rank) => *rank,
            Self::Auto(_) => d_model.div_ceil(16),
        }
    }
}

/// The channels that a factor stands for, as both libraries compute them: a product in `f64`, cut to a whole number.
pub(super) fn expanded(expand: f64, d_model: usize) -> Result<usize> {
    let d_inner = (expand * d_model as f64).trunc();
    if (1.0..1e15).contains(&d_inner) {
        Ok(d_inner as usize)
    } else {
        Err(argument("expand", format_args!("a factor that makes channels from {d_model}"), expand))
    }
}

/// The factor from which [`expanded`] makes `d_inner`.
pub(super) fn expand(d_inner: usize, d_model: usize) -> f64 {
    let factor = d_inner as f64 / d_model as f64;
    // 15 / 11 * 11 is below 15, and would be cut to 14.
    if (factor * d_model as f64) < d_inner as f64 { factor.next_up() } else { factor }
}

/// A number, written without a point if it is whole: transformers wants `expand` as an integer.
pub(super) fn whole<S: serde::Serializer>(value: &f64, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        serializer.serialize_i64(*value as i64)
    } else {
        serializer.serialize_f64(*value)
    }
}
