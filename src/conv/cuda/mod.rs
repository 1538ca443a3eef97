//! The convolution on NVIDIA GPUs; see [`cuda`](crate::cuda) for how tensors are passed.
//!
//! A thread walks four neighbouring channels (two in the backward pass, where a filter has more than four weights) through
//! a run of steps, the last inputs in registers, so that each input is read once but for the few before a run. That is as
//! fast as memory is where channels lie side by side, are a multiple of those four or two, and start at such multiples.
//! Everything else gets the same bits from loads of single elements, and slower.
//!
//! What a sequence gets does not depend on how the work is divided; only the gradients of the parameters sum over steps,
//! in an order that follows from the shape and the device.

mod update;

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use super::{GradientsMut, Inputs, OutputGradients, OutputMut, Problem, UpdateInputs, UpdateMut};
use crate::cuda::{Arguments, Cuda, Device, GRID_COLUMNS, Module, Sum, blocks, grid_rows, lies_whole, params, suffix};
use crate::sequences::Sequences;
use crate::{Element, Result};

pub use crate::pool::cuda::rollback;
pub use update::update;

/// Threads of a block, as in the kernels.
const THREADS: usize = 128;

/// The numbers of steps that runs may have; more than the rows of a state, so that runs other than a sequence's first
/// find all that comes before them among the inputs.
const RUN_STEPS: [usize; 3] = [64, 32, 16];

/// Runs the convolution on the stream's device, asynchronously.
///
/// # Errors
/// An argument that does not fit, see [`Inputs`] and [`OutputMut`], or that lies on another device; nothing is written
/// then. What the driver refuses.
pub fn forward<T: Element>(
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    outputs: OutputMut<T, Cuda>,
) -> Result<()> {
    let problem = inputs.check()?;
    problem.check_outputs(&outputs)?;
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let layout = Layout { channels: 4, threads: 1024 * device.processors, keep_empty: outputs.final_state.is_some() };
    let mut inputs = conv_inputs(&problem, layout, &mut arguments)?;
    let out = arguments.write("out", outputs.out)?;
    let final_state = arguments.write_optional("final_state", outputs.final_state)?;
    if inputs.runs.count == 0 {
        return Ok(());
    }
    let whole = is_whole::<T>(&inputs, &inputs.x, out, layout.channels);
    let variant = match (whole, problem.width) {
        (true, width @ ..=4) => format!("whole_{width}"),
        (true, _) => "whole_8".into(),
        (false, _) => "strided_8".into(),
    };
    let grid = layout.grid(&inputs, 20 * device.processors);
    let _table = upload_runs(&device, &problem, layout, &mut inputs.runs)?;
    let params = params::ConvForward { inputs, out, final_state };
    let name = format!("conv_forward_{variant}_{}", suffix(T::DTYPE));
    // SAFETY: every address and extent has been checked by `Inputs::check` and `check_outputs`, and each element of the
    // outputs is written by one thread.
    unsafe { device.launch(Module::CONV_FORWARD, &name, grid, THREADS, [0, 0], &params) }
}

/// Computes the gradient of every input that was given, asynchronously.
///
/// # Errors
/// An argument that does not fit, see [`Inputs`], [`OutputGradients`] and [`GradientsMut`], or that lies on another
/// device; nothing is written then. What the driver refuses.
pub fn backward<T: Element>(
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    d_outputs: OutputGradients<T, Cuda>,
    gradients: GradientsMut<T, Cuda>,
) -> Result<()> {
    let problem = inputs.check()?;
    problem.check_backward(&d_outputs, &gradients)?;
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let width = if problem.width <= 4 { 4 } else { 8 };
    let layout = Layout {
        channels: if width == 4 { 4 } else { 2 },
        threads: 768 * device.processors,
        keep_empty: gradients.initial_state.is_some(),
    };
    let mut inputs = conv_inputs(&problem, layout, &mut arguments)?;
    let d_out = arguments.activation("d_out", &d_outputs.d_out)?;
    let d_final_state = arguments.state_rows("d_final_state", &d_outputs.d_final_state)?;
    let d_x = arguments.write("gradients.x", gradients.x)?;
    let d_weight = arguments.write("gradients.weight", gradients.weight)?;
    let d_bias = arguments.write_optional("gradients.bias", gradients.bias)?;
    let d_initial_state = arguments.write_optional("gradients.initial_state", gradients.initial_state)?;

    let d_inner = problem.d_inner();
    let (weights, parameters) = (d_inner * problem.width, d_inner * (problem.width + 1));
    let grid = layout.grid(&inputs, 6 * device.processors);
    // Without a step there is no part, and the sums are zero.
    let parts = if inputs.runs.count == 0 { 0 } else { grid[1] };
    let workspace = device.workspace::<f32>("sums of the gradients of the parameters", parts * parameters)?;
    let from = device.address(&workspace);
    if parts > 0 {
        let whole = is_whole::<T>(&inputs, &inputs.x, d_x, layout.channels)
            && is_whole::<T>(&inputs, &d_out, d_x, layout.channels);
        let variant = match whole {
            true if problem.width < 4 => format!("whole_{}", problem.width),
            true => format!("whole_{width}"),
            false => format!("strided_{width}"),
        };
        let _table = upload_runs(&device, &problem, layout, &mut inputs.runs)?;
        let params = params::ConvBackward { inputs, d_out, d_final_state, d_x, d_initial_state, parts: from };
        let name = format!("conv_backward_{variant}_{}", suffix(T::DTYPE));
        // SAFETY: every address and extent has been checked by `Inputs::check` and `check_backward`, each element of the
        // gradients is written by one thread, and the workspace has room for what each row of blocks leaves.
        unsafe { device.launch(Module::CONV_BACKWARD, &name, grid, THREADS, [0, 0], &params) }?;
    }
    let sum = |first: usize, m, to| {
        let from = from + (first * size_of::<f32>()) as u64;
        Sum { from, parts, m, stride: parameters, to, is_full: true }
    };
    let sums = [sum(0, weights, d_weight), sum(weights, d_inner, d_bias)];
    // SAFETY: the parts are in the workspace, the weights' before the biases', and the gradients have been checked to be as
    // many.
    unsafe { device.sum::<f32>(if d_bias == 0 { &sums[..1] } else { &sums }) }
}

/// How a pass divides its work.
#[derive(Clone, Copy)]
struct Layout {
    /// The channels of a thread.
    channels: usize,
    /// The threads that fill the device.
    threads: usize,
    /// Give sequences without steps a run that hands their state on.
    keep_empty: bool,
}

impl Layout {
    fn runs_of(self, len: usize, steps: usize) -> usize {
        len.div_ceil(steps).max(self.keep_empty.into())
    }

    fn count<T: Element>(self, problem: &Problem<T, Cuda>, steps: usize) -> usize {
        match problem.sequences {
            // As many as there are steps, or states in memory, at most.
            Sequences::Dense { batch, len } => batch * self.runs_of(len, steps),
            Sequences::Packed(_) => problem.sequences.iter().map(|sequence| self.runs_of(sequence.len, steps)).sum(),
        }
    }

    fn runs<T: Element>(self, problem: &Problem<T, Cuda>) -> params::Runs {
        let groups = problem.d_inner().div_ceil(self.channels);
        let threads = |steps| self.count(problem, steps).saturating_mul(groups);
        // Longer runs hide more of their loads: those of 32 steps are worth it with a sixth of the threads.
        let [long, middle, short] = RUN_STEPS;
        let steps = if threads(long) >= self.threads {
            long
        } else if threads(middle) >= self.threads / 6 {
            middle
        } else {
            short
        };
        let len = problem.inputs.x.shape[1];
        params::Runs {
            packed: 0,
            sequences: problem.sequences.count() as i64,
            len: len as i64,
            per_row: self.runs_of(len, steps) as i64,
            steps: steps as i64,
            count: self.count(problem, steps) as i64,
        }
    }

    /// A grid of about `room` blocks.
    fn grid(self, inputs: &params::ConvInputs, room: usize) -> [usize; 2] {
        let lanes = 1 << inputs.lane_shift;
        let columns = blocks((inputs.d_inner as usize).div_ceil(self.channels), lanes).min(GRID_COLUMNS);
        [columns, grid_rows(columns, blocks(inputs.runs.count as usize, THREADS / lanes), room)]
    }
}

/// The table that kernels find runs of packed sequences by; see `Runs` in kernels/conv.cuh.
fn upload_runs<T: Element>(
    device: &Device,
    problem: &Problem<T, Cuda>,
    layout: Layout,
    runs: &mut params::Runs,
) -> Result<Option<CudaSlice<u64>>> {
    let Sequences::Packed(offsets) = problem.sequences else { return Ok(None) };
    let mut entries = Vec::with_capacity(2 * offsets.len());
    let mut first = 0;
    for sequence in problem.sequences.iter() {
        entries.extend([first as u64, sequence.start as u64]);
        first += layout.runs_of(sequence.len, runs.steps as usize);
    }
    entries.extend([first as u64, problem.inputs.x.shape[1] as u64]);
    let table = device.upload("the runs of packed sequences", &entries)?;
    runs.packed = device.address(&table);
    Ok(Some(table))
}

fn conv_inputs<'a, T: Element>(
    problem: &Problem<'a, T, Cuda>,
    layout: Layout,
    arguments: &mut Arguments<'a>,
) -> Result<params::ConvInputs> {
    let inputs = &problem.inputs;
    let d_inner = problem.d_inner();
    Ok(params::ConvInputs {
        x: arguments.activation("x", &inputs.x)?,
        weight: arguments.matrix("weight", &inputs.weight)?,
        bias: arguments.vector("bias", &inputs.bias)?,
        initial_state: arguments.state_rows("initial_state", &inputs.initial_state)?,
        runs: layout.runs(problem),
        d_inner: d_inner as i64,
        width: problem.width as i64,
        lane_shift: d_inner.div_ceil(layout.channels).min(32).next_power_of_two().ilog2().into(),
        flags: u64::from(inputs.options.silu) | u64::from(inputs.options.reverse) << 1,
    })
}

/// Whether `count` neighbouring channels of a tensor, and of the dense one at `written`, can be accessed at a time.
fn is_whole<T>(inputs: &params::ConvInputs, tensor: &params::Activation, written: u64, count: usize) -> bool {
    tensor.channel == 1
        && lies_whole::<T>(tensor.data, &[tensor.batch, tensor.step], count)
        && lies_whole::<T>(written, &[inputs.d_inner], count)
}
