//! The long convolution on candle's tensors.

use candle_core::{Result, Tensor};

use super::check::ACTIVATION_NAMES;
use super::tensors::LongConv;
use super::{Inputs, Tensors, cpu};
use crate::candle::LongConvGradients;
use crate::candle::device::{Backend as _, Cpu, Value, for_dtype};
use crate::candle::graph::{self, Backward, Computed};
use crate::candle::tensors::{Allocate, Arguments, CandleTensors, Keep, Lend, List, Owned, Reader, Store};
use crate::lti::candle::check_processor;

impl LongConv<'_> {
    /// Runs the convolution: `(batch, length, d_inner)` of `T`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names. Tensors on another device than the processor.
    pub fn forward(&self) -> Result<Tensor> {
        check_processor("u", self.u)?;
        let mut arguments = Arguments::default();
        let Ok(_) = self.tensors().map(&mut arguments);
        let tensors = arguments.tensors();
        let out = {
            let locked = arguments.lock()?;
            for_dtype!("u", self.u.dtype(), |T| self.compute::<T>(locked.reader()))
        }?;
        if !graph::is_tracked(&tensors) {
            return Ok(out.untracked());
        }
        let Ok(kept) = self.tensors().map(&mut Keep);
        let cu_seqlens = self.cu_seqlens.map(<[usize]>::to_vec);
        let kept = Kept { tensors: kept, cu_seqlens, reverse: self.reverse };
        Ok(graph::attach("long-conv", &tensors, out, None, kept)?.0)
    }

    fn compute<T: Value>(&self, reader: Reader) -> Result<Computed> {
        let views = self.tensors().map(&mut reader.views::<Cpu, T>())?;
        let problem = Inputs::of(views, self.cu_seqlens, self.reverse).check()?;
        let mut out = Cpu.allocate::<T>("u", &problem.inputs.u.shape)?;
        cpu::forward_checked(&problem, &mut out)?;
        Ok(Computed::new(Cpu.store(out), problem.inputs.u.shape))
    }

    /// The gradients of all tensors that were given, from that of the output. This is what candle's backward pass does;
    /// here nothing is recorded in its graph.
    ///
    /// # Errors
    /// As [`LongConv::forward`].
    pub fn backward(&self, d_out: &Tensor) -> Result<LongConvGradients> {
        check_processor("u", self.u)?;
        let mut arguments = Arguments::default();
        let Ok(_) = self.tensors().map(&mut arguments);
        arguments.add("d_out", d_out);
        let locked = arguments.lock()?;
        let reader = locked.reader();
        for_dtype!("u", self.u.dtype(), |T| self.gradients::<T>(reader, d_out))
    }

    fn gradients<T: Value>(&self, reader: Reader, d_out: &Tensor) -> Result<LongConvGradients> {
        let views = self.tensors().map(&mut reader.views::<Cpu, T>())?;
        let problem = Inputs::of(views, self.cu_seqlens, self.reverse).check()?;
        let d_out = reader.view::<Cpu, T, 3>("d_out", ACTIVATION_NAMES, d_out)?;
        let mut gradients: Tensors<Owned<Cpu, T>> = self.tensors().map(&mut Allocate(&Cpu))?;
        let Ok(buffers) = gradients.by_mut().map(&mut Lend);
        cpu::backward_checked(&problem, d_out, buffers)?;
        let Ok(gradients) = gradients.zip(self.tensors())?.map(&mut Store(&Cpu));
        Ok(gradients)
    }
}

/// What a backward pass needs: the inputs.
struct Kept {
    tensors: Tensors<CandleTensors>,
    cu_seqlens: Option<Vec<usize>>,
    reverse: bool,
}

impl Backward for Kept {
    fn backward(&self, d_out: &Tensor, _: Option<&Tensor>) -> Result<Vec<Option<Tensor>>> {
        let operator = LongConv::over(&self.tensors, self.cu_seqlens.as_deref(), self.reverse);
        let mut list = List::default();
        let Ok(_) = operator.backward(d_out)?.map(&mut list);
        Ok(list.0)
    }
}
