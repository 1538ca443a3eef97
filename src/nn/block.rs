//! The Mamba block.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::direction::Direction;
use super::layers::{Linear, Parameters};
use super::{LayerCache, MambaConfig, argument};

/// The Mamba block of Gu and Dao, *Mamba* (2023), arXiv 2312.00752, figure 3:
///
/// ```text
/// x, z    = in_proj(input)
/// u       = silu(conv1d(x))
/// Δ, B, C = dt_proj(x_proj(u)), x_proj(u), x_proj(u)      softplus(Δ + bias) within the scan
/// output  = out_proj(scan(u, Δ, A, B, C, D) · silu(z))    A = -exp(A_log)
/// ```
///
/// Parameters have the names that Hugging Face and state-spaces/mamba give them: `in_proj`, `conv1d`, `x_proj`, `dt_proj`,
/// `A_log`, `D`, `out_proj`, and with weighted norms `dt_layernorm`, `b_layernorm`, `c_layernorm`. `A_log`, `D`, the bias of
/// `dt_proj` and the convolution are `f32` in a model of any type.
///
/// With [`bidirectional`](MambaConfig::bidirectional) there is a second direction as in Vision Mamba (Zhu et al. 2024,
/// arXiv 2401.09417): it shares `in_proj`, `z` and `out_proj`, and has a convolution, `x_proj`, `dt_proj`, A and D of its
/// own (`conv1d_b`, `x_proj_b`, `dt_proj_b`, `A_b_log`, `D_b`), which run from the last step to the first. The outputs of
/// the two scans are added.
///
/// Without [`selective`](MambaConfig::selective), parameters `B`, `C` (each `(d_inner, d_state)`) and `dt_bias` stand in
/// place of `x_proj` and `dt_proj`.
#[derive(Debug, Clone)]
pub struct Mamba {
    config: MambaConfig,
    in_proj: Linear,
    out_proj: Linear,
    forwards: Direction,
    backwards: Option<Direction>,
}

impl Mamba {
    /// A block with the parameters of `vb`. Those that a [`VarMap`](candle_nn::VarMap) does not have yet are drawn as in
    /// the paper, from the configuration's seed and the parameters' names.
    ///
    /// # Errors
    /// A size that makes no block; a parameter that is missing or of another shape, by name.
    pub fn new(config: &MambaConfig, vb: VarBuilder) -> Result<Self> {
        Self::with_shrunk_output(config, &Parameters::new(vb, config.seed), 1.0)
    }

    /// A block whose `out_proj` begins smaller.
    pub(super) fn with_shrunk_output(config: &MambaConfig, parameters: &Parameters, shrink: f64) -> Result<Self> {
        config.check()?;
        let &MambaConfig { d_model, d_inner, proj_bias, .. } = config;
        Ok(Self {
            in_proj: Linear::new(&parameters.pp("in_proj"), [d_model, 2 * d_inner], proj_bias, 1.0)?,
            forwards: Direction::new(config, parameters, false)?,
            backwards: config.bidirectional.then(|| Direction::new(config, parameters, true)).transpose()?,
            out_proj: Linear::new(&parameters.pp("out_proj"), [d_inner, d_model], proj_bias, shrink)?,
            config: config.clone(),
        })
    }

    /// The block's sizes and variants.
    pub fn config(&self) -> &MambaConfig {
        &self.config
    }

    /// Runs whole sequences: `(batch, length, d_model)` to the same shape. Differentiable.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, None)
    }

    /// Runs sequences that lie one behind another: `x` is `(1, length, d_model)`, and sequence `i` takes the steps from
    /// `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Each gets what it would get alone. Differentiable.
    pub fn forward_packed(&self, x: &Tensor, cu_seqlens: &[usize]) -> Result<Tensor> {
        self.run(x, Some(cu_seqlens))
    }

    fn run(&self, x: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<Tensor> {
        let (x, z) = self.project(x)?;
        let mut y = self.forwards.forward(&x, &z, cu_seqlens)?;
        if let Some(backwards) = &self.backwards {
            y = (y + backwards.forward(&x, &z, cu_seqlens)?)?;
        }
        self.out_proj.forward(&y)
    }

    /// Runs sequences on from the states of a cache, and leaves there the states behind them: a prompt, whole or chunk by
    /// chunk. `x` is `(batch, length, d_model)`.
    ///
    /// Row `i` uses slot `slots[i]` of the cache, or slot `i` if there are no `slots`, the cache then having one for each
    /// row. A row whose slot is negative is padding: it touches no state, and what comes out of it means nothing.
    ///
    /// # Errors
    /// A bidirectional block: its second direction needs what comes later. A cache of another shape, or slots that do not
    /// fit; nothing is written then.
    pub fn prefill(&self, x: &Tensor, cache: &LayerCache, slots: Option<&[i32]>) -> Result<Tensor> {
        self.extend(x, None, cache, slots)
    }

    /// As [`Mamba::prefill`], for sequences that lie one behind another as in [`Mamba::forward_packed`]; sequence `i` uses
    /// slot `slots[i]`.
    pub fn prefill_packed(
        &self,
        x: &Tensor,
        cu_seqlens: &[usize],
        cache: &LayerCache,
        slots: Option<&[i32]>,
    ) -> Result<Tensor> {
        self.extend(x, Some(cu_seqlens), cache, slots)
    }

    fn extend(
        &self,
        x: &Tensor,
        cu_seqlens: Option<&[usize]>,
        cache: &LayerCache,
        slots: Option<&[i32]>,
    ) -> Result<Tensor> {
        self.check_causal()?;
        let sequences = match cu_seqlens {
            Some(offsets) => offsets.len().saturating_sub(1),
            None => x.dim(0)?,
        };
        let slots = cache.check(&self.config, sequences, slots)?;
        let (x, z) = self.project(x)?;
        let states = cache.load(&slots, sequences)?;
        let (y, states) = self.forwards.extend(&x, &z, cu_seqlens, &states)?;
        let out = self.out_proj.forward(&y)?;
        cache.store(&states, &slots, sequences)?;
        Ok(out)
    }

    /// Carries the states of a cache through the next token of each row, or through a few: `x` is
    /// `(batch, tokens, d_model)`. Slots are those of [`Mamba::prefill`].
    ///
    /// # Errors
    /// As [`Mamba::prefill`].
    pub fn step(&self, x: &Tensor, cache: &LayerCache, slots: Option<&[i32]>) -> Result<Tensor> {
        self.check_causal()?;
        cache.check(&self.config, x.dim(0)?, slots)?;
        let (x, z) = self.project(x)?;
        self.out_proj.forward(&self.forwards.step(&x, &z, cache, slots)?)
    }

    pub(super) fn check_causal(&self) -> Result<()> {
        if self.backwards.is_some() {
            let got = "a bidirectional block, whose second direction needs the whole sequence";
            return Err(argument("bidirectional", "false for prefill and decoding", got));
        }
        Ok(())
    }

    /// The scan's input and gate, views of what `in_proj` gives.
    fn project(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let (d_model, d_inner) = (self.config.d_model, self.config.d_inner);
        match x.dims() {
            [_, _, width] if *width == d_model => {}
            dims => return Err(argument("x", format_args!("(batch, length, {d_model})"), format_args!("{dims:?}"))),
        }
        let xz = self.in_proj.forward(x)?;
        Ok((xz.narrow(2, 0, d_inner)?, xz.narrow(2, d_inner, d_inner)?))
    }

    pub(super) fn map(&self, f: &impl Fn(&Tensor) -> Tensor) -> Result<Self> {
        Ok(Self {
            config: self.config.clone(),
            in_proj: self.in_proj.map(f),
            out_proj: self.out_proj.map(f),
            forwards: self.forwards.map(f)?,
            backwards: self.backwards.as_ref().map(|direction| direction.map(f)).transpose()?,
        })
    }

    /// The same block, sharing its parameters, without gradients: prefill and decoding with it record nothing. Where
    /// training goes on, take a new one after a step, for A is computed here.
    pub fn detach(&self) -> Result<Self> {
        self.map(&Tensor::detach)
    }

    /// Adds the parameters by name.
    pub(super) fn name_tensors(&self, prefix: &str, to: &mut Vec<(String, Tensor)>) {
        self.in_proj.name_tensors(&format!("{prefix}.in_proj"), to);
        self.forwards.name_tensors(prefix, to);
        if let Some(backwards) = &self.backwards {
            backwards.name_tensors(prefix, to);
        }
        self.out_proj.name_tensors(&format!("{prefix}.out_proj"), to);
    }
}
