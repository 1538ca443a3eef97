//! The convolution: the fast path against the reference, the reference against finite differences, and whole sequences
//! against their parts.

#[cfg(feature = "cuda")]
pub mod gpu;
mod update;
mod vectors;
mod wild;

use half::{bf16, f16};
use selective_scan::conv::{
    Gradients, GradientsMut, Inputs, Options, Output, OutputGradients, OutputMut, UpdateInputs, cpu, reference,
};
use selective_scan::{Element, Slots, View, ViewMut};

use crate::support::device::Device;
use crate::support::draw::Draw;
use crate::support::strided::Strided;
use crate::support::tolerance::{assert_close, bits};

/// A sum of at most 9 terms, each rounded to 2^-24, and SiLU within 2^-21.
const FORWARD: f64 = 1e-5;
/// The same with the slope of SiLU, and sums over all steps by tiles.
const GRADIENTS: f64 = 1e-4;

/// Everything that a convolution reads, drawn at random.
struct Case<T> {
    width: usize,
    x: Strided<T>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    initial: Option<Vec<f32>>,
    cu_seqlens: Option<Vec<usize>>,
    options: Options,
    d_out: Strided<T>,
    d_final: Option<Vec<f32>>,
}

impl<T: Element> Case<T> {
    fn draw(draw: &mut Draw) -> Self {
        let width = draw.one_of(&[2, 3, 4, 5, 6, 7, 8]);
        let d = draw.one_of(&[1, 5, 16, 40, 131]);
        let cu_seqlens = draw.flag().then(|| {
            let mut offsets = vec![0];
            for _ in 0..4 {
                offsets.push(offsets[offsets.len() - 1] + draw.one_of(&[0, 1, 3, 31, 32, 33, 70]));
            }
            offsets
        });
        let (batch, len) = match &cu_seqlens {
            Some(offsets) => (1, offsets[4]),
            None => (draw.one_of(&[1, 3]), draw.one_of(&[1, 2, 31, 32, 64, 75, 600])),
        };
        let state = (cu_seqlens.as_ref().map_or(batch, |_| 4)) * (width - 1) * d;
        Self {
            width,
            x: draw.activation([batch, len, d]),
            weight: draw.uniform(d * width, -1.0, 1.0),
            bias: draw.flag().then(|| draw.uniform(d, -1.0, 1.0)),
            initial: draw.flag().then(|| draw.uniform(state, -1.0, 1.0)),
            cu_seqlens,
            options: Options { silu: draw.flag(), reverse: draw.flag() },
            d_out: draw.activation([batch, len, d]),
            d_final: draw.flag().then(|| draw.uniform(state, -1.0, 1.0)),
        }
    }

    fn sequences(&self) -> usize {
        self.cu_seqlens.as_ref().map_or(self.x.shape[0], |offsets| offsets.len() - 1)
    }

    fn state_view<'s>(&self, data: &'s [f32]) -> View<'s, f32, 3> {
        View::new(data, [self.sequences(), self.width - 1, self.x.shape[2]])
    }

    fn inputs(&self) -> Inputs<'_, T> {
        let d = self.x.shape[2];
        Inputs {
            bias: self.bias.as_ref().map(|bias| View::new(&bias[..], [d])),
            initial_state: self.initial.as_ref().map(|state| self.state_view(state)),
            cu_seqlens: self.cu_seqlens.as_deref(),
            options: self.options,
            ..Inputs::new(self.x.view(), View::new(&self.weight, [d, self.width]))
        }
    }

    fn d_outputs(&self) -> OutputGradients<'_, T> {
        let d_final_state = self.d_final.as_ref().map(|state| self.state_view(state));
        OutputGradients { d_out: self.d_out.view(), d_final_state }
    }

    /// Both passes, into buffers that hold something else before.
    fn run(&self, device: Device) -> (Output<T>, Gradients<T>) {
        let inputs = self.inputs();
        let state = self.sequences() * (self.width - 1) * self.x.shape[2];
        let size = self.x.shape.iter().product();
        let mut output = Output { out: vec![T::from_f32(7.0); size], final_state: vec![7.0; state] };
        let outputs = OutputMut { out: &mut output.out[..], final_state: Some(&mut output.final_state[..]) };
        let mut gradients = Gradients::zeroed(&inputs).unwrap();
        gradients.x.fill(T::from_f32(7.0));
        gradients.weight.fill(7.0);
        for values in [&mut gradients.bias, &mut gradients.initial_state].into_iter().flatten() {
            values.fill(7.0);
        }
        match device {
            Device::Cpu(isa) => {
                cpu::forward_with(isa, &inputs, outputs).unwrap();
                cpu::backward_with(isa, &inputs, self.d_outputs(), gradients.as_mut()).unwrap();
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {
                gpu::forward(&inputs, outputs);
                gpu::backward(&inputs, self.d_outputs(), gradients.as_mut());
            }
        }
        (output, gradients)
    }
}

/// An infinite weight reaches the gradients of the inputs that it has met, and no others.
fn infinite_weights(device: Device) {
    for (width, d) in (2..=8).flat_map(|width| [5, 8].map(move |d| (width, d))) {
        for (len, k) in [1, 3, 40].into_iter().flat_map(|len| (0..width).map(move |k| (len, k))) {
            let draw = &mut Draw::new(8);
            let x = draw.uniform::<f32>(len * d, 0.5, 1.0);
            let mut weight = draw.uniform::<f32>(d * width, 0.5, 1.0);
            weight.iter_mut().skip(k).step_by(width).for_each(|weight| *weight = f32::INFINITY);
            let initial = vec![1.0f32; (width - 1) * d];
            let inputs = Inputs {
                initial_state: Some(View::new(&initial[..], [1, width - 1, d])),
                ..Inputs::new(View::new(&x, [1, len, d]), View::new(&weight, [d, width]))
            };
            let d_out = View::new(&x[..], [1, len, d]);
            let (ours, exact) = (backward(device, &inputs, d_out.into()), reference::backward(&inputs, d_out).unwrap());
            let finite = |values: &[f32]| values.iter().map(|x| x.is_finite()).collect::<Vec<_>>();
            let expected = |values: &[f64]| values.iter().map(|x| x.is_finite()).collect::<Vec<_>>();
            let what = format!("{device:?}: weight {k} of {width}, {len} steps, {d} channels");
            assert_eq!(finite(&ours.x), expected(&exact.x), "{what}: x");
            let states = (ours.initial_state.unwrap(), exact.initial_state.unwrap());
            assert_eq!(finite(&states.0), expected(&states.1), "{what}: initial_state");
        }
    }
}

#[test]
fn infinite_weights_stay_where_they_are_met() {
    Device::all().into_iter().for_each(infinite_weights);
}

fn on_cpu(draw: &mut Draw) -> Device {
    Device::Cpu(draw.isa())
}

fn against_reference<T: Element>(device: &dyn Fn(&mut Draw) -> Device, cases: u64) {
    for seed in 0..cases {
        let draw = &mut Draw::new(seed);
        let case = Case::<T>::draw(draw);
        let device = device(draw);
        let (output, gradients) = case.run(device);
        let what = |of: &str| {
            format!(
                "{of} of seed {seed}, {device:?}, shape {:?}, width {}, {:?}",
                case.x.shape, case.width, case.options
            )
        };
        let want = reference::forward(&case.inputs()).unwrap();
        assert_close(&output.out, &want.out, FORWARD, &what("out"));
        assert_close(&output.final_state, &want.final_state, 0.0, &what("final_state"));
        let want = reference::backward(&case.inputs(), case.d_outputs()).unwrap();
        assert_close(&gradients.x, &want.x, GRADIENTS, &what("x"));
        assert_close(&gradients.weight, &want.weight, GRADIENTS, &what("weight"));
        for (got, want, name) in
            [(&gradients.bias, &want.bias, "bias"), (&gradients.initial_state, &want.initial_state, "initial_state")]
        {
            assert_eq!(got.is_some(), want.is_some());
            if let (Some(got), Some(want)) = (got, want) {
                assert_close(got, want, GRADIENTS, &what(name));
            }
        }
    }
}

#[test]
fn f32_is_as_the_reference() {
    against_reference::<f32>(&on_cpu, 150);
}

#[test]
fn halves_are_as_the_reference() {
    against_reference::<f16>(&on_cpu, 40);
    against_reference::<bf16>(&on_cpu, 40);
}

/// Central differences of `Σ out·d_out + Σ final·d_final` in steps of 2^-7, of which the third derivative, at most about
/// one, leaves 2^-14/6 = 1e-5 for each output that depends on an input.
#[test]
fn the_reference_gradients_are_finite_differences() {
    let mut checked = 0;
    for seed in 0..60 {
        let case = &mut Case::<f32>::draw(&mut Draw::new(seed));
        if case.x.data.len() > 500 {
            continue;
        }
        checked += 1;
        let loss = |case: &Case<f32>| -> f64 {
            let output = reference::forward(&case.inputs()).unwrap();
            let [batch, len, d] = case.x.shape;
            let mut sum = 0.0;
            for i in 0..batch * len * d {
                let at = case.d_out.offset
                    + i / (len * d) * case.d_out.strides[0]
                    + i / d % len * case.d_out.strides[1]
                    + i % d * case.d_out.strides[2];
                sum += output.out[i] * f64::from(case.d_out.data[at]);
            }
            let d_final = case.d_final.as_deref().unwrap_or(&[]);
            sum + output.final_state.iter().zip(d_final).map(|(x, d)| x * f64::from(*d)).sum::<f64>()
        };
        let gradients = reference::backward(&case.inputs(), case.d_outputs()).unwrap();
        let [_, len, d] = case.x.shape;
        let mut check = |pick: &dyn Fn(&mut Case<f32>) -> &mut f32, want: f64, what: &str| {
            let old = *pick(case);
            let (above, below) = (old + 0.0078125, old - 0.0078125);
            *pick(case) = above;
            let up = loss(case);
            *pick(case) = below;
            let down = loss(case);
            *pick(case) = old;
            let slope = (up - down) / (f64::from(above) - f64::from(below));
            assert!((slope - want).abs() <= 1e-3 * (1.0 + want.abs()), "seed {seed}, {what}: {slope} and {want}");
        };
        let draw = &mut Draw::new(seed);
        for _ in 0..6 {
            let mut index = |len: usize| draw.one_of(&(0..len).collect::<Vec<_>>());
            if !gradients.x.is_empty() {
                let i = index(gradients.x.len());
                let place = move |case: &Case<f32>| {
                    let [batch, step, channel] = case.x.strides;
                    case.x.offset + i / (len * d) * batch + i / d % len * step + i % d * channel
                };
                check(
                    &|case| {
                        let at = place(case);
                        &mut case.x.data[at]
                    },
                    gradients.x[i],
                    "x",
                );
            }
            let i = index(gradients.weight.len());
            check(&|case| &mut case.weight[i], gradients.weight[i], "weight");
            if let Some(bias) = &gradients.bias {
                let i = index(bias.len());
                check(&|case| &mut case.bias.as_mut().unwrap()[i], bias[i], "bias");
            }
            if let Some(state) = &gradients.initial_state {
                let i = index(state.len());
                check(&|case| &mut case.initial.as_mut().unwrap()[i], state[i], "initial_state");
            }
        }
    }
    assert!(checked >= 10, "only {checked} cases were small enough");
}

/// The results of a forward pass.
fn forward<T: Element>(device: Device, inputs: &Inputs<T>) -> Output<T> {
    let [batch, _, d] = inputs.x.shape;
    let sequences = inputs.cu_seqlens.map_or(batch, |offsets| offsets.len() - 1);
    let state = sequences * (inputs.weight.shape[1] - 1) * d;
    let mut output =
        Output { out: vec![T::from_f32(7.0); inputs.x.shape.iter().product()], final_state: vec![7.0; state] };
    let outputs = OutputMut { out: &mut output.out[..], final_state: Some(&mut output.final_state[..]) };
    match device {
        Device::Cpu(isa) => cpu::forward_with(isa, inputs, outputs).unwrap(),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => gpu::forward(inputs, outputs),
    }
    output
}

/// The results of a backward pass.
fn backward<T: Element>(device: Device, inputs: &Inputs<T>, d_outputs: OutputGradients<T>) -> Gradients<T> {
    let mut gradients = Gradients::zeroed(inputs).unwrap();
    match device {
        Device::Cpu(isa) => cpu::backward_with(isa, inputs, d_outputs, gradients.as_mut()).unwrap(),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => gpu::backward(inputs, d_outputs, gradients.as_mut()),
    }
    gradients
}

/// The part of an activation from `start` to `end`.
fn steps<T: Element>(view: View<'_, T, 3>, start: usize, end: usize) -> View<'_, T, 3> {
    let [batch, _, d] = view.shape;
    View { offset: view.offset + start * view.strides[1], shape: [batch, end - start, d], ..view }
}

#[test]
fn a_packed_sequence_gives_the_bits_of_the_same_alone() {
    packed_alone(Device::best(), 200..260);
}

fn packed_alone(device: Device, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let case = Case::<bf16>::draw(&mut Draw::new(seed));
        let Some(offsets) = &case.cu_seqlens else { continue };
        let (output, gradients) = case.run(device);
        let d = case.x.shape[2];
        let size = (case.width - 1) * d;
        let row = |view: View<'_, f32, 3>, i| bits(&view.data[i * size..(i + 1) * size]);
        for i in 0..offsets.len() - 1 {
            let (start, end) = (offsets[i], offsets[i + 1]);
            fn sequence<'s>(view: View<'s, f32, 3>, i: usize) -> View<'s, f32, 3> {
                View { offset: i * view.strides[0], shape: [1, view.shape[1], view.shape[2]], ..view }
            }
            let inputs = case.inputs();
            let alone = Inputs {
                x: steps(inputs.x, start, end),
                initial_state: inputs.initial_state.map(|state| sequence(state, i)),
                cu_seqlens: None,
                ..inputs
            };
            let d_outputs = OutputGradients {
                d_out: steps(case.d_out.view(), start, end),
                d_final_state: case.d_outputs().d_final_state.map(|state| sequence(state, i)),
            };
            let one = forward(device, &alone);
            let one_gradients = backward(device, &alone, d_outputs);
            assert_eq!(bits(&one.out), bits(&output.out[start * d..end * d]), "seed {seed}");
            assert_eq!(bits(&one.final_state), row(case.state_view(&output.final_state), i), "seed {seed}");
            assert_eq!(bits(&one_gradients.x), bits(&gradients.x[start * d..end * d]), "seed {seed}");
            if let (Some(one), Some(all)) = (&one_gradients.initial_state, &gradients.initial_state) {
                assert_eq!(bits(one), row(case.state_view(all), i), "seed {seed}");
            }
        }
    }
}

#[test]
fn chunks_give_the_bits_of_the_whole() {
    chunks(Device::best(), 300..340);
}

fn chunks(device: Device, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let draw = &mut Draw::new(seed);
        let case = Case::<f32>::draw(draw);
        if case.cu_seqlens.is_some() {
            continue;
        }
        let [batch, len, d] = case.x.shape;
        let whole = case.run(device).0;
        let cut = draw.one_of(&[0, 1, 2, len / 2, len - 1, len]).min(len);
        // The part that the scan meets first is the later one if it runs in reverse.
        let (first, second) = if case.options.reverse { ((cut, len), (0, cut)) } else { ((0, cut), (cut, len)) };
        let inputs = case.inputs();
        let one = forward(device, &Inputs { x: steps(inputs.x, first.0, first.1), ..inputs });
        let state = Some(case.state_view(&one.final_state));
        let two = Inputs { x: steps(inputs.x, second.0, second.1), initial_state: state, ..inputs };
        let two = forward(device, &two);
        for ((start, end), part) in [(first, &one), (second, &two)] {
            let rows = end - start;
            for b in 0..batch {
                let want = &whole.out[(b * len + start) * d..][..rows * d];
                assert_eq!(bits(&part.out[b * rows * d..][..rows * d]), bits(want), "seed {seed}");
            }
        }
        assert_eq!(bits(&two.final_state), bits(&whole.final_state), "seed {seed}");
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (one, three) = (pool(1), pool(3));
    for seed in 400..420 {
        let case = Case::<f32>::draw(&mut Draw::new(seed));
        let run = || {
            let (output, gradients) = case.run(Device::best());
            let parameters = [gradients.weight, gradients.bias.unwrap_or_default()].concat();
            [bits(&output.out), bits(&output.final_state), bits(&gradients.x), bits(&parameters)]
        };
        assert_eq!(one.install(run), three.install(run), "seed {seed}");
    }
}

/// Sums over 65,536 steps of the same sign, the worst that a running sum in `f32` meets.
#[test]
fn long_sums_stay_exact() {
    let (len, d, width) = (65_536, 3, 4);
    let draw = &mut Draw::new(9);
    let (x, d_out) = (draw.uniform::<f32>(len * d, 0.5, 1.0), draw.uniform::<f32>(len * d, 0.5, 1.0));
    let (weight, bias) = (draw.uniform(d * width, -1.0, 1.0), draw.uniform(d, -1.0, 1.0));
    let inputs = Inputs {
        bias: Some(View::new(&bias[..], [d])),
        options: Options { silu: true, reverse: false },
        ..Inputs::new(View::new(&x, [1, len, d]), View::new(&weight, [d, width]))
    };
    let d_out = View::new(&d_out[..], [1, len, d]);
    let (got, want) = (inputs.backward(d_out).unwrap(), reference::backward(&inputs, d_out).unwrap());
    assert_close(&got.weight, &want.weight, 2e-6, "weight");
    assert_close(&got.bias.unwrap(), &want.bias.unwrap(), 2e-6, "bias");
}

#[test]
fn what_does_not_fit_is_named() {
    let data = [0.5f32; 64];
    let x = View::new(&data[..24], [2, 3, 4]);
    let weight = View::new(&data[..12], [4, 3]);
    let good = Inputs::new(x, weight);
    let forward = |inputs: Inputs<f32>, sizes: [usize; 2], text: &str| {
        let (mut out, mut state) = (vec![1.0; sizes[0]], vec![1.0; sizes[1]]);
        let outputs = OutputMut { out: &mut out[..], final_state: Some(&mut state[..]) };
        let error = cpu::forward(&inputs, outputs).unwrap_err().to_string();
        assert!(error.starts_with(text), "{error} instead of {text}");
        assert!(out.iter().chain(&state).all(|&x| x == 1.0), "{text}: written on an error");
    };
    let sizes = [24, 16];
    let width = "`weight`: expected a width from 2 to 8 as its last dimension";
    forward(Inputs::new(x, View::new(&data[..4], [4, 1])), sizes, width);
    forward(Inputs::new(x, View::new(&data[..36], [4, 9])), sizes, width);
    forward(Inputs::new(x, View::new(&data[..8], [2, 4])), sizes, "`weight`: expected shape (d_inner, width) = [4, 4]");
    // As many filters as there are steps: the input comes in the order (batch, d_inner, length).
    let text =
        "`x`: expected shape (batch, length, d_inner) with d_inner = 3, as `weight` has it, got [2, 3, 4], which fits";
    forward(Inputs::new(x, View::new(&data[..12], [3, 4])), sizes, text);
    forward(Inputs::new(View::new(&data[..24], [2, 4, 4]), weight), sizes, "`x`: expected a storage");
    forward(Inputs::new(View::new(&data[..0], [2, 3, 0]), weight), sizes, "`x`: expected at least one channel");
    let endless = View::new(&data[..1], [usize::MAX, usize::MAX, 4]).with_layout(0, [0; 3]);
    forward(Inputs::new(endless, weight), sizes, "`x`: expected fewer than");
    forward(Inputs { bias: Some(View::new(&data[..3], [3])), ..good }, sizes, "`bias`: expected shape (d_inner) = [4]");
    let state = View::new(&data[..24], [2, 3, 4]);
    let text = "`initial_state`: expected shape (sequences, width - 1, d_inner) = [2, 2, 4]";
    forward(Inputs { initial_state: Some(state), ..good }, sizes, text);
    forward(Inputs { cu_seqlens: Some(&[0, 3]), ..good }, sizes, "`cu_seqlens`: expected a batch of 1");
    forward(good, [23, 16], "`out`: expected (batch, length, d_inner) = [2, 3, 4] elements");
    forward(good, [24, 15], "`final_state`: expected (sequences, width - 1, d_inner) = [2, 2, 4] elements");

    let backward = |d_outputs: OutputGradients<f32>, change: &dyn Fn(&mut Gradients<f32>), text: &str| {
        let mut gradients = Gradients::zeroed(&good).unwrap();
        change(&mut gradients);
        let GradientsMut { x, weight, bias, initial_state } = gradients.as_mut();
        let result = cpu::backward(&good, d_outputs, GradientsMut { x, weight, bias, initial_state });
        let error = result.unwrap_err().to_string();
        assert!(error.starts_with(text), "{error} instead of {text}");
    };
    let d_out = OutputGradients::from(x);
    backward(View::new(&data[..12], [1, 3, 4]).into(), &|_| (), "`d_out`: expected shape");
    backward(OutputGradients { d_final_state: Some(state), ..d_out }, &|_| (), "`d_final_state`: expected shape");
    backward(d_out, &|g| g.x.truncate(23), "`gradients.x`: expected (batch, length, d_inner)");
    backward(d_out, &|g| g.weight.push(0.0), "`gradients.weight`: expected (d_inner, width)");
    backward(d_out, &|g| g.bias = Some(vec![0.0; 4]), "`gradients.bias`: expected none");
    backward(d_out, &|g| g.initial_state = Some(vec![]), "`gradients.initial_state`: expected none");

    let update = |inputs: UpdateInputs<f32>, shape: [usize; 3], text: &str| {
        let mut pool = vec![1.0f32; 64];
        let error = inputs.update(ViewMut::new(&mut pool, shape)).unwrap_err().to_string();
        assert!(error.starts_with(text), "{error} instead of {text}");
        assert!(pool.iter().all(|&x| x == 1.0), "{text}: written on an error");
    };
    let inputs = UpdateInputs::new(x, weight);
    update(inputs, [2, 3, 4], "`state`: expected shape (slots, width - 1, d_inner) = [2, 2, 4]");
    update(inputs, [3, 2, 4], "`state`: expected one slot for each");
    update(UpdateInputs { slots: Slots::Host(&[0, 3]), ..inputs }, [3, 2, 4], "`slots`: expected slots below 3");
    update(UpdateInputs { weight: View::new(&data[..4], [4, 1]), ..inputs }, [2, 0, 4], width);
}

#[test]
fn nothing_in_gives_nothing_out() {
    let (weight, state) = ([1.0f32; 12], [2.0f32; 16]);
    for (batch, len) in [(0, 5), (2, 0)] {
        let x = View::new(&[0.0f32; 0][..], [batch, len, 4]);
        let initial = View::new(&state[..batch * 8], [batch, 2, 4]);
        let inputs = Inputs { initial_state: Some(initial), ..Inputs::new(x, View::new(&weight, [4, 3])) };
        let output = inputs.forward().unwrap();
        assert_eq!(output, Output { out: vec![], final_state: vec![2.0; batch * 8] });
        let d_outputs = OutputGradients { d_out: x, d_final_state: Some(initial) };
        let gradients = inputs.backward(d_outputs).unwrap();
        assert_eq!(gradients.initial_state, Some(vec![2.0; batch * 8]));
        assert_eq!(gradients.weight, [0.0; 12]);
    }
    // More rows of nothing than can be counted through.
    let x = View::new(&[0.0f32; 0][..], [usize::MAX / 8, 0, 1]);
    let inputs = Inputs::new(x, View::new(&weight[..2], [1, 2]));
    assert_eq!(inputs.backward(x).unwrap().weight, [0.0; 2]);
    cpu::forward(&inputs, OutputMut { out: &mut [], final_state: None }).unwrap();
    assert!(inputs.forward().is_err());
}
