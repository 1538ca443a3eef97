//! Many tensors brought into another type, or overwritten, at once: what candle makes of each.

use candle_core::{DType, Device, Tensor, Var};
use selective_scan::candle::{to_dtype_all, write_each};

use super::values;

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// `len` numbers that no half type has all digits of, from a large tensor's element `offset` on.
fn numbers(len: usize, offset: usize, dtype: DType, device: &Device) -> Tensor {
    let all: Vec<f32> = (0..offset + len).map(|i| (i as f32 * 0.7).sin() * 3.0 + i as f32 * 1e-3).collect();
    let all = Tensor::new(all, &Device::Cpu).unwrap().to_device(device).unwrap().to_dtype(dtype).unwrap();
    all.narrow(0, offset, len).unwrap()
}

/// Sizes and places: whole vectors and not, several blocks of a kernel, nothing, more tensors than a launch takes.
fn sizes() -> Vec<(usize, usize)> {
    let few = [(1, 0), (3, 0), (4, 0), (0, 2), (17, 1), (4096, 0), (4096, 4), (4097, 0), (9000, 3), (5, 5)];
    few.into_iter().chain((0..180).map(|i| (i % 7 + 1, i % 5))).collect()
}

#[track_caller]
fn assert_same(got: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!((got.dims(), got.dtype()), (expected.dims(), expected.dtype()), "{what}");
    // candle reads no tensor of nothing on a GPU.
    if expected.elem_count() > 0 {
        assert_eq!(values(got), values(expected), "{what}");
    }
}

pub fn all_types(device: &Device) {
    for dtype in TYPES {
        let tensors: Vec<_> = sizes()
            .iter()
            .zip(TYPES.iter().cycle())
            .map(|(&(len, at), &from)| numbers(len, at, from, device))
            .collect();
        // With one that is strided, one of a type of its own, and a variable.
        let strided = numbers(12, 0, DType::F32, device).reshape((3, 4)).unwrap().t().unwrap();
        let wide = numbers(5, 0, DType::F64, device);
        let variable = Var::from_tensor(&numbers(6, 0, DType::F32, device)).unwrap();
        let all: Vec<_> = tensors.iter().chain([&strided, &wide, variable.as_tensor()]).collect();
        let got = to_dtype_all(&all, dtype).unwrap();
        assert_eq!(got.len(), all.len());
        for (i, (got, from)) in got.iter().zip(&all).enumerate() {
            assert!(!got.track_op());
            let what = format!("tensor {i}, {:?} to {dtype:?}", from.dtype());
            match from.elem_count() {
                0 => assert_eq!((got.dims(), got.dtype()), (from.dims(), dtype), "{what}"),
                _ => assert_same(got, &from.to_dtype(dtype).unwrap(), &what),
            }
        }
    }
    assert!(to_dtype_all(&[], DType::F16).unwrap().is_empty());
    let numbers = numbers(5, 0, DType::F32, device);
    assert_same(&to_dtype_all(&[&numbers], DType::F64).unwrap()[0], &numbers.to_dtype(DType::F64).unwrap(), "f64");
}

/// What is written is that part alone, and all of it.
pub fn parts_of_pools(device: &Device) {
    let types = || TYPES.iter().flat_map(|to| TYPES.iter().map(move |from| (*to, *from)));
    let mut pools = Vec::new();
    // More than are locked at once.
    for (i, (to, from)) in types().cycle().take(70).enumerate() {
        let row = [3, 8, 1500][i % 3];
        let pool = (numbers(4 * row, 0, to, device) + 1.0).unwrap().reshape((4, row)).unwrap();
        let rows = numbers(2 * row, i % 4, from, device).reshape((2, row)).unwrap();
        pools.push((pool.clone(), pool.copy().unwrap(), (i % 4 != 3).then_some(rows)));
    }
    let slots: Vec<_> = pools.iter().map(|(pool, ..)| pool.narrow(0, 1, 2).unwrap()).collect();
    let pairs: Vec<_> = slots.iter().zip(&pools).map(|(to, (_, _, from))| (to, from.as_ref())).collect();
    write_each(&pairs).unwrap();
    for (i, (pool, before, from)) in pools.iter().enumerate() {
        let zeros = || slots[i].zeros_like().unwrap();
        let expected = from.as_ref().map_or_else(zeros, |from| from.to_dtype(pool.dtype()).unwrap());
        assert_same(&slots[i], &expected, &format!("pool {i}"));
        for row in [0, 3] {
            let row = |of: &Tensor| of.narrow(0, row, 1).unwrap();
            assert_same(&row(pool), &row(before), &format!("the rest of pool {i}"));
        }
    }
    // Several parts of one.
    let (pool, rows) =
        (numbers(40, 0, DType::F16, device).reshape((10, 4)).unwrap(), numbers(12, 0, DType::F32, device));
    let rows = rows.reshape((3, 4)).unwrap();
    let parts: Vec<_> =
        [(7, 0), (0, 1), (6, 2)].map(|(to, from)| (pool.narrow(0, to, 1), rows.narrow(0, from, 1))).into();
    let parts: Vec<_> = parts.into_iter().map(|(to, from)| (to.unwrap(), from.unwrap())).collect();
    write_each(&parts.iter().map(|(to, from)| (to, Some(from))).collect::<Vec<_>>()).unwrap();
    let before = numbers(40, 0, DType::F16, device).reshape((10, 4)).unwrap();
    for row in 0..10 {
        let of = |tensor: &Tensor, row| tensor.narrow(0, row, 1).unwrap();
        let expected = match row {
            7 => of(&rows, 0),
            0 => of(&rows, 1),
            6 => of(&rows, 2),
            _ => of(&before, row),
        };
        assert_same(&of(&pool, row), &expected.to_dtype(DType::F16).unwrap(), &format!("row {row}"));
    }
    // Of other types, of strided values, and a scalar.
    let (counts, scalar) =
        (Tensor::new(&[7u32, 8], device).unwrap(), Tensor::new(2f32, device).unwrap().to_device(device).unwrap());
    let strided = numbers(6, 0, DType::F32, device).reshape((2, 3)).unwrap().t().unwrap();
    let matrix = Tensor::ones((3, 2), DType::BF16, device).unwrap();
    write_each(&[(&counts, None), (&scalar, None), (&matrix, Some(&strided))]).unwrap();
    assert_eq!((values(&counts), values(&scalar)), (vec![0.0; 2], vec![0.0]));
    assert_same(&matrix, &strided.to_dtype(DType::BF16).unwrap(), "strided");
}

pub fn refusals(device: &Device) {
    let pool = Tensor::ones((3, 2), DType::F32, device).unwrap();
    let (rows, other) = (pool.narrow(0, 0, 1).unwrap(), pool.narrow(0, 1, 1).unwrap());
    let (two, variable) = (pool.copy().unwrap(), Var::from_tensor(&pool).unwrap());
    let refusal = |pairs: &[(&Tensor, Option<&Tensor>)]| {
        let error = write_each(pairs).unwrap_err().to_string();
        assert_eq!((values(&pool), values(&two)), (vec![1.0; 6], vec![1.0; 6]), "{error}");
        error
    };
    let of_two = (&two, None);
    assert!(refusal(&[of_two, (&pool.t().unwrap(), None)]).contains("contiguous"));
    assert!(refusal(&[of_two, (variable.as_tensor(), None)]).contains("candle's graph"));
    let both = pool.narrow(0, 0, 2).unwrap();
    assert!(refusal(&[of_two, (&both, None), (&other, None)]).contains("written twice"));
    assert!(refusal(&[of_two, (&rows, Some(&other))]).contains("reads"));
    let three = Tensor::ones((3, 3), DType::F32, device).unwrap();
    let error = refusal(&[of_two, (&pool, Some(&three))]);
    assert!(error.starts_with("`from`") && error.contains("[3, 2]") && error.contains("[3, 3]"), "{error}");
}

#[test]
fn all_types_on_the_processor() {
    all_types(&Device::Cpu);
}

#[test]
fn parts_of_pools_on_the_processor() {
    parts_of_pools(&Device::Cpu);
}

#[test]
fn refusals_on_the_processor() {
    refusals(&Device::Cpu);
}
