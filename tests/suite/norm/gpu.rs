//! The norm on a GPU, or on a simulated one.

use half::{bf16, f16};
use selective_scan::norm::{BackwardInputs, GradientsMut, Inputs, OutputMut, cuda};
use selective_scan::scan::cuda::Plan;
use selective_scan::{Element, View};

use super::{
    against_reference, bits_repeat, large_and_small, the_sum_is_what_is_normed, what_is_not_finite_stays, zeros,
};
use crate::support::device::Device;
use crate::support::draw::Draw;
use crate::support::gpu::{Copies, stream};

/// A forward pass on copies of all that it reads and writes.
pub fn forward<X: Element, S: Element, O: Element>(inputs: &Inputs<X, S>, to: OutputMut<S, O>) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let on_device = Inputs {
        residual: inputs.residual.as_ref().map(|view| copies.view(view)),
        weight: inputs.weight.as_ref().map(|view| copies.view(view)),
        z: inputs.z.as_ref().map(|view| copies.view(view)),
        options: inputs.options,
        ..Inputs::new(copies.view(&inputs.x))
    };
    let out = copies.slice(to.out);
    let mut sum = to.residual_out.as_ref().map(|sum| copies.slice(sum));
    let outputs = OutputMut { out: &mut *out, residual_out: sum.as_deref_mut() };
    cuda::forward(&stream, &on_device, outputs).expect("the case is valid");
    copies.download(out, to.out);
    if let (Some(from), Some(to)) = (sum, to.residual_out) {
        copies.download(from, to);
    }
}

/// A backward pass on copies of all that it reads and writes.
pub fn backward<X: Element, S: Element, O: Element>(inputs: &BackwardInputs<X, S, O>, to: GradientsMut<X, S>) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let on_device = BackwardInputs {
        weight: inputs.weight.as_ref().map(|view| copies.view(view)),
        z: inputs.z.as_ref().map(|view| copies.view(view)),
        d_residual_out: inputs.d_residual_out.as_ref().map(|view| copies.view(view)),
        options: inputs.options,
        ..BackwardInputs::new(copies.view(&inputs.s), copies.view(&inputs.d_out))
    };
    let mut x = to.x.as_ref().map(|x| copies.slice(x));
    let mut residual = to.residual.as_ref().map(|residual| copies.slice(residual));
    let mut weight = to.weight.as_ref().map(|weight| copies.slice(weight));
    let mut z = to.z.as_ref().map(|z| copies.slice(z));
    let gradients = GradientsMut {
        x: x.as_deref_mut(),
        residual: residual.as_deref_mut(),
        weight: weight.as_deref_mut(),
        z: z.as_deref_mut(),
    };
    cuda::backward(&stream, &on_device, gradients).expect("the case is valid");
    for (from, to) in [(x, to.x), (z, to.z)] {
        if let (Some(from), Some(to)) = (from, to) {
            copies.download(from, to);
        }
    }
    if let (Some(from), Some(to)) = (residual, to.residual) {
        copies.download(from, to);
    }
    if let (Some(from), Some(to)) = (weight, to.weight) {
        copies.download(from, to);
    }
}

fn gpu() -> Device {
    Device::Cuda(Plan::default())
}

fn device(_: &mut Draw) -> Device {
    gpu()
}

/// Few rows, as the simulated device is slow; more of them where they are narrow, for blocks with many teams.
fn sizes(draw: &mut Draw) -> (usize, usize) {
    let width = draw.one_of(&super::WIDTHS);
    (if width > 100 { draw.one_of(&[1, 3, 9]) } else { draw.one_of(&[1, 3, 70, 600]) }, width)
}

#[test]
fn f32_is_as_the_reference() {
    if stream().is_some() {
        against_reference::<f32, f32, f32>(&device, 60, &sizes);
        against_reference::<f32, f32, f16>(&device, 20, &sizes);
        against_reference::<f32, f32, bf16>(&device, 20, &sizes);
    }
}

#[test]
fn halves_are_as_the_reference() {
    if stream().is_some() {
        against_reference::<f16, f16, f16>(&device, 20, &sizes);
        against_reference::<bf16, bf16, bf16>(&device, 20, &sizes);
        against_reference::<f16, f32, f16>(&device, 20, &sizes);
        against_reference::<bf16, f32, bf16>(&device, 20, &sizes);
    }
}

/// Rows that no thread's registers hold, and those that just fit.
#[test]
fn the_widest_rows() {
    if stream().is_some() {
        for width in [8188, 8192, 8196] {
            against_reference::<f32, f32, f32>(&device, 2, &|_| (2, width));
        }
    }
}

#[test]
fn the_same_bits() {
    if stream().is_some() {
        for (rows, width) in [(70, 7), (70, 16), (40, 100), (5, 768)] {
            bits_repeat(gpu(), rows, width);
        }
    }
}

#[test]
fn a_sum_in_the_same_call() {
    if stream().is_some() {
        for width in [7, 16, 512] {
            the_sum_is_what_is_normed::<bf16>(gpu(), 5, width);
            the_sum_is_what_is_normed::<f32>(gpu(), 5, width);
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_group() {
    if stream().is_some() {
        for (width, group_size) in [(7, 7), (16, 4), (512, 512)] {
            what_is_not_finite_stays(gpu(), width, group_size);
        }
    }
}

#[test]
fn no_rows_and_rows_of_zeros() {
    if stream().is_some() {
        for width in [1, 7, 16] {
            zeros(gpu(), width);
        }
    }
}

#[test]
fn rows_of_all_sizes() {
    if stream().is_some() {
        for width in [7, 16, 512] {
            large_and_small(gpu(), width);
        }
    }
}

/// 8 columns of 20, as the processor has them.
#[test]
fn a_column_slice_is_read_where_it_lies() {
    let Some(stream) = stream() else { return };
    let copies = Copies::new(&stream);
    // 4 rows of 8 of 20 columns.
    let data: Vec<f32> = (0..80).map(|i| (i % 7) as f32 - 3.0).collect();
    let x = View::new(&data[..], [4, 8]).with_layout(8, [20, 1]);
    let mut outs = [vec![0.0f32; 32], vec![0.0f32; 32]];
    let [on_device, on_host] = &mut outs;
    let out = copies.poisoned::<f32>(32);
    let inputs = Inputs::<f32, f32, selective_scan::cuda::Cuda>::new(copies.view(&x));
    cuda::forward(&stream, &inputs, OutputMut::<f32, f32, _> { out: &mut *out, residual_out: None }).expect("valid");
    copies.download(out, on_device);
    let to = OutputMut::<f32, f32> { out: &mut on_host[..], residual_out: None };
    selective_scan::norm::cpu::forward(&Inputs::<f32>::new(x), to).expect("valid");
    for (ours, theirs) in on_device.iter().zip(on_host.iter()) {
        // Two roundings of different sums, of the root and of the product.
        assert!((ours - theirs).abs() <= 4.0 * f32::EPSILON * theirs.abs(), "{ours} {theirs}");
    }
}
