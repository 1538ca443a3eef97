//! Slots that lie on the device: what the kernels make of them, when they read them, and what is refused.

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaSlice};
use selective_scan::cuda::{Cuda, Slots};
use selective_scan::state_update::{Inputs, Options, UpdateMut, cuda};
use selective_scan::{DeviceSlots, Element, View, ViewMut, conv};

use crate::support::draw::Draw;
use crate::support::gpu::{Copies, stream};
use crate::support::tolerance::bits;

const BATCH: usize = 4;
const D: usize = 24;
const N: usize = 8;
const WIDTH: usize = 4;
const POOL: usize = 6;

/// A token's convolution and, of its output, the state update, on copies of the same numbers.
struct Step<'c> {
    copies: &'c Copies,
    x: &'c CudaSlice<f32>,
    weight: &'c CudaSlice<f32>,
    a: &'c CudaSlice<f32>,
    projection: &'c CudaSlice<f32>,
    rows: &'c mut CudaSlice<f32>,
    states: &'c mut CudaSlice<f32>,
    u: &'c mut CudaSlice<f32>,
    out: &'c mut CudaSlice<f32>,
    token_states: &'c mut CudaSlice<f32>,
}

impl<'c> Step<'c> {
    fn new(copies: &'c Copies) -> Self {
        let mut draw = Draw::new(11);
        let mut random = |len, low, high| copies.slice(&draw.uniform::<f32>(len, low, high));
        Self {
            copies,
            x: random(BATCH * D, -1.0, 1.0),
            weight: random(D * WIDTH, -1.0, 1.0),
            a: random(D * N, -2.0, -0.1),
            projection: random(BATCH * N, -1.0, 1.0),
            rows: random(POOL * (WIDTH - 1) * D, -1.0, 1.0),
            states: random(POOL * D * N, -1.0, 1.0),
            u: copies.poisoned(BATCH * D),
            out: copies.poisoned(BATCH * D),
            token_states: copies.poisoned(BATCH * D * N),
        }
    }

    fn run(&mut self, slots: Slots) {
        let stream = self.copies.stream();
        let activation = [BATCH, 1, D];
        let inputs = conv::UpdateInputs {
            slots,
            silu: true,
            ..conv::UpdateInputs::new(View::on_device(self.x, activation), View::on_device(self.weight, [D, WIDTH]))
        };
        let rows = ViewMut::on_device(self.rows, [POOL, WIDTH - 1, D]);
        conv::cuda::update(stream, &inputs, UpdateMut::new(rows, self.u)).expect("valid");
        let (u, projection) =
            (View::on_device(&*self.u, activation), View::on_device(self.projection, [BATCH, 1, 1, N]));
        let inputs = Inputs {
            slots,
            options: Options { delta_softplus: true, ..Options::default() },
            ..Inputs::<_, Cuda>::new(u, u, View::on_device(self.a, [D, N]), projection, projection)
        };
        let states = ViewMut::on_device(self.states, [POOL, D, N]);
        let token_states = Some(&mut *self.token_states);
        cuda::update(stream, &inputs, UpdateMut { token_states, ..UpdateMut::new(states, self.out) }).expect("valid");
    }

    /// Puts the states of all rows back to those after the token of `token_states`.
    fn rollback(&mut self, slots: Slots) {
        let token_states = View::on_device(&*self.token_states, [BATCH, 1, D, N]);
        let states = ViewMut::on_device(self.states, [POOL, D, N]);
        cuda::rollback(self.copies.stream(), states, token_states, slots, &[1; BATCH]).expect("valid");
    }

    /// All that has been written.
    fn results(&self) -> Vec<u32> {
        let buffers = [&*self.rows, &*self.states, &*self.u, &*self.out, &*self.token_states];
        buffers.into_iter().flat_map(|buffer| bits(&self.download(buffer))).collect()
    }

    fn download<T: Element>(&self, buffer: &CudaSlice<T>) -> Vec<T> {
        let mut host = vec![T::from_f32(0.0); buffer.len()];
        self.copies.download(buffer, &mut host);
        host
    }
}

/// What a pool does not have is padding, as a negative slot is: zero comes out, and no state is touched.
#[test]
fn slots_that_a_pool_does_not_have_are_padding() {
    let Some(stream) = stream() else { return };
    let copies = Copies::new(&stream);
    for (wild, padded) in [
        ([POOL as i32, 3, i32::MAX, 0], [-1, 3, -1, 0]),
        ([-1, i32::MIN, POOL as i32 - 1, 1 << 30], [-1, -1, POOL as i32 - 1, -1]),
    ] {
        let (mut ours, mut expected) = (Step::new(&copies), Step::new(&copies));
        let list = copies.slice(&wild);
        ours.run((&*list).into());
        expected.run((&padded).into());
        assert_eq!(ours.results(), expected.results(), "{wild:?}");
        for (row, _) in padded.iter().enumerate().filter(|(_, slot)| **slot < 0) {
            assert!(ours.download(ours.out)[row * D..][..D].iter().all(|&x| x == 0.0), "{wild:?}: row {row}");
        }
        // Another token, then back to the state after the first.
        let kept = ours.download(ours.states);
        let token_states = stream.clone_dtod(&*ours.token_states).expect("room");
        ours.run((&*list).into());
        assert_ne!(bits(&ours.download(ours.states)), bits(&kept));
        stream.memcpy_dtod(&token_states, ours.token_states).expect("of one size");
        ours.rollback((&*list).into());
        assert_eq!(bits(&ours.download(ours.states)), bits(&kept), "{wild:?}: rolled back");
    }
}

/// A list is read when the kernel runs: what was copied there between two calls.
#[test]
fn a_list_that_changes_is_read_again() {
    let Some(stream) = stream() else { return };
    let copies = Copies::new(&stream);
    let lists = [[2, -1, 5, 0], [1, 5, 3, 4]];
    let (mut ours, mut expected) = (Step::new(&copies), Step::new(&copies));
    let list = copies.slice(&lists[0]);
    ours.run((&*list).into());
    stream.memcpy_dtod(copies.slice(&lists[1]), list).expect("of one size");
    ours.run((&*list).into());
    for slots in &lists {
        expected.run(slots.into());
    }
    assert_eq!(ours.results(), expected.results());
}

/// Convolution and state update in a CUDA graph, which is replayed with other slots each time: the bits of plain launches.
#[test]
fn a_graph_is_replayed_with_other_slots() {
    let Some(stream) = stream() else { return };
    // A context of its own, in which cudarc does not track who uses a buffer: the events that it would wait for are not
    // part of what is captured.
    let context = CudaContext::new_non_primary(stream.context().ordinal(), 0).expect("a second context");
    // SAFETY: all work in this context is on one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().expect("a stream");
    let copies = Copies::new(&stream);
    let lists = [[5, 1, -1, 0], [0, 5, 2, 1], [-1, POOL as i32, 4, 3]];
    let (mut ours, mut expected) = (Step::new(&copies), Step::new(&copies));
    let list = copies.slice(&lists[0]);
    // A first launch loads the kernels.
    ours.run((&*list).into());
    expected.run((&lists[0]).into());

    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).expect("capturing");
    ours.run((&*list).into());
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).expect("captured").expect("something was captured");
    assert_eq!(ours.results(), expected.results(), "what is captured does not run");
    for slots in [lists[1], lists[2], lists[0]] {
        stream.memcpy_dtod(copies.slice(&slots), list).expect("of one size");
        graph.launch().expect("replayed");
        expected.run((&slots.map(|slot| if slot < POOL as i32 { slot } else { -1 })).into());
        assert_eq!(ours.results(), expected.results(), "{slots:?}");
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let Some(stream) = stream() else { return };
    let copies = Copies::new(&stream);
    let data = copies.slice(&[1.0f32; 64]);
    let (pool, out) = (copies.slice(&[1.0f32; 24]), copies.slice(&[1.0f32; 8]));
    let u = View::on_device(&*data, [2, 1, 4]);
    let b = View::on_device(&*data, [2, 1, 1, 3]);
    let list = copies.slice(&[0, 1, 0]);
    let mut refused = |slots: Slots, expected: &str| {
        let inputs = Inputs { slots, ..Inputs::new(u, u, View::on_device(&*data, [4, 3]), b, b) };
        let state = ViewMut::on_device(&mut *pool, [2, 4, 3]);
        let error = cuda::update(&stream, &inputs, UpdateMut::new(state, &mut *out)).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    };
    refused((&*list).into(), "`slots`: expected one for each of 2 batch rows, got 3");
    let part = |offset| DeviceSlots { offset, len: 2, ..DeviceSlots::new(list) }.into();
    refused(part(2), "`slots`: expected a buffer that holds offset 2 and 2 slots, got one of 3");
    refused(part(usize::MAX), "`slots`: expected a buffer that holds offset");
    if let Ok(other) = CudaContext::new_non_primary(0, 0) {
        let elsewhere = other.default_stream().clone_htod(&[0, 1]).expect("room");
        refused((&elsewhere).into(), "`slots`: expected memory of");
    }
    for buffer in [pool, out] {
        let mut host = vec![0.0f32; buffer.len()];
        copies.download(buffer, &mut host);
        assert!(host.iter().all(|&x| x == 1.0), "written on an error");
    }
}
