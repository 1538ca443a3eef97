//! A mixture of experts.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{Module, VarBuilder};

use super::mlp::check_rows;
use super::{ExpertsConfig, FeedForwardConfig, Mlp, MlpConfig};
use crate::candle::node;
use crate::nn::argument;
use crate::nn::layers::{Linear, ParameterList, Parameters};

/// A mixture of experts as Jamba has it (Lieber et al. 2024, arXiv 2403.19887):
///
/// ```text
/// p      = softmax(router(x))                    over the experts, in f32
/// output = Σ p_e expert_e(x)                     over the top_k greatest of p, which are not divided by their sum
/// ```
///
/// Each step goes through the experts that it has chosen, however many choose the same: none is dropped. An expert computes its
/// steps together, and which these are is read on the host. Of equal probabilities the first expert's is taken.
///
/// Parameters are `router.weight` and, for each expert, `experts.N.` and the names of an [`Mlp`].
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::{VarBuilder, VarMap};
/// use selective_scan::nn::{Experts, ExpertsConfig};
///
/// let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// // Four experts, two for each step.
/// let experts = Experts::new(&ExpertsConfig::new(16, 40, 4, 2), 0, vb)?;
/// let x = Tensor::randn(0f32, 1.0, (2, 5, 16), &Device::Cpu)?;
/// assert_eq!(experts.forward(&x)?.dims(), [2, 5, 16]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Experts {
    config: ExpertsConfig,
    router: Linear,
    experts: Vec<Mlp>,
    parameters: ParameterList,
}

impl Experts {
    /// Experts with the parameters of `vb`, which compute in its type. Those that a [`VarMap`](candle_nn::VarMap) does not have
    /// yet are drawn, from `seed` and the parameters' names.
    ///
    /// # Errors
    /// A size that makes no experts, or one that does not fit in memory; a parameter that is missing or of another shape, by
    /// name.
    pub fn new(config: &ExpertsConfig, seed: u64, vb: VarBuilder) -> Result<Self> {
        let all = FeedForwardConfig::Experts(config.clone());
        all.check()?;
        crate::nn::check_model_dtype(vb.dtype())?;
        let parameters = Parameters::new(vb, seed);
        parameters.pp("router").check_room("weight", "d_inner", all.parameter_count()?)?;
        Self::build(config, &parameters, 1.0)
    }

    /// Experts whose initial `down_proj` is divided by a number.
    pub(crate) fn build(config: &ExpertsConfig, parameters: &Parameters, divisor: f64) -> Result<Self> {
        let taken = parameters.count();
        let &ExpertsConfig { d_model, d_inner, count, .. } = config;
        let router = Linear::new(&parameters.pp("router"), [d_model, count], false, 1.0)?;
        let (mlp, parent) = (MlpConfig::new(d_model, d_inner), parameters.pp("experts"));
        let experts = (0..count).map(|index| Mlp::build(&mlp, &parent.pp(index), divisor)).collect::<Result<_>>()?;
        Ok(Self { config: config.clone(), router, experts, parameters: parameters.taken_since(taken) })
    }

    /// The sizes.
    pub fn config(&self) -> &ExpertsConfig {
        &self.config
    }

    /// Of every row, `(.., d_model)`, the same shape. Differentiable: the choice is constant to it, and what is chosen is not. Of
    /// no rows there is nothing.
    ///
    /// # Errors
    /// Rows of another width or type; a router whose results are no numbers.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let d_model = self.config.d_model;
        check_rows(x, d_model, self.router.dtype())?;
        if x.elem_count() == 0 {
            return x.zeros_like();
        }
        let rows = x.contiguous()?.reshape(((), d_model))?;
        let logits = self.router.forward(&rows)?.to_dtype(DType::F32)?;
        let probabilities = candle_nn::ops::softmax(&logits, D::Minus1)?;
        let chosen = self.choose(&probabilities.detach().to_vec2()?)?;
        let all_probabilities = probabilities.flatten_all()?;
        let mut sum = Tensor::zeros(rows.shape(), DType::F32, rows.device())?;
        let mut idle = Vec::new();
        for (index, (expert, rows_of_it)) in self.experts.iter().zip(chosen).enumerate() {
            if rows_of_it.is_empty() {
                idle.extend(expert.tracked());
                continue;
            }
            let places: Vec<u32> = rows_of_it.iter().map(|row| row * self.config.count as u32 + index as u32).collect();
            let count = places.len();
            let places = Tensor::from_vec(places, count, rows.device())?;
            let rows_of_it = Tensor::from_vec(rows_of_it, count, rows.device())?;
            let out = expert.forward(&rows.index_select(&rows_of_it, 0)?)?.to_dtype(DType::F32)?;
            let weights = all_probabilities.index_select(&places, 0)?.unsqueeze(1)?;
            sum = sum.index_add(&rows_of_it, &out.broadcast_mul(&weights)?, 0)?;
        }
        with_zero_gradients(sum, &idle)?.to_dtype(x.dtype())?.reshape(x.shape())
    }

    /// The rows of each expert, in their order, from the probabilities of every row.
    fn choose(&self, probabilities: &[Vec<f32>]) -> Result<Vec<Vec<u32>>> {
        // Numbers of a row and of an expert, together, are a `u32`.
        if probabilities.len().checked_mul(self.config.count).is_none_or(|count| u32::try_from(count).is_err()) {
            return Err(argument("x", "fewer rows than 2^32 by the number of experts", probabilities.len()));
        }
        let mut chosen = vec![Vec::new(); self.config.count];
        for (row, probabilities) in probabilities.iter().enumerate() {
            if probabilities.iter().any(|p| p.is_nan()) {
                return Err(argument("x", "rows for which the router gives numbers", format_args!("row {row}")));
            }
            let mut order: Vec<usize> = (0..probabilities.len()).collect();
            // Stable: of equal ones the first stays first.
            order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]));
            order[..self.config.top_k].iter().for_each(|&expert| chosen[expert].push(row as u32));
        }
        Ok(chosen)
    }

    /// All parameters by name, in the order in which the experts use them.
    pub fn named_tensors(&self) -> Vec<(String, Tensor)> {
        self.parameters.named_tensors()
    }
}

impl Module for Experts {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Self::forward(self, x)
    }
}

/// The same, on which parameters depend that had no part in it: an optimizer wants a gradient of each.
fn with_zero_gradients(sum: Tensor, parameters: &[Tensor]) -> Result<Tensor> {
    if parameters.is_empty() {
        return Ok(sum);
    }
    let inputs: Vec<_> = [&sum].into_iter().chain(parameters).collect();
    let like: Vec<_> = parameters.iter().map(Tensor::detach).collect();
    let backward = move |d_out: &Tensor| {
        let zeros = like.iter().map(|parameter| parameter.zeros_like().map(Some));
        [Ok(Some(d_out.clone()))].into_iter().chain(zeros).collect()
    };
    // SAFETY: the copy is a tensor of its own, of which no other handle is left.
    unsafe { node("idle-experts", &inputs, sum.detach().copy()?, backward) }
}
