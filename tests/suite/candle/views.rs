//! Tensors that are not contiguous.

use candle_core::{Device, Tensor, WithDType};
use half::bf16;
use selective_scan::Element;
use selective_scan::candle::{CausalConv, Scan};

use super::{Problem, tensor, track, values, weighted};
use crate::scan::case::{Case, Flags, Shape};
use crate::support::draw::{Draw, seeded};

const SHAPE: Shape = Shape { batch: 2, len: 11, d_inner: 4, d_state: 4 };

/// Parts of projections, a transposed activation and a broadcast one, beside contiguous copies of them: the same results,
/// to the bit where sums have one order, and each part's gradient in its place of the whole.
pub fn parts_of_projections<T: Element + WithDType>(device: &Device) {
    let (mut rng, seed) = seeded();
    let case = Case::<T>::new(&mut rng, SHAPE, Flags { initial_state: true, ..Flags::mamba() });
    let problem = Problem::new(&case, device, |_| true);
    let whole = |tensors: &[&Tensor], dim: usize| {
        let detached: Vec<_> = tensors.iter().map(|tensor| tensor.detach()).collect();
        track(Tensor::cat(&detached, dim).expect("tensors that fit"), true)
    };
    let [b, c] = ["b", "c"].map(|name| problem.get(name).squeeze(2).expect("one group"));
    let u_and_z = whole(&[problem.get("u"), problem.get("z")], 2);
    let c_and_b = whole(&[&c, &b], 2);
    let delta = track(problem.get("delta").transpose(1, 2).and_then(|t| t.contiguous()).expect("three"), true);
    let a = track(problem.get("a").t().and_then(|t| t.contiguous()).expect("two"), true);

    let chunks = u_and_z.chunk(2, 2).expect("two halves");
    let (transposed, columns) = (delta.transpose(1, 2).expect("three"), a.t().expect("two"));
    let [late, early] = [SHAPE.d_state, 0].map(|at| c_and_b.narrow(2, at, SHAPE.d_state).expect("a range"));
    assert!(![&chunks[0], &chunks[1], &transposed, &columns, &late, &early].iter().any(|t| t.is_contiguous()));
    let strided = Scan {
        u: &chunks[0],
        z: Some(&chunks[1]),
        delta: &transposed,
        a: &columns,
        b: &late,
        c: &early,
        ..problem.scan()
    };
    let (out, state) = strided.forward_with_state().expect("the case is valid");
    let (contiguous_out, contiguous_state) = problem.scan().forward_with_state().expect("the case is valid");
    // Kernels for views and for what is contiguous may sum over channels and over states in different orders. The terms
    // carry an error of 2^-10 where the result is a bf16 and 2^-20 otherwise, and a bf16 is rounded by another 2^-9; four
    // of each is far from what a wrong stride would do.
    let assert_same_sums = |got: Vec<f64>, wanted: Vec<f64>| {
        let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
        let error: Vec<f64> = got.iter().zip(&wanted).map(|(x, y)| x - y).collect();
        let precision = if <T as Element>::DTYPE == selective_scan::DType::F32 { -18 } else { -7 };
        let tolerance = if device.is_cpu() { 0.0 } else { 2f64.powi(precision) * norm(&wanted) };
        assert!(got.len() == wanted.len() && norm(&error) <= tolerance, "seed {seed}: {got:?} {wanted:?}");
    };
    assert_same_sums(values(&out), values(&contiguous_out));
    assert_eq!(values(&state), values(&contiguous_state), "seed {seed}");

    let ours = weighted(&out, &problem.d_out).backward().expect("a loss");
    let contiguous = weighted(&contiguous_out, &problem.d_out).backward().expect("a loss");
    let expected = |name| contiguous.get(problem.get(name)).expect("tracked").detach();
    let flat = |name| expected(name).squeeze(2).expect("one group");
    let gradient = |tensor: &Tensor| values(ours.get(tensor).expect("tracked"));
    let cat = |tensors: [Tensor; 2]| values(&Tensor::cat(&tensors, 2).expect("tensors that fit"));
    assert_eq!(gradient(&u_and_z), cat([expected("u"), expected("z")]), "seed {seed}");
    assert_same_sums(gradient(&c_and_b), cat([flat("c"), flat("b")]));
    assert_eq!(gradient(&delta), values(&expected("delta").transpose(1, 2).expect("three")), "seed {seed}");
    assert_eq!(gradient(&a), values(&expected("a").t().expect("two")), "seed {seed}");
}

#[test]
fn chunks_narrows_and_transposes_have_the_bits_of_copies() {
    parts_of_projections::<f32>(&Device::Cpu);
    parts_of_projections::<bf16>(&Device::Cpu);
}

/// A tensor repeated along a dimension without a copy; candle sums its gradient.
pub fn broadcast(device: &Device) {
    let (mut rng, seed) = seeded();
    let case = Case::<f32>::new(&mut rng, SHAPE, Flags::mamba());
    let problem = Problem::new(&case, device, |_| true);
    let one = track(problem.get("b").narrow(0, 0, 1).and_then(|b| b.contiguous()).expect("a row").detach(), true);
    let repeated = one.broadcast_as(problem.get("b").shape()).expect("the shape fits");
    let copied = track(repeated.contiguous().expect("a copy").detach(), true);
    let run = |b: &Tensor| Scan { b, ..problem.scan() }.forward().expect("the case is valid");
    let (ours, expected) = (run(&repeated), run(&copied));
    assert_eq!(values(&ours), values(&expected), "seed {seed}");
    let gradients = |out: &Tensor| weighted(out, &problem.d_out).backward().expect("a loss");
    let (ours, expected) = (gradients(&ours), gradients(&expected));
    let expected = expected.get(&copied).and_then(|gradient| gradient.sum_keepdim(0).ok()).expect("tracked");
    assert_eq!(values(ours.get(&one).expect("tracked")), values(&expected), "seed {seed}");
}

#[test]
fn a_broadcast_has_the_bits_of_copies() {
    broadcast(&Device::Cpu);
}

/// The convolution of a half of a projection's output, and of a transposed one.
pub fn convolution(device: &Device) {
    let (_, seed) = seeded();
    let mut draw = Draw::new(seed);
    let (weight, projected) = (draw.uniform::<f32>(12, -1.0, 1.0), draw.uniform::<f32>(2 * 5 * 7, -1.0, 1.0));
    let weight = Tensor::from_vec(weight, (3, 4), device).expect("as many as the shape says");
    let wide = track(Tensor::from_vec(projected, (2, 5, 7), device).expect("as many as the shape says"), true);
    let columns = wide.narrow(2, 3, 3).expect("a range");
    let copied = track(columns.contiguous().expect("a copy").detach(), true);
    let turned = track(copied.transpose(1, 2).and_then(|t| t.contiguous()).expect("three").detach(), true);
    let transposed = turned.transpose(1, 2).expect("three");
    let run = |x: &Tensor| {
        let out = CausalConv::new(x, &weight).forward().expect("valid");
        let gradients = out.sqr().and_then(|t| t.sum_all()).and_then(|loss| loss.backward()).expect("a loss");
        (values(&out), gradients)
    };
    let ((out, gradients), (sliced, of_slice), (turned_out, of_turned)) =
        (run(&copied), run(&columns), run(&transposed));
    assert!(out == sliced && out == turned_out, "seed {seed}");
    let expected = gradients.get(&copied).expect("tracked");
    let of_slice = of_slice.get(&wide).and_then(|gradient| gradient.narrow(2, 3, 3).ok()).expect("tracked");
    let of_turned = of_turned.get(&turned).and_then(|gradient| gradient.transpose(1, 2).ok()).expect("tracked");
    assert!(values(expected) == values(&of_slice) && values(expected) == values(&of_turned), "seed {seed}");
}

#[test]
fn a_convolution_of_views_has_the_bits_of_copies() {
    convolution(&Device::Cpu);
    // The helper that all of these tests rest on.
    let mut draw = Draw::new(1);
    let strided = draw.activation::<f32>([2, 3, 4]);
    let view = strided.view();
    assert_eq!(
        values(&tensor(&view, &Device::Cpu))[17],
        f64::from(view.data[view.offset + view.strides[0] + view.strides[1] + view.strides[2]])
    );
}
