//! The operators on candle's tensors are those on slices, and candle's graph gets their gradients.

use candle_core::{Device, Tensor, Var};
use rand::Rng;
use selective_scan::candle::{LongConv, S4Kernel, S4d, S4dUpdate, s4d_recurrence};
use selective_scan::lti::{long_conv, s4, s4d};
use selective_scan::{Element, Error, View, ViewMut};

use super::s4d::case::{Case, Shape};
use crate::candle::{tensor, values};
use crate::support::draw::{Draw, seeded};

fn var<const R: usize>(view: &View<f32, R>) -> Tensor {
    Var::from_tensor(&tensor(view, &Device::Cpu)).unwrap().as_tensor().clone()
}

fn wide<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.to_f32().into()).collect()
}

/// A loss whose slopes at a result are the numbers of a view.
fn weighted<const R: usize>(result: &Tensor, slopes: &View<f32, R>) -> Tensor {
    (result * tensor(slopes, &Device::Cpu)).unwrap().sum_all().unwrap()
}

#[test]
fn s4d_is_that_on_slices() {
    let (mut rng, seed) = seeded();
    for _ in 0..8 {
        let mut draw = Draw::new(rng.random());
        let case = Case::<f32>::new(Shape::draw(&mut draw), &mut draw);
        let (inputs, d_outputs) = (case.inputs(), case.d_outputs());
        let [u, log_delta, a] = [var(&inputs.u), var(&inputs.log_delta), var(&inputs.a)];
        // C is not tracked in half of the cases.
        let (b, c) = (var(&inputs.b), if draw.flag() { var(&inputs.c) } else { tensor(&inputs.c, &Device::Cpu) });
        let (d, state) = (inputs.d.as_ref().map(var), inputs.initial_state.as_ref().map(var));
        let operator = S4d {
            d: d.as_ref(),
            initial_state: state.as_ref(),
            cu_seqlens: inputs.cu_seqlens,
            options: inputs.options,
            ..S4d::new(&u, &log_delta, &a, &b, &c)
        };
        let (out, final_state) = operator.forward_with_state().unwrap();
        let want = inputs.forward().unwrap();
        let what = format!("{:?}, SEED={seed}", case.shape);
        assert_eq!(values(&out), wide(&want.out), "{what}");
        assert_eq!(values(&final_state), wide(&want.final_state), "{what}");
        let mut loss = weighted(&out, &d_outputs.d_out);
        if let Some(slopes) = &d_outputs.d_final_state {
            loss = (loss + weighted(&final_state, slopes)).unwrap();
        }
        let store = loss.backward().unwrap();
        let want = inputs.backward(d_outputs).unwrap();
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
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let case = Case::<f32>::new(Shape { batch: 3, length: 2, ..Shape::default() }, &mut draw);
    let inputs = case.inputs();
    let [log_delta, a, b, c] = [
        tensor(&inputs.log_delta, &Device::Cpu),
        tensor(&inputs.a, &Device::Cpu),
        tensor(&inputs.b, &Device::Cpu),
        tensor(&inputs.c, &Device::Cpu),
    ];
    let recurrence = s4d_recurrence(&log_delta, &a, &b, inputs.options.rule).unwrap();
    let steps = s4d::recurrence(inputs.log_delta, inputs.a, inputs.b, inputs.options.rule).unwrap();
    assert_eq!(values(&recurrence), wide(&steps));
    let mut pool = case.state.clone();
    let shape = [3, case.shape.d_inner, 2 * case.shape.d_state];
    let state = Tensor::from_vec(pool.clone(), &shape, &Device::Cpu).unwrap();
    let slots = [1, -1, 0];
    let u = tensor(&inputs.u, &Device::Cpu);
    let update = S4dUpdate { slots: (&slots).into(), ..S4dUpdate::new(&u, &recurrence, &c) };
    let (out, token_states) = update.update_with_token_states(&state).unwrap();
    let on_slices = s4d::UpdateInputs {
        slots: (&slots).into(),
        ..s4d::UpdateInputs::new(inputs.u, View::new(&steps, [shape[1], 6, case.shape.d_state]), inputs.c)
    };
    let want = on_slices.update_with_token_states(ViewMut::new(&mut pool, shape)).unwrap();
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
    let [u, log_delta, a, b, c] =
        [var(&inputs.u), var(&inputs.log_delta), var(&inputs.a), var(&inputs.b), var(&inputs.c)];
    let (p, d) = (var(&p), var(&inputs.d.unwrap()));
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
