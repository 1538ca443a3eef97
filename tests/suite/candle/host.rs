//! Copies between the host and tensors, and work that is repeated.

use candle_core::{DType, Device, Tensor};
use selective_scan::candle::{DecodeLinear, HostCopy, Number, Repeated, Repetition, copy_from_host, copy_from_host_at};

/// There and back, whole and in part; a later copy sees what was written since, and a view what its tensor is written.
pub fn there_and_back<T: Number>(device: &Device, values: &[T], others: &[T]) {
    let tensor = Tensor::new(values, device).unwrap();
    let (mut copy, mut beginning) =
        (HostCopy::<T>::new(&tensor).unwrap(), HostCopy::<T>::new(&tensor.narrow(0, 0, 2).unwrap()).unwrap());
    assert!(copy.wait().unwrap().iter().all(|x: &T| x.to_f64() == 0.0), "nothing was asked for");
    copy.start().unwrap();
    // What is written after it was asked for is not in it.
    copy_from_host(others, &tensor).unwrap();
    assert!(copy.wait().unwrap() == values);
    copy.start().unwrap();
    beginning.start().unwrap();
    assert!(copy.wait().unwrap() == others && beginning.wait().unwrap() == &others[..2]);
    copy_from_host_at(&values[1..3], &tensor, 1).unwrap();
    copy.start().unwrap();
    let mixed = [&others[..1], &values[1..3], &others[3..]].concat();
    assert!(copy.wait().unwrap() == mixed);
    assert!(tensor.to_vec1::<T>().unwrap() == mixed);
}

pub fn all_types(device: &Device) {
    there_and_back(device, &[1u32, 2, 3, u32::MAX], &[5, 6, 7, 8]);
    there_and_back(device, &[1.5f32, -2.0, 3.0, 4.0], &[5.0, f32::MIN_POSITIVE, 7.0, 8.0]);
    there_and_back(device, &[i64::MAX, i64::MIN, (1 << 53) + 1, 4], &[5, 6, 7, 8]);
    let halves = |values: [f32; 4]| values.map(half::bf16::from_f32);
    there_and_back(device, &halves([1.0, 2.0, 3.0, 4.0]), &halves([5.0, 6.0, 7.0, 8.0]));
}

/// A product that is repeated reads what has been written to its operands meanwhile; on a GPU a graph and plain launches alike.
pub fn work_is_repeated(device: &Device) {
    let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, device).unwrap();
    let (x, weight, out) = (zeros((2, 4)), zeros((3, 4)), zeros((2, 3)));
    let tensors = vec![x.clone(), weight.clone(), out.clone()];
    let of_work = tensors.clone();
    let work = move || DecodeLinear::new(&of_work[0], &of_work[1]).add_to(&of_work[2]);
    // SAFETY: the operator reads and writes these tensors.
    let repeated = unsafe { Repeated::new(device, tensors, work) }.unwrap();
    match device {
        Device::Cpu => assert_eq!(repeated.how(), Repetition::Call),
        _ => assert_eq!(repeated.how(), Repetition::Graph { launches: 1 }),
    }
    assert_eq!(out.to_vec2::<f32>().unwrap(), [[0.0; 3]; 2], "it was not done yet");
    copy_from_host(&[1f32, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0], &x).unwrap();
    copy_from_host(&[1f32, 2.0, 0.0, 0.0, 3.0, 4.0, 0.0, 0.0, 5.0, 6.0, 0.0, 0.0], &weight).unwrap();
    repeated.run().unwrap();
    repeated.run_plainly().unwrap();
    assert_eq!(out.to_vec2::<f32>().unwrap(), [[2.0, 6.0, 10.0], [8.0, 16.0, 24.0]]);
    copy_from_host(&[0f32; 8], &x).unwrap();
    repeated.run().unwrap();
    assert_eq!(out.to_vec2::<f32>().unwrap(), [[2.0, 6.0, 10.0], [8.0, 16.0, 24.0]]);
}

#[test]
fn numbers_go_there_and_back() {
    all_types(&Device::Cpu);
}

#[test]
fn work_is_repeated_on_the_processor() {
    work_is_repeated(&Device::Cpu);
}

#[test]
fn what_does_not_fit_is_named() {
    let tensor = Tensor::new(&[1u32, 2, 3], &Device::Cpu).unwrap();
    let message = |result: candle_core::Result<()>| result.unwrap_err().to_string();
    assert_eq!(message(copy_from_host(&[1u32], &tensor)), "`values`: expected 3 elements, as `tensor`, got 1");
    let text = "`values`: expected at most 3 elements, as `tensor`, from 2 on, got 2";
    assert_eq!(message(copy_from_host_at(&[1u32, 2], &tensor, 2)), text);
    assert_eq!(message(copy_from_host(&[1f32; 3], &tensor)), "`tensor`: expected dtype F32, got U32");
    let part = tensor.narrow(0, 1, 2).unwrap();
    assert!(
        message(copy_from_host(&[1u32; 2], &part)).starts_with("`tensor`: expected a dense tensor that begins where")
    );
    assert!(HostCopy::<u32>::new(&part).is_err() && HostCopy::<i64>::new(&tensor).is_err());
    let variable = candle_core::Var::zeros(2, DType::F32, &Device::Cpu).unwrap();
    assert!(message(copy_from_host(&[1f32; 2], &variable)).contains("outside of candle's graph"));
    assert_eq!(tensor.to_vec1::<u32>().unwrap(), [1, 2, 3]);
}
