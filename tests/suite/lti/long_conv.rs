//! The long convolution by Fourier transforms.

use half::bf16;
use rand::Rng;
use rand::rngs::StdRng;
use selective_scan::lti::long_conv::{Gradients, Inputs, cpu, reference};
use selective_scan::lti::s4d;
use selective_scan::{Element, View};

use super::s4d::case::{Case, Shape};
use crate::support::draw::{Draw, seeded};
use crate::support::strided::{Layout, Strided};
use crate::support::tolerance::{assert_close_to, bits};
use crate::support::vectors::{FORWARD, GRADIENTS};

struct Problem<T> {
    u: Strided<T>,
    d_out: Strided<T>,
    kernel: Vec<f32>,
    kernel_length: usize,
    d: Option<Vec<f32>>,
    cu_seqlens: Option<Vec<usize>>,
    reverse: bool,
}

impl<T: Element> Problem<T> {
    fn draw(rng: &mut StdRng) -> Self {
        let mut draw = Draw::new(rng.random());
        let packed = draw.flag();
        let (length, d_inner) = (draw.one_of(&[1, 2, 31, 64, 200]), draw.one_of(&[1, 5, 16, 37]));
        let shape = [if packed { 1 } else { 2 }, length, d_inner];
        let mut activation = || {
            let layout = Layout { time_contiguous: draw.flag(), column_slice: draw.flag() };
            let mut values = draw.uniform::<f32>(shape.iter().product(), -1.0, 1.0).into_iter();
            Strided::new(shape, layout, || values.next().expect("as many as there are"))
        };
        let (u, d_out) = (activation(), activation());
        let kernel_length = draw.one_of(&[1, 3, length, length + 7]);
        let cut = rng.random_range(0..=length);
        Self {
            u,
            d_out,
            kernel: draw.uniform(d_inner * kernel_length, -1.0, 1.0),
            kernel_length,
            d: draw.flag().then(|| draw.uniform(d_inner, -1.0, 1.0)),
            cu_seqlens: packed.then(|| vec![0, cut, cut, length]),
            reverse: draw.flag(),
        }
    }

    fn inputs(&self) -> Inputs<'_, T> {
        let d_inner = self.u.shape[2];
        Inputs {
            d: self.d.as_ref().map(|d| View::new(d, [d_inner])),
            cu_seqlens: self.cu_seqlens.as_deref(),
            reverse: self.reverse,
            ..Inputs::new(self.u.view(), View::new(&self.kernel, [d_inner, self.kernel_length]))
        }
    }
}

/// A transform rounds each of its numbers log2 of 512 times, to 2^-24 of their norm: 5e-7 of `‖K‖ ‖u‖`, which the norm
/// of all outputs together comes to, but where there are a few only.
fn hold<T: Element>(problem: &Problem<T>, what: &str) {
    let inputs = problem.inputs();
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
    let [_, length, d_inner] = problem.u.shape;
    let entering = norm(&mut problem.kernel.iter().copied()) * (length as f64 / d_inner as f64).sqrt() * 0.5;
    let got = inputs.forward().unwrap();
    assert_close_to(&got, &reference::forward(&inputs).unwrap(), FORWARD, entering, what);
    let (got, want) =
        (inputs.backward(problem.d_out.view()).unwrap(), reference::backward(&inputs, problem.d_out.view()).unwrap());
    assert_close_to(&got.u, &want.u, GRADIENTS, entering, &format!("{what}: u"));
    let steps = (length as f64 * d_inner as f64).sqrt();
    assert_close_to(&got.kernel, &want.kernel, GRADIENTS, steps, &format!("{what}: kernel"));
    if let (Some(got), Some(want)) = (&got.d, &want.d) {
        assert_close_to(got, want, GRADIENTS, steps, &format!("{what}: d"));
    }
}

#[test]
fn transforms_are_the_sum() {
    let (mut rng, seed) = seeded();
    for _ in 0..40 {
        hold(&Problem::<f32>::draw(&mut rng), &format!("SEED={seed}"));
        hold(&Problem::<bf16>::draw(&mut rng), &format!("SEED={seed}"));
    }
}

/// The reference's slopes against differences, of a loss that is linear in all of them one by one.
#[test]
fn the_reference_is_differentiated_rightly() {
    let (mut rng, seed) = seeded();
    for _ in 0..5 {
        let mut problem = Problem::<f32>::draw(&mut rng);
        let want = reference::backward(&problem.inputs(), problem.d_out.view()).unwrap();
        let dense = problem.d_out.dense();
        let loss = |problem: &Problem<f32>| {
            let out = reference::forward(&problem.inputs()).unwrap();
            out.iter().zip(&dense.data).map(|(y, d)| y * f64::from(*d)).sum::<f64>()
        };
        let zero = loss(&problem);
        let k = rng.random_range(0..problem.kernel.len());
        problem.kernel[k] += 1.0;
        // Sums of at most 2·200·37 terms of about 1, in f64; f32 rounds the change by 2^-24.
        let got = loss(&problem) - zero;
        assert!(
            (got - want.kernel[k]).abs() < 1e-4 * (1.0 + got.abs()),
            "kernel {k}: {got} {}, SEED={seed}",
            want.kernel[k]
        );
        problem.kernel[k] -= 1.0;
        let [batch, length, d_inner] = problem.u.shape;
        let at = [rng.random_range(0..batch), rng.random_range(0..length), rng.random_range(0..d_inner)];
        let before = loss(&problem);
        *problem.u.at_mut(at) += 1.0;
        let (got, want) = (loss(&problem) - before, want.u[(at[0] * length + at[1]) * d_inner + at[2]]);
        assert!((got - want).abs() < 1e-4 * (1.0 + got.abs()), "u {at:?}: {got} {want}, SEED={seed}");
    }
}

/// The convolution with S4D's kernel is S4D: 1e-6 of what comes in on either side.
#[test]
fn s4d_is_the_convolution_with_its_kernel() {
    let (mut rng, seed) = seeded();
    for length in [1, 100, 65_536] {
        let mut draw = Draw::new(rng.random());
        let shape = Shape { batch: 1, length, d_inner: 3, d_state: 8, with_state: false, ..Shape::default() };
        let case = Case::<f32>::new(shape, &mut draw);
        let kernel = s4d::cpu::kernel(&case.inputs(), length).unwrap();
        let inputs = case.inputs();
        let by_transforms = Inputs { d: inputs.d, ..Inputs::new(inputs.u, View::new(&kernel, [3, length])) };
        let want = s4d::reference::forward(&inputs).unwrap();
        let size = (length as f64).sqrt() * 0.5;
        assert_close_to(&by_transforms.forward().unwrap(), &want.out, FORWARD, size, &format!("{length}, SEED={seed}"));
    }
}

/// A packed sequence gives the bits of the same alone.
#[test]
fn packed_is_alone() {
    let (mut rng, seed) = seeded();
    let problem = Problem::<f32> { reverse: false, ..Problem::draw(&mut rng) };
    let [_, length, d_inner] = problem.u.shape;
    let cuts = [0, length / 3, length / 3, length];
    let row = problem.u.row(0);
    let inputs = Inputs { u: row.view(), cu_seqlens: Some(&cuts), ..problem.inputs() };
    let all = inputs.forward().unwrap();
    for pair in cuts.windows(2) {
        let part = row.steps(pair[0]..pair[1]);
        let one = Inputs { u: part.view(), cu_seqlens: None, ..inputs }.forward().unwrap();
        assert_eq!(bits(&one), bits(&all[pair[0] * d_inner..pair[1] * d_inner]), "{pair:?}, SEED={seed}");
    }
}

#[test]
fn bad_arguments_are_named() {
    let data = [0.0f32; 100];
    let u = View::new(&data, [2, 5, 3]);
    let refused = |inputs: Inputs<f32>, text: &str| {
        let mut out = [7.0; 30];
        assert_eq!(cpu::forward(&inputs, &mut out).unwrap_err().to_string(), text);
        assert_eq!(out, [7.0; 30], "{text}: something was written");
    };
    refused(
        Inputs::new(u, View::new(&data, [3, 0])),
        "`kernel`: expected at least one step as its last dimension, got shape [3, 0]",
    );
    refused(
        Inputs::new(u, View::new(&data, [4, 2])),
        "`kernel`: expected shape (d_inner, kernel_length) = [3, 2], got [4, 2]",
    );
    let inputs = Inputs::new(u, View::new(&data, [3, 2]));
    refused(Inputs { d: Some(View::new(&data, [2])), ..inputs }, "`d`: expected shape (d_inner) = [3], got [2]");
    let error = cpu::forward(&inputs, &mut [0.0; 29]).unwrap_err().to_string();
    assert_eq!(error, "`out`: expected (batch, length, d_inner) = [2, 5, 3] elements, got 29 elements");
    let empty = Inputs::new(View::new(&data, [2, 0, 3]), inputs.kernel);
    assert!(empty.forward().unwrap().is_empty());
    assert_eq!(Gradients::zeroed(&empty).unwrap().kernel, [0.0; 6]);
}
