//! The RMS norm: the fast path against the reference, the reference against finite differences, and its properties.

mod arguments;
mod finite_differences;
#[cfg(feature = "cuda")]
mod gpu;

use half::{bf16, f16};
use selective_scan::norm::{
    BackwardInputs, Gradients, GradientsMut, Inputs, Options, Output, OutputMut, cpu, reference,
};
use selective_scan::{DType, Element, Isa, View};

use crate::support::device::Device;
use crate::support::draw::{Draw, seeded};
use crate::support::strided::{Layout, Strided};
use crate::support::tolerance::{assert_close, assert_close_to, bits};

/// A sum of squares by at least 4 lanes, of up to 1,250 terms each whose roundings of 2^-24 are independent, is within
/// 2^-19; its root halves that. The gate is within 2^-21.
const FORWARD: f64 = 1e-5;
/// The same, where terms may cancel, and sums over rows.
const GRADIENTS: f64 = 1e-4;

/// The widths that have something of their own: one column, fewer than a vector, no multiple of 4, aligned and not, more
/// than a warp holds.
const WIDTHS: [usize; 7] = [1, 7, 16, 100, 768, 2048, 5000];

/// Everything that a norm reads, in both passes, of types `X` of the input, `S` of the residual, `O` of the output.
#[derive(Debug, Clone)]
struct Case<X, S, O> {
    x: Strided<X>,
    residual: Option<Strided<S>>,
    weight: Option<Vec<f32>>,
    z: Option<Strided<X>>,
    d_out: Strided<O>,
    d_residual_out: Option<Strided<S>>,
    options: Options,
}

/// A tensor of one batch row as a matrix.
fn matrix<T: Element>(tensor: &Strided<T>) -> View<'_, T, 2> {
    let view = tensor.view();
    let ([_, rows, width], [_, row, column]) = (view.shape, view.strides);
    View { data: view.data, offset: view.offset, shape: [rows, width], strides: [row, column] }
}

impl<X: Element, S: Element, O: Element> Case<X, S, O> {
    fn draw(draw: &mut Draw, rows: usize, width: usize) -> Self {
        let groups: Vec<_> = [None, Some(1), Some(2), Some(4)].into_iter().collect();
        let divisor = draw.one_of(&groups).filter(|divisor| width.is_multiple_of(*divisor));
        // A quarter each dense and a slice of columns at an even and at an odd distance, or with rows next to each other.
        let layout =
            |draw: &mut Draw| Layout { time_contiguous: draw.one_of(&[false, false, true]), column_slice: draw.flag() };
        fn tensor<T: Element>(draw: &mut Draw, shape: [usize; 3], layout: Layout) -> Strided<T> {
            let values: Vec<f32> = draw.uniform(shape.iter().product(), -2.0, 2.0);
            let mut values = values.into_iter();
            Strided::new(shape, layout, || values.next().expect("as many"))
        }
        let shape = [1, rows, width];
        let all_dense = draw.flag();
        let next = |draw: &mut Draw| if all_dense { Layout::default() } else { layout(draw) };
        let (a, b, c, d, e) = (next(draw), next(draw), next(draw), next(draw), next(draw));
        let has_residual = X::DTYPE != S::DTYPE || draw.flag();
        let few = divisor.map_or(width, |divisor| width / divisor) < 4;
        Self {
            x: tensor(draw, shape, a),
            residual: has_residual.then(|| tensor(draw, shape, b)),
            weight: draw.flag().then(|| draw.uniform(width, -1.5, 1.5)),
            z: draw.flag().then(|| tensor(draw, shape, c)),
            d_out: tensor(draw, shape, d),
            d_residual_out: draw.flag().then(|| tensor(draw, shape, e)),
            options: Options {
                // A few sums of a half type may all be zero, of which an eps of 0 would make NaN.
                eps: f64::from(if few { 1e-5f32 } else { draw.one_of(&[0.0f32, 1e-5, 0.1]) }),
                group_size: divisor.map(|divisor| width / divisor),
                norm_before_gate: draw.flag(),
            },
        }
    }

    fn shape(&self) -> [usize; 2] {
        [self.x.shape[1], self.x.shape[2]]
    }

    fn inputs(&self) -> Inputs<'_, X, S> {
        Inputs {
            residual: self.residual.as_ref().map(matrix),
            weight: self.weight.as_ref().map(|weight| View::new(&weight[..], [weight.len()])),
            z: self.z.as_ref().map(matrix),
            options: self.options,
            ..Inputs::new(matrix(&self.x))
        }
    }

    fn backward_inputs<'s>(&'s self, s: &'s [S]) -> BackwardInputs<'s, X, S, O> {
        let Inputs { weight, z, options, .. } = self.inputs();
        let d_residual_out = self.d_residual_out.as_ref().map(matrix);
        let s = View::new(s, self.shape());
        BackwardInputs { weight, z, options, d_residual_out, ..BackwardInputs::new(s, matrix(&self.d_out)) }
    }

    /// Both passes, into buffers that hold something else before.
    fn run(&self, device: Device) -> (Output<S, O>, Gradients<X, S>) {
        let output = self.forward(device);
        let gradients = backward(device, &self.backward_inputs(&output.residual_out));
        (output, gradients)
    }

    fn forward(&self, device: Device) -> Output<S, O> {
        let size = self.shape().iter().product();
        let mut output = Output { out: vec![O::from_f32(7.0); size], residual_out: vec![S::from_f32(7.0); size] };
        let outputs = OutputMut { out: &mut output.out[..], residual_out: Some(&mut output.residual_out[..]) };
        forward_to(device, &self.inputs(), outputs);
        output
    }
}

fn forward_to<X: Element, S: Element, O: Element>(device: Device, inputs: &Inputs<X, S>, outputs: OutputMut<S, O>) {
    match device {
        Device::Cpu(isa) => cpu::forward_with(isa, inputs, outputs).expect("the case is valid"),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => gpu::forward(inputs, outputs),
    }
}

fn backward<X: Element, S: Element, O: Element>(device: Device, inputs: &BackwardInputs<X, S, O>) -> Gradients<X, S> {
    let size = inputs.s.shape.iter().product();
    let mut gradients = Gradients {
        x: vec![X::from_f32(7.0); size],
        residual: vec![S::from_f32(7.0); size],
        weight: vec![7.0; inputs.s.shape[1]],
        z: inputs.z.map(|_| vec![X::from_f32(7.0); size]),
    };
    let to = GradientsMut {
        x: Some(&mut gradients.x[..]),
        residual: Some(&mut gradients.residual[..]),
        weight: Some(&mut gradients.weight[..]),
        z: gradients.z.as_deref_mut(),
    };
    backward_to(device, inputs, to);
    gradients
}

fn backward_to<X: Element, S: Element, O: Element>(
    device: Device,
    inputs: &BackwardInputs<X, S, O>,
    gradients: GradientsMut<X, S>,
) {
    match device {
        Device::Cpu(isa) => cpu::backward_with(isa, inputs, gradients).expect("the case is valid"),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => gpu::backward(inputs, gradients),
    }
}

/// Every type of `T` within its rounding of the reference, backward from the sum that forward has left.
fn against_reference<X: Element, S: Element, O: Element>(
    device: &dyn Fn(&mut Draw) -> Device,
    rounds: usize,
    sizes: &dyn Fn(&mut Draw) -> (usize, usize),
) {
    for _ in 0..rounds {
        let (_, seed) = seeded();
        let draw = &mut Draw::new(seed);
        let (device, (rows, width)) = (device(draw), sizes(draw));
        let case = Case::<X, S, O>::draw(draw, rows, width);
        let what = |name: &str| {
            let types = (X::DTYPE, S::DTYPE, O::DTYPE);
            format!("{name}, {rows} rows of {width}, {types:?}, {:?}, {device:?}, seed {seed}", case.options)
        };
        let (output, gradients) = case.run(device);
        let exact = reference::forward(&case.inputs()).expect("the case is valid");
        assert_close(&output.residual_out, &exact.residual_out, FORWARD, &what("residual_out"));
        // What is normed is the sum as it is rounded to a half type.
        let rounded: Vec<X> = output.residual_out.iter().map(|s| X::from_f32(s.to_f32())).collect();
        let exact = match S::DTYPE {
            DType::F32 => exact,
            _ => {
                let x = View::new(&rounded[..], case.shape());
                reference::forward(&Inputs { x, residual: None, ..case.inputs() }).expect("the case is valid")
            }
        };
        assert_close(&output.out, &exact.out, FORWARD, &what("out"));
        // What a group of one column is normed to, 1 or -1, does not depend on it: but for eps its gradient is nothing, and
        // what is left is rounding beside terms that cancel.
        let cancels = case.options.group_size.unwrap_or(width) == 1;
        let inputs = case.backward_inputs(&output.residual_out);
        let exact = reference::backward(&inputs).expect("the case is valid");
        if !cancels {
            assert_close(&gradients.x, &exact.x, GRADIENTS, &what("x"));
            assert_close(&gradients.residual, &exact.residual, GRADIENTS, &what("residual"));
        }
        // A term of a column's sum over the rows is the output's gradient times a normed value, whose size is about 1 (and a
        // gate): with one column the sum may come to much less than its terms do.
        let terms = case.d_out.dense().values().iter().map(|x| f64::from(x.to_f32()).powi(2)).sum::<f64>().sqrt();
        assert_close_to(&gradients.weight, &exact.weight, GRADIENTS, terms, &what("weight"));
        if let (Some(ours), Some(exact)) = (&gradients.z, &exact.z)
            && (!cancels || case.options.norm_before_gate)
        {
            // The slope of SiLU is about 1, and nothing at one place, near which a single element may lie.
            assert_close_to(ours, exact, GRADIENTS, terms, &what("z"));
        }
    }
}

fn cpu_device(draw: &mut Draw) -> Device {
    Device::Cpu(draw.isa())
}

fn sizes(draw: &mut Draw) -> (usize, usize) {
    (draw.one_of(&[1, 3, 64, 65, 130]), draw.one_of(&WIDTHS))
}

#[test]
fn f32_is_as_the_reference() {
    against_reference::<f32, f32, f32>(&cpu_device, 100, &sizes);
    against_reference::<f32, f32, f16>(&cpu_device, 20, &sizes);
    against_reference::<f32, f32, bf16>(&cpu_device, 20, &sizes);
}

#[test]
fn halves_are_as_the_reference() {
    against_reference::<f16, f16, f16>(&cpu_device, 30, &sizes);
    against_reference::<bf16, bf16, bf16>(&cpu_device, 30, &sizes);
    against_reference::<f16, f32, f16>(&cpu_device, 30, &sizes);
    against_reference::<bf16, f32, bf16>(&cpu_device, 30, &sizes);
}

/// The bits of all results.
fn all_bits<X: Element, S: Element, O: Element>(
    (output, gradients): &(Output<S, O>, Gradients<X, S>),
) -> Vec<Vec<u32>> {
    let z = gradients.z.as_ref().map(|z| bits(z)).unwrap_or_default();
    let Gradients { x, residual, weight, .. } = gradients;
    vec![bits(&output.out), bits(&output.residual_out), bits(x), bits(residual), bits(weight), z]
}

/// The same bits again, from any layout, and whatever else is wanted beside; rows do not depend on each other.
fn bits_repeat(device: Device, rows: usize, width: usize) {
    for round in 0..8 {
        let draw = &mut Draw::new(seeded().1);
        let case = Case::<bf16, f32, bf16>::draw(draw, rows, width);
        let what = format!("{rows} rows of {width}, round {round}, {device:?}");
        let whole = case.run(device);
        assert_eq!(all_bits(&whole), all_bits(&case.run(device)), "{what}: again");

        let dense = Case {
            x: case.x.dense(),
            residual: case.residual.as_ref().map(Strided::dense),
            z: case.z.as_ref().map(Strided::dense),
            d_out: case.d_out.dense(),
            d_residual_out: case.d_residual_out.as_ref().map(Strided::dense),
            ..case.clone()
        };
        assert_eq!(all_bits(&whole), all_bits(&dense.run(device)), "{what}: dense");

        // One result at a time.
        let (output, gradients) = &whole;
        let mut out = output.out.clone();
        out.fill(bf16::from_f32(7.0));
        forward_to(device, &case.inputs(), OutputMut::<f32, bf16> { out: &mut out[..], residual_out: None });
        assert_eq!(bits(&out), bits(&output.out), "{what}: out alone");
        let inputs = case.backward_inputs(&output.residual_out);
        let none = || GradientsMut::<bf16, f32> { x: None, residual: None, weight: None, z: None };
        let (mut x, mut residual) = (vec![bf16::from_f32(7.0); rows * width], vec![7.0f32; rows * width]);
        let mut weight = vec![7.0f32; width];
        backward_to(device, &inputs, GradientsMut { x: Some(&mut x[..]), ..none() });
        backward_to(device, &inputs, GradientsMut { residual: Some(&mut residual[..]), ..none() });
        backward_to(device, &inputs, GradientsMut { weight: Some(&mut weight[..]), ..none() });
        backward_to(device, &inputs, none());
        assert_eq!(bits(&x), bits(&gradients.x), "{what}: x alone");
        assert_eq!(bits(&residual), bits(&gradients.residual), "{what}: residual alone");
        assert_eq!(bits(&weight), bits(&gradients.weight), "{what}: weight alone");

        // Each row by itself.
        for row in [0, rows / 2, rows - 1] {
            let alone = Case {
                x: case.x.steps(row..row + 1),
                residual: case.residual.as_ref().map(|tensor| tensor.steps(row..row + 1)),
                z: case.z.as_ref().map(|tensor| tensor.steps(row..row + 1)),
                d_out: case.d_out.steps(row..row + 1),
                d_residual_out: case.d_residual_out.as_ref().map(|tensor| tensor.steps(row..row + 1)),
                ..case.clone()
            };
            let (alone, alone_gradients) = alone.run(device);
            let range = row * width..(row + 1) * width;
            assert_eq!(bits(&alone.out), bits(&output.out[range.clone()]), "{what}: row {row}");
            assert_eq!(bits(&alone_gradients.x), bits(&gradients.x[range]), "{what}: row {row}");
        }
    }
}

#[test]
fn the_same_bits() {
    for isa in Isa::available() {
        for width in [7, 16, 100] {
            bits_repeat(Device::Cpu(isa), 70, width);
        }
    }
}

/// What a number of threads and a processor's instructions have no influence on. (Without a gate, whose exponential rounds
/// as the instructions do.)
#[test]
fn threads_and_instructions_change_no_bits() {
    let draw = &mut Draw::new(seeded().1);
    let case = Case { z: None, ..Case::<f32, f32, f32>::draw(draw, 200, 100) };
    let expected = all_bits(&case.run(Device::best()));
    for isa in Isa::available() {
        assert_eq!(all_bits(&case.run(Device::Cpu(isa))), expected, "{isa:?}");
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    assert_eq!(all_bits(&pool.install(|| case.run(Device::best()))), expected);
}

/// A sum and its norm in one call have the bits of the sum, rounded, that is then normed; and without a residual the sum is
/// `x`, signs of zeros included.
fn the_sum_is_what_is_normed<S: Element>(device: Device, rows: usize, width: usize) {
    for _ in 0..4 {
        let draw = &mut Draw::new(seeded().1);
        let mut case = Case::<S, S, S>::draw(draw, rows, width);
        case.x.set([0, 0, 0], -0.0);
        let one_call = case.forward(device);
        let shape = [1, rows, width];
        let mut values = one_call.residual_out.iter().map(|x| x.to_f32());
        let x = Strided::new(shape, Layout::default(), || values.next().expect("as many"));
        let alone = Case { x, residual: None, ..case };
        let two_calls = alone.forward(device);
        assert_eq!(bits(&one_call.out), bits(&two_calls.out), "{rows} rows of {width}, {device:?}");
        assert_eq!(bits(&two_calls.residual_out), bits(&alone.x.data), "{rows} rows of {width}, {device:?}");
    }
}

#[test]
fn a_sum_in_the_same_call() {
    for width in [7, 16, 100] {
        the_sum_is_what_is_normed::<bf16>(Device::best(), 5, width);
        the_sum_is_what_is_normed::<f16>(Device::best(), 5, width);
        the_sum_is_what_is_normed::<f32>(Device::best(), 5, width);
    }
}

/// NaN and infinity stay in their group of their row, forward and backward; all else keeps its bits.
fn what_is_not_finite_stays(device: Device, width: usize, group_size: usize) {
    let (rows, hit) = (5, 2);
    let draw = &mut Draw::new(seeded().1);
    let plain = Case::<f32, f32, f32>::draw(draw, rows, width);
    let options = Options { group_size: Some(group_size), eps: 1e-5, ..plain.options };
    let case = Case { x: plain.x.dense(), options, ..plain };
    let (clean, clean_gradients) = case.run(device);
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut case = case.clone();
        case.x.set([0, hit, group_size - 1], value);
        let (output, gradients) = case.run(device);
        let (mut seen, mut seen_backward) = (0, 0);
        for at in 0..rows * width {
            let is_hit = at / width == hit && at % width < group_size;
            let what = format!("{value} with {width} columns by {group_size}, {device:?}: element {at}");
            seen += usize::from(is_hit && !output.out[at].is_finite());
            seen_backward += usize::from(is_hit && !gradients.x[at].is_finite());
            assert!(is_hit || output.out[at].to_bits() == clean.out[at].to_bits(), "{what}, forward");
            assert!(is_hit || gradients.x[at].to_bits() == clean_gradients.x[at].to_bits(), "{what}, backward");
        }
        assert!(seen > 0 && seen_backward > 0, "{value} is seen");
    }
}

#[test]
fn what_is_not_finite_stays_in_its_group() {
    for (width, group_size) in [(7, 7), (16, 4), (100, 50)] {
        what_is_not_finite_stays(Device::best(), width, group_size);
    }
}

/// No rows give nothing but a gradient of the weight, which is zero; rows of zeros are zeros, and have a gradient by eps.
fn zeros(device: Device, width: usize) {
    let draw = &mut Draw::new(seeded().1);
    let case = Case { z: None, weight: None, ..Case::<f32, f32, f32>::draw(draw, 0, width) };
    let (output, gradients) = case.run(device);
    assert!(output.out.is_empty() && gradients.x.is_empty());
    assert_eq!(gradients.weight, vec![0.0; width]);

    let zeros = vec![0.0f32; 3 * width];
    let d_out: Vec<f32> = draw.uniform(3 * width, -1.0, 1.0);
    let (view, d_view) = (View::new(&zeros[..], [3, width]), View::new(&d_out[..], [3, width]));
    let options = Options { eps: 0.25, ..Options::default() };
    let mut out = vec![7.0f32; 3 * width];
    let inputs = Inputs { options, ..Inputs::<f32>::new(view) };
    forward_to(device, &inputs, OutputMut::<f32, f32> { out: &mut out[..], residual_out: None });
    assert_eq!(out, zeros);
    let gradients = backward(device, &BackwardInputs { options, ..BackwardInputs::<f32>::new(view, d_view) });
    // 1/√0.25
    assert_eq!(gradients.x, d_out.iter().map(|d| 2.0 * d).collect::<Vec<_>>());
}

#[test]
fn no_rows_and_rows_of_zeros() {
    for width in [1, 7, 16] {
        zeros(Device::best(), width);
    }
}

/// Rows of all sizes, each held to the reference by itself: 1e-15 to 1e15 as any other, beyond the root of what `f32` holds
/// zero, with gradients of zero, as the module says.
fn large_and_small(device: Device, width: usize) {
    let scales = [1e-15f32, 1e-4, 1.0, 1e4, 1e15, 1e25];
    let draw = &mut Draw::new(seeded().1);
    let mut values: Vec<f32> = draw.uniform(scales.len() * width, 0.5, 1.0);
    values.chunks_mut(width).zip(scales).for_each(|(row, scale)| row.iter_mut().for_each(|x| *x *= scale));
    let d_out: Vec<f32> = draw.uniform(values.len(), -1.0, 1.0);
    let shape = [scales.len(), width];
    let (view, d_view) = (View::new(&values[..], shape), View::new(&d_out[..], shape));
    let options = Options { eps: 1e-40, ..Options::default() };
    let inputs = Inputs { options, ..Inputs::<f32>::new(view) };
    let mut out = vec![7.0f32; values.len()];
    forward_to(device, &inputs, OutputMut::<f32, f32> { out: &mut out[..], residual_out: None });
    let inputs = BackwardInputs { options, ..BackwardInputs::<f32>::new(view, d_view) };
    let gradients = backward(device, &inputs);
    let exact = reference::forward(&Inputs { options, ..Inputs::<f32>::new(view) }).expect("valid");
    let exact_gradients = reference::backward(&inputs).expect("valid");
    for (row, scale) in scales.into_iter().enumerate() {
        let range = row * width..(row + 1) * width;
        let (out, d_x, what) =
            (&out[range.clone()], &gradients.x[range.clone()], format!("{scale:e} by {width}, {device:?}"));
        if scale < 1e20 {
            assert_close(out, &exact.out[range.clone()], FORWARD, &what);
            assert_close(d_x, &exact_gradients.x[range], GRADIENTS, &what);
        } else {
            assert!(out.iter().chain(d_x).all(|x| *x == 0.0), "{what}");
        }
    }
}

#[test]
fn rows_of_all_sizes() {
    for width in [7, 16, 100] {
        large_and_small(Device::best(), width);
    }
}

/// A million rows of one gradient: the sum over them loses no more than roundings that do not grow with their number.
#[test]
fn the_gradient_of_the_weight_of_many_rows() {
    let rows = 1 << 20;
    let ones = [1.0f32];
    let tenth = [0.1f32];
    let [view, d_view] = [&ones, &tenth].map(|data| View::new(&data[..], [rows, 4]).with_layout(0, [0, 0]));
    let options = Options { eps: 0.0, ..Options::default() };
    let mut weight = vec![0.0; 4];
    let gradients = GradientsMut { x: None, residual: None, weight: Some(&mut weight[..]), z: None };
    cpu::backward(&BackwardInputs { options, ..BackwardInputs::<f32>::new(view, d_view) }, gradients).expect("valid");
    for sum in weight {
        let exact = f64::from(0.1f32) * rows as f64;
        // Blocks of 64 rows in f32: 63 roundings of 2^-24 and the last.
        assert!((f64::from(sum) - exact).abs() <= 64.0 * 2f64.powi(-24) * exact, "{sum}");
    }
}
