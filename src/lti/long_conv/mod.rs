//! A causal convolution of every channel with a kernel as long as the sequence, by Fourier transforms: the
//! convolutional view of S4 and S4D, forward and backward.
//!
//! ```text
//! y_t = Σ_k K_k u_{t-k} + D u_t          summed over k from 0 to t, and below the kernel's length
//! ```
//!
//! A sequence of `L` steps takes `L log L` operations for each channel, and no state goes in or out. Everything is
//! `f32`: an output is off by 2^-24 of `‖K‖ ‖u‖` for each of the `log L` passes of a transform, however small it is
//! itself. So what is not finite reaches all steps of its channel and sequence, those before it too.
//!
//! [`Inputs`] says what the operator reads; [`cpu`] runs it on slices, [`reference`](mod@reference) is the sum written
//! plainly in `f64`. [`Inputs::forward`] and [`Inputs::backward`] allocate their results.

#[cfg(feature = "candle")]
pub(crate) mod candle;
mod check;
pub mod cpu;
pub mod reference;
pub(crate) mod tensors;

pub use tensors::{Gradients, GradientsMut, Inputs, Tensors};

use bytemuck::Pod;

use crate::arguments::zeroed;
use crate::kinds::{Slices, Zeros};
use crate::{Element, Result, View};
use check::Problem;

impl<T: Element> Gradients<T> {
    /// Zeros for every input that is given.
    ///
    /// # Errors
    /// Inputs that do not fit each other, and one whose gradient does not fit in memory.
    pub fn zeroed(inputs: &Inputs<T>) -> Result<Self> {
        inputs.check()?.zero_gradients()
    }

    /// The buffers, to be written.
    pub fn as_mut(&mut self) -> GradientsMut<'_, T> {
        let Ok(buffers) = self.by_mut().map(&mut Slices);
        buffers
    }
}

impl<T: Element> Problem<'_, T> {
    /// Zeros for the gradient of every input that is given.
    fn zero_gradients<A: Pod, P: Pod>(&self) -> Result<Gradients<A, P>> {
        self.inputs.tensors().shaped(self.sizes).map(&mut Zeros)
    }
}

impl<T: Element> Inputs<'_, T> {
    /// Runs the convolution on the CPU: `(batch, length, d_inner)`.
    ///
    /// # Errors
    /// An argument that does not fit.
    pub fn forward(&self) -> Result<Vec<T>> {
        let mut out = zeroed("u", &self.u.shape)?;
        cpu::forward(self, &mut out)?;
        Ok(out)
    }

    /// The gradient of every input that was given, on the CPU, from that of the output, `(batch, length, d_inner)`.
    ///
    /// # Errors
    /// An argument that does not fit.
    pub fn backward(&self, d_out: View<T, 3>) -> Result<Gradients<T>> {
        let mut gradients = Gradients::zeroed(self)?;
        cpu::backward(self, d_out, gradients.as_mut())?;
        Ok(gradients)
    }
}
