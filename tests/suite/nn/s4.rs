//! Layers and models of S4.

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use selective_scan::lti::Rule;
use selective_scan::lti::hippo::{Initial, Measure};
use selective_scan::nn::train::{AdamW, AdamWConfig, Group};
use selective_scan::nn::{S4Head, S4Layer, S4Model, S4ModelConfig, S4System, s4_group};

use super::{random, refusal, relative_error, tensor};

/// Every kind of system.
fn systems() -> Vec<S4System> {
    let diagonal = |initial, rule| S4System::Diagonal { initial, rule };
    vec![
        diagonal(Initial::Lin, Rule::ZeroOrderHold),
        diagonal(Initial::LegS, Rule::Bilinear),
        diagonal(Initial::Inv, Rule::ZeroOrderHold),
        diagonal(Initial::Real, Rule::ZeroOrderHold),
        S4System::LowRank { measure: Measure::LegS, kernel_length: 40 },
        S4System::LowRank { measure: Measure::LegT, kernel_length: 40 },
        S4System::LowRank { measure: Measure::Fourier, kernel_length: 40 },
    ]
}

fn config(system: S4System, head: S4Head) -> S4ModelConfig {
    let mut config = S4ModelConfig::new(2, 3, 2, 8);
    config.layer.d_state = 4;
    config.layer.system = system;
    config.head = head;
    config
}

fn model(config: &S4ModelConfig) -> (S4Model, VarMap) {
    let variables = VarMap::new();
    let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    (S4Model::new(config, vb).unwrap(), variables)
}

/// Step by step is the whole sequence. Both are within 1e-5 of the same system; what stands between them, norms and
/// matrices, keeps errors at their size.
#[test]
fn steps_are_the_sequence() {
    let mut random = random();
    for system in systems() {
        for head in [S4Head::PerStep, S4Head::Pooled] {
            let (model, _) = model(&config(system, head));
            let x = tensor(&mut random, &[3, 33, 2], 1.0);
            let mut state = model.new_state(3).unwrap();
            let steps: Vec<Tensor> = (0..33)
                .map(|t| model.step(&x.narrow(1, t, 1).unwrap().squeeze(1).unwrap(), &mut state, None).unwrap())
                .collect();
            assert_eq!(state.steps(), if head == S4Head::Pooled { [33; 3] } else { [0; 3] });
            let (got, want) = match head {
                S4Head::PerStep => (Tensor::stack(&steps, 1).unwrap(), model.forward(&x).unwrap()),
                _ => (steps[32].clone(), model.forward(&x).unwrap()),
            };
            let error = relative_error(&got, &want);
            assert!(error < 1e-4, "{system:?}, {head:?}: {error:e}");
        }
    }
}

/// Several sequences in a pool of slots, which begin at different times and come in any order, among padding: each gives the
/// numbers of the same sequence alone, and the slots that a step does not name stay as they are. What is alone goes through
/// products of other sizes, whose sums round elsewhere, by 1e-6 of them.
#[test]
fn sequences_in_slots_are_sequences_alone() {
    let mut random = random();
    for system in systems() {
        for head in [S4Head::PerStep, S4Head::Pooled] {
            let (model, _) = model(&config(system, head));
            let what = format!("{system:?}, {head:?}");
            let x = tensor(&mut random, &[3, 12, 2], 1.0);
            let at = |row: usize, t: usize| x.narrow(0, row, 1).unwrap().narrow(1, t, 1).unwrap().squeeze(1).unwrap();
            let mut alone = Vec::new();
            for row in 0..3 {
                let mut state = model.new_state(1).unwrap();
                let steps: Vec<Tensor> = (0..12).map(|t| model.step(&at(row, t), &mut state, None).unwrap()).collect();
                alone.push(steps);
            }
            let mut pool = model.new_state(5).unwrap();
            assert_eq!(pool.slots(), 5);
            // Something was there before.
            model.step(&tensor(&mut random, &[5, 2], 1.0), &mut pool, None).unwrap();
            pool.reset(Some(&[4, 0, -1, 2])).unwrap();
            let untouched = |pool: &selective_scan::nn::S4State| -> Vec<Vec<f32>> {
                let slot = |tensor: &Tensor| tensor.get(3).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                pool.layers().iter().map(slot).collect()
            };
            let before = untouched(&pool);
            // Sequence 1 begins two steps later, and sequence 2 ends before the others.
            let slots = [4, 0, 2];
            let mut done = [0; 3];
            for t in 0..14 {
                let rows: Vec<usize> =
                    [2, 0, 1].into_iter().filter(|&row| (row != 1 || t >= 2) && done[row] < 12).collect();
                let mut inputs: Vec<Tensor> = rows.iter().map(|&row| at(row, done[row])).collect();
                let mut used: Vec<i32> = rows.iter().map(|&row| slots[row]).collect();
                inputs.insert(1, tensor(&mut random, &[1, 2], 1.0));
                used.insert(1, -1);
                let out = model.step(&Tensor::cat(&inputs, 0).unwrap(), &mut pool, &used).unwrap();
                for (i, &row) in rows.iter().enumerate() {
                    let got = out.narrow(0, if i == 0 { 0 } else { i + 1 }, 1).unwrap();
                    let error = relative_error(&got, &alone[row][done[row]]);
                    assert!(error < 1e-5, "{what}: sequence {row} at {}: {error:e}", done[row]);
                    done[row] += 1;
                }
            }
            assert_eq!(untouched(&pool), before, "{what}");
            let refused = |pool: &mut _, slots: &[i32]| {
                refusal(model.step(&x.narrow(1, 0, 1).unwrap().squeeze(1).unwrap(), pool, slots))
            };
            assert!(refused(&mut pool, &[0, 5, 1]).starts_with("`slots`"), "{what}");
            assert!(refused(&mut pool, &[0, 1]).starts_with("`slots`"), "{what}");
            assert!(refused(&mut pool, &[0, 1, 1]).starts_with("`slots`"), "{what}");
            assert!(refusal(pool.reset(Some(&[5]))).starts_with("`slots`"), "{what}");
        }
    }
}

/// A sequence in parts is the whole, with the gradients of a loss over all its outputs (or the last, of a pooled head) by every
/// parameter and by the input. State and outputs are rounded to 2^-24 at each cut, and transforms of another length round
/// elsewhere, at 1e-6 of the largest output.
#[test]
fn parts_are_the_whole_with_gradients() {
    let mut random = random();
    for system in systems() {
        for head in [S4Head::PerStep, S4Head::Pooled] {
            let (model, _) = model(&config(system, head));
            let x = candle_core::Var::from_tensor(&tensor(&mut random, &[2, 30, 2], 1.0)).unwrap();
            for cuts in [vec![0, 30], vec![0, 1, 30], vec![0, 11, 11, 24, 30]] {
                let what = format!("{system:?}, {head:?}, {cuts:?}");
                let mut carry = model.new_carry(2).unwrap();
                let mut outs = Vec::new();
                for part in cuts.windows(2) {
                    let part = x.narrow(1, part[0], part[1] - part[0]).unwrap();
                    let (out, after) = model.forward_from(&part, &carry).unwrap();
                    outs.push(out);
                    carry = after;
                }
                assert_eq!(carry.steps(), 30);
                let (got, want) = match head {
                    S4Head::PerStep => (Tensor::cat(&outs, 1).unwrap(), model.forward(&x).unwrap()),
                    _ => (outs.pop().unwrap(), model.forward(&x).unwrap()),
                };
                let error = relative_error(&got, &want);
                assert!(error < 1e-5, "{what}: {error:e}");
                let slopes = tensor(&mut random, want.dims(), 1.0);
                let gradients = |out: &Tensor| (out * &slopes).unwrap().sum_all().unwrap().backward().unwrap();
                let (got, want) = (gradients(&got), gradients(&want));
                let mut all = model.named_tensors();
                all.push(("x".into(), x.as_tensor().clone()));
                for (name, tensor) in all {
                    let error = relative_error(got.get(&tensor).unwrap(), want.get(&tensor).unwrap());
                    assert!(error < 1e-4, "{what}: {name}: {error:e}");
                }
                // And step by step from there on.
                let next = tensor(&mut random, &[2, 1, 2], 1.0);
                let mut state = model.state_from(&carry.detach()).unwrap();
                let stepped = model.step(&next.squeeze(1).unwrap(), &mut state, None).unwrap();
                let (out, _) = model.forward_from(&next, &carry).unwrap();
                let out = if head == S4Head::PerStep { out.squeeze(1).unwrap() } else { out };
                let error = relative_error(&stepped, &out);
                assert!(error < 1e-4, "{what}: {error:e}");
            }
        }
    }
    let mut both = config(systems()[0], S4Head::PerStep);
    both.layer.bidirectional = true;
    assert!(refusal(model(&both).0.new_carry(1)).starts_with("`bidirectional`"));
}

/// One direction sees nothing of later steps, two directions do.
#[test]
fn two_directions_see_both_ways() {
    let mut random = random();
    for system in systems() {
        for bidirectional in [false, true] {
            let mut config = config(system, S4Head::PerStep);
            config.layer.bidirectional = bidirectional;
            let (model, _) = model(&config);
            let x = tensor(&mut random, &[1, 20, 2], 1.0);
            let other = Tensor::cat(&[x.narrow(1, 0, 19).unwrap(), tensor(&mut random, &[1, 1, 2], 1.0)], 1).unwrap();
            let early = |x: &Tensor| model.forward(x).unwrap().narrow(1, 0, 10).unwrap();
            let error = relative_error(&early(&other), &early(&x));
            // Through transforms all outputs are rounded together, at 1e-6.
            assert!((error > 1e-4) == bidirectional, "{system:?}, {bidirectional}: {error:e}");
            assert_eq!(model.new_state(1).is_err(), bidirectional, "{system:?}");
        }
    }
}

/// Every parameter of every kind of model has a gradient, and steps along it lower a loss: that of telling apart slow
/// from fast waves, from 0.69 to less than half of that.
#[test]
fn models_learn() {
    for (i, system) in systems().into_iter().enumerate() {
        let mut config = config(system, S4Head::Pooled);
        (config.d_input, config.d_output, config.layer.bidirectional) = (1, 2, i % 2 == 1);
        let (model, variables) = model(&config);
        let wave =
            |row: usize, t: usize| ((if row.is_multiple_of(2) { 0.3 } else { 0.9 }) * t as f32 + row as f32).sin();
        let x: Vec<f32> = (0..16 * 40).map(|at| wave(at / 40, at % 40)).collect();
        let x = Tensor::from_vec(x, (16, 40, 1), &Device::Cpu).unwrap();
        let classes = Tensor::from_vec((0..16u32).map(|row| row % 2).collect(), 16, &Device::Cpu).unwrap();
        let mut optimizer =
            AdamW::with_groups(&variables, AdamWConfig::default(), |name| s4_group(name, 0.1, 0.01)).unwrap();
        let loss = || candle_nn::loss::cross_entropy(&model.forward(&x).unwrap(), &classes).unwrap();
        let gradients = loss().backward().unwrap();
        for (name, parameter) in model.named_tensors() {
            assert!(gradients.get(&parameter).is_some(), "{system:?}: no gradient for {name}");
        }
        for _ in 0..30 {
            optimizer.step(&loss().backward().unwrap(), 0.01).unwrap();
        }
        let last = loss().to_scalar::<f32>().unwrap();
        assert!(last < 0.35, "{system:?}: {last}");
    }
}

#[test]
fn systems_are_a_group_of_their_own() {
    let (model, _) = model(&config(S4System::LowRank { measure: Measure::LegS, kernel_length: 8 }, S4Head::Pooled));
    let system = Group { learning_rate: 0.1, weight_decay: 0.0 };
    let (matrix, rest) =
        (Group { learning_rate: 1.0, weight_decay: 0.05 }, Group { learning_rate: 1.0, weight_decay: 0.0 });
    let names: Vec<String> = model.named_tensors().into_iter().map(|(name, _)| name).collect();
    let of = |name: &str| {
        assert!(names.iter().any(|other| other == name), "{name} is none of {names:?}");
        s4_group(name, 0.1, 0.05)
    };
    for name in ["log_delta", "log_a_real", "a_imag", "p", "b"] {
        assert_eq!(of(&format!("layers.1.ssm.{name}")), system, "{name}");
    }
    for name in ["encoder.weight", "layers.0.ssm.out_proj.weight", "head.weight"] {
        assert_eq!(of(name), matrix, "{name}");
    }
    for name in ["layers.0.ssm.c", "layers.0.ssm.d", "layers.0.norm.weight", "norm_f.weight", "head.bias"] {
        assert_eq!(of(name), rest, "{name}");
    }
}

#[test]
fn what_makes_no_model_is_named() {
    let vb = || VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let good = config(S4System::LowRank { measure: Measure::LegS, kernel_length: 8 }, S4Head::Pooled);
    let refused = |change: &dyn Fn(&mut S4ModelConfig)| {
        let mut config = good.clone();
        change(&mut config);
        refusal(S4Model::new(&config, vb()))
    };
    assert_eq!(refused(&|config| config.d_input = 0), "`d_input`: expected at least 1, got 0");
    assert_eq!(refused(&|config| config.layer.d_state = 257), "`d_state`: expected from 1 to 256, got 257");
    assert_eq!(
        refused(&|config| config.layer.dt_min = 1.0),
        "`dt_min, dt_max`: expected positive step sizes in order, got 1 and 0.1"
    );
    let none = S4System::LowRank { measure: Measure::LegS, kernel_length: 0 };
    assert_eq!(refused(&|config| config.layer.system = none), "`kernel_length`: expected at least 1, got 0");
    let (model, _) = model(&good);
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let text = "`x`: expected 8 steps at most, as kernels have, got 9";
    assert_eq!(refusal(model.forward(&zeros(&[1, 9, 2]))), text);
    let text = "`x`: expected shape (batch, length, d_input) with d_input = 2, got [1, 8, 3]";
    assert_eq!(refusal(model.forward(&zeros(&[1, 8, 3]))), text);
    let text = "`x`: expected at least one step, to take the mean of, got 0";
    assert_eq!(refusal(model.forward(&zeros(&[1, 0, 2]))), text);
    let mut state = model.new_state(2).unwrap();
    let text = "`state`: expected one slot for each of 3 batch rows, since no `slots` are given, got 2 slots";
    assert_eq!(refusal(model.step(&zeros(&[3, 2]), &mut state, None)), text);
    let layer = S4Layer::new(&good.layer, vb()).unwrap();
    let text = "`x`: expected shape (batch, length, d_model) with d_model = 8, got [1, 8, 2]";
    assert_eq!(refusal(layer.forward(&zeros(&[1, 8, 2]))), text);
}
