//! The two schemes of config.json: Hugging Face's, and that of the repository state-spaces/mamba.

mod state_spaces;

use candle_core::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{LanguageModelConfig, MambaConfig, Naming, Norms, argument};
use state_spaces::StateSpaces;

impl LanguageModelConfig {
    /// Reads a config.json, of Hugging Face's (`model_type` is `mamba` or `falcon_mamba`) or of state-spaces/mamba's.
    ///
    /// # Errors
    /// Text that is no such configuration, or one of a model that this is not; the message names the key.
    pub fn from_json(text: &str) -> Result<Self> {
        Ok(read(text)?.0)
    }

    /// Writes a config.json.
    ///
    /// # Errors
    /// A model that the scheme has no words for. Hugging Face's keys have them for all but what its libraries do not know
    /// (`bidirectional`, time-invariant, Jamba's norms); that is written with the `model_type` `selective_scan`.
    pub fn to_json(&self, naming: Naming) -> Result<String> {
        let value = match naming {
            Naming::HuggingFace => serde_json::to_value(HuggingFace::from_config(self)),
            Naming::StateSpaces => serde_json::to_value(StateSpaces::from_config(self)?),
        };
        let text = value.and_then(|value| serde_json::to_string_pretty(&value)).map_err(candle_core::Error::wrap)?;
        Ok(text + "\n")
    }
}

impl MambaConfig {
    /// Reads the part of a config.json that is about the Mamba blocks: those that [`LanguageModelConfig::from_json`]
    /// takes, and Jamba's, whose models have other layers too. A Jamba layer is then
    /// `Mamba::new(&config, vb.pp("model.layers.N.mamba"))`.
    ///
    /// # Errors
    /// As [`LanguageModelConfig::from_json`].
    pub fn from_json(text: &str) -> Result<Self> {
        let value = parse(text)?;
        if value["model_type"] == "jamba" {
            let config = from_value::<Jamba>(value)?.into_config()?;
            config.check()?;
            return Ok(config);
        }
        Ok(LanguageModelConfig::from_json(text)?.mamba)
    }
}

/// The configuration, and by which scheme it was written.
pub(super) fn read(text: &str) -> Result<(LanguageModelConfig, Naming)> {
    let value = parse(text)?;
    let (config, naming) = match &value["model_type"] {
        Value::Null if value.get("d_model").is_some() => {
            (from_value::<StateSpaces>(value)?.into_config()?, Naming::StateSpaces)
        }
        Value::Null => {
            return Err(argument("config.json", "`model_type`, or `d_model` as state-spaces/mamba has it", "neither"));
        }
        Value::String(name) if ["mamba", "falcon_mamba", OURS].contains(&name.as_str()) => {
            (from_value::<HuggingFace>(value)?.into_config()?, Naming::HuggingFace)
        }
        other => {
            let expected =
                "`model_type` mamba or falcon_mamba (of a Jamba model, `MambaConfig` reads the Mamba layers)";
            return Err(argument("config.json", expected, other));
        }
    };
    config.check()?;
    Ok((config, naming))
}

fn parse(text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|error| argument("config.json", "JSON", error))
}

fn from_value<T: for<'de> Deserialize<'de>>(value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|error| argument("config.json", "the keys of a Mamba model", error))
}

/// The `model_type` of what no other library knows.
const OURS: &str = "selective_scan";

/// A rank: a number, or `"auto"`.
#[derive(Debug, Deserialize, Serialize)]
#[serde(untagged)]
enum Rank {
    Number(usize),
    Auto(Auto),
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum Auto {
    Auto,
}

impl Rank {
    fn number(&self, d_model: usize) -> usize {
        match self {
            Self::Number(rank) => *rank,
            Self::Auto(_) => d_model.div_ceil(16),
        }
    }
}

/// `expand` times the width, which must come out whole.
fn expanded(expand: f64, d_model: usize) -> Result<usize> {
    let d_inner = expand * d_model as f64;
    if d_inner >= 1.0 && d_inner.fract() == 0.0 && d_inner < 1e15 {
        Ok(d_inner as usize)
    } else {
        Err(argument("expand", format_args!("a whole number of channels from {d_model}"), expand))
    }
}

/// Hugging Face's keys. What is absent has the value that transformers gives it.
#[derive(Debug, Deserialize, Serialize)]
#[serde(default)]
struct HuggingFace {
    model_type: String,
    architectures: Vec<String>,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    state_size: usize,
    conv_kernel: usize,
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
        }
    }
}

impl HuggingFace {
    fn into_config(self) -> Result<LanguageModelConfig> {
        if !["silu", "swish"].contains(&self.hidden_act.as_str()) {
            return Err(argument("hidden_act", "silu", self.hidden_act));
        }
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
        Ok(LanguageModelConfig {
            vocab_size: self.vocab_size,
            n_layer: self.num_hidden_layers,
            mamba: MambaConfig {
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
                seed: 0,
            },
            norm_eps: self.layer_norm_epsilon,
            residual_in_f32: self.residual_in_fp32,
            tie_embeddings: self.tie_word_embeddings,
            rescale_prenorm_residual: self.rescale_prenorm_residual,
        })
    }

    fn from_config(config: &LanguageModelConfig) -> Self {
        let mamba = &config.mamba;
        let known = !mamba.bidirectional && mamba.selective;
        let (model_type, architecture) = match mamba.norms {
            Norms::None if known => ("mamba", Some("MambaForCausalLM")),
            Norms::Unweighted { .. } if known => ("falcon_mamba", Some("FalconMambaForCausalLM")),
            _ => (OURS, None),
        };
        let (norms, eps) = match mamba.norms {
            Norms::None => ("none", None),
            Norms::Weighted { eps } => ("weighted", Some(eps)),
            Norms::Unweighted { eps } => ("unweighted", Some(eps)),
        };
        let ours = model_type == OURS;
        Self {
            model_type: model_type.into(),
            architectures: architecture.into_iter().map(str::to_string).collect(),
            vocab_size: config.vocab_size,
            hidden_size: mamba.d_model,
            num_hidden_layers: config.n_layer,
            state_size: mamba.d_state,
            conv_kernel: mamba.d_conv,
            expand: mamba.d_inner as f64 / mamba.d_model as f64,
            intermediate_size: Some(mamba.d_inner),
            time_step_rank: Rank::Number(mamba.dt_rank),
            use_bias: mamba.proj_bias,
            use_conv_bias: mamba.conv_bias,
            hidden_act: "silu".into(),
            layer_norm_epsilon: config.norm_eps,
            residual_in_fp32: config.residual_in_f32,
            rescale_prenorm_residual: config.rescale_prenorm_residual,
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
        }
    }
}

/// What of Jamba's keys is about its Mamba layers.
#[derive(Debug, Deserialize)]
struct Jamba {
    hidden_size: usize,
    #[serde(default = "silu")]
    hidden_act: String,
    mamba_d_state: usize,
    mamba_d_conv: usize,
    mamba_expand: f64,
    mamba_dt_rank: Rank,
    mamba_conv_bias: bool,
    mamba_proj_bias: bool,
    rms_norm_eps: f64,
}

fn silu() -> String {
    "silu".into()
}

impl Jamba {
    fn into_config(self) -> Result<MambaConfig> {
        if self.hidden_act != "silu" {
            return Err(argument("hidden_act", "silu", self.hidden_act));
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
}
