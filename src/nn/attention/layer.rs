//! The attention layer.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use candle_nn::{Module, VarBuilder};

use super::rotary::RotaryTables;
use super::{AttentionConfig, AttentionState};
use crate::attention::KeyRange;
use crate::candle::Slots;
use crate::count_sequences;
use crate::nn::layers::{Change, Converted, Linear, ParameterList, Parameters};
use crate::nn::{NewTokens, argument, check_room};

/// Attention with grouped heads, causal unless its configuration says otherwise:
///
/// ```text
/// q, k, v = q_proj(input), k_proj(input), v_proj(input)      q and k turned to their positions
/// output  = o_proj(attention(q, k, v))
/// ```
///
/// Parameters have the names that transformers gives them in Llama and Jamba: `q_proj`, `k_proj`, `v_proj`, `o_proj`. For what
/// the operator computes, and in what memory, see [`attention`](crate::attention).
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::{VarBuilder, VarMap};
/// use selective_scan::nn::{Attention, AttentionConfig, AttentionState};
///
/// let device = Device::Cpu;
/// let config = AttentionConfig { n_kv_head: 2, ..AttentionConfig::new(32, 4) };
/// let layer = Attention::new(&config, VarBuilder::from_varmap(&VarMap::new(), DType::F32, &device))?;
/// let x = Tensor::randn(0f32, 1.0, (1, 20, 32), &device)?;
/// let whole = layer.forward(&x)?;
/// // The same in two parts, the second on from the keys and values of the first.
/// let state = AttentionState::new(&config, 1, 64, DType::F32, &device)?;
/// layer.prefill(&x.narrow(1, 0, 19)?, &state, None)?;
/// let last = layer.step(&x.narrow(1, 19, 1)?, &state, None)?;
/// let difference = (last - whole.narrow(1, 19, 1)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(difference < 1e-5);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Attention {
    config: AttentionConfig,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    rotary: Option<Arc<RotaryTables>>,
    parameters: ParameterList,
}

/// Queries, keys and values, `(batch, length, heads, d_head)` each.
struct Projected {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

/// A sequence of a call with a cache.
#[derive(Debug, Clone, Copy)]
struct Sequence {
    /// None for padding.
    slot: Option<usize>,
    /// Its rows among all.
    start: usize,
    tokens: usize,
    /// The tokens that are in the slot already.
    there: usize,
}

impl Attention {
    /// A layer with the parameters of `vb`, which computes in its type. Those that a [`VarMap`](candle_nn::VarMap) does not
    /// have yet are drawn, from the configuration's seed and the parameters' names; see [types](crate::nn#types).
    ///
    /// # Errors
    /// A size that makes no layer, or one that does not fit in memory; a parameter that is missing or of another shape, by
    /// name.
    pub fn new(config: &AttentionConfig, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        crate::nn::check_model_dtype(vb.dtype())?;
        let parameters = Parameters::new(vb, config.seed);
        parameters.pp("q_proj").check_room("weight", "d_model, n_head", config.parameter_count()?)?;
        Self::build(config, &parameters, 1.0)
    }

    /// A layer whose initial `o_proj` is divided by a number.
    pub(crate) fn build(config: &AttentionConfig, parameters: &Parameters, out_proj_divisor: f64) -> Result<Self> {
        let count = parameters.count();
        let &AttentionConfig { d_model, n_head, n_kv_head, d_head, qkv_bias, out_bias, .. } = config;
        let from = |name, heads: usize| Linear::new(&parameters.pp(name), [d_model, heads * d_head], qkv_bias, 1.0);
        let [q_proj, k_proj, v_proj] =
            [from("q_proj", n_head)?, from("k_proj", n_kv_head)?, from("v_proj", n_kv_head)?];
        let o_proj = Linear::new(&parameters.pp("o_proj"), [n_head * d_head, d_model], out_bias, out_proj_divisor)?;
        let parameters = parameters.taken_since(count);
        let rotary = config.rope_rates().map(RotaryTables::of);
        Ok(Self { config: config.clone(), q_proj, k_proj, v_proj, o_proj, rotary, parameters })
    }

    /// The layer's sizes and variants.
    pub fn config(&self) -> &AttentionConfig {
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
        let (batch, length, _) = x.dims3()?;
        let positions: Vec<usize> = match cu_seqlens {
            Some(ends) => ends.windows(2).flat_map(|ends| 0..ends[1] - ends[0]).collect(),
            None => (0..batch).flat_map(|_| 0..length).collect(),
        };
        let Projected { q, k, v } = self.project(x, &positions)?;
        let causal = self.config.causal;
        let operator = crate::candle::Attention { cu_seqlens, causal, ..crate::candle::Attention::new(&q, &k, &v) };
        let out = operator.forward()?;
        self.o_proj.forward(&self.joined(&out)?)
    }

    /// Runs sequences on from the keys and values of a cache, and adds theirs to it: a prompt, whole or chunk by chunk. `x` is
    /// `(batch, length, d_model)`.
    ///
    /// Row `i` uses slot `slots[i]`, or slot `i` if `slots` is `None`, the state then having one for each row. A row whose slot
    /// is negative is padding: it touches no state, and what comes out of it means nothing. Slots are read on the host: those of
    /// a tensor on a GPU are an error.
    ///
    /// Not differentiable, since the states are written in place.
    ///
    /// # Errors
    /// A layer that is not causal; a state of another layer, or slots that do not fit; a slot without room for the tokens.
    /// Nothing is written then.
    pub fn prefill<'s>(&self, x: &Tensor, state: &AttentionState, slots: impl Into<Slots<'s>>) -> Result<Tensor> {
        self.extend(x, None, state, slots.into())
    }

    /// As [`Attention::prefill`], for sequences that lie one after another as in [`Attention::forward_packed`]; sequence `i`
    /// uses slot `slots[i]`.
    ///
    /// # Errors
    /// As there.
    pub fn prefill_packed<'s>(
        &self,
        x: &Tensor,
        cu_seqlens: &[usize],
        state: &AttentionState,
        slots: impl Into<Slots<'s>>,
    ) -> Result<Tensor> {
        self.extend(x, Some(cu_seqlens), state, slots.into())
    }

    /// The next token of each row, or a few: `x` is `(batch, tokens, d_model)`. The same as [`Attention::prefill`].
    ///
    /// # Errors
    /// As there.
    pub fn step<'s>(&self, x: &Tensor, state: &AttentionState, slots: impl Into<Slots<'s>>) -> Result<Tensor> {
        self.extend(x, None, state, slots.into())
    }

    fn extend(&self, x: &Tensor, cu_seqlens: Option<&[usize]>, state: &AttentionState, slots: Slots) -> Result<Tensor> {
        let sequences = self.check_input(x, cu_seqlens)?;
        let new = cu_seqlens.map_or(NewTokens::Each(x.dim(1)?), NewTokens::Packed);
        state.check(&self.config, x.device(), sequences, slots, new)?;
        if x.elem_count() == 0 {
            return x.zeros_like();
        }
        let (y, _) = self.untracked()?.cached(&x.detach(), cu_seqlens, state, slots)?;
        self.o_proj.leave_graph(&Converted::default())?.apply(&y)?.reshape(x.shape())
    }

    /// The layer itself where candle tracks nothing, else the same without gradients.
    fn untracked(&self) -> Result<std::borrow::Cow<'_, Self>> {
        use std::borrow::Cow;
        Ok(if self.parameters.is_tracked() { Cow::Owned(self.detach()?) } else { Cow::Borrowed(self) })
    }

    /// Runs the norm of a residual stream on from the states of a cache, and adds what comes out to the stream, in place. All has been
    /// checked. Gives how many tokens there were in the slot of each row before.
    pub(crate) fn extend_onto(
        &self,
        stream: &Tensor,
        x: &Tensor,
        cu_seqlens: Option<&[usize]>,
        state: &AttentionState,
        slots: Slots,
    ) -> Result<Vec<usize>> {
        let layer = self.untracked()?;
        let (y, before) = layer.cached(x, cu_seqlens, state, slots)?;
        layer.o_proj.apply_onto(&stream.flatten(0, 1)?, &y)?;
        Ok(before)
    }

    /// [`forward`](Self::forward) from the states of a cache on, whose slots then have the keys and values of these tokens too:
    /// candle does not track those. All has been checked.
    pub(crate) fn forward_carried(&self, x: &Tensor, state: &AttentionState, slots: Slots) -> Result<Tensor> {
        let sequences = self.sequences(x, None, state, slots)?;
        let Projected { q, k, v } = self.project(x, &positions(&sequences))?;
        let (rows, [all_k, all_v]) = (packed(&q)?, [&k, &v].map(packed));
        let (all_k, all_v) = (all_k?, all_v?);
        let (keys, all) = self.gathered(&sequences, state, [&all_k, &all_v])?;
        let [k_all, v_all] = all;
        let ends = ends(&sequences);
        let operator = crate::candle::Attention {
            cu_seqlens: Some(&ends),
            keys: Some(&keys),
            ..crate::candle::Attention::new(&rows, &k_all, &v_all)
        };
        let out = self.o_proj.forward(&self.joined(&operator.forward()?.reshape(q.shape())?)?)?;
        self.store(&sequences, state, &all_k.detach(), &all_v.detach())?;
        Ok(out)
    }

    /// Runs rows on from a cache, outside of candle's graph, to what `o_proj` takes, `(rows, n_head · d_head)`; and how many tokens
    /// there were in the slot of each sequence before. All has been checked.
    fn cached(
        &self,
        x: &Tensor,
        cu_seqlens: Option<&[usize]>,
        state: &AttentionState,
        slots: Slots,
    ) -> Result<(Tensor, Vec<usize>)> {
        let sequences = self.sequences(x, cu_seqlens, state, slots)?;
        let Projected { q, k, v } = self.project(x, &positions(&sequences))?;
        let (q, k, v) = (packed(&q)?, packed(&k)?, packed(&v)?);
        self.store(&sequences, state, &k, &v)?;
        let ends = ends(&sequences);
        let is_padded = sequences.iter().any(|sequence| sequence.slot.is_none());
        let out = if state.k.dtype() == x.dtype() && !is_padded {
            // Keys and values are read where they lie.
            let heads = (state.slots(), state.capacity(), self.config.n_kv_head, self.config.d_head);
            let (k, v) = (state.k.reshape(heads)?, state.v.reshape(heads)?);
            let range = |sequence: &Sequence| {
                let row = sequence.slot.unwrap_or_default();
                KeyRange { row, start: 0, length: sequence.there + sequence.tokens }
            };
            let keys: Vec<_> = sequences.iter().map(range).collect();
            let operator = crate::candle::Attention::new(&q, &k, &v);
            crate::candle::Attention { cu_seqlens: Some(&ends), keys: Some(&keys), ..operator }.forward()?
        } else {
            let (keys, [k, v]) = self.gathered(&sequences, state, [&k, &v])?;
            let operator = crate::candle::Attention::new(&q, &k, &v);
            crate::candle::Attention { cu_seqlens: Some(&ends), keys: Some(&keys), ..operator }.forward()?
        };
        let out = out.flatten_from(2)?.squeeze(0)?;
        Ok((out, sequences.iter().map(|sequence| sequence.there).collect()))
    }

    /// Keys and values of sequences one after another, in the layer's type: those of a cache, then new ones, `(1, rows, heads, d_head)`.
    fn gathered(
        &self,
        sequences: &[Sequence],
        state: &AttentionState,
        new: [&Tensor; 2],
    ) -> Result<(Vec<KeyRange>, [Tensor; 2])> {
        let (dtype, heads) = (self.q_proj.dtype(), (self.config.n_kv_head, self.config.d_head));
        let (mut keys, mut start) = (Vec::new(), 0);
        for sequence in sequences {
            let length = sequence.there + sequence.tokens;
            keys.push(KeyRange { row: 0, start, length });
            start += length;
        }
        let all = |pool: &Tensor, new: &Tensor| -> Result<Tensor> {
            let mut parts = Vec::new();
            for sequence in sequences {
                if let (Some(slot), true) = (sequence.slot, sequence.there > 0) {
                    let there = pool.narrow(0, slot, 1)?.narrow(1, 0, sequence.there)?.to_dtype(dtype)?;
                    parts.push(there.reshape((1, sequence.there, heads.0, heads.1))?);
                }
                if sequence.tokens > 0 {
                    parts.push(new.narrow(1, sequence.start, sequence.tokens)?);
                }
            }
            Tensor::cat(&parts, 1)
        };
        Ok((keys, [all(&state.k, new[0])?, all(&state.v, new[1])?]))
    }

    /// Adds the keys and values of sequences, `(1, rows, heads, d_head)`, to their slots.
    fn store(&self, sequences: &[Sequence], state: &AttentionState, k: &Tensor, v: &Tensor) -> Result<()> {
        let (k, v) = (k.flatten_from(2)?.squeeze(0)?, v.flatten_from(2)?.squeeze(0)?);
        let added = sequences.iter().filter(|sequence| sequence.tokens > 0);
        let additions: Vec<_> = added
            .filter_map(|&Sequence { slot, start, tokens, there }| slot.map(|slot| (slot, there, start, tokens)))
            .collect();
        state.extend(&k, &v, &additions)
    }

    /// The sequences of a call that has been checked.
    fn sequences(
        &self,
        x: &Tensor,
        cu_seqlens: Option<&[usize]>,
        state: &AttentionState,
        slots: Slots,
    ) -> Result<Vec<Sequence>> {
        let (batch, length, _) = x.dims3()?;
        let lengths = state.lengths()?;
        let ends: Vec<usize> = match cu_seqlens {
            Some(ends) => ends.to_vec(),
            None => (0..=batch).map(|row| row * length).collect(),
        };
        let slots = slots.of_rows(ends.len() - 1, "cache", &state.k)?;
        let sequence = |(ends, slot): (&[usize], Option<usize>)| {
            let there = slot.map_or(0, |slot| lengths[slot] as usize);
            Sequence { slot, start: ends[0], tokens: ends[1] - ends[0], there }
        };
        Ok(ends.windows(2).zip(slots).map(sequence).collect())
    }

    /// Queries, keys and values of rows at these positions. Differentiable.
    fn project(&self, x: &Tensor, positions: &[usize]) -> Result<Projected> {
        let (batch, length, _) = x.dims3()?;
        let heads = |projected: Tensor, count| projected.reshape((batch, length, count, self.config.d_head));
        let x = x.contiguous()?;
        let q = heads(self.q_proj.forward(&x)?, self.config.n_head)?;
        let k = heads(self.k_proj.forward(&x)?, self.config.n_kv_head)?;
        let v = heads(self.v_proj.forward(&x)?, self.config.n_kv_head)?;
        let Some(tables) = &self.rotary else { return Ok(Projected { q, k, v }) };
        let rotary = tables.at(positions, batch, x.device())?;
        Ok(Projected { q: rotary.apply(&q)?, k: rotary.apply(&k)?, v })
    }

    /// The heads of a row side by side.
    fn joined(&self, out: &Tensor) -> Result<Tensor> {
        let (batch, length, heads, d_head) = out.dims4()?;
        out.reshape((batch, length, heads * d_head))
    }

    /// The type of keys and values where states are to be of this one: the layer's own if they would only be wider than they are
    /// computed, which would cost memory and conversions, and keep nothing more.
    pub(crate) fn state_dtype(&self, asked: DType) -> DType {
        let own = self.q_proj.dtype();
        if own.size_in_bytes() < asked.size_in_bytes() { own } else { asked }
    }

    /// Checks an input and how it is divided into sequences, and gives their number.
    fn check_input(&self, x: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<usize> {
        let (d_model, dtype) = (self.config.d_model, self.q_proj.dtype());
        let &[batch, length, width] = x.dims() else {
            return Err(argument("x", format_args!("(batch, length, {d_model})"), format_args!("{:?}", x.dims())));
        };
        if width != d_model {
            return Err(argument("x", format_args!("(batch, length, {d_model})"), format_args!("{:?}", x.dims())));
        }
        if x.dtype() != dtype {
            return Err(argument("x", format_args!("type {}, as the layer", dtype.as_str()), x.dtype().as_str()));
        }
        let sequences = count_sequences(batch, length, cu_seqlens)?;
        check_room("x", &[batch, length, self.config.n_head, self.config.d_head], DType::F32, x.device())?;
        Ok(sequences)
    }

    /// The same layer, sharing its parameters, without gradients. Where training goes on, take a new one after a step.
    pub fn detach(&self) -> Result<Self> {
        self.changed(&mut |_, parameter| parameter.detach())
    }

    /// The same layer, each parameter as `change` gives it.
    fn changed(&self, change: &mut Change) -> Result<Self> {
        Self::build(&self.config, &Parameters::changed(&self.parameters, change), 1.0)
    }

    /// Calls `f` with each parameter and its name, in the order in which the layer uses them.
    pub fn visit(&self, f: &mut dyn FnMut(&str, &Tensor)) {
        self.parameters.visit(f);
    }

    /// All parameters by name, in the order in which the layer uses them.
    pub fn named_tensors(&self) -> Vec<(String, Tensor)> {
        self.parameters.named_tensors()
    }
}

impl Module for Attention {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Self::forward(self, x)
    }
}

/// All rows as one: `(1, rows, heads, d_head)`.
fn packed(x: &Tensor) -> Result<Tensor> {
    let (batch, length, heads, d_head) = x.dims4()?;
    x.reshape((1, batch * length, heads, d_head))
}

/// Where the rows of sequences stand in their texts.
fn positions(sequences: &[Sequence]) -> Vec<usize> {
    sequences.iter().flat_map(|sequence| sequence.there..sequence.there + sequence.tokens).collect()
}

fn ends(sequences: &[Sequence]) -> Vec<usize> {
    let mut ends = vec![0];
    ends.extend(sequences.iter().map(|sequence| sequence.start + sequence.tokens));
    ends
}
