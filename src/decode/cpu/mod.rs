//! The operators of a decoding step on the CPU: products of few rows, which take as long as reading the matrix does.
//!
//! The elements of a matrix are read as they are stored and widened in registers. Four rows of it are read at a time, so
//! that the processor has as many loads on the way, and meet up to four rows of `x` while they are there. Work is parallel
//! over the rows of the matrix, where there is enough of it.
//!
//! Each element of a product is the sum in the lanes of one vector along the features, whose lanes are then added up. So it
//! depends on its row, its column and the instruction set alone, and not on what else is computed beside it.
//!
//! What stands before and after a product is the operators themselves: the norm, the step of the convolution, the state
//! update.

mod linear;
mod update;

use super::{Linear, LinearMut, LinearProblem, SelectiveUpdate, SelectiveUpdateMut, UpdateProblem};
use crate::simd::Isa;
use crate::{Element, Result};

/// Runs a product with the widest instructions of this processor, on the threads of the current rayon pool.
///
/// # Errors
/// An argument that does not fit; see [`Linear`] and [`LinearMut`]. Nothing is written then.
pub fn linear<X: Element, T: Element, O: Element, St: Element>(
    inputs: &Linear<X, T>,
    outputs: LinearMut<O, St>,
) -> Result<()> {
    linear_with(Isa::best(), inputs, outputs)
}

/// [`linear`] with the instruction set given (plain code if this processor does not have it).
///
/// # Errors
/// As [`linear`].
pub fn linear_with<X: Element, T: Element, O: Element, St: Element>(
    isa: Isa,
    inputs: &Linear<X, T>,
    outputs: LinearMut<O, St>,
) -> Result<()> {
    linear_checked(isa, &inputs.check()?, outputs)
}

/// [`linear_with`] of inputs that have been checked.
pub(crate) fn linear_checked<X: Element, T: Element, O: Element, St: Element>(
    isa: Isa,
    problem: &LinearProblem<X, T>,
    outputs: LinearMut<O, St>,
) -> Result<()> {
    problem.check_outputs(&outputs)?;
    linear::run(isa, problem, outputs)
}

/// Runs an update with the widest instructions of this processor, on the threads of the current rayon pool.
///
/// # Errors
/// An argument that does not fit; see [`SelectiveUpdate`] and [`SelectiveUpdateMut`]. Nothing is written then.
pub fn selective_update<T: Element, St: Element>(
    inputs: &SelectiveUpdate<T>,
    outputs: SelectiveUpdateMut<T, St>,
) -> Result<()> {
    selective_update_with(Isa::best(), inputs, outputs)
}

/// [`selective_update`] with the instruction set given (plain code if this processor does not have it).
///
/// # Errors
/// As [`selective_update`].
pub fn selective_update_with<T: Element, St: Element>(
    isa: Isa,
    inputs: &SelectiveUpdate<T>,
    outputs: SelectiveUpdateMut<T, St>,
) -> Result<()> {
    selective_update_checked(isa, &inputs.check()?, outputs)
}

/// [`selective_update_with`] of inputs that have been checked.
pub(crate) fn selective_update_checked<T: Element, St: Element>(
    isa: Isa,
    problem: &UpdateProblem<T>,
    outputs: SelectiveUpdateMut<T, St>,
) -> Result<()> {
    problem.check_outputs(&outputs)?;
    update::run(isa, problem, outputs)
}
