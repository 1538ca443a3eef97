//! The Mamba block.

use std::borrow::Cow;

use candle_core::{Result, Tensor};
use candle_nn::{Module, VarBuilder};

use super::parts::{Parts, rows};
use super::{MambaConfig, MambaState, TokenStates};
use crate::candle::Slots;
use crate::count_sequences;
use crate::nn::decode::PoolWrites;
use crate::nn::layers::{Change, Converted, Gradients, ParameterList, Parameters, node_over};
use crate::nn::{argument, check_room};

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
/// the two scans are added, and with [`average_directions`](MambaConfig::average_directions) halved.
///
/// Without [`selective`](MambaConfig::selective), parameters `B`, `C` (each `(d_inner, d_state)`) and `dt_bias` stand in
/// place of `x_proj` and `dt_proj`.
#[derive(Debug, Clone)]
pub struct Mamba {
    config: MambaConfig,
    parts: Parts,
    parameters: ParameterList,
}

impl Mamba {
    /// A block with the parameters of `vb`, which computes in its type. Those that a [`VarMap`](candle_nn::VarMap) does
    /// not have yet are drawn as in the paper, from the configuration's seed and the parameters' names; variables of
    /// another type that it has are trained as they are, see [types](crate::nn#types).
    ///
    /// # Errors
    /// A size that makes no block, or one that does not fit in memory; a parameter that is missing or of another shape, by
    /// name.
    pub fn new(config: &MambaConfig, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        let parameters = Parameters::new(vb, config.seed);
        parameters.pp("in_proj").check_room("weight", "d_model, d_inner", config.parameter_count()?)?;
        Self::build(config, &parameters, 1.0)
    }

    /// A block whose initial `out_proj` is divided by a number.
    pub(crate) fn build(config: &MambaConfig, parameters: &Parameters, out_proj_divisor: f64) -> Result<Self> {
        let count = parameters.count();
        let parts = Parts::new(config, parameters, out_proj_divisor)?;
        let parameters = parameters.taken_since(count);
        Ok(Self { config: config.clone(), parts, parameters })
    }

    pub(crate) fn parts(&self) -> &Parts {
        &self.parts
    }

    pub(crate) fn parameters(&self) -> &ParameterList {
        &self.parameters
    }

    /// The parameters that a backward pass could reach.
    pub(crate) fn tracked(&self) -> Vec<Tensor> {
        self.parameters.tracked()
    }

    /// The same block, each parameter as `change` gives it.
    fn changed(&self, change: &mut Change) -> Result<Self> {
        Self::build(&self.config, &Parameters::changed(&self.parameters, change), 1.0)
    }

    /// The block's sizes and variants.
    pub fn config(&self) -> &MambaConfig {
        &self.config
    }

    /// Runs whole sequences: `(batch, length, d_model)` to the same shape. Differentiable. Of no steps there are no outputs.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, None)
    }

    /// Runs sequences that lie one after another: `x` is `(1, length, d_model)`, and sequence `i` takes the steps from
    /// `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Each gets what it would get alone. Differentiable.
    pub fn forward_packed(&self, x: &Tensor, cu_seqlens: &[usize]) -> Result<Tensor> {
        self.run(x, Some(cu_seqlens))
    }

    pub(crate) fn run(&self, x: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<Tensor> {
        self.check_input(x, cu_seqlens)?;
        if x.elem_count() == 0 {
            return x.zeros_like();
        }
        if !x.track_op() && !self.parameters.is_tracked() {
            return self.parts.out_proj.apply(&self.parts.forward(x, cu_seqlens)?)?.reshape(x.shape());
        }
        let (parts, shape) = (self.parts.leave_graph(&Converted::of(self.parameters.iter())?)?, x.shape().clone());
        let kept = parts.forward_kept(&x.detach(), cu_seqlens)?;
        let out = parts.out_proj.apply(&kept.y)?.reshape(x.shape())?;
        let is_x_tracked = x.track_op();
        let backward = move |d_out: &Tensor, gradients: &mut Gradients| {
            let d_x = parts.backward(&kept, d_out, is_x_tracked, gradients)?;
            d_x.map(|d_x| d_x.reshape(&shape)).transpose()
        };
        // SAFETY: the output is a tensor of its own, of which no other handle is left.
        unsafe { node_over("mamba", x, &self.parameters.tracked(), out, backward) }
    }

    /// Runs sequences on from the states of a cache, and leaves there the states after them: a prompt, whole or chunk by
    /// chunk. `x` is `(batch, length, d_model)`.
    ///
    /// Row `i` uses slot `slots[i]` of the cache, or slot `i` if `slots` is `None`, the cache then having one for each row. A
    /// row whose slot is negative is padding: it touches no state, and what comes out of it means nothing. Slots are on the
    /// host here; a [tensor](Slots) on a GPU is for [`step`](Self::step).
    ///
    /// Not differentiable, since the states are written in place: candle tracks neither the result nor the states.
    ///
    /// # Errors
    /// A bidirectional block: its second direction needs what comes later. A cache of another shape, or slots that do not
    /// fit; nothing is written then.
    pub fn prefill<'s>(&self, x: &Tensor, state: &MambaState, slots: impl Into<Slots<'s>>) -> Result<Tensor> {
        self.extend(x, None, state, slots.into())
    }

    /// As [`Mamba::prefill`], for sequences that lie one after another as in [`Mamba::forward_packed`]; sequence `i` uses
    /// slot `slots[i]`.
    pub fn prefill_packed<'s>(
        &self,
        x: &Tensor,
        cu_seqlens: &[usize],
        state: &MambaState,
        slots: impl Into<Slots<'s>>,
    ) -> Result<Tensor> {
        self.extend(x, Some(cu_seqlens), state, slots.into())
    }

    fn extend(&self, x: &Tensor, cu_seqlens: Option<&[usize]>, state: &MambaState, slots: Slots) -> Result<Tensor> {
        self.check_causal()?;
        let sequences = self.check_input(x, cu_seqlens)?;
        state.check(&self.config, x.device(), sequences, slots)?;
        let slots = state.slots_of(sequences, slots)?;
        if x.elem_count() == 0 {
            return x.zeros_like();
        }
        let parts = self.untracked()?;
        let (y, states) = parts.extend(&x.detach(), cu_seqlens, &state.load(&slots)?)?;
        let out = parts.out_proj.apply(&y)?.reshape(x.shape())?;
        let mut writes = PoolWrites::default();
        state.store(states, &slots, &mut writes)?;
        writes.write()?;
        Ok(out)
    }

    /// Runs the rows of a residual stream, `x` being their norm, on from the states of a cache, and adds what comes out to them. All
    /// has been checked, and there is at least one row. Of a draft it gives the states after each token; states after sequences may
    /// wait for `writes`.
    pub(crate) fn extend_onto(
        &self,
        stream: &Tensor,
        x: &Tensor,
        pass: CachePass,
        state: &MambaState,
        writes: &mut PoolWrites,
    ) -> Result<Option<TokenStates>> {
        let parts = self.untracked()?;
        let rows = rows(stream)?;
        let (slots, kept) = match pass {
            CachePass::Prefill { cu_seqlens, slots } => {
                let sequences = cu_seqlens.map_or(x.dim(0)?, |ends| ends.len() - 1);
                let slots = state.slots_of(sequences, slots)?;
                let (y, states) = parts.extend(x, cu_seqlens, &state.load(&slots)?)?;
                parts.out_proj.apply_onto(&rows, &y)?;
                state.store(states, &slots, writes)?;
                return Ok(None);
            }
            CachePass::Step { slots } => (slots, false),
            CachePass::Draft { slots } => (slots, true),
        };
        let (y, states) = parts.step(x, state, slots, kept)?;
        parts.out_proj.apply_onto(&rows, &y)?;
        Ok(states)
    }

    /// Carries the states of a cache through the next token of each row, or through a few: `x` is
    /// `(batch, tokens, d_model)`. Slots are those of [`Mamba::prefill`], or a tensor of `i32` where the states are, `(batch)`,
    /// which on a GPU is read when the step runs there; not differentiable, as that.
    ///
    /// # Errors
    /// As [`Mamba::prefill`].
    pub fn step<'s>(&self, x: &Tensor, state: &MambaState, slots: impl Into<Slots<'s>>) -> Result<Tensor> {
        let slots = slots.into();
        self.check_causal()?;
        let rows = self.check_input(x, None)?;
        state.check(&self.config, x.device(), rows, slots)?;
        if x.elem_count() == 0 {
            return x.zeros_like();
        }
        let parts = self.untracked()?;
        let (y, _) = parts.step(&x.detach(), state, slots, false)?;
        parts.out_proj.apply(&y)?.reshape(x.shape())
    }

    /// The layers themselves where candle tracks nothing, else the same without gradients.
    fn untracked(&self) -> Result<Cow<'_, Parts>> {
        Ok(if self.parameters.is_tracked() {
            Cow::Owned(self.parts.leave_graph(&Converted::of(self.parameters.iter())?)?)
        } else {
            Cow::Borrowed(&self.parts)
        })
    }

    pub(crate) fn check_causal(&self) -> Result<()> {
        if self.config.bidirectional {
            let got = "a bidirectional block, whose second direction needs the whole sequence";
            return Err(argument("bidirectional", "false for prefill and decoding", got));
        }
        Ok(())
    }

    /// Checks an input and how it is divided into sequences, and gives their number.
    fn check_input(&self, x: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<usize> {
        let (d_model, d_inner, dtype) = (self.config.d_model, self.config.d_inner, self.parts.in_proj.dtype());
        let &[batch, length, width] = x.dims() else {
            return Err(argument("x", format_args!("(batch, length, {d_model})"), format_args!("{:?}", x.dims())));
        };
        if width != d_model {
            return Err(argument("x", format_args!("(batch, length, {d_model})"), format_args!("{:?}", x.dims())));
        }
        if x.dtype() != dtype {
            return Err(argument("x", format_args!("type {}, as the block", dtype.as_str()), x.dtype().as_str()));
        }
        let sequences = count_sequences(batch, length, cu_seqlens)?;
        check_room("x", &[batch, length, 2, d_inner], dtype, x.device())?;
        Ok(sequences)
    }

    /// The same block, sharing its parameters, without gradients. Where training goes on, take a new one after a step, for
    /// A, and what the block needs in another type, are computed here.
    pub fn detach(&self) -> Result<Self> {
        self.changed(&mut |_, parameter| parameter.detach())
    }

    /// The same block with other parameters: `f` gets each with its name (`in_proj.weight`, `A_log`, …) and gives what
    /// stands in its place, of the same shape and on the same device. See
    /// [`LanguageModel::map_parameters`](crate::nn::LanguageModel::map_parameters).
    ///
    /// # Errors
    /// Those of `f`; a tensor of another shape, on another device, or of a type that is none of `f32`, `f16`, `bf16` and
    /// `f64`, by the parameter's name.
    pub fn map_parameters(&self, mut f: impl FnMut(&str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        self.changed(&mut |name, parameter| parameter.replace(name, f(name, parameter.stored())?))
    }

    /// Calls `f` with each parameter and its name, in the order in which the block uses them.
    pub fn visit(&self, f: &mut dyn FnMut(&str, &Tensor)) {
        self.parameters.visit(f);
    }

    /// All parameters by name, in the order in which the block uses them.
    pub fn named_tensors(&self) -> Vec<(String, Tensor)> {
        self.parameters.named_tensors()
    }
}

/// How rows run on from the states of a cache.
#[derive(Debug, Clone, Copy)]
pub(crate) enum CachePass<'a> {
    /// Sequences, which bring the states up to date.
    Prefill { cu_seqlens: Option<&'a [usize]>, slots: Slots<'a> },
    /// The next tokens of each sequence, in the same way.
    Step { slots: Slots<'a> },
    /// The same, of which some may be taken back.
    Draft { slots: Slots<'a> },
}

impl<'a> CachePass<'a> {
    /// The offsets of packed sequences.
    pub fn cu_seqlens(self) -> Option<&'a [usize]> {
        match self {
            Self::Prefill { cu_seqlens, .. } => cu_seqlens,
            Self::Step { .. } | Self::Draft { .. } => None,
        }
    }

    /// The slot of each sequence.
    pub fn slots(self) -> Slots<'a> {
        match self {
            Self::Prefill { slots, .. } | Self::Step { slots } | Self::Draft { slots } => slots,
        }
    }
}

impl Module for Mamba {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Self::forward(self, x)
    }
}
