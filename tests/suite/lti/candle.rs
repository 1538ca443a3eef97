//! The operators on candle's tensors are those on slices, and candle's graph gets their gradients.

use candle_core::{Device, Tensor, Var};
use rand::Rng;
use selective_scan::candle::{LongConv, S4Kernel, S4d, S4dUpdate, s4d_recurrence};
use selective_scan::lti::{long_conv, s4, s4d};
use selective_scan::{Element, Error, View, ViewMut};

use super::s4d::case::{Case, Shape};
use super::s4d::device::{On, backward, forward};
use crate::candle::{tensor, values};
use crate::support::draw::{Draw, seeded};

fn var<const R: usize>(view: &View<f32, R>, device: &Device) -> Tensor {
    Var::from_tensor(&tensor(view, device)).unwrap().as_tensor().clone()
}

fn wide<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.to_f32().into()).collect()
}

/// A loss whose slopes at a result are the numbers of a view.
fn weighted<const R: usize>(result: &Tensor, slopes: &View<f32, R>) -> Tensor {
    (result * tensor(slopes, result.device())).unwrap().sum_all().unwrap()
}

#[test]
fn s4d_is_that_on_slices() {
    s4d_on_tensors(&Device::Cpu, On::best());
}

/// On the device `on` is on.
fn s4d_on_tensors(device: &Device, on: On) {
    let (mut rng, seed) = seeded();
    for _ in 0..8 {
        let mut draw = Draw::new(rng.random());
        let case = Case::<f32>::new(Shape::draw(&mut draw), &mut draw);
        let (inputs, d_outputs) = (case.inputs(), case.d_outputs());
        let [u, log_delta] = [var(&inputs.u, device), var(&inputs.log_delta, device)];
        let [a, b] = [&inputs.a, &inputs.b].map(|view| var(view, device));
        // C is not tracked in half of the cases.
        let c = if draw.flag() { var(&inputs.c, device) } else { tensor(&inputs.c, device) };
        let d = inputs.d.as_ref().map(|view| var(view, device));
        let state = inputs.initial_state.as_ref().map(|view| var(view, device));
        let operator = S4d {
            d: d.as_ref(),
            initial_state: state.as_ref(),
            cu_seqlens: inputs.cu_seqlens,
            options: inputs.options,
            ..S4d::new(&u, &log_delta, &a, &b, &c)
        };
        let (out, final_state) = operator.forward_with_state().unwrap();
        let want = forward(on, &case);
        let what = format!("{:?}, SEED={seed}", case.shape);
        assert_eq!(values(&out), wide(&want.out), "{what}");
        assert_eq!(values(&final_state), wide(&want.final_state), "{what}");
        let mut loss = weighted(&out, &d_outputs.d_out);
        if let Some(slopes) = &d_outputs.d_final_state {
            loss = (loss + weighted(&final_state, slopes)).unwrap();
        }
        let store = loss.backward().unwrap();
        let want = backward(on, &case);
        let got = |tensor: &Tensor| store.get(tensor).map(values);
        assert_eq!(got(&u), Some(wide(&want.u)), "{what}: u");
        assert_eq!(got(&log_delta), Some(wide(&want.log_delta)), "{what}: log_delta");
        assert_eq!(got(&a), Some(wide(&want.a)), "{what}: a");
        assert_eq!(got(&b), Some(wide(&want.b)), "{what}: b");
        assert_eq!(got(&c), c.is_variable().then(|| wide(&want.c)), "{what}: c");
        assert_eq!(d.and_then(|d| got(&d)), want.d.map(|d| wide(&d)), "{what}: d");
        assert_eq!(state.and_then(|x| got(&x)), want.initial_state.map(|x| wide(&x)), "{what}: initial_state");
    }
}

#[test]
fn an_update_is_that_on_slices() {
    update_on_tensors(&Device::Cpu, On::best());
}

fn update_on_tensors(device: &Device, on: On) {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let case = Case::<f32>::new(Shape { batch: 3, length: 2, ..Shape::default() }, &mut draw);
    let inputs = case.inputs();
    let [log_delta, a, b, c] = [
        tensor(&inputs.log_delta, device),
        tensor(&inputs.a, device),
        tensor(&inputs.b, device),
        tensor(&inputs.c, device),
    ];
    let recurrence = s4d_recurrence(&log_delta, &a, &b, inputs.options.rule).unwrap();
    let in_f64 = s4d::recurrence(inputs.log_delta, inputs.a, inputs.b, inputs.options.rule).unwrap();
    let steps: Vec<f32> = values(&recurrence).iter().map(|&x| x as f32).collect();
    // A device's exponential may differ in the last digit of an f64, by which a number or what rounding leaves of it changes.
    let whole = |steps: &[f32]| -> Vec<f64> {
        let d_state = case.shape.d_state;
        let of = |rows: &[f32], i: usize, k: usize| f64::from(rows[k * d_state + i]);
        let numbers = |rows: &[f32]| -> Vec<f64> {
            (0..d_state)
                .flat_map(|i| {
                    [of(rows, i, 0) + of(rows, i, 1), of(rows, i, 2) + of(rows, i, 3), of(rows, i, 4), of(rows, i, 5)]
                })
                .collect()
        };
        steps.chunks(6 * d_state).flat_map(numbers).collect()
    };
    let pairs: Vec<(f64, f64)> = whole(&steps).into_iter().zip(whole(&in_f64)).collect();
    for (i, (got, want)) in pairs.into_iter().enumerate() {
        let tolerance = if i % 4 < 2 { 1e-13 } else { 1e-7 };
        assert!((got - want).abs() <= tolerance * want.abs().max(1e-3), "{i}: {got} {want}, SEED={seed}");
    }
    let mut pool = case.state.clone();
    let shape = [3, case.shape.d_inner, 2 * case.shape.d_state];
    let state = Tensor::from_vec(pool.clone(), &shape, device).unwrap();
    let slots = [1, -1, 0];
    let u = tensor(&inputs.u, device);
    let update = S4dUpdate { slots: (&slots).into(), ..S4dUpdate::new(&u, &recurrence, &c) };
    let (out, token_states) = update.update_with_token_states(&state).unwrap();
    let on_slices = s4d::UpdateInputs {
        slots: (&slots).into(),
        ..s4d::UpdateInputs::new(inputs.u, View::new(&steps, [shape[1], 6, case.shape.d_state]), inputs.c)
    };
    let want = on.update(&on_slices, ViewMut::new(&mut pool, shape));
    assert_eq!(values(&out), wide(&want.out), "SEED={seed}");
    assert_eq!(values(&token_states), wide(&want.token_states), "SEED={seed}");
    assert_eq!(values(&state), wide(&pool), "SEED={seed}");
}

#[test]
fn kernels_and_convolutions_are_those_on_slices() {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let case = Case::<f32>::new(Shape { batch: 2, length: 20, fastest: 20.0, ..Shape::default() }, &mut draw);
    let inputs = case.inputs();
    let (d_inner, both) = (case.shape.d_inner, 2 * case.shape.d_state);
    let p = draw.uniform::<f32>(d_inner * both, -0.5, 0.5);
    let p = View::new(&p, [d_inner, 1, both]);
    let on_slices = s4::Kernel { log_delta: inputs.log_delta, a: inputs.a, p, b: inputs.b, c: inputs.c };
    let want = on_slices.kernel(20).unwrap();
    let [u, log_delta] = [var(&inputs.u, &Device::Cpu), var(&inputs.log_delta, &Device::Cpu)];
    let [a, b, c] = [&inputs.a, &inputs.b, &inputs.c].map(|view| var(view, &Device::Cpu));
    let (p, d) = (var(&p, &Device::Cpu), var(&inputs.d.unwrap(), &Device::Cpu));
    let kernel = S4Kernel { log_delta: &log_delta, a: &a, p: &p, b: &b, c: &c }.forward(20).unwrap();
    assert_eq!(values(&kernel), wide(&want), "SEED={seed}");
    let out = LongConv { d: Some(&d), ..LongConv::new(&u, &kernel) }.forward().unwrap();
    let conv = long_conv::Inputs { d: inputs.d, ..long_conv::Inputs::new(inputs.u, View::new(&want, [d_inner, 20])) };
    assert_eq!(values(&out), wide(&conv.forward().unwrap()), "SEED={seed}");
    // And back through both.
    let store = weighted(&out, &case.d_outputs().d_out).backward().unwrap();
    let of_conv = conv.backward(case.d_outputs().d_out).unwrap();
    let of_kernel = on_slices.backward(View::new(&of_conv.kernel, [d_inner, 20])).unwrap();
    let got = |tensor: &Tensor| values(store.get(tensor).expect("a gradient"));
    assert_eq!(got(&u), wide(&of_conv.u), "SEED={seed}: u");
    assert_eq!(got(&d), wide(&of_conv.d.unwrap()), "SEED={seed}: d");
    for (name, tensor, want) in [
        ("log_delta", &log_delta, &of_kernel.log_delta),
        ("a", &a, &of_kernel.a),
        ("p", &p, &of_kernel.p),
        ("b", &b, &of_kernel.b),
        ("c", &c, &of_kernel.c),
    ] {
        assert_eq!(got(tensor), wide(want), "SEED={seed}: {name}");
    }
}

#[test]
fn bad_arguments_are_named() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    let (u, log_delta, a) = (zeros(&[1, 4, 3]), zeros(&[3]), zeros(&[3, 4]));
    let named = |error: candle_core::Error| match Error::of(&error) {
        Some(Error::Argument { argument, .. }) => *argument,
        other => panic!("{other:?}"),
    };
    assert_eq!(named(S4d::new(&u, &log_delta, &a, &zeros(&[3, 5]), &a).forward().unwrap_err()), "b");
    let half = a.to_dtype(candle_core::DType::BF16).unwrap();
    assert_eq!(named(S4d::new(&u, &log_delta, &a, &a, &half).forward().unwrap_err()), "c");
    assert_eq!(named(LongConv::new(&u, &zeros(&[2, 4])).forward().unwrap_err()), "kernel");
    let p = zeros(&[3, 5, 4]);
    let kernel = S4Kernel { log_delta: &log_delta, a: &a, p: &p, b: &a, c: &a };
    assert_eq!(named(kernel.forward(8).unwrap_err()), "p");
}

#[cfg(feature = "candle-cuda")]
mod gpu {
    use super::*;
    use crate::candle::gpu::device;
    use selective_scan::lti::s4d::cuda::Plan;

    #[test]
    fn s4d_is_that_on_slices() {
        if let Some(device) = &device() {
            s4d_on_tensors(device, On::Gpu(Plan::default()));
        }
    }

    #[test]
    fn an_update_is_that_on_slices() {
        if let Some(device) = &device() {
            update_on_tensors(device, On::Gpu(Plan::default()));
        }
    }

    /// S4's kernels are made on processors.
    #[test]
    fn what_has_no_kernels_is_named() {
        if let Some(device) = &device() {
            let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, device).unwrap();
            let text = LongConv::new(&zeros(&[1, 4, 2]), &zeros(&[2, 4])).forward().unwrap_err().to_string();
            assert!(text.contains("`u`: expected a tensor on the processor"), "{text}");
        }
    }
}
