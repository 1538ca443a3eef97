//! The trainer and the folder of a run.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use candle_core::{DType, Device, Error, Tensor};
use candle_nn::{VarBuilder, VarMap};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selective_scan::nn::train::{
    AdamWConfig, Drops, Group, Loss, LossScale, RunFolder, Schedule, Trainer, TrainerConfig, cross_entropy,
    next_token_loss, read_run,
};
use selective_scan::nn::{LanguageModel, LanguageModelConfig, MambaConfig};

use super::{assert_close, bits, ids, random, refusal, values};

fn small(random: &mut StdRng) -> LanguageModelConfig {
    let mamba = MambaConfig { d_inner: 8, d_state: 3, seed: random.random(), ..MambaConfig::new(6) };
    LanguageModelConfig::with_mixer(11, 2, mamba)
}

fn batch(random: &mut StdRng, rows: usize) -> (Tensor, Tensor) {
    let text = ids(random, rows, 10);
    (text.narrow(1, 0, 9).unwrap(), text.narrow(1, 1, 9).unwrap())
}

fn variables(trainer: &Trainer) -> BTreeMap<String, Vec<u32>> {
    let all = trainer.variables().data().lock().unwrap();
    all.iter().map(|(name, variable)| (name.clone(), bits(variable))).collect()
}

fn groups(name: &str) -> Group {
    Group { learning_rate: if name.ends_with("A_log") { 0.5 } else { 1.0 }, weight_decay: 0.1 }
}

/// A folder that is removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("selective-scan-{name}-{}", std::process::id())))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed is of no use to a test.
        _ = fs::remove_dir_all(&self.0);
    }
}

/// Parts of unlike sizes give the step of the whole batch, but for the order of sums. With a large epsilon a step goes with
/// the gradient, so that rounding stays rounding.
#[test]
fn parts_of_a_batch_give_the_step_of_the_whole() {
    let mut random = random();
    let model = small(&mut random);
    let optimizer = AdamWConfig { eps: 1e-2, clip: Some(0.5), ..AdamWConfig::default() };
    let config = TrainerConfig { learning_rate: 0.01, optimizer, ..TrainerConfig::default() };
    let [mut whole, mut in_parts] =
        [(); 2].map(|()| Trainer::language_model(&model, DType::F32, &Device::Cpu, config).unwrap());
    for _ in 0..3 {
        let (ids, targets) = batch(&mut random, 6);
        let part = |from, rows| (ids.narrow(0, from, rows).unwrap(), targets.narrow(0, from, rows).unwrap());
        let expected = whole.step_tokens(&[(ids.clone(), targets.clone())]).unwrap();
        let got = in_parts.step_tokens(&[part(0, 1), part(1, 3), part(4, 2)]).unwrap();
        for (got, expected) in [(got.loss, expected.loss), (got.norm, expected.norm)] {
            assert_close(&got.unsqueeze(0).unwrap(), &expected.unsqueeze(0).unwrap(), 1e-5, "loss and norm");
        }
    }
    let all = whole.variables().data().lock().unwrap();
    for (name, variable) in in_parts.variables().data().lock().unwrap().iter() {
        assert_close(variable, &all[name], 1e-5, name);
    }
}

/// What weighs nothing counts for nothing, and plain losses weigh alike.
#[test]
fn parts_count_by_their_weights() {
    let mut random = random();
    let model = small(&mut random);
    let config = TrainerConfig::default();
    let loss_of_parts = |parts: &[(Tensor, Tensor); 2], weights: Option<[f64; 2]>| {
        let mut trainer = Trainer::language_model(&model, DType::F32, &Device::Cpu, config).unwrap();
        let report = match weights {
            Some(weights) => {
                let parts: Vec<_> = parts.iter().zip(weights).collect();
                trainer
                    .step(&parts, |model, (part, weight)| Ok(Loss { weight: *weight, ..next_token_loss(model, part)? }))
            }
            None => trainer.step(parts, |model, (ids, targets)| cross_entropy(&model.forward(ids)?, targets)),
        };
        report.map(|report| report.loss().unwrap())
    };
    // Two whose losses are so far apart that weights which are mixed up are seen, beside the rounding of 1e-5 below.
    let (parts, first, second) = loop {
        let parts = [batch(&mut random, 1), batch(&mut random, 1)];
        let [first, second] = [[1e9, 1.0], [1e-9, 1.0]].map(|weights| loss_of_parts(&parts, Some(weights)).unwrap());
        if (first - second).abs() > 1e-3 {
            break (parts, first, second);
        }
    };
    let loss_of = |weights| loss_of_parts(&parts, weights);
    for (weights, expected) in [(None, [0.5, 0.5]), (Some([3.0, 1.0]), [0.75, 0.25])] {
        let expected = first * expected[0] + second * expected[1];
        assert!((loss_of(weights).unwrap() - expected).abs() < 1e-5, "{weights:?}");
    }
    assert!((loss_of(Some([0.0, 1.0])).unwrap() - second).abs() < 1e-5, "what weighs nothing is left out");
    for bad in [[-1.0, 1.0], [1.0, f64::NAN], [0.0, 0.0]] {
        let message = refusal(loss_of(Some(bad)));
        assert!(message.contains("weight") || message.contains("predicted"), "{message}");
    }
    let mut trainer = Trainer::language_model(&model, DType::F32, &Device::Cpu, config).unwrap();
    assert!(refusal(trainer.step_tokens(&[])).contains("parts"));
    assert_eq!(trainer.steps(), 0);
    let bad = TrainerConfig { learning_rate: -1.0, ..config };
    assert!(refusal(Trainer::language_model(&model, DType::F32, &Device::Cpu, bad)).contains("learning_rate"));
}

/// Arithmetic and variables of a run.
#[derive(Debug, Clone, Copy)]
struct Types(DType, DType);

fn begin(model: &LanguageModelConfig, Types(dtype, on): Types, config: TrainerConfig) -> Trainer {
    let variables = VarMap::new();
    let build = |dtype| LanguageModel::new(model, VarBuilder::from_varmap(&variables, dtype, &Device::Cpu)).unwrap();
    build(on);
    Trainer::with_groups(build(dtype), &variables, config, groups).unwrap()
}

/// Half arithmetic on variables of `f32` and of the half type, with masters; and with a scale of losses.
#[test]
fn a_resumed_run_has_the_bits_of_one_that_did_not_stop() {
    let mut random = random();
    let folder = Folder::new("trainer-resumes");
    let scale = Some(LossScale { first: 1024.0, interval: 3 });
    for (types, loss_scale) in [
        (Types(DType::F32, DType::F32), None),
        (Types(DType::BF16, DType::F32), None),
        (Types(DType::BF16, DType::BF16), None),
        (Types(DType::F16, DType::F32), scale),
    ] {
        let model = small(&mut random);
        let optimizer = AdamWConfig { clip: Some(1.0), loss_scale, ..AdamWConfig::default() };
        let schedule = Schedule::Cosine { warmup: 2, last: 0.1 };
        let config = TrainerConfig { schedule, steps: 8, optimizer, ..TrainerConfig::default() };
        // The state of the data: the seed of the next batch.
        let seeds = random.random_range(0..1000u64);
        let step = |trainer: &mut Trainer, seed: &mut u64| {
            let mut random = StdRng::seed_from_u64(*seed);
            *seed += 1;
            let report = trainer.step_tokens(&[batch(&mut random, 1), batch(&mut random, 2)]).unwrap();
            [report.loss, report.norm].map(|number| values(&number)[0])
        };
        let (mut whole, mut seed) = (begin(&model, types, config), seeds);
        let expected: Vec<_> = (0..8).map(|_| step(&mut whole, &mut seed)).collect();

        let run = RunFolder::open(&folder.0).unwrap();
        run.clear().unwrap();
        let (mut trainer, mut seed) = (begin(&model, types, config), seeds);
        let mut got: Vec<_> = (0..3).map(|_| step(&mut trainer, &mut seed)).collect();
        for until in [5, 8] {
            let path = trainer.save(&run, &("where the data is", seed)).unwrap();
            assert_eq!(RunFolder::newest(&folder.0).unwrap(), Some(path.clone()));
            drop(trainer);
            let (steps, (what, next)) = read_run::<(String, u64)>(&path).unwrap();
            assert_eq!((steps, what.as_str(), next), (got.len(), "where the data is", seeds + steps as u64));
            trainer = Trainer::resume_with_groups(&path, types.0, &Device::Cpu, config, groups).unwrap();
            assert_eq!(trainer.steps(), steps);
            seed = next;
            got.extend((steps..until).map(|_| step(&mut trainer, &mut seed)));
        }
        assert_eq!(got, expected, "{types:?}");
        assert_eq!(variables(&trainer), variables(&whole), "{types:?}");
        let state = |trainer: &Trainer| {
            let state = trainer.optimizer().state().unwrap().into_iter();
            state.map(|(name, tensor)| (name, bits(&tensor))).collect::<BTreeMap<_, _>>()
        };
        assert_eq!(state(&trainer), state(&whole), "{types:?}");
        let of = |dtype: DType, trainer: &Trainer| {
            trainer.variables().all_vars().iter().filter(|variable| variable.dtype() == dtype).count()
        };
        assert_eq!(of(types.1, &trainer), of(types.1, &whole), "{types:?}");
    }
}

/// Whatever fails while a checkpoint is written, the one before is still there; and what a killed process left is removed.
#[test]
fn a_checkpoint_is_there_as_one() {
    let mut random = random();
    let folder = Folder::new("trainer-atomic");
    let run = RunFolder::open(&folder.0).unwrap();
    let mut trainer =
        Trainer::language_model(&small(&mut random), DType::F32, &Device::Cpu, TrainerConfig::default()).unwrap();
    let first = trainer.save(&run, &1).unwrap();
    trainer.step_tokens(&[batch(&mut random, 1)]).unwrap();
    let failed = trainer.save_with(&run, &2, |model, path| {
        model.save(path, selective_scan::nn::CheckpointFormat::HuggingFace)?;
        Err(Error::msg("no room"))
    });
    assert!(refusal(failed).contains("no room"));
    assert_eq!(RunFolder::newest(&folder.0).unwrap(), Some(first.clone()));
    assert!(refusal(RunFolder::open(&folder.0)).contains("another process"));
    drop(run);
    let run = RunFolder::open(&folder.0).unwrap();
    let names = || {
        let names = fs::read_dir(&folder.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name != ".lock").collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["step-0"]);
    // The same step again, from a run that went on from there, and then the next in its place.
    Trainer::resume(&first, DType::F32, &Device::Cpu, TrainerConfig::default()).unwrap().save(&run, &3).unwrap();
    assert_eq!(read_run::<u64>(&first).unwrap(), (0, 3));
    trainer.save(&run, &4).unwrap();
    assert_eq!(names(), ["step-1"]);
    let newest = RunFolder::newest(&folder.0).unwrap().unwrap();
    assert!(refusal(read_run::<String>(&newest)).contains("run.json"));
    fs::remove_file(newest.join("moments.safetensors")).unwrap();
    let resumed = Trainer::resume(&newest, DType::F32, &Device::Cpu, TrainerConfig::default());
    assert!(refusal(resumed).contains("moments.safetensors"));
    run.clear().unwrap();
    assert!(names().is_empty());
    assert_eq!(RunFolder::newest(folder.0.join("none")).unwrap(), None);
}

/// Half arithmetic moves variables of `f32`, and a run ends where it is told to or where a call fails.
#[test]
fn a_run_calls_back() {
    let mut random = random();
    let config = TrainerConfig { learning_rate: 1e-2, steps: 30, ..TrainerConfig::default() };
    let mut trainer = Trainer::language_model(&small(&mut random), DType::BF16, &Device::Cpu, config).unwrap();
    assert_eq!(trainer.model().dtype(), DType::BF16);
    assert!(trainer.variables().all_vars().iter().all(|variable| variable.dtype() == DType::F32));
    let (before, same) = (variables(&trainer), batch(&mut random, 2));
    let mut losses = Vec::new();
    trainer
        .run(
            30,
            || Ok::<_, Error>(vec![same.clone()]),
            next_token_loss,
            |trainer, report| {
                assert_eq!(trainer.steps(), report.step);
                losses.push(report.loss()?);
                Ok(())
            },
        )
        .unwrap();
    assert!(losses.len() == 30 && losses[29] < losses[0] - 0.3, "{losses:?}");
    assert!(variables(&trainer).iter().all(|(name, after)| *after != before[name]));
    let stopped = trainer.run(
        99,
        || Ok::<_, Error>(vec![same.clone()]),
        next_token_loss,
        |_, report| match report.step {
            33 => Err(Error::msg("enough")),
            _ => Ok(()),
        },
    );
    assert!(refusal(stopped).starts_with("enough"));
    assert_eq!(trainer.steps(), 33);
}

/// A run that leaves out at random goes on to the same bits, as what is left out follows from the number of steps; and another
/// seed, or none of it, trains something else.
#[test]
fn a_run_that_leaves_out_goes_on_to_the_same_bits() {
    let mut random = random();
    let model = small(&mut random);
    let drops = Drops { dropout: 0.3, stochastic_depth: 0.3, seed: random.random(), ..Drops::default() };
    let config = TrainerConfig { learning_rate: 0.01, drops, ..TrainerConfig::default() };
    // The same text in every step and part, so that what is left out makes the difference.
    let part = batch(&mut random, 2);
    let parts = [part.clone(), part];
    let train = |config: TrainerConfig, stop: bool| {
        let folder = Folder::new(&format!("drops-{stop}"));
        let mut trainer = Trainer::language_model(&model, DType::F32, &Device::Cpu, config).unwrap();
        let mut losses = Vec::new();
        for step in 0..4 {
            if stop && step == 2 {
                let path = trainer.save(&RunFolder::open(&folder.0).unwrap(), &()).unwrap();
                trainer = Trainer::resume(path, DType::F32, &Device::Cpu, config).unwrap();
            }
            losses.push(trainer.step_tokens(&parts).unwrap().loss().unwrap());
        }
        (variables(&trainer), losses)
    };
    let whole = train(config, false);
    assert_eq!(train(config, true), whole);
    let others = [Drops::default(), Drops { seed: drops.seed ^ 1, ..drops }, drops.at(9, 9)];
    let [none, seed, same] = others.map(|drops| train(TrainerConfig { drops, ..config }, false));
    assert_ne!(none.1[0], whole.1[0]);
    assert_ne!(seed.1[0], whole.1[0]);
    // A trainer counts steps and parts by itself.
    assert_eq!(same, whole);
    // Steps without learning leave out something else each.
    let still = train(TrainerConfig { learning_rate: 0.0, ..config }, false);
    assert!(still.1.windows(2).all(|losses| losses[0] != losses[1]), "{:?}", still.1);
    let bad = TrainerConfig { drops: Drops { dropout: 1.5, ..drops }, ..config };
    assert!(refusal(Trainer::language_model(&model, DType::F32, &Device::Cpu, bad)).contains("dropout"));
}
