//! What does not fit is named, and nothing is written.

use rand::Rng;
use selective_scan::lti::Rule;
use selective_scan::lti::s4d::{Inputs, OutputGradients, OutputMut, UpdateInputs, UpdateMut, cpu, recurrence};
use selective_scan::{Slots, View, ViewMut};

use super::case::{Case, Shape};
use crate::support::draw::{Draw, seeded};

#[test]
fn bad_arguments_are_named() {
    let (mut rng, _) = seeded();
    let case = Case::<f32>::new(
        Shape { batch: 2, length: 6, d_inner: 3, d_state: 2, ..Shape::default() },
        &mut Draw::new(rng.random()),
    );
    let inputs = case.inputs();
    let data = [0.0f32; 200];
    let refused = |inputs: Inputs<f32>, text: &str| {
        let mut out = [7.0f32; 36];
        assert_eq!(cpu::forward(&inputs, OutputMut::new(&mut out[..])).unwrap_err().to_string(), text);
        assert!(out.iter().all(|x| *x == 7.0), "{text}: something was written");
    };
    let odd = View::new(&data, [3, 5]);
    refused(
        Inputs { a: odd, ..inputs },
        "`a`: expected 2 * d_state as its last dimension, d_state from 1 to 256, got shape [3, 5]",
    );
    refused(
        Inputs { a: View::new(&data, [3, 0]), ..inputs },
        "`a`: expected 2 * d_state as its last dimension, d_state from 1 to 256, got shape [3, 0]",
    );
    refused(
        Inputs { b: View::new(&data, [3, 6]), ..inputs },
        "`b`: expected shape (d_inner, 2 * d_state) = [3, 4], got [3, 6]",
    );
    refused(
        Inputs { c: View::new(&data, [2, 4]), ..inputs },
        "`c`: expected shape (d_inner, 2 * d_state) = [3, 4], got [2, 4]",
    );
    refused(
        Inputs { log_delta: View::new(&data, [4]), ..inputs },
        "`log_delta`: expected shape (d_inner) = [3], got [4]",
    );
    refused(
        Inputs { initial_state: Some(View::new(&data, [1, 3, 4])), ..inputs },
        "`initial_state`: expected shape (sequences, d_inner, 2 * d_state) = [2, 3, 4], got [1, 3, 4]",
    );
    refused(
        Inputs { u: View::new(&data, [2, 3, 6]), ..inputs },
        "`u`: expected shape (batch, length, d_inner) with d_inner = 3, as `a` has it, got [2, 3, 6], which fits with its \
         last two dimensions exchanged (without a copy, by `permuted([0, 2, 1])` of a view or `transpose(1, 2)` of a tensor)",
    );
    refused(
        Inputs { cu_seqlens: Some(&[0, 6]), ..inputs },
        "`cu_seqlens`: expected a batch of 1 beside it, got a batch of 2",
    );
    let short = View { data: &data[..20], ..inputs.u };
    refused(
        Inputs { u: short, ..inputs },
        "`u`: expected a storage that holds offset 0, shape [2, 6, 3], strides [18, 3, 1], got one of 20 elements",
    );
    let mut out = [0.0f32; 35];
    let error = cpu::forward(&inputs, OutputMut::new(&mut out[..])).unwrap_err();
    assert_eq!(error.to_string(), "`out`: expected (batch, length, d_inner) = [2, 6, 3] elements, got 35 elements");
    let d_outputs = OutputGradients { d_final_state: Some(View::new(&data, [2, 3, 2])), ..case.d_outputs() };
    let error = inputs.backward(d_outputs).unwrap_err();
    let text = "`d_final_state`: expected shape (sequences, d_inner, 2 * d_state) = [2, 3, 4], got [2, 3, 2]";
    assert_eq!(error.to_string(), text);
}

#[test]
fn bad_arguments_of_an_update_are_named() {
    let data = [0.5f32; 200];
    let complex = View::new(&data, [3, 4]);
    let all = recurrence(View::new(&data, [3]), complex, complex, Rule::ZeroOrderHold).unwrap();
    let inputs = UpdateInputs::new(View::new(&data, [2, 1, 3]), View::new(&all, [3, 6, 2]), complex);
    let refused = |inputs: UpdateInputs<f32>, text: &str| {
        let (mut state, mut out) = ([7.0f32; 24], [7.0f32; 6]);
        let error =
            cpu::update(&inputs, UpdateMut::new(ViewMut::new(&mut state, [2, 3, 4]), &mut out[..])).unwrap_err();
        assert_eq!(error.to_string(), text);
        assert!(state.iter().chain(&out).all(|x| *x == 7.0), "{text}: something was written");
    };
    refused(
        UpdateInputs { recurrence: View::new(&all, [3, 2, 6]), ..inputs },
        "`recurrence`: expected shape (d_inner, 6, d_state) = [3, 6, 2], got [3, 2, 6], which fits with \
         its last two dimensions exchanged (without a copy, by `permuted([0, 2, 1])` of a view or `transpose(1, 2)` of a \
         tensor)",
    );
    refused(
        UpdateInputs { slots: Slots::Host(&[1, 1]), ..inputs },
        "`slots`: expected a different slot for every row, got 1 twice",
    );
    let error = recurrence(View::new(&data, [2]), complex, complex, Rule::Bilinear).unwrap_err();
    assert_eq!(error.to_string(), "`log_delta`: expected shape (d_inner) = [3], got [2]");
    let error = recurrence(View::new(&data, [3]), complex, View::new(&data, [3, 6]), Rule::Bilinear).unwrap_err();
    assert_eq!(error.to_string(), "`b`: expected shape (d_inner, 2 * d_state) = [3, 4], got [3, 6]");
}
