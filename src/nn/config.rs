//! What a block and a language model are made of: sizes and variants.

use candle_core::Result;
use serde_json::{Map, Value};

use super::argument;

/// A Mamba block. [`MambaConfig::new`] gives the paper's; change what differs.
#[derive(Debug, Clone, PartialEq)]
pub struct MambaConfig {
    /// The width of the block's input and output.
    pub d_model: usize,
    /// The channels inside, 2 `d_model` in the paper.
    pub d_inner: usize,
    /// The states of each channel, 16 in the paper; 1 to 256.
    pub d_state: usize,
    /// The width of the convolution, 4 in the paper; 2 to 8.
    pub d_conv: usize,
    /// The rank of the projection that gives the step sizes, `d_model / 16` rounded up in the paper.
    pub dt_rank: usize,
    /// Whether the convolution has a bias.
    pub conv_bias: bool,
    /// Whether `in_proj` and `out_proj` have a bias.
    pub proj_bias: bool,
    /// Norms of what the step size, B and C are made from.
    pub norms: Norms,
    /// A second convolution and scan that run from the last step to the first; their outputs are added before `out_proj`.
    /// See [`Mamba`](super::Mamba) for what the second direction has of its own. There is no decoding step then.
    pub bidirectional: bool,
    /// Whether the outputs of the two directions are halved once they are added, as in the released models of Vision Mamba
    /// (`if_divide_out` there). Only where there are two.
    pub average_directions: bool,
    /// Whether the step size, B and C are projected from the input, which makes the scan selective. If not, they are
    /// parameters, the same at every step: a diagonal, real S4 (S4D) in the same block, for comparison.
    pub selective: bool,
    /// At initialization, step sizes are spread log-uniformly from here, 0.001 in the paper…
    pub dt_min: f64,
    /// …to here, 0.1 in the paper.
    pub dt_max: f64,
    /// The least step size at initialization.
    pub dt_init_floor: f64,
    /// At initialization, the weights of `dt_proj` are uniform within `dt_scale / √dt_rank`.
    pub dt_scale: f64,
    /// What initial weights are drawn from, together with each parameter's name.
    pub seed: u64,
}

/// The RMS norms of the low-rank step size, B and C, before they are used.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Norms {
    /// None, as in Mamba.
    None,
    /// With learned weights, as in Jamba.
    Weighted {
        /// Added to the mean square.
        eps: f64,
    },
    /// Without weights, as in Falcon Mamba.
    Unweighted {
        /// Added to the mean square.
        eps: f64,
    },
}

impl MambaConfig {
    /// The paper's block of width `d_model`.
    pub fn new(d_model: usize) -> Self {
        Self {
            d_model,
            // What is too large for a model is refused when one is made of it.
            d_inner: d_model.saturating_mul(2),
            d_state: 16,
            d_conv: 4,
            dt_rank: d_model.div_ceil(16),
            conv_bias: true,
            proj_bias: false,
            norms: Norms::None,
            bidirectional: false,
            average_directions: false,
            selective: true,
            dt_min: 0.001,
            dt_max: 0.1,
            dt_init_floor: 1e-4,
            dt_scale: 1.0,
            seed: 0,
        }
    }

    /// Checks all that can be wrong in a configuration, so that no layer is built from half of one.
    pub(crate) fn check(&self) -> Result<()> {
        let sizes = [("d_model", self.d_model), ("d_inner", self.d_inner), ("dt_rank", self.dt_rank)];
        for (name, size) in sizes {
            if size == 0 {
                return Err(argument(name, "at least 1", size));
            }
        }
        if !(1..=crate::MAX_D_STATE).contains(&self.d_state) {
            return Err(argument("d_state", format_args!("1 to {}", crate::MAX_D_STATE), self.d_state));
        }
        let widths = crate::conv::WIDTHS;
        if !widths.contains(&self.d_conv) {
            return Err(argument("d_conv", format_args!("{} to {}", widths.start(), widths.end()), self.d_conv));
        }
        // Not `dt_min <= 0`, which NaN would pass.
        if !(self.dt_min > 0.0 && self.dt_max >= self.dt_min && self.dt_max.is_finite()) {
            let got = format_args!("{} and {}", self.dt_min, self.dt_max);
            return Err(argument("dt_min, dt_max", "0 < dt_min <= dt_max", got));
        }
        if !(self.dt_init_floor > 0.0 && self.dt_init_floor.is_finite()) {
            return Err(argument("dt_init_floor", "a step size above 0", self.dt_init_floor));
        }
        if !(self.dt_scale > 0.0 && self.dt_scale.is_finite()) {
            return Err(argument("dt_scale", "a factor above 0", self.dt_scale));
        }
        if self.average_directions && !self.bidirectional {
            return Err(argument("average_directions", "false where `bidirectional` is false", "true"));
        }
        if let Norms::Weighted { eps } | Norms::Unweighted { eps } = self.norms {
            check_eps("norms", eps)?;
            if !self.selective {
                return Err(argument("norms", "none where `selective` is false: nothing is projected", "some"));
            }
        }
        self.parameter_count().map(|_| ())
    }

    /// The number of parameters of a block.
    ///
    /// # Errors
    /// More than can be counted.
    pub(crate) fn parameter_count(&self) -> Result<usize> {
        let &Self { d_model, d_inner, d_state, d_conv, dt_rank, .. } = self;
        let given = |is: bool, size: usize| if is { size } else { 0 };
        let weighted = matches!(self.norms, Norms::Weighted { .. });
        let direction: &[[usize; 3]] = &[
            [d_inner, d_conv, 1],
            [d_inner, given(self.conv_bias, 1), 1],
            // A; D and the bias of the step size.
            [d_inner, d_state, 1],
            [d_inner, 2, 1],
            // B and C, or what projects to them and to the step size.
            [d_inner, d_state, 2],
            [d_inner, dt_rank, given(self.selective, 2)],
            [given(weighted, 1), dt_rank, 1],
            [given(weighted, 1), d_state, 2],
        ];
        let block =
            [[d_model, d_inner, 3], [d_inner, given(self.proj_bias, 2), 1], [d_model, given(self.proj_bias, 1), 1]];
        let direction = sum(direction).and_then(|count| count.checked_mul(1 + usize::from(self.bidirectional)));
        let count = sum(&block).and_then(|count| count.checked_add(direction?));
        count.filter(|count| *count <= COUNTABLE).ok_or_else(|| {
            let got = format_args!("{d_model}, {d_inner} and {dt_rank}");
            argument("d_model, d_inner, dt_rank", "sizes whose parameters can be counted", got)
        })
    }
}

/// So many parameters have an address each, in any type.
const COUNTABLE: usize = isize::MAX as usize / 8;

/// The elements of all shapes together, if they can be counted.
fn sum(shapes: &[[usize; 3]]) -> Option<usize> {
    let product = |shape: &[usize; 3]| shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size));
    shapes.iter().try_fold(0usize, |total, shape| total.checked_add(product(shape)?))
}

/// A language model of Mamba blocks: embeddings, `n_layer` times a norm and a block around which the residual stream
/// runs, a last norm, and the head.
#[derive(Debug, Clone, PartialEq)]
pub struct LanguageModelConfig {
    /// The number of tokens. Where the embedding matrix has more rows, see
    /// [`padded_vocab_size`](Self::padded_vocab_size), those from here on are padding, and no token.
    pub vocab_size: usize,
    /// The embedding matrix has as many rows as the vocabulary rounded up to a multiple of this: 1 without padding.
    pub pad_vocab_size_multiple: usize,
    /// The number of blocks.
    pub n_layer: usize,
    /// The blocks.
    pub mamba: MambaConfig,
    /// Added to the mean square in the RMS norms between the blocks, 1e-5 in the paper.
    pub norm_eps: f64,
    /// Keep the residual stream in `f32` where the model is of a half type.
    pub residual_in_f32: bool,
    /// Use the embedding matrix as the head.
    pub tie_embeddings: bool,
    /// At initialization, shrink `out_proj` by `√n_layer`, so that the residual stream does not grow with depth.
    pub rescale_prenorm_residual: bool,
    /// What else a config.json says, key by key: the ids of special tokens, what other programs have left there. It is
    /// written again where the naming has room for it, see [`to_json`](Self::to_json). Keys that the other fields stand
    /// for are ignored here, and a special token that is not here is none.
    pub extra: Map<String, Value>,
}

impl LanguageModelConfig {
    /// A model of `n_layer` blocks as the paper has them.
    pub fn new(vocab_size: usize, n_layer: usize, d_model: usize) -> Self {
        Self {
            vocab_size,
            pad_vocab_size_multiple: 1,
            n_layer,
            mamba: MambaConfig::new(d_model),
            norm_eps: 1e-5,
            residual_in_f32: true,
            tie_embeddings: true,
            rescale_prenorm_residual: true,
            extra: Map::new(),
        }
    }

    /// The rows of the embedding matrix and of the head, and so the width of the logits: `vocab_size` rounded up to a
    /// multiple of `pad_vocab_size_multiple`. What the rows from `vocab_size` on answer means nothing;
    /// [`Sampling::vocab_size`](super::Sampling::vocab_size) keeps a sampler from choosing them.
    pub fn padded_vocab_size(&self) -> usize {
        // What overflows is refused by `check`.
        self.vocab_size.checked_next_multiple_of(self.pad_vocab_size_multiple).unwrap_or(self.vocab_size)
    }

    /// The tokens that end a text, by the key `eos_token_id` of [`extra`](Self::extra), which has one or a list.
    pub fn eos_token_ids(&self) -> Vec<u32> {
        match self.extra.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.iter().filter_map(token).collect(),
            id => id.and_then(token).into_iter().collect(),
        }
    }

    /// The token that begins a text, by the key `bos_token_id` of [`extra`](Self::extra).
    pub fn bos_token_id(&self) -> Option<u32> {
        self.extra.get("bos_token_id").and_then(token)
    }

    /// The token that fills up shorter rows of a batch, by the key `pad_token_id` of [`extra`](Self::extra).
    pub fn pad_token_id(&self) -> Option<u32> {
        self.extra.get("pad_token_id").and_then(token)
    }

    pub(crate) fn check(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("pad_vocab_size_multiple", self.pad_vocab_size_multiple),
            ("n_layer", self.n_layer),
        ];
        for (name, size) in sizes {
            if size == 0 {
                return Err(argument(name, "at least 1", size));
            }
        }
        if self.vocab_size.checked_next_multiple_of(self.pad_vocab_size_multiple).is_none() {
            let got = format_args!("{} rounded up to a multiple of {}", self.vocab_size, self.pad_vocab_size_multiple);
            return Err(argument("vocab_size", "a size that a matrix can have", got));
        }
        check_eps("norm_eps", self.norm_eps)?;
        self.mamba.check()?;
        // Samplers give tokens as `u32`.
        if u32::try_from(self.vocab_size).is_err() {
            return Err(argument("vocab_size", "less than 2^32", self.vocab_size));
        }
        self.parameter_count().map(|_| ())
    }

    /// The number of parameters of a model.
    ///
    /// # Errors
    /// More than can be counted.
    pub(crate) fn parameter_count(&self) -> Result<usize> {
        let d_model = self.mamba.d_model;
        let matrices = if self.tie_embeddings { 1 } else { 2 };
        let embeddings = sum(&[[self.padded_vocab_size(), d_model, matrices]]).filter(|count| *count <= COUNTABLE);
        let embeddings = embeddings.ok_or_else(|| {
            let got = format_args!("{} and {d_model}", self.vocab_size);
            argument("vocab_size, d_model", "sizes whose parameters can be counted", got)
        })?;
        let layers =
            sum(&[[self.n_layer, self.mamba.parameter_count()?, 1], [self.n_layer, d_model, 1], [d_model, 1, 1]]);
        let count = layers.and_then(|layers| layers.checked_add(embeddings));
        count
            .filter(|count| *count <= COUNTABLE)
            .ok_or_else(|| argument("n_layer", "layers whose parameters can be counted", self.n_layer))
    }
}

fn token(id: &Value) -> Option<u32> {
    id.as_u64()?.try_into().ok()
}

fn check_eps(name: &'static str, eps: f64) -> Result<()> {
    if eps >= 0.0 && eps.is_finite() { Ok(()) } else { Err(argument(name, "an epsilon of 0 or more", eps)) }
}
