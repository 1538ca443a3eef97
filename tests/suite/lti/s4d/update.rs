//! The update in place.

use half::bf16;
use rand::Rng;
use selective_scan::lti::s4d::{Options, UpdateInputs, UpdateMut, recurrence, reference, rollback};
use selective_scan::{Element, Isa, Slots, View, ViewMut};

use super::case::{Case, Shape};
use super::device::On;
use crate::support::draw::{Draw, seeded};
use crate::support::tolerance::{assert_close, assert_close_to, bits};
use crate::support::vectors::FORWARD;

/// What an update reads of a case.
fn step_of<T: Element>(case: &Case<T>) -> Vec<f32> {
    let inputs = case.inputs();
    recurrence(inputs.log_delta, inputs.a, inputs.b, inputs.options.rule).unwrap()
}

fn inputs<'a, T: Element>(case: &'a Case<T>, steps: &'a [f32]) -> UpdateInputs<'a, T> {
    let all = case.inputs();
    let recurrence = View::new(steps, [case.shape.d_inner, 6, case.shape.d_state]);
    UpdateInputs { d: all.d, ..UpdateInputs::new(all.u, recurrence, all.c) }
}

/// An arithmetic of `f64` leaves one rounding of the result, and one of a state for each token, 2^-24 each.
#[test]
fn an_update_is_the_references() {
    let processors: Vec<On> = Isa::available().map(On::Processor).collect();
    as_the_reference::<f32>(&processors, 20, 1e-6);
}

/// With states of `St`, which `tolerance` is for.
pub fn as_the_reference<St: Element>(all: &[On], count: usize, tolerance: f64) {
    let (mut rng, seed) = seeded();
    for _ in 0..count {
        let mut draw = Draw::new(rng.random());
        let shape = Shape {
            batch: 3,
            length: draw.one_of(&[1, 2, 5]),
            d_state: draw.one_of(&[1, 3, 8, 17, 40]),
            ..Shape::default()
        };
        let case = Case::<f32>::new(shape, &mut draw);
        let steps = step_of(&case);
        let pool: Vec<St> = case.state.iter().map(|x| St::from_f32(*x)).collect();
        let shape = [3, case.shape.d_inner, 2 * case.shape.d_state];
        // A row of padding among them, and slots in another order.
        let slots = [2, -1, 0];
        let inputs = UpdateInputs { slots: Slots::Host(&slots), ..inputs(&case, &steps) };
        let want = reference::update(&inputs, View::new(&pool, shape)).unwrap();
        for on in all {
            let mut state = pool.clone();
            let (mut out, mut token_states) =
                (vec![f32::NAN; want.out.len()], vec![St::from_f32(f32::NAN); want.token_states.len()]);
            let outputs = UpdateMut {
                token_states: Some(&mut token_states[..]),
                ..UpdateMut::new(ViewMut::new(&mut state, shape), &mut out[..])
            };
            on.run_update(&inputs, outputs);
            let what = format!("{on:?}, SEED={seed}");
            assert_close(&out, &want.out, tolerance, &what);
            assert_close(&token_states, &want.token_states, tolerance, &what);
            let of_slot = shape[1] * shape[2];
            let last = |row: usize| &token_states[((row + 1) * case.shape.length - 1) * of_slot..][..of_slot];
            assert_eq!(bits(&state[2 * of_slot..]), bits(last(0)), "{what}: slot 2");
            assert_eq!(bits(&state[..of_slot]), bits(last(2)), "{what}: slot 0");
            assert_eq!(bits(&state[of_slot..2 * of_slot]), bits(&pool[of_slot..2 * of_slot]), "{what}: slot 1");
        }
    }
}

/// Several tokens at once give the bits of one after another, in any type of pool; a rejected draft is rolled back.
#[test]
fn tokens_at_once_are_tokens_one_by_one() {
    one_by_one(On::best());
}

pub fn one_by_one(on: On) {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let case = Case::<bf16>::new(Shape { batch: 2, length: 4, ..Shape::default() }, &mut draw);
    let steps = step_of(&case);
    let shape = [2, case.shape.d_inner, 2 * case.shape.d_state];
    let pool: Vec<bf16> = case.state.iter().map(|x| bf16::from_f32(*x)).collect();
    let (mut at_once, mut one_by_one) = (pool.clone(), pool);
    let inputs = inputs(&case, &steps);
    let output = on.update(&inputs, ViewMut::new(&mut at_once, shape));
    let d_inner = case.shape.d_inner;
    for token in 0..4 {
        let part = case.u.steps(token..token + 1);
        let out = on.update(&UpdateInputs { u: part.view(), ..inputs }, ViewMut::new(&mut one_by_one, shape)).out;
        for row in 0..2 {
            let all = &output.out[(row * 4 + token) * d_inner..][..d_inner];
            assert_eq!(bits(&out[row * d_inner..][..d_inner]), bits(all), "token {token}, SEED={seed}");
        }
        if token == 2 {
            let mut back = at_once.clone();
            let states = View::new(&output.token_states, [2, 4, shape[1], shape[2]]);
            rollback(ViewMut::new(&mut back, shape), states, None, &[3, 3]).unwrap();
            assert_eq!(bits(&back), bits(&one_by_one), "rolled back, SEED={seed}");
        }
    }
    assert_eq!(bits(&at_once), bits(&one_by_one), "SEED={seed}");
}

/// Token by token is the sequence, after 20,000 of them too: a state is rounded to 2^-25 of itself at each step, of
/// which 1/(decay Δ), here all, are remembered; they add up as a walk's, to √20,000 · 2^-25 = 4e-6.
#[test]
fn token_by_token_is_the_sequence() {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let shape = Shape {
        batch: 1,
        length: 20_000,
        d_inner: 3,
        d_state: 4,
        decay: [1e-4, 1e-3],
        options: Options::default(),
        ..Shape::default()
    };
    let case = Case::<f32>::new(shape, &mut draw);
    let steps = step_of(&case);
    let want = reference::forward(&case.inputs()).unwrap();
    let mut state = case.state.clone();
    let mut out = Vec::new();
    let shape = [1, 3, 8];
    let inputs = inputs(&case, &steps);
    for token in 0..case.shape.length {
        let part = case.u.steps(token..token + 1);
        out.extend(UpdateInputs { u: part.view(), ..inputs }.update(ViewMut::new(&mut state, shape)).unwrap());
    }
    let what = format!("SEED={seed}");
    assert_close_to(&out, &want.out, FORWARD, 0.0, &what);
    assert_close_to(&state, &want.final_state, FORWARD, 0.0, &what);
}
