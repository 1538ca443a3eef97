//! Updates in place.

use candle_core::{DType, Device, Tensor, Var, WithDType};
use half::{bf16, f16};
use selective_scan::candle::{CausalConv, ConvUpdate, Scan, StateUpdate, rollback};
use selective_scan::{Element, Slots, View, ViewMut, conv, scan, state_update};

use super::values;
use crate::support::draw::{Draw, seeded};
use crate::support::tolerance;

const BATCH: usize = 3;
const TOKENS: usize = 4;
const D: usize = 6;
const N: usize = 8;
const WIDTH: usize = 4;
const POOL: usize = 5;
/// The second row is padding.
const SLOTS: [i32; BATCH] = [4, -1, 1];

fn dense<T: WithDType>(data: &[T], shape: &[usize], device: &Device) -> Tensor {
    Tensor::from_slice(data, shape, device).expect("as many as the shape says")
}

/// The part of a pool that tests work on: the columns of a wider tensor, of which nothing else may change.
fn inner(pool: &Tensor) -> Tensor {
    pool.narrow(2, 2, pool.dim(2).expect("three") - 4).expect("a range")
}

/// The same of a pool on slices.
fn strided<St: Element>(data: &mut [St], [rows, columns]: [usize; 2]) -> ViewMut<'_, St, 3> {
    let wide = columns + 4;
    ViewMut::new(data, [POOL, rows, columns]).with_layout(2, [rows * wide, wide, 1])
}

/// Both updates with slots, in a pool that is part of something wider, beside the same on slices; then rollback.
pub fn like_slices<T: Element + WithDType, St: Element + WithDType>(device: &Device) {
    let (_, seed) = seeded();
    let mut draw = Draw::new(seed);
    let what = format!("seed {seed}");
    let is_narrow = size_of::<T>() == 2 || size_of::<St>() == 2;
    let activation = [BATCH, TOKENS, D];
    let [u, delta, z] = [(); 3].map(|()| draw.uniform::<T>(BATCH * TOKENS * D, -1.0, 1.0));
    let [b, c] = [(); 2].map(|()| draw.uniform::<T>(BATCH * TOKENS * N, -1.0, 1.0));
    let (a, d) = (draw.uniform::<f32>(D * N, -2.0, -0.1), draw.uniform::<f32>(D, -1.0, 1.0));
    let delta_bias = draw.uniform::<f32>(D, -1.0, 1.0);
    let weight = draw.uniform::<f32>(D * WIDTH, -1.0, 1.0);
    let wide: Vec<St> = draw.uniform(POOL * D * (N + 4), -1.0, 1.0);
    let wide_rows: Vec<St> = draw.uniform(POOL * (WIDTH - 1) * (D + 4), -1.0, 1.0);

    let varying = |data| View::new(data, [BATCH, TOKENS, 1, N]);
    let options = state_update::Options { delta_softplus: true, ..Default::default() };
    let inputs = state_update::Inputs {
        z: Some(View::new(&z, activation)),
        d: Some(View::new(&d, [D])),
        delta_bias: Some(View::new(&delta_bias, [D])),
        slots: Slots::Host(&SLOTS),
        options,
        ..state_update::Inputs::new(
            View::new(&u, activation),
            View::new(&delta, activation),
            View::new(&a, [D, N]),
            varying(&b[..]),
            varying(&c[..]),
        )
    };
    let mut expected_pool = wide.clone();
    let expected = inputs.update_with_token_states(strided(&mut expected_pool, [D, N])).expect("valid");

    let tensor = |data: &[T], shape: &[usize]| dense(data, shape, device);
    let parameter = |data: &[f32], shape: &[usize]| dense(data, shape, device);
    let [u_, delta_, z_] = [&u, &delta, &z].map(|data| tensor(data, &activation));
    let [b_, c_] = [&b, &c].map(|data| tensor(data, &[BATCH, TOKENS, N]));
    let (a_, d_, bias_) = (parameter(&a, &[D, N]), parameter(&d, &[D]), parameter(&delta_bias, &[D]));
    let update = StateUpdate {
        z: Some(&z_),
        d: Some(&d_),
        delta_bias: Some(&bias_),
        slots: Slots::Host(&SLOTS),
        options,
        ..StateUpdate::new(&u_, &delta_, &a_, &b_, &c_)
    };
    let pools = [(); 2].map(|()| dense(&wide, &[POOL, D, N + 4], device));
    let (out, token_states) = update.update_with_token_states(&inner(&pools[0])).expect("valid");
    assert_eq!((out.dtype(), token_states.dtype()), (<T as WithDType>::DTYPE, <St as WithDType>::DTYPE));
    assert_eq!((out.dims(), token_states.dims()), (&activation[..], &[BATCH, TOKENS, D, N][..]));
    let plain_out = update.update(&inner(&pools[1])).expect("valid");
    check(device, is_narrow, &values(&out), &widen(&expected.out), &what);
    check(device, is_narrow, &values(&token_states), &widen(&expected.token_states), &what);
    check(device, is_narrow, &values(&pools[0]), &widen(&expected_pool), &what);
    assert!(values(&plain_out) == values(&out) && values(&pools[0]) == values(&pools[1]), "{what}");

    // The first row keeps two tokens and the third all four.
    let accepted = [2, 0, 4];
    let token_view = View::new(&expected.token_states, [BATCH, TOKENS, D, N]);
    state_update::rollback(strided(&mut expected_pool, [D, N]), token_view, &SLOTS, &accepted).expect("valid");
    rollback(&inner(&pools[0]), &token_states, &SLOTS, &accepted).expect("valid");
    check(device, is_narrow, &values(&pools[0]), &widen(&expected_pool), &what);

    let inputs = conv::UpdateInputs {
        bias: Some(View::new(&d, [D])),
        slots: Slots::Host(&SLOTS),
        silu: true,
        ..conv::UpdateInputs::new(View::new(&u, activation), View::new(&weight, [D, WIDTH]))
    };
    let mut expected_pool = wide_rows.clone();
    let expected = inputs.update_with_token_states(strided(&mut expected_pool, [WIDTH - 1, D])).expect("valid");
    let weight_ = parameter(&weight, &[D, WIDTH]);
    let update =
        ConvUpdate { bias: Some(&d_), slots: Slots::Host(&SLOTS), silu: true, ..ConvUpdate::new(&u_, &weight_) };
    let pool = dense(&wide_rows, &[POOL, WIDTH - 1, D + 4], device);
    let (out, token_states) = update.update_with_token_states(&inner(&pool)).expect("valid");
    check(device, is_narrow, &values(&out), &widen(&expected.out), &what);
    check(device, is_narrow, &values(&token_states), &widen(&expected.token_states), &what);
    check(device, is_narrow, &values(&pool), &widen(&expected_pool), &what);
}

fn widen<T: Element>(data: &[T]) -> Vec<f64> {
    data.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// On the processor, the same operator on slices has run: the same bits. Elsewhere another has: within what the crate
/// promises in f32, and two roundings of a narrower type (2^-9 at most, that of bf16) where one takes part, as a value next
/// to the boundary may fall to either side.
#[track_caller]
fn check(device: &Device, is_narrow: bool, ours: &[f64], expected: &[f64], what: &str) {
    match device {
        Device::Cpu => assert_eq!(ours, expected, "{what}"),
        _ => {
            let (error, bound) = (tolerance::error(ours, expected), if is_narrow { 2.0 / 512.0 } else { 1e-5 });
            assert!(error <= bound, "off by {error:.1e}, {what}");
        }
    }
}

#[test]
fn updates_have_the_results_of_those_on_slices() {
    like_slices::<f32, f32>(&Device::Cpu);
    like_slices::<f16, bf16>(&Device::Cpu);
    like_slices::<bf16, f32>(&Device::Cpu);
    like_slices::<f32, f16>(&Device::Cpu);
}

/// A prompt by scan and convolution, then tokens by updates of the states that these leave, is one long scan.
pub fn continues_a_scan(device: &Device) {
    let (_, seed) = seeded();
    let mut draw = Draw::new(seed);
    let (len, prompt) = (9, 5);
    let mut random = |shape: &[usize]| {
        let data = draw.uniform::<f32>(shape.iter().product(), -1.0, 1.0);
        Tensor::from_vec(data, shape, device).expect("as many as the shape says")
    };
    let [x, delta] = [(); 2].map(|()| random(&[2, len, D]));
    let [b, c] = [(); 2].map(|()| random(&[2, len, N]));
    let a = random(&[D, N]).exp().and_then(|a| a.neg()).expect("a tensor");
    let weight = random(&[D, WIDTH]);
    let (conv_options, scan_options) = (
        conv::Options { silu: true, ..Default::default() },
        scan::Options { delta_softplus: true, ..Default::default() },
    );
    let part = |tensor: &Tensor, start: usize, len: usize| tensor.narrow(1, start, len).expect("a range");
    let sequence = |start: usize, len: usize| {
        let x = part(&x, start, len);
        let conv = CausalConv { options: conv_options, ..CausalConv::new(&x, &weight) };
        let (u, conv_state) = conv.forward_with_state().expect("valid");
        let [delta, b, c] = [&delta, &b, &c].map(|tensor| part(tensor, start, len));
        let scan = Scan { options: scan_options, ..Scan::new(&u, &delta, &a, &b, &c) };
        let (out, state) = scan.forward_with_state().expect("valid");
        (out, conv_state, state)
    };
    let (whole, whole_conv_state, whole_state) = sequence(0, len);
    let (_, conv_state, state) = sequence(0, prompt);
    for t in prompt..len {
        let [x, delta, b, c] = [&x, &delta, &b, &c].map(|tensor| part(tensor, t, 1));
        let u = ConvUpdate { silu: true, ..ConvUpdate::new(&x, &weight) }.update(&conv_state).expect("valid");
        let options = state_update::Options { delta_softplus: true, ..Default::default() };
        let update = StateUpdate { options, ..StateUpdate::new(&u, &delta, &a, &b, &c) };
        let out = update.update(&state).expect("valid");
        // The crate's bound on f32.
        let error = tolerance::error(&values(&out), &values(&part(&whole, t, 1)));
        assert!(error <= 1e-5, "step {t} is off by {error:.1e}, seed {seed}");
    }
    for (ours, expected) in [(&state, &whole_state), (&conv_state, &whole_conv_state)] {
        assert!(tolerance::error(&values(ours), &values(expected)) <= 1e-5, "seed {seed}");
    }
}

#[test]
fn updates_continue_a_scan() {
    continues_a_scan(&Device::Cpu);
}

/// The pool is written, so it must not be an input too. What is refused is not begun.
pub fn aliasing(device: &Device) {
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, device).expect("a tensor");
    // Tokens and states in one storage.
    let shared = ones(&[2, 3 + 1, 6]);
    let (states, x) = (shared.narrow(1, 0, 3).expect("a range"), shared.narrow(1, 3, 1).expect("a range"));
    let weight = ones(&[6, 4]);
    let error = ConvUpdate::new(&x, &weight).update(&states).expect_err("one storage").to_string();
    let expected = "`state`: expected a storage of its own, as it is written, got the storage of `x`";
    assert!(error.contains(expected), "{error}");
    let (u, a, b) = (ones(&[2, 1, 6]), ones(&[6, 6]), ones(&[2, 1, 6]));
    let pool = shared.narrow(1, 0, 3).and_then(|pool| pool.contiguous()).expect("a copy");
    let error = StateUpdate::new(&u, &u, &pool, &b, &b).update(&pool).expect_err("one storage").to_string();
    assert!(error.contains("got the storage of `a`"), "{error}");
    StateUpdate::new(&u, &u, &a, &b, &b).update(&pool).expect_err("a pool of another shape");
    let tokens = ones(&[2, 1, 3, 6]);
    let error = rollback(&tokens.squeeze(1).expect("one token"), &tokens, None, &[1, 1]).expect_err("one storage");
    assert!(error.to_string().contains("got the storage of `token_states`"), "{error}");
    let one = ones(&[1, 3, 6]);
    let repeated = one.broadcast_as((2, 3, 6)).expect("the shape fits");
    let error = ConvUpdate::new(&x, &weight).update(&repeated).expect_err("a state twice").to_string();
    assert!(error.contains("`state`: expected strides that give every element a place of its own"), "{error}");
    for tensor in [&shared, &pool, &tokens, &one] {
        assert!(values(tensor).iter().all(|&x| x == 1.0), "nothing is written");
    }
}

#[test]
fn a_pool_that_is_an_input_is_refused() {
    aliasing(&Device::Cpu);
}

/// Threads that read each other's pools do not wait for each other for ever. (If they did, this test would not end.)
#[test]
fn threads_that_cross_do_not_lock_up() {
    let d = 1024;
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).expect("a tensor");
    let pools = [(); 2].map(|()| ones(&[8, 3, d]));
    let weight = ones(&[d, 4]);
    std::thread::scope(|scope| {
        for i in [0, 1, 0, 1] {
            let (pools, weight) = (&pools, &weight);
            scope.spawn(move || {
                for _ in 0..1000 {
                    let other = pools[1 - i].narrow(1, 0, 1).expect("a range");
                    ConvUpdate::new(&other, weight).update(&pools[i]).expect("valid");
                }
            });
        }
    });
}

/// An update of a state that a backward pass will read would change gradients without a word (6.07 for 3.68 here): it is
/// refused, and nothing is written. A copy outside of the graph goes on from there.
pub fn states_of_the_graph(device: &Device) {
    let tensor = |values: &[f32], shape: &[usize]| dense(values, shape, device);
    let u = Var::from_tensor(&tensor(&[0.5, -1.0, 2.0], &[1, 3, 1])).expect("a copy");
    let (delta, a, b) = (tensor(&[0.3; 3], &[1, 3, 1]), tensor(&[-0.7], &[1, 1]), tensor(&[1.0; 3], &[1, 3, 1]));
    let gradient = |refuse: bool| {
        let (out, state) = Scan::new(&u, &delta, &a, &b, &b).forward_with_state().expect("valid");
        // The gradient of a square reads the state.
        let loss =
            (state.sqr().and_then(|x| x.sum_all()).expect("a sum") + out.sum_all().expect("a sum")).expect("two");
        let (token, b) = (tensor(&[4.0], &[1, 1, 1]), tensor(&[1.0], &[1, 1, 1]));
        let update = StateUpdate::new(&token, &token, &a, &b, &b);
        let weight = tensor(&[1.0, 1.0], &[1, 2]);
        let conv = ConvUpdate::new(&token, &weight);
        let variable = Var::from_tensor(&state.detach()).expect("a copy");
        let tokens = tensor(&[9.0], &[1, 1, 1, 1]);
        if refuse {
            let (before, before_variable) = (values(&state), values(&variable));
            for (state, got) in [(&state, "one that candle tracks for a backward pass"), (&variable, "a variable")] {
                let narrowed = state.narrow(2, 0, 1).expect("a range");
                for state in [state, &narrowed] {
                    for result in [
                        update.update(state).map(|_| ()),
                        update.update_with_token_states(state).map(|_| ()),
                        conv.update(state).map(|_| ()),
                        conv.update_with_token_states(state).map(|_| ()),
                        rollback(state, &tokens, None, &[1]),
                    ] {
                        let error = result.expect_err("it is part of the graph").to_string();
                        let expected = "`state`: expected a tensor outside of candle's graph, since it is overwritten (detach \
                                        and copy it: `state.detach().copy()`), got ";
                        assert!(error.starts_with(expected), "{error}");
                        // A part of a variable is what candle has computed from it.
                        assert!(error.ends_with(got) || error.ends_with("tracks for a backward pass"), "{error}");
                    }
                }
            }
            assert_eq!((values(&state), values(&variable)), (before, before_variable), "nothing is written");
        }
        let copied = state.detach().copy().expect("a copy");
        let before = values(&copied);
        update.update(&copied).expect("outside of the graph");
        assert_ne!(values(&copied), before, "the copy is brought up to date");
        values(loss.backward().expect("a loss").get(&u).expect("a variable"))
    };
    assert_eq!(gradient(true), gradient(false));
}

#[test]
fn states_of_the_graph_are_refused() {
    states_of_the_graph(&Device::Cpu);
}
