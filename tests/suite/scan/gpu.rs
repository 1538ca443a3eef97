//! The scan on a GPU, or on a simulated one.

use cudarc::driver::{CudaContext, CudaSlice};
use half::{bf16, f16};
use selective_scan::cuda::Cuda;
use selective_scan::scan::cuda::{PerLane, Plan};
use selective_scan::scan::{
    self, Gradients, GradientsMut, Inputs, OutputGradients, OutputMut, ProjectionGradient, ProjectionMut,
};
use selective_scan::{Element, ProjectionOf, View};

use super::case::{Case, Flags, Shape};
use super::properties;
use crate::extremes;
use crate::support::device::Device;
use crate::support::draw::seeded;
use crate::support::gpu::{Copies, is_simulated, stream, work_on};

fn on_device<'c, T: Element>(copies: &'c Copies, inputs: &Inputs<'c, T>) -> Inputs<'c, T, Cuda> {
    Inputs {
        u: copies.view(&inputs.u),
        delta: copies.view(&inputs.delta),
        a: copies.view(&inputs.a),
        b: copies.projection(&inputs.b),
        c: copies.projection(&inputs.c),
        z: inputs.z.as_ref().map(|view| copies.view(view)),
        d: inputs.d.as_ref().map(|view| copies.view(view)),
        delta_bias: inputs.delta_bias.as_ref().map(|view| copies.view(view)),
        initial_state: inputs.initial_state.as_ref().map(|view| copies.view(view)),
        cu_seqlens: inputs.cu_seqlens,
        options: inputs.options,
    }
}

/// Forward with checkpoints, then backward, on the device.
pub fn both_passes<T: Element>(
    plan: Plan,
    inputs: &Inputs<T>,
    to: OutputMut<T>,
    d_outputs: OutputGradients<T>,
    gradients: &mut Gradients<T>,
) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let on_device = on_device(&copies, inputs);
    let out = copies.poisoned(to.out.len());
    let mut final_state = to.final_state.as_ref().map(|state| copies.poisoned(state.len()));
    let mut checkpoints = to.checkpoints.as_ref().map(|states| copies.poisoned(states.len()));
    let outputs =
        OutputMut { out: &mut *out, final_state: final_state.as_deref_mut(), checkpoints: checkpoints.as_deref_mut() };
    scan::cuda::forward_with(plan, &stream, &on_device, outputs).expect("the case is valid");
    copies.download(out, to.out);
    if let (Some(from), Some(to)) = (final_state, to.final_state) {
        copies.download(from, to);
    }
    let Some(checkpoints) = checkpoints else { return };

    let d_outputs = OutputGradients {
        d_out: copies.view(&d_outputs.d_out),
        d_final_state: d_outputs.d_final_state.as_ref().map(|view| copies.view(view)),
    };
    let mut on_device_gradients = OnDevice::like(&copies, gradients);
    scan::cuda::backward_with(plan, &stream, &on_device, checkpoints, d_outputs, on_device_gradients.as_mut())
        .expect("the case is valid");
    on_device_gradients.download(&copies, gradients);
}

/// Gradients on the device.
struct OnDevice<'c, T: Element> {
    u: &'c mut CudaSlice<T>,
    delta: &'c mut CudaSlice<T>,
    a: &'c mut CudaSlice<f32>,
    b: ProjectionMut<'c, T, Cuda>,
    c: ProjectionMut<'c, T, Cuda>,
    z: Option<&'c mut CudaSlice<T>>,
    d: Option<&'c mut CudaSlice<f32>>,
    delta_bias: Option<&'c mut CudaSlice<f32>>,
    initial_state: Option<&'c mut CudaSlice<f32>>,
}

impl<'c, T: Element> OnDevice<'c, T> {
    fn like(copies: &'c Copies, gradients: &Gradients<T>) -> Self {
        let projection = |gradient: &ProjectionGradient<T>| match gradient {
            ProjectionGradient::Varying(data) => ProjectionOf::Varying(copies.poisoned(data.len())),
            ProjectionGradient::Constant(data) => ProjectionOf::Constant(copies.poisoned(data.len())),
        };
        let parameter = |data: &Option<Vec<f32>>| data.as_ref().map(|data| copies.poisoned(data.len()));
        Self {
            u: copies.poisoned(gradients.u.len()),
            delta: copies.poisoned(gradients.delta.len()),
            a: copies.poisoned(gradients.a.len()),
            b: projection(&gradients.b),
            c: projection(&gradients.c),
            z: gradients.z.as_ref().map(|data| copies.poisoned(data.len())),
            d: parameter(&gradients.d),
            delta_bias: parameter(&gradients.delta_bias),
            initial_state: parameter(&gradients.initial_state),
        }
    }

    fn as_mut(&mut self) -> GradientsMut<'_, T, Cuda> {
        fn projection<'p, T: Element>(gradient: &'p mut ProjectionMut<'_, T, Cuda>) -> ProjectionMut<'p, T, Cuda> {
            match gradient {
                ProjectionOf::Varying(data) => ProjectionOf::Varying(&mut **data),
                ProjectionOf::Constant(data) => ProjectionOf::Constant(&mut **data),
            }
        }
        GradientsMut {
            u: self.u,
            delta: self.delta,
            a: self.a,
            b: projection(&mut self.b),
            c: projection(&mut self.c),
            z: self.z.as_deref_mut(),
            d: self.d.as_deref_mut(),
            delta_bias: self.delta_bias.as_deref_mut(),
            initial_state: self.initial_state.as_deref_mut(),
        }
    }

    fn download(&self, copies: &Copies, to: &mut Gradients<T>) {
        copies.download(self.u, &mut to.u);
        copies.download(self.delta, &mut to.delta);
        copies.download(self.a, &mut to.a);
        for (from, to) in [(&self.b, &mut to.b), (&self.c, &mut to.c)] {
            match (from, to) {
                (ProjectionOf::Varying(from), ProjectionGradient::Varying(to)) => copies.download(from, to),
                (ProjectionOf::Constant(from), ProjectionGradient::Constant(to)) => copies.download(from, to),
                _ => unreachable!("the device's gradients were made like the host's"),
            }
        }
        if let (Some(from), Some(to)) = (&self.z, &mut to.z) {
            copies.download(from, to);
        }
        let parameters = [
            (&self.d, &mut to.d),
            (&self.delta_bias, &mut to.delta_bias),
            (&self.initial_state, &mut to.initial_state),
        ];
        for (from, to) in parameters {
            if let (Some(from), Some(to)) = (from, to) {
                copies.download(from, to);
            }
        }
    }
}

fn check<T: Element>(plan: Plan, shape: Shape, flags: Flags) {
    let (mut rng, seed) = seeded();
    let case = Case::<T>::new(&mut rng, shape, flags);
    let what = || format!("SEED={seed} {:?} {plan:?} {shape:?} {flags:?}", T::DTYPE);
    case.check(Device::Cuda(plan), &what);
}

const WHOLE: Plan = Plan { segment_steps: Some(usize::MAX), per_lane: None, narrow: None };
const NARROW: Plan = Plan { narrow: Some(true), ..WHOLE };
const SPLIT: Plan = Plan { segment_steps: Some(64), per_lane: None, narrow: None };
const QUARTER: Plan = Plan { segment_steps: None, per_lane: Some(PerLane::Quarter), narrow: None };
const HALF: Plan = Plan { segment_steps: None, per_lane: Some(PerLane::Half), narrow: None };

/// What the fast kernels take, with the other flags as they are.
fn fast(flags: Flags) -> Flags {
    let (hold, constant_b, constant_c, time_contiguous, column_slice) = (false, false, false, false, false);
    Flags { hold, constant_b, constant_c, time_contiguous, column_slice, ..flags }
}

/// Every pair of flags in all combinations, whole and split, through the general kernels and the fast ones, and with lanes
/// that carry parts of a channel.
fn all_flags<T: Element>() {
    if stream().is_none() {
        return;
    }
    for plan in [WHOLE, SPLIT] {
        for row in 0..16 {
            for (len, d_state, d_inner) in [(70, 16, 42), (131, 5, 36), (20, 40, 10)] {
                check::<T>(plan, Shape { batch: 2, len, d_inner, d_state }, Flags::pairwise(row));
            }
            check::<T>(plan, Shape { batch: 2, len: 150, d_inner: 72, d_state: 16 }, fast(Flags::pairwise(row)));
            check::<T>(plan, Shape { batch: 1, len: 71, d_inner: 68, d_state: 36 }, fast(Flags::pairwise(row)));
        }
    }
    for plan in [QUARTER, HALF, NARROW] {
        for row in 0..16 {
            for (len, d_state, d_inner) in [(150, 16, 72), (131, 12, 44), (64, 4, 20)] {
                check::<T>(plan, Shape { batch: 2, len, d_inner, d_state }, fast(Flags::pairwise(row)));
            }
        }
    }
}

#[test]
fn all_flags_f32() {
    all_flags::<f32>();
}

#[test]
fn all_flags_f16() {
    all_flags::<f16>();
}

#[test]
fn all_flags_bf16() {
    all_flags::<bf16>();
}

/// The lengths and numbers of states of the CPU path's grid; a simulated device gets the small ones.
#[test]
fn grid() {
    let Some(stream) = stream() else { return };
    let lengths = [1, 2, 3, 8, 17, 64, 129, 372, 784, 1134, 2048, 4096];
    for (i, len) in lengths.into_iter().enumerate() {
        for (j, d_state) in [1, 4, 8, 16, 64, 256].into_iter().enumerate() {
            let (case, d_inner) = (6 * i + j, [20, 33, 6, 132][(6 * i + j) % 4]);
            let work = len * d_state * d_inner;
            if is_simulated(&stream) && work > 60_000 {
                continue;
            }
            let (shape, flags) = (Shape { batch: 2, len, d_inner, d_state }, Flags::pairwise(case % 16));
            let flags = if case % 3 == 0 { fast(flags) } else { flags };
            let plan = Plan::default();
            match case % 5 {
                0 | 1 => check::<f32>(plan, shape, flags),
                2 => check::<f16>(plan, shape, flags),
                _ => check::<bf16>(plan, shape, flags),
            }
        }
    }
}

/// Widths of models, and one beside each.
#[test]
fn model_widths() {
    if stream().is_none() {
        return;
    }
    for d_inner in [1536, 1537, 2044] {
        check::<bf16>(Plan::default(), Shape { batch: 1, len: 18, d_inner, d_state: 16 }, Flags::mamba());
    }
}

/// Through the fast kernels and the general one, whole, split and with lanes that carry parts of a channel.
#[test]
fn extremes() {
    let Some(stream) = stream() else { return };
    for plan in [WHOLE, SPLIT, QUARTER, HALF] {
        let device = Device::Cuda(plan);
        for d_inner in [36, 37] {
            extremes::what_is_forgotten_takes_its_rounding_along(device, 5, d_inner);
            extremes::large_states_before_a_segment(device, d_inner);
            extremes::states_that_grow_and_are_erased(device, d_inner);
            extremes::an_infinite_rate(device, d_inner);
        }
        for hold in [false, true] {
            extremes::a_decay_near_zero_keeps_its_digits::<f32>(device, hold);
            extremes::a_decay_near_zero_keeps_its_digits::<f16>(device, hold);
            extremes::a_decay_near_zero_keeps_its_digits::<bf16>(device, hold);
        }
    }
    // A long one is compensated, which a sequence that is not split needs.
    extremes::what_is_forgotten_takes_its_rounding_along(Device::Cuda(WHOLE), 16_448, 4);
    let lens = if is_simulated(&stream) { [16_448, 16_448] } else { [1 << 16, 1 << 22] };
    for (len, steps) in [(lens[0], 64), (lens[1], 1024)] {
        let plan = Plan { segment_steps: Some(steps), per_lane: None, narrow: None };
        extremes::equal_steps(Device::Cuda(plan), len, 4, steps);
    }
}

/// Nothing forgotten over 65,536 steps, where every rounding of a decay and of a state adds up; few channels, so that the
/// sequence is split, and whole.
#[test]
fn long_memory() {
    let Some(stream) = stream() else { return };
    let len = if is_simulated(&stream) { 4096 } else { 65_536 };
    for (plan, scale) in [(Plan::default(), 1.0), (Plan::default(), 1e-5), (WHOLE, 1e-5)] {
        let (mut rng, seed) = seeded();
        let mut case = Case::<f32>::new(&mut rng, Shape { batch: 1, len, d_inner: 20, d_state: 4 }, Flags::mamba());
        case.a.iter_mut().for_each(|a| *a *= scale);
        case.check(Device::Cuda(plan), &|| format!("SEED={seed} {plan:?} {scale}"));
    }
}

#[test]
fn nan_and_infinity() {
    if stream().is_none() {
        return;
    }
    for plan in [WHOLE, NARROW, SPLIT, QUARTER, HALF] {
        properties::nan_spreads(Device::Cuda(plan), 21, 3);
        // The fast kernels, whose tensor cores multiply everything by something.
        properties::nan_spreads(Device::Cuda(plan), 24, 4);
        properties::nan_spreads(Device::Cuda(plan), 24, 20);
    }
}

#[test]
fn nothing_to_do() {
    if stream().is_some() {
        properties::empty_problems(Device::Cuda(Plan::default()));
    }
}

/// Packed and alone, the same bits, whatever is chosen; and in a batch as well, if sequences are divided the same way.
#[test]
fn a_sequence_does_not_see_its_neighbours() {
    if stream().is_none() {
        return;
    }
    let default = Device::Cuda(Plan::default());
    properties::neighbours(default, &[(70, 36, 6)], |flags| Flags { packed: true, ..flags });
    // In 1,000 steps there are mostly some sequences that are long enough to be split, and some that lanes carry in parts.
    properties::neighbours(default, &[(70, 36, 8), (1000, 8, 4)], |flags| Flags { packed: true, ..fast(flags) });
    for plan in [SPLIT, QUARTER, HALF] {
        properties::neighbours(Device::Cuda(plan), &[(75, 36, 8)], fast);
    }
    properties::neighbours(Device::Cuda(SPLIT), &[(75, 34, 6)], |flags| flags);
}

/// The general kernels and the fast ones of whole channels agree to the last bit, but for sums over channels and over time,
/// which they form in different orders; those are held to the reference only.
#[test]
fn layouts_do_not_matter() {
    if stream().is_none() {
        return;
    }
    let sums = ["d_b", "d_c", "d_d", "d_delta_bias"];
    properties::layouts::<bf16>(Device::Cuda(WHOLE), 7, &[]);
    properties::layouts::<bf16>(Device::Cuda(SPLIT), 8, &sums);
    properties::layouts::<f32>(Device::Cuda(WHOLE), 8, &sums);
    properties::layouts::<bf16>(Device::Cuda(SPLIT), 36, &sums);
}

#[test]
fn parts_equal_the_whole() {
    if stream().is_some() {
        properties::parts_equal_whole(Device::Cuda(Plan::default()), 4..7);
    }
}

/// Rows of A that are further apart than their states, start anywhere, or are columns: the fast kernels read whole ones in
/// one piece.
#[test]
fn parameters_lie_anywhere() {
    if stream().is_none() {
        return;
    }
    let (mut rng, seed) = seeded();
    let shape = Shape { batch: 2, len: 70, d_inner: 20, d_state: 8 };
    let Shape { batch, len, d_inner, d_state } = shape;
    let case = Case::<bf16>::new(&mut rng, shape, Flags::mamba());
    let run = |a: View<f32, 2>| {
        let inputs = Inputs { a, ..case.inputs() };
        let mut out = vec![bf16::NAN; batch * len * d_inner];
        let mut checkpoints = vec![f32::NAN; inputs.checkpoint_len().expect("valid")];
        let mut gradients = Gradients::zeroed(&inputs).expect("valid");
        let to = OutputMut { out: &mut out[..], final_state: None, checkpoints: Some(&mut checkpoints[..]) };
        both_passes(SPLIT, &inputs, to, case.d_outputs(), &mut gradients);
        (out, gradients.a, gradients.delta)
    };
    let plain = run(View::new(&case.a, [d_inner, d_state]));
    for (offset, strides) in [(0, [d_state + 1, 1]), (1, [d_state, 1]), (4, [d_state + 4, 1]), (0, [1, d_inner])] {
        let mut lain = vec![f32::NAN; offset + d_inner * (d_state + 4)];
        for (i, &x) in case.a.iter().enumerate() {
            lain[offset + i / d_state * strides[0] + i % d_state * strides[1]] = x;
        }
        let other = run(View::new(&lain, [d_inner, d_state]).with_layout(offset, strides));
        assert!(other == plain, "SEED={seed} from {offset} on, {strides:?} apart");
    }
}

/// However many channels a lane has, and in every run, the same bits.
#[test]
fn bits_do_not_depend_on_the_kernel() {
    if stream().is_none() {
        return;
    }
    let (mut rng, seed) = seeded();
    let shape = Shape { batch: 2, len: 150, d_inner: 136, d_state: 16 };
    let case = Case::<bf16>::new(&mut rng, shape, Flags { initial_state: true, ..Flags::mamba() });
    for segment_steps in [usize::MAX, 64] {
        let results = [PerLane::One, PerLane::Four, PerLane::One].map(|per_lane| {
            case.run(Device::Cuda(Plan { segment_steps: Some(segment_steps), per_lane: Some(per_lane), narrow: None }))
        });
        assert!(results.iter().all(|other| *other == results[0]), "SEED={seed}");
    }
}

/// Two threads with a stream each.
#[test]
fn streams_do_not_meet() {
    let Some(first) = stream() else { return };
    let (mut rng, seed) = seeded();
    let shape = Shape { batch: 1, len: 200, d_inner: 24, d_state: 8 };
    let cases = [(); 2].map(|()| Case::<f32>::new(&mut rng, shape, Flags::mamba()));
    let alone = cases.each_ref().map(|case| case.run(Device::Cuda(SPLIT)));
    std::thread::scope(|scope| {
        let threads = [0, 1].map(|i| {
            let (case, alone) = (&cases[i], &alone[i]);
            let own = first.context().new_stream().expect("a stream");
            scope.spawn(move || {
                work_on(own);
                for _ in 0..5 {
                    assert!(case.run(Device::Cuda(SPLIT)) == *alone, "SEED={seed}");
                }
            })
        });
        threads.into_iter().for_each(|thread| thread.join().expect("the bits are the same"));
    });
}

/// Elements that lie more than 2^31 apart.
#[test]
fn distant_elements() {
    let Some(stream) = stream() else { return };
    let (batch, len, d_inner, d_state) = (2, 5, 8, 4);
    let apart = (1usize << 31) + 64;
    let count = apart + 256;
    // SAFETY: the elements that are read are written before.
    let Ok(mut far) = (unsafe { stream.alloc::<bf16>(count) }) else {
        return eprintln!("the device has no room for {count} elements: skipped");
    };
    let mut rng = seeded().0;
    let case =
        Case::<bf16>::new(&mut rng, Shape { batch, len, d_inner, d_state }, Flags { z: true, ..Flags::default() });
    let inputs = case.inputs();
    for (i, view) in [inputs.u, inputs.delta, inputs.z.expect("it has a gate")].into_iter().enumerate() {
        for row in 0..batch {
            let from = &view.data[row * len * d_inner..][..len * d_inner];
            let at = row * apart + 64 * i;
            stream.memcpy_htod(from, &mut far.slice_mut(at..at + from.len())).expect("copied");
        }
    }
    let copies = Copies::new(&stream);
    let place = |i: usize| View::on_device(&far, [batch, len, d_inner]).with_layout(64 * i, [apart, d_inner, 1]);
    let distant = Inputs {
        z: Some(place(2)),
        options: inputs.options,
        ..Inputs::new(
            place(0),
            place(1),
            copies.view(&inputs.a),
            copies.projection(&inputs.b),
            copies.projection(&inputs.c),
        )
    };
    let out = copies.poisoned::<bf16>(batch * len * d_inner);
    let outputs = OutputMut { out: &mut *out, final_state: None, checkpoints: None };
    scan::cuda::forward(&stream, &distant, outputs).expect("the inputs are valid");
    let mut ours = vec![bf16::ZERO; out.len()];
    copies.download(out, &mut ours);
    let near: Vec<f64> = case.run(Device::Cuda(WHOLE)).get("out").to_vec();
    assert_eq!(ours.iter().map(|x| x.to_f64()).collect::<Vec<_>>(), near);
}

/// A call in a CUDA graph, replayed. Simulated devices have no graphs.
#[test]
fn captured() {
    let Some(stream) = stream().filter(|stream| !is_simulated(stream)) else { return };
    use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
    // A context of its own, in which cudarc does not track who uses a buffer: the events that it would wait for are not
    // part of what is captured.
    let context = CudaContext::new_non_primary(stream.context().ordinal(), 0).expect("a second context");
    // SAFETY: all work in this context is on one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().expect("a stream");
    let mut rng = seeded().0;
    let case = Case::<f32>::new(&mut rng, Shape { batch: 1, len: 300, d_inner: 24, d_state: 8 }, Flags::mamba());
    let copies = Copies::new(&stream);
    let inputs = on_device(&copies, &case.inputs());
    let out = copies.poisoned::<f32>(300 * 24);
    let mut run = || {
        let outputs = OutputMut { out: &mut *out, final_state: None, checkpoints: None };
        scan::cuda::forward_with(SPLIT, &stream, &inputs, outputs).expect("the case is valid");
    };
    run();
    stream.synchronize().expect("it ran");
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).expect("capturing");
    run();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).expect("captured").expect("something was captured");
    stream.memset_zeros(out).expect("cleared");
    graph.launch().expect("replayed");
    let mut ours = vec![0.0; out.len()];
    copies.download(out, &mut ours);
    let expected = case.run(Device::Cuda(SPLIT));
    assert!(ours.iter().map(|&x| f64::from(x)).eq(expected.get("out").iter().copied()));
}

/// The order in which blocks run must not change a bit: with the variable BITS set to a file, the bits of one problem are
/// kept there by the first run and compared with by the next, under another schedule of the simulator.
#[test]
fn the_same_bits_as_the_run_before() {
    let (Some(_), Ok(path)) = (stream(), std::env::var("BITS")) else { return };
    let mut rng = rand::SeedableRng::seed_from_u64(1);
    let shape = Shape { batch: 2, len: 150, d_inner: 136, d_state: 16 };
    let case = Case::<f32>::new(&mut rng, shape, Flags { initial_state: true, d_final_state: true, ..Flags::mamba() });
    let tensors = [WHOLE, SPLIT].map(|plan| case.run(Device::Cuda(plan)).0);
    let bits: Vec<u64> = tensors.iter().flatten().flat_map(|tensor| &tensor.values).map(|x| x.to_bits()).collect();
    let bytes: &[u8] = bytemuck::cast_slice(&bits);
    match std::fs::read(&path) {
        Ok(before) => assert!(before == bytes, "other bits than those in {path}"),
        Err(_) => std::fs::write(&path, bytes).expect("it can be written"),
    }
}
