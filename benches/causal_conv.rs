//! The causal convolution at the size of mamba-130m: `cargo bench --bench causal_conv`. Throughput counts elements of
//! the input.

#[path = "../examples/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use rayon::ThreadPool;
use selective_scan::conv::{Gradients, Inputs, OutputMut, cpu};
use selective_scan::{Element, Isa, View};

use common::{ConvData, Random, default_threads, pools, touched};

/// B, L, D, W.
const SHAPE: [usize; 4] = [1, 2048, 1536, 4];
const SEED: u64 = 1;

/// Each instruction set of this processor, on one thread and on all.
fn instruction_sets(criterion: &mut Criterion) {
    all_instruction_sets::<f32>(criterion, "f32");
    all_instruction_sets::<bf16>(criterion, "bf16");
}

fn all_instruction_sets<T: Element>(criterion: &mut Criterion, dtype: &str) {
    let data = ConvData::<T>::random(&mut Random::new(SEED), SHAPE);
    for pool in pools(&default_threads()).expect("threads can be started") {
        for isa in Isa::available() {
            bench(criterion, &pool, isa, dtype, &data, &data.inputs());
        }
    }
}

/// The same storage read as `(batch, d_inner, length)`, and packed sequences.
fn layouts(criterion: &mut Criterion) {
    let data = ConvData::<f32>::random(&mut Random::new(SEED), SHAPE);
    let cu_seqlens = [0, 7, 100, 101, 613, 700, 1234, 1300, 1301, 1950, SHAPE[1]];
    let packed = Inputs { cu_seqlens: Some(&cu_seqlens), ..data.inputs() };
    for pool in pools(&default_threads()).expect("threads can be started") {
        bench(criterion, &pool, Isa::best(), "f32, channels last", &data, &data.inputs());
        bench(criterion, &pool, Isa::best(), "f32, time contiguous", &data, &data.time_contiguous());
        bench(criterion, &pool, Isa::best(), "f32, packed", &data, &packed);
    }
}

fn bench<T: Element>(
    criterion: &mut Criterion,
    pool: &ThreadPool,
    isa: Isa,
    variant: &str,
    data: &ConvData<T>,
    inputs: &Inputs<T>,
) {
    let id = format!("{isa:?}, {} threads", pool.current_num_threads());
    let throughput = Throughput::Elements(data.x.len() as u64);
    let mut out = touched::<T>(data.x.len());

    let mut group = criterion.benchmark_group(format!("causal_conv forward/{variant}"));
    group.throughput(throughput.clone()).bench_function(&id, |bencher| {
        pool.install(|| {
            bencher.iter(|| {
                let outputs = OutputMut { out: &mut out[..], final_state: None };
                cpu::forward_with(isa, black_box(inputs), outputs).expect("the inputs fit together");
            })
        });
    });
    group.finish();

    let d_outputs = View::new(&data.d_out, inputs.x.shape).into();
    let mut gradients = Gradients::zeroed(inputs).expect("the inputs fit together");
    let mut group = criterion.benchmark_group(format!("causal_conv backward/{variant}"));
    group.throughput(throughput).bench_function(&id, |bencher| {
        pool.install(|| {
            bencher.iter(|| {
                cpu::backward_with(isa, black_box(inputs), d_outputs, gradients.as_mut())
                    .expect("the inputs fit together");
            })
        });
    });
    group.finish();
}

fn config() -> Criterion {
    Criterion::default().sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(2))
}

criterion_group! { name = benches; config = config(); targets = instruction_sets, layouts }
criterion_main!(benches);
