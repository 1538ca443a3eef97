//! S4D at the size of its papers' larger models: `cargo bench --features lti --bench s4d`. Throughput counts steps
//! times channels times pairs. Beside it the same by kernel and Fourier transforms.

#[path = "../examples/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rand::Rng;
use rayon::ThreadPool;
use selective_scan::lti::long_conv;
use selective_scan::lti::s4d::{Gradients, Inputs, OutputMut, UpdateInputs, UpdateMut, cpu, recurrence};
use selective_scan::{Isa, View, ViewMut};

use common::{Random, default_threads, pools, touched};

/// B, L, D.
const SHAPE: [usize; 3] = [1, 4096, 256];
const SEED: u64 = 1;

/// The numbers of a problem with `pairs` states.
struct Data {
    shape: [usize; 3],
    pairs: usize,
    u: Vec<f32>,
    log_delta: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
}

impl Data {
    fn random(shape: [usize; 3], pairs: usize) -> Self {
        let mut random = Random::new(SEED);
        let d_inner = shape[2];
        // S4D-Lin.
        let a = (0..d_inner * pairs).flat_map(|i| [-0.5, std::f32::consts::PI * (i % pairs) as f32]).collect();
        Self {
            shape,
            pairs,
            u: random.fill(shape.iter().product(), |random| random.random_range(-1.0..1.0)),
            log_delta: random.fill(d_inner, |random| random.random_range(-6.9..-2.3)),
            a,
            b: random.fill(2 * d_inner * pairs, |random| random.random_range(-1.0..1.0)),
            c: random.fill(2 * d_inner * pairs, |random| random.random_range(-1.0..1.0)),
        }
    }

    fn inputs(&self) -> Inputs<'_, f32> {
        let complex = |data| View::new(data, [self.shape[2], 2 * self.pairs]);
        let log_delta = View::new(&self.log_delta, [self.shape[2]]);
        Inputs::new(View::new(&self.u, self.shape), log_delta, complex(&self.a), complex(&self.b), complex(&self.c))
    }
}

fn sequences(criterion: &mut Criterion) {
    for pool in pools(&default_threads()).expect("threads can be started") {
        for pairs in [4, 32, 256] {
            let data = Data::random(SHAPE, pairs);
            for isa in Isa::available() {
                bench(criterion, &pool, isa, &data);
            }
            convolution(criterion, &pool, &data);
        }
        let long = Data::random([1, 65_536, 16], 32);
        bench(criterion, &pool, Isa::best(), &long);
        convolution(criterion, &pool, &long);
    }
}

fn bench(criterion: &mut Criterion, pool: &ThreadPool, isa: Isa, data: &Data) {
    let inputs = data.inputs();
    let id = format!("{isa:?}, {} threads", pool.current_num_threads());
    let throughput = Throughput::Elements((data.u.len() * data.pairs) as u64);
    let mut out = touched::<f32>(data.u.len());
    let name = format!("{} pairs, {} steps", data.pairs, data.shape[1]);

    let mut group = criterion.benchmark_group(format!("s4d forward/{name}"));
    group.throughput(throughput.clone()).bench_function(&id, |bencher| {
        pool.install(|| {
            bencher.iter(|| {
                let outputs = OutputMut::new(&mut out[..]);
                cpu::forward_with(isa, black_box(&inputs), outputs).expect("the inputs fit together");
            })
        });
    });
    group.finish();

    let d_outputs = View::new(&data.u, data.shape).into();
    let mut gradients = Gradients::zeroed(&inputs).expect("the inputs fit together");
    let mut group = criterion.benchmark_group(format!("s4d backward/{name}"));
    group.throughput(throughput).bench_function(&id, |bencher| {
        pool.install(|| {
            bencher.iter(|| {
                cpu::backward_with(isa, black_box(&inputs), d_outputs, gradients.as_mut())
                    .expect("the inputs fit together");
            })
        });
    });
    group.finish();
}

/// The kernel and the convolution with it, each by itself.
fn convolution(criterion: &mut Criterion, pool: &ThreadPool, data: &Data) {
    let inputs = data.inputs();
    let threads = pool.current_num_threads();
    let throughput = Throughput::Elements((data.u.len() * data.pairs) as u64);
    let (length, d_inner) = (data.shape[1], data.shape[2]);
    let kernel = cpu::kernel(&inputs, length).expect("the inputs fit together");
    let mut out = touched::<f32>(data.u.len());
    let mut group = criterion.benchmark_group(format!("s4d by transforms/{} pairs, {length} steps", data.pairs));
    group.throughput(throughput);
    group.bench_function(format!("kernel, {threads} threads"), |bencher| {
        pool.install(|| bencher.iter(|| cpu::kernel(black_box(&inputs), length).expect("the inputs fit together")));
    });
    let long = long_conv::Inputs::new(inputs.u, View::new(&kernel, [d_inner, length]));
    group.bench_function(format!("convolution, {threads} threads"), |bencher| {
        pool.install(|| {
            bencher.iter(|| long_conv::cpu::forward(black_box(&long), &mut out).expect("the inputs fit together"))
        });
    });
    group.finish();
}

fn decode(criterion: &mut Criterion) {
    let data = Data::random([8, 1, 1536], 32);
    let inputs = data.inputs();
    let steps = recurrence(inputs.log_delta, inputs.a, inputs.b, inputs.options.rule).expect("the inputs fit together");
    let update = UpdateInputs::new(inputs.u, View::new(&steps, [1536, 6, 32]), inputs.c);
    let (mut state, mut out) = (touched::<f32>(8 * 1536 * 64), touched::<f32>(data.u.len()));
    for pool in pools(&default_threads()).expect("threads can be started") {
        let mut group = criterion.benchmark_group("s4d update/batch 8");
        group.throughput(Throughput::Elements((data.u.len() * data.pairs) as u64));
        for isa in Isa::available() {
            group.bench_function(format!("{isa:?}, {} threads", pool.current_num_threads()), |bencher| {
                pool.install(|| {
                    bencher.iter(|| {
                        let state = ViewMut::new(&mut state[..], [8, 1536, 64]);
                        cpu::update_with(isa, black_box(&update), UpdateMut::new(state, &mut out[..]))
                            .expect("the inputs fit together");
                    })
                });
            });
        }
        group.finish();
    }
}

fn config() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
}

criterion_group! { name = benches; config = config(); targets = sequences, decode }
criterion_main!(benches);
