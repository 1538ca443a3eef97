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
    /// By what a model was stretched to longer texts than it began with, none at first.
    pub rope_scaling: Option<RopeScaling>,
    /// Whether a step sees none after it, as decoding and language models need. If not, as in models of images, it sees all
    /// steps of its sequence, and there is no cache.
    pub causal: bool,
    /// The tokens that a slot of a new cache has room for, where nothing else is said
    /// ([`LanguageModel::new_cache_for`](crate::nn::LanguageModel::new_cache_for)). It is no limit of the layer.
    pub capacity: usize,
    /// What initial weights are drawn from, together with each parameter's name.
    pub seed: u64,
}

/// How the angles of rotary positions are changed in a model of longer texts than it began with. `rate` is by how much a pair of
/// numbers is turned from one position to the next, `base^(-2i/d_head)`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// All rates are divided by a factor (Chen et al. 2023, arXiv 2306.15595); in config.json `linear`.
    Linear {
        /// By how much longer texts are.
        factor: f64,
    },
    /// As in Llama 3.1; in config.json `llama3`. With the turns that a pair makes in a text of the original length,
    /// `turns = original_length · rate / 2π`:
    ///
    /// ```text
    /// share = (turns - low_turns) / (high_turns - low_turns)      from 0 to 1, cut there
    /// rate  = share · rate + (1 - share) · rate / factor
    /// ```
    Llama3 {
        /// By how much pairs of few turns are slowed down.
        factor: f64,
        /// Pairs of at most so many turns are slowed down wholly: `low_freq_factor`.
        low_turns: f64,
        /// Pairs of at least so many turns stay as they are: `high_freq_factor`.
        high_turns: f64,
        /// The length of texts before: `original_max_position_embeddings`.
        original_length: usize,
    },
}

impl RopeScaling {
    fn check(&self) -> Result<()> {
        let (Self::Linear { factor } | Self::Llama3 { factor, .. }) = *self;
        if !(factor > 0.0 && factor.is_finite()) {
            return Err(argument("rope_scaling", "a factor above 0", factor));
        }
        if let &Self::Llama3 { low_turns, high_turns, original_length, .. } = self {
            // So written, NaN is refused.
            if !(0.0 <= low_turns && low_turns < high_turns && high_turns.is_finite() && original_length > 0) {
                let expected = "0 <= low_turns < high_turns, and an original_length of at least 1";
                return Err(argument("rope_scaling", expected, format_args!("{self:?}")));
            }
        }
        Ok(())
    }

    /// The rate of a pair whose rate was this before.
    pub(super) fn scaled(&self, rate: f64) -> f64 {
        match *self {
            Self::Linear { factor } => rate / factor,
            Self::Llama3 { factor, low_turns, high_turns, original_length } => {
                let turns = original_length as f64 * rate / std::f64::consts::TAU;
                let share = ((turns - low_turns) / (high_turns - low_turns)).clamp(0.0, 1.0);
                share * rate + (1.0 - share) * rate / factor
            }
        }
    }
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
            rope_scaling: None,
            causal: true,
            capacity: 2048,
            seed: 0,
        }
    }

    /// Refuses to decode by attention that sees what comes after.
    pub(crate) fn check_causal(&self) -> Result<()> {
        match self.causal {
            true => Ok(()),
            false => Err(argument("causal", "true, for prompts and steps of decoding", false)),
        }
    }

    /// By how much each pair of a head's numbers is turned from one position to the next; none without positions.
    pub(super) fn rope_rates(&self) -> Option<Vec<f64>> {
        let (theta, d_head) = (self.rope_theta?, self.d_head);
        let rate = |i: usize| theta.powf(-2.0 * i as f64 / d_head as f64);
        let scaled = |rate: f64| self.rope_scaling.map_or(rate, |scaling| scaling.scaled(rate));
        Some((0..d_head / 2).map(rate).map(scaled).collect())
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
        if let Some(scaling) = &self.rope_scaling {
            if self.rope_theta.is_none() {
                return Err(argument("rope_scaling", "none where there is no rope_theta", format_args!("{scaling:?}")));
            }
            scaling.check()?;
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
