//! Small problems that pass through the unsafe blocks of the CPU path, for tools that check memory (`tests/miri.sh`,
//! `tests/sanitizers.sh`). Miri takes some seconds for a step of 18 channels, so it is given few steps; checkpoints and
//! split sequences, which need many, are left to the sanitizers.

use half::{bf16, f16};
use selective_scan::sampling::{Settings, StateMut};
use selective_scan::{
    Discretization, Isa, Projection, Slots, View, ViewMut, complex_scan, conv, decode, loss, sampling, state_update,
};

use crate::scan::case::{Case, Flags, Shape};
use crate::support::device::Device;
use crate::support::draw::{Draw, seeded};

fn on_two_threads(work: impl FnOnce() + Send) {
    rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("a pool of threads").install(work);
}

/// Columns of ragged width written from two threads, checkpoints, packed sequences, every gradient.
#[test]
fn scan() {
    on_two_threads(|| {
        for row in [7, 11, 13] {
            let shape = Shape { batch: 2, len: if cfg!(miri) { 3 } else { 66 }, d_inner: 18, d_state: 1 };
            let case = Case::<bf16>::new(&mut seeded().0, shape, Flags::pairwise(row));
            case.check(Device::Cpu(Isa::Portable), &|| format!("row {row}"));
        }
    });
}

/// Split sequences, whose segments are written from different threads.
#[test]
#[cfg_attr(miri, ignore = "2,048 steps are too many for it")]
fn split_scan() {
    on_two_threads(|| {
        let shape = Shape { batch: 1, len: 2048, d_inner: 2, d_state: 1 };
        let case = Case::<f32>::new(&mut seeded().0, shape, Flags::mamba());
        case.check(Device::Cpu(Isa::Portable), &|| "split".into());
    });
}

/// The convolution from two threads: more than a unit of channels, and its update in a pool of strided slots. What comes
/// out is for `conv` to judge.
#[test]
fn convolution() {
    on_two_threads(|| {
        let (draw, [len, d, width]) = (&mut Draw::new(1), [3, 130, 2]);
        let (x, state) = (draw.uniform::<bf16>(len * d, -1.0, 1.0), draw.uniform::<f32>(d, -1.0, 1.0));
        let weight = draw.uniform(d * width, -1.0, 1.0);
        let (x, weight) = (View::new(&x[..], [1, len, d]), View::new(&weight[..], [d, width]));
        let initial_state = Some(View::new(&state[..], [1, width - 1, d]));
        let inputs = conv::Inputs { initial_state, ..conv::Inputs::new(x, weight) };
        let (mut output, mut gradients) =
            (inputs.forward().expect("valid"), conv::Gradients::zeroed(&inputs).expect("valid"));
        let outputs = conv::OutputMut { out: &mut output.out[..], final_state: Some(&mut output.final_state[..]) };
        conv::cpu::forward_with(Isa::Portable, &inputs, outputs).expect("valid");
        conv::cpu::backward_with(Isa::Portable, &inputs, x.into(), gradients.as_mut()).expect("valid");

        let mut pool = vec![f16::ZERO; 3 * (d + 1)];
        let pool = ViewMut::new(&mut pool, [3, width - 1, d]).with_layout(0, [d + 1, d + 1, 1]);
        let update = conv::UpdateInputs { slots: Slots::Host(&[2]), ..conv::UpdateInputs::new(x, weight) };
        update.update_with_token_states(pool).expect("valid");
    });
}

/// The state update from two threads, with a padding row: on f32 states where they lie, and on a pool whose states are
/// apart.
#[test]
fn state_updates() {
    on_two_threads(|| {
        let (draw, [batch, len, d, n]) = (&mut Draw::new(1), [2, 2, 18, 4]);
        let u = draw.uniform::<bf16>(batch * len * d, -1.0, 1.0);
        let (a, b) = (draw.uniform::<f32>(d * n, -1.0, 0.0), draw.uniform::<f32>(d * n, -1.0, 1.0));
        let (u, b) = (View::new(&u[..], [batch, len, d]), View::new(&b[..], [d, n]));
        let a = View::new(&a[..], [d, n]);
        let inputs = state_update::Inputs {
            slots: Slots::Host(&[2, -1]),
            ..state_update::Inputs::new(u, u, a, Projection::Constant(b), Projection::Constant(b))
        };
        let mut dense = vec![0.5f32; 3 * d * n];
        inputs.update(ViewMut::new(&mut dense, [3, d, n])).expect("valid");
        let mut apart = vec![f16::ONE; 3 * d * (n + 1)];
        let apart = ViewMut::new(&mut apart, [3, d, n]).with_layout(0, [d * (n + 1), n + 1, 1]);
        let options = state_update::Options { discretization: Discretization::ZeroOrderHold, ..inputs.options };
        state_update::Inputs { options, ..inputs }.update_with_token_states(apart).expect("valid");
    });
}

/// Complex states from two threads: packed sequences, one of them empty, with gradients, and an update with a row of padding.
/// What comes out is for `complex_scan` to judge.
#[test]
fn complex_scan() {
    use crate::complex_scan::case::{Case, Shape};
    use crate::complex_scan::device::{On, backward, forward};
    on_two_threads(|| {
        let length = if cfg!(miri) { 3 } else { 66 };
        for varying in [true, false] {
            let cu_seqlens = Some(vec![0, 1, 1, length]);
            let (d_inner, d_state, groups) = (18, 1, 2);
            let shape = Shape {
                batch: 1,
                length,
                d_inner,
                d_state,
                groups,
                varying: [varying; 2],
                cu_seqlens,
                ..Shape::default()
            };
            let case = Case::<bf16>::new(shape, &mut Draw::new(1));
            let on = On::Processor(Isa::Portable);
            forward(on, &case.inputs());
            backward(on, &case.inputs(), case.d_outputs());
        }
        let shape = Shape { length: 2, d_inner: 18, d_state: 1, ..Shape::default() };
        let case = Case::<bf16>::new(shape, &mut Draw::new(1));
        let inputs = complex_scan::UpdateInputs { slots: Slots::Host(&[2, -1]), ..case.update_inputs() };
        let mut apart = vec![f16::ONE; 3 * 18 * 3];
        let apart = ViewMut::new(&mut apart, [3, 18, 2]).with_layout(0, [18 * 3, 3, 1]);
        inputs.update_with_token_states(apart).expect("valid");
    });
}

/// S4D from two threads: packed sequences, one of them empty and one of a chunk and more, with gradients, and an update with a
/// row of padding. What comes out is for `lti` to judge.
#[cfg(feature = "lti")]
#[test]
fn s4d() {
    use selective_scan::lti::s4d;

    use crate::lti::s4d::case::{Case, Shape};
    use crate::lti::s4d::device::{On, backward, forward};
    on_two_threads(|| {
        let length = if cfg!(miri) { 18 } else { 300 };
        let cu_seqlens = Some(vec![0, 1, 1, length]);
        let shape = Shape { batch: 1, length, d_inner: 18, d_state: 1, cu_seqlens, ..Shape::default() };
        let case = Case::<bf16>::new(shape, &mut Draw::new(1));
        let on = On::Processor(Isa::Portable);
        forward(on, &case);
        backward(on, &case);
        let shape = Shape { length: 2, d_inner: 18, d_state: 1, ..Shape::default() };
        let case = Case::<bf16>::new(shape, &mut Draw::new(1));
        let all = case.inputs();
        let steps = s4d::recurrence(all.log_delta, all.a, all.b, all.options.rule).expect("valid");
        let steps = View::new(&steps, [18, 6, 1]);
        let slots = Slots::Host(&[2, -1]);
        let inputs = s4d::UpdateInputs { d: all.d, slots, ..s4d::UpdateInputs::new(all.u, steps, all.c) };
        let mut apart = vec![f16::ONE; 3 * 18 * 3];
        let apart = ViewMut::new(&mut apart, [3, 18, 2]).with_layout(0, [18 * 3, 3, 1]);
        inputs.update_with_token_states(apart).expect("valid");
    });
}

/// A convolution with kernels from two threads, and back.
#[cfg(feature = "lti")]
#[test]
fn long_convolution() {
    use selective_scan::lti::long_conv::{Gradients, Inputs};
    on_two_threads(|| {
        let (draw, [batch, length, d]) = (&mut Draw::new(1), [2, 5, 3]);
        let (u, kernel) = (draw.uniform::<bf16>(batch * length * d, -1.0, 1.0), draw.uniform::<f32>(d * 4, -1.0, 1.0));
        let (u, kernel) = (View::new(&u[..], [batch, length, d]), View::new(&kernel[..], [d, 4]));
        let inputs = Inputs::new(u, kernel);
        assert_eq!(inputs.forward().expect("valid").len(), batch * length * d);
        let Gradients { kernel, .. } = inputs.backward(u).expect("valid");
        assert_eq!(kernel.len(), d * 4);
    });
}

/// The operators of a decoding step from two threads: a product whose first columns go through a convolution, one that is
/// added, and an update. What comes out is for `decode` to judge.
#[test]
fn decoding_steps() {
    on_two_threads(|| {
        let (draw, [rows, features, columns, d]) = (&mut Draw::new(1), [3, 5, 30, 18]);
        let (x, weight) =
            (draw.uniform::<f32>(rows * features, -1.0, 1.0), draw.uniform::<f16>(columns * features, -1.0, 1.0));
        let (x, weight) = (View::new(&x[..], [rows, features]), View::new(&weight[..], [columns, features]));
        let filter = draw.uniform::<f32>(d * 2, -1.0, 1.0);
        let slots = Slots::Host(&[2, -1, 0]);
        let conv = decode::ConvStep { weight: View::new(&filter[..], [d, 2]), bias: None, slots };
        let norm = Some(decode::RowNorm { weight: None, eps: 1e-5 });
        let inputs = decode::Linear { conv: Some(conv), norm, ..decode::Linear::new(x, weight) };
        let (mut out, mut pool) = (vec![f16::ZERO; rows * columns], vec![bf16::ZERO; 3 * (d + 1)]);
        let conv_state = Some(ViewMut::new(&mut pool[..], [3, 1, d]).with_layout(0, [d + 1, d + 1, 1]));
        let outputs = decode::LinearMut { out: &mut out[..], accumulate: false, conv_state };
        decode::cpu::linear_with(Isa::Portable, &inputs, outputs).expect("valid");
        let mut sums = vec![0.0f32; rows * columns];
        let plain = decode::Linear::new(x, weight);
        decode::cpu::linear_with(Isa::Portable, &plain, decode::LinearMut::add_to(&mut sums[..])).expect("valid");

        let u = View::new(&out[..], [rows, d]).with_layout(0, [columns, 1]);
        let projected = View::new(&out[..], [rows, 2 + 2 * 4]).with_layout(d, [columns, 1]);
        let (dt_weight, a) = (draw.uniform::<f16>(d * 2, -1.0, 1.0), draw.uniform::<f32>(d * 4, -1.0, 0.0));
        let (dt_weight, a) = (View::new(&dt_weight[..], [d, 2]), View::new(&a[..], [d, 4]));
        let update = decode::SelectiveUpdate { slots, ..decode::SelectiveUpdate::new(u, projected, dt_weight, a) };
        let (mut y, mut states) = (vec![f16::ZERO; rows * d], vec![0.5f32; 3 * d * 4]);
        let outputs = decode::SelectiveUpdateMut::new(ViewMut::new(&mut states[..], [3, d, 4]), &mut y[..]);
        decode::cpu::selective_update_with(Isa::Portable, &update, outputs).expect("valid");
    });
}

/// Rows with room between them, written from two threads.
#[test]
fn cross_entropy() {
    on_two_threads(|| {
        let (draw, [rows, vocab, stride]) = (&mut Draw::new(1), [4, 4100, 4103]);
        let mut logits = draw.uniform::<bf16>(1 + rows * stride, -1.0, 1.0);
        let logits = ViewMut::new(&mut logits, [rows, vocab]).with_layout(1, [stride, 1]);
        let (inputs, mut losses) = (loss::InputsMut::new(logits, &[0, 4099, 7, loss::IGNORED], 1.0), [0.0; 4]);
        loss::cpu::losses_and_gradient_with(Isa::Portable, inputs, &mut losses).expect("valid");
        assert!(losses[..3].iter().all(|loss| (loss - (vocab as f32).ln()).abs() < 2.0) && losses[3] == 0.0);
    });
}

/// Settings, bits and log-probabilities of rows that change places, written from two threads.
#[test]
fn sampling() {
    on_two_threads(|| {
        let logits: Vec<f32> = Draw::new(1).uniform(3 * 40, -2.0, 2.0);
        let settings = Settings { top_k: 9, top_p: 0.9, repetition_penalty: 2.0, ..Settings::default() };
        let (mut settings, mut occurred, mut tokens, mut log_probs) = ([settings; 4], [0; 8], [0; 4], [0.0; 4]);
        for slots in [[3, 0, 1], [0, -1, 2]] {
            let inputs =
                sampling::Inputs { slots: Slots::Host(&slots), ..sampling::Inputs::new(View::new(&logits, [3, 40])) };
            let (occurred, log_probs) = (Some(&mut occurred[..]), Some(&mut log_probs[..]));
            let state = StateMut { settings: &mut settings, occurred, tokens: &mut tokens, log_probs };
            sampling::cpu::sample_with(Isa::Portable, &inputs, state).expect("valid");
        }
        assert_eq!(settings.map(|settings| settings.position), [2, 1, 1, 1]);
    });
}
