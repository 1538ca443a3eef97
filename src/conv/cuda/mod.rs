//! The convolution on NVIDIA GPUs; see [`cuda`](crate::cuda) for how tensors are passed.
//!
//! A thread walks four neighbouring channels (two in the backward pass, where a filter has more than four weights) through
//! a run of steps, the last inputs in registers, so that each input is read once but for the few before a run. That is as
//! fast as memory is where channels are contiguous, are a multiple of those four or two, and start at such multiples.
//! Everything else gets the same bits from loads of single elements, and slower.
//!
//! What a sequence gets does not depend on how the work is divided; only the gradients of the parameters sum over steps,
//! in an order that follows from the shape and the device.

mod update;

use std::sync::Arc;

use bytemuck::Zeroable;
use cudarc::driver::{CudaSlice, CudaStream};

use super::{GradientsMut, Inputs, OutputGradients, OutputMut, Problem, Tensors, UpdateInputs, UpdateMut};
use crate::cuda::params::conv::{self as kernels, THREADS};
use crate::cuda::params::{self, QUAD};
use crate::cuda::{
    Arguments, Cuda, Device, DeviceBuffers, DeviceViews, GRID_COLUMNS, Kernel, Module, Sum, blocks, grid_rows,
    is_vectorizable, or_null, suffix,
};
use crate::sequences::Sequences;
use crate::{Element, Result};

pub use crate::pool::cuda::rollback;
pub use update::update;
#[cfg(feature = "candle-cuda")]
pub(crate) use update::update_checked;

/// The least steps of a run; more than the rows of a state, so that runs other than a sequence's first find all that comes
/// before them among the inputs.
const LEAST_STEPS: usize = 16;

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
    forward_checked(stream, &inputs.check()?, outputs)
}

/// [`forward`] of inputs that have been checked.
pub(crate) fn forward_checked<T: Element>(
    stream: &Arc<CudaStream>,
    problem: &Problem<T, Cuda>,
    outputs: OutputMut<T, Cuda>,
) -> Result<()> {
    problem.check_outputs(&outputs)?;
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let layout = Layout::forward(problem, &device, outputs.final_state.is_some());
    let mut inputs = conv_inputs(problem, layout, &mut arguments)?;
    let out = arguments.write("out", outputs.out)?;
    let final_state = arguments.write_optional("final_state", outputs.final_state)?;
    if inputs.runs.count == 0 {
        return Ok(());
    }
    let whole = is_whole::<T>(&inputs, &inputs.x, out, layout.channels);
    let variant = match (whole, problem.width) {
        (true, 2) => "whole_2",
        (true, 3) => "whole_3",
        (true, 4) => "whole_4",
        (true, _) => "whole_8",
        (false, _) => "strided_8",
    };
    let grid = layout.grid(&inputs);
    let _table = upload_runs(&device, problem, layout, &mut inputs.runs)?;
    let params = kernels::Forward { inputs, out, final_state };
    let kernel = Kernel::new(Module::CONV_FORWARD, ["conv_forward", variant, suffix(T::DTYPE)]);
    // SAFETY: every address and extent has been checked by `Inputs::check` and `check_outputs`, and each element of the
    // outputs is written by one thread.
    unsafe { device.launch(&kernel, grid, THREADS, 0, &params) }
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
    backward_checked(stream, &inputs.check()?, d_outputs, gradients)
}

/// [`backward`] of inputs that have been checked.
pub(crate) fn backward_checked<T: Element>(
    stream: &Arc<CudaStream>,
    problem: &Problem<T, Cuda>,
    d_outputs: OutputGradients<T, Cuda>,
    gradients: GradientsMut<T, Cuda>,
) -> Result<()> {
    problem.check_backward(&d_outputs, &gradients)?;
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let channels = if problem.width <= 4 { kernels::backward::CHANNELS } else { kernels::backward::WIDE_CHANNELS };
    let layout = Layout::backward(problem, &device, channels, gradients.initial_state.is_some());
    let mut inputs = conv_inputs(problem, layout, &mut arguments)?;
    let d_out = params::Activation::from(arguments.view("d_out", &d_outputs.d_out)?);
    let d_final_state = or_null(arguments.optional_view("d_final_state", &d_outputs.d_final_state)?);
    let gradients: Tensors<DeviceBuffers> = gradients.map(&mut arguments)?;
    let Tensors { x: d_x, weight: d_weight, bias: d_bias, initial_state } = gradients;
    let d_initial_state = initial_state.unwrap_or(0);

    let d_inner = problem.d_inner();
    let (weights, parameters) = (d_inner * problem.width, d_inner * (problem.width + 1));
    let grid = layout.grid(&inputs);
    // Without a step there is no part, and the sums are zero.
    let parts = if inputs.runs.count == 0 { 0 } else { grid[1] };
    let workspace = device.workspace::<f32>("sums of the gradients of the parameters", parts * parameters)?;
    let from = device.address(&workspace);
    if parts > 0 {
        let whole = is_whole::<T>(&inputs, &inputs.x, d_x, layout.channels)
            && is_whole::<T>(&inputs, &d_out, d_x, layout.channels);
        let variant = match (whole, problem.width) {
            (true, 2) => "whole_2",
            (true, 3) => "whole_3",
            (true, 4) => "whole_4",
            (true, _) => "whole_8",
            (false, ..=4) => "strided_4",
            (false, _) => "strided_8",
        };
        let _table = upload_runs(&device, problem, layout, &mut inputs.runs)?;
        let params = kernels::Backward { inputs, d_out, d_final_state, d_x, d_initial_state, partials: from };
        let kernel = Kernel::new(Module::CONV_BACKWARD, ["conv_backward", variant, suffix(T::DTYPE)]);
        // SAFETY: every address and extent has been checked by `Inputs::check` and `check_backward`, each element of the
        // gradients is written by one thread, and the workspace has room for what each row of blocks leaves.
        unsafe { device.launch(&kernel, grid, THREADS, 0, &params) }?;
    }
    let sum = |first: usize, m, to| {
        let from = from + (first * size_of::<f32>()) as u64;
        Sum { from, parts, m, stride: parameters, to, is_full: true }
    };
    let mut sums = vec![sum(0, weights, d_weight)];
    sums.extend(d_bias.map(|d_bias| sum(weights, d_inner, d_bias)));
    // SAFETY: the parts are in the workspace, the weights' before the biases', and the gradients have been checked to be as
    // many.
    unsafe { device.sum::<f32>(&sums) }
}

/// How a pass divides its work: the bits of what a sequence gets do not depend on it.
#[derive(Clone, Copy)]
struct Layout {
    /// The channels of a thread.
    channels: usize,
    /// The most steps of a run.
    run_steps: usize,
    /// About how many blocks there are at most, each of which then takes several runs.
    most_blocks: usize,
    /// Give sequences without steps a run that hands their state on.
    keep_empty: bool,
}

impl Layout {
    /// Runs of 32 steps, or of fewer where these would leave most threads of a processor idle.
    fn forward<T: Element>(problem: &Problem<T, Cuda>, device: &Device, keep_empty: bool) -> Self {
        const LEAST_THREADS: usize = 170;
        let layout = |run_steps| Self {
            channels: QUAD,
            run_steps,
            most_blocks: 20 * device.properties().processors,
            keep_empty,
        };
        let long = layout(32);
        let threads = long.runs(problem).saturating_mul(problem.d_inner().div_ceil(long.channels));
        if threads >= LEAST_THREADS * device.properties().processors { long } else { layout(LEAST_STEPS) }
    }

    /// One run to a thread, of the length with which processors are done first. They take a block as long as it has steps,
    /// and some more for those that runs read again, and what a processor has at once one after the other: a second block
    /// hides the latency of the first, more gain nothing, and where some have one more than others, these wait.
    /// Measured, see benches/tuning.md.
    fn backward<T: Element>(problem: &Problem<T, Cuda>, device: &Device, channels: usize, keep_empty: bool) -> Self {
        /// What a run costs beside its own steps, in steps.
        const AGAIN: usize = 14;
        const LONGEST: usize = 512;
        let layout = |run_steps, per_processor: usize| Self {
            channels,
            run_steps,
            most_blocks: per_processor * device.properties().processors,
            keep_empty,
        };
        // Sequences that are packed cannot all have runs of one length.
        let Sequences::Dense { batch, len } = problem.sequences else { return layout(64, 6) };
        let d_inner = problem.d_inner();
        let once = |run_steps| {
            let layout = layout(run_steps, 3);
            let blocks = layout.rows(layout.runs(problem), d_inner) * layout.columns(d_inner);
            (layout, blocks.div_ceil(device.properties().processors))
        };
        let (shortest, most) = once(LEAST_STEPS);
        if most < 2 {
            return shortest;
        }
        // The shortest runs of which a processor has no more blocks than this.
        let shortest_for = |per_processor: usize| {
            let rows = per_processor * device.properties().processors / shortest.columns(d_inner);
            let per_sequence = rows * (THREADS >> shortest.lane_shift(d_inner)) / batch;
            (per_sequence > 0).then(|| once(len.div_ceil(per_sequence).max(LEAST_STEPS).next_multiple_of(4)))
        };
        let best = [3, 2]
            .into_iter()
            .filter_map(shortest_for)
            .filter(|(layout, blocks)| layout.run_steps <= LONGEST && *blocks >= 2)
            .min_by_key(|(layout, blocks)| blocks * (layout.run_steps + AGAIN));
        match best {
            Some((layout, _)) => layout,
            // Many runs to a thread. Where they are short, what blocks do at their end counts.
            None => layout(192, if len < 64 { 4 } else { 16 }),
        }
    }

    fn runs_of(self, len: usize) -> usize {
        len.div_ceil(self.run_steps).max(self.keep_empty.into())
    }

    /// The runs of all sequences.
    fn runs<T: Element>(self, problem: &Problem<T, Cuda>) -> usize {
        match problem.sequences {
            // As many as there are steps, or states in memory, at most.
            Sequences::Dense { batch, len } => batch * self.runs_of(len),
            Sequences::Packed(_) => problem.sequences.iter().map(|sequence| self.runs_of(sequence.len)).sum(),
        }
    }

    fn params<T: Element>(self, problem: &Problem<T, Cuda>) -> kernels::Runs {
        let len = problem.inputs.x.shape[1];
        kernels::Runs {
            packed: 0,
            sequences: problem.sequences.count() as i64,
            len: len as i64,
            per_row: self.runs_of(len) as i64,
            steps: self.run_steps as i64,
            count: self.runs(problem) as i64,
        }
    }

    /// Threads of a block that lie along the channels, a power of two, as a shift.
    fn lane_shift(self, d_inner: usize) -> u32 {
        d_inner.div_ceil(self.channels).min(32).next_power_of_two().ilog2()
    }

    /// Blocks along the channels.
    fn columns(self, d_inner: usize) -> usize {
        blocks(d_inner.div_ceil(self.channels), 1 << self.lane_shift(d_inner)).clamp(1, GRID_COLUMNS)
    }

    /// Blocks along the runs, with one run to a thread.
    fn rows(self, runs: usize, d_inner: usize) -> usize {
        blocks(runs, THREADS >> self.lane_shift(d_inner))
    }

    fn grid(self, inputs: &kernels::Inputs) -> [usize; 2] {
        let d_inner = inputs.d_inner as usize;
        let columns = self.columns(d_inner);
        [columns, grid_rows(columns, self.rows(inputs.runs.count as usize, d_inner), self.most_blocks)]
    }
}

/// The table that kernels find runs of packed sequences by; see `Runs` in kernels/conv/params.cuh.
fn upload_runs<T: Element>(
    device: &Device,
    problem: &Problem<T, Cuda>,
    layout: Layout,
    runs: &mut kernels::Runs,
) -> Result<Option<Arc<CudaSlice<u64>>>> {
    let Sequences::Packed(offsets) = problem.sequences else { return Ok(None) };
    let mut entries = Vec::with_capacity(offsets.len());
    let mut first = 0;
    let entry = |first_run, start| kernels::PackedRuns { first_run: first_run as i64, start: start as i64 };
    for sequence in problem.sequences.iter() {
        entries.push(entry(first, sequence.start));
        first += layout.runs_of(sequence.len);
    }
    entries.push(entry(first, problem.inputs.x.shape[1]));
    let table = device.table("the runs of packed sequences", bytemuck::cast_slice(&entries))?;
    runs.packed = device.address(&table);
    Ok(Some(table))
}

fn conv_inputs<'a, T: Element>(
    problem: &Problem<'a, T, Cuda>,
    layout: Layout,
    arguments: &mut Arguments<'a>,
) -> Result<kernels::Inputs> {
    let inputs = &problem.inputs;
    let d_inner = problem.d_inner();
    let tensors: Tensors<DeviceViews> = inputs.tensors().map(arguments)?;
    Ok(tensors.params(kernels::Inputs {
        runs: layout.params(problem),
        d_inner: d_inner as i64,
        width: problem.width as i64,
        lane_shift: layout.lane_shift(d_inner).into(),
        flags: params::flags([
            (inputs.options.silu, kernels::FLAG_SILU),
            (inputs.options.reverse, kernels::FLAG_REVERSE),
        ]),
        ..kernels::Inputs::zeroed()
    }))
}

/// Whether `count` neighbouring channels of a tensor, and of the dense one at `written`, can be accessed at a time.
fn is_whole<T>(inputs: &kernels::Inputs, tensor: &params::Activation, written: u64, count: usize) -> bool {
    tensor.channel == 1
        && is_vectorizable::<T>(tensor.data, &[tensor.batch, tensor.step], count)
        && is_vectorizable::<T>(written, &[inputs.d_inner], count)
}
