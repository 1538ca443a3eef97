//! AdamW on NVIDIA GPUs; see [`cuda`](crate::cuda) for how tensors are passed.
//!
//! Parameters travel by dozens in the launches themselves, so that a step over any number of them is a few launches and needs
//! no table. What the first pass finds stays on the device, where the second reads it.

use std::sync::Arc;

use bytemuck::Zeroable;
use cudarc::driver::{CudaSlice, CudaStream};

use super::{Gradient, Moments, Options, Parameter, Values, check, for_view};
use crate::cuda::params::optimizer::{self as kernels, COUNTS};
use crate::cuda::{Arguments, Cuda, Device, Kernel, Module, launches, params, place};
use crate::{Error, Result};

/// What a step multiplies by, and whether it is taken, in device memory.
#[derive(Debug)]
pub struct Factors(CudaSlice<u64>);

/// What is kept from step to step beside the moments, in device memory. The numbers are those of [`Status`](super::Status).
#[derive(Debug)]
pub struct StatusMut<'a> {
    /// Steps taken, steps skipped and the streak.
    pub counts: &'a mut CudaSlice<i64>,
    /// The scale of the loss, one element.
    pub scale: &'a mut CudaSlice<f32>,
}

/// The first pass, asynchronous: reads all gradients, counts the step as taken or skipped, and writes their norm, one element.
///
/// # Errors
/// A number that makes no optimizer, a buffer of another size, a gradient that is not contiguous in its storage, or memory of
/// another device; nothing is written then. What the driver refuses.
pub fn begin(
    stream: &Arc<CudaStream>,
    options: &Options,
    gradients: &[Gradient<Cuda>],
    status: StatusMut,
    norm: &mut CudaSlice<f32>,
) -> Result<Factors> {
    check::begin(options, gradients)?;
    for (name, got, expected) in
        [("counts", status.counts.len(), COUNTS), ("scale", status.scale.len(), 1), ("norm", norm.len(), 1)]
    {
        if got != expected {
            return Err(Error::argument(name, format_args!("{expected} elements"), format_args!("{got}")));
        }
    }
    let mut arguments = Arguments::new(stream);
    let device = Device::new(stream)?;
    let mut entries = Vec::with_capacity(gradients.len());
    for gradient in gradients.iter().filter(|gradient| gradient.elements() > 0) {
        let data = read(&mut arguments, gradient)?;
        let (count, dtype) = (gradient.elements(), params::type_code(gradient.dtype()) as i32);
        entries.push((count, kernels::Gradient { data, count: count as i64, first_block: 0, dtype }));
    }
    let launches = launches(&entries, kernels::SUM_CHUNK, kernels::MOST_GRADIENTS);
    let all: usize = launches.iter().map(|(_, grid)| grid).sum();
    let partials = device.workspace::<f64>("the squares of gradients", all)?;
    let factors = device.workspace::<u64>("the factors of a step", size_of::<kernels::Factors>().div_ceil(8))?;
    let kernel = Kernel::new(Module::OPTIMIZER_SQUARES, ["optimizer_squares"]);
    let mut first = 0;
    for (part, grid) in launches {
        let mut params = kernels::Squares::zeroed();
        params.partials = device.address(&partials) + (first * size_of::<f64>()) as u64;
        params.count = part.len() as i64;
        place(&mut params.gradients, part, kernels::SUM_CHUNK, |entry, first_block| kernels::Gradient {
            first_block: first_block as i32,
            ..entry
        });
        // SAFETY: the gradients hold `count` elements each, and there is a partial sum for every block of all launches.
        unsafe { device.launch(&kernel, [grid, 1], kernels::THREADS, 0, &params) }?;
        first += grid;
    }
    let params = kernels::Begin {
        partials: device.address(&partials),
        count: all as i64,
        counts: arguments.write("counts", status.counts)?,
        scale: arguments.write("scale", status.scale)?,
        factors: device.address(&factors),
        norm: arguments.write("norm", norm)?,
        beta1: options.beta1,
        beta2: options.beta2,
        clip: options.clip.unwrap_or(0.0),
        divisor: options.divisor,
        interval: options.scale_interval.map_or(0, i64::from),
    };
    let kernel = Kernel::new(Module::OPTIMIZER_BEGIN, ["optimizer_begin"]);
    // SAFETY: all partial sums have been written, and what it writes has the sizes that were checked.
    unsafe { device.launch(&kernel, [1, 1], kernels::TOTAL_THREADS, 0, &params) }?;
    Ok(Factors(factors))
}

/// The second pass, asynchronous: takes a step on `parameters`, unless it is skipped, as the device knows. The learning rate is
/// that of the step, of which each group has its part. `factors` must come from the same stream.
///
/// # Errors
/// What does not fit, by the names of the fields, places that are not in the order of the parameters, and memory of another
/// device; nothing is written then. What the driver refuses.
pub fn update<'a>(
    stream: &Arc<CudaStream>,
    options: &Options,
    learning_rate: f64,
    factors: &Factors,
    parameters: impl IntoIterator<Item = Parameter<'a, Cuda>>,
    moments: Moments<'a, Cuda>,
) -> Result<()> {
    let parameters: Vec<_> = parameters.into_iter().collect();
    check::update(options, learning_rate, &parameters, &moments)?;
    if factors.0.stream().cu_stream() != stream.cu_stream() {
        return Err(Error::argument("factors", "those that this stream computed", "those of another stream"));
    }
    let mut arguments = Arguments::new(stream);
    let device = Device::new(stream)?;
    let mut head = kernels::Update::zeroed();
    head.factors = device.address(&factors.0);
    head.mean = arguments.write("mean", moments.mean)?;
    head.mean_square = arguments.write("mean_square", moments.mean_square)?;
    head.master = arguments.write("master", moments.master)?;
    [head.beta1, head.beta2] = [options.beta1, options.beta2].map(|beta| beta as f32);
    [head.rest1, head.rest2] = [options.beta1, options.beta2].map(|beta| (1.0 - beta) as f32);
    head.eps = options.eps as f32;
    let mut entries = Vec::with_capacity(parameters.len());
    for parameter in parameters.into_iter().filter(|parameter| parameter.place.len > 0) {
        let Parameter { values, gradient, place, group } = parameter;
        let (dtype, rate) = (params::type_code(values.dtype()) as i32, learning_rate * group.learning_rate);
        let entry = kernels::Parameter {
            data: write(&mut arguments, values)?,
            gradient: read(&mut arguments, &gradient)?,
            count: place.len as i64,
            moments: place.moments as i64,
            master: place.master as i64,
            learning_rate: rate,
            kept: (1.0 - rate * group.weight_decay) as f32,
            first_block: 0,
            dtype,
            gradient_dtype: params::type_code(gradient.dtype()) as i32,
        };
        entries.push((place.len, entry));
    }
    let kernel = Kernel::new(Module::OPTIMIZER_UPDATE, ["optimizer_update"]);
    for (part, grid) in launches(&entries, kernels::UPDATE_CHUNK, kernels::MOST_PARAMETERS) {
        let mut params = head;
        params.count = part.len() as i32;
        place(&mut params.parameters, part, kernels::UPDATE_CHUNK, |entry, first_block| kernels::Parameter {
            first_block: first_block as i32,
            ..entry
        });
        // SAFETY: parameters and gradients hold `count` elements each, moments and masters as many from each place on, as was
        // checked, and no two parameters share any.
        unsafe { device.launch(&kernel, [grid, 1], kernels::THREADS, 0, &params) }?;
    }
    Ok(())
}

fn read<'a>(arguments: &mut Arguments<'a>, gradient: &Gradient<'a, Cuda>) -> Result<u64> {
    for_view!(Gradient, gradient, |view| Ok(arguments.view("gradient", view)?.data))
}

fn write<'a>(arguments: &mut Arguments<'a>, values: Values<'a, Cuda>) -> Result<u64> {
    for_view!(Values, values, |view| arguments.write_from("values", view.data, view.offset))
}
