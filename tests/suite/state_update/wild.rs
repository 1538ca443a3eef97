//! Wild arguments to the state update: an answer or an error, never a panic and never an access outside a buffer (which the bounds
//! checks of slices would turn into a panic).

use proptest::prelude::*;
use selective_scan::{Projection, View, ViewMut, state_update};

use crate::support::wild::{is_small, size, slots, view3};

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

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
            slots: slots.as_deref().into(),
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
