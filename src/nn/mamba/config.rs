//! What a Mamba block is made of: sizes and variants.

use candle_core::Result;

use crate::nn::{COUNTABLE, argument, check_eps, sum};
use crate::scan::CheckpointSteps;

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
    /// Whether a backward pass computes the output of the convolution and the step sizes again, for which training takes a few
    /// per cent longer, rather than that they are kept, which takes 2 `d_inner` more elements for each step and layer.
    pub recompute: bool,
    /// How far apart the states lie that a forward pass of the scan keeps for its backward pass.
    pub checkpoint_steps: CheckpointSteps,
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
            recompute: true,
            checkpoint_steps: CheckpointSteps::default(),
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
