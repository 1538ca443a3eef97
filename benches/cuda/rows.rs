//! The operators on rows: the norm, and the gradient of an embedding. Memory bounds both.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use half::bf16;
use selective_scan::norm::{self, GradientsMut, OutputMut};
use selective_scan::{Element, View, embedding};

use crate::Result;
use crate::case::Case;
use crate::timing::{Prepared, Sets, Work, sets, uniform, zeros};

const F32: usize = size_of::<f32>();
const AROUND_ZERO: [f32; 2] = [-1.0, 1.0];

/// Directions `forward`, from a stream of f32 to activations of the type, and `backward`, from these and the stream's
/// gradient to the stream's and the weight's; with the variant `residual` (of bf16 alone), activations are added to the
/// stream first, and the sum is written. The last number is the size of a group.
pub fn norm<T: Element>(stream: &Arc<CudaStream>, case: &Case) -> Result<Prepared> {
    let mut rest = case.clone();
    let with_residual = rest.take("residual");
    rest.finish()?;
    let Case { batch, len, d_inner: width, last: group_size, .. } = *case;
    let (shape, count) = ([batch * len, width], case.count());
    let options = norm::Options { group_size: Some(group_size), ..Default::default() };
    let weight = uniform::<f32>(stream, width, AROUND_ZERO)?;
    let sets = sets(count * (F32 + size_of::<T>()));
    let streams = Sets::<f32>::uniform(stream, sets, count, AROUND_ZERO)?;
    let on = stream.clone();
    let least = |instructions, bytes| Work::new(count, 0, [0.0, instructions], [0.0, 0.0], bytes);
    let (work, run): (_, Box<dyn FnMut(usize) -> Result<()>>) = match case.direction.as_str() {
        "forward" if with_residual => {
            if case.dtype != "bf16" {
                return Err(format!("a residual is added to activations of bf16, not of {}", case.dtype).into());
            }
            let xs = Sets::<bf16>::uniform(stream, sets, count, AROUND_ZERO)?;
            let (mut out, mut sum) = (zeros::<bf16>(stream, count)?, zeros::<f32>(stream, count)?);
            let run = move |i| {
                let inputs = norm::Inputs {
                    residual: Some(streams.view(i, shape)),
                    weight: Some(View::on_device(&weight, [width])),
                    options,
                    ..norm::Inputs::new(xs.view(i, shape))
                };
                let to = OutputMut { out: &mut out, residual_out: Some(&mut sum) };
                Ok(norm::cuda::forward(&on, &inputs, to)?)
            };
            (least(5.0, count * (2 * F32 + 2 * size_of::<T>())), Box::new(run))
        }
        "forward" => {
            let mut out = zeros::<T>(stream, count)?;
            let run = move |i| {
                let inputs = norm::Inputs {
                    weight: Some(View::on_device(&weight, [width])),
                    options,
                    ..norm::Inputs::<f32, f32, _>::new(streams.view(i, shape))
                };
                Ok(norm::cuda::forward(&on, &inputs, OutputMut { out: &mut out, residual_out: None })?)
            };
            (least(4.0, count * (F32 + size_of::<T>())), Box::new(run))
        }
        "backward" if !with_residual => {
            let d_outs = Sets::<T>::uniform(stream, sets, count, AROUND_ZERO)?;
            let d_streams = Sets::<f32>::uniform(stream, sets, count, AROUND_ZERO)?;
            let (mut d_s, mut d_weight) = (zeros::<f32>(stream, count)?, zeros::<f32>(stream, width)?);
            let run = move |i| {
                let inputs = norm::BackwardInputs {
                    weight: Some(View::on_device(&weight, [width])),
                    d_residual_out: Some(d_streams.view(i, shape)),
                    options,
                    ..norm::BackwardInputs::<f32, f32, T, _>::new(streams.view(i, shape), d_outs.view(i, shape))
                };
                let (residual, weight) = (Some(&mut d_s), Some(&mut d_weight));
                Ok(norm::cuda::backward(&on, &inputs, GradientsMut { x: None, residual, weight, z: None })?)
            };
            (least(10.0, count * (3 * F32 + size_of::<T>())), Box::new(run))
        }
        other => return Err(format!("a norm has no direction `{other}` with these words").into()),
    };
    Ok(Prepared { stream: stream.clone(), sets, can_capture: true, work, run })
}

/// Direction `backward`; the last number is the size of the vocabulary. With the variant `half`, half of the ids are one.
pub fn embedding<T: Element>(stream: &Arc<CudaStream>, case: &Case) -> Result<Prepared> {
    let mut rest = case.clone();
    let half = rest.take("half");
    rest.finish()?;
    if case.direction != "backward" {
        return Err(format!("an embedding has no direction `{}`", case.direction).into());
    }
    let Case { batch, len, d_inner: width, last: vocab_size, .. } = *case;
    let (shape, count) = ([batch * len, width], case.count());
    let id = |i: usize| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % vocab_size;
    let ids: Vec<u32> = (0..batch * len).map(|i| if half && i % 2 == 0 { 0 } else { id(i) as u32 }).collect();
    let ids = stream.clone_htod(&ids)?;
    let sets = sets(count * size_of::<T>());
    let d_outs = Sets::<T>::uniform(stream, sets, count, AROUND_ZERO)?;
    let mut d_table = zeros::<f32>(stream, vocab_size * width)?;
    let bytes = count * size_of::<T>() + vocab_size * width * F32 + batch * len * size_of::<u32>();
    let work = Work::new(count, 0, [0.0, 1.0], [0.0, 0.0], bytes);
    let on = stream.clone();
    let run =
        Box::new(move |i| Ok(embedding::cuda::backward(&on, &ids, &d_outs.view(i, shape), vocab_size, &mut d_table)?));
    Ok(Prepared { stream: stream.clone(), sets, can_capture: true, work, run })
}
