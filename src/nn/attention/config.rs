//! What an attention layer is made of: sizes and variants.

use candle_core::Result;

use crate::attention::MAX_D_HEAD;
use crate::nn::{COUNTABLE, argument, sum};

/// An attention layer. [`AttentionConfig::new`] gives heads of their own with rotary positions; change what differs.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionConfig {
    /// The width of the layer's input and output.
    pub d_model: usize,
    /// The heads of queries.
    pub n_head: usize,
    /// The heads of keys and values, each of which `n_head / n_kv_head` heads of queries read.
    pub n_kv_head: usize,
    /// The width of a head, `d_model / n_head` in most models; 256 at most.
    pub d_head: usize,
    /// Whether the projections to queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether the projection of the output has a bias.
    pub out_bias: bool,
    /// The base of rotary positions (Su et al. 2021, arXiv 2104.09864), 10,000 there: pair `i` of a head's numbers, `i` and
    /// `i + d_head/2`, is turned by `position · base^(-2i/d_head)`. Without, the layer knows no positions, as Jamba's.
    pub rope_theta: Option<f64>,
    /// The tokens that a slot of a new cache has room for, where nothing else is said
    /// ([`LanguageModel::new_cache_for`](crate::nn::LanguageModel::new_cache_for)). It is no limit of the layer.
    pub capacity: usize,
    /// What initial weights are drawn from, together with each parameter's name.
    pub seed: u64,
}

impl AttentionConfig {
    /// `n_head` heads of queries, keys and values of width `d_model / n_head`, with rotary positions and without biases.
    pub fn new(d_model: usize, n_head: usize) -> Self {
        Self {
            d_model,
            n_head,
            n_kv_head: n_head,
            // A number of heads that divides nothing is refused when a layer is made of it.
            d_head: d_model.checked_div(n_head).unwrap_or(0),
            qkv_bias: false,
            out_bias: false,
            rope_theta: Some(10_000.0),
            capacity: 2048,
            seed: 0,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        for (name, size) in [("d_model", self.d_model), ("n_head", self.n_head), ("n_kv_head", self.n_kv_head)] {
            if size == 0 {
                return Err(argument(name, "at least 1", size));
            }
        }
        if !self.n_head.is_multiple_of(self.n_kv_head) {
            return Err(argument("n_kv_head", format_args!("a divisor of n_head, {}", self.n_head), self.n_kv_head));
        }
        if !(1..=MAX_D_HEAD).contains(&self.d_head) {
            return Err(argument("d_head", format_args!("1 to {MAX_D_HEAD}"), self.d_head));
        }
        if let Some(theta) = self.rope_theta {
            if !(theta > 0.0 && theta.is_finite()) {
                return Err(argument("rope_theta", "a base above 0", theta));
            }
            if !self.d_head.is_multiple_of(2) {
                return Err(argument("d_head", "an even number, for rotary positions", self.d_head));
            }
        }
        self.parameter_count().map(|_| ())
    }

    /// The number of parameters of a layer.
    ///
    /// # Errors
    /// More than can be counted.
    pub(crate) fn parameter_count(&self) -> Result<usize> {
        let &Self { d_model, n_head, n_kv_head, d_head, .. } = self;
        let (qkv_bias, out_bias) = (usize::from(self.qkv_bias), usize::from(self.out_bias));
        let overflow =
            || argument("d_model, n_head", "sizes whose parameters can be counted", format_args!("{self:?}"));
        let widths = [n_head, n_kv_head].map(|heads| heads.checked_mul(d_head));
        let [Some(queries), Some(keys)] = widths else { return Err(overflow()) };
        let count = sum(&[
            [d_model, queries, 2],
            [d_model, keys, 2],
            [queries, qkv_bias, 1],
            [keys, qkv_bias, 2],
            [d_model, out_bias, 1],
        ]);
        count.filter(|count| *count <= COUNTABLE).ok_or_else(overflow)
    }
}
