//! Small problems that pass through every unsafe block of the CPU path, for interpreters that check memory (`tests/miri.sh`).

use half::bf16;
use selective_scan::Isa;

use crate::case::{Case, Device, Flags, Shape, seeded};

fn on_two_threads(work: impl FnOnce() + Send) {
    rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("a pool of threads").install(work);
}

/// Columns of ragged width written from two threads, checkpoints, packed sequences, every gradient.
#[test]
fn scan() {
    on_two_threads(|| {
        for row in [7, 11, 13] {
            let shape = Shape { batch: 2, len: if cfg!(miri) { 3 } else { 66 }, d_inner: 18, d_state: 1 };
            let case = Case::<bf16>::new(&mut seeded().0, shape, Flags::pairwise(row));
            case.check(Device::Cpu(Isa::Portable), &|| format!("row {row}"));
        }
    });
}

/// Split sequences, whose segments are written from different threads.
#[test]
fn split_scan() {
    on_two_threads(|| {
        let shape = Shape { batch: 1, len: 2048, d_inner: 2, d_state: 1 };
        let case = Case::<f32>::new(&mut seeded().0, shape, Flags::mamba());
        case.check(Device::Cpu(Isa::Portable), &|| "split".into());
    });
}
