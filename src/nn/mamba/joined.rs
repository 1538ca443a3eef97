//! A layer as a decoding step of few launches takes it.

use candle_core::{DType, Result, Tensor};

use super::{Mamba, MambaState};
use crate::candle::{DecodeColumns, DecodeConv, DecodeLinear, DecodeUpdate, Slots};
use crate::nn::RmsNorm;

/// The tensors of a layer, each in the form in which it is computed with: the norm, the block, and the addition to the stream.
#[derive(Debug, Clone)]
pub(crate) struct JoinedLayer {
    /// `(d_model)` of `f32`, and what is added to the mean square.
    norm: (Tensor, f64),
    /// `(2 d_inner, d_model)`, and `(2 d_inner)` of `f32`.
    in_proj: (Tensor, Option<Tensor>),
    path: JoinedPath,
    /// `(d_model, d_inner)`, and `(d_model)` of `f32`.
    out_proj: (Tensor, Option<Tensor>),
}

/// The tensors between the projections of a selective block.
#[derive(Debug, Clone)]
pub(super) struct JoinedPath {
    /// `(d_inner, d_conv)` and `(d_inner)`.
    pub conv: (Tensor, Option<Tensor>),
    /// `(dt_rank + 2 d_state, d_inner)`.
    pub x_proj: Tensor,
    /// `(d_inner, dt_rank)`.
    pub dt_proj: Tensor,
    /// Of the step sizes, B and C, of `f32`, and what is added to the mean squares.
    pub norms: Option<(Option<[Tensor; 3]>, f64)>,
    pub a: Tensor,
    pub d: Tensor,
    pub delta_bias: Tensor,
}

/// What a step of so many rows writes on its way through a layer.
#[derive(Debug, Clone)]
pub(crate) struct Buffers {
    /// What `in_proj` gives, `(rows, 2 d_inner)`: the convolution's output, and the gate.
    projected: Tensor,
    /// What `x_proj` gives.
    columns: Tensor,
    /// What `out_proj` takes.
    y: Tensor,
}

impl JoinedLayer {
    /// None for a block whose steps cannot be joined: one that is not selective.
    pub fn new(norm: &RmsNorm, block: &Mamba) -> Result<Option<Self>> {
        let parts = block.parts();
        let Some(path) = parts.causal.joined()? else { return Ok(None) };
        let norm = (full(norm.parameter().tensor()?)?, norm.eps());
        let (in_proj, out_proj) = (parts.in_proj.joined()?, parts.out_proj.joined()?);
        Ok(Some(Self { norm, in_proj, path, out_proj }))
    }

    /// What a step of so many rows writes here.
    pub fn buffers(&self, rows: usize) -> Result<Buffers> {
        let (dtype, device) = (self.in_proj.0.dtype(), self.in_proj.0.device());
        let zeros = |columns: usize| Tensor::zeros((rows, columns), dtype, device);
        let d_inner = self.out_proj.0.dim(1)?;
        Ok(Buffers { projected: zeros(2 * d_inner)?, columns: zeros(self.path.x_proj.dim(0)?)?, y: zeros(d_inner)? })
    }

    /// Adds to the residual stream, `(rows, d_model)`, what the layer gives of it, and brings the states up to date.
    pub fn run(&self, stream: &Tensor, buffers: &Buffers, state: &MambaState, slots: Slots) -> Result<()> {
        let Buffers { projected, columns, y } = buffers;
        let JoinedPath { conv, x_proj, dt_proj, norms, a, d, delta_bias } = &self.path;
        let d_inner = y.dim(1)?;
        let conv = DecodeConv { weight: &conv.0, bias: conv.1.as_ref(), state: &state.conv, slots };
        let norm = Some((&self.norm.0, self.norm.1));
        let in_proj =
            DecodeLinear { norm, bias: self.in_proj.1.as_ref(), ..DecodeLinear::new(stream, &self.in_proj.0) };
        in_proj.write_with_conv(projected, &conv)?;
        let (u, z) = (projected.narrow(1, 0, d_inner)?, projected.narrow(1, d_inner, d_inner)?);
        let columns = DecodeColumns::Projected { weight: x_proj, to: columns };
        let norms = norms.as_ref().map(|(weights, eps)| (weights.as_ref().map(|[dt, b, c]| [dt, b, c]), *eps));
        let (d, delta_bias, z) = (Some(d), Some(delta_bias), Some(&z));
        DecodeUpdate { d, delta_bias, z, norms, slots, ..DecodeUpdate::new(&u, columns, dt_proj, a) }
            .update(&state.ssm, y)?;
        DecodeLinear { bias: self.out_proj.1.as_ref(), ..DecodeLinear::new(y, &self.out_proj.0) }.add_to(stream)
    }

    /// All tensors that [`run`](Self::run) reads beside its arguments.
    pub fn tensors(&self) -> Vec<Tensor> {
        let JoinedPath { conv, x_proj, dt_proj, norms, a, d, delta_bias } = &self.path;
        let norms = norms.iter().filter_map(|(weights, _)| weights.as_ref()).flatten();
        let optional = [&self.in_proj.1, &self.out_proj.1, &conv.1].into_iter().flatten();
        let always = [&self.norm.0, &self.in_proj.0, &self.out_proj.0, &conv.0, x_proj, dt_proj, a, d, delta_bias];
        always.into_iter().chain(optional).chain(norms).cloned().collect()
    }
}

impl Buffers {
    /// Whether these serve another layer too, which begins with nothing of what is in them.
    pub fn serve(&self, layer: &JoinedLayer) -> Result<bool> {
        let columns = [&self.y, &self.columns].map(|buffer| buffer.dim(1));
        let [d_inner, of_x_proj] = columns;
        Ok(d_inner? == layer.out_proj.0.dim(1)? && of_x_proj? == layer.path.x_proj.dim(0)?)
    }

    /// All of them.
    pub fn tensors(&self) -> [Tensor; 3] {
        [self.projected.clone(), self.columns.clone(), self.y.clone()]
    }
}

/// A parameter that is computed with in `f32`, dense.
pub(crate) fn full(tensor: Tensor) -> Result<Tensor> {
    tensor.to_dtype(DType::F32)?.contiguous()
}
