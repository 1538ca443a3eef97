//! The operators on candle's tensors are those on slices, and candle's graph gets their gradients.

use candle_core::{Device, Tensor, Var};
use rand::Rng;
use selective_scan::candle::{ComplexScan, ComplexUpdate};
use selective_scan::{Element, Projection, View, ViewMut};

use super::case::{Case, Shape};
use super::device::{On, backward, forward};
use crate::candle::{tensor, values};
use crate::support::draw::{Draw, seeded};

fn var<const R: usize>(view: &View<f32, R>, device: &Device) -> Tensor {
    Var::from_tensor(&tensor(view, device)).unwrap().as_tensor().clone()
}

fn projection(projection: &Projection<f32>, device: &Device) -> Tensor {
    match projection {
        Projection::Varying(view) => var(view, device),
        Projection::Constant(view) => var(view, device),
    }
}

fn wide<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.to_f32().into()).collect()
}

#[test]
fn the_scan_is_that_on_slices() {
    scan_on_tensors(&Device::Cpu, On::best());
}

/// On the device `on` is on.
fn scan_on_tensors(device: &Device, on: On) {
    let (mut rng, seed) = seeded();
    for _ in 0..8 {
        let mut draw = Draw::new(rng.random());
        let case = Case::<f32>::new(Shape::draw(&mut draw), &mut draw);
        let (inputs, d_outputs) = (case.inputs(), case.d_outputs());
        let [u, delta, a] = [var(&inputs.u, device), var(&inputs.delta, device), var(&inputs.a, device)];
        let (b, c) = (projection(&inputs.b, device), projection(&inputs.c, device));
        let z = inputs.z.as_ref().map(|view| var(view, device));
        let [d, bias] = [&inputs.d, &inputs.delta_bias].map(|view| view.as_ref().map(|view| var(view, device)));
        let state = inputs.initial_state.as_ref().map(|view| var(view, device));
        let operator = ComplexScan {
            z: z.as_ref(),
            d: d.as_ref(),
            delta_bias: bias.as_ref(),
            initial_state: state.as_ref(),
            cu_seqlens: inputs.cu_seqlens,
            options: inputs.options,
            ..ComplexScan::new(&u, &delta, &a, &b, &c)
        };
        let (out, final_state) = operator.forward_with_state().unwrap();
        let want = forward(on, &inputs);
        let what = format!("{:?}, SEED={seed}", case.shape);
        assert_eq!(values(&out), wide(&want.out), "{what}");
        assert_eq!(values(&final_state), wide(&want.final_state), "{what}");
        let mut loss = (&out * tensor(&d_outputs.d_out, device)).unwrap().sum_all().unwrap();
        if let Some(slopes) = &d_outputs.d_final_state {
            let of_state = (&final_state * tensor(slopes, device)).unwrap().sum_all().unwrap();
            loss = (loss + of_state).unwrap();
        }
        let store = loss.backward().unwrap();
        let want = backward(on, &inputs, d_outputs);
        let got = |tensor: &Tensor| store.get(tensor).map(values);
        assert_eq!(got(&u), Some(wide(&want.u)), "{what}: u");
        assert_eq!(got(&delta), Some(wide(&want.delta)), "{what}: delta");
        assert_eq!(got(&a), Some(wide(&want.a)), "{what}: a");
        assert_eq!(got(&b), Some(wide(want.b.as_slice())), "{what}: b");
        assert_eq!(got(&c), Some(wide(want.c.as_slice())), "{what}: c");
        for (name, tensor, want) in [
            ("z", z, want.z),
            ("d", d, want.d),
            ("delta_bias", bias, want.delta_bias),
            ("initial_state", state, want.initial_state),
        ] {
            assert_eq!(tensor.and_then(|tensor| got(&tensor)), want.map(|x| wide(&x)), "{what}: {name}");
        }
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
    let (inputs, shape) = (case.update_inputs(), case.state_shape());
    let state = Tensor::from_vec(case.state.clone(), &shape, device).unwrap();
    let [u, delta, a] = [var(&inputs.u, device), var(&inputs.delta, device), var(&inputs.a, device)];
    let (b, c) = (projection(&inputs.b, device), projection(&inputs.c, device));
    let z = inputs.z.as_ref().map(|view| var(view, device));
    let [d, bias] = [&inputs.d, &inputs.delta_bias].map(|view| view.as_ref().map(|view| var(view, device)));
    let update = ComplexUpdate {
        z: z.as_ref(),
        d: d.as_ref(),
        delta_bias: bias.as_ref(),
        ..ComplexUpdate::new(&u, &delta, &a, &b, &c)
    };
    let (out, token_states) = update.update_with_token_states(&state).unwrap();
    let mut pool = case.state.clone();
    let want = on.update(&inputs, ViewMut::new(&mut pool, shape));
    assert_eq!(values(&out), wide(&want.out), "SEED={seed}");
    assert_eq!(values(&token_states), wide(&want.token_states), "SEED={seed}");
    assert_eq!(values(&state), wide(&pool), "SEED={seed}");
}

#[cfg(feature = "candle-cuda")]
mod gpu {
    use super::*;
    use crate::candle::gpu::device;

    #[test]
    fn the_scan_is_that_on_slices() {
        if let Some(device) = &device() {
            scan_on_tensors(device, On::Gpu);
        }
    }

    #[test]
    fn an_update_is_that_on_slices() {
        if let Some(device) = &device() {
            update_on_tensors(device, On::Gpu);
        }
    }
}
