//! The part of Jamba's config.json that is about its Mamba layers.

use candle_core::Result;
use serde::Deserialize;

use super::config_json::{Auto, Rank, expanded};
use crate::nn::{MambaConfig, Norms, argument};

/// The keys, and what transformers takes for those that are absent.
#[derive(Debug, Deserialize)]
#[serde(default)]
pub(super) struct Jamba {
    hidden_size: usize,
    hidden_act: String,
    mamba_d_state: usize,
    mamba_d_conv: usize,
    mamba_expand: f64,
    mamba_dt_rank: Rank,
    mamba_conv_bias: bool,
    mamba_proj_bias: bool,
    rms_norm_eps: f64,
}

impl Default for Jamba {
    fn default() -> Self {
        Self {
            hidden_size: 4096,
            hidden_act: "silu".into(),
            mamba_d_state: 16,
            mamba_d_conv: 4,
            mamba_expand: 2.0,
            mamba_dt_rank: Rank::Auto(Auto::Auto),
            mamba_conv_bias: true,
            mamba_proj_bias: false,
            rms_norm_eps: 1e-6,
        }
    }
}

impl Jamba {
    pub fn into_config(self) -> Result<MambaConfig> {
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
