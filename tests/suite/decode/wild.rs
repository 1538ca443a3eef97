//! Wild arguments: an answer or an error, never a panic and never an access outside a buffer (which the bounds checks of slices
//! would turn into a panic).

use proptest::prelude::*;
use selective_scan::decode::{
    ColumnNorms, Columns, ConvStep, Linear, LinearMut, RowNorm, SelectiveUpdate, SelectiveUpdateMut,
};
use selective_scan::decode::{cpu, reference};
use selective_scan::{View, ViewMut};

use crate::support::wild::{size, slots, view3};

/// Whether what is valid is small enough to run.
fn is_small(shapes: &[[usize; 2]]) -> bool {
    shapes.iter().flatten().all(|&n| n < 100)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn wild_products(
        sizes in [size(), size(), size()],
        views in [view3(), view3(), view3()],
        dense in any::<[bool; 2]>(),
        own in any::<bool>(),
        width in prop_oneof![4 => 2usize..10, 1 => size()],
        given in any::<[bool; 5]>(),
        slots in slots(),
        lens in [0usize..300, 0usize..300, 0usize..300],
    ) {
        let storage: Vec<Vec<f32>> = lens.iter().map(|&len| vec![0.5; len]).collect();
        let [rows, features, columns] = sizes;
        let view = |i: usize, shape: [usize; 2]| {
            let (offset, [a, b, _], [row, column, _]) = views[i];
            let view = View::new(&storage[i][..], if own { [a, b] } else { shape });
            if dense[i] { view } else { view.with_layout(offset, [row, column]) }
        };
        let d_inner = columns.min(views[2].1[2]);
        let inputs = Linear {
            bias: given[0].then(|| View::new(&storage[2][..], [columns])),
            norm: given[1].then(|| RowNorm { weight: Some(View::new(&storage[2][..], [features])), eps: 1e-5 }),
            conv: given[2].then(|| ConvStep {
                weight: View::new(&storage[2][..], [d_inner, width]),
                bias: None,
                slots: slots.as_deref().into(),
            }),
            ..Linear::new(view(0, [rows, features]), view(1, [columns, features]))
        };
        let (offset, own_shape, strides) = views[2];
        let pool_shape = if given[4] { own_shape } else { [5, width.wrapping_sub(1), d_inner] };
        let mut pool = vec![0.5f32; lens[2]];
        let state = ViewMut::new(&mut pool[..], pool_shape).with_layout(offset, strides);
        let mut out = vec![0.5f32; rows.saturating_mul(columns).min(1000)];
        if is_small(&[inputs.x.shape, inputs.weight.shape]) {
            let conv_state = given[2].then_some(state);
            let result = cpu::linear(&inputs, LinearMut { out: &mut out[..], accumulate: given[3], conv_state });
            if result.is_ok() && !given[2] {
                prop_assert!(reference::linear::<f32, f32, f32>(&inputs, None).is_ok());
            }
        }
    }

    #[test]
    fn wild_updates(
        sizes in [size(), size(), size(), size()],
        views in [view3(), view3(), view3()],
        dense in any::<[bool; 3]>(),
        own in any::<bool>(),
        given in any::<[bool; 3]>(),
        slots in slots(),
        lens in [0usize..300, 0usize..300, 0usize..300],
        projected in any::<bool>(),
        columns_len in 0usize..300,
    ) {
        let storage: Vec<Vec<f32>> = lens.iter().map(|&len| vec![0.5; len]).collect();
        let [rows, d_inner, d_state, dt_rank] = sizes;
        let view = |i: usize, shape: [usize; 2]| {
            let (offset, [a, b, _], [row, column, _]) = views[i];
            let view = View::new(&storage[i][..], if own { [a, b] } else { shape });
            if dense[i] { view } else { view.with_layout(offset, [row, column]) }
        };
        let width = dt_rank.wrapping_add(d_state.wrapping_mul(2));
        let u = view(0, [rows, d_inner]);
        let of_columns = view(1, if projected { [width, d_inner] } else { [rows, width] });
        let columns = if projected { Columns::Projected { weight: of_columns } } else { Columns::Given(of_columns) };
        let inputs = SelectiveUpdate {
            norms: given[0].then_some(ColumnNorms { weights: None, eps: 1e-5 }),
            z: given[1].then_some(u),
            slots: slots.as_deref().into(),
            ..SelectiveUpdate::new(
                u,
                columns,
                view(2, [d_inner, dt_rank]),
                View::new(&storage[2][..], [d_inner, d_state]),
            )
        };
        let (offset, own_shape, strides) = views[2];
        let pool_shape = if given[2] { own_shape } else { [rows, d_inner, d_state] };
        let mut pool = vec![0.5f32; lens[1]];
        let state = ViewMut::new(&mut pool[..], pool_shape);
        let state = if dense[2] { state } else { state.with_layout(offset, strides) };
        let mut out = vec![0.5f32; rows.saturating_mul(d_inner).min(1000)];
        let mut to = vec![0.5f32; if given[0] { rows.saturating_mul(width).min(1000) } else { columns_len }];
        if is_small(&[inputs.u.shape, of_columns.shape, inputs.dt_weight.shape]) {
            let columns = projected.then_some(&mut to[..]);
            let _ = cpu::selective_update(&inputs, SelectiveUpdateMut { columns, ..SelectiveUpdateMut::new(state, &mut out[..]) });
        }
    }
}
