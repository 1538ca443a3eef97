//! S4 and S4D: layers and deep models of linear time-invariant systems.

mod config;
mod layer;
mod model;

pub use config::{S4Config, S4Head, S4ModelConfig, S4System};
pub use layer::S4Layer;
pub use model::{S4Carry, S4Model, S4State};

use crate::nn::train::Group;

/// The group of a parameter by its name, for [`AdamW::with_groups`](crate::nn::train::AdamW::with_groups) and
/// [`Trainer::with_groups`](crate::nn::train::Trainer::with_groups): that of the systems' own parameters, step sizes,
/// eigenvalues and how the input enters, is trained with its own learning rate, `ssm_learning_rate` times the others',
/// and without decay; so S4's papers have it, with 0.001 beside 0.01. Of the others, matrices decay by `weight_decay`.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap};
/// use selective_scan::nn::train::{AdamW, AdamWConfig};
/// use selective_scan::nn::{S4Model, S4ModelConfig, s4_group};
///
/// let variables = VarMap::new();
/// let config = S4ModelConfig::new(1, 10, 2, 16);
/// S4Model::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
/// AdamW::with_groups(&variables, AdamWConfig::default(), |name| s4_group(name, 0.1, 0.01))?;
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn s4_group(name: &str, ssm_learning_rate: f64, weight_decay: f64) -> Group {
    // `C` and `D` are as the weights of any layer; the papers have no decay for them either.
    let last = name.rsplit('.').next().unwrap_or(name);
    let is_system = matches!(last, "log_delta" | "log_a_real" | "a_imag" | "p" | "b");
    let learning_rate = if is_system { ssm_learning_rate } else { 1.0 };
    let decays = !is_system && last == "weight" && !name.contains("norm");
    Group { learning_rate, weight_decay: if decays { weight_decay } else { 0.0 } }
}
