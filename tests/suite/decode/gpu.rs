//! The operators of a decoding step on a GPU, or on a simulated one.

use half::{bf16, f16};
use selective_scan::decode::{
    ColumnNorms, Columns, ConvStep, Linear, LinearMut, RowNorm, SelectiveUpdate, SelectiveUpdateMut, cuda,
};
use selective_scan::scan::cuda::Plan;
use selective_scan::{Element, View, ViewMut};

use super::{all_types, linear as products, update as updates};
use crate::support::device::Device;
use crate::support::draw::Draw;
use crate::support::gpu::{Copies, stream, with_slots_on_device};

/// Runs a product on the device, on copies of all that it reads and writes.
pub fn linear<X: Element, T: Element, O: Element, St: Element>(inputs: &Linear<X, T>, outputs: LinearMut<O, St>) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let vector = |view: &View<f32, 1>| copies.view(view);
    let on_device = Linear {
        bias: inputs.bias.as_ref().map(vector),
        norm: inputs.norm.as_ref().map(|norm| RowNorm { weight: norm.weight.as_ref().map(vector), eps: norm.eps }),
        conv: inputs.conv.as_ref().map(|conv| ConvStep {
            weight: copies.view(&conv.weight),
            bias: conv.bias.as_ref().map(vector),
            slots: copies.slots(conv.slots),
        }),
        ..Linear::new(copies.view(&inputs.x), copies.view(&inputs.weight))
    };
    let out = copies.slice(outputs.out);
    let pool = outputs.conv_state.as_ref().map(|state| copies.slice(state.data));
    match (outputs.conv_state, pool) {
        (Some(ViewMut { data, offset, shape, strides }), Some(pool)) => {
            let conv_state = Some(ViewMut { data: &mut *pool, offset, shape, strides });
            let to = LinearMut { out: &mut *out, accumulate: outputs.accumulate, conv_state };
            cuda::linear(&stream, &on_device, to).expect("the case is valid");
            copies.download(pool, data);
        }
        _ => {
            let to = LinearMut { accumulate: outputs.accumulate, ..LinearMut::new(&mut *out) };
            cuda::linear(&stream, &on_device, to).expect("the case is valid");
        }
    }
    copies.download(out, outputs.out);
}

/// Runs an update on the device, on copies of all that it reads and writes.
pub fn selective_update<T: Element, St: Element>(inputs: &SelectiveUpdate<T>, outputs: SelectiveUpdateMut<T, St>) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let vector = |view: &View<f32, 1>| copies.view(view);
    let on_device_inputs = SelectiveUpdate {
        norms: inputs.norms.as_ref().map(|norms| ColumnNorms {
            weights: norms.weights.as_ref().map(|weights| weights.each_ref().map(vector)),
            eps: norms.eps,
        }),
        d: inputs.d.as_ref().map(vector),
        delta_bias: inputs.delta_bias.as_ref().map(vector),
        z: inputs.z.as_ref().map(|view| copies.view(view)),
        slots: copies.slots(inputs.slots),
        ..SelectiveUpdate::new(
            copies.view(&inputs.u),
            match &inputs.columns {
                Columns::Given(columns) => Columns::Given(copies.view(columns)),
                Columns::Projected { weight } => Columns::Projected { weight: copies.view(weight) },
            },
            copies.view(&inputs.dt_weight),
            copies.view(&inputs.a),
        )
    };
    let ViewMut { data, offset, shape, strides } = outputs.state;
    let (pool, out) = (copies.slice(data), copies.slice(outputs.out));
    let columns = outputs.columns.as_ref().map(|columns| copies.slice(columns));
    let state = ViewMut { data: &mut *pool, offset, shape, strides };
    match (columns, outputs.columns) {
        (Some(on_device), Some(columns)) => {
            let to = SelectiveUpdateMut { columns: Some(&mut *on_device), ..SelectiveUpdateMut::new(state, &mut *out) };
            cuda::selective_update(&stream, &on_device_inputs, to).expect("the case is valid");
            copies.download(on_device, columns);
        }
        _ => cuda::selective_update(&stream, &on_device_inputs, SelectiveUpdateMut::new(state, &mut *out))
            .expect("the case is valid"),
    }
    copies.download(pool, data);
    copies.download(out, outputs.out);
}

fn device(_: &mut Draw) -> Device {
    Device::Cuda(Plan::default())
}

fn products_of<X: Element, T: Element, O: Element>() {
    products::against_reference::<X, T, O, f32>(&device, 8, 70);
    products::against_reference::<X, T, O, bf16>(&device, 3, 20);
}

#[test]
fn products_are_as_the_reference() {
    if stream().is_some() {
        all_types!(products_of());
        with_slots_on_device(|| products::against_reference::<bf16, bf16, bf16, f16>(&device, 12, 20));
    }
}

fn company<X: Element, T: Element, O: Element>() {
    products::rows_do_not_depend_on_each_other::<X, T, O>(&device, 2, 70);
}

#[test]
fn a_row_alone_and_among_others() {
    if stream().is_some() {
        all_types!(company());
    }
}

/// Kernels for aligned rows and for any give the same bits.
#[test]
fn any_strides() {
    if stream().is_some() {
        let device = Device::Cuda(Plan::default());
        products::strides_change_no_bits::<f32, f32, f32>(device, 9);
        products::strides_change_no_bits::<f32, bf16, f32>(device, 20);
        updates::strides_change_no_bits::<f16>(device, 3, 9);
    }
}

/// As the operators one by one, where these are fed the same.
#[test]
fn a_convolution_is_its_step_after_the_product() {
    if stream().is_some() {
        products::the_convolution_is_a_step::<f32, f32, f32>(&device, 4, 20);
        products::the_convolution_is_a_step::<f32, bf16, f32>(&device, 4, 20);
        products::the_convolution_is_a_step::<f16, f16, bf16>(&device, 4, 20);
    }
}

fn added<X: Element, T: Element, O: Element>() {
    products::added::<X, T, O>(&device, 3, 20);
}

#[test]
fn what_is_added_is_the_product_rounded_once() {
    if stream().is_some() {
        all_types!(added());
    }
}

/// Rows that are staged in several slices, and so many that tiles of all sizes are taken.
#[test]
fn many_features_and_rows() {
    if stream().is_some() {
        for features in [6144, 6152, 9000] {
            products::of_size::<f16, f16, f32>(&device, [3, features, 20]);
            products::of_size::<f32, bf16, bf16>(&device, [17, features, 20]);
            products::of_size::<f32, f32, f32>(&device, [5, features, 20]);
        }
        for rows in [8, 9, 16, 17, 32, 33, 64, 65, 130] {
            products::of_size::<bf16, bf16, f32>(&device, [rows, 64, 24]);
        }
    }
}

/// So many columns that a block has two tiles of them, of features that are staged in two slices: the second tile goes through the rows again.
#[test]
fn tiles_of_normed_rows_in_slices() {
    if stream().is_some() {
        products::normed_of_size::<f32, f32, f32>(&device, [64, 3200, 272]);
        products::normed_of_size::<f32, bf16, bf16>(&device, [64, 6400, 560]);
        products::normed_of_size::<bf16, bf16, f32>(&device, [64, 6400, 560]);
    }
}

#[test]
fn updates_are_as_the_reference() {
    if stream().is_some() {
        updates::against_reference::<f32, f32>(&device, 16, 20);
        updates::against_reference::<f16, f32>(&device, 8, 20);
        updates::against_reference::<bf16, bf16>(&device, 8, 20);
        with_slots_on_device(|| updates::against_reference::<bf16, f16>(&device, 8, 20));
    }
}

#[test]
fn lanes_with_several_parts_have_the_bits_of_lanes_with_one() {
    if stream().is_some() {
        updates::rows_do_not_depend_on_lanes::<bf16, f32>(&device);
        updates::rows_do_not_depend_on_lanes::<f16, bf16>(&device);
        updates::rows_do_not_depend_on_lanes::<f32, f32>(&device);
    }
}

#[test]
fn columns_are_a_product_before() {
    if stream().is_some() {
        updates::projected_columns_are_a_product_before::<bf16, f32>(&device, 12, 20);
        updates::projected_columns_are_a_product_before::<f16, bf16>(&device, 8, 9);
        with_slots_on_device(|| updates::projected_columns_are_a_product_before::<bf16, f16>(&device, 8, 20));
        updates::projected_columns_are_a_product_before::<f32, f32>(&device, 4, 9);
    }
}

#[test]
fn the_update_of_known_step_sizes() {
    if stream().is_some() {
        updates::known_step_sizes::<f32, f32>(&device, 4, 9);
        updates::known_step_sizes::<bf16, f32>(&device, 4, 9);
        updates::known_step_sizes::<f16, bf16>(&device, 4, 9);
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    if stream().is_some() {
        products::what_is_not_finite_stays(&device, 6);
        updates::what_is_not_finite_stays(&device, 6);
    }
}
