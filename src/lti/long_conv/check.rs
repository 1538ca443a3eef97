//! The only checks of a long convolution's arguments, on any memory.

use super::tensors::Sizes;
use super::{GradientsMut, Inputs};
use crate::arguments::{check_channels, check_count, check_exchanged};
use crate::kinds::{CheckGradients, CheckViews};
use crate::sequences::Sequences;
use crate::view::check_len;
use crate::{Element, Error, Host, Memory, Result, View};

pub(super) const ACTIVATION_NAMES: &str = "(batch, length, d_inner)";

impl<'a, T: Element, M: Memory> Inputs<'a, T, M> {
    /// Checks every argument. This is the only place that does; all implementations read what it returns.
    pub(crate) fn check(&self) -> Result<Problem<'a, T, M>> {
        check_count("u", &self.u)?;
        let ([batch, length, d_inner], kernel_length) = (self.u.shape, self.kernel.shape[1]);
        if kernel_length == 0 {
            let got = format_args!("shape {:?}", self.kernel.shape).to_string();
            return Err(Error::argument("kernel", "at least one step as its last dimension", got));
        }
        check_channels("u", ACTIVATION_NAMES, &self.u, "kernel", self.kernel.shape[0])?;
        let sequences = Sequences::check(batch, length, self.cu_seqlens)?;
        let sizes = Sizes { batch, length, d_inner, kernel_length };
        self.tensors().shaped(sizes).map(&mut CheckViews)?;
        Ok(Problem { inputs: *self, sizes, sequences })
    }
}

/// Inputs that have passed [`Inputs::check`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a, T: Element, M: Memory = Host> {
    pub inputs: Inputs<'a, T, M>,
    pub sizes: Sizes,
    pub sequences: Sequences<'a>,
}

impl<T: Element, M: Memory> Problem<'_, T, M> {
    /// Checks what a forward pass writes.
    pub fn check_output(&self, out: &M::Buffer<T>) -> Result<()> {
        check_len("out", ACTIVATION_NAMES, &self.inputs.u.shape, M::len(out))
    }

    /// Checks what a backward pass reads beside the inputs, and what it writes.
    pub fn check_backward(&self, d_out: &View<T, 3, M>, gradients: &GradientsMut<T, M>) -> Result<()> {
        check_exchanged("d_out", ACTIVATION_NAMES, d_out, self.inputs.u.shape)?;
        self.inputs.tensors().zip(gradients.by_ref())?.shaped(self.sizes).map(&mut CheckGradients)?;
        Ok(())
    }
}
