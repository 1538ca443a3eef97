//! A pass through a block and back outside of candle's graph.

use candle_core::{Result, Tensor};

use super::ssm_path::{self, SsmPath};
use super::state::{States, TokenStates};
use super::{MambaConfig, MambaState};
use crate::candle::Slots;
use crate::nn::decode::PoolWrites;
use crate::nn::layers::{Converted, Gradients, Linear, Parameters};

/// The layers of a block.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    d_inner: usize,
    average_directions: bool,
    recompute: bool,
    pub in_proj: Linear,
    /// From the first step to the last.
    pub(super) causal: SsmPath,
    /// From the last step to the first, in a bidirectional block.
    anticausal: Option<SsmPath>,
    pub out_proj: Linear,
}

/// What a pass leaves for the way back.
pub(crate) struct Kept {
    /// The input, `(rows, d_model)`.
    x: Tensor,
    /// What `in_proj` gives, `(batch, length, 2 d_inner)`.
    projected: Tensor,
    /// Of the causal path and of the other.
    paths: Vec<ssm_path::Kept>,
    /// The input of `out_proj`, `(rows, d_inner)`.
    pub y: Tensor,
    cu_seqlens: Option<Vec<usize>>,
}

impl Parts {
    /// A block whose initial `out_proj` is divided by a number.
    pub fn new(config: &MambaConfig, parameters: &Parameters, out_proj_divisor: f64) -> Result<Self> {
        let &MambaConfig { d_model, d_inner, proj_bias, average_directions, recompute, .. } = config;
        let in_proj = Linear::new(&parameters.pp("in_proj"), [d_model, 2 * d_inner], proj_bias, 1.0)?;
        let causal = SsmPath::new(config, parameters, false)?;
        let anticausal = config.bidirectional.then(|| SsmPath::new(config, parameters, true)).transpose()?;
        let out_proj = Linear::new(&parameters.pp("out_proj"), [d_inner, d_model], proj_bias, out_proj_divisor)?;
        Ok(Self { d_inner, average_directions, recompute, in_proj, causal, anticausal, out_proj })
    }

    /// The same layers, whose parameters candle does not track.
    pub fn leave_graph(&self, converted: &Converted) -> Result<Self> {
        Ok(Self {
            in_proj: self.in_proj.leave_graph(converted)?,
            causal: self.causal.leave_graph(converted)?,
            anticausal: self.anticausal.as_ref().map(|path| path.leave_graph(converted)).transpose()?,
            out_proj: self.out_proj.leave_graph(converted)?,
            ..*self
        })
    }

    /// The scan's input and gate, views of what `in_proj` gives, `(batch, length, d_inner)`.
    pub fn project(&self, x: &Tensor) -> Result<[Tensor; 2]> {
        self.split(&self.projected(&rows(x)?, x)?)
    }

    /// What `in_proj` gives, `(batch, length, 2 d_inner)`, of the rows of `x`.
    fn projected(&self, matrix: &Tensor, x: &Tensor) -> Result<Tensor> {
        self.in_proj.apply(matrix)?.reshape((x.dim(0)?, x.dim(1)?, 2 * self.d_inner))
    }

    fn split(&self, projected: &Tensor) -> Result<[Tensor; 2]> {
        Ok([projected.narrow(2, 0, self.d_inner)?, projected.narrow(2, self.d_inner, self.d_inner)?])
    }

    fn paths(&self) -> impl Iterator<Item = &SsmPath> {
        [&self.causal].into_iter().chain(&self.anticausal)
    }

    /// The sum of both directions, or their mean.
    fn join(&self, directions: Vec<Tensor>) -> Result<Tensor> {
        let sum = sum(directions)?;
        if self.averages() { sum * 0.5 } else { Ok(sum) }
    }

    fn averages(&self) -> bool {
        self.average_directions && self.anticausal.is_some()
    }

    /// Runs whole sequences: `(batch, length, d_model)` to what `out_proj` takes, `(rows, d_inner)`.
    pub fn forward(&self, x: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<Tensor> {
        let [u, z] = self.project(x)?;
        let directions = self.paths().map(|path| path.forward(&u, &z, cu_seqlens)).collect::<Result<_>>()?;
        rows(&self.join(directions)?)
    }

    /// Runs sequences on from given states: `(batch, length, d_model)` to what `out_proj` takes, `(rows, d_inner)`, and the states
    /// afterwards.
    pub(super) fn extend(&self, x: &Tensor, cu_seqlens: Option<&[usize]>, states: &States) -> Result<(Tensor, States)> {
        let [u, z] = self.project(x)?;
        let (y, states) = self.causal.extend(&u, &z, cu_seqlens, states)?;
        Ok((rows(&y)?, states))
    }

    /// Carries states through a few tokens, in place: as [`extend`](Self::extend) else. If they are `kept`, also gives the states after
    /// each token.
    pub(super) fn step(
        &self,
        x: &Tensor,
        state: &MambaState,
        slots: Slots,
        kept: bool,
    ) -> Result<(Tensor, Option<TokenStates>)> {
        let [u, z] = self.project(x)?;
        let (y, states) = self.causal.step(&u, &z, state, slots, kept)?;
        Ok((rows(&y)?, states))
    }

    /// [`forward`](Self::forward), which gives [`Kept::y`], and all that [`backward`](Self::backward) needs.
    pub fn forward_kept(&self, x: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<Kept> {
        Ok(self.forward_kept_from(x, cu_seqlens, None)?.0)
    }

    /// The same from given states on, of a block without a second direction, and the states afterwards.
    pub(super) fn forward_kept_from(
        &self,
        x: &Tensor,
        cu_seqlens: Option<&[usize]>,
        mut initial: Option<States>,
    ) -> Result<(Kept, Option<States>)> {
        let matrix = rows(x)?;
        let projected = self.projected(&matrix, x)?;
        let [u, z] = self.split(&projected)?;
        let (mut directions, mut paths, mut states) = (Vec::new(), Vec::new(), None);
        for path in self.paths() {
            let (y, kept, after) = path.forward_kept(&u, &z, cu_seqlens, self.recompute, initial.take())?;
            directions.push(y);
            paths.push(kept);
            states = states.or(after);
        }
        let y = rows(&self.join(directions)?)?;
        Ok((Kept { x: matrix, projected, paths, y, cu_seqlens: cu_seqlens.map(<[usize]>::to_vec) }, states))
    }

    /// [`forward_kept`](Self::forward_kept) from the states of a cache on, whose slots then have those afterwards. All has been checked.
    pub fn forward_carried(&self, x: &Tensor, state: &MambaState, slots: Slots) -> Result<Kept> {
        let slots = state.slots_of(x.dim(0)?, slots)?;
        // Copies, as the states are overwritten before the way back.
        let States { conv, ssm } = state.load(&slots)?;
        let initial = States { conv: conv.copy()?, ssm: ssm.copy()? };
        let (kept, after) = self.forward_kept_from(x, None, Some(initial))?;
        match after {
            Some(after) => {
                let mut writes = PoolWrites::default();
                state.store(after, &slots, &mut writes)?;
                writes.write()?;
            }
            None => return Err(candle_core::Error::Msg("a pass from states that gives none".into())),
        }
        Ok(kept)
    }

    /// Adds the gradients of the parameters, and gives that of the input, `(rows, d_model)`, where it is wanted.
    pub fn backward(
        &self,
        kept: &Kept,
        d_out: &Tensor,
        is_input_wanted: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let [u, z] = self.split(&kept.projected)?;
        let d_out = d_out.reshape(((), d_out.dim(candle_core::D::Minus1)?))?;
        self.out_proj.parameter_gradients(&kept.y, &d_out, gradients)?;
        let d_y = self.out_proj.input_gradient(&d_out)?.reshape(u.shape())?;
        let d_y = if self.averages() { (d_y * 0.5)? } else { d_y };
        let (mut d_us, mut d_zs) = (Vec::new(), Vec::new());
        for (path, of_path) in self.paths().zip(&kept.paths) {
            let [d_u, d_z] = path.backward(of_path, [&u, &z], kept.cu_seqlens.as_deref(), &d_y, gradients)?;
            d_us.push(d_u);
            d_zs.push(d_z);
        }
        let halves = [rows(&sum(d_us)?)?, rows(&sum(d_zs)?)?];
        self.in_proj.parameter_gradients_of_halves(&kept.x, [&halves[0], &halves[1]], gradients)?;
        is_input_wanted.then(|| self.in_proj.input_gradient_of_halves([&halves[0], &halves[1]])).transpose()
    }
}

/// `(batch, length, features)` as the rows of a matrix.
pub(crate) fn rows(x: &Tensor) -> Result<Tensor> {
    let (batch, length, features) = x.dims3()?;
    x.reshape((batch * length, features))
}

/// The sum of one tensor or two.
fn sum(tensors: Vec<Tensor>) -> Result<Tensor> {
    let mut tensors = tensors.into_iter();
    let first = tensors.next().ok_or_else(|| candle_core::Error::Msg("a block without a direction".into()))?;
    tensors.try_fold(first, |sum, tensor| sum + tensor)
}
