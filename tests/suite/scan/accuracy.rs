//! The scan against the float64 reference: every size, type, flag and layout.

use half::{bf16, f16};
use rand::SeedableRng;
use rand::rngs::StdRng;
use selective_scan::Element;

use super::case::{Case, Flags, Shape};
use crate::support::device::Device;
use crate::support::draw::seeded;

const LENGTHS: [usize; 12] = [1, 2, 3, 8, 17, 64, 129, 372, 784, 1134, 2048, 4096];
const STATES: [usize; 6] = [1, 4, 8, 16, 64, 256];

fn check<T: Element>(device: Device, shape: Shape, flags: Flags) {
    let (mut rng, seed) = seeded();
    let case = Case::<T>::new(&mut rng, shape, flags);
    let what = || format!("SEED={seed} {:?} {device:?} {shape:?} {flags:?}", T::DTYPE);
    case.check(device, &what);
}

/// Every length with every number of states, and a row of flags for each.
fn grid<T: Element>(first_row: usize) {
    for (i, len) in LENGTHS.into_iter().enumerate() {
        for (j, d_state) in STATES.into_iter().enumerate() {
            let case = first_row + i * STATES.len() + j;
            // Channels that leave the last vector ragged; few where there is much of the rest.
            let d_inner = if len * d_state > 100_000 { 6 } else { [18, 33, 6, 50][case % 4] };
            check::<T>(Device::best(), Shape { batch: 2, len, d_inner, d_state }, Flags::pairwise(case % 16));
        }
    }
}

#[test]
fn grid_f32() {
    grid::<f32>(0);
}

#[test]
fn grid_f16() {
    grid::<f16>(5);
}

#[test]
fn grid_bf16() {
    grid::<bf16>(10);
}

/// Every pair of flags in all combinations, on everything that this machine has.
fn all_flags<T: Element>() {
    for device in Device::all() {
        for row in 0..16 {
            for (len, d_state) in [(70, 16), (131, 5)] {
                check::<T>(device, Shape { batch: 3, len, d_inner: 42, d_state }, Flags::pairwise(row));
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

#[test]
fn model_widths() {
    for d_inner in [1536, 1537, 2047] {
        check::<f32>(Device::best(), Shape { batch: 1, len: 100, d_inner, d_state: 16 }, Flags::mamba());
        check::<bf16>(Device::best(), Shape { batch: 1, len: 65, d_inner, d_state: 16 }, Flags::mamba());
    }
}

/// On one thread a buffer serves blocks of different widths one after the other: nothing of a wide one may be left for a
/// narrow one to read.
#[test]
fn ragged_widths_on_one_thread() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool of threads");
    pool.install(|| {
        for d_inner in [50, 273, 1543] {
            // B and C must vary: their gradients are what sums over the lanes of a block.
            for reverse in [false, true] {
                let flags = Flags { reverse, ..Flags::mamba() };
                check::<f32>(Device::best(), Shape { batch: 2, len: 70, d_inner, d_state: 4 }, flags);
            }
        }
    });
}

/// The gradient of D is a single sum here. Of random terms it comes within 1/300 of zero once in 400 draws, and beside so
/// little the rounding of the terms is more than the bound allows; so these draws are always the same.
#[test]
fn a_single_channel() {
    for device in Device::all() {
        for row in 0..16 {
            let (shape, flags) = (Shape { batch: 2, len: 144, d_inner: 1, d_state: 5 }, Flags::pairwise(row));
            let case = Case::<f32>::new(&mut StdRng::seed_from_u64(row as u64), shape, flags);
            case.check(device, &|| format!("row {row} {device:?}"));
        }
    }
}

/// Widths around those of a vector and of a block, each with its tail.
#[test]
fn every_narrow_width() {
    for d_inner in 2..=40 {
        for device in Device::all() {
            check::<f32>(device, Shape { batch: 4, len: 9, d_inner, d_state: 3 }, Flags::mamba());
        }
    }
}

#[test]
fn every_number_of_states() {
    for d_state in 1..=40 {
        check::<f32>(Device::best(), Shape { batch: 2, len: 9, d_inner: 20, d_state }, Flags::mamba());
    }
}

/// Few channels and many steps: sequences are split, see the CPU path's plan.
#[test]
fn split_sequences() {
    for (batch, len, d_inner) in [(1, 16_384, 7), (2, 5000, 24), (1, 2048, 100)] {
        for row in [1, 6, 11, 15] {
            let flags = Flags { grouped: false, ..Flags::pairwise(row) };
            check::<f32>(Device::best(), Shape { batch, len, d_inner, d_state: 4 }, flags);
        }
    }
}

/// How far a state is carried, at 65,536 steps.
fn long(set: impl Fn(&mut Case<f32>), flags: Flags) {
    let (mut rng, seed) = seeded();
    let shape = Shape { batch: 1, len: 65_536, d_inner: 18, d_state: 4 };
    let mut case = Case::<f32>::new(&mut rng, shape, flags);
    set(&mut case);
    let reference = case.reference();
    for device in Device::all() {
        case.run(device).assert_close(&reference, selective_scan::DType::F32, &|| format!("SEED={seed} {device:?}"));
    }
}

#[test]
fn long_sequences() {
    long(|_| {}, Flags::mamba());
}

/// Δ·A near zero: nothing is ever forgotten, and whatever is lost in a step is lost 65,536 times.
#[test]
fn long_memory() {
    long(|case| case.a.iter_mut().for_each(|a| *a *= 1e-5), Flags::mamba());
    long(|case| case.a.iter_mut().for_each(|a| *a *= 1e-9), Flags { hold: true, ..Flags::mamba() });
}

/// The same step size at every step: the error of a decay that is rounded would always have the same sign.
#[test]
fn long_memory_with_a_constant_step() {
    let set = |case: &mut Case<f32>| {
        for t in 0..case.shape.len {
            (0..case.shape.d_inner).for_each(|i| case.delta.set([0, t, i], 0.1 + i as f32 * 0.01));
        }
        case.a.iter_mut().for_each(|a| *a *= 1e-3);
    };
    long(set, Flags { z: true, d: true, ..Flags::default() });
}

/// The same input at every step too, and nothing forgotten: while a state lies between two powers of two, every step is
/// rounded by the same amount in the same direction. If that is not made good, the 8,192 steps of a segment add up to 1e-4.
#[test]
fn long_memory_of_a_constant_input() {
    let set = |case: &mut Case<f32>| {
        let Shape { len, d_inner, d_state, .. } = case.shape;
        for (t, i) in (0..len).flat_map(|t| (0..d_inner).map(move |i| (t, i))) {
            case.u.set([0, t, i], 0.3 + i as f32 * 0.01);
            case.delta.set([0, t, i], 0.1 + i as f32 * 0.01);
        }
        case.b.iter_mut().enumerate().for_each(|(i, b)| *b = 0.5 + (i % d_state) as f32 * 0.1);
        case.a.iter_mut().for_each(|a| *a *= 1e-9);
    };
    long(set, Flags { z: true, d: true, ..Flags::default() });
    long(set, Flags { z: true, d: true, hold: true, ..Flags::default() });
}

/// Δ·A far below -100: nothing is remembered.
#[test]
fn strong_decay() {
    long(|case| case.a.iter_mut().for_each(|a| *a *= 1e5), Flags::mamba());
    long(|case| case.a.iter_mut().for_each(|a| *a *= 1e5), Flags { hold: true, ..Flags::mamba() });
}
