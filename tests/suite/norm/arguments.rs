//! What does not fit is named, and nothing is written.

use half::{bf16, f16};
use selective_scan::norm::{BackwardInputs, GradientsMut, Inputs, Options, OutputMut, cpu};
use selective_scan::{Element, Result, View};

#[track_caller]
fn refused<T>(result: Result<T>, message: &str) {
    match result {
        Ok(_) => panic!("this should have been refused: {message}"),
        Err(error) => assert_eq!(error.to_string(), message),
    }
}

fn forward<X: Element, S: Element, O: Element>(inputs: &Inputs<X, S>, size: usize) -> Result<()> {
    let (mut out, mut sum) = (vec![O::from_f32(7.0); size], vec![S::from_f32(7.0); size]);
    let result = cpu::forward(inputs, OutputMut { out: &mut out[..], residual_out: Some(&mut sum[..]) });
    assert!(result.is_ok() || out.iter().all(|x| x.to_f32() == 7.0) && sum.iter().all(|x| x.to_f32() == 7.0));
    result
}

#[test]
fn of_a_forward_pass() {
    let data = [0.5f32; 12];
    let view = |shape| View::new(&data[..], shape);
    let plain = Inputs::<f32>::new(view([3, 4]));
    forward::<_, _, f32>(&plain, 12).expect("it is valid");
    refused(
        forward::<_, _, f32>(&Inputs::<f32>::new(view([3, 0])), 0),
        "`x`: expected at least one column, got shape [3, 0]",
    );
    let beyond = Inputs::<f32>::new(view([3, 5]));
    refused(
        forward::<_, _, f32>(&beyond, 15),
        "`x`: expected a storage that holds offset 0, shape [3, 5], strides [5, 1], got one of 12 elements",
    );
    let residual = Inputs { residual: Some(view([4, 3])), ..plain };
    refused(forward::<_, _, f32>(&residual, 12), "`residual`: expected shape (rows, width) = [3, 4], got [4, 3]");
    let weight = Inputs { weight: Some(View::new(&data[..], [3])), ..plain };
    refused(forward::<_, _, f32>(&weight, 12), "`weight`: expected shape (width) = [4], got [3]");
    let gate = Inputs { z: Some(view([3, 3])), ..plain };
    refused(forward::<_, _, f32>(&gate, 12), "`z`: expected shape (rows, width) = [3, 4], got [3, 3]");
    for (eps, got) in [(-1.0, "-1"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
        let inputs = Inputs { options: Options { eps, ..Options::default() }, ..plain };
        refused(forward::<_, _, f32>(&inputs, 12), &format!("`eps`: expected 0 or more, and finite, got {got}"));
    }
    for group_size in [0, 3, 8] {
        let options = Options { group_size: Some(group_size), ..Options::default() };
        let message = format!("`group_size`: expected a divisor of the width, 4, got {group_size}");
        refused(forward::<_, _, f32>(&Inputs { options, ..plain }, 12), &message);
    }
    refused(forward::<_, _, f32>(&plain, 11), "`out`: expected (rows, width) = [3, 4] elements, got 11 elements");
    let mut out = [7.0f32; 12];
    let outputs = OutputMut::<f32, f32> { out: &mut out[..], residual_out: Some(&mut [7.0; 13]) };
    let message = "`residual_out`: expected (rows, width) = [3, 4] elements, got 13 elements";
    refused(cpu::forward(&plain, outputs), message);
    assert_eq!(out, [7.0; 12]);
}

#[test]
fn of_types_that_do_not_go_together() {
    let data = [f16::ONE; 4];
    let x = View::new(&data[..], [1, 4]);
    let inputs = Inputs::<f16, bf16>::new(x);
    refused(forward::<_, _, f16>(&inputs, 4), "`residual`: expected f32 or F16, the type of `x`, got Bf16");
    refused(forward::<_, _, f32>(&Inputs::<f16>::new(x), 4), "`out`: expected F16, the type of `x`, got F32");
    let wide = [1.0f32; 4];
    let x = View::new(&wide[..], [1, 4]);
    refused(
        forward::<_, _, f32>(&Inputs::<f32, f16>::new(x), 4),
        "`residual`: expected f32 or F32, the type of `x`, got F16",
    );
}

#[test]
fn of_a_backward_pass() {
    let data = [0.5f32; 12];
    let view = |shape| View::new(&data[..], shape);
    let plain = BackwardInputs::<f32>::new(view([3, 4]), view([3, 4]));
    let run = |inputs: &BackwardInputs<f32>| cpu::backward(inputs, none());
    fn none<'a>() -> GradientsMut<'a, f32> {
        GradientsMut { x: None, residual: None, weight: None, z: None }
    }
    run(&plain).expect("it is valid");
    let message = "`d_out`: expected shape (rows, width) = [3, 4], got [4, 3]";
    refused(run(&BackwardInputs { d_out: view([4, 3]), ..plain }), message);
    let message = "`d_residual_out`: expected shape (rows, width) = [3, 4], got [4, 3]";
    refused(run(&BackwardInputs { d_residual_out: Some(view([4, 3])), ..plain }), message);
    let message = "`z`: expected shape (rows, width) = [3, 4], got [4, 3]";
    refused(run(&BackwardInputs { z: Some(view([4, 3])), ..plain }), message);
    let message = "`weight`: expected shape (width) = [4], got [12]";
    refused(run(&BackwardInputs { weight: Some(View::new(&data[..], [12])), ..plain }), message);
    refused(run(&BackwardInputs { s: view([3, 0]), ..plain }), "`s`: expected at least one column, got shape [3, 0]");

    let message = "`gradients.z`: expected none, since the input is absent, got a buffer";
    refused(cpu::backward(&plain, GradientsMut { z: Some(&mut [0.0; 12]), ..none() }), message);
    let message = "`gradients.x`: expected (rows, width) = [3, 4] elements, got 11 elements";
    refused(cpu::backward(&plain, GradientsMut { x: Some(&mut [0.0; 11]), ..none() }), message);
    let message = "`gradients.residual`: expected (rows, width) = [3, 4] elements, got 11 elements";
    refused(cpu::backward(&plain, GradientsMut { residual: Some(&mut [0.0; 11]), ..none() }), message);
    let message = "`gradients.weight`: expected (width) = [4] elements, got 12 elements";
    refused(cpu::backward(&plain, GradientsMut { weight: Some(&mut [0.0; 12]), ..none() }), message);
    let gated = BackwardInputs { z: Some(view([3, 4])), ..plain };
    let message = "`gradients.z`: expected (rows, width) = [3, 4] elements, got 1 elements";
    refused(cpu::backward(&gated, GradientsMut { z: Some(&mut [0.0; 1]), ..none() }), message);
}

/// More columns or rows than memory has room for, which only views without distance between their elements have.
#[test]
fn of_absurd_sizes() {
    let data = [0.5f32];
    let view = |shape| View::new(&data[..], shape).with_layout(0, [0, 0]);
    let message = format!("`x`: expected fewer than 2^63 elements, got shape [2, {}]", usize::MAX);
    refused(forward::<_, _, f32>(&Inputs::<f32>::new(view([2, usize::MAX])), 0), &message);
    forward::<_, _, f32>(&Inputs::<f32>::new(view([0, usize::MAX])), 0).expect("there is nothing to do");
    let (s, d_out) = (view([1, isize::MAX as usize]), view([1, isize::MAX as usize]));
    let inputs = BackwardInputs::<f32>::new(s, d_out);
    let gradients = GradientsMut::<f32> { x: None, residual: None, weight: None, z: None };
    cpu::backward(&inputs, gradients).expect("nothing is wanted");
}
