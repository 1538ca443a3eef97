//! The scan with complex states on a GPU, or on a simulated one.

use half::{bf16, f16};
use rand::Rng;
use selective_scan::complex_scan::{GradientsMut, Inputs, OutputGradients, OutputMut, UpdateInputs, UpdateMut, cuda};
use selective_scan::cuda::Cuda;
use selective_scan::{Element, ProjectionOf, ViewMut};

use super::case::{Case, Shape};
use super::device::{On, backward as gradients, forward as outputs};
use super::{as_the_reference, batched_alone, empty, hold, not_finite, one_by_one, packed_alone, parts_whole};
use crate::support::draw::{Draw, seeded};
use crate::support::gpu::{Copies, stream, with_slots_on_device};

fn on_device<'a, T: Element>(copies: &'a Copies, inputs: &Inputs<'a, T>) -> Inputs<'a, T, Cuda> {
    Inputs {
        z: inputs.z.as_ref().map(|view| copies.view(view)),
        d: inputs.d.as_ref().map(|view| copies.view(view)),
        delta_bias: inputs.delta_bias.as_ref().map(|view| copies.view(view)),
        initial_state: inputs.initial_state.as_ref().map(|view| copies.view(view)),
        cu_seqlens: inputs.cu_seqlens,
        options: inputs.options,
        ..Inputs::new(
            copies.view(&inputs.u),
            copies.view(&inputs.delta),
            copies.view(&inputs.a),
            copies.projection(&inputs.b),
            copies.projection(&inputs.c),
        )
    }
}

/// A forward pass on copies of all that it reads and writes.
pub fn forward<T: Element>(inputs: &Inputs<T>, to: OutputMut<T>) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let out = copies.slice(to.out);
    let mut final_state = to.final_state.as_ref().map(|state| copies.slice(state));
    let outputs = OutputMut { out: &mut *out, final_state: final_state.as_deref_mut() };
    cuda::forward(&stream, &on_device(&copies, inputs), outputs).expect("the case is valid");
    copies.download(out, to.out);
    if let (Some(from), Some(to)) = (final_state, to.final_state) {
        copies.download(from, to);
    }
}

/// A backward pass on copies of all that it reads and writes.
pub fn backward<T: Element>(inputs: &Inputs<T>, d_outputs: OutputGradients<T>, to: GradientsMut<T>) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let [u, delta] = [&*to.u, &*to.delta].map(|gradient| copies.slice(gradient));
    let a = copies.slice(to.a);
    let mut z = to.z.as_ref().map(|gradient| copies.slice(gradient));
    let [mut d, mut bias, mut state] = [&to.d, &to.delta_bias, &to.initial_state]
        .map(|gradient| gradient.as_ref().map(|gradient| copies.slice(gradient)));
    let projection = |gradient: &ProjectionOf<&mut [T], &mut [f32]>| match gradient {
        ProjectionOf::Varying(data) => ProjectionOf::Varying(copies.slice(data)),
        ProjectionOf::Constant(data) => ProjectionOf::Constant(copies.slice(data)),
    };
    let (mut b, mut c) = (projection(&to.b), projection(&to.c));
    fn lend<'a, X, Y>(projection: &'a mut ProjectionOf<&mut X, &mut Y>) -> ProjectionOf<&'a mut X, &'a mut Y> {
        match projection {
            ProjectionOf::Varying(data) => ProjectionOf::Varying(data),
            ProjectionOf::Constant(data) => ProjectionOf::Constant(data),
        }
    }
    let gradients = GradientsMut {
        u: &mut *u,
        delta: &mut *delta,
        a: &mut *a,
        b: lend(&mut b),
        c: lend(&mut c),
        z: z.as_deref_mut(),
        d: d.as_deref_mut(),
        delta_bias: bias.as_deref_mut(),
        initial_state: state.as_deref_mut(),
    };
    let d_outputs = OutputGradients {
        d_out: copies.view(&d_outputs.d_out),
        d_final_state: d_outputs.d_final_state.as_ref().map(|view| copies.view(view)),
    };
    cuda::backward(&stream, &on_device(&copies, inputs), d_outputs, gradients).expect("the case is valid");
    copies.download(u, to.u);
    copies.download(delta, to.delta);
    copies.download(a, to.a);
    for (from, to) in [(b, to.b), (c, to.c)] {
        match (from, to) {
            (ProjectionOf::Varying(from), ProjectionOf::Varying(to)) => copies.download(from, to),
            (ProjectionOf::Constant(from), ProjectionOf::Constant(to)) => copies.download(from, to),
            _ => unreachable!("it was made of it"),
        }
    }
    if let (Some(from), Some(to)) = (z, to.z) {
        copies.download(from, to);
    }
    for (from, to) in [(d, to.d), (bias, to.delta_bias), (state, to.initial_state)] {
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
        z: inputs.z.as_ref().map(|view| copies.view(view)),
        d: inputs.d.as_ref().map(|view| copies.view(view)),
        delta_bias: inputs.delta_bias.as_ref().map(|view| copies.view(view)),
        slots: copies.slots(inputs.slots),
        delta_softplus: inputs.delta_softplus,
        ..UpdateInputs::new(
            copies.view(&inputs.u),
            copies.view(&inputs.delta),
            copies.view(&inputs.a),
            copies.projection(&inputs.b),
            copies.projection(&inputs.c),
        )
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

/// Any small problem; and with states of more than a warp, of more channels than a part has, or of more than a chunk's steps.
fn draw_shape(draw: &mut Draw) -> Shape {
    let shape = Shape::draw(draw);
    match draw.one_of(&[0, 0, 1, 2]) {
        0 => shape,
        1 => Shape {
            d_state: draw.one_of(&[16, 17, 32, 33, 100, 129, 256]),
            d_inner: draw.one_of(&[2, 6]),
            groups: draw.one_of(&[1, 2]),
            ..shape
        },
        _ => Shape { d_inner: draw.one_of(&[33, 70]), groups: 1, d_state: draw.one_of(&[1, 5, 9]), ..shape },
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
        hold(On::Gpu, &case, &format!("SEED={seed}"));
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

/// A group of 70 channels with 200 states each: three parts, of which each takes 32 rounds of a channel, and with a gap after each
/// state and step.
#[test]
fn many_states_of_many_channels_are_exact() {
    if stream().is_none() {
        return;
    }
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let shape = Shape { batch: 1, length: 9, d_inner: 70, d_state: 200, ..Shape::default() };
    hold(On::Gpu, &Case::<f32>::new(shape, &mut draw), &format!("SEED={seed}"));
}

/// Rounding does not add up where nothing is forgotten.
#[test]
fn long_memory_loses_nothing() {
    if stream().is_none() {
        return;
    }
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let shape = Shape { batch: 1, length: 20_000, d_inner: 1, d_state: 2, decay: [1e-5, 2e-5], ..Shape::default() };
    hold(On::Gpu, &Case::<f32>::new(shape, &mut draw), &format!("SEED={seed}"));
}

#[test]
fn a_packed_sequence_gives_the_bits_of_the_same_alone() {
    if stream().is_some() {
        packed_alone(On::Gpu);
    }
}

#[test]
fn a_batch_row_gives_the_bits_of_the_same_alone() {
    if stream().is_some() {
        batched_alone(On::Gpu);
    }
}

#[test]
fn parts_are_the_whole() {
    if stream().is_some() {
        parts_whole(On::Gpu, 2);
    }
}

/// The same bits in every run, the gradients of parameters too: more sequences than there are rows of blocks.
#[test]
fn runs_repeat() {
    if stream().is_none() {
        return;
    }
    let (mut rng, _) = seeded();
    let mut draw = Draw::new(rng.random());
    let shape = Shape { batch: 300, length: 3, d_inner: 70, d_state: 2, ..Shape::default() };
    let case = Case::<f32>::new(shape, &mut draw);
    let run = || (outputs(On::Gpu, &case.inputs()), gradients(On::Gpu, &case.inputs(), case.d_outputs()));
    assert!(run() == run());
}

/// Sums over more sequences than there are rows of blocks.
#[test]
fn many_sequences_are_exact() {
    if stream().is_none() {
        return;
    }
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let shape = Shape { batch: 1000, length: 2, d_inner: 3, d_state: 2, varying: [true, false], ..Shape::default() };
    hold(On::Gpu, &Case::<f32>::new(shape, &mut draw), &format!("SEED={seed}"));
}

#[test]
fn what_is_not_finite_stays_where_it_belongs() {
    if stream().is_some() {
        not_finite(On::Gpu);
    }
}

#[test]
fn empty_problems_keep_their_state() {
    if stream().is_some() {
        empty(On::Gpu);
    }
}

#[test]
fn updates_are_as_the_reference() {
    if stream().is_some() {
        as_the_reference(&[On::Gpu], 8);
        with_slots_on_device(|| as_the_reference(&[On::Gpu], 4));
    }
}

#[test]
fn tokens_at_once_are_tokens_one_by_one() {
    if stream().is_some() {
        one_by_one(On::Gpu);
    }
}
