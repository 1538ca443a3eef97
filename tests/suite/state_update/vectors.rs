//! The state update against PyTorch.

use selective_scan::state_update::{Inputs, Options, UpdateMut, UpdateOutput, cpu, reference};
use selective_scan::{Isa, Slots, ViewMut};

use crate::support::vectors::{Case, Comparison, FORWARD, REFERENCE, widen};

fn inputs<'a>(case: &'a Case, slots: &'a Option<Vec<i32>>) -> Inputs<'a, f32> {
    Inputs {
        u: case.view("u"),
        delta: case.view("delta"),
        a: case.view("a"),
        b: case.projection("b"),
        c: case.projection("c"),
        z: case.optional("z"),
        d: case.optional("d"),
        delta_bias: case.optional("delta_bias"),
        slots: slots.as_deref().into(),
        options: Options { delta_softplus: case.option("delta_softplus"), discretization: case.discretization() },
    }
}

/// Calls `test` with every case and its inputs.
fn for_each_case(mut test: impl FnMut(&Case, Inputs<f32>)) {
    for case in Case::all("state_update") {
        let slots = case.list("slots");
        test(&case, inputs(&case, &slots));
    }
}

/// What the pool should hold after the update when the states after each token are `token_states`: the last of them in
/// the slots of their rows, the rest as before.
fn pool_after(case: &Case, inputs: &Inputs<f32>, token_states: &[f64]) -> Vec<f64> {
    let (shape, before) = &case.inputs["state"];
    let ([batch, tokens, _], size) = (inputs.u.shape, shape[1] * shape[2]);
    let mut pool = widen(before);
    for row in 0..batch {
        let slot = match inputs.slots {
            Slots::Host(list) => usize::try_from(list[row]),
            _ => Ok(row),
        };
        if let Ok(slot) = slot {
            let last = &token_states[(row * tokens + tokens - 1) * size..][..size];
            pool[slot * size..][..size].copy_from_slice(last);
        }
    }
    pool
}

#[test]
fn reference_update() {
    let mut comparison = Comparison::new("f64 reference, state update");
    for_each_case(|case, inputs| {
        let UpdateOutput { out, token_states } = reference::update(&inputs, case.view("state")).unwrap();
        let pool = pool_after(case, &inputs, &token_states);
        comparison.hold(case, REFERENCE, &[("out", out), ("final_state", pool), ("token_states", token_states)]);
    });
    comparison.finish();
}

#[test]
fn cpu_update_with_every_isa() {
    for isa in Isa::available() {
        let mut comparison = Comparison::new(format!("{isa:?}, state update"));
        for_each_case(|case, inputs| {
            let (shape, mut pool) = case.inputs["state"].clone();
            let mut out = vec![f32::NAN; case.results["out"].len()];
            let mut token_states = vec![f32::NAN; case.results["token_states"].len()];
            let outputs = UpdateMut {
                state: ViewMut::new(&mut pool, shape.try_into().unwrap()),
                out: &mut out[..],
                token_states: Some(&mut token_states[..]),
            };
            cpu::update_with(isa, &inputs, outputs).unwrap();
            let results = [("out", widen(&out)), ("final_state", widen(&pool)), ("token_states", widen(&token_states))];
            comparison.hold(case, FORWARD, &results);
        });
        comparison.finish();
    }
}

#[test]
fn inputs_update() {
    let mut comparison = Comparison::new("Inputs::update");
    for_each_case(|case, inputs| {
        let (shape, pool) = case.inputs["state"].clone();
        let shape = shape.try_into().unwrap();
        let (mut pool, mut other_pool) = (pool.clone(), pool);
        let out = inputs.update(ViewMut::new(&mut pool, shape)).unwrap();
        let output = inputs.update_with_token_states(ViewMut::new(&mut other_pool, shape)).unwrap();
        assert_eq!((&out, &pool), (&output.out, &other_pool), "{}: keeping token states changes nothing", case.name);
        let token_states = widen(&output.token_states);
        comparison.hold(
            case,
            FORWARD,
            &[("out", widen(&out)), ("final_state", widen(&pool)), ("token_states", token_states)],
        );
    });
    comparison.finish();
}
