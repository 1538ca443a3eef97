//! Launching the backward pass.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::launch::{heads, inputs, launch, reads_out, set_parts, shape};
use super::plan::{Backward, grid};
use crate::attention::check::Problem;
use crate::attention::tensors::{Sizes, Tensors};
use crate::attention::{GradientsMut, Inputs, OutputGradients};
use crate::cuda::params::attention as kernels;
use crate::cuda::{Arguments, Cuda, Device, DeviceBuffers, Module, Sum};
use crate::{Element, Result};

/// Computes the gradients of all inputs, asynchronously, from the results of a forward pass and the gradient of `out`.
///
/// # Errors
/// An argument that does not fit, see [`Inputs`], [`OutputGradients`] and [`GradientsMut`], or that lies on another device; keys of
/// several sequences at one place; a sequence of more than 2^30 keys, or of more queries of the heads that read one head of keys.
/// Nothing is written then. What the driver refuses.
pub fn backward<T: Element>(
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    outputs: OutputGradients<T, Cuda>,
    gradients: GradientsMut<T, Cuda>,
) -> Result<()> {
    backward_checked(stream, &inputs.check()?, outputs, gradients)
}

/// [`backward`] of inputs that have been checked.
pub(crate) fn backward_checked<T: Element>(
    stream: &Arc<CudaStream>,
    problem: &Problem<T, Cuda>,
    outputs: OutputGradients<T, Cuda>,
    gradients: GradientsMut<T, Cuda>,
) -> Result<()> {
    problem.check_backward(&outputs, &gradients)?;
    let Sizes { batch, length, heads: query_heads, d_head, rows, steps, kv_heads } = problem.sizes;
    let of_queries = shape!(backward, T, d_head, THREADS, |of| of::ROWS);
    let of_keys = shape!(backward, T, d_head, KEY_THREADS, |of| of::ROWS);
    let plan = Backward::of(problem, of_queries.rows)?;
    for tiles in [&plan.queries, &plan.keys].into_iter().flatten() {
        grid(tiles.count(), kv_heads)?;
    }
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let Tensors { q: d_q, k: d_k, v: d_v }: Tensors<DeviceBuffers> = gradients.map(&mut arguments)?;
    let inputs = inputs(problem, &mut arguments, &[d_q, d_k, d_v])?;
    let out = arguments.view("out", &outputs.out)?;
    let d_out = heads::<T>(arguments.view("d_out", &outputs.d_out)?, d_head);
    let lse = arguments.view("lse", &outputs.lse)?;
    if plan.leaves_keys {
        let m = rows * steps * kv_heads * d_head;
        let zeros = |to| Sum { from: 0, parts: 0, m, stride: m, to, is_full: false };
        // SAFETY: nothing is read, and the gradients have been checked to be as many.
        unsafe { device.sum::<T>(&[zeros(d_k), zeros(d_v)]) }?;
    }
    let (Some(queries), Some(keys)) = (&plan.queries, &plan.keys) else { return Ok(()) };
    let of_rows = device.workspace::<f32>("what is known of queries", 2 * batch * length * query_heads)?;
    let [lse_batch, lse_step, lse_head] = lse.strides;
    let mut params = kernels::Backward {
        inputs,
        out: if reads_out::<T>() { heads::<T>(out, d_head) } else { d_out },
        d_out,
        lse: lse.data,
        lse_batch,
        lse_step,
        lse_head,
        of_rows: device.address(&of_rows),
        d_q,
        d_k,
        d_v,
    };
    let launches = [
        (queries, Module::ATTENTION_BACKWARD_QUERIES, "attention_backward_queries", of_queries),
        (keys, Module::ATTENTION_BACKWARD_KEYS, "attention_backward_keys", of_keys),
    ];
    for (tiles, module, name, shape) in launches {
        let _table = set_parts(&device, tiles, &mut params.inputs)?;
        // SAFETY: every address and extent has been checked by `Inputs::check` and `check_backward`; each element of the gradients
        // is written by one block, as no key is of two sequences; and the first kernel leaves what the second reads of each query.
        unsafe { launch::<T, _>(&device, module, name, shape, [tiles.count(), kv_heads], &params) }?;
    }
    Ok(())
}
