//! The operators on rows: the norm, the gradient of an embedding, and the choice of a token. Memory bounds them.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use half::bf16;
use selective_scan::norm::{self, GradientsMut, OutputMut};
use selective_scan::sampling::{self, Settings};
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

/// Direction `choose`; the rows are batch times length, and d_inner is the vocabulary. Tokens have their probabilities, or are
/// chosen as words for variants say: `greedy`, `top-k`, `top-p` and `min-p`, the last three also together; `penalty` penalises
/// those that have occurred, and `log-probs` asks for log-probabilities.
pub fn sampling(stream: &Arc<CudaStream>, case: &Case) -> Result<Prepared> {
    let mut rest = case.clone();
    let settings = Settings {
        temperature: if rest.take("greedy") { 0.0 } else { 1.0 },
        top_k: if rest.take("top-k") { 50 } else { 0 },
        top_p: if rest.take("top-p") { 0.9 } else { 1.0 },
        min_p: if rest.take("min-p") { 0.05 } else { 0.0 },
        repetition_penalty: if rest.take("penalty") { 1.2 } else { 1.0 },
        ..Settings::default()
    };
    let with_log_probs = rest.take("log-probs");
    rest.finish()?;
    if case.direction != "choose" {
        return Err(format!("sampling has no direction `{}`", case.direction).into());
    }
    let (rows, vocab, count) = (case.batch * case.len, case.d_inner, case.count());
    let sets = sets(count * F32);
    let logits = Sets::<f32>::uniform(stream, sets, count, [-12.0, 12.0])?;
    let of_row = |row: usize| Settings { seed: row as u64, ..settings };
    let mut settings = stream.clone_htod(&(0..rows).map(of_row).collect::<Vec<_>>())?;
    let mut occurred = stream.alloc_zeros(rows * sampling::words(vocab))?;
    let mut tokens = stream.alloc_zeros(rows)?;
    let mut log_probs = with_log_probs.then(|| zeros::<f32>(stream, rows)).transpose()?;
    let mut workspace = sampling::cuda::Workspace::new(stream, rows, vocab)?;
    let work = Work::new(count, 0, [0.0, 4.0], [0.0, 0.0], count * F32);
    let on = stream.clone();
    let run = Box::new(move |i| {
        let state = sampling::cuda::StateMut {
            settings: &mut settings,
            occurred: Some(&mut occurred),
            tokens: &mut tokens,
            log_probs: log_probs.as_mut(),
        };
        let inputs = sampling::Inputs::new(logits.view(i, [rows, vocab]));
        Ok(sampling::cuda::sample(&on, &inputs, state, &mut workspace)?)
    });
    Ok(Prepared { stream: stream.clone(), sets, can_capture: true, work, run })
}
