//! The operators that memory bounds: the convolution, the updates of decoding and the cross entropy.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use half::{bf16, f16};
use selective_scan::conv::{self, GradientsMut, OutputMut};
use selective_scan::cuda::Cuda;
use selective_scan::loss;
use selective_scan::state_update::{self, UpdateMut};
use selective_scan::{Element, View, ViewMut};

use crate::Result;
use crate::case::{Case, mixed_lengths};
use crate::timing::{Prepared, Sets, Work, sets, uniform, zeros};

const F32: usize = size_of::<f32>();
const AROUND_ZERO: [f32; 2] = [-1.0, 1.0];

/// Directions `forward` and `backward`, with the variant `packed`, and `update`, with a pool of `f32-states`.
pub fn conv<T: Element>(stream: &Arc<CudaStream>, case: &Case) -> Result<Prepared> {
    let mut rest = case.clone();
    if case.direction == "update" {
        let in_f32 = rest.take("f32-states");
        rest.finish()?;
        return if in_f32 { conv_update::<T, f32>(stream, case) } else { conv_update::<T, T>(stream, case) };
    }
    let cu_seqlens = rest.take("packed").then(|| mixed_lengths(case.len));
    rest.finish()?;
    let Case { batch, len, d_inner, last: width, .. } = *case;
    let (shape, count) = ([batch, len, d_inner], case.count());
    let sets = sets(count * size_of::<T>());
    let xs = Sets::<T>::uniform(stream, sets, count, AROUND_ZERO)?;
    let data = ConvData { shape, xs, filter: Filter::draw(stream, d_inner, width)?, cu_seqlens };
    let mut out = zeros::<T>(stream, count)?;
    let on = stream.clone();
    let (taps, parameters) = (width as f64, d_inner * (width + 1) * F32);
    let work;
    let run: Box<dyn FnMut(usize) -> Result<()>>;
    match case.direction.as_str() {
        "forward" => {
            let bytes = 2 * count * size_of::<T>() + parameters;
            work = Work::new(count, 0, [0.0, taps + 5.0], [0.0, 2.0], bytes);
            run = Box::new(move |i| {
                let to = OutputMut { out: &mut out, final_state: None };
                Ok(conv::cuda::forward(&on, &data.inputs(i), to)?)
            });
        }
        "backward" => {
            let d_outs = Sets::<T>::uniform(stream, sets, count, AROUND_ZERO)?;
            let mut d_weight = zeros::<f32>(stream, d_inner * width)?;
            let mut d_bias = zeros::<f32>(stream, d_inner)?;
            let bytes = 3 * count * size_of::<T>() + 2 * parameters;
            work = Work::new(count, 0, [0.0, 3.0 * taps + 8.0], [0.0, 2.0], bytes);
            run = Box::new(move |i| {
                let (weight, bias) = (&mut d_weight, Some(&mut d_bias));
                let to = GradientsMut { x: &mut out, weight, bias, initial_state: None };
                Ok(conv::cuda::backward(&on, &data.inputs(i), d_outs.view(i, shape).into(), to)?)
            });
        }
        other => return Err(format!("a convolution has no direction `{other}`").into()),
    }
    Ok(Prepared { stream: stream.clone(), sets, can_capture: true, work, run })
}

struct ConvData<T> {
    shape: [usize; 3],
    xs: Sets<T>,
    filter: Filter,
    cu_seqlens: Option<Vec<usize>>,
}

impl<T: Element> ConvData<T> {
    fn inputs(&self, i: usize) -> conv::Inputs<'_, T, Cuda> {
        conv::Inputs {
            bias: Some(self.filter.bias()),
            cu_seqlens: self.cu_seqlens.as_deref(),
            options: conv::Options { silu: true, reverse: false },
            ..conv::Inputs::new(self.xs.view(i, self.shape), self.filter.weight())
        }
    }
}

struct Filter {
    weight: CudaSlice<f32>,
    bias: CudaSlice<f32>,
    shape: [usize; 2],
}

impl Filter {
    fn draw(stream: &Arc<CudaStream>, d_inner: usize, width: usize) -> Result<Self> {
        Ok(Self {
            weight: uniform(stream, d_inner * width, [-0.5, 0.5])?,
            bias: uniform(stream, d_inner, [-0.5, 0.5])?,
            shape: [d_inner, width],
        })
    }

    fn weight(&self) -> View<'_, f32, 2, Cuda> {
        View::on_device(&self.weight, self.shape)
    }

    fn bias(&self) -> View<'_, f32, 1, Cuda> {
        View::on_device(&self.bias, [self.shape[0]])
    }
}

fn conv_update<T: Element, S: Element>(stream: &Arc<CudaStream>, case: &Case) -> Result<Prepared> {
    let Case { batch, len: tokens, d_inner, last: width, .. } = *case;
    let (count, states) = (case.count(), batch * d_inner * (width - 1));
    let bytes = 2 * states * size_of::<S>() + 2 * count * size_of::<T>() + d_inner * (width + 1) * F32;
    let sets = sets(bytes);
    let xs = Sets::<T>::uniform(stream, sets, count, AROUND_ZERO)?;
    let mut pools = Sets::<S>::uniform(stream, sets, states, AROUND_ZERO)?;
    let filter = Filter::draw(stream, d_inner, width)?;
    let mut out = zeros::<T>(stream, count)?;
    let work = Work::new(count, 0, [0.0, width as f64 + 5.0], [0.0, 2.0], bytes);
    let on = stream.clone();
    let run = Box::new(move |i| {
        let inputs = conv::UpdateInputs {
            bias: Some(filter.bias()),
            silu: true,
            ..conv::UpdateInputs::new(xs.view(i, [batch, tokens, d_inner]), filter.weight())
        };
        let state = pool(&mut pools, i, [batch, width - 1, d_inner]);
        Ok(conv::cuda::update(&on, &inputs, conv::UpdateMut { state, out: &mut out, token_states: None })?)
    });
    Ok(Prepared { stream: stream.clone(), sets, can_capture: true, work, run })
}

/// The pool of set `i`.
fn pool<S: Element>(pools: &mut Sets<S>, i: usize, shape: [usize; 3]) -> ViewMut<'_, S, 3, Cuda> {
    let offset = pools.offset(i);
    ViewMut { offset, ..ViewMut::on_device(&mut pools.data, shape) }
}

/// The length is that of the tokens. Variants: states in `slots`, and `bf16-states` or `f16-states` instead of f32.
pub fn state_update<T: Element>(stream: &Arc<CudaStream>, case: &Case) -> Result<Prepared> {
    let mut rest = case.clone();
    let with_slots = rest.take("slots");
    let in_bf16 = rest.take("bf16-states");
    let in_f16 = rest.take("f16-states");
    rest.finish()?;
    match case.direction.as_str() {
        "update" if in_bf16 => update_states::<T, bf16>(stream, case, with_slots),
        "update" if in_f16 => update_states::<T, f16>(stream, case, with_slots),
        "update" => update_states::<T, f32>(stream, case, with_slots),
        other => Err(format!("a state has no direction `{other}`").into()),
    }
}

fn update_states<T: Element, S: Element>(stream: &Arc<CudaStream>, case: &Case, with_slots: bool) -> Result<Prepared> {
    let Case { batch, len: tokens, d_inner, last: d_state, .. } = *case;
    let (count, projections, states) = (case.count(), batch * tokens * d_state, batch * d_inner * d_state);
    let bytes =
        2 * states * size_of::<S>() + (4 * count + 2 * projections) * size_of::<T>() + d_inner * (d_state + 2) * F32;
    let sets = sets(bytes);
    let draw = |len| Sets::<T>::uniform(stream, sets, len, AROUND_ZERO);
    let [us, dts, zs] = [draw(count)?, draw(count)?, draw(count)?];
    let [bs, cs] = [draw(projections)?, draw(projections)?];
    let mut pools = Sets::<S>::uniform(stream, sets, states, AROUND_ZERO)?;
    let a = uniform::<f32>(stream, d_inner * d_state, [-16.0, -1.0])?;
    let parameters = uniform::<f32>(stream, d_inner, AROUND_ZERO)?;
    let mut out = zeros::<T>(stream, count)?;
    let slots: Vec<i32> = (0..batch as i32).rev().collect();
    let work = Work { state_steps: 0.0, ..Work::new(count, d_state, [5.0, 4.0], [1.0, 4.0], bytes) };
    let on = stream.clone();
    let run = Box::new(move |i| {
        let (activation, projection) = ([batch, tokens, d_inner], [batch, tokens, 1, d_state]);
        let inputs = state_update::Inputs {
            z: Some(zs.view(i, activation)),
            d: Some(View::on_device(&parameters, [d_inner])),
            delta_bias: Some(View::on_device(&parameters, [d_inner])),
            slots: with_slots.then_some(&slots[..]).into(),
            options: state_update::Options { delta_softplus: true, ..Default::default() },
            ..state_update::Inputs::new(
                us.view(i, activation),
                dts.view(i, activation),
                View::on_device(&a, [d_inner, d_state]),
                bs.view(i, projection),
                cs.view(i, projection),
            )
        };
        let state = pool(&mut pools, i, [batch, d_inner, d_state]);
        Ok(state_update::cuda::update(&on, &inputs, UpdateMut { state, out: &mut out, token_states: None })?)
    });
    Ok(Prepared { stream: stream.clone(), sets, can_capture: true, work, run })
}

/// The rows are batch times length, and d_inner is the vocabulary. Direction `forward` gives losses, and `backward` those and
/// the gradient in place of the logits, which the next call takes for logits.
pub fn loss<T: Element>(stream: &Arc<CudaStream>, case: &Case) -> Result<Prepared> {
    case.finish()?;
    let (rows, vocab, count) = (case.batch * case.len, case.d_inner, case.count());
    let sets = sets(count * size_of::<T>());
    let mut logits = Sets::<T>::uniform(stream, sets, count, [-4.0, 4.0])?;
    let targets: Vec<u32> = (0..rows).map(|row| (row * 7919 % vocab) as u32).collect();
    let targets = stream.clone_htod(&targets)?;
    let mut losses = zeros::<f32>(stream, rows)?;
    let (on, shape) = (stream.clone(), [rows, vocab]);
    let work;
    let run: Box<dyn FnMut(usize) -> Result<()>>;
    match case.direction.as_str() {
        "forward" => {
            work = Work::new(count, 0, [0.0, 5.0], [0.0, 1.0], count * size_of::<T>() + 2 * rows * F32);
            run = Box::new(move |i| {
                let inputs = loss::Inputs::new(logits.view(i, shape), &targets);
                Ok(loss::cuda::losses(&on, &inputs, &mut losses)?)
            });
        }
        "backward" => {
            work = Work::new(count, 0, [0.0, 9.0], [0.0, 2.0], 2 * count * size_of::<T>() + 2 * rows * F32);
            run = Box::new(move |i| {
                let offset = logits.offset(i);
                let view = ViewMut { offset, ..ViewMut::on_device(&mut logits.data, shape) };
                let inputs = loss::InputsMut::new(view, &targets, 1.0);
                Ok(loss::cuda::losses_and_gradient(&on, inputs, &mut losses)?)
            });
        }
        other => return Err(format!("a loss has no direction `{other}`").into()),
    }
    Ok(Prepared { stream: stream.clone(), sets, can_capture: true, work, run })
}
