//! The norm's results and gradients.

use candle_core::{D, DType, Device, Result, Tensor, WithDType};
use half::{bf16, f16};
use rand::Rng;
use selective_scan::candle::RmsNorm;
use selective_scan::norm::{BackwardInputs, Inputs, Options, reference};
use selective_scan::{Element, View};

use super::{track, values, weighted};
use crate::support::draw::{Draw, seeded};
use crate::support::tolerance::assert_close;

/// A problem drawn again and again, held to the `f64` reference and to the graph's properties: the gradients are those of
/// exactly the inputs that are tracked, which are drawn too.
pub fn agrees_with_the_reference<X, S, O>(device: &Device, rounds: usize)
where
    X: Element + WithDType,
    S: Element + WithDType,
    O: Element + WithDType,
{
    for round in 0..rounds {
        let (mut rng, seed) = seeded();
        let mut draw = Draw::new(seed);
        let what = format!("round {round}, seed {seed}");
        let (shape, flat) = ([2, 3, 8], [6, 8]);
        let has = |bit: usize| round >> bit & 1 == 1;
        let has_residual = has(0) || <X as Element>::DTYPE != <S as Element>::DTYPE;
        let options = Options { eps: 1e-3, group_size: has(1).then_some(4), norm_before_gate: has(3) };
        let [x, z] = [(); 2].map(|()| draw.uniform::<X>(48, -2.0, 2.0));
        let [residual, d_sum] = [(); 2].map(|()| draw.uniform::<S>(48, -2.0, 2.0));
        let (weight, d_out) = (draw.uniform::<f32>(8, -1.5, 1.5), draw.uniform::<O>(48, -1.0, 1.0));
        let with_sum = draw.flag();

        fn make<T: Element + WithDType>(data: &[T], shape: &[usize], device: &Device, tracked: bool) -> Tensor {
            track(Tensor::from_slice(data, shape, device).expect("as many"), tracked)
        }
        let tracked: [bool; 4] = rng.random();
        let x_tensor = make(&x, &shape, device, tracked[0]);
        let residual_tensor = has_residual.then(|| make(&residual, &shape, device, tracked[1]));
        let weight_tensor = make(&weight, &[8], device, tracked[2]);
        let z_tensor = has(2).then(|| make(&z, &shape, device, tracked[3]));
        let [d_out_tensor, d_sum_tensor] = [make(&d_out, &shape, device, false), make(&d_sum, &shape, device, false)];
        let norm = RmsNorm {
            residual: residual_tensor.as_ref(),
            weight: Some(&weight_tensor),
            z: z_tensor.as_ref(),
            options,
            dtype: <O as WithDType>::DTYPE,
            ..RmsNorm::new(&x_tensor)
        };
        let (out, sum) = norm.forward_with_residual().expect("valid");
        assert_eq!((out.dims(), sum.dims()), (&shape[..], &shape[..]), "{what}");
        assert_eq!((out.dtype(), sum.dtype()), (<O as WithDType>::DTYPE, <S as WithDType>::DTYPE), "{what}");
        let alone = norm.forward().expect("valid");
        assert_eq!(values(&alone), values(&out), "{what}");
        // With and without the sum as a result of its own.
        let out = if with_sum { out } else { alone };
        let mut loss = weighted(&out, &d_out_tensor);
        if with_sum {
            loss = (loss + weighted(&sum, &d_sum_tensor)).expect("two numbers");
        }

        let inputs = Inputs::<X, S> {
            residual: has_residual.then(|| View::new(&residual[..], flat)),
            weight: Some(View::new(&weight[..], [8])),
            z: has(2).then(|| View::new(&z[..], flat)),
            options,
            ..Inputs::new(View::new(&x[..], flat))
        };
        let exact = reference::forward(&inputs).expect("valid");
        // The crate's bounds: 1e-5 in f32, 1e-4 in its gradients, and what the type's rounding explains.
        assert_close(&elements::<S>(&sum), &exact.residual_out, 1e-5, &what);
        // What is normed is the sum as it is rounded to a half type.
        let rounded: Vec<X> =
            elements::<S>(&sum).iter().map(|s| <X as Element>::from_f32(Element::to_f32(*s))).collect();
        let exact = match <S as WithDType>::DTYPE {
            DType::F32 => exact,
            _ => reference::forward(&Inputs { x: View::new(&rounded[..], flat), residual: None, ..inputs })
                .expect("valid"),
        };
        assert_close(&elements::<O>(&out), &exact.out, 1e-5, &what);
        let is_tracked = tracked[0] || has_residual && tracked[1] || tracked[2] || has(2) && tracked[3];
        assert_eq!(out.track_op(), is_tracked, "{what}");
        if !is_tracked {
            continue;
        }
        let store = loss.backward().expect("a loss");
        let s = elements::<S>(&sum);
        let inputs = BackwardInputs::<X, S, O> {
            weight: inputs.weight,
            z: inputs.z,
            d_residual_out: with_sum.then(|| View::new(&d_sum[..], flat)),
            options,
            ..BackwardInputs::new(View::new(&s[..], flat), View::new(&d_out[..], flat))
        };
        let exact = reference::backward(&inputs).expect("valid");
        let close = |input: &Tensor, expected: &[f64], tracked: bool, name: &str| {
            let what = format!("{name}, {what}");
            let Some(gradient) = store.get(input) else { return assert!(!tracked, "no gradient of {what}") };
            assert!(tracked, "a gradient of {what}");
            assert_eq!((gradient.dtype(), gradient.shape()), (input.dtype(), input.shape()), "{what}");
            match name {
                "x" | "z" => assert_close(&elements::<X>(gradient), expected, 1e-4, &what),
                "residual" => assert_close(&elements::<S>(gradient), expected, 1e-4, &what),
                _ => assert_close(&elements::<f32>(gradient), expected, 1e-4, &what),
            }
        };
        close(&x_tensor, &exact.x, tracked[0], "x");
        close(&weight_tensor, &exact.weight, tracked[2], "weight");
        if let Some(residual) = &residual_tensor {
            close(residual, &exact.residual, tracked[1], "residual");
        }
        if let (Some(z), Some(expected)) = (&z_tensor, &exact.z) {
            close(z, expected, tracked[3], "z");
        }
    }
}

fn elements<T: WithDType>(tensor: &Tensor) -> Vec<T> {
    tensor.flatten_all().and_then(|flat| flat.to_vec1()).expect("of this type")
}

#[test]
fn in_every_type_agrees_with_the_reference() {
    agrees_with_the_reference::<f32, f32, f32>(&Device::Cpu, 128);
    agrees_with_the_reference::<f32, f32, f16>(&Device::Cpu, 32);
    agrees_with_the_reference::<f32, f32, bf16>(&Device::Cpu, 32);
    agrees_with_the_reference::<f16, f16, f16>(&Device::Cpu, 32);
    agrees_with_the_reference::<bf16, bf16, bf16>(&Device::Cpu, 32);
    agrees_with_the_reference::<f16, f32, f16>(&Device::Cpu, 32);
    agrees_with_the_reference::<bf16, f32, bf16>(&Device::Cpu, 32);
}

/// The norm in candle's own operators.
fn plain(s: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let mean_square = (s.sqr()?.sum_keepdim(D::Minus1)? / s.dim(D::Minus1)? as f64)?;
    s.broadcast_div(&(mean_square + 1e-5)?.sqrt()?)?.broadcast_mul(weight)
}

/// Norms of one residual stream, each of which hands the sum to the next, as the layers of a model do: gradients reach what
/// the first has added through all of them, also in a second backward pass.
pub fn layers_of_a_stream(device: &Device) {
    let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, device).expect("a tensor");
    let variables: Vec<_> = (0..4).map(|_| track(random(&[3, 4, 8]), true)).collect();
    let weights: Vec<_> = (0..4).map(|_| track(random(&[8]), true)).collect();
    let last = random(&[3, 4, 8]);
    let run = |fused: bool| -> Result<Tensor> {
        let mut stream = variables[0].clone();
        let mut out = None::<Tensor>;
        for (x, weight) in variables[1..].iter().zip(&weights) {
            let x = match &out {
                Some(out) => (x * out)?,
                None => x.clone(),
            };
            let (normed, sum) = if fused {
                let norm = RmsNorm { residual: Some(&stream), weight: Some(weight), ..RmsNorm::new(&x) };
                norm.forward_with_residual()?
            } else {
                let sum = (x + &stream)?;
                (plain(&sum, weight)?, sum)
            };
            (out, stream) = (Some(normed), sum);
        }
        let out = out.expect("there are layers");
        let out = match fused {
            true => RmsNorm { residual: Some(&stream), weight: Some(&weights[3]), ..RmsNorm::new(&out) }.forward()?,
            false => plain(&(out + stream)?, &weights[3])?,
        };
        Ok(weighted(&out, &last))
    };
    let (ours, theirs) = (run(true).expect("valid"), run(false).expect("valid"));
    let expected = theirs.backward().expect("a loss");
    for pass in 0..2 {
        let found = ours.backward().expect("a loss");
        for (i, variable) in variables.iter().chain(&weights).enumerate() {
            let [ours, theirs] = [&found, &expected].map(|store| values(store.get(variable).expect("it is tracked")));
            let error = crate::support::tolerance::error(&ours, &theirs);
            // Both are within the 1e-4 of a gradient that the crate promises.
            assert!(error <= 2e-4, "variable {i}, pass {pass}: {error:.1e}");
        }
    }
}

#[test]
fn layers_hand_the_sum_on() {
    layers_of_a_stream(&Device::Cpu);
}

/// Slices of columns have the results of copies, and so have rows that lie at several distances, which are copied.
pub fn slices_are_not_copied(device: &Device) {
    let wide = Tensor::randn(0f32, 1.0, (2, 3, 21), device).expect("a tensor");
    let weight = track(Tensor::randn(0f32, 1.0, 8, device).expect("a tensor"), true);
    let slices = [
        wide.narrow(2, 4, 8).expect("columns"),
        wide.narrow(2, 5, 8).expect("columns"),
        wide.narrow(2, 5, 8).and_then(|x| x.narrow(1, 0, 2)).expect("columns of some rows"),
        wide.narrow(2, 5, 8).and_then(|x| x.transpose(0, 1)).expect("columns"),
        wide.narrow(2, 5, 8).and_then(|x| x.get(1)?.get(1)).expect("a row"),
    ];
    for (i, slice) in slices.iter().enumerate() {
        let run = |x: &Tensor| {
            let x = track(x.clone(), false);
            let norm = RmsNorm { weight: Some(&weight), ..RmsNorm::new(&x) };
            let (out, sum) = norm.forward_with_residual().expect("valid");
            // The gradient of a sum is a broadcast one.
            let gradient = out.sum_all().and_then(|loss| loss.backward()).expect("a loss");
            (values(&out), values(&sum), values(gradient.get(&weight).expect("it is tracked")))
        };
        let copy = slice.copy().and_then(|copy| copy.contiguous()).expect("a copy");
        assert_eq!(run(slice), run(&copy), "slice {i}");
    }
}

#[test]
fn slices_have_the_results_of_copies() {
    slices_are_not_copied(&Device::Cpu);
}

/// Rows at several distances are part of the graph as their copies are.
#[test]
fn gradients_reach_what_is_copied() {
    let x = track(Tensor::randn(0f32, 1.0, (2, 3, 8), &Device::Cpu).expect("a tensor"), true);
    let gradient = |x_of: &dyn Fn(&Tensor) -> Result<Tensor>| -> Vec<f64> {
        let seen = x_of(&x).expect("valid");
        let out = RmsNorm::new(&seen).forward().expect("valid");
        let store = out.powf(3.0).and_then(|out| out.sum_all()?.backward()).expect("a loss");
        values(store.get(&x).expect("it is tracked"))
    };
    let expected = gradient(&|x| Ok(x.clone()));
    assert_eq!(gradient(&|x| x.transpose(0, 1)), expected);
}

#[test]
fn what_does_not_fit_is_named() {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).expect("a tensor");
    let (x, half) = (zeros(&[2, 3, 8], DType::F32), zeros(&[2, 3, 8], DType::BF16));
    let norm = RmsNorm::new(&x);
    #[track_caller]
    fn refused(norm: &RmsNorm, message: &str) {
        let error = norm.forward().expect_err("it does not fit").to_string();
        assert!(error.contains(message), "{error}");
    }
    let flat = zeros(&[6, 8], DType::F32);
    refused(&RmsNorm { residual: Some(&flat), ..norm }, "`residual`: expected shape [2, 3, 8], got [6, 8]");
    refused(&RmsNorm { residual: Some(&half), ..norm }, "`residual`: expected dtype F32, as `x`, got BF16");
    refused(&RmsNorm { z: Some(&half), ..norm }, "`z`: expected dtype F32, got BF16");
    refused(&RmsNorm { z: Some(&flat), ..norm }, "`z`: expected shape [2, 3, 8], got [6, 8]");
    let weight = zeros(&[7], DType::F32);
    refused(&RmsNorm { weight: Some(&weight), ..norm }, "`weight`: expected shape (width) = [8], got [7]");
    let weight = zeros(&[8], DType::BF16);
    refused(&RmsNorm { weight: Some(&weight), ..norm }, "`weight`: expected dtype F32, got BF16");
    let weight = zeros(&[1, 8], DType::F32);
    refused(&RmsNorm { weight: Some(&weight), ..norm }, "`weight`: expected shape (width), got [1, 8]");
    refused(&RmsNorm { dtype: DType::U8, ..norm }, "`dtype`: expected dtype F32, F16 or BF16, got U8");
    refused(&RmsNorm { dtype: DType::F32, ..RmsNorm::new(&half) }, "`dtype`: expected dtype BF16, as `x`, got F32");
    let other = zeros(&[2, 3, 8], DType::F16);
    refused(
        &RmsNorm { residual: Some(&other), ..RmsNorm::new(&half) },
        "`residual`: expected dtype F32 or BF16, got F16",
    );
    let integers = zeros(&[2, 8], DType::U8);
    refused(&RmsNorm::new(&integers), "`x`: expected dtype F32, F16 or BF16, got U8");
    let number = zeros(&[], DType::F32);
    refused(&RmsNorm::new(&number), "`x`: expected at least one dimension, got []");
    let options = Options { group_size: Some(3), ..Options::default() };
    refused(&RmsNorm { options, ..norm }, "`group_size`: expected a divisor of the width, 8, got 3");
    let empty = zeros(&[0, 8], DType::F32);
    assert_eq!(RmsNorm::new(&empty).forward().expect("nothing").dims(), [0, 8]);
}

/// An untracked norm keeps nothing: with it goes all memory but its result's.
#[test]
fn untracked_inputs_keep_nothing() {
    let [x, residual] = [(); 2].map(|()| Tensor::zeros((64, 64), DType::F32, &Device::Cpu).expect("a tensor"));
    let norm = RmsNorm { residual: Some(&residual), ..RmsNorm::new(&x) };
    let (held, out) = crate::support::memory::held_by(|| norm.forward().expect("valid"));
    assert!(!out.track_op());
    // 16 KiB of elements, and a few words.
    assert!(held < 16 * 1024 + 1024, "{held} bytes");

    // A tracked one keeps the sum, which is one with the result of that name.
    let x = track(x, true);
    let norm = RmsNorm { residual: Some(&residual), ..RmsNorm::new(&x) };
    let (held, _results) = crate::support::memory::held_by(|| norm.forward_with_residual().expect("valid"));
    assert!(held < 2 * 16 * 1024 + 4096, "{held} bytes");
}
