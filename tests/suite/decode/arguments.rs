//! What does not fit is named, and nothing is written.

use half::{bf16, f16};
use selective_scan::decode::{
    ColumnNorms, Columns, ConvStep, Linear, LinearMut, RowNorm, SelectiveUpdate, SelectiveUpdateMut, cpu, reference,
};
use selective_scan::{Element, Result, Slots, View, ViewMut};

#[track_caller]
fn refused<T>(result: Result<T>, message: &str) {
    match result {
        Ok(_) => panic!("this should have been refused: {message}"),
        Err(error) => assert_eq!(error.to_string(), message),
    }
}

const DATA: [f32; 64] = [0.5; 64];

fn view<const R: usize>(shape: [usize; R]) -> View<'static, f32, R> {
    View::new(&DATA[..], shape)
}

/// Runs on an output of 7s, and with a pool of 7s where one is given.
fn linear<X: Element, T: Element, O: Element>(
    inputs: &Linear<X, T>,
    size: usize,
    accumulate: bool,
    pool: Option<[usize; 3]>,
) -> Result<()> {
    let (mut out, mut states) = (vec![O::from_f32(7.0); size], [7.0f32; 64]);
    let conv_state = pool.map(|shape| ViewMut::new(&mut states[..], shape));
    let result = cpu::linear(inputs, LinearMut { out: &mut out[..], accumulate, conv_state });
    assert!(result.is_ok() || out.iter().all(|x| x.to_f32() == 7.0) && states == [7.0; 64]);
    result
}

/// 3 rows of 4 features, 5 columns.
fn plain() -> Linear<'static, f32> {
    Linear::new(view([3, 4]), view([5, 4]))
}

#[test]
fn of_a_product() {
    let run = |inputs: &Linear<f32>| linear::<_, _, f32>(inputs, 15, false, None);
    run(&plain()).expect("it is valid");
    refused(run(&Linear { x: view([3, 0]), ..plain() }), "`x`: expected at least one feature, got shape [3, 0]");
    refused(
        run(&Linear { x: view([3, 30]), weight: view([1, 30]), ..plain() }),
        "`x`: expected a storage that holds offset 0, shape [3, 30], strides [30, 1], got one of 64 elements",
    );
    let message = "`weight`: expected shape (out_features, features) = [5, 4], got [5, 3]";
    refused(run(&Linear { weight: view([5, 3]), ..plain() }), message);
    let message = "`bias`: expected shape (out_features) = [5], got [4]";
    refused(run(&Linear { bias: Some(view([4])), ..plain() }), message);
    let norm = |weight, eps| Linear { norm: Some(RowNorm { weight, eps }), ..plain() };
    let message = "`norm.weight`: expected shape (features) = [4], got [5]";
    refused(run(&norm(Some(view([5])), 1e-5)), message);
    for (eps, got) in [(-1.0, "-1"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
        refused(run(&norm(None, eps)), &format!("`eps`: expected 0 or more, and finite, got {got}"));
    }
    let message = "`out`: expected (rows, out_features) = [3, 5] elements, got 14 elements";
    refused(linear::<_, _, f32>(&plain(), 14, false, None), message);
    let absurd = View::new(&DATA[..1], [2, usize::MAX]).with_layout(0, [0, 0]);
    let weight = View::new(&DATA[..1], [1, usize::MAX]).with_layout(0, [0, 0]);
    let message = format!("`x`: expected fewer than 2^63 elements, got shapes [2, {0}] and [1, {0}]", usize::MAX);
    refused(linear::<_, _, f32>(&Linear::<f32>::new(absurd, weight), 2, false, None), &message);
    let many = View::new(&DATA[..1], [1, 1 << 60]).with_layout(0, [0, 0]);
    let message = format!("`x`: expected a shape that fits in memory, got [1, {}]", 1u64 << 56);
    refused(linear::<_, _, f32>(&Linear::<f32>::new(many, many), 1, false, None), &message);
}

#[test]
fn of_a_convolution() {
    let slots = Slots::Rows;
    let conv = |channels, width, bias, slots| {
        let conv = ConvStep { weight: view([channels, width]), bias, slots };
        Linear { conv: Some(conv), ..plain() }
    };
    let run = |inputs: &Linear<f32>, pool| linear::<_, _, f32>(inputs, 15, false, pool);
    let pool = Some([3, 2, 2]);
    let valid = conv(2, 3, None, slots);
    run(&valid, pool).expect("it is valid");
    for (channels, width) in [(6, 3), (2, 1), (2, 9)] {
        let message = format!(
            "`conv.weight`: expected at most 5 channels and a width of 2 to 8, got shape [{channels}, {width}]"
        );
        refused(run(&conv(channels, width, None, slots), pool), &message);
    }
    let message = "`conv.bias`: expected shape (d_inner) = [2], got [3]";
    refused(run(&conv(2, 3, Some(view([3])), slots), pool), message);
    refused(run(&valid, None), "`conv_state`: expected a pool, as there is a convolution, got none");
    refused(run(&plain(), pool), "`conv_state`: expected none, as there is no convolution, got a pool");
    let message = "`conv_state`: expected shape (slots, width - 1, d_inner) = [3, 2, 2], got [3, 3, 2]";
    refused(run(&valid, Some([3, 3, 2])), message);
    let message = "`state`: expected one slot for each of 3 batch rows, since no `slots` are given, got 4 slots";
    refused(run(&valid, Some([4, 2, 2])), message);
    let message = "`slots`: expected a different slot for every row, got 1 twice";
    refused(run(&conv(2, 3, None, Slots::Host(&[1, -1, 1])), pool), message);
    let message = "`slots`: expected slots below 3, or negative ones for padding, got 3 for row 2";
    refused(run(&conv(2, 3, None, Slots::Host(&[1, -1, 3])), pool), message);
    let message = "`slots`: expected one for each of 3 batch rows, got 2";
    refused(run(&conv(2, 3, None, Slots::Host(&[1, 0])), pool), message);
    let message = "`accumulate`: expected false where there is a convolution, got true";
    refused(linear::<_, _, f32>(&valid, 15, true, pool), message);
    let message = "`conv_state`: expected a pool, as there is a convolution, got none";
    refused(reference::linear::<f32, f32, f32>(&valid, None), message);
}

#[test]
fn of_types_that_do_not_go_together() {
    let halves = [f16::ONE; 8];
    let (x, weight) = (View::new(&halves[..], [1, 4]), View::new(&halves[..], [2, 4]));
    let inputs = Linear::new(x, weight);
    linear::<_, _, f32>(&inputs, 2, true, None).expect("an output may be f32");
    let message = "`out`: expected f32 or F16, the type of `weight`, got Bf16";
    refused(linear::<_, _, bf16>(&inputs, 2, false, None), message);
    let message = "`x`: expected f32 or F32, the type of `weight`, got F16";
    refused(linear::<_, _, f32>(&Linear::<f16, f32>::new(x, view([2, 4])), 2, false, None), message);
    let conv = ConvStep { weight: view([2, 2]), bias: None, slots: Slots::Rows };
    let message = "`out`: expected F16 where there is a convolution, got F32";
    refused(linear::<_, _, f32>(&Linear { conv: Some(conv), ..inputs }, 2, false, Some([1, 1, 2])), message);
}

#[test]
fn of_an_update() {
    fn run_on(inputs: &SelectiveUpdate<f32>, size: usize, pool: [usize; 3]) -> Result<()> {
        let (mut out, mut states) = (vec![7.0f32; size], [7.0f32; 64]);
        let outputs = SelectiveUpdateMut::new(ViewMut::new(&mut states[..], pool), &mut out[..]);
        let result = cpu::selective_update(inputs, outputs);
        assert!(result.is_ok() || out.iter().all(|x| *x == 7.0) && states == [7.0; 64]);
        result
    }
    // 3 rows, 4 channels, 2 states, a rank of 1.
    let plain = SelectiveUpdate::<f32>::new(view([3, 4]), view([3, 5]), view([4, 1]), view([4, 2]));
    let run = |inputs: &SelectiveUpdate<f32>| run_on(inputs, 12, [3, 4, 2]);
    run(&plain).expect("it is valid");
    let message = "`u, dt_weight`: expected at least one channel and a rank of at least 1, got 0 and 1";
    refused(run(&SelectiveUpdate { u: view([3, 0]), ..plain }), message);
    let message = "`u, dt_weight`: expected at least one channel and a rank of at least 1, got 4 and 0";
    refused(run(&SelectiveUpdate { dt_weight: view([4, 0]), ..plain }), message);
    let message = "`dt_weight`: expected shape (d_inner, dt_rank) = [4, 1], got [5, 1]";
    refused(run(&SelectiveUpdate { dt_weight: view([5, 1]), ..plain }), message);
    refused(run(&SelectiveUpdate { a: view([4, 0]), ..plain }), "`a`: expected 1 to 256 states, got 0");
    let message = "`a`: expected shape (d_inner, d_state) = [4, 2], got [3, 2]";
    refused(run(&SelectiveUpdate { a: view([3, 2]), ..plain }), message);
    let message = "`columns`: expected shape (rows, dt_rank + 2 d_state) = [3, 5], got [3, 6]";
    refused(run(&SelectiveUpdate { columns: view([3, 6]).into(), ..plain }), message);
    let projected = |shape| SelectiveUpdate { columns: Columns::Projected { weight: view(shape) }, ..plain };
    refused(run(&projected([5, 4])), "`columns`: expected a buffer, as they are projected, got none");
    let message = "`columns.weight`: expected shape (dt_rank + 2 d_state, d_inner) = [5, 4], got [4, 5]";
    refused(run(&projected([4, 5])), message);
    let with_buffer = |inputs: &SelectiveUpdate<f32>, len: usize| {
        let (mut out, mut states, mut columns) = ([7.0f32; 12], [7.0f32; 64], vec![7.0f32; len]);
        let outputs = SelectiveUpdateMut::new(ViewMut::new(&mut states[..], [3, 4, 2]), &mut out[..]);
        let result = cpu::selective_update(inputs, SelectiveUpdateMut { columns: Some(&mut columns[..]), ..outputs });
        let is_untouched = [&out[..], &states[..], &columns[..]].into_iter().flatten().all(|x| *x == 7.0);
        assert!(result.is_ok() || is_untouched);
        result
    };
    with_buffer(&projected([5, 4]), 15).expect("it is valid");
    let message = "`columns`: expected (rows, dt_rank + 2 d_state) = [3, 5] elements, got 14 elements";
    refused(with_buffer(&projected([5, 4]), 14), message);
    let message = "`columns`: expected nothing to write, as they are given, got a buffer";
    refused(with_buffer(&plain, 15), message);
    let message = "`d`: expected shape (d_inner) = [4], got [3]";
    refused(run(&SelectiveUpdate { d: Some(view([3])), ..plain }), message);
    let message = "`delta_bias`: expected shape (d_inner) = [4], got [5]";
    refused(run(&SelectiveUpdate { delta_bias: Some(view([5])), ..plain }), message);
    let message = "`z`: expected shape (rows, d_inner) = [3, 4], got [4, 4]";
    refused(run(&SelectiveUpdate { z: Some(view([4, 4])), ..plain }), message);
    let norms = |sizes: [usize; 3], eps| {
        let weights = Some(sizes.map(|size| view([size])));
        SelectiveUpdate { norms: Some(ColumnNorms { weights, eps }), ..plain }
    };
    run(&norms([1, 2, 2], 0.0)).expect("it is valid");
    refused(run(&norms([1, 2, 2], -0.5)), "`eps`: expected 0 or more, and finite, got -0.5");
    for (i, sizes) in [[2, 2, 2], [1, 1, 2], [1, 2, 3]].into_iter().enumerate() {
        let (want, got) = ([1, 2, 2][i], sizes[i]);
        refused(
            run(&norms(sizes, 1e-5)),
            &format!("`norms.weights[{i}]`: expected shape (size) = [{want}], got [{got}]"),
        );
    }
    let message = "`slots`: expected a different slot for every row, got 0 twice";
    refused(run(&SelectiveUpdate { slots: Slots::Host(&[0, 0, 1]), ..plain }), message);
    let message = "`state`: expected shape (slots, d_inner, d_state) = [3, 4, 2], got [3, 2, 4]";
    refused(run_on(&plain, 12, [3, 2, 4]), message);
    let message = "`out`: expected (rows, d_inner) = [3, 4] elements, got 13 elements";
    refused(run_on(&plain, 13, [3, 4, 2]), message);
}
