//! The convolution's results and gradients.

use candle_core::{Device, Tensor, WithDType};
use half::{bf16, f16};
use rand::Rng;
use selective_scan::candle::{CausalConv, ConvUpdate};
use selective_scan::conv::{Inputs, Options, OutputGradients};
use selective_scan::{Element, View};

use super::{tensor, track, values, weighted};
use crate::support::draw::{Draw, seeded};
use crate::support::tolerance::assert_close;

/// A problem drawn again with each combination of options, held to the `f64` reference and to the graph's properties: the
/// gradients are those of exactly the inputs that are tracked, which are drawn too.
pub fn agrees_with_the_reference<T: Element + WithDType>(device: &Device, rounds: usize) {
    for round in 0..rounds {
        let (mut rng, seed) = seeded();
        let mut draw = Draw::new(seed);
        let has = |bit: usize| round >> bit & 1 == 1;
        let (packed, with_bias, with_state, reverse, silu) = (has(0), has(1), has(2), has(3), has(4));
        let what = format!("round {round}, seed {seed}");
        let (batch, len, d, width) = (if packed { 1 } else { 2 }, 13, 5, rng.random_range(2..=8));
        let cuts = [0, 4, 4, 13];
        let sequences = if packed { 3 } else { batch };
        let x = draw.activation::<T>([batch, len, d]);
        let d_out = draw.activation::<T>([batch, len, d]);
        let [weight, bias] = [d * width, d].map(|len| draw.uniform::<f32>(len, -1.0, 1.0));
        let [state, d_state] = [(); 2].map(|()| draw.uniform::<f32>(sequences * (width - 1) * d, -1.0, 1.0));
        let states = [sequences, width - 1, d];
        let inputs = Inputs {
            bias: with_bias.then(|| View::new(&bias, [d])),
            initial_state: with_state.then(|| View::new(&state, states)),
            cu_seqlens: packed.then_some(&cuts[..]),
            options: Options { silu, reverse },
            ..Inputs::new(x.view(), View::new(&weight, [d, width]))
        };
        let d_outputs = OutputGradients { d_out: d_out.view(), d_final_state: Some(View::new(&d_state, states)) };
        let expected = selective_scan::conv::reference::forward(&inputs).expect("valid");
        let gradients = selective_scan::conv::reference::backward(&inputs, d_outputs).expect("valid");

        let tracked: [bool; 4] = rng.random();
        let x = track(tensor(&inputs.x, device), tracked[0]);
        let weight = track(tensor(&inputs.weight, device), tracked[1]);
        let bias = inputs.bias.map(|view| track(tensor(&view, device), tracked[2]));
        let initial_state = inputs.initial_state.map(|view| track(tensor(&view, device), tracked[3]));
        let conv = CausalConv {
            bias: bias.as_ref(),
            initial_state: initial_state.as_ref(),
            cu_seqlens: inputs.cu_seqlens,
            options: inputs.options,
            ..CausalConv::new(&x, &weight)
        };
        let (out, final_state) = conv.forward_with_state().expect("valid");
        assert_eq!(values(&conv.forward().expect("valid")), values(&out), "{what}");
        let [d_out, d_state] = [tensor(&d_outputs.d_out, device), tensor(&View::new(&d_state, states), device)];
        let loss = (weighted(&out, &d_out) + weighted(&final_state, &d_state)).expect("two numbers");
        let store = loss.backward().expect("a loss");

        // The crate's bounds: 1e-5 in f32, 1e-4 in its gradients, and what the type's rounding explains.
        assert_close(&elements::<T>(&out), &expected.out, 1e-5, &what);
        assert_close(&elements::<f32>(&final_state), &expected.final_state, 1e-5, &what);
        let close = |input: &Tensor, expected: &[f64], tracked: bool, name: &str| {
            let Some(gradient) = store.get(input) else { return assert!(!tracked, "{name}: no gradient, {what}") };
            assert!(tracked, "{name}: a gradient, {what}");
            assert_eq!((gradient.dtype(), gradient.shape()), (input.dtype(), input.shape()), "{name}, {what}");
            match name {
                "x" => assert_close(&elements::<T>(gradient), expected, 1e-4, &what),
                _ => assert_close(&elements::<f32>(gradient), expected, 1e-4, &what),
            }
        };
        close(&x, &gradients.x, tracked[0], "x");
        close(&weight, &gradients.weight, tracked[1], "weight");
        for (input, expected, tracked, name) in [
            (&bias, &gradients.bias, tracked[2], "bias"),
            (&initial_state, &gradients.initial_state, tracked[3], "initial_state"),
        ] {
            if let (Some(input), Some(expected)) = (input, expected) {
                close(input, expected, tracked, name);
            }
        }
    }
}

fn elements<T: WithDType>(tensor: &Tensor) -> Vec<T> {
    tensor.flatten_all().and_then(|flat| flat.to_vec1()).expect("of this type")
}

#[test]
fn in_every_type_agrees_with_the_reference() {
    agrees_with_the_reference::<f32>(&Device::Cpu, 128);
    agrees_with_the_reference::<f16>(&Device::Cpu, 32);
    agrees_with_the_reference::<bf16>(&Device::Cpu, 32);
}

/// Filters of shape `(d_inner, 1, width)`, as checkpoints have them, are those without the dimension of one, and so are their
/// gradients.
#[test]
fn filters_as_checkpoints_have_them() {
    let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).expect("a tensor");
    let (x, weight) = (random(&[2, 5, 3]), track(random(&[3, 1, 4]), true));
    let flat = weight.squeeze(1).expect("a dimension of one");
    let (conv, flat_conv) = (CausalConv::new(&x, &weight), CausalConv::new(&x, &flat));
    let (out, state) = conv.forward_with_state().expect("valid");
    let (flat_out, flat_state) = flat_conv.forward_with_state().expect("valid");
    assert_eq!((values(&out), values(&state)), (values(&flat_out), values(&flat_state)));
    let gradient = |out: &Tensor| {
        let store = out.sqr().and_then(|out| out.sum_all()?.backward()).expect("a loss");
        store.get(&weight).expect("it is tracked").clone()
    };
    assert_eq!(gradient(&out).dims(), [3, 1, 4]);
    assert_eq!(values(&gradient(&out)), values(&gradient(&flat_out)));

    let (pool, flat_pool) = (random(&[2, 3, 3]), random(&[2, 3, 3]));
    flat_pool.slice_set(&pool, 0, 0).expect("of one shape");
    let updated = ConvUpdate::new(&x, &weight).update(&pool).expect("valid");
    assert_eq!(values(&updated), values(&ConvUpdate::new(&x, &flat).update(&flat_pool).expect("valid")));
    assert_eq!(values(&pool), values(&flat_pool));
    // Of another size it is an error still.
    let error = CausalConv::new(&x, &random(&[3, 2, 4])).forward().expect_err("no filters").to_string();
    assert!(error.contains("`weight`: expected shape (d_inner, width), got [3, 2, 4]"), "{error}");
}
