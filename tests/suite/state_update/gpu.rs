//! The state update on a GPU, or on a simulated one.

mod slots;

use half::{bf16, f16};
use selective_scan::scan::cuda::Plan;
use selective_scan::state_update::{Inputs, Options, UpdateMut, cuda};
use selective_scan::{Element, View, ViewMut};

use super::{against_reference, tokens_at_once};
use crate::extremes::an_update_forgets_as_well;
use crate::support::device::Device;
use crate::support::draw::Draw;
use crate::support::gpu::{Copies, stream, with_slots_on_device};
use crate::support::tolerance::bits;

/// Runs an update on the device, on copies of all that it reads and writes.
pub fn update<T: Element, St: Element>(inputs: &Inputs<T>, outputs: UpdateMut<T, St>) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let on_device = Inputs {
        u: copies.view(&inputs.u),
        delta: copies.view(&inputs.delta),
        a: copies.view(&inputs.a),
        b: copies.projection(&inputs.b),
        c: copies.projection(&inputs.c),
        z: inputs.z.as_ref().map(|view| copies.view(view)),
        d: inputs.d.as_ref().map(|view| copies.view(view)),
        delta_bias: inputs.delta_bias.as_ref().map(|view| copies.view(view)),
        slots: copies.slots(inputs.slots),
        options: inputs.options,
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

/// A rollback on the device.
pub fn rollback<St: Element>(
    state: ViewMut<St, 3>,
    token_states: View<St, 4>,
    slots: Option<&[i32]>,
    accepted: &[usize],
) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let ViewMut { data, offset, shape, strides } = state;
    let pool = copies.slice(data);
    let state = ViewMut { data: &mut *pool, offset, shape, strides };
    let token_states = copies.view(&token_states);
    cuda::rollback(&stream, state, token_states, copies.slots(slots.into()), accepted).expect("the case is valid");
    copies.download(pool, data);
}

fn device(_: &mut Draw) -> Device {
    Device::Cuda(Plan::default())
}

#[test]
fn f32_is_as_the_reference() {
    if stream().is_some() {
        against_reference::<f32, f32>(&device, 0..60, &[1, 2, 5]);
    }
}

#[test]
fn a_decay_near_zero_keeps_its_digits() {
    if stream().is_some() {
        for hold in [false, true] {
            an_update_forgets_as_well::<f32>(hold, update);
            an_update_forgets_as_well::<f16>(hold, update);
            an_update_forgets_as_well::<bf16>(hold, update);
        }
    }
}

#[test]
fn half_activations_are_as_the_reference() {
    if stream().is_some() {
        against_reference::<f16, f32>(&device, 0..40, &[1, 3]);
        against_reference::<bf16, f32>(&device, 0..40, &[1, 3]);
    }
}

#[test]
fn half_states_are_as_the_reference() {
    if stream().is_some() {
        against_reference::<f32, f16>(&device, 0..30, &[1]);
        against_reference::<f32, bf16>(&device, 0..30, &[1]);
        against_reference::<bf16, bf16>(&device, 0..30, &[1]);
        against_reference::<f16, bf16>(&device, 0..15, &[1]);
        against_reference::<bf16, f16>(&device, 0..15, &[1]);
        against_reference::<f16, f16>(&device, 0..15, &[1]);
    }
}

#[test]
fn many_tokens_give_the_bits_of_single_ones() {
    if stream().is_some() {
        let device = Device::Cuda(Plan::default());
        tokens_at_once::<f32, f32>(device, 100..120);
        tokens_at_once::<bf16, f16>(device, 100..120);
        tokens_at_once::<f32, bf16>(device, 100..120);
    }
}

#[test]
fn slots_on_the_device_are_as_a_list() {
    if stream().is_some() {
        with_slots_on_device(|| {
            against_reference::<f32, f32>(&device, 60..90, &[1, 2, 5]);
            tokens_at_once::<bf16, f16>(Device::Cuda(Plan::default()), 120..140);
        });
    }
}

/// The fast kernel, with one batch row and with two to a thread, against the CPU: every slot but padding in an order of
/// its own, more rows than a launch carries slots for, and channels that do not fill the last block.
#[test]
fn large_batches_take_any_slots() {
    let Some(stream) = stream() else { return };
    let (d_inner, d_state) = (37, 16);
    for batch in [7, 513, 3001] {
        let draw = &mut Draw::new(batch as u64);
        let size = d_inner * d_state;
        let (u, delta) = (draw.uniform::<bf16>(batch * d_inner, -1.0, 1.0), draw.uniform(batch * d_inner, -3.0, 1.0));
        let (b, c) = (draw.uniform(batch * d_state, -1.0, 1.0), draw.uniform(batch * d_state, -1.0, 1.0));
        let a = draw.uniform::<f32>(size, -2.0, 0.0);
        let slots: Vec<i32> =
            (0..batch as i32).map(|row| if row % 5 == 3 { -1 } else { (row * 2) % (2 * batch as i32 + 1) }).collect();
        let pool: Vec<f32> = draw.uniform((2 * batch + 1) * size, -1.0, 1.0);
        let activation = [batch, 1, d_inner];
        let projection = |data| View::new(data, [batch, 1, 1, d_state]);
        let inputs = Inputs {
            slots: (&slots).into(),
            options: Options { delta_softplus: true, ..Options::default() },
            ..Inputs::new(
                View::new(&u[..], activation),
                View::new(&delta[..], activation),
                View::new(&a, [d_inner, d_state]),
                projection(&b[..]),
                projection(&c[..]),
            )
        };
        let shape = [2 * batch + 1, d_inner, d_state];
        let (mut want, mut got) = (pool.clone(), pool.clone());
        let want_out = inputs.update(ViewMut::new(&mut want, shape)).unwrap();
        let mut out = vec![bf16::NAN; batch * d_inner];
        update(&inputs, UpdateMut { state: ViewMut::new(&mut got, shape), out: &mut out, token_states: None });
        let (mut again, mut out_again) = (pool.clone(), out.clone());
        let outputs = UpdateMut::new(ViewMut::new(&mut again, shape), &mut out_again[..]);
        with_slots_on_device(|| update(&inputs, outputs));
        assert!(bits(&again) == bits(&got) && out_again == out, "batch {batch}: slots on the device");
        // Sums of terms up to 1 or so, with a step size exact to 2^-19; and the outputs' own rounding of 2^-9.
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "{got} and {want}, batch {batch}");
        }
        for (got, want) in out.iter().zip(&want_out) {
            assert!((got.to_f32() - want.to_f32()).abs() <= 0.0079 * want.to_f32().abs() + 1e-5, "{got} and {want}");
        }
        // Whole slots that no row names.
        for slot in (0..shape[0]).filter(|&slot| !slots.contains(&(slot as i32))) {
            let range = slot * size..(slot + 1) * size;
            assert_eq!(bits(&got[range.clone()]), bits(&pool[range]), "slot {slot} of batch {batch}");
        }
    }
    drop(stream);
}

/// Tensors with gaps between all rows, at places where the fast kernels take them, with one batch row and with two to a
/// thread, and one element farther on, where the general kernel does: the same bits, and nothing written to the gaps.
#[test]
fn any_place_and_distance_give_the_same_bits() {
    if stream().is_none() {
        return;
    }
    for (batch, tokens, d_inner, d_state) in [(5, 3, 38, 16), (3, 2, 6, 12), (4, 3, 70, 4), (180, 2, 36, 128)] {
        let groups = 2;
        let draw = &mut Draw::new(d_state as u64);
        let padded = d_state + 4;
        let strides = [d_inner * padded + 8, padded, 1];
        let a: Vec<f32> = draw.uniform(d_inner * padded, -2.0, 0.0);
        let d: Vec<f32> = draw.uniform(d_inner, -1.0, 1.0);
        let activations: Vec<Vec<bf16>> =
            (0..3).map(|_| draw.uniform(batch * tokens * (d_inner + 3), -1.0, 1.0)).collect();
        let projections: Vec<Vec<bf16>> =
            (0..2).map(|_| draw.uniform(batch * tokens * groups * padded, -1.0, 1.0)).collect();
        let slots: Vec<i32> = (0..batch as i32).rev().map(|row| if row == 1 { -1 } else { row }).collect();
        let states: Vec<f32> = draw.uniform(batch * strides[0], -1.0, 1.0);
        let run = |offset: usize| {
            let mut pool = [vec![9.0; offset], states.clone()].concat();
            let activation = |data| {
                let strides = [tokens * (d_inner + 3), d_inner + 3, 1];
                View::new(data, [batch, tokens, d_inner]).with_layout(0, strides)
            };
            let projection = |data| {
                let strides = [tokens * groups * padded, groups * padded, padded, 1];
                View::new(data, [batch, tokens, groups, d_state]).with_layout(0, strides)
            };
            let inputs = Inputs {
                z: Some(activation(&activations[2][..])),
                d: Some(View::new(&d[..], [d_inner])),
                slots: (&slots).into(),
                options: Options { delta_softplus: true, ..Options::default() },
                ..Inputs::new(
                    activation(&activations[0][..]),
                    activation(&activations[1][..]),
                    View::new(&a[..], [d_inner, d_state]).with_layout(0, [padded, 1]),
                    projection(&projections[0][..]),
                    projection(&projections[1][..]),
                )
            };
            let mut out = vec![bf16::NAN; batch * tokens * d_inner];
            let mut token_states = vec![f32::NAN; batch * tokens * d_inner * d_state];
            let state = ViewMut::new(&mut pool[..], [batch, d_inner, d_state]).with_layout(offset, strides);
            update(&inputs, UpdateMut { state, out: &mut out, token_states: Some(&mut token_states) });
            (bits(&pool[offset..]), bits(&out), bits(&token_states))
        };
        let (fast, general) = (run(4), run(5));
        assert!(fast == general, "batch {batch}, d_state {d_state}");
        for (i, (before, after)) in states.iter().zip(&fast.0).enumerate() {
            let within = i % strides[0];
            let is_gap = within >= d_inner * padded || within % padded >= d_state;
            assert!(!is_gap || before.to_bits() == *after, "batch {batch}, d_state {d_state}: written at {i}");
        }
    }
}

#[test]
fn what_lies_elsewhere_or_does_not_fit_is_named() {
    let Some(stream) = stream() else { return };
    let copies = Copies::new(&stream);
    let data = copies.slice(&[1.0f32; 64]);
    let (pool, out) = (copies.slice(&[1.0f32; 24]), copies.slice(&[1.0f32; 15]));
    let u = View::on_device(data, [2, 2, 4]);
    let b = View::on_device(data, [2, 2, 1, 3]);
    let inputs = Inputs::new(u, u, View::on_device(data, [4, 3]), b, b);
    let state = ViewMut::on_device(&mut *pool, [2, 4, 3]);
    let error = cuda::update(&stream, &inputs, UpdateMut { state, out: &mut *out, token_states: None }).unwrap_err();
    assert!(error.to_string().starts_with("`out`: expected (batch, tokens, d_inner) = [2, 2, 4] elements"), "{error}");

    // A stream of another context of the same device.
    let other = cudarc::driver::CudaContext::new_non_primary(0, 0).ok().map(|context| context.default_stream());
    let out = copies.slice(&[1.0f32; 16]);
    if let Some(other) = other {
        let state = ViewMut::on_device(&mut *pool, [2, 4, 3]);
        let error = cuda::update(&other, &inputs, UpdateMut { state, out: &mut *out, token_states: None }).unwrap_err();
        assert!(error.to_string().starts_with("`u`: expected memory of"), "{error}");
    }
    for buffer in [pool, out] {
        let mut host = vec![0.0f32; buffer.len()];
        copies.download(buffer, &mut host);
        assert!(host.iter().all(|&x| x == 1.0), "written on an error");
    }
}
