//! The only checks of a convolution's arguments, on any memory; those of the update are in `update.rs`.

use super::tensors::Sizes;
use super::{GradientsMut, Inputs, OutputGradients, OutputMut, WIDTHS};
use crate::arguments::{check_channels, check_count, check_exchanged};
use crate::kinds::{CheckGradients, CheckViews};
use crate::sequences::Sequences;
use crate::view::check_len;
use crate::{Element, Error, Host, Memory, Result, View};

pub(super) const ACTIVATION_NAMES: &str = "(batch, length, d_inner)";
pub(super) const STATE_NAMES: &str = "(sequences, width - 1, d_inner)";

impl<'a, T: Element, M: Memory> Inputs<'a, T, M> {
    /// Checks every argument. This is the only place that does; all implementations read what it returns.
    pub(crate) fn check(&self) -> Result<Problem<'a, T, M>> {
        let mut sizes = check_filter(ACTIVATION_NAMES, &self.x, &self.weight)?;
        let sequences = Sequences::check(sizes.batch, sizes.length, self.cu_seqlens)?;
        sizes.sequences = sequences.count();
        self.tensors().shaped(sizes).map(&mut CheckViews)?;
        Ok(Problem { inputs: *self, width: sizes.width, sizes, sequences })
    }
}

/// Checks the sizes that an input, whose dimensions have these names, and its filters give, every batch row a sequence.
/// Whether all tensors have the shapes that follow is left to be checked.
pub(super) fn check_filter<T: Element, M: Memory>(
    names: &str,
    x: &View<T, 3, M>,
    weight: &View<f32, 2, M>,
) -> Result<Sizes> {
    check_count("x", x)?;
    let ([batch, length, d_inner], width) = (x.shape, weight.shape[1]);
    if !WIDTHS.contains(&width) {
        let expected = format_args!("a width from {} to {} as its last dimension", WIDTHS.start(), WIDTHS.end());
        return Err(Error::argument("weight", expected.to_string(), format_args!("shape {:?}", weight.shape)));
    }
    check_channels("x", names, x, "weight", weight.shape[0])?;
    Ok(Sizes { batch, length, d_inner, width, sequences: batch })
}

/// Inputs that have passed [`Inputs::check`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a, T: Element, M: Memory = Host> {
    pub inputs: Inputs<'a, T, M>,
    pub width: usize,
    pub sizes: Sizes,
    pub sequences: Sequences<'a>,
}

impl<T: Element, M: Memory> Problem<'_, T, M> {
    pub fn d_inner(&self) -> usize {
        self.inputs.x.shape[2]
    }

    pub fn state_shape(&self) -> [usize; 3] {
        [self.sequences.count(), self.width - 1, self.d_inner()]
    }

    /// Checks what a forward pass writes.
    pub fn check_outputs(&self, outputs: &OutputMut<T, M>) -> Result<()> {
        check_len("out", ACTIVATION_NAMES, &self.inputs.x.shape, M::len(outputs.out))?;
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
        check_exchanged("d_out", ACTIVATION_NAMES, &d_outputs.d_out, self.inputs.x.shape)?;
        match &d_outputs.d_final_state {
            Some(view) => view.check("d_final_state", STATE_NAMES, self.state_shape()),
            None => Ok(()),
        }
    }
}
