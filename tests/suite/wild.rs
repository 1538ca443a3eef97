//! Wild arguments to the convolution and the state update, as `arguments.rs` has for the scan: an answer or an error,
//! never a panic and never an access outside a buffer (which the bounds checks of slices would turn into a panic).

use proptest::prelude::*;
use selective_scan::{Projection, View, ViewMut, conv, state_update};

use crate::arguments::{size, view3};

/// Sizes small enough that what is valid can also run.
fn is_small(shape: [usize; 3]) -> bool {
    shape.iter().all(|&n| n < 100)
}

/// Slots that are often valid, and sometimes anything.
fn slots() -> impl Strategy<Value = Option<Vec<i32>>> {
    let slot = prop_oneof![6 => -1..6i32, 1 => any::<i32>()];
    prop::option::of(prop::collection::vec(slot, 0..6))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn wild_convolutions(
        shape in [size(), size(), size()],
        views in [view3(), view3(), view3()],
        same_shape in any::<bool>(),
        dense in any::<bool>(),
        width in prop_oneof![4 => 1usize..10, 1 => size()],
        given in any::<[bool; 3]>(),
        cu_seqlens in prop::option::of(prop::collection::vec(size(), 0..5)),
        slots in slots(),
        lens in [0usize..300, 0usize..300, 0usize..300],
    ) {
        let storage: Vec<Vec<f32>> = lens.iter().map(|&len| vec![0.5; len]).collect();
        let view = |i: usize| {
            let (offset, own, strides) = views[i];
            let view = View::new(&storage[i], if same_shape { shape } else { own });
            if dense { view } else { view.with_layout(offset, strides) }
        };
        let weight = View::new(&storage[1], [shape[2], width]);
        let inputs = conv::Inputs {
            bias: given[0].then(|| View::new(&storage[2], [shape[2]])),
            initial_state: given[1].then(|| view(1)),
            cu_seqlens: cu_seqlens.as_deref(),
            ..conv::Inputs::new(view(0), weight)
        };
        let (mut out, mut state) = (vec![0.0; lens[0]], vec![0.0; lens[1]]);
        let to = conv::OutputMut { out: &mut out[..], final_state: given[2].then_some(&mut state[..]) };
        let _ = conv::cpu::forward(&inputs, to);
        if is_small(view(0).shape) && let Ok(output) = inputs.forward() {
            let d_out = View::new(&output.out, inputs.x.shape);
            prop_assert!(inputs.backward(d_out).is_ok());
            prop_assert!(conv::reference::forward(&inputs).is_ok());
        }

        let update = conv::UpdateInputs { slots: slots.as_deref(), ..conv::UpdateInputs::new(view(0), weight) };
        let (offset, pool_shape, strides) = views[2];
        let mut pool = vec![0.5f32; lens[2]];
        let pool = ViewMut::new(&mut pool, pool_shape).with_layout(offset, strides);
        if is_small(view(0).shape) {
            let _ = update.update_with_token_states(pool);
        }
    }

    #[test]
    fn wild_state_updates(
        shape in [size(), size(), size()],
        views in [view3(), view3(), view3()],
        same_shape in any::<bool>(),
        dense in any::<bool>(),
        n in size(),
        groups in size(),
        constant in any::<[bool; 2]>(),
        given in any::<[bool; 2]>(),
        slots in slots(),
        accepted in prop::collection::vec(size(), 0..5),
        lens in [0usize..300, 0usize..300, 0usize..300],
    ) {
        let storage: Vec<Vec<f32>> = lens.iter().map(|&len| vec![0.5; len]).collect();
        let view = |i: usize| {
            let (offset, own, strides) = views[i];
            let view = View::new(&storage[i], if same_shape { shape } else { own });
            if dense { view } else { view.with_layout(offset, strides) }
        };
        let projection = |i: usize| -> Projection<'_, f32> {
            match constant[i] {
                true => View::new(&storage[i + 1], [shape[2], n]).into(),
                false => View::new(&storage[i + 1], [shape[0], shape[1], groups, n]).into(),
            }
        };
        let a = View::new(&storage[2], [shape[2], n]);
        let inputs = state_update::Inputs {
            z: given[0].then(|| view(1)),
            d: given[1].then(|| View::new(&storage[0], [shape[2]])),
            slots: slots.as_deref(),
            ..state_update::Inputs::new(view(0), view(1), a, projection(0), projection(1))
        };
        let (offset, pool_shape, strides) = views[2];
        let mut pool = vec![0.5f32; lens[2]];
        let pool_view = ViewMut::new(&mut pool, pool_shape).with_layout(offset, strides);
        let mut out = vec![0.0; lens[0]];
        let to = state_update::UpdateMut { state: pool_view, out: &mut out[..], token_states: None };
        let _ = state_update::cpu::update(&inputs, to);
        if is_small(view(0).shape) {
            let _ = inputs.update_with_token_states(ViewMut::new(&mut pool, [shape[0], shape[2], n]));
        }

        let token_states = View::new(&storage[1], [shape[0], shape[1], shape[2], n]);
        let pool_view = ViewMut::new(&mut pool, pool_shape).with_layout(offset, strides);
        let _ = state_update::rollback(pool_view, token_states, slots.as_deref(), &accepted);
    }
}
