//! The cross entropy on a GPU, or on a simulated one.

use cudarc::driver::CudaSlice;
use half::{bf16, f16};
use selective_scan::loss::{Inputs, InputsMut, cuda};
use selective_scan::scan::cuda::Plan;
use selective_scan::{Element, ViewMut};

use super::{Case, against_reference, odd_rows, sure_rows_keep_their_digits};
use crate::support::device::Device;
use crate::support::draw::Draw;
use crate::support::gpu::{Copies, stream};
use crate::support::tolerance::bits;

fn targets<T>(case: &Case<T>) -> CudaSlice<u32> {
    stream().expect("only called where there is a device").clone_htod(&case.targets).expect("the device has room")
}

/// The losses, on copies of all that is read and written.
pub fn losses<T: Element>(case: &Case<T>, losses: &mut [f32]) {
    let stream = stream().expect("only called where there is a device");
    let (copies, targets) = (Copies::new(&stream), targets(case));
    let written = copies.poisoned(losses.len());
    let inputs = Inputs { options: case.options, ..Inputs::new(copies.view(&case.inputs().logits), &targets) };
    cuda::losses(&stream, &inputs, written).expect("the case is valid");
    copies.download(written, losses);
}

/// The same with the gradient in place of the logits.
pub fn losses_and_gradient<T: Element>(case: &Case<T>, data: &mut [T], losses: &mut [f32]) {
    let stream = stream().expect("only called where there is a device");
    let (copies, targets) = (Copies::new(&stream), targets(case));
    let (written, copy) = (copies.poisoned(losses.len()), copies.slice(data));
    let (offset, shape, strides) = (case.offset, [case.rows, case.vocab], [case.stride, 1]);
    let logits = ViewMut { data: &mut *copy, offset, shape, strides };
    let inputs = InputsMut { options: case.options, ..InputsMut::new(logits, &targets, case.scale) };
    cuda::losses_and_gradient(&stream, inputs, written).expect("the case is valid");
    copies.download(copy, data);
    copies.download(written, losses);
}

const DEVICE: fn(&mut Draw) -> Device = |_| Device::Cuda(Plan::default());

/// Fewer elements than a vector, a warp's, and so many that a block has several warps with several vectors to a thread.
const VOCABS: [usize; 9] = [1, 3, 7, 8, 9, 100, 257, 1500, 5003];

#[test]
fn losses_and_gradients_are_those_of_the_reference() {
    if stream().is_some() {
        against_reference::<f32>(&DEVICE, 0..25, &VOCABS);
        against_reference::<f16>(&DEVICE, 25..45, &VOCABS);
        against_reference::<bf16>(&DEVICE, 45..70, &VOCABS);
    }
}

/// As many warps as a block can have.
#[test]
fn a_large_vocabulary() {
    if stream().is_some() {
        against_reference::<bf16>(&DEVICE, 0..2, &[50_280]);
        against_reference::<f32>(&DEVICE, 2..4, &[32_001]);
    }
}

#[test]
fn sure_rows_and_odd_rows() {
    if stream().is_some() {
        sure_rows_keep_their_digits(Device::Cuda(Plan::default()));
        odd_rows(Device::Cuda(Plan::default()));
    }
}

#[test]
fn the_same_bits_again() {
    if stream().is_some() {
        let case = Case::<bf16>::draw(&mut Draw::new(3), &[5003]);
        let run = || {
            let (losses, data) = case.losses_and_gradient(Device::Cuda(Plan::default()));
            (bits(&losses), bits(&data))
        };
        assert_eq!(run(), run());
    }
}
