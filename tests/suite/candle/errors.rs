//! What does not fit gives an error that names the argument.

use candle_core::{DType, Device, Tensor};
use selective_scan::candle::{CausalConv, ConvUpdate, Scan, StateUpdate, rollback};

fn zeros(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &Device::Cpu).expect("a tensor")
}

#[track_caller]
fn refused<T>(result: candle_core::Result<T>, message: &str) {
    let error = result.err().expect("the arguments do not fit").to_string();
    assert!(error.contains(message), "{error}\ninstead of\n{message}");
}

#[test]
fn of_the_scan() {
    use DType::{BF16, F32, F64, U32};
    let (x, a, b) = (zeros(&[2, 3, 4], F32), zeros(&[4, 5], F32), zeros(&[2, 3, 5], F32));
    let scan = Scan::new(&x, &x, &a, &b, &b);
    scan.forward().expect("these fit");
    let check = |scan: Scan, message: &str| refused(scan.forward(), message);
    check(Scan { u: &zeros(&[2, 3, 4], F64), ..scan }, "`u`: expected dtype F32, F16 or BF16, got F64");
    check(Scan { u: &zeros(&[2, 3, 4], U32), ..scan }, "`u`: expected dtype F32, F16 or BF16, got U32");
    check(Scan { u: &zeros(&[2, 3, 4], BF16), ..scan }, "`delta`: expected dtype BF16, got F32");
    check(Scan { a: &zeros(&[4, 5], BF16), ..scan }, "`a`: expected dtype F32, got BF16");
    check(Scan { b: &zeros(&[2, 3, 5], BF16), ..scan }, "`b`: expected dtype F32, got BF16");
    check(Scan { u: &zeros(&[3, 4], F32), ..scan }, "`u`: expected shape (batch, length, d_inner), got [3, 4]");
    check(
        Scan { delta: &zeros(&[2, 4, 3], F32), ..scan },
        "`delta`: expected shape (batch, length, d_inner) = [2, 3, 4]",
    );
    check(Scan { a: &zeros(&[5], F32), ..scan }, "`a`: expected shape (d_inner, d_state), got [5]");
    check(Scan { a: &zeros(&[4, 257], F32), ..scan }, "`a`: expected d_state from 1 to 256");
    check(Scan { b: &zeros(&[5], F32), ..scan }, "`b`: expected shape (batch, length, groups, d_state), (batch");
    check(Scan { c: &zeros(&[2, 3, 3, 5], F32), ..scan }, "`c`: expected shape");
    check(Scan { b: &zeros(&[2, 3, 3, 5], F32), ..scan }, "`b`: expected groups that divide d_inner = 4, got 3");
    check(Scan { z: Some(&a), ..scan }, "`z`: expected shape (batch, length, d_inner), got [4, 5]");
    check(Scan { d: Some(&zeros(&[5], F32)), ..scan }, "`d`: expected shape (d_inner) = [4], got [5]");
    check(Scan { delta_bias: Some(&a), ..scan }, "`delta_bias`: expected shape (d_inner), got [4, 5]");
    check(Scan { initial_state: Some(&x), ..scan }, "`initial_state`: expected shape (sequences, d_inner, d_state)");
    check(
        Scan { cu_seqlens: Some(&[0, 3]), ..scan },
        "`cu_seqlens`: expected a batch of 1 beside it, got a batch of 2",
    );
}

#[test]
fn of_the_convolution() {
    use DType::{F16, F32, I64};
    let (x, weight) = (zeros(&[1, 3, 4], F32), zeros(&[4, 4], F32));
    let conv = CausalConv::new(&x, &weight);
    conv.forward().expect("these fit");
    let check = |conv: CausalConv, message: &str| refused(conv.forward(), message);
    check(CausalConv { x: &zeros(&[1, 3, 4], I64), ..conv }, "`x`: expected dtype F32, F16 or BF16, got I64");
    check(CausalConv { x: &weight, ..conv }, "`x`: expected shape (batch, length, d_inner), got [4, 4]");
    check(CausalConv { weight: &zeros(&[4, 9], F32), ..conv }, "`weight`: expected a width from 2 to 8");
    check(CausalConv { weight: &zeros(&[4, 4], F16), ..conv }, "`weight`: expected dtype F32, got F16");
    check(CausalConv { bias: Some(&zeros(&[3], F32)), ..conv }, "`bias`: expected shape (d_inner) = [4], got [3]");
    check(CausalConv { initial_state: Some(&x.t().expect("three")), ..conv }, "`initial_state`: expected shape");
    check(CausalConv { cu_seqlens: Some(&[0, 2]), ..conv }, "`cu_seqlens`: expected the length 3 as its last offset");
}

#[test]
fn of_the_updates() {
    use DType::{BF16, F32, F64};
    let (x, a, b) = (zeros(&[2, 1, 4], F32), zeros(&[4, 5], F32), zeros(&[2, 1, 5], F32));
    let pool = zeros(&[2, 4, 5], F32);
    let update = StateUpdate::new(&x, &x, &a, &b, &b);
    update.update(&pool).expect("these fit");
    refused(update.update(&zeros(&[2, 4, 5], F64)), "`state`: expected dtype F32, F16 or BF16, got F64");
    refused(update.update(&zeros(&[4, 5], F32)), "`state`: expected shape (slots, d_inner, d_state), got [4, 5]");
    refused(update.update(&zeros(&[3, 4, 5], F32)), "`state`: expected one slot for each of 2 batch rows");
    refused(StateUpdate { slots: Some(&[0, 2]), ..update }.update(&pool), "`slots`: expected slots below 2");
    refused(StateUpdate { slots: Some(&[1, 1]), ..update }.update(&pool), "`slots`: expected a different slot");
    refused(
        StateUpdate { dt: &b, ..update }.update(&pool),
        "`dt`: expected shape (batch, tokens, d_inner) = [2, 1, 4]",
    );
    refused(StateUpdate { u: &x.to_dtype(BF16).expect("floats"), ..update }.update(&pool), "`dt`: expected dtype BF16");
    let (rows, weight) = (zeros(&[2, 3, 4], F32), zeros(&[4, 4], F32));
    let conv = ConvUpdate::new(&x, &weight);
    conv.update(&rows).expect("these fit");
    refused(conv.update(&pool), "`state`: expected shape (slots, width - 1, d_inner) = [2, 3, 4], got [2, 4, 5]");
    refused(conv.update(&zeros(&[3, 4], F32)), "`state`: expected shape (slots, width - 1, d_inner), got [3, 4]");
    refused(ConvUpdate { x: &a, ..conv }.update(&rows), "`x`: expected shape (batch, tokens, d_inner), got [4, 5]");
    let states = zeros(&[2, 1, 3, 4], F32);
    rollback(&rows, &states, None, &[1, 1]).expect("these fit");
    refused(rollback(&rows, &states, None, &[1, 2]), "`accepted`: expected from 1 to 1 tokens");
    refused(rollback(&rows, &rows, None, &[1, 1]), "`state`: expected a storage of its own");
    refused(
        rollback(&rows, &zeros(&[2, 1, 3, 4], BF16), None, &[1, 1]),
        "`token_states`: expected dtype F32, got BF16",
    );
}
