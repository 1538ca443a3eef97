//! What the launches of both passes have in common.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use cudarc::driver::CudaSlice;

use super::recipe::{Division, Launch, Recipe, Shape};
use super::{CheckpointSteps, Problem, Tensors};
use crate::arguments::Dims;
use crate::cuda::params::{self, scan as kernels};
use crate::cuda::{Arguments, Cuda, Device, DeviceViews, is_vectorizable};
use crate::sequences::{CHECKPOINT_STEPS, Sequences};
use crate::{DType, Discretization, Element, Projection, Result};

/// The inputs of a pass as kernels take them, but not yet divided.
pub(super) struct Undivided {
    pub inputs: kernels::Inputs,
    /// Whether the fast kernels take them.
    pub is_fast: bool,
    /// Whether any state is summed with compensation, which only the general forward kernel does.
    pub compensates: bool,
}

// A chunk begins where a state is kept, however far apart they lie.
const _: () = assert!(kernels::CHUNK_STEPS == CHECKPOINT_STEPS);
const _: () = assert!(kernels::LEAST_CHECKPOINT_STEPS == CheckpointSteps::Every16.get());

impl Undivided {
    pub fn new<'a, T: Element>(problem: &Problem<'a, T, Cuda>, arguments: &mut Arguments<'a>) -> Result<Self> {
        let (inputs, Dims { d_inner, d_state, .. }) = (&problem.inputs, problem.dims);
        let group_channels = problem.dims.group_channels();
        let longest = match problem.sequences {
            Sequences::Dense { len, .. } => len,
            Sequences::Packed(_) => problem.sequences.iter().map(|sequence| sequence.len).max().unwrap_or(0),
        };
        let compensate = T::DTYPE == DType::F32 && longest > kernels::LONG_SEQUENCE as usize;
        let hold = inputs.options.discretization == Discretization::ZeroOrderHold;
        let varying = |projection: &Projection<T, Cuda>| matches!(projection, Projection::Varying(_));
        let tensors: Tensors<DeviceViews> = inputs.tensors().map(arguments)?;
        let mut undivided = Self {
            inputs: tensors.params(kernels::Inputs {
                d_inner: d_inner as i64,
                d_state: d_state as i64,
                group_channels: group_channels as i64,
                checkpoint_log2: i64::from(problem.checkpoint_steps().ilog2()),
                flags: params::flags([
                    (inputs.options.delta_softplus, kernels::FLAG_SOFTPLUS),
                    (hold, kernels::FLAG_ZOH),
                    (inputs.options.reverse, kernels::FLAG_REVERSE),
                    (compensate, kernels::FLAG_COMPENSATE),
                ]),
                ..kernels::Inputs::zeroed()
            }),
            is_fast: d_state.is_multiple_of(4)
                && group_channels.is_multiple_of(4)
                && varying(&inputs.b)
                && varying(&inputs.c)
                && !hold,
            compensates: compensate,
        };
        undivided.is_fast &= undivided.is_aligned::<T>(&[]);
        Ok(undivided)
    }

    /// What decides on the pass's kernels.
    pub fn shape<'a, T: Element>(&self, problem: &Problem<'a, T, Cuda>) -> Shape<'a> {
        let Dims { len, d_inner, d_state, groups, .. } = problem.dims;
        let (dtype, sequences) = (T::DTYPE, problem.sequences);
        Shape { dtype, sequences, len, d_inner, d_state, groups, is_fast: self.is_fast }
    }

    /// Whether the inputs can be read, and `outputs`, given by address and strides, written in vectors of 4.
    pub fn is_aligned<T>(&self, outputs: &[(u64, &[i64])]) -> bool {
        let whole = |address: u64, strides: &[i64]| {
            // Distances within a tile are 32 bits wide.
            is_vectorizable::<T>(address, strides, 4) && strides.last().is_none_or(|step| *step < 1 << 24)
        };
        let inputs = &self.inputs;
        let activations = [&inputs.u, &inputs.delta, &inputs.z].into_iter().filter(|tensor| tensor.data != 0);
        let projections = [&inputs.b, &inputs.c];
        activations.into_iter().all(|x| x.channel == 1 && whole(x.data, &[x.batch, x.step]))
            && projections.into_iter().all(|x| x.state == 1 && whole(x.data, &[x.batch, x.group, x.step]))
            && outputs.iter().all(|(address, strides)| whole(*address, strides))
    }
}

/// The memory that the launches of a recipe share, beside the call's arguments.
pub(super) struct Launcher<'d> {
    device: &'d Device<'d>,
    segments: params::Segments,
    /// What each segment reaches from zero, and its ΣΔ, if sequences are split.
    chunk_states: u64,
    delta_sums: u64,
    _table: Option<Arc<CudaSlice<u64>>>,
    _workspace: Option<CudaSlice<f32>>,
}

impl<'d> Launcher<'d> {
    pub fn new(device: &'d Device, recipe: &Recipe, shape: &Shape) -> Result<Self> {
        let mut segments = params::Segments {
            count: recipe.segments as i64,
            len: shape.len as i64,
            per_row: 1,
            ..params::Segments::zeroed()
        };
        let mut table = None;
        match &recipe.division {
            Division::Dense { per_row, steps } => {
                (segments.per_row, segments.steps) = (*per_row as i64, *steps as i64);
            }
            Division::Packed(entries) => {
                let numbers = bytemuck::cast_slice(entries);
                let uploaded = device.table("the segments of packed sequences", numbers)?;
                segments.packed = device.address(&uploaded);
                table = Some(uploaded);
            }
        }
        let channels = recipe.segments * shape.d_inner;
        let room = || device.workspace("the states that segments reach", channels * (shape.d_state + 1));
        let workspace = recipe.is_split.then(room).transpose()?;
        let chunk_states = workspace.as_ref().map_or(0, |workspace| device.address(workspace));
        let delta_sums = match chunk_states {
            0 => 0,
            states => states + (channels * shape.d_state * size_of::<f32>()) as u64,
        };
        Ok(Self { device, segments, chunk_states, delta_sums, _table: table, _workspace: workspace })
    }

    /// Enqueues one of the recipe's launches, whose segments and workspace are filled in.
    ///
    /// # Safety
    /// As [`Device::launch`].
    pub unsafe fn launch<P: Pod + AsMut<kernels::Inputs>>(&self, launch: &Launch, mut params: P) -> Result<()> {
        let inputs = params.as_mut();
        inputs.group_blocks = launch.group_blocks as i64;
        let all = self.segments;
        let first = (launch.segments.start * size_of::<params::PackedSegment>()) as u64;
        let packed = if all.packed == 0 { 0 } else { all.packed + first };
        inputs.segments = params::Segments { packed, count: launch.segments.len() as i64, ..all };
        if launch.is_split {
            (inputs.chunk_states, inputs.delta_sums) = (self.chunk_states, self.delta_sums);
        }
        // SAFETY: as the caller promises.
        unsafe { self.device.launch(&launch.kernel, launch.grid, launch.threads, launch.shared, &params) }
    }
}
