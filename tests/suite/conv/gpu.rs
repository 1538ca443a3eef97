//! The convolution on a GPU, or on a simulated one.

use half::{bf16, f16};
use selective_scan::conv::{
    GradientsMut, Inputs, Options, OutputGradients, OutputMut, UpdateInputs, UpdateMut, cuda, reference,
};
use selective_scan::scan::cuda::Plan;
use selective_scan::{Element, View, ViewMut, cuda::Cuda};

use super::update::{tokens_at_once, update_against_reference};
use super::{Case, against_reference, chunks, infinite_weights, packed_alone};
use crate::support::device::Device;
use crate::support::draw::Draw;
use crate::support::gpu::{Copies, stream, with_slots_on_device};
use crate::support::tolerance::{assert_close, bits};

fn on_device<'a, T: Element>(copies: &'a Copies, inputs: &Inputs<'a, T>) -> Inputs<'a, T, Cuda> {
    Inputs {
        bias: inputs.bias.as_ref().map(|view| copies.view(view)),
        initial_state: inputs.initial_state.as_ref().map(|view| copies.view(view)),
        cu_seqlens: inputs.cu_seqlens,
        options: inputs.options,
        ..Inputs::new(copies.view(&inputs.x), copies.view(&inputs.weight))
    }
}

/// A forward pass on copies of all that it reads and writes.
pub fn forward<T: Element>(inputs: &Inputs<T>, to: OutputMut<T>) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let out = copies.slice(to.out);
    let mut final_state = to.final_state.as_ref().map(|state| copies.slice(state));
    let outputs = OutputMut { out: &mut *out, final_state: final_state.as_deref_mut() };
    cuda::forward(&stream, &on_device(&copies, inputs), outputs).expect("the case is valid");
    copies.download(out, to.out);
    if let (Some(from), Some(to)) = (final_state, to.final_state) {
        copies.download(from, to);
    }
}

/// A backward pass on copies of all that it reads and writes.
pub fn backward<T: Element>(inputs: &Inputs<T>, d_outputs: OutputGradients<T>, to: GradientsMut<T>) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let (x, weight) = (copies.slice(to.x), copies.slice(to.weight));
    let mut bias = to.bias.as_ref().map(|bias| copies.slice(bias));
    let mut initial_state = to.initial_state.as_ref().map(|state| copies.slice(state));
    let gradients = GradientsMut {
        x: &mut *x,
        weight: &mut *weight,
        bias: bias.as_deref_mut(),
        initial_state: initial_state.as_deref_mut(),
    };
    let d_outputs = OutputGradients {
        d_out: copies.view(&d_outputs.d_out),
        d_final_state: d_outputs.d_final_state.as_ref().map(|view| copies.view(view)),
    };
    cuda::backward(&stream, &on_device(&copies, inputs), d_outputs, gradients).expect("the case is valid");
    copies.download(x, to.x);
    copies.download(weight, to.weight);
    for (from, to) in [(bias, to.bias), (initial_state, to.initial_state)] {
        if let (Some(from), Some(to)) = (from, to) {
            copies.download(from, to);
        }
    }
}

/// An update on copies of all that it reads and writes.
pub fn update<T: Element, St: Element>(inputs: &UpdateInputs<T>, outputs: UpdateMut<T, St>) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let on_device = UpdateInputs {
        bias: inputs.bias.as_ref().map(|view| copies.view(view)),
        slots: copies.slots(inputs.slots),
        silu: inputs.silu,
        ..UpdateInputs::new(copies.view(&inputs.x), copies.view(&inputs.weight))
    };
    let ViewMut { data, offset, shape, strides } = outputs.state;
    let pool = copies.slice(data);
    let out = copies.slice(outputs.out);
    let mut kept = outputs.token_states.as_ref().map(|states| copies.slice(states));
    let state = ViewMut { data: &mut *pool, offset, shape, strides };
    let to = UpdateMut { state, out: &mut *out, token_states: kept.as_deref_mut() };
    cuda::update(&stream, &on_device, to).expect("the case is valid");
    copies.download(pool, data);
    copies.download(out, outputs.out);
    if let (Some(from), Some(to)) = (kept, outputs.token_states) {
        copies.download(from, to);
    }
}

fn gpu() -> Device {
    Device::Cuda(Plan::default())
}

fn device(_: &mut Draw) -> Device {
    gpu()
}

#[test]
fn f32_is_as_the_reference() {
    if stream().is_some() {
        against_reference::<f32>(&device, 120);
    }
}

#[test]
fn halves_are_as_the_reference() {
    if stream().is_some() {
        against_reference::<f16>(&device, 40);
        against_reference::<bf16>(&device, 40);
    }
}

#[test]
fn infinite_weights_stay_where_they_are_met() {
    if stream().is_some() {
        infinite_weights(gpu());
    }
}

#[test]
fn a_packed_sequence_gives_the_bits_of_the_same_alone() {
    if stream().is_some() {
        packed_alone(gpu(), 200..230);
    }
}

#[test]
fn chunks_give_the_bits_of_the_whole() {
    if stream().is_some() {
        chunks(gpu(), 300..325);
    }
}

#[test]
fn updates_are_as_the_reference() {
    if stream().is_some() {
        update_against_reference::<f32, f32>(&device, &[1, 2, 5]);
        update_against_reference::<bf16, f32>(&device, &[1, 4]);
        update_against_reference::<f16, f16>(&device, &[1, 4]);
        // The reference does not round inputs between tokens.
        update_against_reference::<f32, bf16>(&device, &[1]);
        update_against_reference::<bf16, bf16>(&device, &[1]);
    }
}

#[test]
fn many_tokens_give_the_bits_of_single_ones() {
    if stream().is_some() {
        tokens_at_once::<f32, f32>(gpu());
        tokens_at_once::<f32, bf16>(gpu());
        tokens_at_once::<bf16, f16>(gpu());
    }
}

#[test]
fn slots_on_the_device_are_as_a_list() {
    if stream().is_some() {
        with_slots_on_device(|| {
            update_against_reference::<f32, f32>(&device, &[1, 2, 5]);
            tokens_at_once::<bf16, f16>(gpu());
        });
    }
}

/// Filters of every width over channels that can be read in vectors of 4, so that the kernels for that are met; the same bits
/// from a column slice that starts at an odd channel; and the same bits again in a second run.
#[test]
fn any_layout_and_every_run_give_the_same_bits() {
    if stream().is_none() {
        return;
    }
    for width in 2..=8 {
        for (silu, reverse) in [(true, false), (false, true)] {
            let draw = &mut Draw::new(width as u64);
            let shape @ [batch, len, d] = [2, 150, 132];
            let size = batch * len * d;
            let (x, d_out): (Vec<bf16>, Vec<bf16>) = (draw.uniform(size, -1.0, 1.0), draw.uniform(size, -1.0, 1.0));
            let state = batch * (width - 1) * d;
            let case = |shifted: bool| {
                // Rows of 2 d + 3, of which these are the columns from d + 1 on.
                let strided = |values: &[bf16]| {
                    let mut wide = vec![bf16::NAN; batch * len * (2 * d + 3)];
                    for (to, from) in wide.chunks_mut(2 * d + 3).zip(values.chunks(d)) {
                        to[d + 1..][..d].copy_from_slice(from);
                    }
                    (wide, d + 1, [len * (2 * d + 3), 2 * d + 3, 1])
                };
                let tensor = |values: &[bf16]| {
                    let dense = (values.to_vec(), 0, [len * d, d, 1]);
                    let (data, offset, strides) = if shifted { strided(values) } else { dense };
                    crate::support::strided::Strided { data, offset, shape, strides }
                };
                let draw = &mut Draw::new(9);
                Case {
                    width,
                    x: tensor(&x),
                    weight: draw.uniform(d * width, -1.0, 1.0),
                    bias: Some(draw.uniform(d, -1.0, 1.0)),
                    initial: Some(draw.uniform(state, -1.0, 1.0)),
                    cu_seqlens: None,
                    options: Options { silu, reverse },
                    d_out: tensor(&d_out),
                    d_final: Some(draw.uniform(state, -1.0, 1.0)),
                }
            };
            let plain = case(false);
            let results = plain.run(gpu());
            let want = reference::backward(&plain.inputs(), plain.d_outputs()).unwrap();
            assert_close(&results.1.weight, &want.weight, super::GRADIENTS, "weight");
            assert_close(&results.1.x, &want.x, super::GRADIENTS, "x");
            assert_eq!(results, plain.run(gpu()), "width {width}: in a second run");
            assert_eq!(results, case(true).run(gpu()), "width {width}: in another layout");
        }
    }
}

/// As `long_sums_stay_exact`, but shorter: more runs than blocks, and more blocks than are summed at a time.
#[test]
fn sums_over_many_runs_stay_exact() {
    if stream().is_none() {
        return;
    }
    let (len, d, width) = (20_000, 3, 4);
    let draw = &mut Draw::new(9);
    let (x, d_out) = (draw.uniform::<f32>(len * d, 0.5, 1.0), draw.uniform::<f32>(len * d, 0.5, 1.0));
    let weight = draw.uniform(d * width, -1.0, 1.0);
    let inputs = Inputs {
        options: Options { silu: true, reverse: false },
        ..Inputs::new(View::new(&x, [1, len, d]), View::new(&weight, [d, width]))
    };
    let d_out = View::new(&d_out[..], [1, len, d]);
    let got = super::backward(gpu(), &inputs, d_out.into());
    let want = reference::backward(&inputs, d_out).unwrap();
    assert_close(&got.weight, &want.weight, 2e-6, "weight");
}

/// Enough channels and steps that every processor of a large device has two blocks, for which runs are longer and of a
/// length that the shape decides.
#[test]
fn runs_of_any_length_are_as_the_reference() {
    if stream().is_none() {
        return;
    }
    let (shape @ [batch, len, d], width) = ([4, 1000, 528], 4);
    let draw = &mut Draw::new(12);
    let size = batch * len * d;
    let (x, d_out) = (draw.uniform::<f32>(size, -1.0, 1.0), draw.uniform::<f32>(size, -1.0, 1.0));
    let weight = draw.uniform(d * width, -1.0, 1.0);
    let inputs = Inputs {
        options: Options { silu: true, reverse: false },
        ..Inputs::new(View::new(&x, shape), View::new(&weight, [d, width]))
    };
    let d_out = View::new(&d_out[..], shape);
    let got = super::backward(gpu(), &inputs, d_out.into());
    let want = reference::backward(&inputs, d_out).unwrap();
    assert_close(&got.x, &want.x, super::GRADIENTS, "x");
    assert_close(&got.weight, &want.weight, super::GRADIENTS, "weight");
}

#[test]
fn large_batches_take_any_slots() {
    if stream().is_none() {
        return;
    }
    for (batch, d, width) in [(601, 8, 4), (70, 1100, 3)] {
        let draw = &mut Draw::new(3);
        let (x, weight) = (draw.uniform::<bf16>(batch * d, -1.0, 1.0), draw.uniform::<f32>(d * width, -1.0, 1.0));
        let slots: Vec<i32> =
            (0..batch as i32).map(|row| if row % 7 == 2 { -3 } else { (row * 2) % (2 * batch as i32 + 1) }).collect();
        let shape = [2 * batch + 1, width - 1, d];
        let pool: Vec<f32> = draw.uniform(shape.iter().product(), -1.0, 1.0);
        let inputs = UpdateInputs {
            slots: (&slots).into(),
            ..UpdateInputs::new(View::new(&x[..], [batch, 1, d]), View::new(&weight, [d, width]))
        };
        let (mut want, mut got) = (pool.clone(), pool);
        let want_out = inputs.update(ViewMut::new(&mut want, shape)).unwrap();
        let mut out = vec![bf16::NAN; batch * d];
        update(&inputs, UpdateMut { state: ViewMut::new(&mut got, shape), out: &mut out, token_states: None });
        // The state is moved, not computed; and without SiLU a sum in the same order has the same bits.
        assert_eq!(bits(&got), bits(&want), "the pool of batch {batch}");
        assert_eq!(bits(&out), bits(&want_out), "the outputs of batch {batch}");
    }
}

#[test]
fn nothing_in_gives_nothing_out() {
    if stream().is_none() {
        return;
    }
    let (weight, state) = ([1.0f32; 12], [2.0f32; 16]);
    for (batch, len) in [(0, 5), (2, 0)] {
        let x = View::new(&[0.0f32; 0][..], [batch, len, 4]);
        let initial = View::new(&state[..batch * 8], [batch, 2, 4]);
        let inputs = Inputs { initial_state: Some(initial), ..Inputs::new(x, View::new(&weight, [4, 3])) };
        assert_eq!(super::forward(gpu(), &inputs).final_state, vec![2.0; batch * 8]);
        let d_outputs = OutputGradients { d_out: x, d_final_state: Some(initial) };
        let gradients = super::backward(gpu(), &inputs, d_outputs);
        assert_eq!(gradients.initial_state, Some(vec![2.0; batch * 8]));
        assert_eq!(gradients.weight, [0.0; 12]);
    }
    // More rows of nothing than can be counted through.
    let x = View::new(&[0.0f32; 0][..], [usize::MAX / 8, 0, 1]);
    let inputs = Inputs::new(x, View::new(&weight[..2], [1, 2]));
    assert_eq!(super::backward(gpu(), &inputs, x.into()).weight, [0.0; 2]);
    forward(&inputs, OutputMut { out: &mut [], final_state: None });
}

#[test]
fn what_lies_elsewhere_or_does_not_fit_is_named() {
    let Some(stream) = stream() else { return };
    let copies = Copies::new(&stream);
    let data = copies.slice(&[1.0f32; 64]);
    let (out, short) = (copies.slice(&[1.0f32; 24]), copies.slice(&[1.0f32; 23]));
    let inputs = Inputs::new(View::on_device(data, [2, 3, 4]), View::on_device(data, [4, 3]));
    let error = cuda::forward(&stream, &inputs, OutputMut { out: &mut *short, final_state: None }).unwrap_err();
    assert!(error.to_string().starts_with("`out`: expected (batch, length, d_inner) = [2, 3, 4] elements"), "{error}");

    // A stream of another context of the same device.
    let other = cudarc::driver::CudaContext::new_non_primary(0, 0).ok().map(|context| context.default_stream());
    if let Some(other) = other {
        let error = cuda::forward(&other, &inputs, OutputMut { out: &mut *out, final_state: None }).unwrap_err();
        assert!(error.to_string().starts_with("`x`: expected memory of"), "{error}");
    }
    for buffer in [short, out] {
        let mut host = vec![0.0f32; buffer.len()];
        copies.download(buffer, &mut host);
        assert!(host.iter().all(|&x| x == 1.0), "written on an error");
    }
}
