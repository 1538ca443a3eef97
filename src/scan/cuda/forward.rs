//! Launching the forward pass.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::launch::{Kernel, LaunchShape, Undivided};
use super::plan::Pass;
use super::{Inputs, OutputMut, PerLane, Plan};
use crate::arguments::Dims;
use crate::cuda::params::scan::{self as kernels, STATE_BLOCK, forward_few_channels as few, forward_general};
use crate::cuda::{Arguments, Cuda, Device, GRID_ROWS, Module};
use crate::{Element, MAX_D_STATE, Result};

/// Runs the scan on the stream's device.
///
/// # Errors
/// An argument that does not fit, or lies on another device; nothing is written then. What the driver refuses.
pub fn forward<T: Element>(
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    outputs: OutputMut<T, Cuda>,
) -> Result<()> {
    forward_with(Plan::default(), stream, inputs, outputs)
}

/// [`forward`] divided as `plan` says.
pub fn forward_with<T: Element>(
    plan: Plan,
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    outputs: OutputMut<T, Cuda>,
) -> Result<()> {
    let problem = inputs.check()?;
    problem.check_outputs(&outputs)?;
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let mut undivided = Undivided::new(&problem, &mut arguments)?;
    let out = arguments.write("out", outputs.out)?;
    let final_state = arguments.write_optional("final_state", outputs.final_state)?;
    let checkpoints = arguments.write_optional("checkpoints", outputs.checkpoints)?;
    let Dims { len, d_inner, .. } = problem.dims;
    if problem.sequences.count() == 0 || len == 0 && final_state == 0 {
        return Ok(());
    }
    undivided.is_fast &= !undivided.compensates && undivided.is_aligned::<T>(&[(out, &[d_inner as i64])]);
    let scan = undivided.divide(&device, &problem, &plan, Pass::Forward)?;
    let workspace = scan.workspace(&device)?;
    for (kernel, segments) in scan.launches() {
        let launch = |module: Option<Module>, name, inputs| {
            let inputs = kernels::Inputs { segments, ..inputs };
            let params = kernels::Forward { inputs, out, final_state, checkpoints };
            let (forward, shape) = shape::<T>(kernel, &inputs);
            let module = module.unwrap_or(forward);
            // SAFETY: every address and extent has been checked by `Inputs::check` and `check_outputs`, and the workspace
            // has an element for each that the chunk states' kernel writes and the kernel after them reads.
            unsafe { scan.launch::<T, _>(&device, module, name, shape, params) }
        };
        match &workspace {
            Some(workspace) if kernel == scan.kernel => {
                let inputs = scan.split_inputs(&device, workspace);
                launch(Some(Module::SCAN_CHUNK_STATE), "scan_chunk_state", inputs)?;
                launch(None, "scan_forward", inputs)?;
            }
            _ => launch(None, "scan_forward", scan.inputs)?,
        }
    }
    Ok(())
}

/// Steps that a block works on at least, if there are enough sequences: it takes several short ones one after the other,
/// to share the cost of reading the parameters.
const STEPS_PER_BLOCK: usize = 64;

fn shape<T: Element>(kernel: Kernel, inputs: &kernels::Inputs) -> (Module, LaunchShape) {
    use kernels::forward::{FOUR_CHANNELS, ONE_CHANNELS, THREADS};
    let (variant, channels, threads, module) = match kernel {
        Kernel::Fast(PerLane::Quarter) => {
            ("few_channels_one", few::ONE_CHANNELS, few::THREADS, Module::SCAN_FORWARD_FEW_CHANNELS)
        }
        Kernel::Fast(PerLane::Half) => {
            ("few_channels_two", few::TWO_CHANNELS, few::THREADS, Module::SCAN_FORWARD_FEW_CHANNELS)
        }
        Kernel::Fast(PerLane::One) => ("one", ONE_CHANNELS, THREADS, Module::SCAN_FORWARD),
        Kernel::Fast(PerLane::Four) => ("four", FOUR_CHANNELS, THREADS, Module::SCAN_FORWARD),
        Kernel::Turns => ("many_states", ONE_CHANNELS, THREADS, Module::SCAN_FORWARD),
        Kernel::General => {
            ("general", forward_general::CHANNELS, forward_general::THREADS, Module::SCAN_FORWARD_GENERAL)
        }
    };
    let per_block = (STEPS_PER_BLOCK / inputs.segments.len.max(1) as usize).max(1);
    let rows = (inputs.segments.count as usize).div_ceil(per_block).min(GRID_ROWS);
    let turns = |d_state: usize| d_state.div_ceil(STATE_BLOCK) * threads * kernels::forward::STATE_BLOCK_SMEM;
    let shared = match kernel {
        Kernel::Turns | Kernel::General => [turns(inputs.d_state as usize), turns(MAX_D_STATE)],
        Kernel::Fast(per_lane) => [per_lane.shared_memory::<T>(); 2],
    };
    (module, LaunchShape { variant, channels, threads, rows, shared })
}
