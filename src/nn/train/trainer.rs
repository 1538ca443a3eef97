//! Training, step by step.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::{fmt, fs};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::run_folder::at;
use super::{AdamW, AdamWConfig, Drops, Group, LossOptions, RunFolder, Schedule, Targets};
use crate::nn::argument;
use crate::nn::{Checkpoint, CheckpointFormat, LanguageModel, LanguageModelConfig};

/// What a [`Trainer`] goes by. Fields may be added: end with `..TrainerConfig::default()`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainerConfig {
    /// The highest learning rate, 1e-3.
    pub learning_rate: f64,
    /// How it goes from step to step, [`Schedule::Constant`].
    pub schedule: Schedule,
    /// The steps of the run, by which the schedule goes. A trainer takes more if it is asked to.
    pub steps: usize,
    /// What steps leave out of what layers add at random, nothing. [`Trainer::step_tokens`] does so; other losses take it from
    /// [`Trainer::drops`].
    pub drops: Drops,
    /// The optimizer. Unlike [`AdamWConfig::default`] it clips gradients to a norm of 1.
    pub optimizer: AdamWConfig,
}

impl Default for TrainerConfig {
    fn default() -> Self {
        let optimizer = AdamWConfig { clip: Some(1.0), ..AdamWConfig::default() };
        Self { learning_rate: 1e-3, schedule: Schedule::Constant, steps: 1000, drops: Drops::default(), optimizer }
    }
}

/// The loss of a part of a batch.
#[derive(Debug, Clone)]
pub struct Loss {
    /// Its mean over what is predicted, a scalar.
    pub mean: Tensor,
    /// Its weight beside the other parts of the batch, above 0: the number of tokens that are predicted.
    pub weight: f64,
}

impl From<Tensor> for Loss {
    /// A loss that weighs as much as that of any other part.
    fn from(mean: Tensor) -> Self {
        Self { mean, weight: 1.0 }
    }
}

/// The loss of a language model on `(ids, targets)`, both `(batch, length)`: [`LanguageModel::loss`], which weighs as much as
/// there are targets that are not left out.
///
/// # Errors
/// As [`LanguageModel::loss`].
pub fn next_token_loss(model: &LanguageModel, (ids, targets): &(Tensor, Tensor)) -> Result<Loss> {
    let mean = model.loss(ids, targets, &LossOptions::default())?;
    Ok(Loss { mean, weight: valid(model, targets)? })
}

/// The number of targets that are not left out.
fn valid(model: &LanguageModel, targets: &Tensor) -> Result<f64> {
    let options = LossOptions::default();
    let targets = Targets::read(targets, targets.dims(), model.config().padded_vocab_size(), &options)?;
    Ok(targets.valid() as f64)
}

/// What a step has done. The numbers are on the device: nothing has waited for them yet.
#[derive(Debug, Clone)]
pub struct Report {
    /// The number of steps, this one included.
    pub step: usize,
    /// The learning rate of the step.
    pub learning_rate: f64,
    /// The mean loss before the step, a scalar of `f32`.
    pub loss: Tensor,
    /// The norm of the gradients before they were clipped, a scalar of `f32`. It is not finite if the step was skipped.
    pub norm: Tensor,
}

impl Report {
    /// The loss, for which this waits.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn loss(&self) -> Result<f32> {
        self.loss.to_scalar()
    }

    /// The norm, for which this waits.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn norm(&self) -> Result<f32> {
        self.norm.to_scalar()
    }
}

/// Trains a model: batches in parts whose gradients are summed in `f32`, [`AdamW`], learning rates, checkpoints from which
/// a run goes on to the same bits. On a GPU a step waits for nothing; who reads the loss of a [`Report`] does.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use selective_scan::nn::LanguageModelConfig;
/// use selective_scan::nn::train::{Schedule, Trainer, TrainerConfig};
///
/// let steps = 20;
/// let schedule = Schedule::Cosine { warmup: 3, last: 0.1 };
/// let config = TrainerConfig { learning_rate: 1e-2, schedule, steps, ..TrainerConfig::default() };
/// // 16 tokens, 2 layers of width 32, arithmetic in f32: on a GPU, DType::BF16. Variables are f32 in any case.
/// let mut trainer = Trainer::language_model(&LanguageModelConfig::new(16, 2, 32), DType::F32, &Device::Cpu, config)?;
///
/// let text: Vec<u32> = (0..33).map(|i| i % 16).collect();
/// let part = |from: usize| Tensor::new(&text[from..from + 32], &Device::Cpu)?.unsqueeze(0);
/// let batch = (part(0)?, part(1)?);
/// for _ in 0..steps {
///     let report = trainer.step_tokens(std::slice::from_ref(&batch))?;
///     if report.step % 10 == 0 {
///         println!("step {}: loss {:.3}", report.step, report.loss()?);
///     }
/// }
/// assert!(trainer.step_tokens(&[batch])?.loss()? < 1.0); // from 2.8
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// Any model and any loss will do, by [`Trainer::new`] and [`Trainer::step`]; its variables are those of a `VarMap`. For half
/// arithmetic as Mamba's authors advise it, on variables of `f32`, see [types](crate::nn#types): [`Trainer::language_model`]
/// makes such models. `f16` needs a [scale of losses](AdamWConfig::loss_scale) too.
pub struct Trainer<M = LanguageModel> {
    model: M,
    variables: VarMap,
    optimizer: AdamW,
    config: TrainerConfig,
    steps: usize,
}

impl<M> fmt::Debug for Trainer<M> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Trainer").field("config", &self.config).field("steps", &self.steps).finish_non_exhaustive()
    }
}

impl<M> Trainer<M> {
    /// A trainer of a model that is made of these variables, in the groups of [`AdamW::new`].
    ///
    /// # Errors
    /// As [`AdamW::new`]; a learning rate that is negative or not finite; a probability below 0, or of 1 or more.
    pub fn new(model: M, variables: &VarMap, config: TrainerConfig) -> Result<Self> {
        Self::with(model, variables, AdamW::new(variables, config.optimizer)?, config)
    }

    /// [`Trainer::new`] with variables in the groups that `group` gives for their names.
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub fn with_groups(
        model: M,
        variables: &VarMap,
        config: TrainerConfig,
        group: impl Fn(&str) -> Group,
    ) -> Result<Self> {
        Self::with(model, variables, AdamW::with_groups(variables, config.optimizer, group)?, config)
    }

    fn with(model: M, variables: &VarMap, optimizer: AdamW, config: TrainerConfig) -> Result<Self> {
        let rate = config.learning_rate;
        if !(rate >= 0.0 && rate.is_finite()) {
            return Err(argument("learning_rate", "a finite number, 0 or more", rate));
        }
        config.drops.check()?;
        // What one step frees, the next takes; else it would have to be mapped again.
        crate::candle::keep_freed_memory(optimizer.device());
        Ok(Self { model, variables: variables.clone(), optimizer, config, steps: 0 })
    }

    /// Takes a step by the gradients of `loss` over a batch in parts, each of which is forgotten before the next: memory is
    /// that of the largest part, and the step is that of the whole batch, whose loss is the mean over the parts by their
    /// weights. Parts of weight 0, in which nothing is predicted, are left out.
    ///
    /// # Errors
    /// No part at all, or none of a weight above 0; a variable that the loss does not depend on, by name; what `loss` gives.
    /// Nothing is changed then.
    pub fn step<B, L: Into<Loss>>(&mut self, parts: &[B], loss: impl Fn(&M, &B) -> Result<L>) -> Result<Report> {
        self.step_by(parts, |trainer, _, part| {
            let Loss { mean, weight } = loss(&trainer.model, part)?.into();
            let mean = mean.to_dtype(DType::F32)?;
            Ok((mean.detach(), weight, ToCome::Loss(mean)))
        })
    }

    /// [`step`](Self::step) by what `part` gives of each part and its number: its mean loss, its weight, and where its gradients come from.
    fn step_by<B>(
        &mut self,
        parts: &[B],
        part: impl Fn(&Self, usize, &B) -> Result<(Tensor, f64, ToCome)>,
    ) -> Result<Report> {
        let mut first = None;
        let mut sum = None;
        for (i, of) in parts.iter().enumerate() {
            let (mean, weight, gradients) = part(self, i, of)?;
            if !(weight >= 0.0 && weight.is_finite()) {
                return Err(argument("weight", "a weight of a loss, 0 or more", weight));
            }
            if weight == 0.0 {
                continue;
            }
            // In units of the first part's, so that one part alone is as it is.
            let weight = weight / *first.get_or_insert(weight);
            let gradients = match gradients {
                ToCome::Loss(loss) => {
                    let share = if weight == 1.0 { loss } else { (loss * weight)? };
                    self.optimizer.scaled(&share)?.backward()?
                }
                ToCome::Gradients(store) => scaled(store, weight)?,
            };
            let mean = if weight == 1.0 { mean } else { (mean * weight)? };
            sum = Some(match sum {
                None => (gradients, mean, weight),
                Some((mut total, means, weights)) => {
                    self.optimizer.accumulate(&mut total, &gradients)?;
                    (total, (means + mean)?, weights + weight)
                }
            });
        }
        let Some((gradients, means, weights)) = sum else {
            return Err(argument("parts", "at least one part of a batch in which something is predicted", "none"));
        };
        let learning_rate = self.config.schedule.rate(self.config.learning_rate, self.steps, self.config.steps);
        let norm = self.optimizer.step_divided(&gradients, weights, learning_rate)?;
        self.steps += 1;
        let loss = if weights == 1.0 { means } else { (means / weights)? };
        Ok(Report { step: self.steps, learning_rate, loss, norm })
    }

    /// Takes steps until there are as many, each on the parts of a batch that `next` gives, and calls `each` after it.
    ///
    /// # Errors
    /// As [`Trainer::step`], and what `next` and `each` give, which ends the run.
    pub fn run<B, L: Into<Loss>, E: From<Error>>(
        &mut self,
        until: usize,
        mut next: impl FnMut() -> std::result::Result<Vec<B>, E>,
        loss: impl Fn(&M, &B) -> Result<L>,
        mut each: impl FnMut(&Self, &Report) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        while self.steps < until {
            let report = self.step(&next()?, &loss)?;
            each(self, &report)?;
        }
        Ok(())
    }

    /// The model. Whoever computes without gradients detaches it first.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The model, to be changed: what depends on more than its variables.
    pub fn model_mut(&mut self) -> &mut M {
        &mut self.model
    }

    /// What is trained.
    pub fn variables(&self) -> &VarMap {
        &self.variables
    }

    /// The optimizer.
    pub fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// What it goes by.
    pub fn config(&self) -> &TrainerConfig {
        &self.config
    }

    /// What the next step is to leave out: of its parts `trainer.drops().at(trainer.steps(), i)`, for a model's `with_drops`.
    /// It follows from the configuration and the number of steps, and so is the same after a run was stopped and goes on.
    pub fn drops(&self) -> Drops {
        self.config.drops.at(self.steps, 0)
    }

    /// Steps taken or skipped.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Writes a checkpoint into the folder of a run, in the place of older ones, and gives its path: the files that `model`
    /// writes into the folder that it is given, the optimizer's state, and `rest`, what the caller goes on from, such as where
    /// the next batch is read and the state of random numbers. It is there as one or not at all, whenever the program is stopped.
    ///
    /// # Errors
    /// What `model` gives, what does not go into JSON, and what the file system or the device refuses.
    pub fn save_with(
        &self,
        folder: &RunFolder,
        rest: &impl Serialize,
        model: impl FnOnce(&M, &Path) -> Result<()>,
    ) -> Result<PathBuf> {
        folder.add(self.steps, |path| {
            model(&self.model, path)?;
            let (state, run) = (path.join(STATE), path.join(RUN));
            candle_core::safetensors::save(&self.optimizer.state()?, &state)?;
            let text = serde_json::to_string_pretty(&Stored { step: self.steps, rest });
            fs::write(&run, text.map_err(|error| at(&run, error))?).map_err(|error| at(&run, error))?;
            // That of any new file, where the other is for its owner alone.
            let permissions = fs::metadata(&run).and_then(|run| fs::set_permissions(&state, run.permissions()));
            permissions.map_err(|error| at(&state, error))
        })
    }

    /// Goes on from a checkpoint of [`save_with`](Self::save_with): the optimizer and the number of steps. The variables must
    /// have their values of then already.
    ///
    /// # Errors
    /// A file that is missing, damaged or of another model.
    pub fn restore(&mut self, checkpoint: impl AsRef<Path>) -> Result<()> {
        let checkpoint = checkpoint.as_ref();
        self.restore_state(checkpoint, read_state(checkpoint)?)
    }

    fn restore_state(&mut self, checkpoint: &Path, state: HashMap<String, Tensor>) -> Result<()> {
        let (step, _) = read_run::<serde::de::IgnoredAny>(checkpoint)?;
        self.optimizer.restore(state, step).map_err(|error| at(&checkpoint.join(STATE), error))?;
        self.steps = step;
        Ok(())
    }
}

/// The optimizer's state in a checkpoint.
fn read_state(checkpoint: &Path) -> Result<HashMap<String, Tensor>> {
    let path = checkpoint.join(STATE);
    candle_core::safetensors::load(&path, &Device::Cpu).map_err(|error| at(&path, error))
}

impl Trainer {
    /// A trainer of a new language model that computes in `dtype`, on variables of `f32`, which are drawn.
    ///
    /// # Errors
    /// As [`LanguageModel::new`] and [`Trainer::new`].
    pub fn language_model(
        model: &LanguageModelConfig,
        dtype: DType,
        device: &Device,
        config: TrainerConfig,
    ) -> Result<Self> {
        let variables = VarMap::new();
        // Draws them.
        let drawn = LanguageModel::new(model, VarBuilder::from_varmap(&variables, DType::F32, device))?;
        let model = match dtype {
            DType::F32 => drawn,
            _ => LanguageModel::new(model, VarBuilder::from_varmap(&variables, dtype, device))?,
        };
        Self::new(model, &variables, config)
    }

    /// Takes a step on a batch in parts, each `(ids, targets)` of `(batch, length)`, by [`next_token_loss`]: integers of any type,
    /// of which targets of -100 are left out. On a GPU, ids and targets on the processor save a wait for the device. Where
    /// nothing stands in the way the gradients come without candle's graph, see [`LanguageModel::loss_and_gradients`].
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn step_tokens(&mut self, parts: &[(Tensor, Tensor)]) -> Result<Report> {
        // With a scale of losses, what is differentiated is not the loss itself.
        let is_scaled = self.config.optimizer.loss_scale.is_some();
        self.step_by(parts, |trainer, i, part| {
            let drops = trainer.drops().at(trainer.steps, i);
            let model = match drops.is_some() {
                true => &trainer.model.with_drops(drops)?,
                false => &trainer.model,
            };
            if is_scaled {
                let Loss { mean, weight } = next_token_loss(model, part)?;
                return Ok((mean.detach(), weight, ToCome::Loss(mean)));
            }
            let (ids, targets) = part;
            let weight = valid(model, targets)?;
            let (loss, store) = model.loss_and_gradients(ids, None, targets, &LossOptions::default())?;
            Ok((loss, weight, ToCome::Gradients(store)))
        })
    }

    /// [`save_with`](Self::save_with) the model as Hugging Face has it, so that the checkpoint is one of the model as well.
    ///
    /// # Errors
    /// As [`save_with`](Self::save_with) and [`LanguageModel::save`].
    pub fn save(&self, folder: &RunFolder, rest: &impl Serialize) -> Result<PathBuf> {
        self.save_with(folder, rest, |model, path| model.save(path, CheckpointFormat::HuggingFace))
    }

    /// Goes on from a checkpoint of [`save`](Self::save) in the type that the run computes in, with the configuration that it
    /// had. The bits of what follows are those of a run that did not stop. What else the run goes on from gives [`read_run`].
    ///
    /// # Errors
    /// As [`Checkpoint::read`], [`Trainer::new`] and [`Trainer::restore`].
    pub fn resume(checkpoint: impl AsRef<Path>, dtype: DType, device: &Device, config: TrainerConfig) -> Result<Self> {
        Self::resume_by(checkpoint.as_ref(), dtype, device, config, |variables| AdamW::new(variables, config.optimizer))
    }

    /// [`resume`](Self::resume) with variables in the groups that the run had.
    ///
    /// # Errors
    /// As [`resume`](Self::resume).
    pub fn resume_with_groups(
        checkpoint: impl AsRef<Path>,
        dtype: DType,
        device: &Device,
        config: TrainerConfig,
        group: impl Fn(&str) -> Group,
    ) -> Result<Self> {
        Self::resume_by(checkpoint.as_ref(), dtype, device, config, |variables| {
            AdamW::with_groups(variables, config.optimizer, group)
        })
    }

    fn resume_by(
        checkpoint: &Path,
        dtype: DType,
        device: &Device,
        config: TrainerConfig,
        optimizer: impl FnOnce(&VarMap) -> Result<AdamW>,
    ) -> Result<Self> {
        let (mut model, mut variables) = Checkpoint::read(checkpoint, device)?.trainable(dtype)?;
        let state = read_state(checkpoint)?;
        if state.keys().any(|name| name.ends_with(MASTER)) {
            // These had masters, and so were of the half type.
            variables = narrowed(&variables, dtype, &state)?;
            model = LanguageModel::new(model.config(), VarBuilder::from_varmap(&variables, dtype, device))?;
        }
        let mut trainer = Self::with(model, &variables, optimizer(&variables)?, config)?;
        trainer.restore_state(checkpoint, state)?;
        Ok(trainer)
    }
}

/// Where gradients come from.
enum ToCome {
    /// A loss in candle's graph.
    Loss(Tensor),
    /// They are there.
    Gradients(GradStore),
}

/// Gradients times a number.
fn scaled(mut gradients: GradStore, share: f64) -> Result<GradStore> {
    if share != 1.0 {
        let ids: Vec<_> = gradients.get_ids().copied().collect();
        for id in ids {
            if let Some(gradient) = gradients.get_id(id) {
                let gradient = (gradient * share)?;
                gradients.insert_id(id, gradient);
            }
        }
    }
    Ok(gradients)
}

const STATE: &str = "moments.safetensors";
const RUN: &str = "run.json";
const MASTER: &str = ".master";

/// The variables with those that have masters in `dtype`.
fn narrowed(variables: &VarMap, dtype: DType, state: &HashMap<String, Tensor>) -> Result<VarMap> {
    let (all, narrowed) = (variables.data().lock().map_err(poisoned)?, VarMap::new());
    {
        let mut to = narrowed.data().lock().map_err(poisoned)?;
        for (name, variable) in all.iter() {
            let variable = match state.contains_key(&format!("{name}{MASTER}")) {
                true => Var::from_tensor(&variable.as_detached_tensor().to_dtype(dtype)?)?,
                false => variable.clone(),
            };
            to.insert(name.clone(), variable);
        }
    }
    drop(all);
    Ok(narrowed)
}

fn poisoned<T>(_: T) -> Error {
    Error::msg("the lock of the variables is poisoned")
}

/// What stands in a checkpoint beside tensors.
#[derive(Serialize, Deserialize)]
struct Stored<R> {
    step: usize,
    rest: R,
}

/// The number of steps of a checkpoint and what was saved as the rest of it.
///
/// # Errors
/// A file that is missing or damaged, or that holds something else.
pub fn read_run<R: DeserializeOwned>(checkpoint: impl AsRef<Path>) -> Result<(usize, R)> {
    let path = checkpoint.as_ref().join(RUN);
    let text = fs::read_to_string(&path).map_err(|error| at(&path, error))?;
    let Stored { step, rest } = serde_json::from_str(&text).map_err(|error| at(&path, error))?;
    Ok((step, rest))
}
