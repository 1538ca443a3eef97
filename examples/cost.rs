//! Runs one operator on a GPU once, at the shape of the cost sheet, so that what its kernels execute can be counted:
//! `kernels/budget/cost_sheet.py` does that for each name that `cost --list` prints.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use half::bf16;
use rand::Rng;
use selective_scan::cuda::{self, Cuda};
use selective_scan::lti::{Rule, s4d};
use selective_scan::sampling::Settings;
use selective_scan::scan::cuda::{PerLane, Plan};
use selective_scan::scan::{self, GradientsMut, Inputs, Options, OutputMut};
use selective_scan::{
    DType, Element, ProjectionOf, View, ViewMut, attention, complex_scan, conv, embedding, loss, norm, optimizer,
    sampling, state_update,
};

use crate::common::Random;

#[path = "common/mod.rs"]
mod common;

type Failure = Box<dyn std::error::Error>;

const BATCH: usize = 1;
const LENGTH: usize = 512;
const CHANNELS: usize = 2048;
const STATES: usize = 16;
const ACTIVATION: [usize; 3] = [BATCH, LENGTH, CHANNELS];
const COUNT: usize = BATCH * LENGTH * CHANNELS;

type Run = fn(&Arc<CudaStream>) -> Result<(), Failure>;

/// What can be run, by name. `cost_sheet.py` has a line with the least possible counts for each kernel that these launch.
const OPERATORS: &[(&str, Run)] = &[
    ("scan forward, one channel a lane", |stream| scan_forward(stream, unsplit(PerLane::One))),
    ("scan forward, four channels a lane", |stream| scan_forward(stream, unsplit(PerLane::Four))),
    ("scan forward, one state a lane", |stream| scan_forward(stream, in_parts(PerLane::Quarter))),
    ("scan forward, two states a lane", |stream| scan_forward(stream, in_parts(PerLane::Half))),
    ("scan forward, split", |stream| scan_forward(stream, Plan { segment_steps: Some(64), ..Plan::default() })),
    ("scan backward, unsplit", |stream| scan_backward(stream, unsplit(PerLane::One))),
    ("scan backward, as planned", |stream| scan_backward(stream, Plan::default())),
    ("S4D forward", s4d_forward),
    ("S4D backward", s4d_backward),
    ("S4D update", s4d_update),
    ("complex states, forward", complex_forward),
    ("complex states, backward", complex_backward),
    ("complex states, update", complex_update),
    ("attention forward", attention_forward),
    ("attention backward", attention_backward),
    ("attention decoding", attention_decoding),
    ("convolution forward", conv_forward),
    ("convolution backward", conv_backward),
    ("convolution update", conv_update),
    ("state update", update_states),
    ("cross entropy", cross_entropy),
    ("optimizer step", optimizer_step),
    ("norm forward", norm_forward),
    ("norm backward", norm_backward),
    ("embedding backward", embedding_backward),
    ("sampling by temperature", |stream| choose_tokens(stream, Settings::default())),
    ("sampling by top-k and top-p", |stream| {
        choose_tokens(stream, Settings { top_k: 50, top_p: 0.9, ..Settings::default() })
    }),
];

/// Taps of the convolution, and the rows that are decoded at once.
const WIDTH: usize = 4;
const ROWS: usize = 64;

fn unsplit(per_lane: PerLane) -> Plan {
    Plan { segment_steps: Some(usize::MAX), per_lane: Some(per_lane), ..Plan::default() }
}

fn in_parts(per_lane: PerLane) -> Plan {
    Plan { per_lane: Some(per_lane), ..Plan::default() }
}

fn main() -> Result<(), Failure> {
    let name = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
    if name == "--list" {
        OPERATORS.iter().for_each(|(name, _)| println!("{name}"));
        return Ok(());
    }
    let Some((_, run)) = OPERATORS.iter().find(|(known, _)| *known == name) else {
        return Err(format!("expected --list or one of what it prints, got `{name}`").into());
    };
    let stream = cuda::context(0)?.default_stream();
    run(&stream)?;
    stream.synchronize()?;
    Ok(())
}

/// Random values between `low` and `high` on the device.
fn uniform<T: Element>(
    stream: &Arc<CudaStream>,
    random: &mut Random,
    len: usize,
    low: f32,
    high: f32,
) -> Result<CudaSlice<T>, Failure> {
    Ok(stream.clone_htod(&random.fill::<T>(len, |source| source.random_range(low..high)))?)
}

/// Inputs of a scan as Mamba has them.
struct Tensors {
    u: CudaSlice<bf16>,
    delta: CudaSlice<bf16>,
    z: CudaSlice<bf16>,
    b: CudaSlice<bf16>,
    c: CudaSlice<bf16>,
    a: CudaSlice<f32>,
    d: CudaSlice<f32>,
    bias: CudaSlice<f32>,
}

impl Tensors {
    fn new(stream: &Arc<CudaStream>) -> Result<Self, Failure> {
        let mut random = Random::new(1);
        let projection = BATCH * LENGTH * STATES;
        Ok(Self {
            u: uniform(stream, &mut random, COUNT, -1.0, 1.0)?,
            delta: uniform(stream, &mut random, COUNT, -5.0, -1.0)?,
            z: uniform(stream, &mut random, COUNT, -2.0, 2.0)?,
            b: uniform(stream, &mut random, projection, -1.0, 1.0)?,
            c: uniform(stream, &mut random, projection, -1.0, 1.0)?,
            a: uniform(stream, &mut random, CHANNELS * STATES, -16.0, -1.0)?,
            d: uniform(stream, &mut random, CHANNELS, 0.5, 1.0)?,
            bias: uniform(stream, &mut random, CHANNELS, -0.5, 0.5)?,
        })
    }

    fn inputs(&self) -> Inputs<'_, bf16, Cuda> {
        let projection = [BATCH, LENGTH, 1, STATES];
        Inputs {
            z: Some(View::on_device(&self.z, ACTIVATION)),
            d: Some(View::on_device(&self.d, [CHANNELS])),
            delta_bias: Some(View::on_device(&self.bias, [CHANNELS])),
            options: Options { delta_softplus: true, ..Default::default() },
            ..Inputs::new(
                View::on_device(&self.u, ACTIVATION),
                View::on_device(&self.delta, ACTIVATION),
                View::on_device(&self.a, [CHANNELS, STATES]),
                View::on_device(&self.b, projection),
                View::on_device(&self.c, projection),
            )
        }
    }
}

fn scan_forward(stream: &Arc<CudaStream>, plan: Plan) -> Result<(), Failure> {
    let tensors = Tensors::new(stream)?;
    let mut out = stream.alloc_zeros(COUNT)?;
    let to = OutputMut { out: &mut out, final_state: None, checkpoints: None };
    Ok(scan::cuda::forward_with(plan, stream, &tensors.inputs(), to)?)
}

fn scan_backward(stream: &Arc<CudaStream>, plan: Plan) -> Result<(), Failure> {
    let tensors = Tensors::new(stream)?;
    let inputs = tensors.inputs();
    let mut out = stream.alloc_zeros::<bf16>(COUNT)?;
    let mut checkpoints = stream.alloc_zeros::<f32>(inputs.checkpoint_len()?)?;
    let to = OutputMut { out: &mut out, final_state: None, checkpoints: Some(&mut checkpoints) };
    scan::cuda::forward_with(plan, stream, &inputs, to)?;
    let (mut u, mut delta, mut z) =
        (stream.alloc_zeros(COUNT)?, stream.alloc_zeros(COUNT)?, stream.alloc_zeros(COUNT)?);
    let (mut b, mut c) = (stream.alloc_zeros(tensors.b.len())?, stream.alloc_zeros(tensors.c.len())?);
    let mut a = stream.alloc_zeros(CHANNELS * STATES)?;
    let (mut d, mut delta_bias) = (stream.alloc_zeros(CHANNELS)?, stream.alloc_zeros(CHANNELS)?);
    let gradients = GradientsMut {
        u: &mut u,
        delta: &mut delta,
        a: &mut a,
        b: ProjectionOf::Varying(&mut b),
        c: ProjectionOf::Varying(&mut c),
        z: Some(&mut z),
        d: Some(&mut d),
        delta_bias: Some(&mut delta_bias),
        initial_state: None,
    };
    let d_out = View::on_device(&out, ACTIVATION);
    Ok(scan::cuda::backward_with(plan, stream, &inputs, &checkpoints, d_out.into(), gradients)?)
}

/// Inputs of S4D, and of a scan with complex states beside [`Tensors`]: complex numbers are two neighbours.
struct Complex {
    log_delta: CudaSlice<f32>,
    a: CudaSlice<f32>,
    b: CudaSlice<f32>,
    c: CudaSlice<f32>,
    /// Of the activations' type, for each step.
    projections: CudaSlice<bf16>,
}

const COMPLEX: [usize; 2] = [CHANNELS, 2 * STATES];
const COMPLEX_COUNT: usize = CHANNELS * 2 * STATES;

impl Complex {
    fn new(stream: &Arc<CudaStream>) -> Result<Self, Failure> {
        let mut random = Random::new(8);
        // S4D-Lin.
        let numbers: Vec<f32> = (0..COMPLEX_COUNT)
            .map(|i| if i % 2 == 0 { -0.5 } else { std::f32::consts::PI * (i / 2 % STATES) as f32 })
            .collect();
        Ok(Self {
            log_delta: uniform(stream, &mut random, CHANNELS, -6.9, -2.3)?,
            a: stream.clone_htod(&numbers)?,
            b: uniform(stream, &mut random, COMPLEX_COUNT, -1.0, 1.0)?,
            c: uniform(stream, &mut random, COMPLEX_COUNT, -1.0, 1.0)?,
            projections: uniform(stream, &mut random, BATCH * LENGTH * 2 * STATES, -1.0, 1.0)?,
        })
    }

    fn s4d<'a>(&'a self, tensors: &'a Tensors) -> s4d::Inputs<'a, bf16, Cuda> {
        let complex = |numbers| View::on_device(numbers, COMPLEX);
        s4d::Inputs {
            d: Some(View::on_device(&tensors.d, [CHANNELS])),
            ..s4d::Inputs::new(
                View::on_device(&tensors.u, ACTIVATION),
                View::on_device(&self.log_delta, [CHANNELS]),
                complex(&self.a),
                complex(&self.b),
                complex(&self.c),
            )
        }
    }

    fn scan<'a>(&'a self, tensors: &'a Tensors) -> complex_scan::Inputs<'a, bf16, Cuda> {
        let projection = View::on_device(&self.projections, [BATCH, LENGTH, 1, 2 * STATES]);
        complex_scan::Inputs {
            z: Some(View::on_device(&tensors.z, ACTIVATION)),
            d: Some(View::on_device(&tensors.d, [CHANNELS])),
            delta_bias: Some(View::on_device(&tensors.bias, [CHANNELS])),
            options: complex_scan::Options { delta_softplus: true, ..Default::default() },
            ..complex_scan::Inputs::new(
                View::on_device(&tensors.u, ACTIVATION),
                View::on_device(&tensors.delta, ACTIVATION),
                View::on_device(&self.a, COMPLEX),
                projection,
                projection,
            )
        }
    }
}

fn s4d_forward(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let (tensors, complex) = (Tensors::new(stream)?, Complex::new(stream)?);
    let mut out = stream.alloc_zeros(COUNT)?;
    Ok(s4d::cuda::forward(stream, &complex.s4d(&tensors), s4d::OutputMut::new(&mut out))?)
}

fn s4d_backward(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let (tensors, complex) = (Tensors::new(stream)?, Complex::new(stream)?);
    let mut u = stream.alloc_zeros(COUNT)?;
    let (mut log_delta, mut d) = (stream.alloc_zeros(CHANNELS)?, stream.alloc_zeros(CHANNELS)?);
    let zeros = || stream.alloc_zeros(COMPLEX_COUNT);
    let (mut a, mut b, mut c) = (zeros()?, zeros()?, zeros()?);
    let gradients = s4d::GradientsMut {
        u: &mut u,
        log_delta: &mut log_delta,
        a: &mut a,
        b: &mut b,
        c: &mut c,
        d: Some(&mut d),
        initial_state: None,
    };
    let d_out = View::on_device(&tensors.z, ACTIVATION);
    Ok(s4d::cuda::backward(stream, &complex.s4d(&tensors), d_out.into(), gradients)?)
}

fn s4d_update(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let (tensors, complex) = (Tensors::new(stream)?, Complex::new(stream)?);
    let all = complex.s4d(&tensors);
    let mut recurrence = stream.alloc_zeros(CHANNELS * 6 * STATES)?;
    s4d::cuda::recurrence(stream, all.log_delta, all.a, all.b, Rule::ZeroOrderHold, &mut recurrence)?;
    let u = View::on_device(&tensors.u, [ROWS, 1, CHANNELS]);
    let recurrence = View::on_device(&recurrence, [CHANNELS, 6, STATES]);
    let inputs = s4d::UpdateInputs { d: all.d, ..s4d::UpdateInputs::new(u, recurrence, all.c) };
    let mut pool = uniform::<f32>(stream, &mut Random::new(3), ROWS * COMPLEX_COUNT, -1.0, 1.0)?;
    let mut out = stream.alloc_zeros(ROWS * CHANNELS)?;
    let state = ViewMut::on_device(&mut pool, [ROWS, CHANNELS, 2 * STATES]);
    Ok(s4d::cuda::update(stream, &inputs, s4d::UpdateMut::new(state, &mut out))?)
}

fn complex_forward(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let (tensors, complex) = (Tensors::new(stream)?, Complex::new(stream)?);
    let mut out = stream.alloc_zeros(COUNT)?;
    Ok(complex_scan::cuda::forward(stream, &complex.scan(&tensors), complex_scan::OutputMut::new(&mut out))?)
}

fn complex_backward(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let (tensors, complex) = (Tensors::new(stream)?, Complex::new(stream)?);
    let (mut u, mut delta, mut z) =
        (stream.alloc_zeros(COUNT)?, stream.alloc_zeros(COUNT)?, stream.alloc_zeros(COUNT)?);
    let (mut b, mut c) =
        (stream.alloc_zeros(complex.projections.len())?, stream.alloc_zeros(complex.projections.len())?);
    let mut a = stream.alloc_zeros(COMPLEX_COUNT)?;
    let (mut d, mut delta_bias) = (stream.alloc_zeros(CHANNELS)?, stream.alloc_zeros(CHANNELS)?);
    let gradients = complex_scan::GradientsMut {
        u: &mut u,
        delta: &mut delta,
        a: &mut a,
        b: ProjectionOf::Varying(&mut b),
        c: ProjectionOf::Varying(&mut c),
        z: Some(&mut z),
        d: Some(&mut d),
        delta_bias: Some(&mut delta_bias),
        initial_state: None,
    };
    let d_out = View::on_device(&tensors.z, ACTIVATION);
    Ok(complex_scan::cuda::backward(stream, &complex.scan(&tensors), d_out.into(), gradients)?)
}

fn complex_update(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let (tensors, complex) = (Tensors::new(stream)?, Complex::new(stream)?);
    let activation = [ROWS, 1, CHANNELS];
    let projection = View::on_device(&complex.projections, [ROWS, 1, 1, 2 * STATES]);
    let all = complex.scan(&tensors);
    let inputs = complex_scan::UpdateInputs {
        z: Some(View::on_device(&tensors.z, activation)),
        d: all.d,
        delta_bias: all.delta_bias,
        delta_softplus: true,
        ..complex_scan::UpdateInputs::new(
            View::on_device(&tensors.u, activation),
            View::on_device(&tensors.delta, activation),
            all.a,
            projection,
            projection,
        )
    };
    let mut pool = uniform::<f32>(stream, &mut Random::new(3), ROWS * COMPLEX_COUNT, -1.0, 1.0)?;
    let mut out = stream.alloc_zeros(ROWS * CHANNELS)?;
    let state = ViewMut::on_device(&mut pool, [ROWS, CHANNELS, 2 * STATES]);
    Ok(complex_scan::cuda::update(stream, &inputs, complex_scan::UpdateMut::new(state, &mut out))?)
}

/// Attention of the scan's shape: heads of 64, and in decoding four query heads to one of keys, of which each row has as many as
/// there are steps.
const D_HEAD: usize = 64;
const HEADS: usize = CHANNELS / D_HEAD;
const KV_HEADS: usize = HEADS / 4;

fn attention_forward(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let x = uniform::<bf16>(stream, &mut Random::new(5), COUNT, -1.0, 1.0)?;
    let view = View::on_device(&x, [BATCH, LENGTH, HEADS, D_HEAD]);
    let (mut out, mut lse) = (stream.alloc_zeros(COUNT)?, stream.alloc_zeros(BATCH * LENGTH * HEADS)?);
    let to = attention::OutputMut { out: &mut out, lse: &mut lse };
    Ok(attention::cuda::forward(stream, &attention::Inputs::new(view, view, view), to)?)
}

fn attention_backward(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let x = uniform::<bf16>(stream, &mut Random::new(5), COUNT, -1.0, 1.0)?;
    let lse = uniform::<f32>(stream, &mut Random::new(6), BATCH * LENGTH * HEADS, 6.0, 7.0)?;
    let view = View::on_device(&x, [BATCH, LENGTH, HEADS, D_HEAD]);
    let [mut q, mut k, mut v] = [stream.alloc_zeros(COUNT)?, stream.alloc_zeros(COUNT)?, stream.alloc_zeros(COUNT)?];
    let lse = View::on_device(&lse, [BATCH, LENGTH, HEADS]);
    let outputs = attention::OutputGradients { out: view, lse, d_out: view };
    let to = attention::GradientsMut { q: &mut q, k: &mut k, v: &mut v };
    Ok(attention::cuda::backward(stream, &attention::Inputs::new(view, view, view), outputs, to)?)
}

fn attention_decoding(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let q = uniform::<bf16>(stream, &mut Random::new(5), ROWS * CHANNELS, -1.0, 1.0)?;
    let cache = uniform::<bf16>(stream, &mut Random::new(6), ROWS * LENGTH * KV_HEADS * D_HEAD, -1.0, 1.0)?;
    let keys: Vec<_> = (0..ROWS).map(|row| attention::KeyRange { row, start: 0, length: LENGTH }).collect();
    let cache = View::on_device(&cache, [ROWS, LENGTH, KV_HEADS, D_HEAD]);
    let inputs = attention::Inputs {
        keys: Some(&keys),
        ..attention::Inputs::new(View::on_device(&q, [ROWS, 1, HEADS, D_HEAD]), cache, cache)
    };
    let (mut out, mut lse) = (stream.alloc_zeros(ROWS * CHANNELS)?, stream.alloc_zeros(ROWS * HEADS)?);
    Ok(attention::cuda::forward(stream, &inputs, attention::OutputMut { out: &mut out, lse: &mut lse })?)
}

/// Inputs of a convolution.
struct Filters {
    x: CudaSlice<bf16>,
    weight: CudaSlice<f32>,
    bias: CudaSlice<f32>,
}

impl Filters {
    fn new(stream: &Arc<CudaStream>) -> Result<Self, Failure> {
        let mut random = Random::new(2);
        Ok(Self {
            x: uniform(stream, &mut random, COUNT, -1.0, 1.0)?,
            weight: uniform(stream, &mut random, CHANNELS * WIDTH, -1.0, 1.0)?,
            bias: uniform(stream, &mut random, CHANNELS, -1.0, 1.0)?,
        })
    }

    fn inputs(&self) -> conv::Inputs<'_, bf16, Cuda> {
        conv::Inputs {
            bias: Some(View::on_device(&self.bias, [CHANNELS])),
            options: conv::Options { silu: true, ..Default::default() },
            ..conv::Inputs::new(View::on_device(&self.x, ACTIVATION), View::on_device(&self.weight, [CHANNELS, WIDTH]))
        }
    }
}

fn conv_forward(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let filters = Filters::new(stream)?;
    let mut out = stream.alloc_zeros(COUNT)?;
    let to = conv::OutputMut { out: &mut out, final_state: None };
    Ok(conv::cuda::forward(stream, &filters.inputs(), to)?)
}

fn conv_backward(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let filters = Filters::new(stream)?;
    let mut x = stream.alloc_zeros(COUNT)?;
    let (mut weight, mut bias) = (stream.alloc_zeros(CHANNELS * WIDTH)?, stream.alloc_zeros(CHANNELS)?);
    let to = conv::GradientsMut { x: &mut x, weight: &mut weight, bias: Some(&mut bias), initial_state: None };
    let d_out = View::on_device(&filters.x, ACTIVATION);
    Ok(conv::cuda::backward(stream, &filters.inputs(), d_out.into(), to)?)
}

fn conv_update(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let filters = Filters::new(stream)?;
    let inputs = conv::UpdateInputs {
        bias: Some(View::on_device(&filters.bias, [CHANNELS])),
        silu: true,
        ..conv::UpdateInputs::new(
            View::on_device(&filters.x, [ROWS, 1, CHANNELS]),
            View::on_device(&filters.weight, [CHANNELS, WIDTH]),
        )
    };
    let mut pool = uniform::<bf16>(stream, &mut Random::new(3), ROWS * (WIDTH - 1) * CHANNELS, -1.0, 1.0)?;
    let mut out = stream.alloc_zeros(ROWS * CHANNELS)?;
    let state = ViewMut::on_device(&mut pool, [ROWS, WIDTH - 1, CHANNELS]);
    Ok(conv::cuda::update(stream, &inputs, conv::UpdateMut { state, out: &mut out, token_states: None })?)
}

fn optimizer_step(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let mut random = Random::new(4);
    let mut values = uniform::<bf16>(stream, &mut random, COUNT, -1.0, 1.0)?;
    let gradient = uniform::<bf16>(stream, &mut random, COUNT, -1.0, 1.0)?;
    let layout = optimizer::Layout::new([(DType::Bf16, COUNT)])?;
    let (mut mean, mut mean_square) = (stream.alloc_zeros(layout.moments)?, stream.alloc_zeros(layout.moments)?);
    let mut master = uniform(stream, &mut random, layout.masters, -1.0, 1.0)?;
    let (mut counts, mut scale) = (stream.alloc_zeros(3)?, stream.clone_htod(&[1f32])?);
    let (mut norm, options) = (stream.alloc_zeros(1)?, optimizer::Options::default());
    let gradient = optimizer::Gradient::Bf16(View::on_device(&gradient, [COUNT]));
    let status = optimizer::cuda::StatusMut { counts: &mut counts, scale: &mut scale };
    let factors = optimizer::cuda::begin(stream, &options, &[gradient], status, &mut norm)?;
    let values = optimizer::Values::Bf16(ViewMut::on_device(&mut values, [COUNT]));
    let group = optimizer::Group { learning_rate: 1.0, weight_decay: 0.1 };
    let parameter = optimizer::Parameter { values, gradient, place: layout.places[0], group };
    let moments = optimizer::Moments { mean: &mut mean, mean_square: &mut mean_square, master: &mut master };
    Ok(optimizer::cuda::update(stream, &options, 1e-3, &factors, [parameter], moments)?)
}

fn update_states(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let tensors = Tensors::new(stream)?;
    let (activation, projection) = ([ROWS, 1, CHANNELS], [ROWS, 1, 1, STATES]);
    let inputs = state_update::Inputs {
        z: Some(View::on_device(&tensors.z, activation)),
        d: Some(View::on_device(&tensors.d, [CHANNELS])),
        delta_bias: Some(View::on_device(&tensors.bias, [CHANNELS])),
        options: state_update::Options { delta_softplus: true, ..Default::default() },
        ..state_update::Inputs::new(
            View::on_device(&tensors.u, activation),
            View::on_device(&tensors.delta, activation),
            View::on_device(&tensors.a, [CHANNELS, STATES]),
            View::on_device(&tensors.b, projection),
            View::on_device(&tensors.c, projection),
        )
    };
    let mut pool = uniform::<f32>(stream, &mut Random::new(3), ROWS * CHANNELS * STATES, -1.0, 1.0)?;
    let mut out = stream.alloc_zeros(ROWS * CHANNELS)?;
    let state = ViewMut::on_device(&mut pool, [ROWS, CHANNELS, STATES]);
    let to = state_update::UpdateMut { state, out: &mut out, token_states: None };
    Ok(state_update::cuda::update(stream, &inputs, to)?)
}

/// With its gradient, of as many rows as there are steps and a vocabulary of as many tokens as there are channels.
fn cross_entropy(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let mut logits = uniform::<bf16>(stream, &mut Random::new(4), COUNT, -4.0, 4.0)?;
    let targets: Vec<u32> = (0..LENGTH as u32).map(|row| 37 * row % CHANNELS as u32).collect();
    let targets = stream.clone_htod(&targets)?;
    let mut losses = stream.alloc_zeros(LENGTH)?;
    let logits = ViewMut::on_device(&mut logits, [LENGTH, CHANNELS]);
    let inputs = loss::InputsMut::new(logits, &targets, 1.0 / LENGTH as f32);
    Ok(loss::cuda::losses_and_gradient(stream, inputs, &mut losses)?)
}

/// The rows that are normed and looked up.
const TOKENS: [usize; 2] = [BATCH * LENGTH, CHANNELS];

/// A half activation added to a stream of f32, and their sum normed.
fn norm_forward(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let mut random = Random::new(4);
    let x = uniform::<bf16>(stream, &mut random, COUNT, -1.0, 1.0)?;
    let residual = uniform::<f32>(stream, &mut random, COUNT, -1.0, 1.0)?;
    let weight = uniform::<f32>(stream, &mut random, CHANNELS, -1.0, 1.0)?;
    let (mut out, mut sum) = (stream.alloc_zeros::<bf16>(COUNT)?, stream.alloc_zeros::<f32>(COUNT)?);
    let inputs = norm::Inputs {
        residual: Some(View::on_device(&residual, TOKENS)),
        weight: Some(View::on_device(&weight, [CHANNELS])),
        ..norm::Inputs::new(View::on_device(&x, TOKENS))
    };
    let outputs = norm::OutputMut { out: &mut out, residual_out: Some(&mut sum) };
    Ok(norm::cuda::forward(stream, &inputs, outputs)?)
}

/// The gradient of the stream and of the weight.
fn norm_backward(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    let mut random = Random::new(5);
    let d_out = uniform::<bf16>(stream, &mut random, COUNT, -1.0, 1.0)?;
    let s = uniform::<f32>(stream, &mut random, COUNT, -1.0, 1.0)?;
    let d_sum = uniform::<f32>(stream, &mut random, COUNT, -1.0, 1.0)?;
    let weight = uniform::<f32>(stream, &mut random, CHANNELS, -1.0, 1.0)?;
    let (mut d_s, mut d_weight) = (stream.alloc_zeros::<f32>(COUNT)?, stream.alloc_zeros::<f32>(CHANNELS)?);
    let inputs = norm::BackwardInputs {
        weight: Some(View::on_device(&weight, [CHANNELS])),
        d_residual_out: Some(View::on_device(&d_sum, TOKENS)),
        ..norm::BackwardInputs::<bf16, f32, bf16, Cuda>::new(
            View::on_device(&s, TOKENS),
            View::on_device(&d_out, TOKENS),
        )
    };
    let (residual, weight) = (Some(&mut d_s), Some(&mut d_weight));
    Ok(norm::cuda::backward(stream, &inputs, norm::GradientsMut { x: None, residual, weight, z: None })?)
}

/// A vocabulary of four times as many tokens as there are, each as likely as another.
fn embedding_backward(stream: &Arc<CudaStream>) -> Result<(), Failure> {
    const VOCABULARY: usize = 4 * LENGTH;
    let mut random = Random::new(6);
    let d_out = uniform::<bf16>(stream, &mut random, COUNT, -1.0, 1.0)?;
    let ids: Vec<u32> = random
        .fill::<f32>(LENGTH, |source| source.random_range(0.0..VOCABULARY as f32))
        .into_iter()
        .map(|id| id as u32)
        .collect();
    let ids = stream.clone_htod(&ids)?;
    let mut d_table = stream.alloc_zeros::<f32>(VOCABULARY * CHANNELS)?;
    Ok(embedding::cuda::backward(stream, &ids, &View::on_device(&d_out, TOKENS), VOCABULARY, &mut d_table)?)
}

/// Of a few rows and a vocabulary of as many tokens as there are elements elsewhere.
fn choose_tokens(stream: &Arc<CudaStream>, settings: Settings) -> Result<(), Failure> {
    const FEW: usize = 16;
    let logits = uniform::<f32>(stream, &mut Random::new(7), COUNT, -12.0, 12.0)?;
    let (mut settings, mut tokens) = (stream.clone_htod(&[settings; FEW])?, stream.alloc_zeros(FEW)?);
    let mut workspace = sampling::cuda::Workspace::new(stream, FEW, COUNT / FEW)?;
    let inputs = sampling::Inputs::new(View::on_device(&logits, [FEW, COUNT / FEW]));
    let state = sampling::cuda::StateMut::new(&mut settings, &mut tokens);
    Ok(sampling::cuda::sample(stream, &inputs, state, &mut workspace)?)
}
