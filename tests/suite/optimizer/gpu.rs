//! The same on a GPU, or on a simulated one.

use cudarc::driver::CudaSlice;
use selective_scan::cuda::Cuda;
use selective_scan::optimizer::cuda;

use super::*;
use crate::support::gpu::{Copies, stream};

/// Values on the device, to be copied back.
enum Uploaded<'c> {
    F32(&'c mut CudaSlice<f32>),
    F16(&'c mut CudaSlice<f16>),
    Bf16(&'c mut CudaSlice<bf16>),
}

fn values<T: Element>(data: &mut CudaSlice<T>, offset: usize) -> ViewMut<'_, T, 1, Cuda> {
    let shape = [data.len() - offset];
    ViewMut { data, offset, shape, strides: [1] }
}

fn step_on_gpu(case: &mut Case, gradients: &[Data], learning_rate: f64) -> f64 {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let Case { options, offsets, groups, layout, values: host, mean, mean_square, master, status, .. } = case;
    let gradients: Vec<_> = gradients
        .iter()
        .zip(&*offsets)
        .map(|(data, &offset)| match data.gradient(offset) {
            Gradient::F32(view) => Gradient::F32(copies.view(&view)),
            Gradient::F16(view) => Gradient::F16(copies.view(&view)),
            Gradient::Bf16(view) => Gradient::Bf16(copies.view(&view)),
        })
        .collect();
    let mut counts = stream.clone_htod(&[status.taken, status.skipped, status.streak].map(u64::cast_signed)).unwrap();
    let (scale, norm) = (copies.slice(&[status.scale]), copies.poisoned::<f32>(1));
    let on_device = cuda::StatusMut { counts: &mut counts, scale: &mut *scale };
    let factors = cuda::begin(&stream, options, &gradients, on_device, norm).expect("the case is valid");

    let [mean_on, square_on, master_on] = [&mean[..], &mean_square[..], &master[..]].map(|flat| copies.slice(flat));
    let mut uploaded: Vec<_> = host
        .iter()
        .map(|data| match data {
            Data::F32(data) => Uploaded::F32(copies.slice(data)),
            Data::F16(data) => Uploaded::F16(copies.slice(data)),
            Data::Bf16(data) => Uploaded::Bf16(copies.slice(data)),
        })
        .collect();
    let parameters = uploaded.iter_mut().enumerate().map(|(i, data)| Parameter {
        values: match data {
            Uploaded::F32(data) => Values::F32(values(data, offsets[i])),
            Uploaded::F16(data) => Values::F16(values(data, offsets[i])),
            Uploaded::Bf16(data) => Values::Bf16(values(data, offsets[i])),
        },
        gradient: gradients[i],
        place: layout.places[i],
        group: groups[i],
    });
    let moments = Moments { mean: &mut *mean_on, mean_square: &mut *square_on, master: &mut *master_on };
    cuda::update(&stream, options, learning_rate, &factors, parameters, moments).expect("the case is valid");

    for (from, to) in uploaded.iter().zip(host) {
        match (from, to) {
            (Uploaded::F32(from), Data::F32(to)) => copies.download(from, to),
            (Uploaded::F16(from), Data::F16(to)) => copies.download(from, to),
            (Uploaded::Bf16(from), Data::Bf16(to)) => copies.download(from, to),
            _ => unreachable!("of the same type"),
        }
    }
    for (from, to) in [(&*mean_on, mean), (&*square_on, mean_square), (&*master_on, master)] {
        copies.download(from, to);
    }
    let found = stream.clone_dtoh(&counts).unwrap();
    [status.taken, status.skipped, status.streak] = [found[0], found[1], found[2]].map(i64::cast_unsigned);
    let mut one = [0f32];
    copies.download(scale, &mut one);
    status.scale = one[0];
    copies.download(norm, &mut one);
    one[0].into()
}

/// Without the largest, which a simulated device takes long for.
fn sizes_there() -> Vec<(DType, DType, usize)> {
    let mut sizes = sizes();
    if crate::support::gpu::is_simulated(&stream().expect("a device")) {
        sizes.retain(|&(.., len)| len < 5000);
    }
    sizes
}

#[test]
fn agrees_with_the_reference_on_a_gpu() {
    if stream().is_some() {
        agrees_with_the_reference(step_on_gpu, &sizes_there());
    }
}

#[test]
fn small_steps_add_up_on_a_gpu() {
    if stream().is_some() {
        small_steps_add_up(step_on_gpu);
    }
}

#[test]
fn skips_what_is_not_finite_on_a_gpu() {
    if stream().is_some() {
        skips_what_is_not_finite(step_on_gpu);
    }
}

#[test]
fn large_gradients_are_finite_on_a_gpu() {
    if stream().is_some() {
        large_gradients_are_finite(step_on_gpu);
    }
}

/// Without clipping, where the norm does not enter, a GPU has the bits of the processor; and it has its own again.
#[test]
fn the_bits_are_those_of_slices() {
    if stream().is_none() {
        return;
    }
    let mut random = random();
    for clip in [None, Some(1.0)] {
        let case = Case::new(&mut random, &sizes_there(), Options { clip, ..Options::default() });
        let gradients = [case.gradients(&mut random), case.gradients(&mut random)];
        let run = |step: Step| {
            let mut case = case.clone();
            let norms = gradients.each_ref().map(|gradients| step(&mut case, gradients, 0.01));
            (case.bits(), norms.map(f64::to_bits))
        };
        let first = run(step_on_gpu);
        assert!(first == run(step_on_gpu), "{clip:?}: again");
        if clip.is_none() {
            assert!(first.0 == run(step_on_cpu).0, "those of slices");
        }
    }
}

#[test]
fn buffers_of_other_sizes_are_refused() {
    let Some(stream) = stream() else { return };
    let copies = Copies::new(&stream);
    let gradient = Gradient::F32(copies.view(&View::new(&[1f32, 2.0], [2])));
    for (word, counts, scale, norm) in [("counts", 2, 1, 1), ("scale", 3, 2, 1), ("norm", 3, 1, 2)] {
        let mut counts = stream.clone_htod(&vec![0i64; counts]).unwrap();
        let status = cuda::StatusMut { counts: &mut counts, scale: copies.poisoned(scale) };
        let refused =
            cuda::begin(&stream, &Options::default(), &[gradient], status, copies.poisoned(norm)).unwrap_err();
        assert!(refused.to_string().starts_with(&format!("`{word}`")), "{refused}");
    }
}
