//! The operators that memory bounds, beside a copy within the device. Rates count the bytes that must be read and written
//! at least, each once.

use std::sync::Arc;

use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaSlice, CudaStream};
use half::bf16;
use selective_scan::conv::{self, GradientsMut, OutputMut};
use selective_scan::state_update::{self, UpdateMut};
use selective_scan::{Element, View, ViewMut};

use crate::{Arguments, BEYOND_CACHE, uniform};

pub fn run(stream: &Arc<CudaStream>, arguments: &Arguments) {
    println!("op,direction,dtype,batch,len,d_inner,d_state or width,milliseconds,GB/s,part of copy");
    let bench = Bench { stream, arguments, copy: copy(stream, arguments) };
    for [batch, len, d_inner, width] in
        [[8, 2048, 2048, 4], [64, 512, 1536, 4], [1, 65_536, 2048, 4], [1, 2048, 1024, 4], [8, 2000, 2050, 4]]
    {
        bench.conv::<bf16>([batch, len, d_inner], width);
    }
    bench.conv::<bf16>([8, 2048, 2048], 3);
    bench.conv::<bf16>([8, 2048, 2048], 8);
    bench.conv::<f32>([8, 2048, 2048], 4);
    for batch in [1, 8, 64, 256, 512] {
        for d_inner in [1536, 5120] {
            bench.state_update::<bf16, f32>(batch, d_inner, 16, false);
        }
    }
    bench.state_update::<bf16, f32>(256, 5120, 16, true);
    bench.state_update::<bf16, bf16>(256, 5120, 16, false);
    bench.state_update::<f32, f32>(256, 5120, 16, false);
    bench.state_update::<bf16, f32>(64, 2048, 128, false);
    for batch in [1, 64, 512] {
        bench.conv_update::<bf16, bf16>(batch, 5120, 4);
    }
    bench.conv_update::<bf16, f32>(512, 5120, 4);
}

struct Bench<'a> {
    stream: &'a Arc<CudaStream>,
    arguments: &'a Arguments,
    /// Bytes a second.
    copy: f64,
}

/// Bytes a second, both ways, of copies within the device.
fn copy(stream: &Arc<CudaStream>, arguments: &Arguments) -> f64 {
    let bytes = 512 << 20;
    let from = stream.alloc_zeros::<u8>(bytes).expect("the device has room");
    let mut to = stream.alloc_zeros::<u8>(bytes).expect("the device has room");
    let ms = time(stream, arguments.repeats, 2, |_| stream.memcpy_dtod(&from, &mut to).expect("it is copied"));
    let rate = 2.0 * bytes as f64 / ms * 1e3;
    println!("copy,,,,,,,{ms:.4},{:.0},1", rate * 1e-9);
    rate
}

/// The median time of a call of `run`, in milliseconds. `run` is told which set of inputs to use; all sets are run between
/// two events, as one graph where the driver captures graphs, so that the time is the device's.
fn time(stream: &Arc<CudaStream>, repeats: usize, sets: usize, mut run: impl FnMut(usize)) -> f64 {
    (0..sets).for_each(&mut run);
    stream.synchronize().expect("the kernels ran");
    let graph = stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).ok().and_then(|()| {
        (0..sets).for_each(&mut run);
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        stream.end_capture(flags).ok().flatten()
    });
    if graph.is_none() {
        eprintln!("(no graphs: times include launches)");
    }
    let mut once = || match &graph {
        Some(graph) => graph.launch().expect("the graph runs"),
        None => (0..sets).for_each(&mut run),
    };
    once();
    let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).expect("an event");
    let mut times: Vec<f32> = (0..repeats)
        .map(|_| {
            let (start, end) = (event(), event());
            start.record(stream).expect("recorded");
            once();
            end.record(stream).expect("recorded");
            start.elapsed_ms(&end).expect("both have passed")
        })
        .collect();
    times.sort_by(f32::total_cmp);
    f64::from(times[times.len() / 2]) / sets as f64
}

impl Bench<'_> {
    /// `bytes` is what one call moves.
    fn measure(&self, what: &str, bytes: usize, sets: usize, run: impl FnMut(usize)) {
        let ms = time(self.stream, self.arguments.repeats, sets, run);
        let rate = bytes as f64 / ms * 1e3;
        println!("{what},{ms:.4},{:.0},{:.2}", rate * 1e-9, rate / self.copy);
    }

    fn is_wanted(&self, what: &str) -> bool {
        what.contains(&self.arguments.filter)
    }

    fn random<T: Element>(&self, sets: usize, len: usize, seed: u64) -> Vec<CudaSlice<T>> {
        (0..sets as u64).map(|i| uniform(self.stream, len, -1.0, 1.0, 16 * i + seed)).collect()
    }

    fn conv<T: Element>(&self, shape: [usize; 3], width: usize) {
        let [batch, len, d_inner] = shape;
        let name =
            |direction: &str| format!("conv,{direction},{:?},{batch},{len},{d_inner},{width}", T::DTYPE).to_string();
        let (forward, backward) = (name("forward"), name("backward"));
        if !self.is_wanted(&forward) && !self.is_wanted(&backward) {
            return;
        }
        let count = batch * len * d_inner;
        let (bytes, sets) = (count * size_of::<T>(), sets(count * size_of::<T>()));
        let (xs, d_outs) = (self.random::<T>(sets, count, 0), self.random::<T>(sets, count, 1));
        let weight = uniform::<f32>(self.stream, d_inner * width, -0.5, 0.5, 2);
        let bias = uniform::<f32>(self.stream, d_inner, -0.5, 0.5, 3);
        let mut out = self.stream.alloc_zeros::<T>(count).expect("the device has room");
        let mut d_weight = self.stream.alloc_zeros::<f32>(d_inner * width).expect("the device has room");
        let mut d_bias = self.stream.alloc_zeros::<f32>(d_inner).expect("the device has room");
        let inputs = |i: usize| conv::Inputs {
            bias: Some(View::on_device(&bias, [d_inner])),
            options: conv::Options { silu: true, reverse: false },
            ..conv::Inputs::new(View::on_device(&xs[i], shape), View::on_device(&weight, [d_inner, width]))
        };
        if self.is_wanted(&forward) {
            self.measure(&forward, 2 * bytes, sets, |i| {
                let to = OutputMut { out: &mut out, final_state: None };
                conv::cuda::forward(self.stream, &inputs(i), to).expect("it runs");
            });
        }
        if self.is_wanted(&backward) {
            self.measure(&backward, 3 * bytes, sets, |i| {
                let (weight, bias) = (&mut d_weight, Some(&mut d_bias));
                let to = GradientsMut { x: &mut out, weight, bias, initial_state: None };
                let d_out = View::on_device(&d_outs[i], shape);
                conv::cuda::backward(self.stream, &inputs(i), d_out.into(), to).expect("it runs");
            });
        }
    }

    fn state_update<T: Element, St: Element>(&self, batch: usize, d_inner: usize, d_state: usize, with_slots: bool) {
        let slots_name = if with_slots { " slots" } else { "" };
        let what =
            format!("state_update,states {:?}{slots_name},{:?},{batch},1,{d_inner},{d_state}", St::DTYPE, T::DTYPE);
        if !self.is_wanted(&what) {
            return;
        }
        let (count, states) = (batch * d_inner, batch * d_inner * d_state);
        let bytes = 2 * states * size_of::<St>()
            + (4 * count + 2 * batch * d_state) * size_of::<T>()
            + d_inner * (d_state + 2) * size_of::<f32>();
        let sets = sets(bytes);
        let activations = |seed| self.random::<T>(sets, count, seed);
        let (us, dts, zs) = (activations(0), activations(1), activations(2));
        let (bs, cs) = (self.random::<T>(sets, batch * d_state, 3), self.random::<T>(sets, batch * d_state, 4));
        let mut pools = self.random::<St>(sets, states, 5);
        let a = uniform::<f32>(self.stream, d_inner * d_state, -16.0, -1.0, 6);
        let parameters = uniform::<f32>(self.stream, d_inner, -1.0, 1.0, 7);
        let mut out = self.stream.alloc_zeros::<T>(count).expect("the device has room");
        let slots: Vec<i32> = (0..batch as i32).rev().collect();
        self.measure(&what, bytes, sets, |i| {
            let activation = |data| View::on_device(data, [batch, 1, d_inner]);
            let projection = |data| View::on_device(data, [batch, 1, 1, d_state]);
            let inputs = state_update::Inputs {
                z: Some(activation(&zs[i])),
                d: Some(View::on_device(&parameters, [d_inner])),
                dt_bias: Some(View::on_device(&parameters, [d_inner])),
                slots: with_slots.then_some(&slots),
                options: state_update::Options { dt_softplus: true, ..Default::default() },
                ..state_update::Inputs::new(
                    activation(&us[i]),
                    activation(&dts[i]),
                    View::on_device(&a, [d_inner, d_state]),
                    projection(&bs[i]),
                    projection(&cs[i]),
                )
            };
            let state = ViewMut::on_device(&mut pools[i], [batch, d_inner, d_state]);
            let to = UpdateMut { state, out: &mut out, token_states: None };
            state_update::cuda::update(self.stream, &inputs, to).expect("it runs");
        });
    }

    fn conv_update<T: Element, St: Element>(&self, batch: usize, d_inner: usize, width: usize) {
        let what = format!("conv_update,states {:?},{:?},{batch},1,{d_inner},{width}", St::DTYPE, T::DTYPE);
        if !self.is_wanted(&what) {
            return;
        }
        let (count, states) = (batch * d_inner, batch * d_inner * (width - 1));
        let bytes =
            2 * states * size_of::<St>() + 2 * count * size_of::<T>() + d_inner * (width + 1) * size_of::<f32>();
        let sets = sets(bytes);
        let (xs, mut pools) = (self.random::<T>(sets, count, 0), self.random::<St>(sets, states, 1));
        let weight = uniform::<f32>(self.stream, d_inner * width, -0.5, 0.5, 2);
        let bias = uniform::<f32>(self.stream, d_inner, -0.5, 0.5, 3);
        let mut out = self.stream.alloc_zeros::<T>(count).expect("the device has room");
        self.measure(&what, bytes, sets, |i| {
            let inputs = conv::UpdateInputs {
                bias: Some(View::on_device(&bias, [d_inner])),
                silu: true,
                ..conv::UpdateInputs::new(
                    View::on_device(&xs[i], [batch, 1, d_inner]),
                    View::on_device(&weight, [d_inner, width]),
                )
            };
            let state = ViewMut::on_device(&mut pools[i], [batch, width - 1, d_inner]);
            let to = conv::UpdateMut { state, out: &mut out, token_states: None };
            conv::cuda::update(self.stream, &inputs, to).expect("it runs");
        });
    }
}

/// As many sets of `bytes` as exceed the cache; of small ones not all too many, so that these stay in it.
fn sets(bytes: usize) -> usize {
    BEYOND_CACHE.div_ceil(bytes).clamp(2, 32)
}
