//! Products of few rows.

use half::{bf16, f16};
use selective_scan::decode::{ConvStep, Linear, LinearMut, RowNorm, reference};
use selective_scan::{Element, Isa, View, conv, norm};

use super::{Pool, all_types, assert_each, cpu_device, matrix, rounded, run_conv, run_linear, sum_error, tensor, unit};
use crate::support::device::Device;
use crate::support::draw::{Draw, seeded};
use crate::support::strided::Strided;
use crate::support::tolerance::bits;

/// What a product reads, and what its output has before.
#[derive(Debug, Clone)]
pub(super) struct Case<X, T, O, St> {
    pub(super) x: Strided<X>,
    pub(super) weight: Strided<T>,
    pub(super) bias: Option<Vec<f32>>,
    pub(super) norm: Option<Norm>,
    pub(super) conv: Option<Conv<St>>,
    pub(super) before: Vec<O>,
    pub(super) accumulate: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Norm {
    pub(super) weight: Option<Vec<f32>>,
    pub(super) eps: f64,
}

#[derive(Debug, Clone)]
pub(super) struct Conv<St> {
    pub(super) weight: Vec<f32>,
    pub(super) bias: Option<Vec<f32>>,
    pub(super) pool: Pool<St>,
}

impl<X: Element, T: Element, O: Element, St: Element> Case<X, T, O, St> {
    /// A case without a convolution.
    fn plain(draw: &mut Draw, [rows, features, columns]: [usize; 3]) -> Self {
        let norm = |draw: &mut Draw| Norm {
            weight: draw.flag().then(|| draw.uniform(features, -1.5, 1.5)),
            eps: draw.one_of(&[1e-6f32, 1e-5, 0.1]).into(),
        };
        Self {
            x: tensor(draw, [rows, features], 2.0),
            weight: tensor(draw, [columns, features], 1.0),
            bias: draw.flag().then(|| draw.uniform(columns, -1.0, 1.0)),
            norm: draw.flag().then(|| norm(draw)),
            conv: None,
            before: draw.uniform(rows * columns, -1.0, 1.0),
            accumulate: draw.flag(),
        }
    }

    /// A case with a convolution of the first `d_inner` columns, which may be all.
    fn convolved(draw: &mut Draw, size: [usize; 3], d_inner: usize) -> Self {
        let width = draw.one_of(&conv::WIDTHS.collect::<Vec<_>>());
        let conv = Conv {
            weight: draw.uniform(d_inner * width, -1.0, 1.0),
            bias: draw.flag().then(|| draw.uniform(d_inner, -1.0, 1.0)),
            pool: Pool::draw(draw, size[0], [width - 1, d_inner]),
        };
        Self { conv: Some(conv), accumulate: false, ..Self::plain(draw, size) }
    }

    fn draw(draw: &mut Draw, rows: usize) -> Self {
        let size = [super::count_rows(draw, rows), super::size(draw, 600), super::size(draw, 200)];
        if O::DTYPE != T::DTYPE || draw.flag() {
            return Self::plain(draw, size);
        }
        let d_inner = if draw.flag() { size[2] } else { super::size(draw, size[2]) };
        Self::convolved(draw, size, d_inner)
    }

    /// Rows, features, columns.
    fn size(&self) -> [usize; 3] {
        [self.x.shape[1], self.x.shape[2], self.weight.shape[1]]
    }

    fn d_inner(&self) -> usize {
        self.conv.as_ref().map_or(0, |conv| conv.pool.shape[2])
    }

    pub(super) fn inputs(&self) -> Linear<'_, X, T> {
        Linear {
            bias: self.bias.as_ref().map(|bias| View::new(&bias[..], [bias.len()])),
            norm: self.norm.as_ref().map(|norm| RowNorm {
                weight: norm.weight.as_ref().map(|weight| View::new(&weight[..], [weight.len()])),
                eps: norm.eps,
            }),
            conv: self.conv.as_ref().map(|conv| {
                let [_, before, d_inner] = conv.pool.shape;
                ConvStep {
                    weight: View::new(&conv.weight[..], [d_inner, before + 1]),
                    bias: conv.bias.as_ref().map(|bias| View::new(&bias[..], [d_inner])),
                    slots: conv.pool.slots(),
                }
            }),
            ..Linear::new(matrix(&self.x), matrix(&self.weight))
        }
    }

    /// The output, and the pool's storage afterwards.
    fn run(&self, device: Device) -> (Vec<O>, Vec<St>) {
        let mut out = self.before.clone();
        let mut pool = self.conv.as_ref().map_or(Vec::new(), |conv| conv.pool.data.clone());
        let conv_state = self.conv.as_ref().map(|conv| conv.pool.view_mut(&mut pool));
        run_linear(device, &self.inputs(), LinearMut { out: &mut out[..], accumulate: self.accumulate, conv_state });
        (out, pool)
    }

    /// The row `row` as a case of its own.
    fn of_row(&self, row: usize) -> Self {
        let columns = self.size()[2];
        Self {
            x: self.x.steps(row..row + 1),
            before: self.before[row * columns..(row + 1) * columns].to_vec(),
            conv: self.conv.as_ref().map(|conv| Conv { pool: conv.pool.of_row(row), ..conv.clone() }),
            ..self.clone()
        }
    }

    /// What stands in the output after this much: the exact results, and how far each may be off.
    fn expected(&self) -> (Vec<f64>, Vec<f64>) {
        let inputs = self.inputs();
        let state = self.conv.as_ref().map(|conv| conv.pool.view());
        let (mut want, inputs_of_conv) = reference::linear(&inputs, state).expect("the case is valid");
        let [rows, features, columns] = self.size();
        let mut allowed = vec![0.0; want.len()];
        for row in 0..rows {
            let sizes = self.term_sizes(row);
            for (column, size) in sizes.into_iter().enumerate() {
                let at = row * columns + column;
                // What is normed is rounded before the product, and sums itself up first.
                let normed = if self.norm.is_some() { sum_error(features) } else { 0.0 };
                let narrowed = if self.norm.is_some() || X::DTYPE != T::DTYPE { unit::<T>() } else { 0.0 };
                let error = (sum_error(features) + normed + narrowed) * size;
                let in_conv = column < self.d_inner();
                let product = if in_conv { inputs_of_conv[row * self.d_inner() + column] } else { want[at] };
                let error = if in_conv { rounded::<T>(product, error) } else { error };
                allowed[at] = if in_conv { self.conv_error(row, column, product, error, want[at]) } else { error };
                if self.accumulate {
                    want[at] += f64::from(self.before[at].to_f32());
                    allowed[at] += sum_error(1) * want[at].abs();
                }
                if !in_conv {
                    allowed[at] = rounded::<O>(want[at], allowed[at]);
                }
            }
        }
        (want, allowed)
    }

    /// Within the bounds of the reference.
    fn check(&self, device: Device, seed: u64) {
        let types = (X::DTYPE, T::DTYPE, O::DTYPE, St::DTYPE);
        let what = format!("{:?}, {types:?}, d_inner {}, {device:?}, seed {seed}", self.size(), self.d_inner());
        let (out, _) = self.run(device);
        let (want, allowed) = self.expected();
        assert_each(&out, &want, &allowed, &what);
    }

    /// The sum of the sizes of the terms of each column.
    fn term_sizes(&self, row: usize) -> Vec<f64> {
        let (inputs, [_, features, columns]) = (self.inputs(), self.size());
        let at = |i: usize| {
            f64::from(inputs.x.data[inputs.x.offset + row * inputs.x.strides[0] + i * inputs.x.strides[1]].to_f32())
        };
        let mut x: Vec<f64> = (0..features).map(|i| at(i).abs()).collect();
        if let Some(norm) = &self.norm {
            let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / features as f64 + norm.eps).sqrt();
            for (i, x) in x.iter_mut().enumerate() {
                *x *= scale * norm.weight.as_ref().map_or(1.0, |weight| f64::from(weight[i].abs()));
            }
        }
        let weight = matrix(&self.weight);
        let weight = |column: usize, i: usize| {
            f64::from(weight.data[weight.offset + column * weight.strides[0] + i * weight.strides[1]].to_f32()).abs()
        };
        let bias = |column: usize| self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[column].abs()));
        (0..columns)
            .map(|column| bias(column) + x.iter().enumerate().map(|(i, x)| x * weight(column, i)).sum::<f64>())
            .collect()
    }

    /// How far an output of the convolution may be off whose input is off by `error`. The slope of SiLU is below 1.1.
    fn conv_error(&self, row: usize, channel: usize, input: f64, error: f64, want: f64) -> f64 {
        let conv = self.conv.as_ref().expect("it has one");
        let Some(slot) = conv.pool.slot(row) else { return 0.0 };
        let width = conv.pool.shape[1] + 1;
        let weight = |k: usize| f64::from(conv.weight[channel * width + k].abs());
        let state = |k: usize| f64::from(conv.pool.data[conv.pool.index([slot, k, channel])].to_f32().abs());
        let terms: f64 = (0..width - 1).map(|k| weight(k) * state(k)).sum::<f64>() + weight(width - 1) * input.abs();
        let bias = conv.bias.as_ref().map_or(0.0, |bias| f64::from(bias[channel].abs()));
        let error = 1.1 * (weight(width - 1) * error + sum_error(width + 1) * (terms + bias + error));
        // SiLU itself is within 2^-20.
        rounded::<T>(want, error + want.abs() * f64::exp2(-20.0))
    }
}

pub(super) fn against_reference<X: Element, T: Element, O: Element, St: Element>(
    device: &dyn Fn(&mut Draw) -> Device,
    rounds: usize,
    rows: usize,
) {
    for _ in 0..rounds {
        let (_, seed) = seeded();
        let draw = &mut Draw::new(seed);
        let device = device(draw);
        Case::<X, T, O, St>::draw(draw, rows).check(device, seed);
    }
}

/// A product of these rows, features and columns, with a dense matrix.
pub(super) fn of_size<X: Element, T: Element, O: Element>(device: &dyn Fn(&mut Draw) -> Device, size: [usize; 3]) {
    let (_, seed) = seeded();
    let draw = &mut Draw::new(seed);
    let device = device(draw);
    let case = Case::<X, T, O, f32>::plain(draw, size);
    Case { weight: case.weight.dense(), ..case }.check(device, seed);
}

/// The same of rows that are normed.
pub(super) fn normed_of_size<X: Element, T: Element, O: Element>(
    device: &dyn Fn(&mut Draw) -> Device,
    size: [usize; 3],
) {
    let (_, seed) = seeded();
    let draw = &mut Draw::new(seed);
    let device = device(draw);
    let case = loop {
        let case = Case::<X, T, O, f32>::plain(draw, size);
        if case.norm.is_some() {
            break case;
        }
    };
    Case { weight: case.weight.dense(), ..case }.check(device, seed);
}

fn with_f32_states<X: Element, T: Element, O: Element>() {
    against_reference::<X, T, O, f32>(&cpu_device, 12, 70);
}

fn with_half_states<X: Element, T: Element, O: Element>() {
    against_reference::<X, T, O, f16>(&cpu_device, 4, 20);
    against_reference::<X, T, O, bf16>(&cpu_device, 4, 20);
}

#[test]
fn as_the_reference() {
    all_types!(with_f32_states());
    all_types!(with_half_states());
}

/// Rows of more features than a processor's cache holds of several.
#[test]
fn many_features() {
    of_size::<f32, f32, f32>(&cpu_device, [3, 3001, 20]);
    of_size::<f32, bf16, bf16>(&cpu_device, [5, 9000, 7]);
    normed_of_size::<f32, bf16, bf16>(&cpu_device, [5, 9000, 40]);
}

/// A row by itself, in whatever company, and again.
pub(super) fn rows_do_not_depend_on_each_other<X: Element, T: Element, O: Element>(
    device: &dyn Fn(&mut Draw) -> Device,
    rounds: usize,
    rows: usize,
) {
    for _ in 0..rounds {
        let (_, seed) = seeded();
        let draw = &mut Draw::new(seed);
        let device = device(draw);
        let case = Case::<X, T, O, f16>::draw(draw, rows);
        let [rows, _, columns] = case.size();
        let (out, pool) = case.run(device);
        let (again, pool_again) = case.run(device);
        assert_eq!([bits(&out), bits(&pool)], [bits(&again), bits(&pool_again)], "again, seed {seed}");
        for row in 0..rows {
            let alone = case.of_row(row);
            let (alone_out, alone_pool) = alone.run(device);
            let what = format!("row {row} of {:?}, {device:?}, seed {seed}", case.size());
            assert_eq!(bits(&alone_out), bits(&out[row * columns..(row + 1) * columns]), "{what}");
            let Some(conv) = &alone.conv else { continue };
            for ((touched, alone), all) in conv.pool.is_touched().into_iter().zip(&alone_pool).zip(&pool) {
                assert!(!touched || alone.to_f32().to_bits() == all.to_f32().to_bits(), "{what}: the state");
            }
        }
    }
}

fn alone_and_in_company<X: Element, T: Element, O: Element>() {
    rows_do_not_depend_on_each_other::<X, T, O>(&cpu_device, 4, 14);
}

#[test]
fn a_row_alone_and_among_others() {
    all_types!(alone_and_in_company());
}

/// Tensors with any strides have the bits of dense ones.
pub(super) fn strides_change_no_bits<X: Element, T: Element, O: Element>(device: Device, rows: usize) {
    for _ in 0..4 {
        let (_, seed) = seeded();
        let case = Case::<X, T, O, f32>::draw(&mut Draw::new(seed), rows);
        let dense = Case { x: case.x.dense(), weight: case.weight.dense(), ..case.clone() };
        assert_eq!(bits(&case.run(device).0), bits(&dense.run(device).0), "{:?}, {device:?}, seed {seed}", case.size());
    }
}

#[test]
fn any_strides() {
    for isa in Isa::available() {
        all_types!(strides_change_no_bits(Device::Cpu(isa), 9));
    }
}

/// Products that several threads share.
#[test]
fn threads_change_no_bits() {
    let (_, seed) = seeded();
    let draw = &mut Draw::new(seed);
    for size in [[1, 601, 1030], [6, 200, 1001], [70, 64, 203]] {
        let case = Case::<f32, f32, f32, f32>::convolved(draw, size, 203);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            let (out, states) = pool.install(|| case.run(Device::best()));
            (bits(&out), bits(&states))
        };
        let one = run(1);
        assert!([2, 3].into_iter().all(|threads| run(threads) == one), "{size:?}, seed {seed}");
        let (want, allowed) = case.expected();
        assert_each(&case.run(Device::best()).0, &want, &allowed, &format!("{size:?}, seed {seed}"));
    }
}

/// With a convolution the results are those of the product, rounded, that then goes through a step of the convolution; the
/// states are the window shifted by that input, and no other place of the pool is touched.
pub(super) fn the_convolution_is_a_step<X: Element, T: Element, St: Element>(
    device: &dyn Fn(&mut Draw) -> Device,
    rounds: usize,
    rows: usize,
) {
    for _ in 0..rounds {
        let (_, seed) = seeded();
        let draw = &mut Draw::new(seed);
        let device = device(draw);
        let size = [super::count_rows(draw, rows), super::size(draw, 100), super::size(draw, 300)];
        let d_inner = if draw.flag() { size[2] } else { super::size(draw, size[2]) };
        let case = Case::<X, T, T, St>::convolved(draw, size, d_inner);
        let [rows, _, columns] = size;
        let what =
            format!("{size:?}, d_inner {d_inner}, {:?}, {device:?}, seed {seed}", (X::DTYPE, T::DTYPE, St::DTYPE));
        let conv = case.conv.as_ref().expect("it has one");
        let (out, pool) = case.run(device);
        let (product, _) = Case { conv: None, ..case.clone() }.run(device);

        let x = View::new(&product[..], [rows, 1, d_inner]).with_layout(0, [columns, 0, 1]);
        let step = case.inputs().conv.expect("it has one");
        let (mut convolved, mut stepped) = (vec![T::from_f32(7.0); rows * d_inner], conv.pool.data.clone());
        let outputs = conv::UpdateMut::new(conv.pool.view_mut(&mut stepped), &mut convolved[..]);
        let inputs = conv::UpdateInputs {
            bias: step.bias,
            slots: step.slots,
            silu: true,
            ..conv::UpdateInputs::new(x, step.weight)
        };
        run_conv(device, &inputs, outputs);
        for row in 0..rows {
            let (out, product) = (&out[row * columns..][..columns], &product[row * columns..][..columns]);
            assert_eq!(bits(&out[..d_inner]), bits(&convolved[row * d_inner..][..d_inner]), "{what}: row {row}");
            assert_eq!(bits(&out[d_inner..]), bits(&product[d_inner..]), "{what}: row {row}, the other columns");
            let Some(slot) = conv.pool.slot(row) else {
                assert!(out[..d_inner].iter().all(|x| x.to_f32().to_bits() == 0), "{what}: row {row} is padding");
                continue;
            };
            for (channel, input) in product[..d_inner].iter().enumerate() {
                let at = |k: usize| conv.pool.index([slot, k, channel]);
                let newest = conv.pool.shape[1] - 1;
                for k in 0..newest {
                    let (is, was) = (pool[at(k)].to_f32(), conv.pool.data[at(k + 1)].to_f32());
                    assert_eq!(is.to_bits(), was.to_bits(), "{what}: row {row}, channel {channel}");
                }
                let (is, input) = (pool[at(newest)].to_f32(), St::from_f32(input.to_f32()).to_f32());
                assert_eq!(is.to_bits(), input.to_bits(), "{what}: row {row}, channel {channel}, the input");
            }
        }
        assert_eq!(bits(&pool), bits(&stepped), "{what}: the pool");
        for ((touched, is), was) in conv.pool.is_touched().into_iter().zip(&pool).zip(&conv.pool.data) {
            assert!(touched || is.to_f32().to_bits() == was.to_f32().to_bits(), "{what}: another state");
        }
    }
}

#[test]
fn a_convolution_is_its_step_after_the_product() {
    the_convolution_is_a_step::<f32, f32, f32>(&cpu_device, 20, 20);
    the_convolution_is_a_step::<f32, f32, bf16>(&cpu_device, 10, 20);
    the_convolution_is_a_step::<bf16, bf16, f32>(&cpu_device, 10, 20);
    the_convolution_is_a_step::<f32, bf16, f16>(&cpu_device, 10, 20);
    the_convolution_is_a_step::<f16, f16, f16>(&cpu_device, 10, 20);
}

/// On processors a norm is the operator's, rounded.
#[test]
fn a_norm_is_the_norm_before_the_product() {
    fn check<X: Element, T: Element>() {
        for _ in 0..10 {
            let (_, seed) = seeded();
            let draw = &mut Draw::new(seed);
            let device = cpu_device(draw);
            let mut case = Case::<X, T, T, f32>::draw(draw, 9);
            case.norm.get_or_insert(Norm { weight: None, eps: 1e-5 });
            let (inputs, [rows, features, _]) = (case.inputs(), case.size());
            let by = inputs.norm.expect("it has one");
            let options = norm::Options { eps: by.eps, ..Default::default() };
            let normed: norm::Output<X, T> =
                norm::Inputs { weight: by.weight, options, ..norm::Inputs::new(inputs.x) }.forward().expect("valid");
            let mut values = normed.out.iter().map(|x| x.to_f32());
            let x = Strided::new([1, rows, features], Default::default(), || values.next().expect("as many"));
            let after = Case::<T, T, T, f32> {
                x,
                weight: case.weight.clone(),
                bias: case.bias.clone(),
                norm: None,
                conv: case.conv.clone(),
                before: case.before.clone(),
                accumulate: case.accumulate,
            };
            assert_eq!(bits(&case.run(device).0), bits(&after.run(device).0), "{device:?}, seed {seed}");
        }
    }
    check::<f32, f32>();
    check::<f16, f16>();
    check::<f32, bf16>();
}

/// A product that is added has the bits of the product alone, in `f32`, added and rounded once.
pub(super) fn added<X: Element, T: Element, O: Element>(
    device: &dyn Fn(&mut Draw) -> Device,
    rounds: usize,
    rows: usize,
) {
    for _ in 0..rounds {
        let (_, seed) = seeded();
        let draw = &mut Draw::new(seed);
        let device = device(draw);
        let size = [super::count_rows(draw, rows), super::size(draw, 100), super::size(draw, 100)];
        let case = Case { accumulate: true, ..Case::<X, T, O, f32>::plain(draw, size) };
        let Case { x, weight, bias, norm, .. } = case.clone();
        let before = vec![0.0; case.before.len()];
        let (product, _) =
            Case::<X, T, f32, f32> { x, weight, bias, norm, conv: None, before, accumulate: false }.run(device);
        let sums = case.before.iter().zip(&product).map(|(x, y)| O::from_f32(x.to_f32() + y));
        assert_eq!(bits(&case.run(device).0), bits(&sums.collect::<Vec<_>>()), "{size:?}, {device:?}, seed {seed}");
    }
}

fn added_on_cpu<X: Element, T: Element, O: Element>() {
    added::<X, T, O>(&cpu_device, 4, 9);
}

#[test]
fn what_is_added_is_the_product_rounded_once() {
    all_types!(added_on_cpu());
}

/// What is not finite in a row of `x`, and in a state, stays there.
pub(super) fn what_is_not_finite_stays(device: &dyn Fn(&mut Draw) -> Device, rounds: usize) {
    for _ in 0..rounds {
        let (_, seed) = seeded();
        let draw = &mut Draw::new(seed);
        let device = device(draw);
        let size = [super::size(draw, 9), super::size(draw, 70), super::size(draw, 40)];
        let case = Case::<f32, bf16, bf16, f32>::convolved(draw, size, size[2]);
        let [rows, features, columns] = size;
        let (row, feature) =
            (draw.one_of(&(0..rows).collect::<Vec<_>>()), draw.one_of(&(0..features).collect::<Vec<_>>()));
        let value = draw.one_of(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
        let mut other = case.clone();
        other.x.set([0, row, feature], value);
        let ((out, _), (other, _)) = (case.run(device), other.run(device));
        let what = format!("{value} in row {row} of {size:?}, {device:?}, seed {seed}");
        for i in (0..rows).filter(|&i| i != row) {
            let range = i * columns..(i + 1) * columns;
            assert_eq!(bits(&other[range.clone()]), bits(&out[range]), "{what}: row {i}");
        }
        let plain = Case { conv: None, norm: None, ..case.clone() };
        let mut plain_other = plain.clone();
        plain_other.x.set([0, row, feature], value);
        let (out, _) = plain_other.run(device);
        assert!(out[row * columns..][..columns].iter().all(|x| !x.to_f32().is_finite()), "{what}: it is seen");
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    what_is_not_finite_stays(&cpu_device, 30);
}

/// Nothing to do, for one reason or another.
#[test]
fn no_rows_and_no_columns() {
    for (rows, columns) in [(0, 5), (3, 0), (0, 0)] {
        let (x, weight) = (vec![1.0f32; rows * 4], vec![1.0f32; columns * 4]);
        let inputs = Linear::new(View::new(&x[..], [rows, 4]), View::new(&weight[..], [columns, 4]));
        run_linear(Device::best(), &inputs, LinearMut::new(&mut [0.0f32; 0][..]));
    }
}
