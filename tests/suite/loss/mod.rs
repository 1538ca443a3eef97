//! The cross entropy: the fast path against the reference, the reference against finite differences, and rows that are left
//! out, sure, infinite or no numbers.

#[cfg(feature = "cuda")]
mod gpu;

use half::{bf16, f16};
use selective_scan::loss::{IGNORED, Inputs, InputsMut, Options, cpu, reference};
use selective_scan::{Element, Isa, View, ViewMut};

use crate::support::device::Device;
use crate::support::draw::{Draw, seeded};
use crate::support::tolerance::{assert_close, bits};

/// An f32 exponential within 2^-22, sums of at most 256 of them in a row, and one rounding of the loss.
const LOSSES: f64 = 1e-5;
/// A few roundings more, beside softmax and smoothed labels; where logits are near each other and labels are smoothed whole,
/// these cancel but for a twentieth.
const GRADIENTS: f64 = 5e-5;

/// Rows of logits as they lie in memory, with targets.
pub struct Case<T> {
    pub rows: usize,
    pub vocab: usize,
    pub data: Vec<T>,
    pub offset: usize,
    pub stride: usize,
    pub targets: Vec<u32>,
    pub options: Options,
    pub scale: f32,
}

impl<T: Element> Case<T> {
    fn draw(draw: &mut Draw, vocabs: &[usize]) -> Self {
        let (rows, vocab) = (draw.one_of(&[1, 2, 5, 33]), draw.one_of(vocabs));
        // Rows that start at any place beside a multiple of 16 bytes, with room between them or none.
        let (offset, stride) = (draw.one_of(&[0, 1, 3, 8]), vocab + draw.one_of(&[0, 0, 1, 8]));
        let size = draw.one_of(&[0.1, 3.0, 20.0]);
        let options = Options {
            label_smoothing: draw.one_of(&[0.0, 0.0, 0.1, 1.0]),
            z_loss: draw.one_of(&[0.0, 0.0, 1e-4, 0.3]),
        };
        let mut case = Self {
            rows,
            vocab,
            data: draw.uniform(offset + rows * stride, -size, size),
            offset,
            stride,
            targets: (0..rows).map(|_| draw.one_of(&(0..vocab as u32).collect::<Vec<_>>())).collect(),
            options,
            scale: draw.one_of(&[1.0, 1.0 / 512.0, 3.7]),
        };
        if draw.flag() {
            case.targets[rows / 2] = IGNORED;
        }
        // What lies between the rows must not be read: NaN would show.
        for (i, x) in case.data.iter_mut().enumerate() {
            if i < offset || (i - offset) % stride >= vocab {
                *x = T::from_f32(f32::NAN);
            }
        }
        case
    }

    /// Dense rows of these logits.
    fn of(rows: &[&[f32]], targets: &[u32]) -> Self {
        let data = rows.concat().into_iter().map(T::from_f32).collect();
        let (vocab, targets, options) = (rows[0].len(), targets.to_vec(), Options::default());
        Self { rows: rows.len(), vocab, data, offset: 0, stride: vocab, targets, options, scale: 1.0 }
    }

    fn inputs(&self) -> Inputs<'_, T> {
        let logits = View::new(&self.data, [self.rows, self.vocab]).with_layout(self.offset, [self.stride, 1]);
        Inputs { options: self.options, ..Inputs::new(logits, &self.targets) }
    }

    fn inputs_mut<'a>(&'a self, data: &'a mut [T]) -> InputsMut<'a, T> {
        let logits = ViewMut::new(data, [self.rows, self.vocab]).with_layout(self.offset, [self.stride, 1]);
        InputsMut { options: self.options, ..InputsMut::new(logits, &self.targets, self.scale) }
    }

    fn losses(&self, device: Device) -> Vec<f32> {
        let mut losses = vec![f32::NAN; self.rows];
        match device {
            Device::Cpu(isa) => cpu::losses_with(isa, &self.inputs(), &mut losses).expect("the case is valid"),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => gpu::losses(self, &mut losses),
        }
        losses
    }

    /// The losses, and all of the storage once the gradient is in it.
    fn losses_and_gradient(&self, device: Device) -> (Vec<f32>, Vec<T>) {
        let (mut losses, mut data) = (vec![f32::NAN; self.rows], self.data.clone());
        match device {
            Device::Cpu(isa) => {
                cpu::losses_and_gradient_with(isa, self.inputs_mut(&mut data), &mut losses).expect("the case is valid");
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => gpu::losses_and_gradient(self, &mut data, &mut losses),
        }
        (losses, data)
    }

    /// The elements of `data` that are in a row, and those that are not.
    fn split(&self, data: &[T]) -> (Vec<T>, Vec<T>) {
        let is_in_row = |i: usize| i >= self.offset && (i - self.offset) % self.stride < self.vocab;
        let part = |inside| (0..data.len()).filter(|&i| is_in_row(i) == inside).map(|i| data[i]).collect();
        (part(true), part(false))
    }
}

/// [`assert_close`] beside one more number, 2^-23 on both sides: what the reference cancels to 1e-15 is no error then. (Rows
/// that come to so little have a test of their own.)
#[track_caller]
fn assert_near<T: Element>(got: &[T], want: &[f64], tolerance: f64, what: &str) {
    let small = 2f64.powi(-23);
    let got: Vec<T> = got.iter().copied().chain([T::from_f32(small as f32)]).collect();
    let want: Vec<f64> = want.iter().copied().chain([small]).collect();
    assert_close(&got, &want, tolerance, what);
}

fn against_reference<T: Element>(device: &dyn Fn(&mut Draw) -> Device, seeds: std::ops::Range<u64>, vocabs: &[usize]) {
    let (_, seed) = seeded();
    for i in seeds {
        let draw = &mut Draw::new(seed.wrapping_add(i));
        let case = Case::<T>::draw(draw, vocabs);
        let device = device(draw);
        let (rows, vocab, options) = (case.rows, case.vocab, case.options);
        let what = format!("{device:?}, {:?}, {rows} x {vocab}, {options:?}, SEED={seed}", T::DTYPE);
        let exact = reference::losses(&case.inputs()).expect("the case is valid");
        let (losses, data) = case.losses_and_gradient(device);
        assert_near(&losses, &exact, LOSSES, &format!("losses, {what}"));
        assert_eq!(bits(&case.losses(device)), bits(&losses), "without a gradient, {what}");
        let exact = reference::gradient(&case.inputs(), case.scale.into()).expect("the case is valid");
        let (gradient, between) = case.split(&data);
        assert_near(&gradient, &exact, GRADIENTS, &format!("gradient, {what}"));
        assert_eq!(bits(&between), bits(&case.split(&case.data).1), "what lies between the rows, {what}");
    }
}

fn any_isa(draw: &mut Draw) -> Device {
    Device::Cpu(draw.isa())
}

/// Up to a vector, to a block and to the part whose sum is f32, a little less and a little more.
const VOCABS: [usize; 15] = [1, 2, 3, 7, 8, 15, 16, 17, 31, 100, 256, 1000, 1023, 1025, 3001];

#[test]
fn losses_and_gradients_are_those_of_the_reference() {
    against_reference::<f32>(&any_isa, 0..300, &VOCABS);
    against_reference::<f16>(&any_isa, 300..450, &VOCABS);
    against_reference::<bf16>(&any_isa, 450..600, &VOCABS);
}

/// Central differences of f64 with steps of 2^-8 between f32: the error is a sixth of the square of the step, 2.5e-6, times the
/// third derivative, which is below 1 for the likelihood and a few for the z-loss of 0.3.
#[test]
fn the_reference_has_the_slope_of_its_loss() {
    let (_, seed) = seeded();
    for i in 0..40 {
        let draw = &mut Draw::new(seed.wrapping_add(i));
        let mut case = Case::<f32>::draw(draw, &[1, 2, 5, 12]);
        case.data.iter_mut().for_each(|x| *x = x.clamp(-3.0, 3.0));
        let gradient = reference::gradient(&case.inputs(), case.scale.into()).expect("the case is valid");
        for _ in 0..10 {
            let row = draw.one_of(&(0..case.rows).collect::<Vec<_>>());
            let v = draw.one_of(&(0..case.vocab).collect::<Vec<_>>());
            let (at, step) = (case.offset + row * case.stride + v, 2f32.powi(-8));
            let x = case.data[at];
            let mut loss_at = |x: f32| {
                case.data[at] = x;
                reference::losses(&case.inputs()).expect("the case is valid")[row]
            };
            let difference = loss_at(x + step) - loss_at(x - step);
            case.data[at] = x;
            let slope = difference / (f64::from(x + step) - f64::from(x - step)) * f64::from(case.scale);
            let got = gradient[row * case.vocab + v];
            assert!((got - slope).abs() <= 2e-5 * f64::from(case.scale), "{got} for {slope}, SEED={seed}");
        }
    }
}

/// A model that is sure and right: the loss and the target's gradient are next to nothing, and keep their digits.
fn sure_rows_keep_their_digits(device: Device) {
    for margin in [1.0f32, 5.0, 10.0, 16.0, 25.0, 60.0] {
        for at in [0, 3, 30, 66] {
            let mut row: Vec<f32> = (0..67).map(|i| (i % 7) as f32 * 0.25 - 1.0).collect();
            row[at] = margin;
            let case = Case::<f32>::of(&[&row], &[at as u32]);
            // Written so that it does not cancel, in f64: what all others have beside the target.
            let others: f64 =
                row.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, x)| f64::from(x - margin).exp()).sum();
            let (losses, gradient) = case.losses_and_gradient(device);
            for (what, got, exact) in [
                ("loss", losses[0], others.ln_1p()),
                ("gradient", gradient[at], -others / (1.0 + others)),
                ("another's", gradient[(at + 1) % 67], f64::from(row[(at + 1) % 67] - margin).exp() / (1.0 + others)),
            ] {
                // Below the smallest normal number nothing is promised.
                let error = (f64::from(got) - exact).abs();
                assert!(error <= 1e-5 * exact.abs() + 1e-37, "{what}, {margin} at {at}: {got} for {exact}, {device:?}");
            }
        }
    }
}

/// Rows that no plain sum of exponentials takes, and those that nothing can be said of.
fn odd_rows(device: Device) {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let rows: [(&[f32; 4], u32, f32, [f32; 4]); 11] = [
        (&[3e38, -3e38, 0.0, 1.0], 0, 0.0, [0.0; 4]),
        (&[3e38, 3e38, -3e38, 1.0], 1, 2f32.ln(), [0.5, -0.5, 0.0, 0.0]),
        (&[0.0, 1000.0, 0.0, 0.0], 0, 1000.0, [-1.0, 1.0, 0.0, 0.0]),
        (&[-inf, 2.0, 2.0, -inf], 1, 2f32.ln(), [0.0, -0.5, 0.5, 0.0]),
        (&[-inf, 2.0, -inf, -inf], 0, inf, [-1.0, 1.0, 0.0, 0.0]),
        (&[-inf; 4], 2, nan, [nan; 4]),
        (&[1.0, inf, 1.0, 1.0], 0, nan, [nan; 4]),
        (&[1.0, nan, 1.0, 1.0], 0, nan, [nan; 4]),
        (&[nan, 1.0, 1.0, 1.0], 0, nan, [nan; 4]),
        // Left out, whatever is in it.
        (&[nan, inf, 1.0, 1.0], IGNORED, 0.0, [0.0; 4]),
        // None of the vocabulary.
        (&[1.0, 1.0, 1.0, 1.0], 4, nan, [nan; 4]),
    ];
    let same = |got: f32, wanted: f32| got == wanted || (got - wanted).abs() <= 1e-6 || got.is_nan() && wanted.is_nan();
    let logits: Vec<&[f32]> = rows.iter().map(|(row, ..)| &row[..]).collect();
    let case = Case::<f32>::of(&logits, &rows.map(|(_, target, ..)| target));
    let (losses, gradient) = case.losses_and_gradient(device);
    assert_eq!(bits(&losses), bits(&case.losses(device)), "{device:?}");
    for (i, (row, target, loss, gradients)) in rows.iter().enumerate() {
        let ours = &gradient[4 * i..4 * i + 4];
        assert!(same(losses[i], *loss), "{} for {loss}: {row:?}, target {target}, {device:?}", losses[i]);
        let all = ours.iter().zip(gradients).all(|(got, wanted)| same(*got, *wanted));
        // A softmax that is NaN leaves no element out but those that are infinitely small.
        let is_nan = gradients[0].is_nan() && ours.iter().any(|x| x.is_nan());
        assert!(all || is_nan, "{ours:?} for {gradients:?}: {row:?}, target {target}, {device:?}");
    }
}

#[test]
fn sure_rows_and_odd_rows() {
    for isa in Isa::available() {
        sure_rows_keep_their_digits(Device::Cpu(isa));
        odd_rows(Device::Cpu(isa));
    }
    // The largest f16, whose exponential no type has.
    let (losses, gradient) = Case::<f16>::of(&[&[65504.0, 0.0, 65504.0]], &[0]).losses_and_gradient(Device::best());
    assert!((losses[0] - 2f32.ln()).abs() < 1e-6);
    assert_eq!(gradient, [-0.5, 0.0, 0.5].map(f16::from_f32));
}

/// A row's results do not depend on the rows beside it, nor on the threads.
#[test]
fn rows_are_by_themselves() {
    let (_, seed) = seeded();
    let draw = &mut Draw::new(seed);
    let case = Case::<bf16>::draw(draw, &[100, 3001]);
    let (losses, data) = case.losses_and_gradient(Device::best());
    for (row, loss) in losses.iter().enumerate() {
        let start = case.offset + row * case.stride;
        let alone = Case {
            rows: 1,
            data: case.data[start..start + case.vocab].to_vec(),
            offset: 0,
            stride: case.vocab,
            targets: vec![case.targets[row]],
            ..case
        };
        let (loss_alone, gradient) = alone.losses_and_gradient(Device::best());
        assert_eq!(loss_alone[0].to_bits(), loss.to_bits(), "row {row}, SEED={seed}");
        assert_eq!(bits(&gradient), bits(&data[start..start + case.vocab]), "row {row}, SEED={seed}");
    }
}

#[test]
fn bad_arguments_are_named() {
    let (logits, four) = ([0f32; 12], [0u32; 4]);
    let view = || View::new(&logits, [3, 4]);
    let inputs = Inputs::new(view(), &[0u32; 3]);
    let option = |label_smoothing, z_loss| Options { label_smoothing, z_loss };
    for (inputs, message) in [
        (Inputs { targets: &four[..], ..inputs }, "`targets`: expected (rows) = [3] elements, got 4 elements"),
        (Inputs { logits: View::new(&logits, [3, 0]), ..inputs }, "`logits`: expected from 1 to 2147483647 logits"),
        (
            Inputs { logits: view().with_layout(0, [1, 3]), ..inputs },
            "`logits`: expected logits of a row that are neigh",
        ),
        (
            Inputs { logits: view().with_layout(1, [4, 1]), ..inputs },
            "`logits`: expected a storage that holds offset 1",
        ),
        (Inputs { options: option(1.5, 0.0), ..inputs }, "`label_smoothing`: expected a number from 0 to 1, got 1.5"),
        (Inputs { options: option(f32::NAN, 0.0), ..inputs }, "`label_smoothing`: expected a number from 0 to 1, got"),
        (Inputs { options: option(0.0, -1.0), ..inputs }, "`z_loss`: expected a finite number of 0 or more, got -1"),
        (Inputs { options: option(0.0, f32::INFINITY), ..inputs }, "`z_loss`: expected a finite number of 0 or more"),
    ] {
        let error = inputs.losses().expect_err(message).to_string();
        assert!(error.starts_with(message), "{error} for {message}");
    }
    let error = cpu::losses(&inputs, &mut [0.0; 2]).expect_err("three rows").to_string();
    assert_eq!(error, "`losses`: expected (rows) = [3] elements, got 2 elements");

    let mut written = [1f32; 12];
    let overlapping = ViewMut::new(&mut written, [3, 4]).with_layout(0, [2, 1]);
    let error = InputsMut::new(overlapping, &[0; 3], 1.0).losses_and_gradient().expect_err("they overlap").to_string();
    assert!(error.starts_with("`logits`: expected strides that give every element a place of its own"), "{error}");
    let error = InputsMut::new(ViewMut::new(&mut written, [3, 4]), &[0; 3], f32::NAN).losses_and_gradient();
    assert_eq!(error.expect_err("no number").to_string(), "`scale`: expected a finite number, got NaN");
    assert_eq!(written, [1.0; 12]);
    // To be read, rows may lie upon each other, and there may be none.
    let once = Inputs::new(View::new(&logits[..4], [3, 4]).with_layout(0, [0, 1]), &[0; 3]);
    assert_eq!(once.losses().expect("valid"), [4f32.ln(); 3]);
    assert!(Inputs::new(View::new(&logits, [0, 4]), &[]).losses().expect("valid").is_empty());
}
