//! The same tests on a GPU, or on a simulated one. Without one they say that they are skipped.

use std::sync::OnceLock;

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use selective_scan::candle::Scan;

use super::{conv, convert, embedding, graph, host, norm, optimizer, scan, slots, update, vectors, views};
use crate::attention::candle as attention;
use crate::scan::case::Shape;

pub fn device() -> Option<Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    // cudarc panics where there is no driver, so ask for that first; it says so if there is none.
    DEVICE
        .get_or_init(|| crate::support::gpu::stream().map(|_| Device::new_cuda(0).expect("a GPU that candle can use")))
        .clone()
}

/// On a device of its own, as what is said holds for all later tensors of one.
#[test]
fn one_stream_needs_no_events() {
    if device().is_none() {
        return;
    }
    let device = Device::new_cuda(0).expect("a GPU that candle can use");
    let is_tracked = || device.as_cuda_device().expect("a GPU").is_event_tracking();
    assert!(is_tracked());
    // SAFETY: what follows is put on candle's stream.
    unsafe { selective_scan::candle::use_one_stream(&device) };
    assert!(!is_tracked());
    let tensor = Tensor::ones(3, candle_core::DType::F32, &device).expect("a tensor");
    assert_eq!((&tensor + &tensor).expect("a sum").to_vec1::<f32>().expect("three"), [2.0; 3]);
}

/// A test for each line: what it is called, and what it does with the device.
macro_rules! on_the_device {
    ($($(#[$attribute:meta])* $name:ident: |$device:ident| $body:expr;)*) => {
        $($(#[$attribute])* #[test]
        fn $name() {
            if let Some($device) = &$crate::candle::gpu::device() {
                $body;
            }
        })*
    };
}

#[cfg(feature = "nn")]
pub(crate) use on_the_device;

const SMALL: Shape = Shape { batch: 2, len: 9, d_inner: 6, d_state: 5 };
/// What the fast kernels take, with more than one checkpoint.
const FAST: Shape = Shape { batch: 2, len: 130, d_inner: 8, d_state: 8 };

on_the_device! {
    scan_agrees_with_the_reference: |device| {
        scan::agrees_with_the_reference::<f32>(device, SMALL, 16);
        scan::agrees_with_the_reference::<f32>(device, FAST, 4);
        scan::agrees_with_the_reference::<f16>(device, FAST, 2);
        scan::agrees_with_the_reference::<bf16>(device, FAST, 2);
    };
    gradients_agree_with_plain_operators: |device| {
        scan::agrees_with_plain_operators(device, Shape { len: 4, ..SMALL }, 4);
    };
    some_inputs_are_tracked: |device| {
        let subsets = [0, 1, 0b1_0000_0000, 0b1_0101_0101, 0b1_1111_0000];
        graph::partly_tracked(device, subsets.into_iter());
    };
    scans_share_inputs_and_feed_each_other: |device| graph::two_in_one_graph(device);
    backward_again_gives_the_same: |device| graph::repeated(device);
    views_have_the_results_of_copies: |device| {
        views::parts_of_projections::<f32>(device);
        views::parts_of_projections::<bf16>(device);
        views::broadcast(device);
        views::convolution(device);
    };
    convolution_agrees_with_the_reference: |device| {
        conv::agrees_with_the_reference::<f32>(device, 32);
        conv::agrees_with_the_reference::<f16>(device, 4);
        conv::agrees_with_the_reference::<bf16>(device, 4);
    };
    types_of_many_tensors: |device| convert::all_types(device);
    many_pools_are_written: |device| convert::parts_of_pools(device);
    what_is_written_is_checked: |device| convert::refusals(device);
    attention_agrees_with_the_reference: |device| {
        attention::gradients_flow(device);
        attention::like_the_processor(device);
        attention::bad_tensors(device);
    };
    numbers_go_there_and_back: |device| host::all_types(device);
    work_is_repeated: |device| host::work_is_repeated(device);
    embedding_gradient: |device| embedding::has_the_values_of_a_loop(device);
    norm_agrees_with_the_reference: |device| {
        norm::agrees_with_the_reference::<f32, f32, f32>(device, 16);
        norm::agrees_with_the_reference::<f32, f32, bf16>(device, 8);
        norm::agrees_with_the_reference::<f16, f16, f16>(device, 8);
        norm::agrees_with_the_reference::<bf16, f32, bf16>(device, 8);
    };
    norms_in_a_row: |device| norm::layers_of_a_stream(device);
    norm_of_slices: |device| norm::slices_are_not_copied(device);
    optimizer_agrees_with_plain_operators: |device| optimizer::agrees_with_plain_operators(device);
    optimizer_goes_on_to_the_bit: |device| optimizer::goes_on_to_the_bit(device);
    optimizer_refuses_what_does_not_fit: |device| optimizer::refuses_what_does_not_fit(device);
    updates_have_the_results_of_those_on_slices: |device| {
        update::like_slices::<f32, f32>(device);
        update::like_slices::<bf16, bf16>(device);
        update::like_slices::<f16, f32>(device);
    };
    updates_continue_a_scan: |device| update::continues_a_scan(device);
    slots_as_tensors: |device| {
        slots::as_a_list(device);
        slots::beyond_a_pool(device);
        slots::refused(device);
    };
    #[cfg(feature = "nn")]
    slots_of_a_model: |device| crate::nn::decoding::slots_as_tensors(device);
    a_pool_that_is_an_input_is_refused: |device| update::aliasing(device);
    states_of_the_graph_are_refused: |device| update::states_of_the_graph(device);
    agrees_with_pytorch: |device| {
        vectors::scan(device);
        vectors::conv(device);
    };
    tensors_on_two_devices_are_refused: |device| {
        let [gpu, cpu] = [device, &Device::Cpu].map(|device| {
            [&[2, 3, 4][..], &[4, 5], &[2, 3, 5]].map(|shape| Tensor::zeros(shape, candle_core::DType::F32, device).unwrap())
        });
        let scan = Scan::new(&gpu[0], &gpu[0], &gpu[1], &gpu[2], &gpu[2]);
        scan.forward().expect("these fit");
        for (scan, message) in [
            (Scan { delta: &cpu[0], ..scan }, "`delta`: expected a tensor on Cuda { gpu_id: 0 }, as `u`, got one on Cpu"),
            (Scan { u: &cpu[0], ..scan }, "`delta`: expected a tensor on Cpu, as `u`, got one on Cuda { gpu_id: 0 }"),
            (Scan { c: &cpu[2], ..scan }, "`c`: expected a tensor on Cuda { gpu_id: 0 }, as `u`, got one on Cpu"),
        ] {
            let error = scan.forward().expect_err("two devices").to_string();
            assert!(error.contains(message), "{error}");
        }
        let pool = Tensor::zeros((2, 4, 5), candle_core::DType::F32, &Device::Cpu).unwrap();
        let update = selective_scan::candle::StateUpdate::new(&gpu[0], &gpu[0], &gpu[1], &gpu[2], &gpu[2]);
        let error = update.update(&pool).expect_err("two devices").to_string();
        assert!(error.contains("`state`: expected a tensor on Cuda { gpu_id: 0 }, as `u`, got one on Cpu"), "{error}");
        let slots = Tensor::new(&[0i32, 1], &Device::Cpu).unwrap();
        let pool = pool.to_device(device).unwrap();
        let update = selective_scan::candle::StateUpdate { slots: (&slots).into(), ..update };
        for error in [update.update(&pool).map(drop), update.slots.check(2, "pool", &pool)] {
            let error = error.expect_err("two devices").to_string();
            assert!(error.starts_with("`slots`: expected a tensor on Cuda { gpu_id: 0 }, as `"), "{error}");
        }
    };
}
