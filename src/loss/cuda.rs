//! The loss on NVIDIA GPUs; see [`cuda`](crate::cuda) for how tensors are passed.
//!
//! A block takes a row, which it reads once from memory and once more from the second-level cache; a gradient is written once.
//! Rows may start anywhere: those elements that are in no aligned vector of 16 bytes are accessed one by one.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use super::check::Problem;
use super::{Inputs, InputsMut, Options};
use crate::cuda::params::loss::{self as kernels, THREADS, VECTORS};
use crate::cuda::{Arguments, Cuda, Device, GRID_COLUMNS, Kernel, Module, suffix};
use crate::{Element, Result, View};

const _: () = assert!(kernels::IGNORED == super::IGNORED as u64, "both sides leave out the same");

/// Threads of a warp, whole numbers of which the kernel wants.
const WARP: usize = 32;

/// Writes the loss of each row to `losses`, `(rows)`, on the stream's device, asynchronously.
///
/// # Errors
/// An argument that does not fit, or that lies on another device; nothing is written then. What the driver refuses.
pub fn losses<T: Element>(
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    losses: &mut CudaSlice<f32>,
) -> Result<()> {
    let problem = inputs.check()?;
    problem.check_losses(losses.len())?;
    let mut arguments = Arguments::new(stream);
    let View { data, offset, .. } = inputs.logits;
    let logits = arguments.read("logits", data, offset)?;
    // SAFETY: without a scale the kernel only reads the logits.
    unsafe { launch::<T>(stream, &problem, arguments, logits, inputs.targets, losses) }
}

/// [`losses`] whose gradient, times the inputs' `scale`, takes the place of the logits.
///
/// # Errors
/// As [`losses`].
pub fn losses_and_gradient<T: Element>(
    stream: &Arc<CudaStream>,
    inputs: InputsMut<T, Cuda>,
    losses: &mut CudaSlice<f32>,
) -> Result<()> {
    let problem = inputs.check()?;
    problem.check_losses(losses.len())?;
    let mut arguments = Arguments::new(stream);
    let start = arguments.write("logits", inputs.logits.data)?;
    let logits = start.wrapping_add((problem.offset * size_of::<T>()) as u64);
    // SAFETY: the logits are borrowed to be written, and the check has seen to it that rows do not share elements.
    unsafe { launch::<T>(stream, &problem, arguments, logits, inputs.targets, losses) }
}

/// # Safety
/// `logits` is the address of the first row, whose memory `arguments` holds, for reading and if there is a scale for writing.
unsafe fn launch<'a, T: Element>(
    stream: &'a Arc<CudaStream>,
    problem: &Problem,
    mut arguments: Arguments<'a>,
    logits: u64,
    targets: &'a CudaSlice<u32>,
    losses: &'a mut CudaSlice<f32>,
) -> Result<()> {
    let device = Device::new(stream)?;
    let &Problem { rows, vocab, stride, options: Options { label_smoothing, z_loss }, scale, .. } = problem;
    let params = kernels::CrossEntropy {
        logits,
        targets: arguments.tokens("targets", targets)?,
        losses: arguments.write("losses", losses)?,
        rows: rows as i64,
        vocab: vocab as i64,
        stride: stride as i64,
        label_smoothing,
        z_loss,
        scale: scale.unwrap_or(0.0),
        with_gradient: scale.is_some().into(),
    };
    if rows == 0 {
        return Ok(());
    }
    let kernel = Kernel::new(Module::LOSS_CROSS_ENTROPY, ["loss_cross_entropy", suffix(T::DTYPE)]);
    // SAFETY: every address and extent has been checked; each row and its loss are written by one block.
    unsafe { device.launch(&kernel, [rows.min(GRID_COLUMNS), 1], threads(vocab, size_of::<T>()), 0, &params) }
}

/// Threads to a row, by its size alone, which gives the order of sums.
fn threads(vocab: usize, size: usize) -> usize {
    let vectors = vocab * size / 16;
    vectors.div_ceil(VECTORS).next_power_of_two().clamp(WARP, THREADS)
}

#[cfg(test)]
mod tests {
    use super::threads;

    #[test]
    fn a_row_has_threads_by_its_size() {
        assert_eq!([1, 256, 1024, 2048, 50_280].map(|vocab| threads(vocab, 2)), [32, 32, 32, 64, 1024]);
        assert_eq!([2048, 1 << 30].map(|vocab| threads(vocab, 4)), [128, 1024]);
    }
}
