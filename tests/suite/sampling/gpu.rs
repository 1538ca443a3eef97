//! The choice on a GPU, or on a simulated one: what the processor chooses, bit for bit.

use std::sync::Arc;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaStream};
use selective_scan::sampling::cuda::{self, StateMut, Workspace};
use selective_scan::sampling::{Inputs, Settings, words};
use selective_scan::scan::cuda::Plan;
use selective_scan::{DeviceSlots, View};

use super::{
    Case, Chosen, UNTOUCHED, VOCABS, a_penalty_passes_on, against_reference, greedy_choices, odd_rows, rows_alone,
    settings,
};
use crate::support::device::Device;
use crate::support::draw::{Draw, seeded};
use crate::support::gpu::{Copies, stream};

/// The call of [`Case::run`], on copies of all that is read and written. Slots lie on the device where rows are odd in
/// number.
pub fn sample(
    case: &Case,
    settings: &mut [Settings],
    occurred: Option<&mut [u32]>,
    tokens: &mut [u32],
    log_probs: Option<&mut [f32]>,
) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let (settings_there, tokens_there) = (copies.slice(settings), copies.slice(tokens));
    let mut occurred = occurred.map(|words| (copies.slice(words), words));
    let mut log_probs = log_probs.map(|values| (copies.slice(values), values));
    let state = StateMut {
        settings: &mut *settings_there,
        occurred: occurred.as_mut().map(|(there, _)| &mut **there),
        tokens: &mut *tokens_there,
        log_probs: log_probs.as_mut().map(|(there, _)| &mut **there),
    };
    let slots = match &case.slots {
        Some(list) if case.rows % 2 == 1 => {
            let data = copies.slice(&[&[0, 1], &list[..], &[2]].concat());
            DeviceSlots { data: &*data, offset: 2, len: list.len() }.into()
        }
        slots => slots.as_deref().into(),
    };
    let inputs = Inputs { vocab_size: case.vocab_size, slots, ..Inputs::new(copies.view(&case.view())) };
    let mut workspace = workspace(&stream, case.rows, case.vocab_size);
    cuda::sample(&stream, &inputs, state, &mut workspace).expect("the case is valid");
    stream.memcpy_dtoh(settings_there, settings).expect("the kernels succeeded");
    stream.memcpy_dtoh(tokens_there, tokens).expect("the kernels succeeded");
    if let Some((there, words)) = occurred {
        stream.memcpy_dtoh(there, words).expect("the kernels succeeded");
    }
    if let Some((there, values)) = log_probs {
        stream.memcpy_dtoh(there, values).expect("the kernels succeeded");
    }
}

/// One for a row and a token more than are wanted.
fn workspace(stream: &Arc<CudaStream>, rows: usize, vocab_size: usize) -> Workspace {
    Workspace::new(stream, rows + 1, vocab_size + 1).expect("the device has room")
}

fn device() -> Device {
    Device::Cuda(Plan::default())
}

/// Asserts that the device leaves what the processor does, bit for bit but for log-probabilities: these are a
/// difference of `f32` there, and a logarithm within two units in the last place, neither of which cancels.
#[track_caller]
fn same_as_the_processor(case: &Case, what: &str) {
    let [ours, theirs] = [device(), Device::best()].map(|device| case.run(device, true));
    let Chosen { tokens, log_probs, settings, occurred } = ours;
    assert_eq!(tokens, theirs.tokens, "{what}");
    assert_eq!(settings, theirs.settings, "{what}");
    assert!(occurred == theirs.occurred, "bits, {what}");
    let pairs = log_probs.iter().flatten().zip(theirs.log_probs.iter().flatten());
    for (x, y) in pairs.map(|(x, y)| (f32::from_bits(*x), f32::from_bits(*y))) {
        assert!(x.to_bits() == y.to_bits() || (x - y).abs() <= y.abs() * 2f32.powi(-21), "{x} for {y}, {what}");
    }
}

#[test]
fn tokens_are_those_of_the_processor() {
    if stream().is_none() {
        return;
    }
    let (_, seed) = seeded();
    for i in 0..80 {
        let case = Case::draw(&mut Draw::new(seed.wrapping_add(i)), &VOCABS);
        same_as_the_processor(&case, &format!("{} x {}, SEED={seed}, {i}", case.rows, case.vocab));
    }
}

#[test]
fn tokens_are_those_of_the_reference() {
    if stream().is_some() {
        against_reference(&|_| device(), 0..10, &VOCABS);
        against_reference(&|_| device(), 10..12, &[50_280]);
    }
}

/// One row of logits for each of the settings, which take every way through the kernels.
fn every_way(draw: &mut Draw, logits: &[f32]) -> Case {
    let any = Settings { temperature: 1.3, ..settings(draw, logits.len()) };
    let (vocab, plain) = (logits.len() as u64, Settings { top_k: 0, top_p: 1.0, min_p: 0.0, ..any });
    let all = [
        plain,
        Settings { temperature: 0.0, ..plain },
        Settings { min_p: 0.01, ..plain },
        Settings { top_k: vocab / 3 + 1, ..plain },
        Settings { top_p: 0.6, ..plain },
        Settings { top_k: vocab / 2 + 1, top_p: 0.8, min_p: 1e-4, ..plain },
    ];
    let mut case = Case::of(&[logits; 6], &all);
    case.occurred = Some(vec![0x0f0f_0f0f; 6 * words(logits.len())]);
    case
}

/// Bins with more tokens than a list of them has room for: logits that are all the same, and those that differ in their
/// last bits.
#[test]
fn crowded_bins() {
    if stream().is_none() {
        return;
    }
    let (_, seed) = seeded();
    let draw = &mut Draw::new(seed);
    let near: Vec<f32> = draw.uniform::<f32>(9001, 1.0, 1.001);
    same_as_the_processor(&every_way(draw, &vec![1.5; 9001]), &format!("equal, SEED={seed}"));
    same_as_the_processor(&every_way(draw, &near), &format!("near, SEED={seed}"));
}

/// Vocabularies of more tiles than a block has threads, and of the usual sizes.
#[test]
fn large_vocabularies() {
    if stream().is_none() {
        return;
    }
    let (_, seed) = seeded();
    for (i, vocab) in [50_280, 270_001].into_iter().enumerate() {
        let draw = &mut Draw::new(seed.wrapping_add(i as u64));
        let mut logits: Vec<f32> = draw.uniform(vocab, -12.0, 12.0);
        // The likeliest are the last ones, which no thread has a tile of before its second turn.
        logits[vocab - 1000..].iter_mut().for_each(|x| *x += 20.0);
        same_as_the_processor(&every_way(draw, &logits), &format!("{vocab}, SEED={seed}"));
    }
}

/// So many rows that a warp has several tiles, most of them padding.
#[test]
fn many_rows() {
    if stream().is_none() {
        return;
    }
    let (_, seed) = seeded();
    let draw = &mut Draw::new(seed);
    let (rows, vocab, active) = (1101, 9001, [0, 500, 1100]);
    let mut case = Case::of(&[&draw.uniform::<f32>(vocab, -9.0, 9.0)], &[]);
    // All rows are the same in memory.
    (case.rows, case.stride) = (rows, 0);
    case.settings = active.map(|_| Settings { temperature: 1.1, ..settings(draw, vocab) }).to_vec();
    let mut slots = vec![-1; rows];
    active.into_iter().enumerate().for_each(|(slot, row)| slots[row] = slot as i32);
    case.slots = Some(slots);
    same_as_the_processor(&case, &format!("SEED={seed}"));
}

#[test]
fn rows_beside_others() {
    if stream().is_some() {
        rows_alone(device(), 8, &VOCABS);
    }
}

#[test]
fn odd_rows_ties_and_penalties() {
    if stream().is_some() {
        odd_rows(device());
        greedy_choices(device(), &[7, 600]);
        a_penalty_passes_on(device());
    }
}

/// What nobody has checked: a slot that there is no sequence for is padding.
#[test]
fn slots_beyond_the_sequences() {
    if stream().is_none() {
        return;
    }
    let mut case = Case::of(&[&[1.0, 2.0][..]; 3], &[Settings::greedy(); 2]);
    case.slots = Some(vec![2, 0, i32::MAX]);
    let chosen = case.run(device(), false);
    assert_eq!(chosen.tokens, [UNTOUCHED, 1, UNTOUCHED]);
    assert_eq!([0, 1].map(|slot| chosen.settings[slot].position), [1, 0]);
}

/// A graph of a call serves other logits, settings and slots, and goes on from what the replay before has left.
#[test]
fn a_graph_goes_on() {
    let Some(default) = stream() else { return };
    let (_, seed) = seeded();
    let draw = &mut Draw::new(seed);
    let (rows, vocab) = (3, 700);
    // A context of its own, in which cudarc does not track who uses a buffer: the events that it would wait for are not
    // part of what is captured.
    let context = CudaContext::new_non_primary(default.context().ordinal(), 0).expect("a second context");
    // SAFETY: all work in this context is on one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().expect("a stream");
    let mut case = Case::of(&[&vec![0.0; vocab][..]; 3], &[Settings::default(); 3]);
    let mut buffers = (
        stream.alloc_zeros::<f32>(rows * vocab).expect("room"),
        stream.alloc_zeros::<Settings>(rows).expect("room"),
        stream.alloc_zeros::<u32>(rows * words(vocab)).expect("room"),
        stream.alloc_zeros::<u32>(rows).expect("room"),
        stream.alloc_zeros::<i32>(rows).expect("room"),
    );
    let mut workspace = workspace(&stream, rows, vocab);
    let (logits, settings_there, occurred, tokens, slots) = &mut buffers;
    let mut call = || {
        let slots = DeviceSlots::new(&*slots).into();
        let inputs = Inputs { slots, ..Inputs::new(View::on_device(&*logits, [rows, vocab])) };
        let occurred = Some(&mut *occurred);
        let state = StateMut { occurred, ..StateMut::new(settings_there, tokens) };
        cuda::sample(&stream, &inputs, state, &mut workspace).expect("it fits");
    };
    // The first call loads the kernels.
    call();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).expect("a capture");
    call();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).expect("the capture is whole").expect("it has kernels");
    case.occurred = Some(vec![0; rows * words(vocab)]);
    stream.memset_zeros(&mut buffers.2).expect("it is there");
    for step in 0..6 {
        if step % 2 == 0 {
            case.settings = (0..rows).map(|_| settings(draw, vocab)).collect();
            case.slots = Some(draw.one_of(&[[0, 1, 2], [2, -1, 0], [-1, -1, 1]]).to_vec());
            stream.memcpy_htod(&case.settings, &mut buffers.1).expect("it fits");
            stream.memcpy_htod(case.slots.as_deref().expect("they are there"), &mut buffers.4).expect("it fits");
        }
        case.data = draw.uniform(rows * vocab, -5.0, 5.0);
        stream.memcpy_htod(&case.data, &mut buffers.0).expect("it fits");
        stream.memcpy_htod(&[UNTOUCHED; 3], &mut buffers.3).expect("it fits");
        graph.launch().expect("it was instantiated");
        let expected = case.run(Device::best(), false);
        let what = format!("step {step}, SEED={seed}");
        let tokens = stream.clone_dtoh(&buffers.3).expect("tokens");
        let slots = case.slots.iter().flatten();
        let tokens: Vec<_> = slots.map(|&slot| usize::try_from(slot).map_or(UNTOUCHED, |slot| tokens[slot])).collect();
        assert_eq!(tokens, expected.tokens, "{what}");
        assert_eq!(stream.clone_dtoh(&buffers.1).expect("settings"), expected.settings, "{what}");
        assert_eq!(Some(stream.clone_dtoh(&buffers.2).expect("bits")), expected.occurred, "{what}");
        (case.settings, case.occurred) = (expected.settings, expected.occurred);
    }
    stream.synchronize().expect("all is done");
}

#[test]
fn a_workspace_has_its_size() {
    let Some(stream) = stream() else { return };
    let mut workspace = Workspace::new(&stream, 2, 100).expect("room");
    let copies = Copies::new(&stream);
    let mut refused = |rows: usize, vocab: usize| {
        let data = vec![0.0; rows * vocab];
        let inputs = Inputs::new(copies.view(&View::new(&data, [rows, vocab])));
        let state = StateMut::new(copies.slice(&vec![Settings::default(); rows]), copies.slice(&vec![0; rows]));
        cuda::sample(&stream, &inputs, state, &mut workspace).err().map(|error| error.to_string())
    };
    assert_eq!(refused(2, 100), None);
    let message = "`workspace`: expected one for 3 rows of 100 tokens, got one for 2 rows of 100";
    assert_eq!(refused(3, 100).as_deref(), Some(message));
    let message = "`workspace`: expected one for 1 rows of 101 tokens, got one for 2 rows of 100";
    assert_eq!(refused(1, 101).as_deref(), Some(message));
    for (rows, vocab_size, name) in [(1, (1 << 22) + 1, "vocab_size"), (1 << 40, 50_280, "rows")] {
        let error = Workspace::new(&stream, rows, vocab_size).expect_err("it is too large").to_string();
        assert!(error.contains(name), "{error}");
    }
    Workspace::new(&stream, 0, 0).expect("nothing");
}
