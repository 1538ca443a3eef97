//! The loss from hidden states and the head's weight, in chunks, beside the loss of all logits.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use rand::Rng;
use rand::rngs::StdRng;
use selective_scan::View;
use selective_scan::loss::{IGNORED, Inputs, Options, reference};
use selective_scan::nn::train::{LossOptions, cross_entropy, linear_cross_entropy};
use selective_scan::nn::{LanguageModel, LanguageModelConfig, MambaConfig};

use super::{SAME, SAME_GRADIENTS, assert_close, bits, cuts, random, refusal, relative_error, tensor, values};
use crate::support::memory::peak_of;

/// Hidden states, a weight and targets of `rows` rows on a device.
struct Case {
    hidden: Tensor,
    weight: Tensor,
    targets: Vec<i64>,
}

impl Case {
    fn draw(random: &mut StdRng, [rows, d_model, vocab]: [usize; 3], device: &Device) -> Self {
        let on = |tensor: Tensor| tensor.to_device(device).unwrap();
        let hidden = on(tensor(random, &[rows, d_model], 1.0));
        let weight = on(tensor(random, &[vocab, d_model], 1.0));
        Self { hidden, weight, targets: (0..rows).map(|_| random.random_range(0..vocab as i64)).collect() }
    }

    fn targets(&self, device: &Device) -> Tensor {
        Tensor::new(&self.targets[..], device).unwrap()
    }

    /// The tensors, as variables where `tracked` says so.
    fn tracked(&self, [hidden, weight]: [bool; 2]) -> [Tensor; 2] {
        let track = |tensor: &Tensor, is_tracked| match is_tracked {
            true => Var::from_tensor(tensor).unwrap().into_inner(),
            false => tensor.clone(),
        };
        [track(&self.hidden, hidden), track(&self.weight, weight)]
    }
}

fn chunked(chunk_rows: usize) -> LossOptions {
    LossOptions { chunk_rows: Some(chunk_rows), ..LossOptions::default() }
}

/// Values and gradients are those of candle's softmax of all logits, in chunks of every size, whichever of the two is tracked.
pub fn agrees_with_plain_operators(device: &Device) {
    let mut random = random();
    let shape = [37, 12, 29];
    let case = Case::draw(&mut random, shape, device);
    let targets = case.targets(device);
    for tracked in [[true, true], [true, false], [false, true], [false, false]] {
        let [hidden, weight] = case.tracked(tracked);
        let logits = hidden.matmul(&weight.t().unwrap()).unwrap();
        let plain = cross_entropy(&logits, &targets.to_dtype(DType::U32).unwrap()).unwrap();
        // Times something, for the loss may not be the last that is computed.
        let expected = (&plain * 3.0).unwrap().backward().unwrap();
        for options in [LossOptions::default(), chunked(1), chunked(8), chunked(37), chunked(1000)] {
            let what = format!("{tracked:?}, {options:?}");
            let loss = linear_cross_entropy(&hidden, &weight, &targets, &options).unwrap();
            assert_eq!((loss.dims(), loss.dtype()), (&[][..], DType::F32), "{what}");
            assert_close(&loss, &plain, SAME, &what);
            assert_eq!(loss.track_op(), tracked.contains(&true), "{what}");
            if !loss.track_op() {
                continue;
            }
            let tripled = (&loss * 3.0).unwrap();
            let found = tripled.backward().unwrap();
            let again = tripled.backward().unwrap();
            for (tensor, is_tracked) in [(&hidden, tracked[0]), (&weight, tracked[1])] {
                assert_eq!(found.get(tensor).is_some(), is_tracked, "{what}");
                if let Some(gradient) = found.get(tensor) {
                    assert_close(gradient, expected.get(tensor).unwrap(), SAME_GRADIENTS, &what);
                    assert_eq!(bits(again.get(tensor).unwrap()), bits(gradient), "backward again, {what}");
                }
            }
        }
    }
}

/// Label smoothing, z-loss and rows that are left out, against the reference.
pub fn agrees_with_the_reference(device: &Device) {
    let mut random = random();
    let [rows, d_model, vocab] = [23, 9, 31];
    let mut case = Case::draw(&mut random, [rows, d_model, vocab], device);
    for row in [0, 7, 8, 9, 22] {
        case.targets[row] = -7;
    }
    let [hidden, weight] = case.tracked([true, true]);
    let [host_hidden, host_weight] = [&case.hidden, &case.weight].map(|tensor| tensor.to_device(&Device::Cpu).unwrap());
    let logits = host_hidden.matmul(&host_weight.t().unwrap()).unwrap();
    let logits: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
    let targets: Vec<u32> = case.targets.iter().map(|&target| u32::try_from(target).unwrap_or(IGNORED)).collect();
    for (label_smoothing, z_loss) in [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.3, 0.1)] {
        let options = Options { label_smoothing: label_smoothing as f32, z_loss: z_loss as f32 };
        let inputs = Inputs { options, ..Inputs::new(View::new(&logits, [rows, vocab]), &targets) };
        let exact = reference::losses(&inputs).unwrap().iter().sum::<f64>() / 18.0;
        let d_logits: Vec<f32> =
            reference::gradient(&inputs, 1.0 / 18.0).unwrap().into_iter().map(|x| x as f32).collect();
        let d_logits = Tensor::from_vec(d_logits, (rows, vocab), &Device::Cpu).unwrap();
        let d_hidden = d_logits.matmul(&host_weight).unwrap();
        let d_weight = d_logits.t().unwrap().matmul(&host_hidden).unwrap();
        for chunk_rows in [None, Some(8)] {
            let options = LossOptions { ignore_index: -7, label_smoothing, z_loss, chunk_rows };
            // The targets may lie anywhere, and be of another type.
            for targets in [case.targets(&Device::Cpu), case.targets(device)] {
                let loss = linear_cross_entropy(&hidden, &weight, &targets, &options).unwrap();
                let found = loss.backward().unwrap();
                let what = format!("{options:?}");
                assert!((values(&loss)[0] - exact).abs() <= SAME * exact, "{} for {exact}, {what}", values(&loss)[0]);
                let on_host = |tensor: &Tensor| found.get(tensor).unwrap().to_device(&Device::Cpu).unwrap();
                assert_close(&on_host(&hidden), &d_hidden, SAME_GRADIENTS, &what);
                assert_close(&on_host(&weight), &d_weight, SAME_GRADIENTS, &what);
            }
        }
    }
}

/// Products of half numbers. The weight's gradient is summed in `f32` and comes in the weight's type.
///
/// Logits, their gradient and that of the hidden states are rounded by half an epsilon, which the two factors of the last
/// share; 8 of them leave room for terms that cancel.
pub fn half_types(device: &Device) {
    let mut random = random();
    let case = Case::draw(&mut random, [300, 16, 13], device);
    let targets = case.targets(device);
    let [hidden, weight] = case.tracked([true, true]);
    let exact = linear_cross_entropy(&hidden, &weight, &targets, &chunked(64)).unwrap();
    let expected = exact.backward().unwrap();
    for (dtype, epsilon) in [(DType::BF16, 2f64.powi(-7)), (DType::F16, 2f64.powi(-10))] {
        for weight_dtype in [DType::F32, dtype] {
            let half = Case {
                hidden: case.hidden.to_dtype(dtype).unwrap(),
                weight: case.weight.to_dtype(weight_dtype).unwrap(),
                targets: case.targets.clone(),
            };
            let [half_hidden, half_weight] = half.tracked([true, true]);
            let loss = linear_cross_entropy(&half_hidden, &half_weight, &targets, &chunked(64)).unwrap();
            assert_close(&loss, &exact, 2.0 * epsilon, "loss");
            // As a loss that is scaled so that nothing vanishes in f16.
            let found = (loss * 1024.0).unwrap().backward().unwrap();
            for (ours, theirs, dtype) in [(&half_hidden, &hidden, dtype), (&half_weight, &weight, weight_dtype)] {
                let gradient = found.get(ours).unwrap();
                assert_eq!(gradient.dtype(), dtype);
                let expected = (expected.get(theirs).unwrap() * 1024.0).unwrap();
                assert_close(gradient, &expected, 8.0 * epsilon, &format!("{dtype:?}, {weight_dtype:?}"));
            }
        }
    }
}

fn model_on(config: &LanguageModelConfig, variables: &VarMap, dtype: DType, device: &Device) -> LanguageModel {
    LanguageModel::new(config, VarBuilder::from_varmap(variables, dtype, device)).unwrap()
}

/// Gradients by name.
fn gradients(variables: &VarMap, loss: &Tensor) -> BTreeMap<String, Tensor> {
    let found: GradStore = loss.backward().unwrap();
    let variables = variables.data().lock().unwrap();
    let get = |(name, variable): (&String, &Var)| (name.clone(), found.get(variable).expect(name).clone());
    variables.iter().map(get).collect()
}

/// A model's loss and the gradients of all its parameters are those of the loss of its logits, tied or not, in every mix of
/// types.
///
/// Of `f32` within what two orders of sums differ by. In half types logits and their gradient are rounded on both ways, the
/// last once more in the middle on one, and the backbone carries on what differs: as much as `mixed` grants half models beside
/// those of `f32`.
pub fn models_lose_what_their_logits_do(device: &Device) {
    let mut random = random();
    let mamba = MambaConfig { d_inner: 20, d_state: 5, d_conv: 3, dt_rank: 3, ..MambaConfig::new(12) };
    for tie_embeddings in [true, false] {
        let config = LanguageModelConfig { tie_embeddings, ..LanguageModelConfig::with_mixer(11, 2, mamba.clone()) };
        let masters = VarMap::new();
        model_on(&config, &masters, DType::F32, device);
        let draw = |random: &mut StdRng, shape: &[usize]| {
            let ids: Vec<u32> = (0..shape.iter().product()).map(|_| random.random_range(0..11)).collect();
            Tensor::from_vec(ids, shape, device).unwrap()
        };
        let (ids, targets) = (draw(&mut random, &[3, 17]), draw(&mut random, &[3, 17]));
        for (dtype, on) in
            [(DType::F32, DType::F32), (DType::BF16, DType::F32), (DType::BF16, DType::BF16), (DType::F16, DType::F32)]
        {
            let variables = VarMap::new();
            for (name, variable) in masters.data().lock().unwrap().iter() {
                // Larger, so that the logits say something; of three times as much the stream leaves the range of f16.
                let values = (variable.as_tensor() * 1.5).unwrap().to_dtype(on).unwrap();
                variables.data().lock().unwrap().insert(name.clone(), Var::from_tensor(&values).unwrap());
            }
            let model = model_on(&config, &variables, dtype, device);
            let epsilon = match dtype {
                DType::F32 => 0.0,
                DType::BF16 => 2f64.powi(-7),
                _ => 2f64.powi(-10),
            };
            let tolerance = |exact: f64, roundings: f64| exact.max(roundings * epsilon / 2.0);
            let plain = cross_entropy(&model.forward(&ids).unwrap(), &targets).unwrap();
            let expected = gradients(&variables, &plain);
            for options in [LossOptions::default(), chunked(7)] {
                let what = format!("{dtype:?} on {on:?}, tied {tie_embeddings}, {options:?}");
                let loss = model.loss(&ids, &targets, &options).unwrap();
                assert_close(&loss, &plain, tolerance(SAME, 4.0), &what);
                for (name, gradient) in gradients(&variables, &loss) {
                    let expected = &expected[&name];
                    assert_eq!(gradient.dtype(), on, "{name}, {what}");
                    let error = relative_error(&gradient, expected);
                    let granted = tolerance(SAME_GRADIENTS, 16.0 * 40f64.sqrt());
                    assert!(error <= granted, "{name}: error {error:.1e}, {what}");
                }
                // Without variables there is nothing to keep, and the same loss.
                let detached = model.detach().unwrap().loss(&ids, &targets, &options).unwrap();
                assert!(!detached.track_op());
                assert_eq!(bits(&detached), bits(&loss), "{what}");
            }
        }
    }
}

#[test]
fn it_agrees_with_plain_operators() {
    agrees_with_plain_operators(&Device::Cpu);
}

#[test]
fn it_agrees_with_the_reference() {
    agrees_with_the_reference(&Device::Cpu);
}

#[test]
fn it_takes_half_types() {
    half_types(&Device::Cpu);
}

#[test]
fn models_lose_what_their_logits_do_on_the_processor() {
    models_lose_what_their_logits_do(&Device::Cpu);
}

/// A packed batch loses the mean over the tokens of all its sequences, each as it is alone.
#[test]
fn packed_sequences_lose_what_each_does_alone() {
    let mut random = random();
    let (model, _) = super::model(&super::causal_blocks()[0].1, &mut random);
    let length = 30;
    let (ids, cu_seqlens) = (super::ids(&mut random, 1, length), cuts(&mut random, length));
    let mut targets: Vec<i64> = (0..length).map(|_| random.random_range(0..11)).collect();
    // The last token of each sequence predicts nothing, but for the first, so that there is one in any case.
    cu_seqlens[2..].iter().for_each(|end| targets[end - 1] = -100);
    let targets = Tensor::from_vec(targets, (1, length), &Device::Cpu).unwrap();
    let options = LossOptions { z_loss: 0.01, ..chunked(7) };
    let packed = model.loss_packed(&ids, &cu_seqlens, &targets, &options).unwrap();
    let (mut sum, mut count) = (0.0, 0);
    for ends in cu_seqlens.windows(2) {
        let part = |tensor: &Tensor| tensor.narrow(1, ends[0], ends[1] - ends[0]).unwrap();
        let valid = part(&targets).flatten_all().unwrap().to_vec1::<i64>().unwrap().iter().filter(|x| **x >= 0).count();
        sum += values(&model.loss(&part(&ids), &part(&targets), &options).unwrap())[0] * valid as f64;
        count += valid;
    }
    let (got, expected) = (values(&packed)[0], sum / count as f64);
    assert!((got - expected).abs() <= SAME * expected, "{got} for {expected}");
}

/// Nothing to learn: neither a number that is none, nor a gradient.
#[test]
fn a_batch_of_padding_does_no_harm() {
    let mut random = random();
    let case = Case::draw(&mut random, [5, 4, 7], &Device::Cpu);
    let [hidden, weight] = case.tracked([true, true]);
    let targets = Tensor::new(&[-100i64; 5], &Device::Cpu).unwrap();
    let loss = linear_cross_entropy(&hidden, &weight, &targets, &LossOptions::default()).unwrap();
    let found = loss.backward().unwrap();
    for tensor in [&loss, found.get(&hidden).unwrap(), found.get(&weight).unwrap()] {
        assert!(values(tensor).iter().all(|&x| x == 0.0), "{tensor}");
    }
}

/// 2,000 rows and 500 tokens are 4 MB of logits, of which there are 32 KB at a time. What else there is: the two gradients,
/// the losses (and all of them as f64), and 128 KiB for whatever else.
#[test]
fn there_is_a_chunk_of_logits_at_a_time() {
    let mut random = random();
    let [rows, d_model, vocab] = [2000, 16, 500];
    let case = Case::draw(&mut random, [rows, d_model, vocab], &Device::Cpu);
    let [hidden, weight] = case.tracked([true, true]);
    let targets = case.targets(&Device::Cpu);
    let run = || linear_cross_entropy(&hidden, &weight, &targets, &chunked(16)).unwrap();
    run();
    let (peak, _) = peak_of(run);
    let needed = 4 * (rows * d_model + vocab * d_model + 16 * vocab) + rows * (4 + 4 + 8 + 4);
    assert!(peak <= needed + (128 << 10), "{peak} bytes, where {needed} are needed");
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut random = random();
    let case = Case::draw(&mut random, [6, 4, 7], &Device::Cpu);
    let (hidden, weight, targets) = (&case.hidden, &case.weight, &case.targets(&Device::Cpu));
    let options = LossOptions::default();
    let refused = |hidden: &Tensor, weight: &Tensor, targets: &Tensor, options: &LossOptions| {
        refusal(linear_cross_entropy(hidden, weight, targets, options))
    };
    let int = |targets: [i64; 6]| Tensor::new(&targets, &Device::Cpu).unwrap();
    let f64s = hidden.to_dtype(DType::F64).unwrap();
    let none = hidden.narrow(0, 0, 0).unwrap();
    for (message, expected) in [
        (
            refused(hidden, weight, &int([0, 1, 2, 7, 0, 0]), &options),
            "`targets`: expected tokens from 0 to 6, or -100 for those that are left out, got 7 at [3]",
        ),
        (refused(hidden, weight, &int([0, -1, 2, 3, 0, 0]), &options), "got -1 at [1]"),
        (
            refused(hidden, weight, &targets.narrow(0, 0, 5).unwrap(), &options),
            "`targets`: expected shape [6], got [5]",
        ),
        (refused(hidden, weight, hidden, &options), "`targets`: expected shape [6], got [6, 4]"),
        (
            refused(hidden, weight, &hidden.narrow(1, 0, 1).unwrap().squeeze(1).unwrap(), &options),
            "`targets`: expected int",
        ),
        (refused(&none, weight, &targets.narrow(0, 0, 0).unwrap(), &options), "`targets`: expected at least one token"),
        (
            refused(hidden, &weight.narrow(1, 0, 3).unwrap(), targets, &options),
            "`weight`: expected shape (vocab, d_model) with",
        ),
        (
            refused(hidden, &weight.narrow(0, 0, 0).unwrap(), targets, &options),
            "`weight`: expected a vocabulary of at least",
        ),
        (
            refused(hidden, &weight.flatten_all().unwrap(), targets, &options),
            "`weight`: expected shape (vocab, d_model), got",
        ),
        (refused(&f64s, weight, targets, &options), "`dtype`: expected f32, f16 or bf16, got f64"),
        (refused(hidden, weight, targets, &chunked(0)), "`chunk_rows`: expected at least one row, got 0"),
        (
            refused(hidden, weight, targets, &LossOptions { label_smoothing: 2.0, ..options.clone() }),
            "`label_smoothing`: expected a number from 0 to 1, got 2",
        ),
        (
            refused(hidden, weight, targets, &LossOptions { z_loss: -1.0, ..options.clone() }),
            "`z_loss`: expected a finite number of 0 or more, got -1",
        ),
    ] {
        assert!(message.contains(expected), "{message} for {expected}");
    }
    // Of a model too, before it computes anything.
    let (model, _) = super::model(&super::causal_blocks()[0].1, &mut random);
    let ids = super::ids(&mut random, 1, 6);
    let message = refusal(model.loss(&ids, &int([0, 1, 2, 3, 11, 5]).unsqueeze(0).unwrap(), &options));
    assert!(
        message.contains("`targets`: expected tokens from 0 to 10") && message.contains("got 11 at [0, 4]"),
        "{message}"
    );
    let message = refusal(model.loss(&ids, targets, &options));
    assert!(message.contains("`targets`: expected shape [1, 6], got [6]"), "{message}");
}
