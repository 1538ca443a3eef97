//! The gradient of an embedding.

use candle_core::{DType, Device, Tensor};
use selective_scan::candle::embedding_gradient;

use super::values;

/// Small whole numbers, whose sums are exact, from ids and rows as they come and from slices of others.
pub fn has_the_values_of_a_loop(device: &Device) {
    let (batch, length, width, vocab_size) = (3, 50, 5, 6);
    let rows: Vec<f32> = (0..batch * length * width).map(|i| (i % 17) as f32 - 8.0).collect();
    let ids: Vec<u32> = (0..batch * length).map(|i| (i * i % vocab_size) as u32).collect();
    let mut expected = vec![0.0f64; vocab_size * width];
    for (i, &id) in ids.iter().enumerate() {
        for j in 0..width {
            expected[id as usize * width + j] += f64::from(rows[i * width + j]);
        }
    }
    let d_out = Tensor::from_vec(rows, (batch, length, width), device).expect("as many");
    let ids = Tensor::from_vec(ids, (batch, length), device).expect("as many");
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let d_out = d_out.to_dtype(dtype).expect("a tensor");
        let gradient = embedding_gradient(&ids, &d_out, vocab_size).expect("valid");
        assert_eq!((gradient.dtype(), gradient.dims()), (DType::F32, &[vocab_size, width][..]));
        assert_eq!(values(&gradient), expected, "{dtype:?}");

        let wide_ids = ids.zeros_like().and_then(|zeros| Tensor::cat(&[&zeros, &ids], 0)).expect("a tensor");
        let wide = Tensor::cat(&[&d_out, &d_out, &d_out], 2).expect("a tensor");
        let ids = wide_ids.narrow(0, batch, batch).expect("rows");
        let slice = wide.narrow(2, width, width).expect("columns");
        let gradient = embedding_gradient(&ids, &slice, vocab_size).expect("valid");
        assert_eq!(values(&gradient), expected, "{dtype:?}, slices");
        let (ids, slice) = (ids.t().expect("a matrix"), slice.transpose(0, 1).expect("two dimensions"));
        let gradient = embedding_gradient(&ids, &slice, vocab_size).expect("valid");
        assert_eq!(values(&gradient), expected, "{dtype:?}, transposed");
    }
}

#[test]
fn the_values_of_a_loop() {
    has_the_values_of_a_loop(&Device::Cpu);
}

#[test]
fn what_does_not_fit_is_named() {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).expect("a tensor");
    let (ids, d_out) = (zeros(&[2, 3], DType::U32), zeros(&[2, 3, 4], DType::F32));
    let refused = |ids: &Tensor, d_out: &Tensor, message: &str| {
        let error = embedding_gradient(ids, d_out, 5).expect_err("it does not fit").to_string();
        assert!(error.contains(message), "{error}");
    };
    refused(&zeros(&[2, 3], DType::I64), &d_out, "`ids`: expected dtype U32, got I64");
    refused(&ids, &zeros(&[6, 4], DType::F32), "`d_out`: expected shape [2, 3] and a width, got [6, 4]");
    refused(&ids, &zeros(&[2, 3, 4], DType::U8), "`d_out`: expected dtype F32, F16 or BF16, got U8");
    refused(&ids, &zeros(&[], DType::F32), "`d_out`: expected shape [2, 3] and a width, got []");
    let nothing = embedding_gradient(&zeros(&[0], DType::U32), &zeros(&[0, 4], DType::F32), 5).expect("no ids");
    assert_eq!(values(&nothing), vec![0.0; 20]);
}
