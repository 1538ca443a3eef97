//! Times the operators on a GPU at model shapes and prints a line of comma-separated values for each.
//!
//! Times are medians of CUDA events, after a warm-up, over sets of inputs that together are larger than the second-level
//! cache. `cargo bench --features cuda --bench cuda -- [--filter TEXT] [--repeats N]`.

#[path = "cuda/memory.rs"]
mod memory;

use std::sync::Arc;

use clap::Parser;
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaSlice, CudaStream};
use half::{bf16, f16};
use selective_scan::cuda::{self, Cuda};
use selective_scan::scan::cuda::{PerLane, Plan};
use selective_scan::scan::{self, GradientsMut, Inputs, Options, OutputMut, ProjectionMut};
use selective_scan::{Element, View};

#[derive(Parser)]
struct Arguments {
    /// Only lines that contain this.
    #[arg(long, default_value = "")]
    filter: String,
    /// Timed runs of each.
    #[arg(long, default_value_t = 20)]
    repeats: usize,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Bytes that a rotation of inputs exceeds; no GPU has a larger cache yet.
const BEYOND_CACHE: usize = 256 << 20;

/// The median time of `run`, in milliseconds. `run` is told which set of inputs to use.
fn time(stream: &Arc<CudaStream>, repeats: usize, mut run: impl FnMut(usize)) -> f32 {
    (0..3).for_each(&mut run);
    let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).expect("an event");
    let mut times: Vec<f32> = (0..repeats)
        .map(|i| {
            let (start, end) = (event(), event());
            start.record(stream).expect("recorded");
            run(i);
            end.record(stream).expect("recorded");
            start.elapsed_ms(&end).expect("both have passed")
        })
        .collect();
    times.sort_by(f32::total_cmp);
    times[times.len() / 2]
}

/// Pseudorandom values between `low` and `high`.
fn uniform<T: Element>(stream: &Arc<CudaStream>, len: usize, low: f32, high: f32, seed: u64) -> CudaSlice<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let period = len.min(1 << 22);
    let mut values: Vec<T> = (0..period)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            T::from_f32(low + (high - low) * ((state >> 40) as f32 / (1 << 24) as f32))
        })
        .collect();
    values.resize(len, T::from_f32(0.0));
    for i in period..len {
        values[i] = values[i - period];
    }
    stream.clone_htod(&values).expect("the device has room")
}

#[derive(Clone, Copy)]
struct Shape {
    batch: usize,
    len: usize,
    d_inner: usize,
    d_state: usize,
}

struct Set<T> {
    u: CudaSlice<T>,
    delta: CudaSlice<T>,
    z: CudaSlice<T>,
    b: CudaSlice<T>,
    c: CudaSlice<T>,
}

fn scan<T: Element>(stream: &Arc<CudaStream>, arguments: &Arguments, shape: Shape, plan: Plan, name: &str) {
    let Shape { batch, len, d_inner, d_state } = shape;
    let what = format!("{:?},{batch},{len},{d_inner},{d_state},{name}", T::DTYPE);
    let matches = |direction| format!("scan,{direction},{what}").contains(&arguments.filter);
    if !matches("forward") && !matches("backward") {
        return;
    }
    let count = batch * len * d_inner;
    let sets = BEYOND_CACHE.div_ceil(count * size_of::<T>() * 3).clamp(2, 16);
    let sets: Vec<_> = (0..sets as u64)
        .map(|i| Set::<T> {
            u: uniform(stream, count, -1.0, 1.0, 5 * i),
            delta: uniform(stream, count, -5.0, -1.0, 5 * i + 1),
            z: uniform(stream, count, -2.0, 2.0, 5 * i + 2),
            b: uniform(stream, batch * len * d_state, -1.0, 1.0, 5 * i + 3),
            c: uniform(stream, batch * len * d_state, -1.0, 1.0, 5 * i + 4),
        })
        .collect();
    let a: Vec<f32> = (0..d_inner * d_state).map(|i| -((i % d_state + 1) as f32)).collect();
    let a = stream.clone_htod(&a).expect("the device has room");
    let d = uniform::<f32>(stream, d_inner, 0.5, 1.0, 1);
    let bias = uniform::<f32>(stream, d_inner, -0.5, 0.5, 2);
    let mut out = zeros::<T>(stream, count);
    let inputs: Vec<Inputs<T, Cuda>> = sets
        .iter()
        .map(|set| Inputs {
            z: Some(View::on_device(&set.z, [batch, len, d_inner])),
            d: Some(View::on_device(&d, [d_inner])),
            delta_bias: Some(View::on_device(&bias, [d_inner])),
            options: Options { delta_softplus: true, ..Default::default() },
            ..Inputs::new(
                View::on_device(&set.u, [batch, len, d_inner]),
                View::on_device(&set.delta, [batch, len, d_inner]),
                View::on_device(&a, [d_inner, d_state]),
                View::on_device(&set.b, [batch, len, 1, d_state]),
                View::on_device(&set.c, [batch, len, 1, d_state]),
            )
        })
        .collect();
    let report = |direction: &str, ms: f32| {
        let rate = (count * d_state) as f64 / f64::from(ms) * 1e-9;
        println!("scan,{direction},{what},{ms:.4},{rate:.3}");
    };
    if matches("forward") {
        let ms = time(stream, arguments.repeats, |i| {
            let to = OutputMut { out: &mut out, final_state: None, checkpoints: None };
            scan::cuda::forward_with(plan, stream, &inputs[i % inputs.len()], to).expect("it runs");
        });
        report("forward", ms);
    }
    if !matches("backward") {
        return;
    }
    let mut checkpoints = zeros::<f32>(stream, inputs[0].checkpoint_len().expect("the inputs are valid"));
    let to = OutputMut { out: &mut out, final_state: None, checkpoints: Some(&mut checkpoints) };
    scan::cuda::forward_with(plan, stream, &inputs[0], to).expect("it runs");
    let mut activations = [(); 3].map(|()| zeros::<T>(stream, count));
    let mut projections = [(); 2].map(|()| zeros::<T>(stream, batch * len * d_state));
    let mut d_a = zeros::<f32>(stream, d_inner * d_state);
    let mut channels = [(); 2].map(|()| zeros::<f32>(stream, d_inner));
    let ms = time(stream, arguments.repeats, |i| {
        let [u, delta, z] = &mut activations;
        let [b, c] = &mut projections;
        let [d, delta_bias] = &mut channels;
        let gradients = GradientsMut {
            u,
            delta,
            a: &mut d_a,
            b: ProjectionMut::Varying(b),
            c: ProjectionMut::Varying(c),
            z: Some(z),
            d: Some(d),
            delta_bias: Some(delta_bias),
            initial_state: None,
        };
        let d_out = View::on_device(&sets[(i + 1) % sets.len()].u, [batch, len, d_inner]);
        scan::cuda::backward_with(plan, stream, &inputs[i % inputs.len()], &checkpoints, d_out.into(), gradients)
            .expect("it runs");
    });
    report("backward", ms);
}

fn zeros<T: Element>(stream: &Arc<CudaStream>, len: usize) -> CudaSlice<T> {
    match len {
        0 => stream.null().expect("nothing"),
        _ => stream.alloc_zeros(len).expect("the device has room"),
    }
}

fn main() {
    let arguments = Arguments::parse();
    let stream = cuda::context(0).expect("a GPU").new_stream().expect("a stream");
    // One stream does all: there is nothing to track.
    // SAFETY: every buffer is used on this stream alone.
    unsafe { stream.context().disable_event_tracking() };
    println!("op,direction,dtype,batch,len,d_inner,d_state,plan,milliseconds,T state steps per second");
    let plans = [
        ("auto", Plan::default()),
        ("one", Plan { per_lane: Some(PerLane::One), ..Plan::default() }),
        ("two", Plan { per_lane: Some(PerLane::Two), ..Plan::default() }),
        ("four", Plan { per_lane: Some(PerLane::Four), ..Plan::default() }),
    ];
    for (batch, d_inner, len) in [
        (8, 2048, 2048),
        (64, 1536, 512),
        (8, 2048, 2000),
        (2048, 1536, 16),
        (1, 2048, 65_536),
        (1, 1024, 2048),
        (1, 1024, 524_288),
    ] {
        for (name, plan) in plans {
            let shape = Shape { batch, len, d_inner, d_state: 16 };
            scan::<bf16>(&stream, &arguments, shape, plan, name);
        }
    }
    let shape = Shape { batch: 8, len: 2048, d_inner: 2048, d_state: 16 };
    scan::<f32>(&stream, &arguments, shape, Plan::default(), "auto");
    scan::<f16>(&stream, &arguments, shape, Plan::default(), "auto");
    memory::run(&stream, &arguments);
}
