//! The state update of decoding at the size of mamba-130m: `cargo bench --bench state_update`. Throughput counts states.

#[path = "../examples/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use rayon::ThreadPool;
use selective_scan::state_update::{UpdateMut, cpu};
use selective_scan::{Element, Isa, ViewMut};

use common::{Random, UpdateData, default_threads, pools, touched};

/// D, N.
const CHANNELS: [usize; 2] = [1536, 16];
/// Sequences that are decoded together.
const BATCHES: [usize; 3] = [1, 8, 64];
const SEED: u64 = 1;

fn decode(criterion: &mut Criterion) {
    for pool in pools(&default_threads()).expect("threads can be started") {
        for batch in BATCHES {
            for isa in Isa::available() {
                // Activations and states of one type, and what is common beside: half activations, f32 states.
                bench::<f32, f32>(criterion, &pool, isa, "f32", batch);
                bench::<bf16, f32>(criterion, &pool, isa, "bf16, states f32", batch);
                bench::<bf16, bf16>(criterion, &pool, isa, "bf16", batch);
            }
        }
    }
}

fn bench<T: Element, St: Element>(criterion: &mut Criterion, pool: &ThreadPool, isa: Isa, dtype: &str, batch: usize) {
    let data = UpdateData::<T>::random(&mut Random::new(SEED), [batch, CHANNELS[0], CHANNELS[1]]);
    let inputs = data.inputs();
    let mut state: Vec<St> = data.state.iter().map(|&h| St::from_f32(h)).collect();
    let mut out = touched::<T>(data.u.len());
    let mut group = criterion.benchmark_group(format!("state_update/{dtype}/batch {batch}"));
    let id = format!("{isa:?}, {} threads", pool.current_num_threads());
    group.throughput(Throughput::Elements(state.len() as u64)).bench_function(id, |bencher| {
        pool.install(|| {
            bencher.iter(|| {
                let state = ViewMut::new(&mut state[..], data.state_shape());
                let outputs = UpdateMut { state, out: &mut out[..], token_states: None };
                cpu::update_with(isa, black_box(&inputs), outputs).expect("the inputs fit together");
            })
        });
    });
    group.finish();
}

fn config() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(1))
}

criterion_group! { name = benches; config = config(); targets = decode }
criterion_main!(benches);
