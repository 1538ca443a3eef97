//! Attention on candle's tensors.

use std::cell::OnceCell;
use std::sync::{Arc, OnceLock};

use candle_core::{Result, Shape, Tensor};

use super::check::{LSE_NAMES, QUERY_NAMES, check_shapes, default_scale, parts};
use super::tensors::Attention;
use super::{Inputs, KeyRange, OutputGradients, OutputMut, Tensors, blocks, check, cpu};
use crate::Error;
use crate::candle::AttentionGradients;
use crate::candle::device::{Backend as _, Cpu, Value, for_dtype, unsupported};
use crate::candle::graph::{self, Backward, Computed};
use crate::candle::tensors::{Allocate, Arguments, CandleTensors, Keep, Lend, List, Owned, Reader, Store};

const NAME: &str = "attention";
const KEY_NAMES: &str = "(rows, steps, kv_heads, d_head)";

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
            check::check_apart(self.keys.unwrap_or_default())?;
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
        if !self.q.device().is_cpu() {
            arguments.check_devices()?;
            let (out, lse) = self.blocks()?.forward()?;
            return Ok((Computed::of(&out)?, Computed::of(&lse)?));
        }
        let locked = arguments.lock()?;
        for_dtype!("q", self.q.dtype(), |T| self.compute_on_cpu::<T>(locked.reader()))
    }

    fn compute_on_cpu<T: Value>(&self, reader: Reader) -> Result<(Computed, Computed)> {
        let views = self.tensors().map(&mut reader.views::<Cpu, T>())?;
        let inputs = Inputs::of(views, self.scale, self.cu_seqlens, self.keys, self.causal);
        let (shape, [batch, length, heads, _]) = (inputs.q.shape, inputs.q.shape);
        inputs.check()?;
        let (mut out, mut lse) = (Cpu.allocate::<T>("q", &shape)?, Cpu.allocate::<f32>("q", &shape[..3])?);
        cpu::forward(&inputs, OutputMut { out: &mut out, lse: &mut lse })?;
        Ok((Computed::new(Cpu.store(out), shape), Computed::new(Cpu.store(lse), [batch, length, heads])))
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
        if !self.q.device().is_cpu() {
            arguments.check_devices()?;
            check::check_apart(self.keys.unwrap_or_default())?;
            for (name, names, tensor, like) in
                [("out", QUERY_NAMES, out, 4), ("d_out", QUERY_NAMES, d_out, 4), ("lse", LSE_NAMES, lse, 3)]
            {
                check_like(name, names, tensor, &self.q.dims()[..like])?;
            }
            let [q, k, v] = self.blocks()?.backward(out, lse, d_out)?;
            return Ok(Tensors { q, k, v });
        }
        let locked = arguments.lock()?;
        for_dtype!("q", self.q.dtype(), |T| self.gradients::<T>(locked.reader(), out, lse, d_out))
    }

    fn gradients<T: Value>(
        &self,
        reader: Reader,
        out: &Tensor,
        lse: &Tensor,
        d_out: &Tensor,
    ) -> Result<AttentionGradients> {
        let views = self.tensors().map(&mut reader.views::<Cpu, T>())?;
        let inputs = Inputs::of(views, self.scale, self.cu_seqlens, self.keys, self.causal);
        let outputs = OutputGradients {
            out: reader.view::<Cpu, T, 4>("out", QUERY_NAMES, out)?,
            lse: reader.view::<Cpu, f32, 3>("lse", LSE_NAMES, lse)?,
            d_out: reader.view::<Cpu, T, 4>("d_out", QUERY_NAMES, d_out)?,
        };
        let mut gradients: Tensors<Owned<Cpu, T>> = self.tensors().map(&mut Allocate(&Cpu))?;
        let Ok(buffers) = gradients.by_mut().map(&mut Lend);
        cpu::backward(&inputs, outputs, buffers)?;
        let Ok(gradients) = gradients.zip(self.tensors())?.map(&mut Store(&Cpu));
        Ok(gradients)
    }

    /// The call in blocks of candle's operators, checked.
    fn blocks(&self) -> Result<blocks::Blocks<'_>> {
        let shape = |name, names: &str, tensor: &Tensor| -> Result<[usize; 4]> {
            let rank = || Error::argument(name, format_args!("shape {names}"), format_args!("{:?}", tensor.dims()));
            Ok(tensor.dims().try_into().map_err(|_| rank())?)
        };
        let q_shape = shape("q", QUERY_NAMES, self.q)?;
        let k_shape = shape("k", KEY_NAMES, self.k)?;
        let (sizes, sequences) = check_shapes(q_shape, k_shape, self.scale, self.cu_seqlens, self.keys, self.causal)?;
        check_like("k", KEY_NAMES, self.k, &[sizes.rows, sizes.steps, sizes.kv_heads, sizes.d_head])?;
        check_like("v", KEY_NAMES, self.v, self.k.dims())?;
        let dtype = self.q.dtype();
        if !matches!(dtype, candle_core::DType::F32 | candle_core::DType::F16 | candle_core::DType::BF16) {
            return Err(unsupported("q", dtype).into());
        }
        for (name, tensor) in [("k", self.k), ("v", self.v)] {
            if tensor.dtype() != dtype {
                let got = format_args!("{:?}", tensor.dtype());
                return Err(Error::argument(name, format_args!("dtype {dtype:?}"), got).into());
            }
        }
        let parts = parts(&sequences, sizes.length, self.keys, self.causal);
        let scale = self.scale.unwrap_or_else(|| default_scale(sizes.d_head));
        let [q, k, v] = [self.q, self.k, self.v].map(Tensor::detach);
        Ok(blocks::Blocks { q, k, v, sizes, parts, scale, device: self.q.device(), distances: OnceCell::new() })
    }
}

fn check_like(name: &'static str, names: &str, tensor: &Tensor, shape: &[usize]) -> Result<()> {
    if tensor.dims() == shape {
        return Ok(());
    }
    let expected = format_args!("shape {names} = {shape:?}").to_string();
    Err(Error::argument(name, expected, format_args!("{:?}", Shape::from(tensor.dims()))).into())
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

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    /// What runs on GPUs, run here: within what `f32` sums of some hundred terms differ by.
    #[test]
    fn blocks_of_candles_operators_give_the_same() -> Result<()> {
        let random = |shape: [usize; 4]| Tensor::randn(0f32, 1.0, &shape, &Device::Cpu);
        let cu_seqlens = [0, 300, 300, 301, 620];
        let range = |(row, start, length)| KeyRange { row, start, length };
        let keys = [(1, 0, 700), (0, 9, 0), (0, 0, 1), (0, 2, 319)].map(range);
        // Of all keys a query may have fewer than there are queries.
        let few = [(1, 5, 90), (0, 9, 0), (0, 0, 1), (0, 2, 319)].map(range);
        let cases = [(None, 620, true), (Some(&keys), 700, true), (None, 620, false), (Some(&few), 700, false)];
        for (keys, steps, causal) in cases {
            let shape = [if keys.is_some() { 2 } else { 1 }, steps, 2, 24];
            let [q, k, v, d_out] = [random([1, 620, 6, 24])?, random(shape)?, random(shape)?, random([1, 620, 6, 24])?];
            let keys = keys.map(|keys| &keys[..]);
            let cu_seqlens = Some(&cu_seqlens[..]);
            let operator = Attention { cu_seqlens, keys, scale: Some(0.3), causal, ..Attention::new(&q, &k, &v) };
            let (out, lse) = operator.forward_with_lse()?;
            let gradients = operator.backward(&out, &lse, &d_out)?;
            let blocks = operator.blocks()?;
            let others = blocks.forward()?;
            let [d_q, d_k, d_v] = blocks.backward(&out, &lse, &d_out)?;
            for (ours, theirs) in
                [(&out, &others.0), (&lse, &others.1), (&gradients.q, &d_q), (&gradients.k, &d_k), (&gradients.v, &d_v)]
            {
                assert_eq!((ours.dims(), ours.dtype()), (theirs.dims(), DType::F32));
                let norm = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f32>();
                let error = (norm(&(ours - theirs)?)? / norm(ours)?).sqrt();
                assert!(error < 1e-5, "{error:.1e}");
            }
        }
        Ok(())
    }
}
