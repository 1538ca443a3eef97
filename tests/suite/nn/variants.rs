//! What the variants of a block mean, and that they train.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss};
use selective_scan::nn::{CheckpointFormat, LanguageModel, LanguageModelConfig, Mamba, MambaConfig, Norms};

use super::{SAME, all_blocks, assert_close, bits, block, ids, model, random, refusal, relative_error, tensor, values};

/// A step along a random direction changes the loss by the gradient's share of it.
///
/// The difference of two losses at ±ε misses the slope by ε²/6 of the third derivative, and by the rounding of the outputs:
/// 1e-7 of each, a few 1e-6 of their sum, which is taken in `f64`. With steps of 0.003 in parameters of size 0.3 that is some
/// 1e-3 of the slope along a direction that has its share of the gradient, 1/√n of n dimensions. A direction may happen to
/// have less, so it is against that share that the difference is held.
#[test]
fn gradients_are_slopes() {
    let mut random = random();
    for (name, config) in all_blocks() {
        let (block, variables) = block(&config, &mut random);
        let (x, weights) = (tensor(&mut random, &[2, 9, 12], 1.0), tensor(&mut random, &[2, 9, 12], 1.0));
        let products = || (block.forward(&x).unwrap() * &weights).unwrap();
        let gradients = products().sum_all().unwrap().backward().unwrap();
        for (parameter, variable) in variables.data().lock().unwrap().iter() {
            let gradient = gradients.get(variable).unwrap_or_else(|| panic!("{name}: no gradient for {parameter}"));
            let step = tensor(&mut random, variable.dims(), 0.003);
            let at = variable.as_tensor().copy().unwrap();
            let [above, below] = [1.0, -1.0].map(|sign| {
                variable.set(&(&at + (&step * sign).unwrap()).unwrap()).unwrap();
                values(&products()).iter().sum::<f64>()
            });
            variable.set(&at).unwrap();
            let slope: f64 = 2.0 * values(gradient).iter().zip(values(&step)).map(|(g, step)| g * step).sum::<f64>();
            let norm = |tensor: &Tensor| values(tensor).iter().map(|x| x * x).sum::<f64>().sqrt();
            let share = 2.0 * norm(gradient) * norm(&step) / (step.elem_count() as f64).sqrt();
            assert!(share > 0.0, "{name}: the gradient of {parameter} is zero");
            let (error, bound) = ((above - below - slope).abs(), 0.02 * share + 1e-5);
            assert!(error <= bound, "{name}, {parameter}: {} and {slope}, {error:.1e} apart", above - below);
        }
    }
}

/// Turning the input round and giving each direction the other's parameters turns the output round.
#[test]
fn the_second_direction_is_the_first_reversed() {
    let mut random = random();
    for (name, config) in all_blocks().into_iter().filter(|(_, config)| config.bidirectional) {
        let (block, variables) = block(&config, &mut random);
        let tensors: HashMap<_, _> =
            variables.data().lock().unwrap().iter().map(|(k, v)| (k.clone(), v.as_tensor().clone())).collect();
        let other = |name: &str| {
            let (first, rest) = name.split_once('.').map_or((name, String::new()), |(a, b)| (a, format!(".{b}")));
            match first {
                "in_proj" | "out_proj" => name.to_string(),
                "A_log" => "A_b_log".to_string(),
                "A_b_log" => "A_log".to_string(),
                _ => match first.strip_suffix("_b") {
                    Some(first) => first.to_string() + &rest,
                    None => format!("{first}_b{rest}"),
                },
            }
        };
        let swapped = tensors.keys().map(|name| (name.clone(), tensors[&other(name)].clone())).collect();
        let vb = VarBuilder::from_tensors(swapped, DType::F32, &Device::Cpu);
        let swapped = Mamba::new(block.config(), vb).unwrap();
        let x = tensor(&mut random, &[2, 13, 12], 1.0);
        let turned = swapped.forward(&x.flip(&[1]).unwrap()).unwrap().flip(&[1]).unwrap();
        let out = block.forward(&x).unwrap();
        assert_close(&turned, &out, SAME, name);
        // The first output depends on the last input, here of a few, since states forget; and the two directions are not one.
        let first = |length| {
            let x = x.narrow(1, 0, length).unwrap().contiguous().unwrap();
            block.forward(&x).unwrap().narrow(1, 0, 1).unwrap()
        };
        assert!(relative_error(&first(2), &first(3)) > 1e-4, "{name}");
        assert!(relative_error(&swapped.forward(&x).unwrap(), &out) > 1e-4, "{name}");
    }
}

/// Two directions are two blocks of one direction, of which the second reads from the end, added and, if requested, halved.
#[test]
fn two_directions_are_two_blocks() {
    let mut random = random();
    for (name, config) in all_blocks().into_iter().filter(|(_, config)| config.bidirectional) {
        let (block, variables) = block(&config, &mut random);
        let tensors: HashMap<_, _> =
            variables.data().lock().unwrap().iter().map(|(k, v)| (k.clone(), v.as_tensor().clone())).collect();
        let second = |name: &str| match name.split_once('.') {
            _ if name == "A_log" => "A_b_log".to_string(),
            Some(("in_proj" | "out_proj", _)) => name.to_string(),
            Some((first, rest)) => format!("{first}_b.{rest}"),
            None => format!("{name}_b"),
        };
        let one = MambaConfig { bidirectional: false, average_directions: false, ..config.clone() };
        let build = |tensors| Mamba::new(&one, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)).unwrap();
        let swapped = tensors.keys().filter_map(|name| Some((name.clone(), tensors.get(&second(name))?.clone())));
        let (first, second) = (build(tensors.clone()), build(swapped.collect()));
        let x = tensor(&mut random, &[2, 13, 12], 1.0);
        let turned = second.forward(&x.flip(&[1]).unwrap()).unwrap().flip(&[1]).unwrap();
        let sum = (first.forward(&x).unwrap() + turned).unwrap();
        let expected = if config.average_directions { (sum / 2.0).unwrap() } else { sum };
        assert_close(&block.forward(&x).unwrap(), &expected, SAME, name);
    }
}

#[test]
fn averaging_is_written_and_read() {
    let mamba = MambaConfig { bidirectional: true, average_directions: true, ..MambaConfig::new(8) };
    let config = LanguageModelConfig::with_mixer(5, 1, mamba);
    let text = config.to_json(CheckpointFormat::HuggingFace).unwrap();
    assert_eq!(LanguageModelConfig::from_json(&text).unwrap(), config);
    let without: String = text.lines().filter(|line| !line.contains("average_directions")).collect();
    assert!(!MambaConfig::from_json(&without).unwrap().average_directions, "off where it is not said");
    refusal(config.to_json(CheckpointFormat::StateSpaces));
}

/// A time-invariant block is the convolution with the kernel Σ_n C_n exp(Δ A_n)^t Δ B_n of its input, written here with
/// loops in `f64`.
#[test]
fn a_time_invariant_block_is_a_convolution() {
    let mut random = random();
    let config = MambaConfig { selective: false, proj_bias: true, ..all_blocks()[0].1.clone() };
    let (block, variables) = block(&config, &mut random);
    let names: Vec<_> = variables.data().lock().unwrap().keys().cloned().collect();
    let p: HashMap<_, _> =
        names.iter().map(|name| (name.as_str(), values(variables.data().lock().unwrap()[name].as_tensor()))).collect();
    assert_eq!(p.len(), 11, "{names:?}");
    let (length, model, inner, state, taps) = (15, config.d_model, config.d_inner, config.d_state, config.d_conv);
    let x = tensor(&mut random, &[1, length, model], 1.0);
    let input = values(&x);
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let linear = |weight: &[f64], bias: &[f64], x: &[f64]| -> Vec<f64> {
        let rows = weight.chunks(x.len()).zip(bias);
        rows.map(|(row, bias)| bias + row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()).collect()
    };
    let xz: Vec<_> = input.chunks(model).map(|x| linear(&p["in_proj.weight"], &p["in_proj.bias"], x)).collect();
    let mut y = vec![vec![0.0; inner]; length];
    for channel in 0..inner {
        let u: Vec<_> = (0..length)
            .map(|t| {
                let tap = |k: usize| {
                    (t + k >= taps - 1).then(|| xz[t + k + 1 - taps][channel] * p["conv1d.weight"][channel * taps + k])
                };
                silu(p["conv1d.bias"][channel] + (0..taps).filter_map(tap).sum::<f64>())
            })
            .collect();
        let delta = p["dt_bias"][channel].exp().ln_1p();
        let kernel = |t: usize| -> f64 {
            let at = |n: usize| channel * state + n;
            let decay = |n: usize| (delta * -p["A_log"][at(n)].exp() * t as f64).exp();
            (0..state).map(|n| p["C"][at(n)] * decay(n) * delta * p["B"][at(n)]).sum()
        };
        for t in 0..length {
            let sum: f64 = (0..=t).map(|s| kernel(t - s) * u[s]).sum();
            y[t][channel] = (sum + p["D"][channel] * u[t]) * silu(xz[t][inner + channel]);
        }
    }
    let out: Vec<_> = y.iter().flat_map(|y| linear(&p["out_proj.weight"], &p["out_proj.bias"], y)).collect();
    let out = Tensor::from_vec(out, (1, length, model), &Device::Cpu).unwrap();
    assert_close(&block.forward(&x).unwrap(), &out, SAME, "convolution");
}

#[test]
fn every_variant_learns() {
    let mut random = random();
    for (name, config) in all_blocks() {
        let (model, variables) = model(&config, &mut random);
        let ids = ids(&mut random, 2, 12);
        // Say each token again, which any of them can.
        let target = ids.flatten_all().unwrap();
        let mut optimizer =
            AdamW::new(variables.all_vars(), ParamsAdamW { lr: 0.01, ..ParamsAdamW::default() }).unwrap();
        let mut losses = Vec::new();
        for _ in 0..40 {
            let logits = model.forward(&ids).unwrap().flatten(0, 1).unwrap();
            let loss = loss::cross_entropy(&logits, &target).unwrap();
            losses.push(values(&loss)[0]);
            optimizer.backward_step(&loss).unwrap();
        }
        assert!(losses[39] < 0.5 * losses[0], "{name}: {} to {}", losses[0], losses[39]);
    }
}

/// A copy without gradients shares the parameters, computes the same and records nothing.
#[test]
fn detached() {
    let mut random = random();
    for (name, config) in all_blocks() {
        let (model, variables) = model(&config, &mut random);
        let ids = ids(&mut random, 1, 7);
        assert!(model.forward(&ids).unwrap().track_op());
        let detached = model.detach().unwrap().forward(&ids).unwrap();
        assert!(!detached.track_op(), "{name}");
        assert_eq!(bits(&detached), bits(&model.forward(&ids).unwrap()), "{name}");
        for variable in variables.all_vars() {
            variable.set(&(variable.as_tensor() * 1.1).unwrap()).unwrap();
        }
        let after = [model.detach().unwrap(), model].map(|model| bits(&model.forward(&ids).unwrap()));
        assert_eq!(after[0], after[1], "{name}");
        assert_ne!(after[0], bits(&detached), "{name}");
    }
}

#[test]
fn sizes_that_make_no_model_are_refused() {
    let base = MambaConfig::new(8);
    let refused = |config: MambaConfig, word: &str| {
        let variables = VarMap::new();
        let message = refusal(Mamba::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)));
        assert!(message.contains(word), "{message}");
        assert!(variables.all_vars().is_empty(), "{word}: nothing is made");
    };
    refused(MambaConfig { d_model: 0, ..base.clone() }, "`d_model`");
    refused(MambaConfig { d_inner: 0, ..base.clone() }, "`d_inner`");
    refused(MambaConfig { dt_rank: 0, ..base.clone() }, "`dt_rank`");
    refused(MambaConfig { d_state: 257, ..base.clone() }, "1 to 256");
    refused(MambaConfig { d_conv: 9, ..base.clone() }, "2 to 8");
    refused(MambaConfig { dt_min: 0.2, ..base.clone() }, "dt_min <= dt_max");
    refused(MambaConfig { dt_min: f64::NAN, ..base.clone() }, "dt_min <= dt_max");
    refused(MambaConfig { dt_init_floor: 0.0, ..base.clone() }, "`dt_init_floor`");
    refused(MambaConfig { dt_scale: -1.0, ..base.clone() }, "`dt_scale`");
    refused(MambaConfig { average_directions: true, ..base.clone() }, "`average_directions`");
    let norms = Norms::Weighted { eps: 1e-6 };
    refused(MambaConfig { norms, selective: false, ..base.clone() }, "`norms`");
    refused(MambaConfig { norms: Norms::Unweighted { eps: -1.0 }, ..base }, "`norms`");
    let mut not_a_norm = LanguageModelConfig::new(5, 1, 8);
    not_a_norm.backbone.norm_eps = f64::NAN;
    for (config, word) in [
        (LanguageModelConfig::new(0, 1, 8), "`vocab_size`"),
        (LanguageModelConfig::new(5, 0, 8), "`n_layer`"),
        (not_a_norm, "`norm_eps`"),
    ] {
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
        assert!(refusal(LanguageModel::new(&config, vb)).contains(word));
    }
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu);
    assert!(refusal(LanguageModel::new(&LanguageModelConfig::new(5, 1, 8), vb)).contains("f32, f16 or bf16"));
    let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
    let x = Tensor::zeros((1, 2, 9), DType::F32, &Device::Cpu).unwrap();
    assert!(refusal(Mamba::new(&MambaConfig::new(8), vb).unwrap().forward(&x)).contains("(batch, length, 8)"));
}
