//! States that differ in size by many powers of ten, that are forgotten all but wholly, or that are carried through millions
//! of equal steps: what mild random draws hide. Each entry is judged by itself.

use rand::Rng;
use rand::rngs::StdRng;
use selective_scan::state_update::UpdateMut;
use selective_scan::{DType, Discretization, Element, Isa, View, ViewMut, state_update};

use crate::scan::case::{Case, Flags, Results, Shape};
use crate::support::device::Device;
use crate::support::draw::seeded;
use crate::support::tolerance::error;

/// The relative error of a rounding to `f32`, twice.
const EPSILON: f64 = 1.0 / (1u64 << 23) as f64;

/// Four equal states to a channel, of which one is read as it is: `y = h`, with a gradient of the final state alone.
fn plain<T: Element>(rng: &mut StdRng, len: usize, d_inner: usize) -> Case<T> {
    let flags = Flags { initial_state: true, d_final_state: true, ..Flags::default() };
    let mut case = Case::new(rng, Shape { batch: 1, len, d_inner, d_state: 4 }, flags);
    for (t, d) in (0..len).flat_map(|t| (0..d_inner).map(move |d| (t, d))) {
        case.u.set([0, t, d], 0.0);
        case.d_out.set([0, t, d], 0.0);
    }
    case.a.fill(-1.0);
    case.b.fill(T::from_f32(1.0));
    case.c.iter_mut().enumerate().for_each(|(i, c)| *c = T::from_f32(if i % 4 == 0 { 1.0 } else { 0.0 }));
    case.initial_state.fill(1.0);
    case.d_final_state.fill(1.0);
    case
}

fn assert_entries(ours: &Results, exact: &Results, names: &[&str], bound: impl Fn(usize) -> f64, what: &str) {
    for name in names {
        for (i, (ours, exact)) in ours.get(name).iter().zip(exact.get(name)).enumerate() {
            let (error, bound) = ((ours - exact).abs(), bound(i) * exact.abs());
            assert!(error <= bound, "{what}: {name}[{i}] is {ours}, for {exact}");
        }
    }
}

/// The state that rounding has taken a part of is forgotten, and with it that part.
pub fn what_is_forgotten_takes_its_rounding_along(device: Device, len: usize, d_inner: usize) {
    let mut case = plain::<f32>(&mut seeded().0, len, d_inner);
    let steps = [(1.0, 1e6), (0.1, 0.7), (40.0, 1e-3)].into_iter().chain(std::iter::repeat((0.01, 1e-3)));
    for (t, (delta, u)) in (0..len).zip(steps) {
        for d in 0..d_inner {
            case.delta.set([0, t, d], delta);
            case.u.set([0, t, d], u);
        }
    }
    case.initial_state.fill(0.0);
    // The exponents' roundings, of which that of 40 is the largest, and a few more.
    let what = format!("{device:?}, {len} steps of {d_inner} channels");
    assert_entries(&case.run(device), &case.reference(), &["out", "final_state"], |_| 50.0 * EPSILON, &what);
}

/// Steps of all sizes in both directions: states grow to 1e25 and are erased.
///
/// Beside each state runs what it would be were all terms of one sign, and a bound of its error: what was off before decays,
/// and each step adds the rounding of its exponent, four of the decay and two of the sum.
pub fn states_that_grow_and_are_erased(device: Device, d_inner: usize) {
    let (mut rng, seed) = seeded();
    let len = 150;
    let mut case = plain::<f32>(&mut rng, len, d_inner);
    let mut bounds = vec![0.0; len * d_inner];
    for d in 0..d_inner {
        let (mut exponent, mut size, mut off) = (0.0f64, 1.0f64, 0.0f64);
        for t in 0..len {
            let scale = [1e-4, 1e-2, 1.0, 30.0][rng.random_range(0..4)];
            let mut x = rng.random_range(-1.0f32..1.0) * scale;
            if !(-60.0..60.0).contains(&(exponent + f64::from(x))) {
                x = -x;
            }
            exponent = (exponent + f64::from(x)).max(0.0);
            let u = rng.random_range(-1.0f32..1.0) * [1.0, 1e-3, 1e6][rng.random_range(0..3)] / x.abs().max(1e-3);
            case.delta.set([0, t, d], -x);
            case.u.set([0, t, d], u);
            let decay = f64::from(x).exp();
            let next = decay * size + f64::from(x * u).abs();
            off = decay * (off + size * (f64::from(x).abs() + 4.0) * EPSILON) + 2.0 * EPSILON * next;
            size = next;
            bounds[t * d_inner + d] = off;
        }
    }
    let (ours, exact) = (case.run(device), case.reference());
    for (i, (ours, exact)) in ours.get("out").iter().zip(exact.get("out")).enumerate() {
        let what = format!("SEED={seed} {device:?}: channel {} step {}", i % d_inner, i / d_inner);
        assert!((ours - exact).abs() <= bounds[i], "{what} is {ours}, for {exact} ± {:e}", bounds[i]);
    }
}

/// A decay near zero has as many digits as any other, and so have all gradients that go through it.
pub fn a_decay_near_zero_keeps_its_digits<T: Element>(device: Device, hold: bool) {
    const DELTAS: [f32; 8] = [0.5, 8.0, 10.0, 12.0, 14.5, 17.5, 18.0, 32.0];
    let mut case = plain::<T>(&mut seeded().0, 1, DELTAS.len());
    case.flags.hold = hold;
    for (d, delta) in DELTAS.into_iter().enumerate() {
        case.delta.set([0, 0, d], delta);
    }
    // The exponent's rounding and a few more, and those of the type.
    let of_type = match T::DTYPE {
        DType::F32 => 0.0,
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-8),
    };
    let bound = |d: usize| (f64::from(DELTAS[d]) + 8.0) * EPSILON;
    let (ours, exact) = (case.run(device), case.reference());
    let what = format!("{device:?} {:?} hold: {hold}", T::DTYPE);
    let states = ["final_state", "d_initial_state", "d_a"];
    assert_entries(&ours, &exact, &states, |i| bound(i / 4), &what);
    // Below f16's normal numbers digits are few.
    let whole = |d: usize| if T::DTYPE == DType::F16 && DELTAS[d] > 9.0 { 1.0 } else { bound(d) + of_type };
    assert_entries(&ours, &exact, &["out", "d_delta"], whole, &what);
}

/// The same in the state update, whose pool is `f32`.
pub fn an_update_forgets_as_well<T: Element>(hold: bool, update: impl Fn(&state_update::Inputs<T>, UpdateMut<T, f32>)) {
    const DELTAS: [f32; 7] = [0.5, 8.0, 10.0, 12.0, 14.5, 18.0, 32.0];
    let d_inner = 4 * DELTAS.len();
    let delta: Vec<T> = (0..d_inner).map(|d| T::from_f32(DELTAS[d / 4])).collect();
    let (zero, one, a) = (vec![T::from_f32(0.0); d_inner], vec![T::from_f32(1.0); 4], vec![-1.0f32; 4 * d_inner]);
    let (activation, projection) = ([1, 1, d_inner], [1, 1, 1, 4]);
    let discretization = if hold { Discretization::ZeroOrderHold } else { Discretization::Euler };
    let inputs = state_update::Inputs {
        options: state_update::Options { discretization, ..Default::default() },
        ..state_update::Inputs::new(
            View::new(&zero, activation),
            View::new(&delta, activation),
            View::new(&a, [d_inner, 4]),
            View::new(&one, projection),
            View::new(&one, projection),
        )
    };
    let (mut state, mut out) = (vec![1.0f32; 4 * d_inner], zero.clone());
    let pool = ViewMut::new(&mut state, [1, d_inner, 4]);
    update(&inputs, UpdateMut { state: pool, out: &mut out, token_states: None });
    for (i, &state) in state.iter().enumerate() {
        let delta = f64::from(DELTAS[i / 16]);
        let error = (f64::from(state) / (-delta).exp() - 1.0).abs();
        assert!(error <= (delta + 8.0) * EPSILON, "{:?} hold: {hold}: {state} after a step of {delta}", T::DTYPE);
    }
}

/// Equal steps, and two in turns. Rounding may be made of the exponent ΣΔ·A (seven of it: those of log2(e)·A, of ΣΔ and of
/// their product for each natural unit) and a dozen times of the state, but not once for each step. Gradients go through
/// `plain_steps` with roundings, each of the decay and the state, that are not made good.
pub fn equal_steps(device: Device, len: usize, d_inner: usize, plain_steps: usize) {
    let (mut rng, _) = seeded();
    let cases = [
        ([0.1, 0.1], -1e-3 * 65_536.0 / len as f32, 0.0),
        // Each step's share of a state is less than half of its last digit.
        ([1e-4, 1e-4], -3e-4, 0.3),
        ([0.013, 0.029], -5e-6, 0.3),
    ];
    // What is large takes seconds each, of which the reference takes most.
    let few = if len * d_inner > 1 << 20 { 1..2 } else { 0..cases.len() };
    for (deltas, a, u) in cases[few].iter().copied() {
        let mut case = plain::<f32>(&mut rng, len, d_inner);
        for (t, d) in (0..len).flat_map(|t| (0..d_inner).map(move |d| (t, d))) {
            case.delta.set([0, t, d], deltas[t % 2]);
            case.u.set([0, t, d], u);
        }
        case.a.fill(a);
        let what = format!("{device:?}, {len} steps of {deltas:?}, {d_inner} channels");
        let exponent = f64::from(deltas[0] + deltas[1]) / 2.0 * f64::from(-a) * len as f64;
        let (ours, exact) = (case.run(device), case.reference());
        let (few, gradients) = (12.0 + 7.0 * exponent, ["d_initial_state", "d_a"]);
        assert_entries(&ours, &exact, &["final_state"], |_| few * EPSILON, &what);
        let of_gradients = (few + 2.0 * plain_steps as f64) * EPSILON;
        assert_entries(&ours, &exact, &gradients, |_| of_gradients, &what);
        for (name, bound) in [("out", 1e-5), ("d_u", of_gradients), ("d_delta", of_gradients)] {
            let error = error(ours.get(name), exact.get(name));
            assert!(error <= bound, "{what}: {name} is off by {error:.1e}");
        }
    }
}

/// A state carried into a segment: what the segment before it forgets takes no rounding along either.
pub fn large_states_before_a_segment(device: Device, d_inner: usize) {
    let mut case = plain::<f32>(&mut seeded().0, 192, d_inner);
    case.initial_state.fill(1e4);
    for (t, d) in (0..192).flat_map(|t| (0..d_inner).map(move |d| (t, d))) {
        case.delta.set([0, t, d], 0.35);
        case.u.set([0, t, d], if t == 0 { 3e4 } else { 1.0 / 3.0 });
    }
    let (ours, exact) = (case.run(device), case.reference());
    // The exponent of 64 steps is 22 at most; then the state is that of the input.
    assert_entries(&ours, &exact, &["out", "final_state"], |_| 40.0 * EPSILON, &format!("{device:?}"));
}

/// An infinite rate of decay forgets at once, and what is held for ever so fast brings nothing in.
pub fn an_infinite_rate(device: Device, d_inner: usize) {
    let mut case = plain::<f32>(&mut seeded().0, 3, d_inner);
    case.flags.hold = true;
    case.a.fill(f32::NEG_INFINITY);
    for (t, d) in (0..3).flat_map(|t| (0..d_inner).map(move |d| (t, d))) {
        case.delta.set([0, t, d], 0.5);
        case.u.set([0, t, d], 1.0);
    }
    let ours = case.run(device);
    // On GPUs the state goes on to the end of the tile by steps of 0, which are not a number times an infinite rate.
    let names = if matches!(device, Device::Cpu(_)) { &["out", "final_state"][..] } else { &["out"] };
    for name in names {
        // 1/A is as small as it can be without being nothing.
        assert!(ours.get(name).iter().all(|x| x.abs() <= 1e-37), "{device:?}: {name} is {:?}", ours.get(name));
    }
}

/// The steps between two checkpoints, which the backward pass on processors carries gradients through at a time.
const TILE: usize = 64;

fn on_all(test: impl Fn(Device)) {
    Device::all().into_iter().for_each(test);
}

#[test]
fn forgotten() {
    on_all(|device| what_is_forgotten_takes_its_rounding_along(device, 5, 1));
    on_all(|device| what_is_forgotten_takes_its_rounding_along(device, 20, 20));
    on_all(|device| large_states_before_a_segment(device, 1));
}

#[test]
fn grown_and_erased() {
    on_all(|device| states_that_grow_and_are_erased(device, 37));
}

#[test]
fn near_zero() {
    for hold in [false, true] {
        on_all(|device| a_decay_near_zero_keeps_its_digits::<f32>(device, hold));
        on_all(|device| a_decay_near_zero_keeps_its_digits::<half::f16>(device, hold));
        on_all(|device| a_decay_near_zero_keeps_its_digits::<half::bf16>(device, hold));
        for isa in Isa::available() {
            an_update_forgets_as_well::<f32>(hold, |inputs, outputs| {
                state_update::cpu::update_with(isa, inputs, outputs).expect("the case is valid");
            });
        }
    }
}

/// Few channels, so that sequences are split into 16 segments, and into 3.
#[test]
fn equal_steps_in_segments() {
    for (len, d_inner) in [(65_536, 16), (16_384, 80)] {
        equal_steps(Device::best(), len, d_inner, TILE);
    }
}

#[test]
fn four_million_equal_steps() {
    equal_steps(Device::best(), 1 << 22, 1, TILE);
}

#[test]
fn forgotten_at_once() {
    on_all(|device| an_infinite_rate(device, 5));
    let (one, a) = ([1.0f32; 4], [f32::NEG_INFINITY; 4]);
    let activation = View::new(&one[..1], [1, 1, 1]);
    let inputs = state_update::Inputs {
        options: state_update::Options { discretization: Discretization::ZeroOrderHold, ..Default::default() },
        ..state_update::Inputs::new(
            activation,
            activation,
            View::new(&a, [1, 4]),
            View::new(&one, [1, 1, 1, 4]),
            View::new(&one, [1, 1, 1, 4]),
        )
    };
    for isa in Isa::available() {
        let (mut state, mut out) = ([1.0f32; 4], [7.0f32]);
        let pool = ViewMut::new(&mut state, [1, 1, 4]);
        let outputs = UpdateMut { state: pool, out: &mut out, token_states: None };
        state_update::cpu::update_with(isa, &inputs, outputs).expect("the case is valid");
        assert!(out[0].abs() <= 1e-37 && state.iter().all(|h| h.abs() <= 1e-37), "{isa:?}: {out:?} {state:?}");
    }
}

/// An infinite step forgets everything and, held, brings the input to its limit `-B u/A`; nothing of it is left in the sums
/// of step sizes.
#[test]
fn an_infinite_step() {
    let len = 16_384;
    on_all(|device| {
        let mut case = plain::<f32>(&mut seeded().0, len, 3);
        case.flags.hold = true;
        for (t, d) in (0..len).flat_map(|t| (0..3).map(move |d| (t, d))) {
            case.delta.set([0, t, d], if t == 100 { f32::INFINITY } else { 1e-3 });
            case.u.set([0, t, d], 0.5);
        }
        let (ours, exact) = (case.run(device), case.reference());
        assert_entries(&ours, &exact, &["out", "final_state"], |_| 100.0 * EPSILON, &format!("{device:?}"));
    });
}
