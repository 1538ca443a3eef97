//! What the launches of both passes have in common.

use bytemuck::{Pod, Zeroable};
use cudarc::driver::CudaSlice;

use super::Problem;
use super::plan::{Pass, PerLane, Plan, Segments};
use crate::arguments::Dims;
use crate::cuda::params::{self, scan as kernels};
use crate::cuda::{Arguments, Cuda, Device, Module, blocks, lies_whole, suffix};
use crate::sequences::{CHECKPOINT_STEPS, Sequences};
use crate::{DType, Discretization, Element, Projection, Result};

/// Which of the kernels a problem takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    Fast(PerLane),
    /// The fast kernels for more than [`STATE_BLOCK`](kernels::STATE_BLOCK) states.
    Turns,
    General,
}

/// What the launches of a pass have in common.
pub(super) struct Scan {
    pub inputs: kernels::Inputs,
    pub segments: Segments,
    /// What takes all segments but those that are carried in parts.
    pub kernel: Kernel,
}

/// The inputs of a pass as kernels take them, but not yet divided.
pub(super) struct Undivided {
    pub inputs: kernels::Inputs,
    /// Whether the fast kernels take them.
    pub is_fast: bool,
    /// Whether any state is summed with compensation, which only the general forward kernel does.
    pub compensates: bool,
}

// What forward keeps, backward and the processor's passes find at the same steps.
const _: () = assert!(kernels::CHECKPOINT_STEPS == CHECKPOINT_STEPS);

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
        let mut undivided = Self {
            inputs: kernels::Inputs {
                u: arguments.activation("u", &inputs.u)?,
                delta: arguments.activation("delta", &inputs.delta)?,
                z: arguments.optional_activation("z", &inputs.z)?,
                a: arguments.matrix("a", &inputs.a)?,
                b: arguments.projection("b", &inputs.b)?,
                c: arguments.projection("c", &inputs.c)?,
                d: arguments.vector("d", &inputs.d)?,
                delta_bias: arguments.vector("delta_bias", &inputs.delta_bias)?,
                initial_state: arguments.states("initial_state", &inputs.initial_state)?,
                segments: params::Segments::zeroed(),
                d_inner: d_inner as i64,
                d_state: d_state as i64,
                group_channels: group_channels as i64,
                group_blocks: 0,
                chunk_states: 0,
                delta_sums: 0,
                flags: params::flags([
                    (inputs.options.delta_softplus, kernels::FLAG_SOFTPLUS),
                    (hold, kernels::FLAG_ZOH),
                    (inputs.options.reverse, kernels::FLAG_REVERSE),
                    (compensate, kernels::FLAG_COMPENSATE),
                ]),
            },
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

    /// Whether the inputs can be read, and `outputs`, given by address and strides, written by fours.
    pub fn is_aligned<T>(&self, outputs: &[(u64, &[i64])]) -> bool {
        let whole = |address: u64, strides: &[i64]| {
            // Distances within a tile are 32 bits wide.
            lies_whole::<T>(address, strides, 4) && strides.last().is_none_or(|step| *step < 1 << 24)
        };
        let inputs = &self.inputs;
        let activations = [&inputs.u, &inputs.delta, &inputs.z].into_iter().filter(|tensor| tensor.data != 0);
        let projections = [&inputs.b, &inputs.c];
        activations.into_iter().all(|x| x.channel == 1 && whole(x.data, &[x.batch, x.step]))
            && projections.into_iter().all(|x| x.state == 1 && whole(x.data, &[x.batch, x.group, x.step]))
            && outputs.iter().all(|(address, strides)| whole(*address, strides))
    }

    /// The pass divided as `plan` says.
    pub fn divide<T: Element>(
        self,
        device: &Device,
        problem: &Problem<T, Cuda>,
        plan: &Plan,
        pass: Pass,
    ) -> Result<Scan> {
        let Dims { batch, len, d_inner, d_state, .. } = problem.dims;
        let takes_turns = d_state > kernels::STATE_BLOCK;
        let segments = Segments::new(device, problem, plan, pass, self.is_fast && !takes_turns)?;
        let count = segments.params.count as usize;
        let kernel = match (self.is_fast, takes_turns, segments.split) {
            (false, ..) => Kernel::General,
            (true, true, _) => Kernel::Turns,
            (true, false, true) => Kernel::Fast(PerLane::One),
            (true, false, false) => {
                Kernel::Fast(plan.per_lane(batch * len / count.max(1), count, d_inner, device.processors))
            }
        };
        Ok(Scan { inputs: kernels::Inputs { segments: segments.params, ..self.inputs }, segments, kernel })
    }
}

impl Scan {
    /// Room for the state that each segment reaches from zero, and for its ΣΔ, if sequences are split.
    pub fn workspace(&self, device: &Device) -> Result<Option<CudaSlice<f32>>> {
        let len = self.segment_channels() * (self.inputs.d_state as usize + 1);
        self.segments.split.then(|| device.workspace("the states that segments reach", len)).transpose()
    }

    fn segment_channels(&self) -> usize {
        self.segments.params.count as usize * self.inputs.d_inner as usize
    }

    /// The inputs with a workspace.
    pub fn split_inputs(&self, device: &Device, workspace: &CudaSlice<f32>) -> kernels::Inputs {
        let chunk_states = device.address(workspace);
        let states = self.segment_channels() * self.inputs.d_state as usize;
        kernels::Inputs { chunk_states, delta_sums: chunk_states + (states * size_of::<f32>()) as u64, ..self.inputs }
    }

    /// The segments that are carried in parts, and the others, each with what takes them; without those of which there is
    /// none.
    pub fn launches(&self) -> impl Iterator<Item = (Kernel, params::Segments)> {
        let all = self.segments.params;
        let (part, count) = self.segments.parts.unwrap_or((PerLane::One, 0));
        let others = params::Segments {
            packed: if all.packed == 0 {
                0
            } else {
                all.packed + count as u64 * size_of::<params::PackedSegment>() as u64
            },
            count: all.count - count,
            ..all
        };
        let both = [(Kernel::Fast(part), params::Segments { count, ..all }), (self.kernel, others)];
        both.into_iter().filter(|(_, segments)| segments.count > 0)
    }

    /// Launches the kernel of this name that the problem takes, on blocks of `channels` channels and `threads` threads, in
    /// `rows` of them.
    ///
    /// # Safety
    /// As [`Device::launch`].
    pub unsafe fn launch<T: Element, P: Pod + AsMut<kernels::Inputs>>(
        &self,
        device: &Device,
        module: Module,
        name: &str,
        shape: LaunchShape,
        mut params: P,
    ) -> Result<()> {
        params.as_mut().group_blocks = self.group_blocks(shape.channels) as i64;
        let grid = [self.groups() * self.group_blocks(shape.channels), shape.rows];
        let name = format!("{name}_{}_{}", shape.variant, suffix(T::DTYPE));
        // SAFETY: as the caller promises.
        unsafe { device.launch(module, &name, grid, shape.threads, shape.shared, &params) }
    }

    pub fn groups(&self) -> usize {
        (self.inputs.d_inner / self.inputs.group_channels) as usize
    }

    /// The blocks of `channels` channels that cover a group.
    pub fn group_blocks(&self, channels: usize) -> usize {
        blocks(self.inputs.group_channels as usize, channels)
    }
}

/// How a kernel is launched, as it is instantiated.
#[derive(Debug, Clone, Copy)]
pub(super) struct LaunchShape {
    pub variant: &'static str,
    pub channels: usize,
    pub threads: usize,
    pub rows: usize,
    /// Bytes of dynamic shared memory, and the most that any launch of this kernel asks for.
    pub shared: [usize; 2],
}
