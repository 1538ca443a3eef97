//! Sizes beyond all memory, most of them of views that repeat one element: every operator gives an answer or an error at
//! once, without hanging, aborting, panicking or taking gigabytes.
//!
//! Sizes are small, or at least 2^40: what has that many elements has no room on any machine (4 TiB of f32), so that a call
//! that goes on has to fail or to have nothing to do.

use proptest::prelude::*;
use selective_scan::scan::{self, Gradients};
use selective_scan::{Discretization, Error, Projection, Result, View, ViewMut, conv, state_update};

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        3 => Just(0usize),
        4 => 1usize..4,
        2 => Just(1 << 40),
        1 => Just((1 << 40) + 1),
        1 => Just(1 << 53),
        1 => Just(1 << 62),
        1 => Just(usize::MAX),
    ]
}

/// Whether the system refuses what it has no room for. One that promises everything and kills who uses it (Linux with
/// `vm.overcommit_memory=1`) leaves nothing to be tested here.
fn refuses() -> bool {
    let refuses = Vec::<u8>::new().try_reserve_exact(1 << 42).is_err();
    if !refuses {
        eprintln!("the system promises any amount of memory: sizes beyond it are not tried");
    }
    refuses
}

/// An answer, or an error about an argument that says what came.
fn answered<T>(result: Result<T>) -> Option<T> {
    match result {
        Ok(answer) => Some(answer),
        Err(Error::Argument { argument, expected, got }) => {
            assert!(!argument.is_empty() && !expected.is_empty() && !got.is_empty());
            None
        }
        Err(other) => panic!("{other}"),
    }
}

static ONE: [f32; 1] = [0.5];

/// A view that repeats one element.
fn repeated<const R: usize>(shape: [usize; R]) -> View<'static, f32, R> {
    View::new(&ONE, shape).with_layout(0, [0; R])
}

fn offsets(cuts: &Option<Vec<usize>>, len: usize) -> Option<Vec<usize>> {
    cuts.as_ref().map(|cuts| {
        let mut offsets: Vec<_> = cuts.iter().map(|&cut| cut.min(len)).collect();
        offsets.extend([0, len]);
        offsets.sort_unstable();
        offsets
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn scans(
        [batch, len, d] in [size(), size(), size()],
        n in prop_oneof![4 => 1usize..4, 1 => Just(256usize), 1 => size()],
        groups in prop_oneof![3 => Just(1usize), 1 => size()],
        constant in any::<[bool; 2]>(),
        given in any::<[bool; 6]>(),
        cuts in prop::option::weighted(0.2, prop::collection::vec(size(), 0..3)),
    ) {
        if !refuses() {
            return Ok(());
        }
        let activation = [batch, len, d];
        let projection = |constant: bool| -> Projection<'_, f32> {
            if constant { repeated([d, n]).into() } else { repeated([batch, len, groups, n]).into() }
        };
        let offsets = offsets(&cuts, len);
        let sequences = offsets.as_ref().map_or(batch, |offsets| offsets.len() - 1);
        let inputs = scan::Inputs {
            z: given[0].then(|| repeated(activation)),
            d: given[1].then(|| repeated([d])),
            delta_bias: given[2].then(|| repeated([d])),
            initial_state: given[3].then(|| repeated([sequences, d, n])),
            cu_seqlens: offsets.as_deref(),
            options: scan::Options {
                discretization: if given[4] { Discretization::ZeroOrderHold } else { Discretization::Euler },
                ..Default::default()
            },
            ..scan::Inputs::new(
                repeated(activation),
                repeated(activation),
                repeated([d, n]),
                projection(constant[0]),
                projection(constant[1]),
            )
        };
        let d_outputs = scan::OutputGradients {
            d_out: repeated(activation),
            d_final_state: given[5].then(|| repeated([sequences, d, n])),
        };
        answered(inputs.checkpoint_len());
        answered(inputs.forward());
        if let Some((_, checkpoints)) = answered(inputs.forward_with_checkpoints()) {
            answered(inputs.backward(&checkpoints, d_outputs));
        }
        answered(scan::reference::forward(&inputs));
        answered(scan::reference::backward(&inputs, d_outputs));
        let to = scan::OutputMut { out: &mut [][..], final_state: None, checkpoints: None };
        answered(scan::cpu::forward(&inputs, to));
        if let Some(mut gradients) = answered(Gradients::zeroed(&inputs)) {
            answered(scan::cpu::backward(&inputs, &[], d_outputs, gradients.as_mut()));
        }
    }

    #[test]
    fn convolutions(
        [batch, len, d] in [size(), size(), size()],
        width in prop_oneof![4 => 2usize..9, 1 => size()],
        given in any::<[bool; 3]>(),
        slots in prop::option::of(prop::collection::vec(-1i32..3, 0..3)),
        pool in size(),
        cuts in prop::option::weighted(0.2, prop::collection::vec(size(), 0..3)),
    ) {
        if !refuses() {
            return Ok(());
        }
        let offsets = offsets(&cuts, len);
        let sequences = offsets.as_ref().map_or(batch, |offsets| offsets.len() - 1);
        let states = [sequences, width.saturating_sub(1), d];
        let inputs = conv::Inputs {
            bias: given[0].then(|| repeated([d])),
            initial_state: given[1].then(|| repeated(states)),
            cu_seqlens: offsets.as_deref(),
            ..conv::Inputs::new(repeated([batch, len, d]), repeated([d, width]))
        };
        let d_outputs = conv::OutputGradients {
            d_out: repeated([batch, len, d]),
            d_final_state: given[2].then(|| repeated(states)),
        };
        answered(inputs.forward());
        answered(inputs.backward(d_outputs));
        answered(conv::reference::forward(&inputs));
        answered(conv::reference::backward(&inputs, d_outputs));
        answered(conv::cpu::forward(&inputs, conv::OutputMut { out: &mut [][..], final_state: None }));
        if let Some(mut gradients) = answered(conv::Gradients::zeroed(&inputs)) {
            answered(conv::cpu::backward(&inputs, d_outputs, gradients.as_mut()));
        }

        let update = conv::UpdateInputs {
            slots: slots.as_deref().into(),
            ..conv::UpdateInputs::new(repeated([batch, len, d]), repeated([d, width]))
        };
        let pool = [if slots.is_some() { pool } else { batch }, width.saturating_sub(1), d];
        answered(conv::reference::update(&update, repeated(pool)));
        answered(update.update(ViewMut::<f32, 3>::new(&mut [], pool)));
        answered(update.update_with_token_states(ViewMut::<f32, 3>::new(&mut [], pool)));
    }

    #[test]
    fn state_updates(
        [batch, len, d] in [size(), size(), size()],
        n in prop_oneof![4 => 1usize..4, 1 => Just(256usize), 1 => size()],
        groups in prop_oneof![3 => Just(1usize), 1 => size()],
        slots in prop::option::of(prop::collection::vec(-1i32..3, 0..3)),
        accepted in prop::collection::vec(size(), 0..3),
        pool in size(),
    ) {
        if !refuses() {
            return Ok(());
        }
        let (activation, varying) = ([batch, len, d], [batch, len, groups, n]);
        let inputs = state_update::Inputs {
            slots: slots.as_deref().into(),
            ..state_update::Inputs::new(
                repeated(activation),
                repeated(activation),
                repeated([d, n]),
                repeated(varying),
                repeated(varying),
            )
        };
        let pool = [if slots.is_some() { pool } else { batch }, d, n];
        answered(state_update::reference::update(&inputs, repeated(pool)));
        answered(inputs.update(ViewMut::<f32, 3>::new(&mut [], pool)));
        answered(inputs.update_with_token_states(ViewMut::<f32, 3>::new(&mut [], pool)));
        let pool = ViewMut::<f32, 3>::new(&mut [], pool);
        answered(state_update::rollback(pool, repeated([batch, len, d, n]), slots.as_deref(), &accepted));
    }
}

/// The cases that the sweep was made of, with what is right: nothing, at once, or an error that has the size in it.
#[test]
fn sizes_that_were_counted_through() {
    if !refuses() {
        return;
    }
    const MANY: usize = 1 << 40;
    let scan = |batch, len, d: usize| {
        let (activation, varying) = ([batch, len, d], [batch, len, 1, 1]);
        let (u, a) = (repeated(activation), repeated([d, 1]));
        scan::Inputs::new(u, u, a, repeated(varying), repeated(varying))
    };
    let refused = |error: Error, argument: &str| {
        let text = error.to_string();
        assert!(text.starts_with(&format!("`{argument}`: ")) && text.contains(&MANY.to_string()), "{text}");
    };
    // No rows: nothing comes out, and A's gradient is all that there is.
    let none = scan(0, 5, MANY);
    assert!(none.forward().expect("nothing to do").out.is_empty());
    assert!(scan::reference::forward(&none).expect("nothing to do").out.is_empty());
    let d_out = repeated([0, 5, MANY]);
    let (_, checkpoints) = none.forward_with_checkpoints().expect("nothing to keep");
    refused(none.backward(&checkpoints, d_out).expect_err("4 TiB"), "a");
    refused(scan::reference::backward(&none, d_out).expect_err("8 TiB"), "a");
    // No steps: the states are what comes out.
    refused(scan(3, 0, MANY).forward().expect_err("12 TiB"), "initial_state");
    refused(scan(MANY, 0, 3).forward().expect_err("12 TiB"), "initial_state");
    let gradients = scan::reference::backward(&scan(MANY, 0, 3), repeated([MANY, 0, 3])).expect("no initial state");
    assert_eq!(gradients.a, [0.0; 3]);
    refused(scan(MANY, 3, 1).forward().expect_err("12 TiB"), "u");
    refused(scan(1, 3, MANY).forward_with_checkpoints().expect_err("12 TiB"), "u");
    assert_eq!(scan(MANY, 64, 1).checkpoint_len(), Ok(MANY));
    let wide = scan::Inputs { a: repeated([1 << 60, 16]), ..scan(1, 0, 1 << 60) };
    let b = repeated([1, 0, 1, 16]);
    // 2^64 parameters, of which none is stored.
    assert_eq!(scan::Inputs { b: b.into(), c: b.into(), ..wide }.checkpoint_len(), Ok(0));

    let conv = |batch, len, d: usize| conv::Inputs::new(repeated([batch, len, d]), repeated([d, 4]));
    assert!(conv(0, 5, MANY).forward().expect("nothing to do").out.is_empty());
    refused(conv(0, 5, MANY).backward(repeated([0, 5, MANY])).expect_err("16 TiB"), "weight");
    let gradients = conv::reference::backward(&conv(MANY, 0, 2), repeated([MANY, 0, 2])).expect("no initial state");
    assert_eq!(gradients.weight, [0.0; 8]);
}
