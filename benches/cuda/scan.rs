//! The selective scan, with softplus, bias, skip connection and gate.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use selective_scan::Element;
use selective_scan::cuda::Cuda;
use selective_scan::scan::cuda::{PerLane, Plan};
use selective_scan::scan::{self, CheckpointSteps, GradientsMut, Inputs, Options, OutputMut};
use selective_scan::{ProjectionOf, View};

use crate::Result;
use crate::case::{Case, mixed_lengths};
use crate::timing::{Prepared, Sets, Work, sets, uniform, zeros};

struct Data<T> {
    case: Case,
    u: Sets<T>,
    delta: Sets<T>,
    z: Sets<T>,
    b: Sets<T>,
    c: Sets<T>,
    a: CudaSlice<f32>,
    d: CudaSlice<f32>,
    bias: CudaSlice<f32>,
    cu_seqlens: Option<Vec<usize>>,
    checkpoint_steps: CheckpointSteps,
}

impl<T: Element> Data<T> {
    fn inputs(&self, i: usize) -> Inputs<'_, T, Cuda> {
        let Case { batch, len, d_inner, last: d_state, .. } = self.case;
        let (activation, projection) = ([batch, len, d_inner], [batch, len, 1, d_state]);
        Inputs {
            z: Some(self.z.view(i, activation)),
            d: Some(View::on_device(&self.d, [d_inner])),
            delta_bias: Some(View::on_device(&self.bias, [d_inner])),
            cu_seqlens: self.cu_seqlens.as_deref(),
            options: Options { delta_softplus: true, checkpoint_steps: self.checkpoint_steps, ..Default::default() },
            ..Inputs::new(
                self.u.view(i, activation),
                self.delta.view(i, activation),
                View::on_device(&self.a, [d_inner, d_state]),
                self.b.view(i, projection),
                self.c.view(i, projection),
            )
        }
    }
}

/// Variants: `packed` sequences of mixed lengths, no sequence split (`whole`) or all into `segments-` of that many steps,
/// `one` or `four` channels a lane, in backward `narrow` or `wide` blocks, states kept each `kept-16`, `kept-32` or
/// `kept-64` steps (by a forward pass that is timed without one of these words, none).
pub fn prepare<T: Element>(stream: &Arc<CudaStream>, case: &Case) -> Result<Prepared> {
    let mut rest = case.clone();
    let cu_seqlens = rest.take("packed").then(|| mixed_lengths(case.len));
    let segment_steps = match rest.take("whole") {
        true => Some(usize::MAX),
        false => rest.take_number("segments-")?,
    };
    let mut plan = Plan { segment_steps, ..Plan::default() };
    for (word, per_lane) in
        [("quarter", PerLane::Quarter), ("half", PerLane::Half), ("one", PerLane::One), ("four", PerLane::Four)]
    {
        if rest.take(word) {
            plan.per_lane = Some(per_lane);
        }
    }
    for (word, narrow) in [("narrow", true), ("wide", false)] {
        if rest.take(word) {
            plan.narrow = Some(narrow);
        }
    }
    let keeps = rest.take_number("kept-")?;
    let checkpoint_steps = match keeps {
        Some(16) => CheckpointSteps::Every16,
        Some(32) => CheckpointSteps::Every32,
        Some(64) | None => CheckpointSteps::Every64,
        Some(other) => return Err(format!("a scan keeps states each 16, 32 or 64 steps, not {other}").into()),
    };
    rest.finish()?;
    let is_backward = match case.direction.as_str() {
        "forward" => false,
        "backward" => true,
        other => return Err(format!("a scan has no direction `{other}`").into()),
    };

    let (count, d_inner, d_state) = (case.count(), case.d_inner, case.last);
    let projections = case.batch * case.len * d_state;
    let sets = sets((if is_backward { 4 } else { 3 }) * count * size_of::<T>());
    let draw = |len, range| Sets::<T>::uniform(stream, sets, len, range);
    let a: Vec<f32> = (0..d_inner * d_state).map(|i| -((i % d_state + 1) as f32)).collect();
    let data = Data {
        case: case.clone(),
        u: draw(count, [-1.0, 1.0])?,
        delta: draw(count, [-5.0, -1.0])?,
        z: draw(count, [-2.0, 2.0])?,
        b: draw(projections, [-1.0, 1.0])?,
        c: draw(projections, [-1.0, 1.0])?,
        a: stream.clone_htod(&a)?,
        d: uniform(stream, d_inner, [0.5, 1.0])?,
        bias: uniform(stream, d_inner, [-0.5, 0.5])?,
        cu_seqlens,
        checkpoint_steps,
    };
    let mut out = zeros::<T>(stream, count)?;
    let on = stream.clone();
    let parameters = d_inner * (d_state + 2) * size_of::<f32>();
    let run: Box<dyn FnMut(usize) -> Result<()>>;
    let work;
    if is_backward {
        work = Work::new(
            count,
            d_state,
            [13.5, 5.0],
            [1.0, 5.0],
            (7 * count + 4 * projections) * size_of::<T>()
                + count * d_state / checkpoint_steps.get() * size_of::<f32>()
                + 2 * parameters,
        );
        run = backward(on, plan, data, out, sets)?;
    } else {
        let mut kept = match keeps {
            Some(_) => Some(zeros::<f32>(stream, data.inputs(0).checkpoint_len()?)?),
            None => None,
        };
        let states = kept.as_ref().map_or(0, |kept| kept.len() * size_of::<f32>());
        let bytes = (4 * count + 2 * projections) * size_of::<T>() + states + parameters;
        work = Work::new(count, d_state, [5.0, 4.0], [1.0, 4.0], bytes);
        run = Box::new(move |i| {
            let to = OutputMut { out: &mut out, final_state: None, checkpoints: kept.as_mut() };
            Ok(scan::cuda::forward_with(plan, &on, &data.inputs(i), to)?)
        });
    }
    Ok(Prepared { stream: stream.clone(), sets, can_capture: true, work, run })
}

fn backward<T: Element>(
    stream: Arc<CudaStream>,
    plan: Plan,
    data: Data<T>,
    mut out: CudaSlice<T>,
    sets: usize,
) -> Result<Box<dyn FnMut(usize) -> Result<()>>> {
    let Case { batch, len, d_inner, last: d_state, .. } = data.case;
    let count = data.case.count();
    let d_outs = Sets::<T>::uniform(&stream, sets, count, [-1.0, 1.0])?;
    // Of each set its own, so that they come from memory too.
    let mut checkpoints = Vec::new();
    for i in 0..sets {
        let inputs = data.inputs(i);
        let mut kept = zeros::<f32>(&stream, inputs.checkpoint_len()?)?;
        let to = OutputMut { out: &mut out, final_state: None, checkpoints: Some(&mut kept) };
        scan::cuda::forward_with(plan, &stream, &inputs, to)?;
        checkpoints.push(kept);
    }
    let mut d_u = out;
    let [mut d_delta, mut d_z] = [zeros::<T>(&stream, count)?, zeros::<T>(&stream, count)?];
    let projection = || zeros::<T>(&stream, batch * len * d_state);
    let [mut d_b, mut d_c] = [projection()?, projection()?];
    let mut d_a = zeros::<f32>(&stream, d_inner * d_state)?;
    let [mut d_d, mut d_bias] = [zeros::<f32>(&stream, d_inner)?, zeros::<f32>(&stream, d_inner)?];
    Ok(Box::new(move |i| {
        let gradients = GradientsMut {
            u: &mut d_u,
            delta: &mut d_delta,
            a: &mut d_a,
            b: ProjectionOf::Varying(&mut d_b),
            c: ProjectionOf::Varying(&mut d_c),
            z: Some(&mut d_z),
            d: Some(&mut d_d),
            delta_bias: Some(&mut d_bias),
            initial_state: None,
        };
        let d_out = d_outs.view(i, [batch, len, d_inner]);
        Ok(scan::cuda::backward_with(plan, &stream, &data.inputs(i), &checkpoints[i], d_out.into(), gradients)?)
    }))
}
