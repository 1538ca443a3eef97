//! What does not fit gives an error that names the argument.

use candle_core::{DType, Device, Tensor};
use selective_scan::candle::{CausalConv, ConvUpdate, Scan, StateUpdate, rollback};
use selective_scan::{Error, Slots};

#[cfg(feature = "nn")]
use {
    super::values,
    candle_core::Var,
    candle_nn::{VarBuilder, VarMap},
    selective_scan::nn::{Mamba, MambaConfig, MambaState},
};

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
    refused(update.update(&zeros(&[2, 4, 5], DType::I64)), "`state`: expected dtype F32, F16 or BF16, got I64");
    refused(update.update(&zeros(&[], F32)), "`state`: expected shape (slots, d_inner, d_state), got []");
    refused(update.update(&zeros(&[4, 5], F32)), "`state`: expected shape (slots, d_inner, d_state), got [4, 5]");
    refused(update.update(&zeros(&[3, 4, 5], F32)), "`state`: expected one slot for each of 2 batch rows");
    refused(StateUpdate { slots: Slots::Host(&[0, 2]), ..update }.update(&pool), "`slots`: expected slots below 2");
    refused(StateUpdate { slots: Slots::Host(&[1, 1]), ..update }.update(&pool), "`slots`: expected a different slot");
    refused(
        StateUpdate { delta: &b, ..update }.update(&pool),
        "`delta`: expected shape (batch, tokens, d_inner) = [2, 1, 4]",
    );
    refused(
        StateUpdate { u: &x.to_dtype(BF16).expect("floats"), ..update }.update(&pool),
        "`delta`: expected dtype BF16",
    );
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

/// Tensors in mamba_ssm's order, (batch, d_inner, length), and what to do with them.
#[test]
fn of_another_order() {
    let zeros = |shape: &[usize]| zeros(shape, DType::F32);
    let exchanged = |name: &str, shape: &str| {
        let how = "which fits with its last two dimensions exchanged (without a copy, by `permuted([0, 2, 1])` of a view or \
                   `transpose(1, 2)` of a tensor)";
        (format!("`{name}`: expected shape "), format!("got {shape}, {how}"))
    };
    let refused = |result: candle_core::Result<Tensor>, (start, end): (String, String)| {
        let error = result.expect_err("another order").to_string();
        assert!(error.starts_with(&start) && error.contains(&end), "{error}\ninstead of\n{start}…{end}");
    };
    let (x, a, b) = (zeros(&[2, 32, 37]), zeros(&[32, 16]), zeros(&[2, 37, 16]));
    let transposed = x.transpose(1, 2).expect("three dimensions");
    let right = Scan::new(&transposed, &transposed, &a, &b, &b);
    right.forward().expect("these fit");
    refused(Scan::new(&x, &x, &a, &b, &b).forward(), exchanged("u", "[2, 32, 37]"));
    refused(Scan { delta: &x, ..right }.forward(), exchanged("delta", "[2, 32, 37]"));
    refused(Scan { z: Some(&x), ..right }.forward(), exchanged("z", "[2, 32, 37]"));
    let order = |name: &str, got: &str| (format!("`{name}`: expected shape "), got.to_string());
    let three = zeros(&[2, 16, 37]);
    let got = "got [2, 16, 1, 37], which seems to be (batch, d_state, length): give";
    refused(Scan { b: &three, ..right }.forward(), order("b", got));
    let four = zeros(&[2, 2, 16, 37]);
    let got = "got [2, 2, 16, 37], which seems to be (batch, groups, d_state, length): give";
    refused(Scan { c: &four, ..right }.forward(), order("c", got));
    Scan { b: &three.transpose(1, 2).expect("three"), ..right }.forward().expect("as the message says");
    let grouped = four.permute((0, 3, 1, 2)).expect("four");
    Scan { b: &grouped, c: &grouped, ..right }.forward().expect("as the message says");

    let weight = zeros(&[32, 4]);
    refused(CausalConv::new(&x, &weight).forward(), exchanged("x", "[2, 32, 37]"));
    let states = zeros(&[2, 32, 3]);
    let conv = CausalConv { initial_state: Some(&states), ..CausalConv::new(&transposed, &weight) };
    refused(conv.forward(), exchanged("initial_state", "[2, 32, 3]"));
    let (tokens, b) = (zeros(&[2, 32, 3]), zeros(&[2, 3, 16]));
    let pool = zeros(&[2, 32, 16]);
    refused(StateUpdate::new(&tokens, &tokens, &a, &b, &b).update(&pool), exchanged("u", "[2, 32, 3]"));
    refused(ConvUpdate::new(&tokens, &weight).update(&zeros(&[2, 3, 32])), exchanged("x", "[2, 32, 3]"));
}

/// A cache that was made by hand is refused, by the name of what is wrong with it, before either of its pools is written.
#[cfg(feature = "nn")]
#[test]
fn of_a_cache_made_by_hand() {
    use DType::{BF16, F32, F64, I64};
    let config = MambaConfig { d_state: 5, ..MambaConfig::new(3) };
    let (d_inner, rows) = (config.d_inner, config.d_conv - 1);
    let device = &Device::Cpu;
    let block = Mamba::new(&config, VarBuilder::from_varmap(&VarMap::new(), F32, device)).expect("a block");
    let tokens = Tensor::ones((2, 1, 3), F32, device).expect("tokens");
    let ones = |shape: &[usize], dtype| Tensor::ones(shape, dtype, device).expect("a tensor");
    let (conv, ssm) = (|dtype| ones(&[2, rows, d_inner], dtype), |dtype| ones(&[2, d_inner, 5], dtype));
    let good = MambaState { conv: conv(F32), ssm: ssm(BF16) };
    block.step(&tokens, &good, None).expect("this fits");
    block.prefill(&tokens, &good, None).expect("this fits");
    good.reset(Some(&[1])).expect("this fits");
    let exchanged = |shape: &[usize]| ones(shape, F32).transpose(1, 2).expect("three dimensions");
    let one = ones(&[1, rows, d_inner], F32);
    let variable = Var::from_tensor(&ssm(F32)).expect("a copy");
    for (cache, message) in [
        (MambaState { conv: conv(F32), ssm: ssm(I64) }, "`cache.ssm`: expected dtype F32, F16 or BF16, got I64"),
        (MambaState { conv: conv(F64), ssm: ssm(F32) }, "`cache.conv`: expected dtype F32, F16 or BF16, got F64"),
        (
            MambaState { conv: conv(F32), ssm: ones(&[], F32) },
            "`cache.ssm`: expected shape (slots, d_inner, d_state), got []",
        ),
        (
            MambaState { conv: ones(&[], F32), ssm: ssm(F32) },
            "`cache.conv`: expected shape (slots, d_conv - 1, d_inner), got []",
        ),
        (MambaState { conv: conv(F32), ssm: exchanged(&[2, 5, d_inner]) }, "`cache.ssm`: expected a contiguous tensor"),
        (
            MambaState { conv: exchanged(&[2, d_inner, rows]), ssm: ssm(F32) },
            "`cache.conv`: expected a contiguous tensor",
        ),
        (MambaState { conv: one.clone(), ssm: ssm(F32) }, "`cache.conv`: expected 2 slots, as `cache.ssm`, got 1"),
        (
            MambaState { conv: one.broadcast_as((2, rows, d_inner)).expect("fits"), ssm: ssm(F32) },
            "`cache.conv`: expected strides that give every element a place of its own",
        ),
        (
            MambaState { conv: conv(F32), ssm: variable.as_tensor().clone() },
            "`cache.ssm`: expected a tensor outside of candle's graph",
        ),
    ] {
        refused(block.step(&tokens, &cache, None), message);
        refused(block.prefill(&tokens, &cache, None), message);
        refused(cache.reset(None), message);
        refused(cache.reset(Some(&[0])), message);
        assert!(
            values(&cache.conv).iter().chain(&values(&cache.ssm)).all(|&x| x == 1.0),
            "nothing is written: {message}"
        );
    }
    let other = MambaState { conv: conv(F32), ssm: ones(&[2, d_inner, 6], F32) };
    refused(block.step(&tokens, &other, None), "`cache`: expected states of shapes");
    assert!(values(&other.conv).iter().all(|&x| x == 1.0), "nothing is written");
}

/// What comes as candle's error can be told apart: an argument that does not fit, of an operator or of a model, or something
/// else.
#[test]
fn of_both_kinds() {
    let (x, a, b) = (zeros(&[2, 3, 4], DType::F32), zeros(&[4, 5], DType::F32), zeros(&[2, 3, 5], DType::F32));
    let argument = |error: &candle_core::Error| match Error::of(error) {
        Some(Error::Argument { argument, .. }) => Some(*argument),
        _ => None,
    };
    let error = Scan { z: Some(&a), ..Scan::new(&x, &x, &a, &b, &b) }.forward().expect_err("z does not fit");
    assert_eq!(argument(&error), Some("z"));
    assert_eq!(argument(&error.context("while serving a request")), Some("z"));
    // Through candle, which runs an operator in place.
    let error = StateUpdate::new(&x, &x, &a, &b, &b).update(&zeros(&[2, 4, 6], DType::F32)).expect_err("another size");
    assert_eq!(argument(&error), Some("state"));
    #[cfg(feature = "nn")]
    {
        let error = MambaState::new(&MambaConfig::new(3), 1, DType::I64, &Device::Cpu).expect_err("a type");
        assert_eq!(argument(&error), Some("dtype"));
    }
    assert_eq!(argument(&x.matmul(&a).and_then(|y| y.matmul(&a)).expect_err("candle's own")), None);
}
