//! The models, of as many parameters each.

use std::collections::BTreeMap;

use clap::ValueEnum;
use selective_scan::nn::{
    AttentionConfig, BackboneConfig, LanguageModelConfig, LayerConfig, MambaConfig, MixerConfig, MlpConfig,
    RecurrentCell, RecurrentConfig,
};

use crate::{Plan, Result};

/// A kind of model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    Mamba,
    Transformer,
    Lstm,
    Hybrid,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Mamba, Self::Transformer, Self::Lstm, Self::Hybrid];

    pub fn name(self) -> &'static str {
        match self {
            Self::Mamba => "Mamba",
            Self::Transformer => "Transformer",
            Self::Lstm => "LSTM",
            Self::Hybrid => "hybrid",
        }
    }
}

/// Numbers of a head, as many as divide the widths here.
const D_HEAD: usize = 32;

/// A configuration of a kind, by a width inside of its layers.
fn config(kind: Kind, plan: &Plan, width: usize) -> LanguageModelConfig {
    let (d_model, seed) = (plan.d_model, plan.seed);
    let layers = plan.blocks / 2;
    let mamba = MambaConfig { seed, ..MambaConfig::new(d_model) };
    let attention = AttentionConfig { seed, ..AttentionConfig::new(d_model, d_model / D_HEAD) };
    let backbone = match kind {
        Kind::Mamba => BackboneConfig::with_mixer(plan.blocks, mamba),
        Kind::Transformer => BackboneConfig {
            feed_forward: Some(MlpConfig::new(d_model, width).into()),
            ..BackboneConfig::with_mixer(layers, attention)
        },
        Kind::Lstm => {
            let lstm = RecurrentConfig { d_hidden: width, seed, ..RecurrentConfig::new(d_model, RecurrentCell::Lstm) };
            // Few and wide ones, as such models are built; see Zaremba et al. 2014, arXiv 1409.2329.
            BackboneConfig::with_mixer(2, lstm)
        }
        // Jamba has one layer of attention in eight; here there are fewer layers, and one of them is that.
        Kind::Hybrid => {
            let mlp = MlpConfig::new(d_model, width);
            let attention = MixerConfig::Attention(AttentionConfig { rope_theta: None, ..attention });
            BackboneConfig {
                feed_forward: Some(mlp.clone().into()),
                layers: BTreeMap::from([(layers / 2, LayerConfig::new(attention, mlp))]),
                ..BackboneConfig::with_mixer(layers, mamba)
            }
        }
    };
    LanguageModelConfig { backbone, ..LanguageModelConfig::new(256, layers, d_model) }
}

/// A configuration of each kind that is compared, whose widths are those that come closest to Mamba's number of parameters.
pub fn equally_large(plan: &Plan) -> Result<Vec<(Kind, LanguageModelConfig)>> {
    let wanted = config(Kind::Mamba, plan, 0).parameter_count()?;
    let mut all = Vec::new();
    for &kind in &plan.models {
        let mut best = config(kind, plan, 8);
        for width in (8..8 * plan.d_model).step_by(4) {
            let next = config(kind, plan, width);
            if next.parameter_count()?.abs_diff(wanted) < best.parameter_count()?.abs_diff(wanted) {
                best = next;
            }
        }
        all.push((kind, best));
    }
    Ok(all)
}
