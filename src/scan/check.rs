//! The only checks of a scan's arguments, on any memory.

use super::{CheckpointSteps, GradientsMut, Inputs, OutputGradients, OutputMut};
use crate::arguments::{Dims, check_exchanged};
use crate::kinds::{CheckGradients, CheckViews};
use crate::sequences::Sequences;
use crate::view::check_len;
use crate::{Element, Error, Host, Memory, Result};

pub(super) const ACTIVATION_NAMES: &str = "(batch, length, d_inner)";
pub(super) const STATE_NAMES: &str = "(sequences, d_inner, d_state)";

impl<'a, T: Element, M: Memory> Inputs<'a, T, M> {
    /// Checks every argument. This is the only place that does; all implementations read what it returns.
    pub(crate) fn check(&self) -> Result<Problem<'a, T, M>> {
        let mut dims = Dims::check(ACTIVATION_NAMES, &self.u, &self.a, &self.b, &self.c)?;
        let sequences = Sequences::check(dims.batch, dims.len, self.cu_seqlens)?;
        dims.sequences = sequences.count();
        self.tensors().shaped(dims).map(&mut CheckViews)?;
        Ok(Problem { inputs: *self, dims, sequences })
    }
}

/// Inputs that have passed [`Inputs::check`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a, T: Element, M: Memory = Host> {
    pub inputs: Inputs<'a, T, M>,
    pub dims: Dims,
    pub sequences: Sequences<'a>,
}

impl<T: Element, M: Memory> Problem<'_, T, M> {
    /// Whether a forward pass has nothing to write, whatever the number of channels or batch rows, which then can be more
    /// than could be counted through.
    pub fn is_nothing(&self, with_state: bool) -> bool {
        self.dims.batch * self.dims.len == 0 && !(with_state && self.sequences.count() > 0)
    }

    pub fn activation_shape(&self) -> [usize; 3] {
        [self.dims.batch, self.dims.len, self.dims.d_inner]
    }

    pub fn state_shape(&self) -> [usize; 3] {
        [self.dims.sequences, self.dims.d_inner, self.dims.d_state]
    }

    /// The steps between two states that are kept of a sequence.
    pub fn checkpoint_steps(&self) -> usize {
        self.inputs.options.checkpoint_steps.get()
    }

    /// See [`Inputs::checkpoint_len`].
    pub fn checkpoint_len(&self) -> Result<usize> {
        let Dims { batch, len, d_inner, d_state, .. } = self.dims;
        // `d_inner` and `d_state` may belong to views with strides of zero, so that nothing has counted their product.
        (batch * len / self.checkpoint_steps()).checked_mul(d_inner).and_then(|n| n.checked_mul(d_state)).ok_or_else(
            || {
                let got = format_args!("shape {:?} with d_state {d_state}", self.inputs.u.shape).to_string();
                Error::argument("u", "a shape whose checkpoints can be counted", got)
            },
        )
    }

    /// Checks what a forward pass writes.
    pub fn check_outputs(&self, outputs: &OutputMut<T, M>) -> Result<()> {
        check_len("out", ACTIVATION_NAMES, &self.activation_shape(), M::len(outputs.out))?;
        if let Some(state) = &outputs.final_state {
            check_len("final_state", STATE_NAMES, &self.state_shape(), M::len(state))?;
        }
        if let Some(checkpoints) = &outputs.checkpoints {
            self.check_checkpoints(M::len(checkpoints))?;
        }
        Ok(())
    }

    /// Checks what a backward pass reads beside the inputs, and what it writes.
    pub fn check_backward(
        &self,
        checkpoints: &M::Buffer<f32>,
        d_outputs: &OutputGradients<T, M>,
        gradients: &GradientsMut<T, M>,
    ) -> Result<()> {
        self.check_checkpoints(M::len(checkpoints))?;
        self.check_output_gradients(d_outputs)?;
        self.inputs.tensors().zip(gradients.by_ref())?.shaped(self.dims).map(&mut CheckGradients)?;
        Ok(())
    }

    /// Checks the gradients that flow into a backward pass.
    pub fn check_output_gradients(&self, d_outputs: &OutputGradients<T, M>) -> Result<()> {
        check_exchanged("d_out", ACTIVATION_NAMES, &d_outputs.d_out, self.activation_shape())?;
        match &d_outputs.d_final_state {
            Some(view) => view.check("d_final_state", STATE_NAMES, self.state_shape()),
            None => Ok(()),
        }
    }

    fn check_checkpoints(&self, len: usize) -> Result<()> {
        let Dims { batch, len: steps, d_inner, d_state, .. } = self.dims;
        let shape = [batch * steps / self.checkpoint_steps(), d_state, d_inner];
        let names = match self.inputs.options.checkpoint_steps {
            CheckpointSteps::Every16 => "(batch·length/16, d_state, d_inner)",
            CheckpointSteps::Every32 => "(batch·length/32, d_state, d_inner)",
            CheckpointSteps::Every64 => "(batch·length/64, d_state, d_inner)",
        };
        check_len("checkpoints", names, &shape, len)
    }
}
