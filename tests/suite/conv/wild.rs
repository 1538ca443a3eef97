//! Wild arguments to the convolution: an answer or an error, never a panic and never an access outside a buffer (which the bounds
//! checks of slices would turn into a panic).

use proptest::prelude::*;
use selective_scan::{View, ViewMut, conv};

use crate::support::wild::{is_small, size, slots, view3};

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

        let update = conv::UpdateInputs { slots: slots.as_deref().into(), ..conv::UpdateInputs::new(view(0), weight) };
        let (offset, pool_shape, strides) = views[2];
        let mut pool = vec![0.5f32; lens[2]];
        let pool = ViewMut::new(&mut pool, pool_shape).with_layout(offset, strides);
        if is_small(view(0).shape) {
            let _ = update.update_with_token_states(pool);
        }
    }
}
