//! The operators of a decoding step at the sizes of mamba-1.4b and mamba-130m: `cargo bench --bench decode`. A product is
//! bound by reading the matrix, so throughput counts its bytes; `read` adds up as many bytes and does nothing else.

#[path = "../examples/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use rayon::ThreadPool;
use rayon::prelude::*;
use selective_scan::decode::{Linear, LinearMut, SelectiveUpdate, SelectiveUpdateMut, cpu};
use selective_scan::{Element, Isa, View, ViewMut};

use common::{Random, default_threads, pools, touched};

/// Features and columns: the first projection of a block, in the two models.
const PRODUCTS: [[usize; 2]; 2] = [[2048, 8192], [768, 3072]];
/// Sequences that are decoded together.
const ROWS: [usize; 3] = [1, 2, 4];
/// d_inner, d_state, dt_rank.
const UPDATES: [[usize; 3]; 2] = [[4096, 16, 128], [1536, 16, 48]];
const SEED: u64 = 1;

fn products(criterion: &mut Criterion) {
    for pool in pools(&default_threads()).expect("threads can be started") {
        for size in PRODUCTS {
            read(criterion, &pool, size);
            for isa in Isa::available() {
                product::<f32>(criterion, &pool, isa, "f32", size);
                product::<bf16>(criterion, &pool, isa, "bf16", size);
                product::<f16>(criterion, &pool, isa, "f16", size);
            }
        }
    }
}

fn read(criterion: &mut Criterion, pool: &ThreadPool, [features, columns]: [usize; 2]) {
    for (name, len) in [("4 bytes", features * columns / 2), ("2 bytes", features * columns / 4)] {
        let data: Vec<u64> = (0..len as u64).collect();
        let mut group = criterion.benchmark_group(format!("read/{features} to {columns}"));
        let id = format!("{name}, {} threads", pool.current_num_threads());
        group.throughput(Throughput::Bytes(8 * len as u64)).bench_function(id, |bencher| {
            let sum = |part: &[u64]| part.iter().fold(0u64, |sum, x| sum.wrapping_add(*x));
            pool.install(|| {
                bencher.iter(|| black_box(&data).par_chunks(1 << 14).map(sum).reduce(|| 0, u64::wrapping_add))
            })
        });
        group.finish();
    }
}

fn product<T: Element>(
    criterion: &mut Criterion,
    pool: &ThreadPool,
    isa: Isa,
    dtype: &str,
    [features, columns]: [usize; 2],
) {
    let random = &mut Random::new(SEED);
    let weight = random.normal::<T>(features * columns);
    for rows in ROWS {
        let x = random.normal::<T>(rows * features);
        let mut out = touched::<T>(rows * columns);
        let inputs = Linear::new(View::new(&x, [rows, features]), View::new(&weight[..], [columns, features]));
        let mut group = criterion.benchmark_group(format!("decode/{dtype}/{features} to {columns}"));
        let id = BenchmarkId::new(format!("{rows} rows"), format!("{isa:?}, {} threads", pool.current_num_threads()));
        group.throughput(Throughput::Bytes(size_of_val(&weight[..]) as u64)).bench_function(id, |bencher| {
            pool.install(|| {
                bencher.iter(|| {
                    let outputs = LinearMut::new(&mut out[..]);
                    cpu::linear_with(isa, black_box(&inputs), outputs).expect("the inputs fit together");
                })
            });
        });
        group.finish();
    }
}

/// A step of one row; throughput counts states.
fn updates(criterion: &mut Criterion) {
    for pool in pools(&default_threads()).expect("threads can be started") {
        for size in UPDATES {
            update::<f32>(criterion, &pool, "f32", size);
            update::<bf16>(criterion, &pool, "bf16, states f32", size);
        }
    }
}

fn update<T: Element>(
    criterion: &mut Criterion,
    pool: &ThreadPool,
    dtype: &str,
    [d_inner, d_state, dt_rank]: [usize; 3],
) {
    let random = &mut Random::new(SEED);
    let u = random.normal::<T>(d_inner);
    let columns = random.normal::<T>(dt_rank + 2 * d_state);
    let dt_weight: Vec<T> = random.normal(d_inner * dt_rank);
    let a: Vec<f32> = (0..d_inner * d_state).map(|i| -((i % d_state + 1) as f32)).collect();
    let mut state = random.normal::<f32>(d_inner * d_state);
    let mut out = touched::<T>(d_inner);
    let row = View::new(&u[..], [1, d_inner]);
    let inputs = SelectiveUpdate {
        z: Some(row),
        ..SelectiveUpdate::new(
            row,
            View::new(&columns, [1, dt_rank + 2 * d_state]),
            View::new(&dt_weight, [d_inner, dt_rank]),
            View::new(&a, [d_inner, d_state]),
        )
    };
    let mut group = criterion.benchmark_group(format!("decode/update/{dtype}"));
    let id = format!("{d_inner}, {} threads", pool.current_num_threads());
    group.throughput(Throughput::Elements((d_inner * d_state) as u64)).bench_function(id, |bencher| {
        pool.install(|| {
            bencher.iter(|| {
                let state = ViewMut::new(&mut state[..], [1, d_inner, d_state]);
                let outputs = SelectiveUpdateMut::new(state, &mut out[..]);
                cpu::selective_update(black_box(&inputs), outputs).expect("the inputs fit together");
            })
        });
    });
    group.finish();
}

fn config() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(700))
}

criterion_group! { name = benches; config = config(); targets = products, updates }
criterion_main!(benches);
