//! The only checks of a state update's arguments, on any memory.

use super::{Inputs, UpdateMut};
use crate::arguments::Dims;
use crate::kinds::CheckViews;
use crate::{Element, Host, Memory, Result};

const ACTIVATION_NAMES: &str = "(batch, tokens, d_inner)";

/// The names of the dimensions of the pool and of the states after each token.
pub(crate) const STATE_NAMES: [&str; 2] = ["(slots, d_inner, d_state)", "(batch, tokens, d_inner, d_state)"];

impl<'a, T: Element, M: Memory> Inputs<'a, T, M> {
    /// Checks every argument but those of [`Problem::check_outputs`].
    pub(crate) fn check(&self) -> Result<Problem<'a, T, M>> {
        let dims = Dims::check(ACTIVATION_NAMES, &self.u, &self.a, &self.b, &self.c)?;
        self.tensors().shaped(dims).map(&mut CheckViews)?;
        Ok(Problem { inputs: *self, dims })
    }
}

/// Inputs that have passed [`Inputs::check`]. The tokens are the steps of its `dims`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a, T: Element, M: Memory = Host> {
    pub inputs: Inputs<'a, T, M>,
    pub dims: Dims,
}

impl<'a, T: Element, M: Memory> Problem<'a, T, M> {
    pub fn activation_shape(&self) -> [usize; 3] {
        [self.dims.batch, self.dims.len, self.dims.d_inner]
    }

    pub fn state_shape(&self) -> [usize; 2] {
        [self.dims.d_inner, self.dims.d_state]
    }

    pub fn token_state_shape(&self) -> [usize; 4] {
        [self.dims.batch, self.dims.len, self.dims.d_inner, self.dims.d_state]
    }

    /// Checks the pool, the slots and the buffers to be written.
    pub fn check_outputs<St: Element>(&self, outputs: &UpdateMut<T, St, M>) -> Result<()> {
        outputs.check(self.activation_shape(), self.state_shape(), STATE_NAMES, self.inputs.slots)
    }
}
