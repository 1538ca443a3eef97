//! S4's kernels on candle's tensors.

use candle_core::{Device, Result, Tensor};

use super::{Kernel, Recurrence};
use crate::candle::device::Cpu;
use crate::candle::node;
use crate::candle::tensors::{Arguments, Reader};
use crate::lti::candle::check_processor;

/// The parameters of S4's kernels; see [`lti::s4::Kernel`](crate::lti::s4::Kernel). All of `f32` and on the processor;
/// on another device they give an error.
#[derive(Debug, Clone, Copy)]
pub struct S4Kernel<'a> {
    /// The logarithms of the step sizes, `(d_inner)`.
    pub log_delta: &'a Tensor,
    /// `Λ`, `(d_inner, 2 * d_state)`.
    pub a: &'a Tensor,
    /// `P`, `(d_inner, rank, 2 * d_state)`.
    pub p: &'a Tensor,
    /// `B`, `(d_inner, 2 * d_state)`.
    pub b: &'a Tensor,
    /// `C̃`, `(d_inner, 2 * d_state)`.
    pub c: &'a Tensor,
}

/// The gradients of the tensors of an [`S4Kernel`], dense.
#[derive(Debug, Clone)]
pub struct S4KernelGradients {
    /// `(d_inner)`.
    pub log_delta: Tensor,
    /// `(d_inner, 2 * d_state)`.
    pub a: Tensor,
    /// `(d_inner, rank, 2 * d_state)`.
    pub p: Tensor,
    /// `(d_inner, 2 * d_state)`.
    pub b: Tensor,
    /// `(d_inner, 2 * d_state)`.
    pub c: Tensor,
}

impl S4Kernel<'_> {
    /// The kernels, `(d_inner, length)` of `f32`, for a [`LongConv`](crate::candle::LongConv). Gradients flow to every
    /// tensor.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names. Tensors on another device than the processor.
    pub fn forward(&self, length: usize) -> Result<Tensor> {
        let kernel = self.with_views(|kernel| Ok(kernel.kernel(length)?))?;
        let kernel = Tensor::from_vec(kernel, (self.a.dim(0)?, length), &Device::Cpu)?;
        let [log_delta, a, p, b, c] = self.tensors().map(Tensor::detach);
        let backward = move |d_kernel: &Tensor| {
            let kernel = S4Kernel { log_delta: &log_delta, a: &a, p: &p, b: &b, c: &c };
            let S4KernelGradients { log_delta, a, p, b, c } = kernel.backward(d_kernel)?;
            Ok(vec![Some(log_delta), Some(a), Some(p), Some(b), Some(c)])
        };
        // SAFETY: the kernels are a tensor of their own, of which no other handle is left.
        unsafe { node("s4-kernel", &self.tensors(), kernel, backward) }
    }

    /// The gradients of all tensors from that of the kernels. This is what candle's backward pass does; here nothing is
    /// recorded in its graph.
    ///
    /// # Errors
    /// As [`S4Kernel::forward`].
    pub fn backward(&self, d_kernel: &Tensor) -> Result<S4KernelGradients> {
        check_processor("d_kernel", d_kernel)?;
        let dense = d_kernel.contiguous()?;
        let (d_inner, length) = dense.dims2()?;
        let slopes = dense.flatten_all()?.to_vec1::<f32>()?;
        let view = crate::View::new(&slopes, [d_inner, length]);
        let all = self.with_views(|kernel| Ok(kernel.backward(view)?))?;
        let tensor = |data: Vec<f32>, like: &Tensor| Tensor::from_vec(data, like.shape(), &Device::Cpu);
        Ok(S4KernelGradients {
            log_delta: tensor(all.log_delta, self.log_delta)?,
            a: tensor(all.a, self.a)?,
            p: tensor(all.p, self.p)?,
            b: tensor(all.b, self.b)?,
            c: tensor(all.c, self.c)?,
        })
    }

    /// `C̃` of length `length` for the numbers of `c` as `C`, not part of candle's graph.
    ///
    /// # Errors
    /// As [`S4Kernel::forward`]; a system for which the bilinear rule has no recurrence.
    pub fn truncate(&self, length: usize) -> Result<Tensor> {
        let c = self.with_views(|kernel| Ok(kernel.truncate(length)?))?;
        Tensor::from_vec(c, self.c.shape(), &Device::Cpu)
    }

    /// The recurrence of the systems whose kernels these are, of `length` steps.
    ///
    /// # Errors
    /// As [`S4Kernel::forward`]; a system that has no recurrence.
    pub fn recurrence(&self, length: usize) -> Result<Recurrence> {
        self.with_views(|kernel| Ok(kernel.recurrence(length)?))
    }

    fn tensors(&self) -> [&Tensor; 5] {
        [self.log_delta, self.a, self.p, self.b, self.c]
    }

    fn with_views<R>(&self, work: impl FnOnce(Kernel) -> Result<R>) -> Result<R> {
        check_processor("a", self.a)?;
        let mut arguments = Arguments::default();
        for (name, tensor) in ["log_delta", "a", "p", "b", "c"].into_iter().zip(self.tensors()) {
            arguments.add(name, tensor);
        }
        let locked = arguments.lock()?;
        let reader: Reader = locked.reader();
        let complex = "(d_inner, 2 * d_state)";
        work(Kernel {
            log_delta: reader.view::<Cpu, f32, 1>("log_delta", "(d_inner)", self.log_delta)?,
            a: reader.view::<Cpu, f32, 2>("a", complex, self.a)?,
            p: reader.view::<Cpu, f32, 3>("p", "(d_inner, rank, 2 * d_state)", self.p)?,
            b: reader.view::<Cpu, f32, 2>("b", complex, self.b)?,
            c: reader.view::<Cpu, f32, 2>("c", complex, self.c)?,
        })
    }
}
