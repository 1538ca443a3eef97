//! A block, and layers one after the other, as one node of candle's graph, against the operators one by one.
//!
//! Each test is a function of the device; `gpu` calls them with another.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use rand::Rng;
use rand::rngs::StdRng;
use selective_scan::candle::{CausalConv, Scan};
use selective_scan::nn::train::LossOptions;
use selective_scan::nn::{LanguageModel, LanguageModelConfig, Mamba, MambaConfig, Norms};
use selective_scan::scan::CheckpointSteps;
use selective_scan::{conv, scan};

use super::{SAME, SAME_GRADIENTS, all_blocks, assert_close, bits, cuts, random, tensor, values};

type Parameters = BTreeMap<String, Tensor>;

/// A linear layer by candle's product.
fn linear(parameters: &Parameters, name: &str, x: &Tensor) -> Result<Tensor> {
    // candle's product on GPUs takes no ranges of columns.
    let out = x.contiguous()?.broadcast_matmul(&parameters[&format!("{name}.weight")].t()?)?;
    match parameters.get(&format!("{name}.bias")) {
        Some(bias) => out.broadcast_add(bias),
        None => Ok(out),
    }
}

fn norm(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let x = x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?)?;
    weight.map_or(Ok(x.clone()), |weight| x.broadcast_mul(weight))
}

/// One direction of a block, from the input of its convolution.
fn path(
    config: &MambaConfig,
    parameters: &Parameters,
    [x, z]: [&Tensor; 2],
    cu_seqlens: Option<&[usize]>,
    reverse: bool,
) -> Result<Tensor> {
    let suffix = if reverse { "_b" } else { "" };
    let get = |name: &str| parameters.get(name);
    let weight = &parameters[&format!("conv1d{suffix}.weight")];
    let bias = get(&format!("conv1d{suffix}.bias"));
    let options = conv::Options { silu: true, reverse };
    let u = CausalConv { bias, cu_seqlens, options, ..CausalConv::new(x, weight) }.forward()?;
    let a = parameters[if reverse { "A_b_log" } else { "A_log" }].exp()?.neg()?;
    let (delta, b, c, bias) = if config.selective {
        let columns = linear(parameters, &format!("x_proj{suffix}"), &u)?;
        let (rank, d_state) = (config.dt_rank, config.d_state);
        let ranges = [("dt", 0, rank), ("b", rank, d_state), ("c", rank + d_state, d_state)];
        let [dt, b, c] = ranges.map(|(name, start, len)| {
            let part = columns.narrow(2, start, len)?;
            match config.norms {
                Norms::Weighted { eps } => norm(&part, get(&format!("{name}_layernorm{suffix}.weight")), eps),
                Norms::Unweighted { eps } => norm(&part, None, eps),
                _ => Ok(part),
            }
        });
        let weight = &parameters[&format!("dt_proj{suffix}.weight")];
        (dt?.contiguous()?.broadcast_matmul(&weight.t()?)?, b?, c?, format!("dt_proj{suffix}.bias"))
    } else {
        let of = |name: &str| parameters[&format!("{name}{suffix}")].clone();
        (u.zeros_like()?, of("B"), of("C"), format!("dt_bias{suffix}"))
    };
    let options = scan::Options { delta_softplus: true, reverse, ..Default::default() };
    let (d, delta_bias) = (get(&format!("D{suffix}")), get(&bias));
    Scan { z: Some(z), d, delta_bias, cu_seqlens, options, ..Scan::new(&u, &delta, &a, &b, &c) }.forward()
}

/// A block by the operators, each a node of its own.
fn by_operators(
    config: &MambaConfig,
    parameters: &Parameters,
    x: &Tensor,
    cu_seqlens: Option<&[usize]>,
) -> Result<Tensor> {
    let xz = linear(parameters, "in_proj", x)?;
    let [x, z] = [xz.narrow(2, 0, config.d_inner)?, xz.narrow(2, config.d_inner, config.d_inner)?];
    let mut y = path(config, parameters, [&x, &z], cu_seqlens, false)?;
    if config.bidirectional {
        y = (y + path(config, parameters, [&x, &z], cu_seqlens, true)?)?;
        if config.average_directions {
            y = (y * 0.5)?;
        }
    }
    linear(parameters, "out_proj", &y)
}

/// A block of random parameters on a device, and these by name.
fn drawn(config: &MambaConfig, device: &Device, random: &mut StdRng) -> (Mamba, Parameters) {
    let (block, _) = super::block(config, random);
    let to_device = |tensor: &Tensor| Var::from_tensor(&tensor.to_device(device)?).map(|var| var.as_tensor().clone());
    let variables = VarMap::new();
    let parameters: Parameters =
        block.named_tensors().into_iter().map(|(name, tensor)| (name, to_device(&tensor).unwrap())).collect();
    for (name, parameter) in &parameters {
        variables.data().lock().unwrap().insert(name.clone(), Var::from_tensor(parameter).unwrap());
    }
    let block = Mamba::new(block.config(), VarBuilder::from_varmap(&variables, DType::F32, device)).unwrap();
    (block.map_parameters(|name, _| Ok(parameters[name].clone())).unwrap(), parameters)
}

fn gradients(out: &Tensor, d_out: &Tensor) -> GradStore {
    (out * d_out).unwrap().sum_all().unwrap().backward().unwrap()
}

/// Values and all gradients, of every variant, in a batch and packed, with what backward needs kept or computed again.
pub fn a_block_is_its_operators(device: &Device) {
    let mut random = random();
    for (name, config) in all_blocks() {
        for (recompute, checkpoint_steps) in [(true, CheckpointSteps::Every64), (false, CheckpointSteps::Every16)] {
            let config = MambaConfig { recompute, checkpoint_steps, ..config.clone() };
            let (block, parameters) = drawn(&config, device, &mut random);
            for packed in [false, true] {
                let (batch, length) = if packed { (1, 70) } else { (2, 35) };
                let cu_seqlens = packed.then(|| cuts(&mut random, length));
                let mut draw = || tensor(&mut random, &[batch, length, 12], 1.0).to_device(device).unwrap();
                let (x, d_out) = (Var::from_tensor(&draw()).unwrap(), draw());
                let what = format!("{name}, packed {packed}, recompute {recompute}");
                let got = match &cu_seqlens {
                    Some(cu_seqlens) => block.forward_packed(&x, cu_seqlens).unwrap(),
                    None => block.forward(&x).unwrap(),
                };
                let expected = by_operators(&config, &parameters, &x, cu_seqlens.as_deref()).unwrap();
                assert_close(&got, &expected, SAME, &what);
                let (got, expected) = (gradients(&got, &d_out), gradients(&expected, &d_out));
                for (parameter, tensor) in parameters.iter().chain([(&"x".to_string(), x.as_tensor())]) {
                    let gradient = got.get(tensor).unwrap_or_else(|| panic!("{what}: none of {parameter}"));
                    let what = format!("{what}: {parameter}");
                    assert_close(gradient, expected.get(tensor).unwrap(), SAME_GRADIENTS, &what);
                }
            }
        }
    }
}

/// Whichever parameters candle tracks get a gradient, the same bits as where it tracks all, and no others do.
pub fn subsets_of_parameters(device: &Device) {
    let mut random = random();
    for (name, config) in all_blocks() {
        let (block, parameters) = drawn(&config, device, &mut random);
        let mut draw = || tensor(&mut random, &[2, 9, 12], 1.0).to_device(device).unwrap();
        let (x, d_out) = (Var::from_tensor(&draw()).unwrap(), draw());
        let all = gradients(&block.forward(&x).unwrap(), &d_out);
        let count = parameters.len();
        // Each alone, none but the input, and some at random.
        let mut subsets: Vec<u64> = (0..count).map(|i| 1 << i).collect();
        subsets.extend([0, 1 << count]);
        subsets.extend((0..6).map(|_| random.random_range(1..2 << count)));
        for subset in subsets {
            let is_tracked = |i: usize| subset >> i & 1 == 1;
            let mut order = parameters.keys().enumerate();
            let tracked: BTreeMap<_, _> =
                parameters.keys().map(|name| (name, is_tracked(order.next().unwrap().0))).collect();
            let change = |name: &str, parameter: &Tensor| {
                Ok(if tracked[&name.to_string()] { parameter.clone() } else { parameter.detach() })
            };
            let block = block.map_parameters(change).unwrap();
            let input = if is_tracked(count) { x.as_tensor().clone() } else { x.detach() };
            let out = block.forward(&input).unwrap();
            assert_eq!(out.track_op(), subset != 0, "{name}, {subset:b}");
            if subset == 0 {
                continue;
            }
            let got = gradients(&out, &d_out);
            for (i, (parameter, tensor)) in parameters.iter().chain([(&"x".to_string(), x.as_tensor())]).enumerate() {
                let what = format!("{name}, {subset:b}: {parameter}");
                match got.get(tensor) {
                    Some(gradient) => assert_eq!(bits(gradient), bits(all.get(tensor).unwrap()), "{what}"),
                    None => assert!(!is_tracked(i), "{what}"),
                }
                assert!(is_tracked(i) || got.get(tensor).is_none(), "{what}");
            }
        }
    }
}

/// The layers of a model by plain operators around blocks by operators.
fn model_by_operators(model: &LanguageModel, parameters: &Parameters, ids: &Tensor) -> Result<Tensor> {
    let config = model.config();
    let within = |prefix: &str| -> Parameters {
        let stripped =
            |(name, tensor): (&String, &Tensor)| Some((name.strip_prefix(prefix)?.to_string(), tensor.clone()));
        parameters.iter().filter_map(stripped).collect()
    };
    let backbone = &config.backbone;
    let mixer = backbone.mixer.as_mamba().unwrap();
    let table = &parameters["backbone.embeddings.weight"];
    let mut stream = table.index_select(&ids.flatten_all()?, 0)?.reshape((ids.dim(0)?, ids.dim(1)?, mixer.d_model))?;
    for layer in 0..backbone.n_layer {
        let layer = within(&format!("backbone.layers.{layer}."));
        let block: Parameters = layer
            .iter()
            .filter_map(|(name, tensor)| Some((name.strip_prefix("mixer.")?.to_string(), tensor.clone())))
            .collect();
        let normed = norm(&stream, layer.get("norm.weight"), backbone.norm_eps)?;
        stream = (stream + by_operators(mixer, &block, &normed, None)?)?;
    }
    let normed = norm(&stream, parameters.get("backbone.norm_f.weight"), backbone.norm_eps)?;
    normed.broadcast_matmul(&parameters.get("lm_head.weight").unwrap_or(table).t()?)
}

/// All layers as one node, from the ids to the logits and back; then with gradients of the last layer alone.
pub fn layers_are_their_operators(device: &Device) {
    let mut random = random();
    for (name, config) in all_blocks() {
        let config = LanguageModelConfig::with_mixer(11, 3, MambaConfig { seed: random.random(), ..config });
        let variables = VarMap::new();
        let build =
            || LanguageModel::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)).unwrap();
        build();
        super::shake(&variables, &mut random);
        let parameters: Parameters = build()
            .named_tensors()
            .into_iter()
            .map(|(name, tensor)| {
                (name, Var::from_tensor(&tensor.to_device(device).unwrap()).unwrap().as_tensor().clone())
            })
            .collect();
        let on_device = VarMap::new();
        for (name, parameter) in &parameters {
            on_device.data().lock().unwrap().insert(name.clone(), Var::from_tensor(parameter).unwrap());
        }
        let model = LanguageModel::new(&config, VarBuilder::from_varmap(&on_device, DType::F32, device)).unwrap();
        let model = model.map_parameters(|name, _| Ok(parameters[name].clone())).unwrap();
        let ids = super::ids(&mut random, 2, 17).to_device(device).unwrap();
        let d_out = tensor(&mut random, &[2, 17, model.config().padded_vocab_size()], 1.0).to_device(device).unwrap();
        let (got, expected) = (model.forward(&ids).unwrap(), model_by_operators(&model, &parameters, &ids).unwrap());
        assert_close(&got, &expected, SAME, name);
        let (all, expected) = (gradients(&got, &d_out), gradients(&expected, &d_out));
        for (parameter, tensor) in &parameters {
            let what = format!("{name}: {parameter}");
            assert_close(all.get(tensor).unwrap(), expected.get(tensor).unwrap(), SAME_GRADIENTS, &what);
        }

        let is_last = |name: &str| name.starts_with("backbone.layers.2.");
        let last = model
            .map_parameters(|name, tensor| Ok(if is_last(name) { tensor.clone() } else { tensor.detach() }))
            .unwrap();
        let got = gradients(&last.forward(&ids).unwrap(), &d_out);
        for (parameter, tensor) in &parameters {
            let bits_of = |store: &GradStore| store.get(tensor).map(bits);
            let expected = if is_last(parameter) { bits_of(&all) } else { None };
            assert_eq!(bits_of(&got), expected, "{name}: {parameter}");
        }
    }
}

/// Large beside the rounding of gradients, of which AdamW would else make whole steps where a gradient is nothing but that.
const EPSILON: f64 = 1e-3;

/// What trains.
#[derive(Clone, Copy)]
enum Way {
    Nodes,
    Operators,
    /// By operators whose gradients are disturbed in every step, by so much of their own norm.
    Disturbed(f64),
}

/// A gradient beside which another lies, at random, as far away as `error` of its norm.
fn disturbed(gradient: &Tensor, error: f64, random: &mut StdRng) -> Tensor {
    let noise = tensor(random, gradient.dims(), 1.0).to_device(gradient.device()).unwrap();
    let norm = |x: &Tensor| values(&x.sqr().unwrap().sum_all().unwrap())[0].sqrt();
    // Of a few elements all may have been drawn near zero.
    let noise = (&noise * (error * norm(gradient) / norm(&noise).max(1e-3))).unwrap();
    (gradient + noise.to_dtype(gradient.dtype()).unwrap()).unwrap()
}

/// A model to train and what it learns.
struct Lesson {
    config: LanguageModelConfig,
    start: VarMap,
    ids: Tensor,
    next: Tensor,
}

const STEPS: usize = 200;
const RATE: f64 = 4e-4;

impl Lesson {
    fn new(random: &mut StdRng) -> Self {
        let device = &Device::Cpu;
        let mamba = MambaConfig { d_state: 4, seed: random.random(), ..MambaConfig::new(16) };
        let config = LanguageModelConfig { tie_embeddings: false, ..LanguageModelConfig::with_mixer(11, 2, mamba) };
        // A walk that goes on by 3 most of the time, so that there is something to learn and something to guess.
        let mut walk = vec![0u32];
        for _ in 0..64 {
            let step = if random.random_bool(0.8) { 3 } else { random.random_range(0..11) };
            walk.push((walk.last().unwrap() + step) % 11);
        }
        let text = |part: &[u32]| Tensor::new(part, device).unwrap().reshape((2, 32)).unwrap();
        let (ids, next) = (text(&walk[..64]), text(&walk[1..]));
        let start = VarMap::new();
        LanguageModel::new(&config, VarBuilder::from_varmap(&start, DType::F32, device)).unwrap();
        Self { config, start, ids, next }
    }

    /// The same on another device.
    fn on(&self, device: &Device) -> Self {
        let start = VarMap::new();
        for (name, variable) in self.start.data().lock().unwrap().iter() {
            let there = Var::from_tensor(&variable.as_tensor().to_device(device).unwrap()).unwrap();
            start.data().lock().unwrap().insert(name.clone(), there);
        }
        let [ids, next] = [&self.ids, &self.next].map(|ids| ids.to_device(device).unwrap());
        Self { config: self.config.clone(), start, ids, next }
    }

    /// The losses of steps of AdamW, always from the same values on, and Σ|gradient| at the first.
    fn train(&self, way: Way, dtype: DType, random: &mut StdRng) -> (Vec<f64>, f64) {
        let variables = VarMap::new();
        let mut named = Parameters::new();
        for (name, variable) in self.start.data().lock().unwrap().iter() {
            let copy = Var::from_tensor(&variable.as_tensor().copy().unwrap()).unwrap();
            named.insert(name.clone(), copy.as_tensor().clone());
            variables.data().lock().unwrap().insert(name.clone(), copy);
        }
        let builder = VarBuilder::from_varmap(&variables, dtype, self.ids.device());
        let model = LanguageModel::new(&self.config, builder).unwrap();
        // By name, so that a seed always gives the same disturbances.
        let all: Vec<_> = named.keys().map(|name| variables.data().lock().unwrap()[name].clone()).collect();
        let params = ParamsAdamW { lr: RATE, eps: EPSILON, weight_decay: 0.0, ..Default::default() };
        let mut optimizer = AdamW::new(all.clone(), params).unwrap();
        let (mut losses, mut slope) = (Vec::new(), 0.0);
        for step in 0..STEPS {
            let logits = match way {
                Way::Nodes => model.forward(&self.ids).unwrap(),
                Way::Operators | Way::Disturbed(_) => model_by_operators(&model, &named, &self.ids).unwrap(),
            };
            let logits = logits.to_dtype(DType::F32).unwrap().flatten(0, 1).unwrap();
            let loss = candle_nn::loss::cross_entropy(&logits, &self.next.flatten_all().unwrap()).unwrap();
            let mut store = loss.backward().unwrap();
            if step == 0 {
                let sum = |variable: &Var| values(&store.get(variable).unwrap().abs().unwrap().sum_all().unwrap())[0];
                slope = all.iter().map(sum).sum();
            }
            if let Way::Disturbed(error) = way {
                for variable in &all {
                    let gradient = disturbed(store.get(variable).unwrap(), error, random);
                    store.insert(variable, gradient);
                }
            }
            optimizer.step(&store).unwrap();
            losses.push(values(&loss)[0]);
        }
        (losses, slope)
    }
}

/// 200 steps of training by nodes, by the operators one by one, and by nodes in bf16 on the same `f32` variables.
///
/// AdamW moves no parameter by more than about its rate in a step, in a direction as exact as the gradient, of which the
/// error is known: `SAME_GRADIENTS` in f32, and in bf16 a few roundings of 2^-9, 2^-6 in all. So after t steps parameters
/// are apart by 2 t · rate · error at most (moments count it twice), and losses by Σ|gradient| times that, which is largest
/// at the beginning.
///
/// That holds where training does not magnify what lies between two runs. One of some hundred does: from one step to the next
/// it is 20 times as much then. So a training is drawn that keeps to its course if its gradients are disturbed by as much as
/// that error in every step: within a hundredth of the bound, which disturbances at random keep far from.
pub fn losses_of_training(device: &Device) {
    let mut random = random();
    let bound = |error: f64, step: usize, loss: f64, slope: f64| {
        // The first loss has the error of the values.
        error * loss + 2.0 * step as f64 * RATE * error * slope
    };
    let drawn = (0..10).find_map(|_| {
        let lesson = Lesson::new(&mut random);
        let (expected, slope) = lesson.train(Way::Operators, DType::F32, &mut random);
        let (others, _) = lesson.train(Way::Disturbed(SAME_GRADIENTS), DType::F32, &mut random);
        let mut losses = others.iter().zip(&expected).enumerate();
        let is_stable = losses.all(|(step, (other, &expected))| {
            (other - expected).abs() <= 1e-2 * bound(SAME_GRADIENTS, step, expected, slope)
        });
        is_stable.then_some(lesson)
    });
    let lesson = drawn.expect("one of ten trainings keeps to its course").on(device);
    let (expected, slope) = lesson.train(Way::Operators, DType::F32, &mut random);
    assert!(expected[STEPS - 1] < 0.7 * expected[0], "{} to {}: it learns nothing", expected[0], expected[STEPS - 1]);
    for (dtype, error) in [(DType::F32, SAME_GRADIENTS), (DType::BF16, 2f64.powi(-6))] {
        let (got, _) = lesson.train(Way::Nodes, dtype, &mut random);
        for (step, (got, &expected)) in got.iter().zip(&expected).enumerate() {
            let tolerance = bound(error, step, expected, slope);
            assert!(
                (got - expected).abs() <= tolerance,
                "{dtype:?}, step {step}: {got} for {expected} ± {tolerance:.1e}"
            );
        }
    }
}

/// Without gradients a model gives what it gives with them, to the bit, in a batch and packed; and a packed sequence what it
/// gets alone.
pub fn without_gradients_the_same(device: &Device) {
    let mut random = random();
    for dtype in [DType::F32, DType::BF16] {
        // What the fast kernels take, in sequences that are split on a GPU and others that are not.
        let mamba = MambaConfig { seed: random.random(), ..MambaConfig::new(16) };
        let config = LanguageModelConfig::with_mixer(11, 2, mamba);
        let variables = VarMap::new();
        let model = LanguageModel::new(&config, VarBuilder::from_varmap(&variables, dtype, device)).unwrap();
        let detached = model.detach().unwrap();
        let ids = super::ids(&mut random, 1, 600).to_device(device).unwrap();
        // What it is given it leaves as it is, though it adds to the residual stream in place.
        let embeddings = detached.embed(&ids).unwrap();
        let before = bits(&embeddings);
        detached.forward_embeddings(&embeddings).unwrap();
        assert_eq!(bits(&embeddings), before, "{dtype:?}: the input");
        let cu_seqlens = [0, 330, 340, 341, 600];
        let packed = model.forward_packed(&ids, &cu_seqlens).unwrap();
        assert_eq!(bits(&detached.forward_packed(&ids, &cu_seqlens).unwrap()), bits(&packed), "{dtype:?}, packed");
        for ends in cu_seqlens.windows(2) {
            let part = |x: &Tensor| x.narrow(1, ends[0], ends[1] - ends[0]).unwrap().contiguous().unwrap();
            let alone = model.forward(&part(&ids)).unwrap();
            assert_eq!(bits(&detached.forward(&part(&ids)).unwrap()), bits(&alone), "{dtype:?}, {ends:?}");
            // Products of other sizes are summed in another order; in bf16, a few roundings of 2^-9.
            let tolerance = if dtype == DType::F32 { SAME } else { 2f64.powi(-6) };
            assert_close(&part(&packed), &alone, tolerance, &format!("{dtype:?}, {ends:?}"));
        }
    }
}

#[test]
fn without_gradients_on_the_processor() {
    without_gradients_the_same(&Device::Cpu);
}

#[test]
fn training_on_the_processor() {
    losses_of_training(&Device::Cpu);
}

#[test]
fn blocks_on_the_processor() {
    a_block_is_its_operators(&Device::Cpu);
}

#[test]
fn parts_of_the_parameters_on_the_processor() {
    subsets_of_parameters(&Device::Cpu);
}

#[test]
fn models_on_the_processor() {
    layers_are_their_operators(&Device::Cpu);
}

/// A step of training without candle's graph has the loss and the gradients of one with it.
pub fn gradients_without_the_graph(device: &Device) {
    let mut random = random();
    for (name, config) in all_blocks() {
        for (tied, dtype) in [(true, DType::F32), (false, DType::F32), (true, DType::BF16)] {
            let mamba = MambaConfig { seed: random.random(), ..config.clone() };
            let config = LanguageModelConfig { tie_embeddings: tied, ..LanguageModelConfig::with_mixer(11, 2, mamba) };
            let variables = VarMap::new();
            LanguageModel::new(&config, VarBuilder::from_varmap(&variables, DType::F32, device)).unwrap();
            let model = LanguageModel::new(&config, VarBuilder::from_varmap(&variables, dtype, device)).unwrap();
            let (ids, mut targets) = (super::ids(&mut random, 2, 19), super::ids(&mut random, 2, 19));
            // Some are left out.
            targets = targets.to_dtype(DType::I64).unwrap();
            let left_out = Tensor::full(-100i64, (2, 3), &Device::Cpu).unwrap();
            targets = Tensor::cat(&[&left_out, &targets.narrow(1, 3, 16).unwrap()], 1).unwrap();
            let options = LossOptions::default();
            let loss = model.loss(&ids, &targets, &options).unwrap();
            let expected = loss.backward().unwrap();
            let (got, gradients) = model.loss_and_gradients(&ids, None, &targets, &options).unwrap();
            let what = format!("{name}, tied {tied}, {dtype:?}");
            assert_eq!(bits(&got), bits(&loss), "{what}");
            for (parameter, variable) in variables.data().lock().unwrap().iter() {
                let [got, expected] = [&gradients, &expected].map(|store| store.get(variable).unwrap());
                assert_eq!(got.dtype(), variable.dtype(), "{what}: {parameter}");
                // The sum of two gradients of a tied matrix is taken in one order here and in another there. And the graph
                // rounds to the model's type what goes through a parameter in that type, as of the last norm.
                let tolerance = if dtype == DType::F32 { 1e-6 } else { 2f64.powi(-8) };
                assert_close(got, expected, tolerance, &format!("{what}: {parameter}"));
            }
        }
    }
}

#[test]
fn gradients_without_the_graph_on_the_processor() {
    gradients_without_the_graph(&Device::Cpu);
}
