//! The scan with complex states on the CPU: vectorised over channels, in `f64`; parallel over blocks of channels and
//! sequences.
//!
//! A block is 8 channels of a group. Its states are carried through the steps one after the other, and at each step and
//! state there is one exponential, sine and cosine for all of its channels. Backward goes through chunks of 64 steps from
//! the last, with the states before each kept from a forward pass over them, and sums up what channels add to the
//! gradients of `B` and `C` for itself in each of at most 16 parts of the work, which is divided by shape alone: a
//! result is the same bits for any number of threads.

mod backward;
mod block;
mod forward;
mod math;
mod update;

use super::check::{Problem, UpdateProblem};
use super::{GradientsMut, Inputs, OutputGradients, OutputMut, UpdateInputs, UpdateMut};
use crate::simd::Isa;
use crate::{Element, Result};

/// Parts that the work of a backward pass is divided into, at most: each has sums of its own for `B` and `C`.
const TASKS: usize = 16;

/// Runs the scan with the widest instructions of this processor, on the threads of the current rayon pool.
///
/// # Errors
/// An argument that does not fit; see [`Inputs`] and [`OutputMut`]. Nothing is written then.
pub fn forward<T: Element>(inputs: &Inputs<T>, outputs: OutputMut<T>) -> Result<()> {
    forward_with(Isa::best(), inputs, outputs)
}

/// [`forward`] with the instruction set given (plain code if this processor does not have it).
pub fn forward_with<T: Element>(isa: Isa, inputs: &Inputs<T>, outputs: OutputMut<T>) -> Result<()> {
    forward_checked(isa, &inputs.check()?, outputs)
}

/// [`forward_with`] of inputs that have been checked.
pub(crate) fn forward_checked<T: Element>(isa: Isa, problem: &Problem<T>, outputs: OutputMut<T>) -> Result<()> {
    problem.check_outputs(&outputs)?;
    forward::run(isa, problem, outputs);
    Ok(())
}

/// Computes the gradient of every input that was given. It needs nothing from a forward pass.
///
/// # Errors
/// An argument that does not fit; nothing is written then. Sums over steps that do not fit in memory.
pub fn backward<T: Element>(
    inputs: &Inputs<T>,
    d_outputs: OutputGradients<T>,
    gradients: GradientsMut<T>,
) -> Result<()> {
    backward_with(Isa::best(), inputs, d_outputs, gradients)
}

/// [`backward`] with the instruction set given (plain code if this processor does not have it).
pub fn backward_with<T: Element>(
    isa: Isa,
    inputs: &Inputs<T>,
    d_outputs: OutputGradients<T>,
    gradients: GradientsMut<T>,
) -> Result<()> {
    backward_checked(isa, &inputs.check()?, d_outputs, gradients)
}

/// [`backward_with`] of inputs that have been checked.
pub(crate) fn backward_checked<T: Element>(
    isa: Isa,
    problem: &Problem<T>,
    d_outputs: OutputGradients<T>,
    gradients: GradientsMut<T>,
) -> Result<()> {
    problem.check_backward(&d_outputs, &gradients)?;
    backward::run(isa, problem, d_outputs, gradients)
}

/// Brings states up to date by some tokens.
///
/// # Errors
/// An argument that does not fit; see [`UpdateInputs`] and [`UpdateMut`]. Nothing is written then.
pub fn update<T: Element, St: Element>(inputs: &UpdateInputs<T>, outputs: UpdateMut<T, St>) -> Result<()> {
    update_checked(&inputs.check()?, outputs)
}

/// [`update`] of inputs that have been checked.
pub(crate) fn update_checked<T: Element, St: Element>(
    problem: &UpdateProblem<T>,
    outputs: UpdateMut<T, St>,
) -> Result<()> {
    problem.check_outputs(&outputs)?;
    update::run(problem, outputs);
    Ok(())
}
