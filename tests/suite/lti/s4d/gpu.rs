//! S4D on a GPU, or on a simulated one.

use half::{bf16, f16};
use rand::Rng;
use selective_scan::cuda::Cuda;
use selective_scan::lti::Rule;
use selective_scan::lti::s4d::cuda::{self, Plan};
use selective_scan::lti::s4d::{
    GradientsMut, Inputs, Options, OutputGradients, OutputMut, UpdateInputs, UpdateMut, recurrence,
};
use selective_scan::{DType, Element, ViewMut};

use super::accuracy::hold;
use super::case::{Case, Shape};
use super::device::On;
use super::properties::{batched_alone, empty, not_finite, packed_alone, parts_whole};
use super::update::{as_the_reference, one_by_one};
use crate::support::draw::{Draw, seeded};
use crate::support::gpu::{Copies, stream, with_slots_on_device};

fn on_device<'a, T: Element>(copies: &'a Copies, inputs: &Inputs<'a, T>) -> Inputs<'a, T, Cuda> {
    Inputs {
        d: inputs.d.as_ref().map(|view| copies.view(view)),
        initial_state: inputs.initial_state.as_ref().map(|view| copies.view(view)),
        cu_seqlens: inputs.cu_seqlens,
        options: inputs.options,
        ..Inputs::new(
            copies.view(&inputs.u),
            copies.view(&inputs.log_delta),
            copies.view(&inputs.a),
            copies.view(&inputs.b),
            copies.view(&inputs.c),
        )
    }
}

/// A forward pass on copies of all that it reads and writes.
pub fn forward<T: Element>(plan: Plan, inputs: &Inputs<T>, to: OutputMut<T>) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let out = copies.slice(to.out);
    let mut final_state = to.final_state.as_ref().map(|state| copies.slice(state));
    let outputs = OutputMut { out: &mut *out, final_state: final_state.as_deref_mut() };
    cuda::forward_with(plan, &stream, &on_device(&copies, inputs), outputs).expect("the case is valid");
    copies.download(out, to.out);
    if let (Some(from), Some(to)) = (final_state, to.final_state) {
        copies.download(from, to);
    }
}

/// A backward pass on copies of all that it reads and writes.
pub fn backward<T: Element>(plan: Plan, inputs: &Inputs<T>, d_outputs: OutputGradients<T>, to: GradientsMut<T>) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let u = copies.slice(to.u);
    let [log_delta, a, b, c] = [&*to.log_delta, &*to.a, &*to.b, &*to.c].map(|parameter| copies.slice(parameter));
    let mut d = to.d.as_ref().map(|d| copies.slice(d));
    let mut initial_state = to.initial_state.as_ref().map(|state| copies.slice(state));
    let gradients = GradientsMut {
        u: &mut *u,
        log_delta: &mut *log_delta,
        a: &mut *a,
        b: &mut *b,
        c: &mut *c,
        d: d.as_deref_mut(),
        initial_state: initial_state.as_deref_mut(),
    };
    let d_outputs = OutputGradients {
        d_out: copies.view(&d_outputs.d_out),
        d_final_state: d_outputs.d_final_state.as_ref().map(|view| copies.view(view)),
    };
    cuda::backward_with(plan, &stream, &on_device(&copies, inputs), d_outputs, gradients).expect("the case is valid");
    copies.download(u, to.u);
    for (from, to) in [(log_delta, to.log_delta), (a, to.a), (b, to.b), (c, to.c)] {
        copies.download(from, to);
    }
    for (from, to) in [(d, to.d), (initial_state, to.initial_state)] {
        if let (Some(from), Some(to)) = (from, to) {
            copies.download(from, to);
        }
    }
}

/// An update on copies of all that it reads and writes.
pub fn update<T: Element, St: Element>(inputs: &UpdateInputs<T>, outputs: UpdateMut<T, St>) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let on_device = UpdateInputs {
        d: inputs.d.as_ref().map(|view| copies.view(view)),
        slots: copies.slots(inputs.slots),
        ..UpdateInputs::new(copies.view(&inputs.u), copies.view(&inputs.recurrence), copies.view(&inputs.c))
    };
    let ViewMut { data, offset, shape, strides } = outputs.state;
    let pool = copies.slice(data);
    let out = copies.slice(outputs.out);
    let mut kept = outputs.token_states.as_ref().map(|states| copies.slice(states));
    let state = ViewMut { data: &mut *pool, offset, shape, strides };
    let to = UpdateMut { state, out: &mut *out, token_states: kept.as_deref_mut() };
    cuda::update(&stream, &on_device, to).expect("the case is valid");
    copies.download(pool, data);
    copies.download(out, outputs.out);
    if let (Some(from), Some(to)) = (kept, outputs.token_states) {
        copies.download(from, to);
    }
}

const WHOLE: On = On::Gpu(Plan { segment_steps: None, tf32: false });
const SPLIT: On = On::Gpu(Plan { segment_steps: Some(256), tf32: false });
/// What devices with little shared memory do of bf16.
const TF32: On = On::Gpu(Plan { segment_steps: Some(256), tf32: true });

fn plans<T: Element>() -> &'static [On] {
    if T::DTYPE == DType::Bf16 { &[WHOLE, SPLIT, TF32] } else { &[WHOLE, SPLIT] }
}

/// Any small problem, and with more pairs than a warp has.
fn draw_shape(draw: &mut Draw) -> Shape {
    let shape = Shape::draw(draw);
    match draw.one_of(&[0, 0, 1, 2]) {
        0 => shape,
        1 => Shape { d_state: draw.one_of(&[31, 32, 33, 65, 130]), d_inner: draw.one_of(&[1, 5, 8]), ..shape },
        _ => {
            let length = draw.one_of(&[512, 1000, 1040]);
            let cu_seqlens = shape.cu_seqlens.map(|_| vec![0, 5, 5, 300, length - 16, length]);
            Shape { length, cu_seqlens, d_inner: draw.one_of(&[3, 8]), ..shape }
        }
    }
}

fn small_problems<T: Element>(count: usize) {
    if stream().is_none() {
        return;
    }
    let (mut rng, seed) = seeded();
    for _ in 0..count {
        let mut draw = Draw::new(rng.random());
        let case = Case::<T>::new(draw_shape(&mut draw), &mut draw);
        for &on in plans::<T>() {
            hold(on, &case, &mut draw, &format!("SEED={seed}"));
        }
    }
}

#[test]
fn f32_is_exact() {
    small_problems::<f32>(30);
}

#[test]
fn halves_are_exact() {
    small_problems::<bf16>(15);
    small_problems::<f16>(15);
}

/// Channels that are read and written eight at once, of sequences that end anywhere among the 32 steps of a warp and the 256 of a tile.
#[test]
fn rows_of_channels_are_exact() {
    fn rows<T: Element>() {
        let (mut rng, seed) = seeded();
        for (is_packed, reverse) in [(false, false), (false, true), (true, false), (true, true)] {
            let mut draw = Draw::new(rng.random());
            for length in [draw.one_of(&[1, 31, 32, 33]), draw.one_of(&[255, 256, 257]), draw.one_of(&[300, 512, 545])]
            {
                let shape = Shape {
                    batch: if is_packed { 1 } else { 2 },
                    length,
                    d_inner: draw.one_of(&[8, 24]),
                    d_state: draw.one_of(&[3, 32]),
                    cu_seqlens: is_packed.then(|| vec![0, length / 3, length / 3, length - length / 4, length]),
                    options: Options { reverse, ..Options::default() },
                    ..Shape::default()
                };
                let case = Case::<T>::new(shape, &mut draw);
                for &on in plans::<T>() {
                    hold(on, &case, &mut draw, &format!("SEED={seed}"));
                }
            }
        }
    }
    if stream().is_some() {
        rows::<bf16>();
        rows::<f16>();
        rows::<f32>();
    }
}

/// States that forget 1e-6 of themselves at a step, and angles that come to 1e5 turns: in segments, and in one.
#[test]
fn long_memory_loses_nothing() {
    if stream().is_none() {
        return;
    }
    let (mut rng, seed) = seeded();
    for (length, on) in [(65_536, WHOLE), (20_000, On::Gpu(Plan { segment_steps: Some(2048), tf32: true }))] {
        let mut draw = Draw::new(rng.random());
        let fastest = draw.one_of(&[1e-9, 10.0, 300.0]);
        let shape = Shape {
            batch: 1,
            length,
            d_inner: 2,
            d_state: 3,
            delta: [0.05, 0.1],
            decay: [1e-5, 2e-5],
            fastest,
            ..Shape::default()
        };
        let case = Case::<f32>::new(shape.clone(), &mut draw);
        hold(on, &case, &mut draw, &format!("SEED={seed}"));
        hold(on, &Case::<bf16>::new(shape, &mut draw), &mut draw, &format!("SEED={seed}"));
    }
}

#[test]
fn a_packed_sequence_gives_the_bits_of_the_same_alone() {
    if stream().is_some() {
        packed_alone::<f32>(WHOLE, 200);
        packed_alone::<bf16>(WHOLE, 300);
        packed_alone::<f32>(SPLIT, 1000);
        packed_alone::<bf16>(SPLIT, 1000);
        packed_alone::<bf16>(TF32, 1000);
    }
}

#[test]
fn a_batch_row_gives_the_bits_of_the_same_alone() {
    if stream().is_some() {
        batched_alone(WHOLE);
        batched_alone(SPLIT);
    }
}

#[test]
fn parts_are_the_whole() {
    if stream().is_some() {
        parts_whole(WHOLE, 3);
        parts_whole(SPLIT, 3);
    }
}

#[test]
fn what_is_not_finite_stays_where_it_belongs() {
    if stream().is_some() {
        not_finite::<f32>(WHOLE, 50);
        not_finite::<bf16>(WHOLE, 50);
        not_finite::<f32>(WHOLE, 550);
        not_finite::<bf16>(WHOLE, 550);
        not_finite::<f32>(SPLIT, 700);
        not_finite::<bf16>(SPLIT, 700);
        not_finite::<bf16>(TF32, 700);
    }
}

#[test]
fn empty_problems_keep_their_state() {
    if stream().is_some() {
        empty(WHOLE);
    }
}

/// A pool of halves rounds a state to 2^-9 of itself.
#[test]
fn updates_are_as_the_reference() {
    if stream().is_some() {
        as_the_reference::<f32>(&[WHOLE], 8, 1e-6);
        as_the_reference::<bf16>(&[WHOLE], 4, 1e-2);
        with_slots_on_device(|| as_the_reference::<f32>(&[WHOLE], 4, 1e-6));
    }
}

/// What an update reads is made on a GPU as on a processor: Ā in two parts, whose sum has 2^-48 of itself where exponentials are
/// right to 2^-50, and B̄, rounded to 2^-24.
#[test]
fn a_recurrence_is_that_of_processors() {
    let Some(stream) = stream() else { return };
    let (mut rng, seed) = seeded();
    for rule in [Rule::ZeroOrderHold, Rule::Bilinear, Rule::Euler] {
        let case = Case::<f32>::new(Shape { d_state: 33, ..Shape::default() }, &mut Draw::new(rng.random()));
        let all = case.inputs();
        let want = recurrence(all.log_delta, all.a, all.b, rule).unwrap();
        let copies = Copies::new(&stream);
        let to = copies.poisoned::<f32>(want.len());
        let [a, b] = [&all.a, &all.b].map(|view| copies.view(view));
        cuda::recurrence(&stream, copies.view(&all.log_delta), a, b, rule, to).expect("the case is valid");
        let mut got = vec![0.0; want.len()];
        copies.download(to, &mut got);
        for (i, (got, want)) in got.chunks(6 * 33).zip(want.chunks(6 * 33)).enumerate() {
            for n in 0..33 {
                let number = |of: &[f32], k: usize| f64::from(of[k * 33 + n]);
                for k in [0, 2] {
                    let [got, want] = [got, want].map(|of| number(of, k) + number(of, k + 1));
                    let what = format!("{rule:?}, channel {i}, pair {n}, {k}, SEED={seed}");
                    assert!((got - want).abs() <= 2f64.powi(-44) * want.abs().max(1.0), "{what}: {got} {want}");
                }
                let size = number(want, 4).hypot(number(want, 5));
                for k in [4, 5] {
                    let [got, want] = [got, want].map(|of| number(of, k));
                    assert!((got - want).abs() <= 2f64.powi(-23) * size, "{rule:?}, SEED={seed}: {got} {want}");
                }
            }
        }
    }
}

#[test]
fn tokens_at_once_are_tokens_one_by_one() {
    if stream().is_some() {
        one_by_one(WHOLE);
    }
}
