//! Launching the forward pass.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::plan::{PerLane, Plan, Segments};
use super::{Inputs, OutputMut, Problem};
use crate::arguments::Dims;
use crate::cuda::{Arguments, Cuda, Device, Module, blocks, params};
use crate::{DType, Discretization, Element, Projection, Result};

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
    let mut scan = Scan::new(&device, &problem, &plan, &mut arguments)?;
    let out = arguments.write("out", outputs.out)?;
    let final_state = arguments.write_optional("final_state", outputs.final_state)?;
    let checkpoints = arguments.write_optional("checkpoints", outputs.checkpoints)?;
    let Dims { len, d_inner, .. } = problem.dims;
    if problem.sequences.count() == 0 || len == 0 && final_state == 0 {
        return Ok(());
    }
    if !scan.is_aligned::<T>(&[(out, &[d_inner as i64])]) {
        scan.kernel = Kernel::General;
    }
    let params = params::ScanForward { inputs: scan.inputs, out, final_state, checkpoints };
    if scan.segments.split {
        let summary = scan.workspace(&device)?;
        let (reached, sums) = (device.address(&summary.0), device.address(&summary.1));
        let inputs = params::ScanInputs { reached, sums, ..scan.inputs };
        let params = params::ScanForward { inputs, ..params };
        // SAFETY: every address and extent has been checked by `Inputs::check` and `check_outputs`, and the workspace
        // has an element for each that the first kernel writes and the second reads.
        unsafe {
            scan.launch::<T, _>(&device, Module::SCAN_FORWARD, "scan_summary", &params)?;
            scan.launch::<T, _>(&device, Module::SCAN_FORWARD, "scan_forward", &params)
        }
    } else {
        // SAFETY: as above; without a split there is no workspace.
        unsafe { scan.launch::<T, _>(&device, Module::SCAN_FORWARD, "scan_forward", &params) }
    }
}

/// Which of the kernels a problem takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    Fast(PerLane),
    General,
}

/// What the launches of a pass have in common.
pub(super) struct Scan {
    pub inputs: params::ScanInputs,
    pub segments: Segments,
    pub kernel: Kernel,
}

/// Sequences with more steps than this are summed with compensation in f32. A sum of `n` terms loses about
/// `sqrt(n/2)·2^-25`, which passes 2e-6 here.
const COMPENSATED_STEPS: usize = 16_384;

impl Scan {
    pub fn new<'a, T: Element>(
        device: &Device,
        problem: &Problem<'a, T, Cuda>,
        plan: &Plan,
        arguments: &mut Arguments<'a>,
    ) -> Result<Self> {
        let (inputs, Dims { d_inner, d_state, batch, .. }) = (&problem.inputs, problem.dims);
        let segments = Segments::new(device, problem, plan)?;
        let group_channels = problem.dims.group_channels();
        let compensate = T::DTYPE == DType::F32 && problem.dims.len > COMPENSATED_STEPS;
        let hold = inputs.options.discretization == Discretization::ZeroOrderHold;
        let flag = |set: bool, bit: u64| if set { bit } else { 0 };
        let mut scan = Self {
            inputs: params::ScanInputs {
                u: arguments.activation("u", &inputs.u)?,
                delta: arguments.activation("delta", &inputs.delta)?,
                z: arguments.optional_activation("z", &inputs.z)?,
                a: arguments.matrix("a", &inputs.a)?,
                b: arguments.projection("b", &inputs.b)?,
                c: arguments.projection("c", &inputs.c)?,
                d: arguments.vector("d", &inputs.d)?,
                delta_bias: arguments.vector("delta_bias", &inputs.delta_bias)?,
                initial_state: arguments.states("initial_state", &inputs.initial_state)?,
                segments: segments.params,
                d_inner: d_inner as i64,
                d_state: d_state as i64,
                group_channels: group_channels as i64,
                group_blocks: 0,
                reached: 0,
                sums: 0,
                flags: flag(inputs.options.delta_softplus, 1)
                    | flag(hold, 2)
                    | flag(inputs.options.reverse, 4)
                    | flag(compensate, 8),
            },
            segments,
            kernel: Kernel::General,
        };
        let varying = |projection: &Projection<T, Cuda>| matches!(projection, Projection::Varying(_));
        let fast = d_state <= 16
            && d_state.is_multiple_of(4)
            && group_channels.is_multiple_of(4)
            && varying(&inputs.b)
            && varying(&inputs.c)
            && !hold
            && !compensate
            && scan.is_aligned::<T>(&[]);
        if fast {
            let rows = batch * scan.segments.params.per_row as usize;
            scan.kernel = Kernel::Fast(plan.per_lane(rows, d_inner, device.processors));
        }
        Ok(scan)
    }

    /// Whether the inputs can be read, and `outputs`, given by address and strides, written by fours.
    pub fn is_aligned<T>(&self, outputs: &[(u64, &[i64])]) -> bool {
        let whole = |address: u64, strides: &[i64]| {
            address.is_multiple_of(4 * size_of::<T>() as u64)
                && strides.iter().all(|stride| stride % 4 == 0)
                // Distances within a tile are 32 bits wide.
                && strides.last().is_none_or(|step| *step < 1 << 24)
        };
        let inputs = &self.inputs;
        let activations = [&inputs.u, &inputs.delta, &inputs.z].into_iter().filter(|tensor| tensor.data != 0);
        let projections = [&inputs.b, &inputs.c];
        activations.into_iter().all(|x| x.channel == 1 && whole(x.data, &[x.batch, x.step]))
            && projections.into_iter().all(|x| x.state == 1 && whole(x.data, &[x.batch, x.group, x.step]))
            && outputs.iter().all(|(address, strides)| whole(*address, strides))
    }

    /// For each segment the state that it reaches from zero, and its ΣΔ.
    pub fn workspace(
        &self,
        device: &Device,
    ) -> Result<(cudarc::driver::CudaSlice<f32>, cudarc::driver::CudaSlice<f32>)> {
        let sums = self.segments.params.count as usize * self.inputs.d_inner as usize;
        let what = "the states that segments reach";
        Ok((device.workspace(what, sums * self.inputs.d_state as usize)?, device.workspace(what, sums)?))
    }

    /// Launches the kernel of this name that the problem takes.
    ///
    /// # Safety
    /// As [`Device::launch`]; `params` starts with [`params::ScanInputs`].
    pub unsafe fn launch<T: Element, P: bytemuck::Pod>(
        &self,
        device: &Device,
        module: Module,
        name: &str,
        params: &P,
    ) -> Result<()> {
        // As the kernels are instantiated: channels and threads of a block.
        let (variant, channels, threads) = match self.kernel {
            Kernel::Fast(PerLane::One) => ("one", 32, 128),
            Kernel::Fast(PerLane::Two) => ("two", 64, 128),
            Kernel::Fast(PerLane::Four) => ("four", 128, 128),
            Kernel::General => ("general", 64, 256),
        };
        let dtype = match T::DTYPE {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        };
        let mut params = *params;
        let group_blocks = blocks(self.inputs.group_channels as usize, channels);
        bytemuck::from_bytes_mut::<params::ScanInputs>(
            &mut bytemuck::bytes_of_mut(&mut params)[..size_of::<params::ScanInputs>()],
        )
        .group_blocks = group_blocks as i64;
        let groups = self.inputs.d_inner / self.inputs.group_channels;
        let grid = [groups as usize * group_blocks, (self.segments.params.count as usize).min(65_535)];
        // The general kernels keep the states of turns of 16, four to a thread.
        let turns = |d_state: usize| d_state.div_ceil(16) * threads * 16;
        let shared = match self.kernel {
            Kernel::General => [turns(self.inputs.d_state as usize), turns(crate::MAX_D_STATE)],
            _ => [0, 0],
        };
        // SAFETY: as the caller promises.
        unsafe { device.launch(module, &format!("{name}_{variant}_{dtype}"), grid, threads, shared, &params) }
    }
}
