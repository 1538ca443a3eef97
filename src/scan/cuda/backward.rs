//! Launching the backward pass.

use std::sync::Arc;

use bytemuck::Zeroable;
use cudarc::driver::{CudaSlice, CudaStream};

use super::launch::{Launcher, Undivided};
use super::recipe::{Recipe, Role};
use super::{GradientsMut, Inputs, OutputGradients, Plan, Problem, Tensors};
use crate::ProjectionOf;
use crate::arguments::Dims;
use crate::cuda::params::scan::{self as kernels, STATE_BLOCK};
use crate::cuda::{Arguments, Cuda, Device, DeviceBuffers, Sum, is_vectorizable, or_null};
use crate::kinds::{Field, Map, Shaped};
use crate::{Element, Error, Result};

/// Computes the gradient of every input that was given on the stream's device. `checkpoints` are those that a forward pass
/// on a GPU kept.
///
/// The caller must see to it that they are those of the same inputs and options: of a bare buffer nothing but its length can
/// be checked, and with other states in it the gradients are wrong without an error.
///
/// # Errors
/// An argument that does not fit, or lies on another device; nothing is written then. What the driver refuses.
pub fn backward<T: Element>(
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    checkpoints: &CudaSlice<f32>,
    d_outputs: OutputGradients<T, Cuda>,
    gradients: GradientsMut<T, Cuda>,
) -> Result<()> {
    backward_with(Plan::default(), stream, inputs, checkpoints, d_outputs, gradients)
}

/// [`backward`] divided as `plan` says.
pub fn backward_with<T: Element>(
    plan: Plan,
    stream: &Arc<CudaStream>,
    inputs: &Inputs<T, Cuda>,
    checkpoints: &CudaSlice<f32>,
    d_outputs: OutputGradients<T, Cuda>,
    gradients: GradientsMut<T, Cuda>,
) -> Result<()> {
    backward_checked(plan, stream, &inputs.check()?, checkpoints, d_outputs, gradients)
}

/// [`backward_with`] of inputs that have been checked.
pub(crate) fn backward_checked<T: Element>(
    plan: Plan,
    stream: &Arc<CudaStream>,
    problem: &Problem<T, Cuda>,
    checkpoints: &CudaSlice<f32>,
    d_outputs: OutputGradients<T, Cuda>,
    gradients: GradientsMut<T, Cuda>,
) -> Result<()> {
    problem.check_backward(checkpoints, &d_outputs, &gradients)?;
    let device = Device::new(stream)?;
    let mut arguments = Arguments::new(stream);
    let mut undivided = Undivided::new(problem, &mut arguments)?;
    let Dims { batch, len, d_inner, d_state, groups, .. } = problem.dims;
    let steps = batch * len;

    let gradients: Tensors<DeviceBuffers> = gradients.map(&mut arguments)?;
    let mut params = kernels::Backward {
        inputs: undivided.inputs,
        d_out: arguments.view("d_out", &d_outputs.d_out)?.into(),
        d_final_state: or_null(arguments.optional_view("d_final_state", &d_outputs.d_final_state)?),
        checkpoints: arguments.read("checkpoints", checkpoints, 0)?,
        groups: groups as i64,
        steps: steps as i64,
        ..kernels::Backward::zeroed()
    };
    let (d_out, row) = (params.d_out, &[d_inner as i64][..]);
    let d_out_is_aligned = d_out.channel == 1 && undivided.is_aligned::<T>(&[(d_out.data, &[d_out.batch, d_out.step])]);
    let checkpoints_are_aligned = is_vectorizable::<f32>(params.checkpoints, &[], 4);
    undivided.is_fast &= d_out_is_aligned
        && checkpoints_are_aligned
        && undivided.is_aligned::<T>(&[(gradients.u, row), (gradients.delta, row), (gradients.z.unwrap_or(0), row)]);
    let shape = undivided.shape(problem);
    let recipe = Recipe::backward(&shape, device.properties(), &plan);
    let launcher = Launcher::new(&device, &recipe, &shape)?;
    // All launches of the scan have as many blocks.
    let scan = recipe.of_role(Role::Scan).next();
    let (group_blocks, rows) = scan.map_or((0, 0), |launch| (launch.group_blocks, launch.grid[1]));

    let mut sums = Sums { device: &device, rows, workspaces: Vec::new(), sums: Vec::new() };
    let written: Tensors<DeviceBuffers> = gradients.shaped(problem.dims).map(&mut sums)?;
    let Tensors { u, delta, a, b, c, z, d, delta_bias, initial_state } = written;
    (params.d_u, params.d_delta, params.d_a) = (u, delta, a);
    let ((b, d_b), (c, d_c)) = (split(b), split(c));
    (params.d_b, params.d_c) = (d_b, d_c);
    [params.d_z, params.d_d, params.d_bias, params.d_initial_state] =
        [z, d, delta_bias, initial_state].map(|address| address.unwrap_or(0));

    let lines = steps * groups;
    let projections = match b != 0 || c != 0 {
        true => Some(device.workspace::<f32>("the gradients of b and c", group_blocks * lines * 2 * d_state)?),
        false => None,
    };
    params.projections = projections.as_ref().map_or(0, |parts| device.address(parts));
    let carried = match d_state > STATE_BLOCK {
        true => Some(device.workspace::<f32>("sums over states", 3 * steps * d_inner)?),
        false => None,
    };
    params.partial_sums = carried.as_ref().map_or(0, |sums| device.address(sums));
    // Each block of states is a launch. (Each overwrites what the one before has left as the sums of D and the bias.)
    for launch in &recipe.launches {
        let params = kernels::Backward { first_state: launch.first_state as i64, ..params };
        // SAFETY: every address and extent has been checked by `Inputs::check` and `check_backward`, and the workspaces have
        // an element for each that the kernels write.
        unsafe { launcher.launch(launch, params) }?;
    }
    if let Some(parts) = &projections {
        let m = lines * d_state;
        for (i, to) in [b, c].into_iter().enumerate().filter(|(_, to)| *to != 0) {
            let from = device.address(parts) + (i * group_blocks * m * size_of::<f32>()) as u64;
            sums.sums.push(Sum { from, parts: group_blocks, m, stride: m, to, is_full: false });
        }
    }
    // SAFETY: the backward kernel has written `group_blocks` rows of `m` sums for each of B and C, and `rows` for each
    // parameter: none, if there are no segments.
    unsafe { device.sum::<T>(&sums.sums) }
}

/// Gradients that each row of blocks sums up for itself, and where the sums over the rows go.
struct Sums<'d> {
    device: &'d Device<'d>,
    rows: usize,
    workspaces: Vec<CudaSlice<f32>>,
    sums: Vec<Sum>,
}

impl Sums<'_> {
    /// Room for `m` sums of each row, whose totals go to the address `to`.
    fn add(&mut self, m: usize, to: u64) -> Result<u64> {
        let workspace = self.device.workspace("the gradients of parameters", self.rows * m)?;
        let from = self.device.address(&workspace);
        self.workspaces.push(workspace);
        self.sums.push(Sum { from, parts: self.rows, m, stride: m, to, is_full: true });
        Ok(from)
    }
}

/// Where the kernels write what becomes a gradient: a parameter's is summed over rows of blocks.
impl Map<Shaped<DeviceBuffers>, DeviceBuffers> for Sums<'_> {
    type Error = Error;

    fn activation<const R: usize>(&mut self, _: Field, (to, _): (u64, [usize; R])) -> Result<u64> {
        Ok(to)
    }

    fn parameter<const R: usize>(&mut self, _: Field, (to, shape): (u64, [usize; R])) -> Result<u64> {
        // Of each state one block finds the gradient. (States have three dimensions.)
        if R == 3 { Ok(to) } else { self.add(shape.iter().product(), to) }
    }
}

/// The addresses of a projection's gradient if it varies, and if it is constant; the other is null.
fn split(gradient: ProjectionOf<u64, u64>) -> (u64, u64) {
    match gradient {
        ProjectionOf::Varying(to) => (to, 0),
        ProjectionOf::Constant(to) => (0, to),
    }
}
