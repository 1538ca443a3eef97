//! What the scan promises beside being accurate: the same bits where DESIGN says so, and nothing leaking.

use std::ops::Range;

use half::bf16;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selective_scan::scan::{self, Inputs};
use selective_scan::{Element, View};

use super::case::{Case, Flags, Shape};
use crate::support::device::Device;
use crate::support::draw::seeded;
use crate::support::strided::Strided;
use crate::support::tolerance::error;

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool of threads")
}

/// Twice on one thread, once on two: the same bits, forward and backward, also where sequences are split.
#[test]
fn repeatable_on_any_number_of_threads() {
    let (mut rng, seed) = seeded();
    let (one, two) = (pool(1), pool(2));
    for (row, (len, d_inner)) in [(100, 50), (3000, 20), (5000, 7), (300, 300)].into_iter().enumerate() {
        for row in [2 * row + 1, 15 - row] {
            let shape = Shape { batch: 2, len, d_inner, d_state: 5 };
            let case = Case::<f32>::new(&mut rng, shape, Flags::pairwise(row));
            let first = one.install(|| case.run_both(Device::best()));
            assert!(first == one.install(|| case.run_both(Device::best())), "SEED={seed} {shape:?} {row}: again");
            assert!(
                first == two.install(|| case.run_both(Device::best())),
                "SEED={seed} {shape:?} {row}: on two threads"
            );
        }
    }
}

/// The part of a problem that holds one sequence, as a problem of its own.
fn alone<T: Element>(case: &Case<T>, sequence: usize) -> Case<T> {
    let (batch, range) = match case.flags.packed {
        true => (0, case.cu_seqlens[sequence]..case.cu_seqlens[sequence + 1]),
        false => (sequence, 0..case.shape.len),
    };
    let row = |activation: &Strided<T>| activation.row(batch).steps(range.clone());
    let projection = |values: &[T]| {
        let step = case.groups * case.shape.d_state;
        let start = (batch * case.shape.len + range.start) * step;
        values[start..start + range.len() * step].to_vec()
    };
    let state = |values: &[f32]| {
        let len = case.shape.d_inner * case.shape.d_state;
        values[sequence * len..][..len].to_vec()
    };
    Case {
        shape: Shape { batch: 1, len: range.len(), ..case.shape },
        flags: Flags { packed: false, ..case.flags },
        u: row(&case.u),
        delta: row(&case.delta),
        z: row(&case.z),
        d_out: row(&case.d_out),
        b: projection(&case.b),
        c: projection(&case.c),
        initial_state: state(&case.initial_state),
        d_final_state: state(&case.d_final_state),
        ..case.clone()
    }
}

/// A sequence gets the same bits packed, in a batch and alone; parameter gradients, which sum over all, excepted.
#[test]
fn a_sequence_does_not_see_its_neighbours() {
    neighbours(Device::best(), &[(75, 34, 6), (1500, 20, 6)], |flags| flags);
}

/// With `shapes` of steps, channels and states.
pub fn neighbours(device: Device, shapes: &[(usize, usize, usize)], change: impl Fn(Flags) -> Flags) {
    let (mut rng, seed) = seeded();
    let parameters = ["d_a", "d_d", "d_delta_bias"];
    for row in 0..16 {
        for &(len, d_inner, d_state) in shapes {
            let shape = Shape { batch: 3, len, d_inner, d_state };
            let case = Case::<f32>::new(&mut rng, shape, change(Flags::pairwise(row)));
            let whole = case.run(device);
            for sequence in 0..case.sequences() {
                let single = alone(&case, sequence);
                let start = match case.flags.packed {
                    true => case.cu_seqlens[sequence],
                    false => sequence * len,
                };
                for tensor in single.run(device).0 {
                    let is_constant = |name, constant| tensor.name == name && constant;
                    if parameters.contains(&tensor.name)
                        || is_constant("d_b", case.flags.constant_b)
                        || is_constant("d_c", case.flags.constant_c)
                    {
                        continue;
                    }
                    let whole = whole.get(tensor.name);
                    let at = match tensor.name {
                        "final_state" | "d_initial_state" => sequence * d_inner * shape.d_state,
                        "d_b" | "d_c" => start * case.groups * shape.d_state,
                        _ => start * d_inner,
                    };
                    assert!(
                        whole[at..at + tensor.values.len()] == tensor.values,
                        "SEED={seed} {device:?} row {row} {shape:?}: {} of sequence {sequence}",
                        tensor.name
                    );
                }
            }
        }
    }
}

/// However tensors are stored, the same bits come out.
#[test]
fn layouts_do_not_matter() {
    layouts::<bf16>(Device::best(), 7, &[]);
}

/// Leaves out the tensors of `but`.
pub fn layouts<T: Element>(device: Device, d_state: usize, but: &[&str]) {
    let (mut rng, seed) = seeded();
    for row in 0..16 {
        let shape = Shape { batch: 2, len: 90, d_inner: 36, d_state };
        let case = Case::<T>::new(&mut rng, shape, Flags::pairwise(row));
        let dense = Case {
            u: case.u.dense(),
            delta: case.delta.dense(),
            z: case.z.dense(),
            d_out: case.d_out.dense(),
            ..case.clone()
        };
        for (strided, dense) in case.run(device).0.iter().zip(dense.run(device).0) {
            let same = *strided == dense || but.contains(&dense.name);
            assert!(same, "SEED={seed} {device:?} row {row}: {}", dense.name);
        }
    }
}

/// Strides of every other input: transposed parameters, states in a larger pool, B and C as columns of a projection.
#[test]
fn strided_parameters_and_states() {
    let (mut rng, seed) = seeded();
    let flags = Flags { initial_state: true, ..Flags::mamba() };
    let shape = Shape { batch: 2, len: 70, d_inner: 20, d_state: 5 };
    let Shape { batch, len, d_inner, d_state } = shape;
    let case = Case::<f32>::new(&mut rng, shape, flags);
    let plain = case.inputs().forward().expect("the case is valid");

    let transposed: Vec<f32> = (0..d_state * d_inner).map(|i| case.a[i % d_inner * d_state + i / d_inner]).collect();
    let width = 2 * d_state + 3;
    let mut projected = vec![f32::NAN; batch * len * width];
    for t in 0..batch * len {
        projected[t * width + 3..][..d_state].copy_from_slice(&case.b[t * d_state..][..d_state]);
        projected[t * width + 3 + d_state..][..d_state].copy_from_slice(&case.c[t * d_state..][..d_state]);
    }
    let column = |first: usize| {
        View::new(&projected, [batch, len, 1, d_state]).with_layout(first, [len * width, width, width, 1])
    };
    let mut pool = vec![f32::NAN; 3 * batch * d_inner * d_state];
    for (i, &x) in case.initial_state.iter().enumerate() {
        let (sequence, rest) = (i / (d_inner * d_state), i % (d_inner * d_state));
        pool[(3 * sequence + 1) * d_inner * d_state + rest] = x;
    }
    let state =
        View::new(&pool, [batch, d_inner, d_state]).with_layout(d_inner * d_state, [3 * d_inner * d_state, d_state, 1]);
    let inputs = Inputs {
        a: View::new(&transposed, [d_inner, d_state]).with_layout(0, [1, d_inner]),
        b: column(3).into(),
        c: column(3 + d_state).into(),
        initial_state: Some(state),
        ..case.inputs()
    };
    assert!(inputs.forward().expect("the inputs are valid") == plain, "SEED={seed}");
}

/// A stride of zero repeats an element.
#[test]
fn broadcast_inputs() {
    let (mut rng, _) = seeded();
    let shape = Shape { batch: 2, len: 33, d_inner: 17, d_state: 4 };
    let mut case = Case::<f32>::new(&mut rng, shape, Flags::mamba());
    for b in 0..2 {
        for t in 0..33 {
            (0..17).for_each(|i| case.delta.set([b, t, i], -1.0 + t as f32 * 0.01));
        }
    }
    let steps: Vec<f32> = (0..33).map(|t| -1.0 + t as f32 * 0.01).collect();
    let delta = View::new(&steps, [2, 33, 17]).with_layout(0, [0, 1, 0]);
    let broadcast = Inputs { delta, ..case.inputs() };
    assert!(broadcast.forward().expect("valid") == case.inputs().forward().expect("valid"));
}

/// Running two parts one after the other, the state passed on, equals running the whole; wherever it is cut.
#[test]
fn split_anywhere_equals_whole() {
    parts_equal_whole(Device::best(), 0..16);
}

pub fn parts_equal_whole(device: Device, rows: Range<usize>) {
    let (mut rng, seed) = seeded();
    for row in rows {
        let flags = Flags { packed: false, grouped: false, initial_state: true, ..Flags::pairwise(row) };
        let shape = Shape { batch: 2, len: 200, d_inner: 19, d_state: 6 };
        let case = Case::<f32>::new(&mut rng, shape, flags);
        let whole = case.run_both(device).0;
        for cut in [1, 63, 64, 65, rng.random_range(2..198), 199] {
            let mut ranges = [0..cut, cut..200];
            if flags.reverse {
                ranges.reverse();
            }
            let mut state = case.initial_state.clone();
            let mut out = vec![0.0; whole.out.len()];
            for range in ranges {
                let part = part_of(&case, range.clone(), &state);
                let output = part.run_both(device).0;
                for b in 0..2 {
                    let (len, d) = (range.len(), 19);
                    out[(b * 200 + range.start) * d..][..len * d]
                        .copy_from_slice(&output.out[b * len * d..][..len * d]);
                }
                state = output.final_state;
            }
            // The parts do what the whole does, so only where a state is stored and read back can anything differ; the
            // bound is that of the scan.
            for (ours, whole) in [(&out, &whole.out), (&state, &whole.final_state)] {
                let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
                let error = error(&wide(ours), &wide(whole));
                assert!(error <= 1e-5, "SEED={seed} row {row} cut at {cut}: {error:e}");
            }
        }
    }
}

fn part_of(case: &Case<f32>, range: std::ops::Range<usize>, state: &[f32]) -> Case<f32> {
    let Shape { batch, len, d_state, .. } = case.shape;
    let projection = |values: &[f32]| {
        let rows = (0..batch).flat_map(|b| (b * len + range.start) * d_state..(b * len + range.end) * d_state);
        rows.map(|i| values[i]).collect::<Vec<_>>()
    };
    Case {
        shape: Shape { len: range.len(), ..case.shape },
        u: case.u.steps(range.clone()),
        delta: case.delta.steps(range.clone()),
        z: case.z.steps(range.clone()),
        d_out: case.d_out.steps(range.clone()),
        b: projection(&case.b),
        c: projection(&case.c),
        initial_state: state.to_vec(),
        ..case.clone()
    }
}

/// The tensors of `poisoned` that are not finite where those of `clean` are, as indices.
fn infected(poisoned: &[f64], clean: &[f64]) -> Vec<usize> {
    assert!(clean.iter().all(|x| x.is_finite()));
    (0..clean.len()).filter(|&i| poisoned[i].to_bits() != clean[i].to_bits()).collect()
}

/// A NaN in one channel's input reaches that channel from there on, and no other; backwards likewise.
#[test]
fn nan_reaches_what_depends_on_it() {
    Device::all().into_iter().for_each(|device| nan_spreads(device, 21, 3));
}

pub fn nan_spreads(device: Device, d: usize, d_state: usize) {
    let (mut rng, seed) = seeded();
    let shape = Shape { batch: 2, len: 150, d_inner: d, d_state };
    let (batch, t0, channel) = (1, 70, 18);
    for value in [f32::NAN, f32::INFINITY] {
        let clean_case = Case::<f32>::new(&mut rng, shape, Flags::mamba());
        let clean = clean_case.run(device);
        let own = |i: usize| i % d == channel && i / d / 150 == batch;

        let mut case = clean_case.clone();
        case.u.set([batch, t0, channel], value);
        let results = case.run(device);
        let hit = infected(results.get("out"), clean.get("out"));
        assert!(hit.iter().all(|&i| own(i) && i / d % 150 >= t0), "SEED={seed} {device:?}: u leaks into {hit:?}");
        assert!(hit.contains(&((batch * 150 + t0) * d + channel)), "SEED={seed} {device:?}: u is ignored");
        assert!(results.get("out")[hit[0]].is_nan() || value.is_infinite());
        // d_u depends on u only through nothing: the scan is linear in u.
        assert!(infected(results.get("d_u"), clean.get("d_u")).is_empty(), "SEED={seed} {device:?}");
        let hit = infected(results.get("d_c"), clean.get("d_c"));
        assert!(hit.iter().all(|&i| i / d_state >= batch * 150 + t0), "SEED={seed} {device:?}: u leaks into d_c");

        // What decays is the state before a step, so that the last one's input is nothing to A. (The last tile is ragged.)
        let mut case = clean_case.clone();
        case.u.set([batch, 149, channel], value);
        assert!(infected(case.run(device).get("d_a"), clean.get("d_a")).is_empty(), "SEED={seed} {device:?}: u leaks");

        let mut case = clean_case.clone();
        case.d_out.set([batch, t0, channel], value);
        let results = case.run(device);
        assert!(infected(results.get("out"), clean.get("out")).is_empty());
        let hit = infected(results.get("d_u"), clean.get("d_u"));
        assert!(hit.iter().all(|&i| own(i) && i / d % 150 <= t0), "SEED={seed} {device:?}: d_out leaks: {hit:?}");
        assert!(hit.contains(&((batch * 150 + t0) * d + channel)), "SEED={seed} {device:?}: d_out is ignored");

        let mut case = clean_case.clone();
        case.b[(batch * 150 + t0) * d_state + 1] = value;
        let hit = infected(case.run(device).get("out"), clean.get("out"));
        assert!(hit.iter().all(|&i| i / d >= batch * 150 + t0), "SEED={seed} {device:?}: b leaks");
        assert!(hit.len() >= d, "SEED={seed} {device:?}: b is ignored");
    }
}

/// Empty batches and sequences give empty outputs and leave the state as it is.
#[test]
fn nothing_to_do() {
    empty_problems(Device::best());
}

pub fn empty_problems(device: Device) {
    let (mut rng, _) = seeded();
    let flags = Flags { initial_state: true, d_final_state: true, ..Flags::mamba() };
    for (batch, len) in [(2, 0), (0, 5), (0, 0)] {
        for packed in [false, true] {
            let shape = Shape { batch, len, d_inner: 9, d_state: 4 };
            let case = Case::<f32>::new(&mut rng, shape, Flags { packed, ..flags });
            let (output, gradients) = case.run_both(device);
            assert!(output.out.is_empty() && gradients.u.is_empty());
            assert_eq!(output.final_state, case.initial_state[..output.final_state.len()]);
            assert_eq!(gradients.initial_state.as_deref(), Some(&case.d_final_state[..]));
            assert!(gradients.a.iter().chain(gradients.d.iter().flatten()).all(|&x| x == 0.0));
            case.check(device, &|| format!("{shape:?}"));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Shapes and flags drawn at random; for one channel see `accuracy::a_single_channel`.
    #[test]
    fn agrees_with_the_reference(
        batch in 0usize..4,
        len in 0usize..200,
        d_inner in 2usize..60,
        d_state in 1usize..30,
        bits in any::<u16>(),
        seed in any::<u64>(),
    ) {
        let flags = Flags::from_bits(bits);
        let shape = Shape { batch, len, d_inner, d_state };
        let case = Case::<f32>::new(&mut StdRng::seed_from_u64(seed), shape, flags);
        case.check(Device::best(), &|| format!("{shape:?} {flags:?}"));
    }
}

/// Calling through slices alone, as the documentation shows.
#[test]
fn checkpoints_are_optional() {
    let (mut rng, _) = seeded();
    let case = Case::<f32>::new(&mut rng, Shape { batch: 1, len: 130, d_inner: 18, d_state: 4 }, Flags::mamba());
    let (with, _) = case.inputs().forward_with_checkpoints().expect("valid");
    assert!(case.inputs().forward().expect("valid") == with);
    let mut out = vec![0.0; with.out.len()];
    let to = scan::OutputMut { out: &mut out[..], final_state: None, checkpoints: None };
    scan::cpu::forward(&case.inputs(), to).expect("valid");
    assert_eq!(out, with.out);
}
