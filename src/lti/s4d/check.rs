//! The only checks of the operator's arguments, on any memory.

use super::tensors::Sizes;
use super::{GradientsMut, Inputs, OutputGradients, OutputMut, RECURRENCE_ROWS, UpdateInputs, UpdateMut};
use crate::arguments::{MAX_D_STATE, check_channels, check_count, check_exchanged};
use crate::kinds::{CheckGradients, CheckViews};
use crate::sequences::Sequences;
use crate::view::check_len;
use crate::{Element, Error, Host, Memory, Result, View};

pub(super) const ACTIVATION_NAMES: &str = "(batch, length, d_inner)";
#[cfg(feature = "cuda")]
pub(super) const RECURRENCE_NAMES: &str = "(d_inner, 6, d_state)";
pub(super) const STATE_NAMES: &str = "(sequences, d_inner, 2 * d_state)";

/// The names of the dimensions of the pool and of the states after each token.
pub(crate) const POOL_NAMES: [&str; 2] = ["(slots, d_inner, 2 * d_state)", "(batch, tokens, d_inner, 2 * d_state)"];

/// Checks the number of pairs that the last dimension of a complex parameter gives.
pub(super) fn check_pairs<M: Memory>(argument: &'static str, view: &View<f32, 2, M>) -> Result<usize> {
    let (pairs, rest) = (view.shape[1] / 2, view.shape[1] % 2);
    if rest == 0 && (1..=MAX_D_STATE).contains(&pairs) {
        return Ok(pairs);
    }
    let expected = format_args!("2 * d_state as its last dimension, d_state from 1 to {MAX_D_STATE}").to_string();
    Err(Error::argument(argument, expected, format_args!("shape {:?}", view.shape)))
}

impl<'a, T: Element, M: Memory> Inputs<'a, T, M> {
    /// Checks every argument. This is the only place that does; all implementations read what it returns.
    pub(crate) fn check(&self) -> Result<Problem<'a, T, M>> {
        check_count("u", &self.u)?;
        let ([batch, length, d_inner], d_state) = (self.u.shape, check_pairs("a", &self.a)?);
        check_channels("u", ACTIVATION_NAMES, &self.u, "a", self.a.shape[0])?;
        let sequences = Sequences::check(batch, length, self.cu_seqlens)?;
        let sizes = Sizes { batch, length, d_inner, d_state, sequences: sequences.count() };
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
    pub fn state_shape(&self) -> [usize; 3] {
        [self.sizes.sequences, self.sizes.d_inner, 2 * self.sizes.d_state]
    }

    /// Checks what a forward pass writes.
    pub fn check_outputs(&self, outputs: &OutputMut<T, M>) -> Result<()> {
        check_len("out", ACTIVATION_NAMES, &self.inputs.u.shape, M::len(outputs.out))?;
        match &outputs.final_state {
            Some(state) => check_len("final_state", STATE_NAMES, &self.state_shape(), M::len(state)),
            None => Ok(()),
        }
    }

    /// Checks what a backward pass reads beside the inputs, and what it writes.
    pub fn check_backward(&self, d_outputs: &OutputGradients<T, M>, gradients: &GradientsMut<T, M>) -> Result<()> {
        self.check_output_gradients(d_outputs)?;
        self.inputs.tensors().zip(gradients.by_ref())?.shaped(self.sizes).map(&mut CheckGradients)?;
        Ok(())
    }

    /// Checks the gradients that flow into a backward pass.
    pub fn check_output_gradients(&self, d_outputs: &OutputGradients<T, M>) -> Result<()> {
        check_exchanged("d_out", ACTIVATION_NAMES, &d_outputs.d_out, self.inputs.u.shape)?;
        match &d_outputs.d_final_state {
            Some(view) => view.check("d_final_state", STATE_NAMES, self.state_shape()),
            None => Ok(()),
        }
    }
}

impl<'a, T: Element, M: Memory> UpdateInputs<'a, T, M> {
    /// Checks every argument but those of [`UpdateProblem::check_outputs`].
    pub(crate) fn check(&self) -> Result<UpdateProblem<'a, T, M>> {
        check_count("u", &self.u)?;
        let [batch, length, d_inner] = self.u.shape;
        let d_state = check_pairs("c", &self.c)?;
        check_channels("u", "(batch, tokens, d_inner)", &self.u, "c", self.c.shape[0])?;
        let sizes = Sizes { batch, length, d_inner, d_state, sequences: batch };
        self.tensors().shaped(sizes).map(&mut CheckViews)?;
        Ok(UpdateProblem { inputs: *self, sizes })
    }
}

/// Inputs that have passed [`UpdateInputs::check`]. The tokens are the length of its `sizes`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UpdateProblem<'a, T: Element, M: Memory = Host> {
    pub inputs: UpdateInputs<'a, T, M>,
    pub sizes: Sizes,
}

impl<T: Element, M: Memory> UpdateProblem<'_, T, M> {
    pub fn state_shape(&self) -> [usize; 2] {
        [self.sizes.d_inner, 2 * self.sizes.d_state]
    }

    pub fn token_state_shape(&self) -> [usize; 4] {
        let Sizes { batch, length, d_inner, d_state, .. } = self.sizes;
        [batch, length, d_inner, 2 * d_state]
    }

    /// Checks the pool, the slots and the buffers to be written.
    pub fn check_outputs<St: Element>(&self, outputs: &UpdateMut<T, St, M>) -> Result<()> {
        outputs.check(self.inputs.u.shape, self.state_shape(), POOL_NAMES, self.inputs.slots)
    }
}

/// Checks the parameters of [`recurrence`](super::recurrence), and gives the shape of what it makes.
pub(super) fn check_recurrence<M: Memory>(
    log_delta: &View<f32, 1, M>,
    a: &View<f32, 2, M>,
    b: &View<f32, 2, M>,
) -> Result<[usize; 3]> {
    let d_state = check_pairs("a", a)?;
    a.check("a", "(d_inner, 2 * d_state)", a.shape)?;
    b.check("b", "(d_inner, 2 * d_state)", a.shape)?;
    log_delta.check("log_delta", "(d_inner)", [a.shape[0]])?;
    Ok(recurrence_shape(a.shape[0], d_state))
}

/// The shape of what [`recurrence`](super::recurrence) makes of the parameters of `d_inner` channels.
pub(super) fn recurrence_shape(d_inner: usize, d_state: usize) -> [usize; 3] {
    [d_inner, RECURRENCE_ROWS, d_state]
}
