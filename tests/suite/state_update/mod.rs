//! The state update: the fast path against the reference, many tokens against single ones, and against the scan.

#[cfg(feature = "cuda")]
pub mod gpu;
mod vectors;
mod wild;

use half::{bf16, f16};
use selective_scan::state_update::{Inputs, Options, UpdateMut, cpu, reference, rollback};
use selective_scan::{Discretization, Element, Isa, Projection, Slots, View, ViewMut, scan};

use crate::support::device::Device;
use crate::support::draw::Draw;
use crate::support::strided::{Strided, shares_words};
use crate::support::tolerance::{assert_close, bits};

/// Each token sums `d_state` products of values that carry a few roundings of 2^-24 and an exponential within 2^-22.
const FORWARD: f64 = 1e-5;

/// Everything that an update reads, drawn at random.
struct Case<T, St> {
    shape: [usize; 3],
    d_state: usize,
    groups: Option<usize>,
    u: Strided<T>,
    delta: Strided<T>,
    z: Option<Strided<T>>,
    a: Vec<f32>,
    b: Vec<T>,
    c: Vec<T>,
    constant: Vec<f32>,
    d: Option<Vec<f32>>,
    delta_bias: Option<Vec<f32>>,
    slots: Option<Vec<i32>>,
    options: Options,
    pool: Vec<St>,
    pool_offset: usize,
    pool_shape: [usize; 3],
    pool_strides: [usize; 3],
}

impl<T: Element, St: Element> Case<T, St> {
    fn draw(draw: &mut Draw, tokens: &[usize]) -> Self {
        let (groups, batch) = (draw.one_of(&[None, Some(1), Some(2), Some(5)]), draw.one_of(&[1, 3]));
        let d_inner = draw.one_of(&[1, 3, 16, 29, 300]) * groups.unwrap_or(1);
        let shape = [batch, draw.one_of(tokens), d_inner];
        // The full width of channels only with few states, so that the reference stays quick.
        let d_state =
            if d_inner > 200 { draw.one_of(&[1, 3, 16]) } else { draw.one_of(&[1, 4, 5, 8, 16, 19, 64, 256]) };
        // An error is held to the norm of the result, which must not be a single sum whose terms can cancel.
        let d_state = if d_inner == 1 { d_state.max(4) } else { d_state };
        let slots = draw.flag().then(|| [vec![4, -1, 2], vec![0, 3, -7]][usize::from(draw.flag())][..batch].to_vec());
        let slot_count = if slots.is_some() { 5 } else { batch };
        let state = d_inner * d_state;
        // Dense, paged, with the states of a channel apart, or transposed; from a place that is a multiple of 4 or is not,
        // and so are distances.
        let (offset, extra) = (draw.one_of(&[2, 4]), draw.one_of(&[3, 4]));
        let pool_strides = match draw.one_of(&[0, 0, 1, 2, 3]) {
            0 => [state, d_state, 1],
            1 => [state + extra, d_state, 1],
            2 => [d_inner * (d_state + extra), d_state + extra, 1],
            _ => [state, 1, d_inner],
        };
        let projection = batch * shape[1] * groups.unwrap_or(1) * d_state;
        Self {
            shape,
            d_state,
            groups,
            u: draw.activation(shape),
            delta: draw.activation(shape),
            z: draw.flag().then(|| draw.activation(shape)),
            a: draw.uniform(state, -1.5, 0.0),
            b: draw.uniform(projection, -1.0, 1.0),
            c: draw.uniform(projection, -1.0, 1.0),
            constant: draw.uniform(state, -1.0, 1.0),
            d: draw.flag().then(|| draw.uniform(d_inner, -1.0, 1.0)),
            delta_bias: draw.flag().then(|| draw.uniform(d_inner, -1.0, 1.0)),
            slots,
            options: Options {
                delta_softplus: draw.flag(),
                discretization: draw.one_of(&[Discretization::Euler, Discretization::ZeroOrderHold]),
            },
            pool: draw.uniform(offset + slot_count * pool_strides[0].max(d_inner * pool_strides[1]), -1.0, 1.0),
            pool_offset: offset,
            pool_shape: [slot_count, d_inner, d_state],
            pool_strides,
        }
    }

    /// The inputs of `tokens` tokens from the `first` on.
    fn inputs(&self, first: usize, tokens: usize) -> Inputs<'_, T> {
        let part = |tensor| self.tokens_of(tensor, first, tokens);
        let constant = || Projection::Constant(View::new(&self.constant[..], [self.shape[2], self.d_state]));
        let varying = |data| {
            let groups = self.groups?;
            let view = View::new(data, [self.shape[0], self.shape[1], groups, self.d_state]);
            let shape = [self.shape[0], tokens, groups, self.d_state];
            Some(Projection::Varying(View { offset: first * groups * self.d_state, shape, ..view }))
        };
        Inputs {
            z: self.z.as_ref().map(part),
            d: self.d.as_ref().map(|d| View::new(&d[..], [d.len()])),
            delta_bias: self.delta_bias.as_ref().map(|bias| View::new(&bias[..], [bias.len()])),
            slots: self.slots.as_deref().into(),
            options: self.options,
            ..Inputs::new(
                part(&self.u),
                part(&self.delta),
                View::new(&self.a, [self.shape[2], self.d_state]),
                varying(&self.b[..]).unwrap_or_else(constant),
                varying(&self.c[..]).unwrap_or_else(constant),
            )
        }
    }

    fn tokens_of<'t>(&self, tensor: &'t Strided<T>, first: usize, tokens: usize) -> View<'t, T, 3> {
        let shape = [self.shape[0], tokens, self.shape[2]];
        View { offset: tensor.offset + first * tensor.strides[1], shape, ..tensor.view() }
    }

    fn state<'p>(&self, pool: &'p mut [St]) -> ViewMut<'p, St, 3> {
        ViewMut::new(pool, self.pool_shape).with_layout(self.pool_offset, self.pool_strides)
    }

    fn state_at(&self, pool: &[St], slot: usize) -> Vec<St> {
        let [_, d_inner, d_state] = self.pool_shape;
        let [s, d, n] = self.pool_strides;
        (0..d_inner * d_state).map(|i| pool[self.pool_offset + slot * s + i / d_state * d + i % d_state * n]).collect()
    }

    fn slot(&self, row: usize) -> Option<usize> {
        self.slots.as_ref().map_or(Some(row), |slots| usize::try_from(slots[row]).ok())
    }

    /// Whether a simulated device is not given the case.
    fn is_beyond_simulation(&self) -> bool {
        self.pool.len() * self.shape[1] > LARGE || shares_words::<St>(self.pool_offset, self.pool_strides)
    }

    /// Runs `tokens` tokens from the `first` on, into buffers that hold something else before.
    fn run(
        &self,
        device: Device,
        [first, tokens]: [usize; 2],
        pool: &mut [St],
        token_states: Option<&mut [St]>,
    ) -> Vec<T> {
        let inputs = self.inputs(first, tokens);
        let mut out = vec![T::from_f32(7.0); self.shape[0] * tokens * self.shape[2]];
        let outputs = UpdateMut { state: self.state(pool), out: &mut out[..], token_states };
        match device {
            Device::Cpu(isa) => cpu::update_with(isa, &inputs, outputs).unwrap(),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => gpu::update(&inputs, outputs),
        }
        out
    }

    /// [`Case::run`] of all tokens, with the states after each.
    fn run_all(&self, device: Device, pool: &mut [St]) -> (Vec<T>, Vec<St>) {
        let tokens = [0, self.shape[1]];
        let mut token_states = vec![St::from_f32(7.0); self.shape.iter().product::<usize>() * self.d_state];
        (self.run(device, tokens, pool, Some(&mut token_states)), token_states)
    }

    fn rollback(&self, device: Device, pool: &mut [St], token_states: &[St], accepted: usize) {
        let [batch, tokens, d_inner] = self.shape;
        let token_states = View::new(token_states, [batch, tokens, d_inner, self.d_state]);
        let (slots, accepted) = (self.slots.as_deref(), vec![accepted; batch]);
        match device {
            Device::Cpu(_) => rollback(self.state(pool), token_states, slots, &accepted).unwrap(),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => crate::state_update::gpu::rollback(self.state(pool), token_states, slots, &accepted),
        }
    }
}

fn against_reference<T: Element, St: Element>(
    device: &dyn Fn(&mut Draw) -> Device,
    seeds: std::ops::Range<u64>,
    tokens: &[usize],
) {
    for seed in seeds {
        let draw = &mut Draw::new(seed);
        let case = Case::<T, St>::draw(draw, tokens);
        let [batch, tokens, d_inner] = case.shape;
        let device = device(draw);
        if !matches!(device, Device::Cpu(_)) && case.is_beyond_simulation() {
            continue;
        }
        let inputs = case.inputs(0, tokens);
        let state = View::new(&case.pool[..], case.pool_shape).with_layout(case.pool_offset, case.pool_strides);
        let want = reference::update(&inputs, state).unwrap();

        let mut pool = case.pool.clone();
        let mut token_states = vec![St::from_f32(7.0); batch * tokens * d_inner * case.d_state];
        let keep = draw.flag().then_some(&mut token_states[..]);
        let kept = keep.is_some();
        let out = case.run(device, [0, tokens], &mut pool, keep);

        let what = format!("{device:?}, seed {seed}, shape {:?}, d_state {}", case.shape, case.d_state);
        assert_close(&out, &want.out, FORWARD, &what);
        if kept {
            assert_close(&token_states, &want.token_states, FORWARD, &what);
        }
        let size = d_inner * case.d_state;
        let mut untouched = case.pool.clone();
        for row in 0..batch {
            let Some(slot) = case.slot(row) else {
                assert!(out[row * tokens * d_inner..][..tokens * d_inner].iter().all(|&x| x == T::from_f32(0.0)));
                continue;
            };
            let last = &want.token_states[((row + 1) * tokens - 1) * size..][..size];
            assert_close(&case.state_at(&pool, slot), last, FORWARD, &what);
            let [s, d, n] = case.pool_strides;
            for i in 0..size {
                let at = case.pool_offset + slot * s + i / case.d_state * d + i % case.d_state * n;
                untouched[at] = pool[at];
            }
        }
        assert_eq!(bits(&pool), bits(&untouched), "{what}: what no row names");
    }
}

/// The most states, counted once per token, that a simulated device is given.
const LARGE: usize = 100_000;

fn cpu(draw: &mut Draw) -> Device {
    Device::Cpu(draw.isa())
}

#[test]
fn f32_is_as_the_reference() {
    against_reference::<f32, f32>(&cpu, 0..60, &[1, 2, 5, 9]);
}

#[test]
fn half_activations_are_as_the_reference() {
    against_reference::<f16, f32>(&cpu, 0..60, &[1, 3]);
    against_reference::<bf16, f32>(&cpu, 0..60, &[1, 3]);
}

// The reference does not round between tokens, so half states are compared after a single one.
#[test]
fn half_states_are_as_the_reference() {
    against_reference::<f32, f16>(&cpu, 0..60, &[1]);
    against_reference::<f32, bf16>(&cpu, 0..60, &[1]);
    against_reference::<bf16, bf16>(&cpu, 0..60, &[1]);
}

/// Many tokens at once and one after another, and every rollback against having stopped there.
fn tokens_at_once<T: Element, St: Element>(device: Device, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let case = Case::<T, St>::draw(&mut Draw::new(seed), &[1, 2, 7, 11]);
        let [batch, tokens, d_inner] = case.shape;
        if !matches!(device, Device::Cpu(_)) && case.is_beyond_simulation() {
            continue;
        }
        let mut pool = case.pool.clone();
        let (all, token_states) = case.run_all(device, &mut pool);
        let mut alone = case.pool.clone();
        let without = case.run(device, [0, tokens], &mut alone, None);
        assert_eq!(bits(&without), bits(&all), "seed {seed}: without token states");
        assert_eq!(bits(&alone), bits(&pool), "seed {seed}: without token states");

        let mut single = case.pool.clone();
        for t in 0..tokens {
            let out = case.run(device, [t, 1], &mut single, None);
            for row in 0..batch {
                let want = &all[(row * tokens + t) * d_inner..][..d_inner];
                assert_eq!(bits(&out[row * d_inner..][..d_inner]), bits(want), "seed {seed}, token {t}");
            }
            let mut back = pool.clone();
            case.rollback(device, &mut back, &token_states, t + 1);
            assert_eq!(bits(&back), bits(&single), "seed {seed}: {} tokens accepted", t + 1);
        }
        assert_eq!(bits(&single), bits(&pool), "seed {seed}: the states in the end");
    }
}

#[test]
fn many_tokens_give_the_bits_of_single_ones() {
    let device = Device::Cpu(Isa::best());
    tokens_at_once::<f32, f32>(device, 100..130);
    tokens_at_once::<bf16, f16>(device, 100..130);
    tokens_at_once::<f32, bf16>(device, 100..130);
}

#[test]
fn steps_continue_a_scan() {
    let (batch, len, d_inner, d_state) = (2, 20, 37, 16);
    for discretization in [Discretization::Euler, Discretization::ZeroOrderHold] {
        let draw = &mut Draw::new(5);
        let mut activation = || draw.uniform::<f32>(batch * len * d_inner, -1.0, 1.0);
        let (u, delta, z) = (activation(), activation(), activation());
        let (a, d) = (draw.uniform(d_inner * d_state, -2.0, 0.0), draw.uniform(d_inner, -1.0, 1.0));
        let b: Vec<f32> = draw.uniform(batch * len * d_state, -1.0, 1.0);
        let c: Vec<f32> = draw.uniform(batch * len * d_state, -1.0, 1.0);
        let view = |data| View::new(data, [batch, len, d_inner]);
        let projection = |data| View::new(data, [batch, len, 1, d_state]);
        let (a, d) = (View::new(&a, [d_inner, d_state]), View::new(&d[..], [d_inner]));
        let inputs = scan::Inputs {
            z: Some(view(&z)),
            d: Some(d),
            options: scan::Options { delta_softplus: true, discretization, ..Default::default() },
            ..scan::Inputs::new(view(&u), view(&delta), a, projection(&b), projection(&c))
        };
        let whole = inputs.forward().unwrap();

        let mut state = vec![0.0f32; batch * d_inner * d_state];
        let mut out = vec![0.0; batch * len * d_inner];
        for t in 0..len {
            let step = |data| View { offset: t * d_inner, shape: [batch, 1, d_inner], ..view(data) };
            let projection = |data| View { offset: t * d_state, shape: [batch, 1, 1, d_state], ..projection(data) };
            let inputs = Inputs {
                z: Some(step(&z)),
                d: Some(d),
                options: Options { delta_softplus: true, discretization },
                ..Inputs::new(step(&u), step(&delta), a, projection(&b), projection(&c))
            };
            let y = inputs.update(ViewMut::new(&mut state, [batch, d_inner, d_state])).unwrap();
            for row in 0..batch {
                out[(row * len + t) * d_inner..][..d_inner].copy_from_slice(&y[row * d_inner..][..d_inner]);
            }
        }
        let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        assert_close(&out, &wide(&whole.out), FORWARD, "out");
        assert_close(&state, &wide(&whole.final_state), FORWARD, "state");
    }
}

#[test]
fn infinity_stays_in_its_channel() {
    let (tokens, d_inner, d_state) = (3, 18, 5);
    let draw = &mut Draw::new(1);
    let u: Vec<f32> = draw.uniform(tokens * d_inner, -1.0, 1.0);
    let (mut delta, a) = (vec![0.5f32; tokens * d_inner], vec![-1.0; d_inner * d_state]);
    let b: Vec<f32> = draw.uniform(tokens * d_state, 0.1, 1.0);
    let run = |delta: &[f32]| {
        let mut state = vec![1.0f32; d_inner * d_state];
        let view = |data| View::new(data, [1, tokens, d_inner]);
        let b = View::new(&b, [1, tokens, 1, d_state]);
        let inputs = Inputs::new(view(&u), view(delta), View::new(&a, [d_inner, d_state]), b, b);
        (inputs.update(ViewMut::new(&mut state, [1, d_inner, d_state])).unwrap(), state)
    };
    let (clean_out, clean_state) = run(&delta);
    delta[2] = f32::INFINITY;
    let (out, state) = run(&delta);
    assert!(out[2].is_infinite(), "the padding of the last vector must not make NaN of {}", out[2]);
    for d in (0..d_inner).filter(|&d| d != 2) {
        for t in 0..tokens {
            assert_eq!(out[t * d_inner + d].to_bits(), clean_out[t * d_inner + d].to_bits());
        }
        assert_eq!(bits(&state[d * d_state..][..d_state]), bits(&clean_state[d * d_state..][..d_state]));
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let data = [0.0f32; 64];
    let u = View::new(&data[..16], [2, 2, 4]);
    let (a, b) = (View::new(&data[..12], [4, 3]), View::new(&data[..12], [2, 2, 1, 3]));
    let good = Inputs::new(u, u, a, b, b);
    let shape = [2, 4, 3];
    let check = |inputs: Inputs<f32>, shape: [usize; 3], strides: Option<[usize; 3]>, sizes: [usize; 2], text: &str| {
        let (mut pool, mut out, mut states) = (vec![1.0f32; 128], vec![1.0; sizes[0]], vec![1.0; sizes[1]]);
        let mut state = ViewMut::new(&mut pool, shape);
        state.strides = strides.unwrap_or(state.strides);
        let outputs = UpdateMut { state, out: &mut out[..], token_states: Some(&mut states[..]) };
        let error = cpu::update(&inputs, outputs).unwrap_err().to_string();
        assert!(error.starts_with(text), "{error} instead of {text}");
        assert!(pool.iter().chain(&out).chain(&states).all(|&x| x == 1.0), "{text}: written on an error");
    };
    let sizes = [16, 48];
    let wide = View::new(&data[..], [2, 2, 5]);
    check(
        Inputs { delta: wide, ..good },
        shape,
        None,
        sizes,
        "`delta`: expected shape (batch, tokens, d_inner) = [2, 2, 4]",
    );
    check(Inputs { z: Some(wide), ..good }, shape, None, sizes, "`z`: expected shape");
    check(Inputs { d: Some(View::new(&data[..3], [3])), ..good }, shape, None, sizes, "`d`: expected shape (d_inner)");
    check(
        Inputs { delta_bias: Some(View::new(&data[..3], [4])), ..good },
        shape,
        None,
        sizes,
        "`delta_bias`: expected a stor",
    );
    check(Inputs { slots: Slots::Host(&[0]), ..good }, shape, None, sizes, "`slots`: expected one for each of 2");
    check(Inputs { slots: Slots::Host(&[0, 2]), ..good }, shape, None, sizes, "`slots`: expected slots below 2");
    check(Inputs { slots: Slots::Host(&[1, 1]), ..good }, shape, None, sizes, "`slots`: expected a different slot");
    check(good, [3, 4, 3], None, sizes, "`state`: expected one slot for each of 2 batch rows");
    check(good, [2, 4, 4], None, sizes, "`state`: expected shape (slots, d_inner, d_state) = [2, 4, 3]");
    check(good, shape, Some([2, 3, 1]), sizes, "`state`: expected strides");
    check(good, shape, Some([1000, 3, 1]), sizes, "`state`: expected a storage");
    check(good, shape, Some([usize::MAX, usize::MAX, 1]), sizes, "`state`: expected a storage");
    check(good, shape, None, [15, 48], "`out`: expected (batch, tokens, d_inner) = [2, 2, 4] elements");
    check(good, shape, None, [16, 47], "`token_states`: expected (batch, tokens, d_inner, d_state)");
    let endless = View::new(&data[..1], [usize::MAX, usize::MAX, 4]).with_layout(0, [0; 3]);
    check(Inputs { u: endless, ..good }, shape, None, sizes, "`u`: expected fewer than");
    // No slots at all, with strides that no integer can hold the reach of.
    let none = View::new(&data[..0], [0, 2, 4]);
    let b = View::new(&data[..0], [0, 2, 1, 3]);
    let mut state = ViewMut::new(&mut [0.0f32; 0][..], [0, 4, 3]);
    state.strides = [usize::MAX; 3];
    assert_eq!(Inputs::new(none, none, a, b, b).update(state), Ok(vec![]));
}

#[test]
fn a_rollback_that_does_not_fit_is_named() {
    let states = [2.0f32; 24];
    let check = |slots: Option<&[i32]>, accepted: &[usize], shape: [usize; 4], text: &str| {
        let mut pool = [1.0f32; 8];
        let token_states = View::new(&states, shape);
        let result = rollback(ViewMut::new(&mut pool, [2, 2, 2]), token_states, slots, accepted);
        assert!(result.clone().unwrap_err().to_string().starts_with(text), "{result:?} instead of {text}");
        assert_eq!(pool, [1.0; 8]);
    };
    let shape = [2, 3, 2, 2];
    let before =
        "`accepted`: expected from 1 to 3 tokens of each row, got 0 for row 1 (the state before the first token";
    check(None, &[1, 0], shape, before);
    check(None, &[1, 4], shape, "`accepted`: expected from 1 to 3 tokens of each row, got 4 for row 1");
    check(None, &[1], shape, "`accepted`: expected one count for each of 2");
    check(Some(&[1, 1]), &[1, 1], shape, "`slots`: expected a different");
    check(None, &[1, 1], [2, 3, 2, 1], "`state`: expected shape");
    check(None, &[1, 1], [2, 4, 2, 2], "`token_states`: expected a storage");
    check(None, &[1, 1], [2, usize::MAX, 2, 2], "`token_states`: expected a storage");
    // A padding row's count is not looked at.
    let mut pool = [1.0f32; 8];
    let token_states = View::new(&states, shape);
    rollback(ViewMut::new(&mut pool, [2, 2, 2]), token_states, &[-1, 0], &[0, 3]).unwrap();
    assert_eq!(pool, [2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]);
}
