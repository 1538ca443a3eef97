//! S4D, with a skip connection, and the final state forward.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use selective_scan::cuda::Cuda;
use selective_scan::lti::s4d::cuda::{self, Plan};
use selective_scan::lti::s4d::{GradientsMut, Inputs, OutputMut};
use selective_scan::{Element, View};

use crate::Result;
use crate::case::{Case, mixed_lengths};
use crate::timing::{Prepared, Sets, Work, sets, uniform, zeros};

struct Data<T> {
    case: Case,
    u: Sets<T>,
    log_delta: CudaSlice<f32>,
    a: CudaSlice<f32>,
    b: CudaSlice<f32>,
    c: CudaSlice<f32>,
    d: CudaSlice<f32>,
    cu_seqlens: Option<Vec<usize>>,
}

impl<T: Element> Data<T> {
    fn inputs(&self, i: usize) -> Inputs<'_, T, Cuda> {
        let Case { batch, len, d_inner, last: d_state, .. } = self.case;
        let complex = |data| View::on_device(data, [d_inner, 2 * d_state]);
        Inputs {
            d: Some(View::on_device(&self.d, [d_inner])),
            cu_seqlens: self.cu_seqlens.as_deref(),
            ..Inputs::new(
                self.u.view(i, [batch, len, d_inner]),
                View::on_device(&self.log_delta, [d_inner]),
                complex(&self.a),
                complex(&self.b),
                complex(&self.c),
            )
        }
    }
}

/// `last` is the number of pairs. Variants: `packed` sequences of mixed lengths, no sequence split (`whole`) or all into
/// `segments-` of that many steps; bf16 multiplied in TF32 (`tf32`).
pub fn prepare<T: Element>(stream: &Arc<CudaStream>, case: &Case) -> Result<Prepared> {
    let mut rest = case.clone();
    let cu_seqlens = rest.take("packed").then(|| mixed_lengths(case.len));
    let segment_steps = match rest.take("whole") {
        true => Some(usize::MAX),
        false => rest.take_number("segments-")?,
    };
    let plan = Plan { segment_steps, tf32: rest.take("tf32") };
    rest.finish()?;
    let is_backward = match case.direction.as_str() {
        "forward" => false,
        "backward" => true,
        other => return Err(format!("S4D has no direction `{other}`").into()),
    };
    let (count, d_inner, pairs) = (case.count(), case.d_inner, case.d_inner * case.last);
    let sets = sets(2 * count * size_of::<T>());
    // S4D-Lin: decay rates of a half, frequencies that are multiples of π.
    let pair = |i: usize| [-0.5, std::f32::consts::PI * (i % case.last) as f32];
    let a: Vec<f32> = (0..pairs).flat_map(pair).collect();
    let data = Data {
        case: case.clone(),
        u: Sets::uniform(stream, sets, count, [-1.0, 1.0])?,
        log_delta: uniform(stream, d_inner, [1e-3f32.ln(), 0.1f32.ln()])?,
        a: stream.clone_htod(&a)?,
        b: uniform(stream, 2 * pairs, [-1.0, 1.0])?,
        c: uniform(stream, 2 * pairs, [-1.0, 1.0])?,
        d: uniform(stream, d_inner, [0.5, 1.0])?,
        cu_seqlens,
    };
    let on = stream.clone();
    let mut out = zeros::<T>(stream, count)?;
    let tensors = if is_backward { 3 } else { 2 };
    // Nothing but memory bounds it whatever the implementation: a chunked form has as few products as one likes.
    let work = Work::new(count, case.last, [0.0, 0.0], [0.0, 0.0], tensors * count * size_of::<T>());
    let run: Box<dyn FnMut(usize) -> Result<()>> = if is_backward {
        let d_outs = Sets::<T>::uniform(stream, sets, count, [-1.0, 1.0])?;
        let [mut d_log_delta, mut d_d] = [zeros::<f32>(stream, d_inner)?, zeros::<f32>(stream, d_inner)?];
        let complex = || zeros::<f32>(stream, 2 * pairs);
        let [mut d_a, mut d_b, mut d_c] = [complex()?, complex()?, complex()?];
        Box::new(move |i| {
            let gradients = GradientsMut {
                u: &mut out,
                log_delta: &mut d_log_delta,
                a: &mut d_a,
                b: &mut d_b,
                c: &mut d_c,
                d: Some(&mut d_d),
                initial_state: None,
            };
            let d_out = d_outs.view(i, data.inputs(i).u.shape);
            Ok(cuda::backward_with(plan, &on, &data.inputs(i), d_out.into(), gradients)?)
        })
    } else {
        let sequences = data.cu_seqlens.as_ref().map_or(case.batch, |offsets| offsets.len() - 1);
        let mut final_state = zeros::<f32>(stream, sequences * 2 * pairs)?;
        Box::new(move |i| {
            let to = OutputMut { out: &mut out, final_state: Some(&mut final_state) };
            Ok(cuda::forward_with(plan, &on, &data.inputs(i), to)?)
        })
    };
    Ok(Prepared { stream: stream.clone(), sets, can_capture: true, work, run })
}
