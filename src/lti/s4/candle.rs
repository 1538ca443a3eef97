//! S4's kernels on candle's tensors.

use candle_core::{Device, Result, Tensor};

use super::{Kernel, Recurrence};
use crate::candle::device::Cpu;
use crate::candle::node;
use crate::candle::tensors::{Arguments, Reader};
use crate::lti::candle::check_processor;
use crate::{Error, View};

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
        let view = View::new(&slopes, [d_inner, length]);
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

    /// What a state, `(batch, d_inner, 2 * d_state)` of `f32`, adds to the outputs of the `length` steps that follow it,
    /// `(batch, length, d_inner)` of `f32`: `C Ā^t x` of step `t`, counted from 1. `kernel_length` is the length that `c` is
    /// made for, and the most steps. Gradients flow to every tensor but `b`.
    ///
    /// It is a kernel for each state, of which `B̄` is `Ā x`: with the bilinear rule `B = x/Δ + A x/2`.
    ///
    /// # Errors
    /// As [`S4Kernel::forward`]; more steps than the kernels have.
    pub fn state_response(&self, state: &Tensor, kernel_length: usize, length: usize) -> Result<Tensor> {
        if length > kernel_length {
            let expected = format_args!("{kernel_length} steps at most, as kernels have").to_string();
            return Err(Error::argument("length", expected, length).into());
        }
        let (batch, d_inner, both) = state.dims3()?;
        let wanted = [batch, self.a.dim(0)?, self.a.dim(1)?];
        if [batch, d_inner, both] != wanted {
            let expected = format_args!("shape (batch, d_inner, 2 * d_state) = {wanted:?}").to_string();
            return Err(Error::argument("state", expected, format_args!("{:?}", state.dims())).into());
        }
        // Each with the parameters of its channel.
        let rows = |tensor: &Tensor| {
            let shape = [&[batch * d_inner], &tensor.dims()[1..]].concat();
            tensor.unsqueeze(0)?.repeat([&[batch][..], &vec![1; tensor.rank()]].concat())?.reshape(shape)
        };
        let [log_delta, a, p, c] = [rows(self.log_delta)?, rows(self.a)?, rows(self.p)?, rows(self.c)?];
        let x = state.reshape((batch * d_inner, both))?;
        let per_step = x.broadcast_mul(&log_delta.neg()?.exp()?.unsqueeze(1)?)?;
        let b = (per_step + (low_rank_product(&a, &p, &x)? * 0.5)?)?;
        let kernel = S4Kernel { log_delta: &log_delta, a: &a, p: &p, b: &b, c: &c }.forward(kernel_length)?;
        kernel.narrow(1, 0, length)?.reshape((batch, d_inner, length))?.transpose(1, 2)
    }

    /// The states after the inputs `u`, `(batch, length, d_inner)`, from `initial_state` on or from zero, both `(batch, d_inner,
    /// 2 * d_state)`; all of `f32`. See [`Kernel::final_state`]. Gradients flow to every tensor but `c`.
    ///
    /// # Errors
    /// As [`S4Kernel::forward`]; a system that has no recurrence.
    pub fn final_state(&self, u: &Tensor, initial_state: Option<&Tensor>) -> Result<Tensor> {
        let shape = (u.dim(0)?, self.a.dim(0)?, self.a.dim(1)?);
        let state = match initial_state {
            Some(state) => state.clone(),
            None => Tensor::zeros(shape, u.dtype(), u.device())?,
        };
        let after = self.with_states([("u", u), ("initial_state", &state)], |kernel, [u, state]| {
            Ok(kernel.final_state(u, Some(state))?)
        })?;
        let after = Tensor::from_vec(after, shape, &Device::Cpu)?;
        let [log_delta, a, p, b, c] = self.tensors().map(Tensor::detach);
        let (u_kept, state_kept) = (u.detach(), state.detach());
        let backward = move |d_state: &Tensor| {
            let kernel = S4Kernel { log_delta: &log_delta, a: &a, p: &p, b: &b, c: &c };
            let read = [("u", &u_kept), ("initial_state", &state_kept), ("d_final_state", d_state)];
            let all = kernel.with_states(read, |kernel, [u, state, d_state]| {
                Ok(kernel.final_state_backward(u, Some(state), d_state)?)
            })?;
            let tensor = |data: Vec<f32>, like: &Tensor| Tensor::from_vec(data, like.shape(), &Device::Cpu).map(Some);
            Ok(vec![
                tensor(all.log_delta, &log_delta)?,
                tensor(all.a, &a)?,
                tensor(all.p, &p)?,
                tensor(all.b, &b)?,
                tensor(all.u, &u_kept)?,
                tensor(all.initial_state, &state_kept)?,
            ])
        };
        let inputs = [self.log_delta, self.a, self.p, self.b, u, &state];
        // SAFETY: the states are a tensor of their own, of which no other handle is left.
        unsafe { node("s4-final-state", &inputs, after, backward) }
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
        self.with_states([], |kernel, []| work(kernel))
    }

    /// With tensors of inputs and states too.
    fn with_states<R, const N: usize>(
        &self,
        others: [(&'static str, &Tensor); N],
        work: impl FnOnce(Kernel, [View<f32, 3>; N]) -> Result<R>,
    ) -> Result<R> {
        check_processor("a", self.a)?;
        let mut arguments = Arguments::default();
        for (name, tensor) in ["log_delta", "a", "p", "b", "c"].into_iter().zip(self.tensors()).chain(others) {
            arguments.add(name, tensor);
        }
        let locked = arguments.lock()?;
        let reader: Reader = locked.reader();
        let complex = "(d_inner, 2 * d_state)";
        let mut views = Vec::with_capacity(N);
        for (name, tensor) in others {
            let names = if name == "u" { "(batch, length, d_inner)" } else { "(batch, d_inner, 2 * d_state)" };
            views.push(reader.view::<Cpu, f32, 3>(name, names, tensor)?);
        }
        let views: [View<f32, 3>; N] = views.try_into().unwrap_or_else(|_| unreachable!("there are as many"));
        let kernel = Kernel {
            log_delta: reader.view::<Cpu, f32, 1>("log_delta", "(d_inner)", self.log_delta)?,
            a: reader.view::<Cpu, f32, 2>("a", complex, self.a)?,
            p: reader.view::<Cpu, f32, 3>("p", "(d_inner, rank, 2 * d_state)", self.p)?,
            b: reader.view::<Cpu, f32, 2>("b", complex, self.b)?,
            c: reader.view::<Cpu, f32, 2>("c", complex, self.c)?,
        };
        work(kernel, views)
    }
}

/// `A x` for rows of complex numbers: `Λ x` less each column of `P` times its real product with `x`, over states and their
/// conjugates.
fn low_rank_product(lambda: &Tensor, p: &Tensor, x: &Tensor) -> Result<Tensor> {
    let (rows, both) = x.dims2()?;
    let parts = |tensor: &Tensor| -> Result<[Tensor; 2]> {
        let tensor = tensor.reshape((rows, both / 2, 2))?;
        Ok([tensor.narrow(2, 0, 1)?, tensor.narrow(2, 1, 1)?])
    };
    let ([a, b], [re, im]) = (parts(lambda)?, parts(x)?);
    let product = [((&a * &re)? - (&b * &im)?)?, ((&a * &im)? + (&b * &re)?)?];
    let product = Tensor::cat(&product, 2)?.reshape((rows, both))?;
    // (rows, rank)
    let along = (p.broadcast_mul(&x.unsqueeze(1)?)?.sum(2)? * 2.0)?;
    product - p.broadcast_mul(&along.unsqueeze(2)?)?.sum(1)?
}
