//! What layers and models of S4 are made of.

use candle_core::Result;

use crate::MAX_D_STATE;
use crate::lti::Rule;
use crate::lti::hippo::{Initial, Measure};
use crate::nn::argument;

/// The system of every channel of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum S4System {
    /// S4D: diagonal, with these eigenvalues in the beginning.
    Diagonal {
        /// The eigenvalues in the beginning.
        initial: Initial,
        /// How it is discretized.
        rule: Rule,
    },
    /// S4: diagonal less low rank, as HiPPO's measure has it in the beginning, discretized by the bilinear rule. Decay
    /// rates of zero, as those of LegT and of the Fourier measure, begin as 1e-4. It is trained with kernels of
    /// `kernel_length` steps, which sequences may not be longer than.
    LowRank {
        /// The measure in the beginning.
        measure: Measure,
        /// The steps of the kernels.
        kernel_length: usize,
    },
}

impl Default for S4System {
    fn default() -> Self {
        Self::Diagonal { initial: Initial::default(), rule: Rule::default() }
    }
}

/// A layer of S4. [`S4Config::new`] gives S4D-Lin; change what differs.
#[derive(Debug, Clone, PartialEq)]
pub struct S4Config {
    /// The width of the layer's input and output: so many systems stand side by side.
    pub d_model: usize,
    /// The pairs of conjugate states of each system, 32 in the papers; 1 to 256.
    pub d_state: usize,
    /// The systems.
    pub system: S4System,
    /// A second direction, from the last step to the first: the same systems, read by another `C`, whose outputs are
    /// added. There is no step of decoding then.
    pub bidirectional: bool,
    /// At initialization, step sizes are spread log-uniformly from here, 0.001 in the papers…
    pub dt_min: f64,
    /// …to here, 0.1 in the papers.
    pub dt_max: f64,
    /// What initial weights are drawn from, together with each parameter's name.
    pub seed: u64,
}

impl S4Config {
    /// S4D-Lin as in its paper: 32 pairs, one direction.
    pub fn new(d_model: usize) -> Self {
        Self {
            d_model,
            d_state: 32,
            system: S4System::default(),
            bidirectional: false,
            dt_min: 0.001,
            dt_max: 0.1,
            seed: 0,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.d_model == 0 {
            return Err(argument("d_model", "at least 1", 0));
        }
        if !(1..=MAX_D_STATE).contains(&self.d_state) {
            return Err(argument("d_state", format_args!("from 1 to {MAX_D_STATE}"), self.d_state));
        }
        if !(self.dt_min > 0.0 && self.dt_max >= self.dt_min && self.dt_max.is_finite()) {
            let got = format_args!("{} and {}", self.dt_min, self.dt_max).to_string();
            return Err(argument("dt_min, dt_max", "positive step sizes in order", got));
        }
        match self.system {
            S4System::LowRank { kernel_length: 0, .. } => Err(argument("kernel_length", "at least 1", 0)),
            _ => Ok(()),
        }
    }
}

/// What a model gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum S4Head {
    /// One output for a sequence, of the mean over its steps.
    #[default]
    Pooled,
    /// One output for each step.
    PerStep,
}

/// A deep model: an encoder, layers of S4 around a residual stream, each after a norm, a last norm and a head.
#[derive(Debug, Clone, PartialEq)]
pub struct S4ModelConfig {
    /// The numbers that a step of the input has.
    pub d_input: usize,
    /// The numbers that an output has.
    pub d_output: usize,
    /// The number of layers.
    pub n_layer: usize,
    /// The layers, all of them alike. Each draws its weights from the seed and its own name.
    pub layer: S4Config,
    /// What is given.
    pub head: S4Head,
    /// Added to the mean square in the norms.
    pub norm_eps: f64,
}

impl S4ModelConfig {
    /// `n_layer` layers of S4D-Lin of width `d_model`, pooled.
    pub fn new(d_input: usize, d_output: usize, n_layer: usize, d_model: usize) -> Self {
        Self { d_input, d_output, n_layer, layer: S4Config::new(d_model), head: S4Head::default(), norm_eps: 1e-5 }
    }

    pub(super) fn check(&self) -> Result<()> {
        for (name, size) in [("d_input", self.d_input), ("d_output", self.d_output)] {
            if size == 0 {
                return Err(argument(name, "at least 1", 0));
            }
        }
        crate::nn::check_eps("norm_eps", self.norm_eps)?;
        self.layer.check()
    }
}
