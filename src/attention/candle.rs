//! Attention on candle's tensors.

use std::sync::{Arc, OnceLock};

use candle_core::{Result, Tensor};

use super::check::{LSE_NAMES, Problem, QUERY_NAMES, check_apart};
use super::tensors::Attention;
use super::{GradientsMut, Inputs, KeyRange, OutputGradients, OutputMut, Tensors, cpu};
use crate::candle::AttentionGradients;
use crate::candle::device::{Value, for_dtype, on_device};
use crate::candle::graph::{self, Backward, Computed};
use crate::candle::sequences::passes_on_devices;
use crate::candle::tensors::{Allocate, Arguments, CandleTensors, Keep, Lend, List, Owned, Reader, Store};

const NAME: &str = "attention";

passes_on_devices!(AttentionBackend, cuda());

impl Attention<'_> {
    /// Runs attention: `(batch, length, heads, d_head)` of `T`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names; keys of several sequences at one place where candle tracks a
    /// tensor. What the device refuses.
    pub fn forward(&self) -> Result<Tensor> {
        let mut arguments = Arguments::default();
        let Ok(_) = self.tensors().map(&mut arguments);
        let tensors = arguments.tensors();
        let is_tracked = graph::is_tracked(&tensors);
        if is_tracked {
            check_apart(self.keys.unwrap_or_default())?;
        }
        let (out, lse) = self.compute(&arguments)?;
        if !is_tracked {
            return Ok(out.untracked());
        }
        let Ok(tensors_kept) = self.tensors().map(&mut Keep);
        let stored = Arc::new(OnceLock::new());
        let kept = Kept {
            tensors: tensors_kept,
            scale: self.scale,
            cu_seqlens: self.cu_seqlens.map(<[usize]>::to_vec),
            keys: self.keys.map(<[KeyRange]>::to_vec),
            causal: self.causal,
            out: stored.clone(),
            lse: lse.untracked(),
        };
        let (out, _) = graph::attach(NAME, &tensors, out, None, kept)?;
        // The result and what is kept of it are one storage; detached, it is not part of the graph, which would keep itself.
        let Ok(()) = stored.set(out.detach()) else { unreachable!("it is set here alone") };
        Ok(out)
    }

    /// Runs attention outside of candle's graph, and also gives what [`backward`](Self::backward) reads: the logarithm of the
    /// sum of each query's exponentials, `(batch, length, heads)` of `f32`.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub fn forward_with_lse(&self) -> Result<(Tensor, Tensor)> {
        let mut arguments = Arguments::default();
        let Ok(_) = self.tensors().map(&mut arguments);
        let (out, lse) = self.compute(&arguments)?;
        Ok((out.untracked(), lse.untracked()))
    }

    fn compute(&self, arguments: &Arguments) -> Result<(Computed, Computed)> {
        let locked = arguments.lock()?;
        on_device!("q", self.q, |backend| for_dtype!("q", self.q.dtype(), |T| {
            self.compute_on::<_, T>(backend, locked.reader())
        }))
    }

    fn compute_on<B: AttentionBackend, T: Value>(&self, backend: &B, reader: Reader) -> Result<(Computed, Computed)> {
        let views = self.tensors().map(&mut reader.views::<B, T>())?;
        let problem = Inputs::of(views, self.scale, self.cu_seqlens, self.keys, self.causal).check()?;
        let (shape, [batch, length, heads, _]) = (problem.inputs.q.shape, problem.inputs.q.shape);
        let (mut out, mut lse) = (backend.allocate::<T>("q", &shape)?, backend.allocate::<f32>("q", &shape[..3])?);
        backend.forward(&problem, OutputMut { out: B::borrow(&mut out), lse: B::borrow(&mut lse) })?;
        Ok((Computed::new(backend.store(out), shape), Computed::new(backend.store(lse), [batch, length, heads])))
    }

    /// The gradients of all tensors, from what [`forward_with_lse`](Self::forward_with_lse) gave for them and the gradient of
    /// the output. This is what candle's backward pass does; here nothing is recorded in its graph.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub fn backward(&self, out: &Tensor, lse: &Tensor, d_out: &Tensor) -> Result<AttentionGradients> {
        let mut arguments = Arguments::default();
        let Ok(_) = self.tensors().map(&mut arguments);
        [("out", out), ("lse", lse), ("d_out", d_out)]
            .into_iter()
            .for_each(|(name, tensor)| arguments.add(name, tensor));
        let locked = arguments.lock()?;
        on_device!("q", self.q, |backend| for_dtype!("q", self.q.dtype(), |T| {
            self.gradients::<_, T>(backend, locked.reader(), out, lse, d_out)
        }))
    }

    fn gradients<B: AttentionBackend, T: Value>(
        &self,
        backend: &B,
        reader: Reader,
        out: &Tensor,
        lse: &Tensor,
        d_out: &Tensor,
    ) -> Result<AttentionGradients> {
        let views = self.tensors().map(&mut reader.views::<B, T>())?;
        let problem = Inputs::of(views, self.scale, self.cu_seqlens, self.keys, self.causal).check()?;
        let outputs = OutputGradients {
            out: reader.view::<B, T, 4>("out", QUERY_NAMES, out)?,
            lse: reader.view::<B, f32, 3>("lse", LSE_NAMES, lse)?,
            d_out: reader.view::<B, T, 4>("d_out", QUERY_NAMES, d_out)?,
        };
        let mut gradients: Tensors<Owned<B, T>> = self.tensors().map(&mut Allocate(backend))?;
        let Ok(buffers) = gradients.by_mut().map(&mut Lend);
        backend.backward(&problem, outputs, buffers)?;
        let Ok(gradients) = gradients.zip(self.tensors())?.map(&mut Store(backend));
        Ok(gradients)
    }
}

/// What a backward pass needs: the inputs and the results.
struct Kept {
    tensors: Tensors<CandleTensors>,
    scale: Option<f32>,
    cu_seqlens: Option<Vec<usize>>,
    keys: Option<Vec<KeyRange>>,
    causal: bool,
    /// Set as soon as it is there.
    out: Arc<OnceLock<Tensor>>,
    lse: Tensor,
}

impl Backward for Kept {
    fn backward(&self, d_out: &Tensor, _: Option<&Tensor>) -> Result<Vec<Option<Tensor>>> {
        let Some(out) = self.out.get() else { unreachable!("nothing is differentiated before it is there") };
        let (cu_seqlens, keys) = (self.cu_seqlens.as_deref(), self.keys.as_deref());
        let operator = Attention::over(&self.tensors, self.scale, cu_seqlens, keys, self.causal);
        let mut list = List::default();
        let Ok(_) = operator.backward(out, &self.lse, d_out)?.map(&mut list);
        Ok(list.0)
    }
}
