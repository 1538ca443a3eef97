//! The operators of a decoding step: each against its reference and against the operators that it joins.

mod arguments;
#[cfg(feature = "cuda")]
mod gpu;
mod linear;
mod update;
mod wild;

use selective_scan::decode::{Linear, LinearMut, SelectiveUpdate, SelectiveUpdateMut, cpu};
use selective_scan::{DType, Element, Slots, View, ViewMut, conv, state_update};

use crate::support::device::Device;
use crate::support::draw::Draw;
use crate::support::strided::{Layout, Strided};

/// Half of what lies between 1 and the next number of a type: rounding is within this beside what is rounded.
fn unit<T: Element>() -> f64 {
    match T::DTYPE {
        DType::F16 => f64::exp2(-11.0),
        DType::Bf16 => f64::exp2(-8.0),
        _ => f64::exp2(-24.0),
    }
}

/// What rounding `x`, which is only known within `error`, to `T` makes of that. (Subnormal numbers of `f16` are 2^-24 apart.)
fn rounded<T: Element>(x: f64, error: f64) -> f64 {
    error + unit::<T>() * (x.abs() + error) + if T::DTYPE == DType::F16 { f64::exp2(-25.0) } else { 0.0 }
}

/// The most that a sum of so many products of size 1 altogether, of factors that were rounded in `f32` at most twice, is off,
/// in whatever order it is taken: a rounding for each of them.
fn sum_error(terms: usize) -> f64 {
    (terms + 8) as f64 * f64::exp2(-24.0)
}

/// Asserts that each element is within its own bound.
#[track_caller]
fn assert_each<T: Element>(got: &[T], want: &[f64], allowed: &[f64], what: &str) {
    assert_eq!([got.len(), want.len()], [allowed.len(); 2], "{what}: the number of elements");
    for (i, ((got, want), allowed)) in got.iter().zip(want).zip(allowed).enumerate() {
        let error = (f64::from(got.to_f32()) - want).abs();
        assert!(error <= *allowed, "{what}: element {i} is {got:?} for {want}, off by {error:e} and not {allowed:e}");
    }
}

/// A tensor of one batch row as a matrix.
fn matrix<T: Element>(tensor: &Strided<T>) -> View<'_, T, 2> {
    let view = tensor.view();
    let ([_, rows, width], [_, row, column]) = (view.shape, view.strides);
    View { data: view.data, offset: view.offset, shape: [rows, width], strides: [row, column] }
}

/// A matrix of numbers up to `most`, dense or a slice of something wider, by rows or by columns.
fn tensor<T: Element>(draw: &mut Draw, [rows, columns]: [usize; 2], most: f32) -> Strided<T> {
    let layout = Layout { time_contiguous: draw.one_of(&[false, false, true]), column_slice: draw.flag() };
    let mut values = draw.uniform::<f32>(rows * columns, -most, most).into_iter();
    Strided::new([1, rows, columns], layout, || values.next().expect("as many"))
}

/// A size up to `most`: any, or a multiple of something.
fn size(draw: &mut Draw, most: usize) -> usize {
    let any = draw.one_of(&(1..=most).collect::<Vec<_>>());
    match draw.one_of(&[1, 1, 1, 8, 16, 32, 64]) {
        step if step <= most => (any.next_multiple_of(step)).min(most / step * step),
        _ => any,
    }
}

/// Few rows or many.
fn count_rows(draw: &mut Draw, most: usize) -> usize {
    let few = draw.one_of(&[1, 2, 3, 4, 5, 6, 7, 8, 9]);
    if draw.flag() { few.min(most) } else { draw.one_of(&(1..=most).collect::<Vec<_>>()) }
}

/// A pool of states, and the slots of some rows in it.
#[derive(Debug, Clone)]
struct Pool<St> {
    data: Vec<St>,
    offset: usize,
    shape: [usize; 3],
    strides: [usize; 3],
    /// Every third row is padding; else row `i` has slot `i`.
    slots: Option<Vec<i32>>,
}

impl<St: Element> Pool<St> {
    fn draw(draw: &mut Draw, rows: usize, [m, n]: [usize; 2]) -> Self {
        let slots = draw.flag().then(|| {
            // Multiplying by a prime that does not divide their count permutes the slots.
            let count = rows + 3;
            let step = [7, 11, 13].into_iter().find(|step| !count.is_multiple_of(*step)).expect("fewer than 1,001");
            let slot = |row: usize| ((row * step + 2) % count) as i32;
            (0..rows).map(|row| if row % 3 == 1 { -1 - row as i32 } else { slot(row) }).collect::<Vec<_>>()
        });
        let count = slots.as_ref().map_or(rows, |slots: &Vec<i32>| slots.len() + 3);
        let offset = draw.one_of(&[0, 4, 6]);
        // Dense, with room after rows and states, and the other way round in memory. Distances are even, so that 16-bit
        // states of different blocks do not share a word.
        let strides = match draw.one_of(&[0, 1, 2]) {
            0 => [m * n, n, 1],
            1 => [m * (n + 4) + 8, n + 4, 1],
            _ => [m * n, 1, m],
        };
        let data = draw.uniform(offset + count * strides[0], -1.0, 1.0);
        Self { data, offset, shape: [count, m, n], strides, slots }
    }

    fn slots(&self) -> Slots<'_> {
        self.slots.as_deref().into()
    }

    fn slot(&self, row: usize) -> Option<usize> {
        self.slots.as_ref().map_or(Some(row), |slots| usize::try_from(slots[row]).ok())
    }

    fn view(&self) -> View<'_, St, 3> {
        View::new(&self.data[..], self.shape).with_layout(self.offset, self.strides)
    }

    fn view_mut<'p>(&self, data: &'p mut [St]) -> ViewMut<'p, St, 3> {
        ViewMut::new(data, self.shape).with_layout(self.offset, self.strides)
    }

    fn index(&self, index: [usize; 3]) -> usize {
        self.offset + index.iter().zip(self.strides).map(|(i, stride)| i * stride).sum::<usize>()
    }

    /// The same pool for one of its rows.
    fn of_row(&self, row: usize) -> Self {
        let slot = self.slots.as_ref().map_or(row as i32, |slots| slots[row]);
        Self { slots: Some(vec![slot]), ..self.clone() }
    }

    /// The elements of the storage that belong to a slot of some row.
    fn is_touched(&self) -> Vec<bool> {
        let mut touched = vec![false; self.data.len()];
        let rows = self.slots.as_ref().map_or(self.shape[0], Vec::len);
        for slot in (0..rows).filter_map(|row| self.slot(row)) {
            for i in 0..self.shape[1] * self.shape[2] {
                touched[self.index([slot, i / self.shape[2], i % self.shape[2]])] = true;
            }
        }
        touched
    }
}

/// Runs a product that is valid.
fn run_linear<X: Element, T: Element, O: Element, St: Element>(
    device: Device,
    inputs: &Linear<X, T>,
    outputs: LinearMut<O, St>,
) {
    match device {
        Device::Cpu(isa) => cpu::linear_with(isa, inputs, outputs).expect("the case is valid"),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => gpu::linear(inputs, outputs),
    }
}

/// Runs a selective update that is valid.
fn run_update<T: Element, St: Element>(
    device: Device,
    inputs: &SelectiveUpdate<T>,
    outputs: SelectiveUpdateMut<T, St>,
) {
    match device {
        Device::Cpu(isa) => cpu::selective_update_with(isa, inputs, outputs).expect("the case is valid"),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => gpu::selective_update(inputs, outputs),
    }
}

/// The step of the convolution that a product is joined with.
fn run_conv<T: Element, St: Element>(device: Device, inputs: &conv::UpdateInputs<T>, outputs: conv::UpdateMut<T, St>) {
    match device {
        Device::Cpu(isa) => conv::cpu::update_with(isa, inputs, outputs).expect("the case is valid"),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => crate::conv::gpu::update(inputs, outputs),
    }
}

/// The state update that the projection of the step sizes is joined with.
fn run_state_update<T: Element, St: Element>(
    device: Device,
    inputs: &state_update::Inputs<T>,
    outputs: state_update::UpdateMut<T, St>,
) {
    match device {
        Device::Cpu(isa) => state_update::cpu::update_with(isa, inputs, outputs).expect("the case is valid"),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => crate::state_update::gpu::update(inputs, outputs),
    }
}

/// Calls a test, which is generic over the types of the rows, the matrix, the output and the states, with all that there are.
macro_rules! all_types {
    ($test:ident($($argument:expr),*)) => {
        $test::<f32, f32, f32>($($argument),*);
        $test::<f16, f16, f16>($($argument),*);
        $test::<f16, f16, f32>($($argument),*);
        $test::<f32, f16, f16>($($argument),*);
        $test::<f32, f16, f32>($($argument),*);
        $test::<bf16, bf16, bf16>($($argument),*);
        $test::<bf16, bf16, f32>($($argument),*);
        $test::<f32, bf16, bf16>($($argument),*);
        $test::<f32, bf16, f32>($($argument),*);
    };
}

use all_types;

fn cpu_device(draw: &mut Draw) -> Device {
    Device::Cpu(draw.isa())
}
