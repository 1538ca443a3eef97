//! The convolution in place: against the reference, many tokens against single ones, and against whole sequences.

use half::{bf16, f16};
use selective_scan::conv::{Inputs, Options, UpdateInputs, UpdateMut, cpu, reference, rollback};
use selective_scan::{Element, Slots, View, ViewMut};

use super::{FORWARD, on_cpu, steps};
use crate::support::device::Device;
use crate::support::draw::Draw;
use crate::support::strided::{Strided, shares_words};
use crate::support::tolerance::{assert_close, bits};

/// An update's inputs and pool, drawn at random.
struct Update<T, St> {
    width: usize,
    x: Strided<T>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    slots: Option<Vec<i32>>,
    silu: bool,
    pool: Vec<St>,
    pool_offset: usize,
    pool_shape: [usize; 3],
    pool_strides: [usize; 3],
}

impl<T: Element, St: Element> Update<T, St> {
    fn draw(draw: &mut Draw, tokens: &[usize]) -> Self {
        let (width, d) = (draw.one_of(&[2, 3, 4, 4, 5, 6, 7, 8]), draw.one_of(&[1, 16, 37, 140, 150]));
        let batch = draw.one_of(&[1, 3]);
        let slots = draw.flag().then(|| [vec![4, -1, 2], vec![0, 3, -7]][usize::from(draw.flag())][..batch].to_vec());
        let pool_shape = [if slots.is_some() { 5 } else { batch }, width - 1, d];
        // Dense, paged, and as (slots, d_inner, width - 1) in memory; from a place that is a multiple of 4 or is not, and so
        // are distances.
        let (offset, extra) = (draw.one_of(&[3, 4]), draw.one_of(&[5, 4]));
        let pool_strides = match draw.one_of(&[0, 1, 2]) {
            0 => [(width - 1) * d, d, 1],
            1 => [(width - 1) * (d + extra) + 2 * extra, d + extra, 1],
            _ => [(width - 1) * d, 1, width - 1],
        };
        let tokens = draw.one_of(tokens);
        Self {
            width,
            x: draw.activation([batch, tokens, d]),
            weight: draw.uniform(d * width, -1.0, 1.0),
            bias: draw.flag().then(|| draw.uniform(d, -1.0, 1.0)),
            slots,
            silu: draw.flag(),
            pool: draw.uniform(offset + pool_shape[0] * pool_strides[0], -1.0, 1.0),
            pool_offset: offset,
            pool_shape,
            pool_strides,
        }
    }

    fn inputs(&self, first: usize, tokens: usize) -> UpdateInputs<'_, T> {
        let d = self.x.shape[2];
        UpdateInputs {
            bias: self.bias.as_ref().map(|bias| View::new(&bias[..], [d])),
            slots: self.slots.as_deref().into(),
            silu: self.silu,
            ..UpdateInputs::new(steps(self.x.view(), first, first + tokens), View::new(&self.weight, [d, self.width]))
        }
    }

    fn state<'p>(&self, pool: &'p mut [St]) -> ViewMut<'p, St, 3> {
        ViewMut::new(pool, self.pool_shape).with_layout(self.pool_offset, self.pool_strides)
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
        let mut out = vec![T::from_f32(7.0); self.x.shape[0] * tokens * self.x.shape[2]];
        let outputs = UpdateMut { state: self.state(pool), out: &mut out[..], token_states };
        match device {
            Device::Cpu(isa) => cpu::update_with(isa, &inputs, outputs).unwrap(),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => super::gpu::update(&inputs, outputs),
        }
        out
    }

    fn rollback(&self, device: Device, pool: &mut [St], token_states: &[St], accepted: usize) {
        let [batch, tokens, d] = self.x.shape;
        let token_states = View::new(token_states, [batch, tokens, self.width - 1, d]);
        let (slots, accepted) = (self.slots.as_deref(), vec![accepted; batch]);
        match device {
            Device::Cpu(_) => rollback(self.state(pool), token_states, slots, &accepted).unwrap(),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => crate::state_update::gpu::rollback(self.state(pool), token_states, slots, &accepted),
        }
    }
}

pub fn update_against_reference<T: Element, St: Element>(device: &dyn Fn(&mut Draw) -> Device, tokens: &[usize]) {
    for seed in 0..40 {
        let draw = &mut Draw::new(seed);
        let case = Update::<T, St>::draw(draw, tokens);
        let [batch, tokens, d] = case.x.shape;
        let state = View::new(&case.pool[..], case.pool_shape).with_layout(case.pool_offset, case.pool_strides);
        let want = reference::update(&case.inputs(0, tokens), state).unwrap();
        let mut pool = case.pool.clone();
        let mut token_states = vec![St::from_f32(7.0); batch * tokens * d * (case.width - 1)];
        let keep = draw.flag().then_some(&mut token_states[..]);
        let kept = keep.is_some();
        let device = device(draw);
        if !matches!(device, Device::Cpu(_)) && shares_words::<St>(case.pool_offset, case.pool_strides) {
            continue;
        }
        let out = case.run(device, [0, tokens], &mut pool, keep);
        let what = format!("{device:?}, seed {seed}, shape {:?}, width {}", case.x.shape, case.width);
        assert_close(&out, &want.out, FORWARD, &what);
        if kept {
            assert_close(&token_states, &want.token_states, 0.0, &what);
        }
        // The pool is what it was with the last token's states in the slots that are named.
        let mut expected = case.pool.clone();
        for row in 0..batch {
            let slot = case.slots.as_ref().map_or(Some(row), |slots| usize::try_from(slots[row]).ok());
            for i in 0..(case.width - 1) * d {
                let Some(slot) = slot else { break };
                let [s, j, c] = case.pool_strides;
                let value = want.token_states[((row + 1) * tokens - 1) * (case.width - 1) * d + i];
                expected[case.pool_offset + slot * s + i / d * j + i % d * c] = St::from_f32(value as f32);
            }
        }
        assert_eq!(bits(&pool), bits(&expected), "{what}: pool");
    }
}

#[test]
fn updates_are_as_the_reference() {
    update_against_reference::<f32, f32>(&on_cpu, &[1, 2, 5, 12]);
    update_against_reference::<bf16, f32>(&on_cpu, &[1, 4]);
    update_against_reference::<f16, f16>(&on_cpu, &[1, 4]);
    // The reference does not round inputs between tokens.
    update_against_reference::<f32, bf16>(&on_cpu, &[1]);
}

pub fn tokens_at_once<T: Element, St: Element>(device: Device) {
    for seed in 100..130 {
        let case = Update::<T, St>::draw(&mut Draw::new(seed), &[1, 2, 5, 12]);
        let [batch, tokens, d] = case.x.shape;
        if !matches!(device, Device::Cpu(_)) && shares_words::<St>(case.pool_offset, case.pool_strides) {
            continue;
        }
        let mut pool = case.pool.clone();
        let mut token_states = vec![St::from_f32(7.0); batch * tokens * d * (case.width - 1)];
        let all = case.run(device, [0, tokens], &mut pool, Some(&mut token_states));
        let mut single = case.pool.clone();
        for t in 0..tokens {
            let out = case.run(device, [t, 1], &mut single, None);
            for row in 0..batch {
                let want = &all[(row * tokens + t) * d..][..d];
                assert_eq!(bits(&out[row * d..][..d]), bits(want), "seed {seed}, token {t}");
            }
            let mut back = pool.clone();
            case.rollback(device, &mut back, &token_states, t + 1);
            assert_eq!(bits(&back), bits(&single), "seed {seed}: {} tokens accepted", t + 1);
        }
    }
}

#[test]
fn many_tokens_give_the_bits_of_single_ones() {
    tokens_at_once::<f32, f32>(Device::best());
    tokens_at_once::<f32, bf16>(Device::best());
    tokens_at_once::<bf16, f16>(Device::best());
}

#[test]
fn updates_give_the_bits_of_a_whole_sequence() {
    for seed in 0..10 {
        let case = Update::<f32, f32>::draw(&mut Draw::new(seed), &[9]);
        let [batch, tokens, d] = case.x.shape;
        let update = UpdateInputs { slots: Slots::Rows, ..case.inputs(0, tokens) };
        let mut state = vec![0.25f32; batch * (case.width - 1) * d];
        let initial = state.clone();
        let shape = [batch, case.width - 1, d];
        let out = update.update(ViewMut::new(&mut state, shape)).unwrap();
        let inputs = Inputs {
            bias: update.bias,
            initial_state: Some(View::new(&initial, shape)),
            options: Options { silu: case.silu, reverse: false },
            ..Inputs::new(update.x, update.weight)
        };
        let whole = inputs.forward().unwrap();
        assert_eq!((bits(&out), bits(&state)), (bits(&whole.out), bits(&whole.final_state)), "seed {seed}");
    }
}
