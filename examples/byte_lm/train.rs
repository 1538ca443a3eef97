//! A training run.

use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Instant;

use candle_core::{Device, Tensor};
use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};
use selective_scan::nn::train::{AdamWConfig, Report, RunFolder, Schedule, Trainer, TrainerConfig};
use selective_scan::nn::{LanguageModel, LanguageModelConfig, MambaConfig};
use selective_scan::sampling::Settings;

use crate::checkpoint::{self, Curves, Run};
use crate::data::{Corpus, Position, Windows};
use crate::evaluate::bits_per_byte;
use crate::generate::{Speed, generate};
use crate::ngram::Ngram;
use crate::{Arithmetic, Result, RunOptions, TrainArguments, plot};

/// The baseline predicts a byte from the three before it.
pub const BASELINE_ORDER: usize = 3;
/// Steps whose losses make one point of the training curve.
const POINT: usize = 20;
/// Bytes of a held-out piece that are read, and after it written, to show and time what was learnt.
const SAMPLE: (usize, usize) = (1024, 400);

pub fn run(arguments: &TrainArguments) -> Result<()> {
    let device = arguments.device.open()?;
    let mut training = Training::open(arguments, &device)?;
    let corpus = Corpus::read(&training.run.options.text, training.run.options.held_out, training.run.options.seed)?;
    training.check(&corpus)?;
    println!(
        "{} bytes to learn from, {} held out in {} pieces; {} parameters in {} layers of width {}",
        corpus.train.len(),
        corpus.held_out_bytes(),
        corpus.held_out.len(),
        parameters(training.model()),
        training.model().config().backbone.n_layer,
        training.model().config().d_model(),
    );
    let ngrams: Vec<(usize, f64)> = (1..=Ngram::HIGHEST_ORDER)
        .map(|order| (order, Ngram::new(&corpus.train, order).bits_per_byte(&corpus.held_out)))
        .collect();
    let baseline = ngrams[BASELINE_ORDER - 1].1;
    println!("an n-gram model of order {BASELINE_ORDER} needs {baseline:.3} bits per held-out byte");

    training.train(arguments, &corpus, &device, baseline)?;
    if training.run.step < training.run.options.steps.get() {
        println!("stopped after step {}; --resume goes on", training.run.step);
        return Ok(());
    }
    let speed = sample(training.model(), &corpus)?;
    println!("{}", report(&training, &ngrams, speed));
    println!("losses are drawn in {}", arguments.out.join("loss.svg").display());
    Ok(())
}

/// What the trainer of a run goes by.
fn config(options: &RunOptions) -> TrainerConfig {
    let &RunOptions { learning_rate, warmup, weight_decay, clip, .. } = options;
    let schedule = Schedule::Cosine { warmup, last: 0.1 };
    let optimizer = AdamWConfig { weight_decay, clip: Some(clip), ..AdamWConfig::default() };
    TrainerConfig { learning_rate, schedule, steps: options.steps.get(), optimizer, ..TrainerConfig::default() }
}

/// A run with its tensors.
pub struct Training {
    pub run: Run,
    trainer: Trainer,
    folder: RunFolder,
}

impl Training {
    /// Begins a run, or takes up the newest checkpoint's.
    pub fn open(arguments: &TrainArguments, device: &Device) -> Result<Self> {
        let name = arguments.out.display();
        if arguments.resume && !arguments.out.exists() {
            return Err(format!("{name}: there is no run to resume").into());
        }
        let folder = RunFolder::open(&arguments.out)?;
        let (run, trainer) = match RunFolder::newest(folder.path())? {
            Some(found) if arguments.resume => Self::resume(&found, device)?,
            None if arguments.resume => return Err(format!("{name}: there is no run to resume").into()),
            Some(found) if !arguments.fresh => {
                let name = found.display();
                let message = "--resume goes on with it, --fresh begins another in its place";
                return Err(format!("there is a run, {name}: {message}").into());
            }
            // What the model is made of is checked before a run in its place is lost.
            _ => Self::begin(&arguments.options, device)?,
        };
        if !arguments.resume {
            folder.clear()?;
        }
        Ok(Self { run, trainer, folder })
    }

    fn begin(options: &RunOptions, device: &Device) -> Result<(Run, Trainer)> {
        let mamba = MambaConfig {
            d_state: options.d_state.get(),
            seed: options.seed,
            ..MambaConfig::new(options.d_model.get())
        };
        let model = LanguageModelConfig::with_mixer(256, options.layers.get(), mamba);
        let arithmetic = options.arithmetic.unwrap_or(Arithmetic::on(device));
        let trainer = Trainer::language_model(&model, arithmetic.dtype(), device, config(options))?;
        let run = Run {
            options: RunOptions { arithmetic: Some(arithmetic), ..options.clone() },
            fingerprint: 0,
            step: 0,
            position: Position::default(),
            seconds: 0.0,
            curves: Curves::default(),
        };
        Ok((run, trainer))
    }

    fn resume(checkpoint: &Path, device: &Device) -> Result<(Run, Trainer)> {
        let run = checkpoint::read_run(checkpoint)?;
        let options = &run.options;
        let dtype = options.arithmetic.unwrap_or(Arithmetic::F32).dtype();
        let trainer = Trainer::resume(checkpoint, dtype, device, config(options))?;
        let model = trainer.model().config();
        let d_state = model.backbone.mixer.as_mamba().map_or(0, |mamba| mamba.d_state);
        let got = [model.backbone.n_layer, model.d_model(), d_state];
        if got != [options.layers, options.d_model, options.d_state].map(NonZeroUsize::get) {
            let name = checkpoint.display();
            return Err(format!("{name}: run.json describes another model than config.json").into());
        }
        Ok((run, trainer))
    }

    /// Checks that the text is the one that the run began with, and that a step can be read from it.
    pub fn check(&mut self, corpus: &Corpus) -> Result<()> {
        let (batch, length) = (self.run.options.batch.get(), self.run.options.length.get());
        if batch.checked_mul(length).is_none_or(|bytes| bytes > corpus.train.len()) {
            let bytes = corpus.train.len();
            return Err(format!(
                "--batch, --length: expected a step that reads at most the {bytes} bytes to learn from, \
                                got {batch} times {length}"
            )
            .into());
        }
        if self.run.step > 0 && self.run.fingerprint != corpus.fingerprint {
            return Err("the text is not the one that the run began with".into());
        }
        self.run.fingerprint = corpus.fingerprint;
        Ok(())
    }

    /// Trains to the end, or until where the arguments say.
    pub fn train(&mut self, arguments: &TrainArguments, corpus: &Corpus, device: &Device, baseline: f64) -> Result<()> {
        let options = self.run.options.clone();
        let last = arguments.until.unwrap_or(usize::MAX).min(options.steps.get());
        let mut windows = Windows::new(&corpus.train, options.length.get(), options.seed, self.run.position)?;
        let bar = ProgressBar::new(options.steps.get() as u64).with_position(self.run.step as u64);
        let style = "{wide_bar} {pos}/{len}, {elapsed_precise}, {eta} left, {msg}";
        bar.set_style(ProgressStyle::with_template(style)?);
        let (mut shown, mut unread) = (String::new(), Vec::new());
        while self.run.step < last {
            let start = Instant::now();
            unread.push(self.step(&mut windows, device)?);
            let step = self.run.step;
            let is_last = step == last || step == options.steps.get();
            let (evaluates, saves) = (step % options.evaluate_every == 0, step % arguments.checkpoint_every == 0);
            // A GPU works on while nobody reads what it computes.
            if unread.len() == POINT || is_last || evaluates || saves {
                let loss = self.read(std::mem::take(&mut unread))?;
                let rate = self.tokens_per_second();
                bar.set_message(format!("{loss:.3} bits per byte{shown}, {rate:.0} tokens/s"));
            }
            self.run.seconds += start.elapsed().as_secs_f64();
            if evaluates || step == options.steps.get() {
                let bits = bits_per_byte(self.model(), &corpus.held_out)?;
                self.run.curves.held_out.push((step, bits));
                shown = format!(", held out {bits:.3}");
                // A bar is not drawn where nobody watches.
                if bar.is_hidden() {
                    println!("step {step}: {bits:.3} bits per held-out byte, {:.0} tokens/s", self.tokens_per_second());
                }
            }
            if saves || step == last {
                self.trainer.save(&self.folder, &self.run)?;
                let path = arguments.out.join("loss.svg");
                plot::draw(&path, &self.run, baseline).map_err(|error| format!("{}: {error}", path.display()))?;
            }
            bar.inc(1);
        }
        bar.abandon();
        Ok(())
    }

    /// Takes a step.
    fn step(&mut self, windows: &mut Windows, device: &Device) -> Result<Report> {
        let options = &self.run.options;
        let (batch, length) = (options.batch.get(), options.length.get());
        let (ids, targets) = windows.next(batch);
        let ids = Tensor::from_vec(ids, (batch, length), device)?;
        let targets = Tensor::from_vec(targets, (batch, length), device)?;
        let report = self.trainer.step_tokens(&[(ids, targets)])?;
        self.run.step = report.step;
        self.run.position = windows.position();
        Ok(report)
    }

    /// Adds the losses of steps to the curve, and gives the last in bits per byte.
    fn read(&mut self, reports: Vec<Report>) -> Result<f64> {
        let mut loss = f64::NAN;
        for report in reports {
            if !report.norm()?.is_finite() {
                let step = report.step;
                return Err(format!("step {step}: the gradients are not finite: a lower learning rate may help").into());
            }
            loss = f64::from(report.loss()?) / std::f64::consts::LN_2;
            let curves = &mut self.run.curves;
            curves.pending.0 += loss;
            curves.pending.1 += 1;
            if curves.pending.1 == POINT || report.step == self.run.options.steps.get() {
                let (sum, count) = std::mem::take(&mut curves.pending);
                curves.train.push((report.step, sum / count as f64));
            }
        }
        Ok(loss)
    }

    pub fn model(&self) -> &LanguageModel {
        self.trainer.model()
    }

    fn tokens_per_second(&self) -> f64 {
        let options = &self.run.options;
        (self.run.step * options.batch.get() * options.length.get()) as f64 / self.run.seconds
    }
}

fn parameters(model: &LanguageModel) -> usize {
    model.named_tensors().iter().map(|(_, tensor)| tensor.elem_count()).sum()
}

/// Shows what the model writes after the beginning of a held-out piece, and how fast.
fn sample(model: &LanguageModel, corpus: &Corpus) -> Result<Speed> {
    let piece = corpus.held_out.iter().max_by_key(|piece| piece.len()).ok_or("nothing is held out")?;
    let prompt = &piece[1..piece.len().min(SAMPLE.0)];
    let settings = Settings { temperature: 0.7, ..Settings::default() };
    let shown = String::from_utf8_lossy(&prompt[prompt.len().saturating_sub(200)..]).into_owned();
    println!("\n--- the end of a prompt of {} bytes, held out\n{shown}\n--- and how the model goes on", prompt.len());
    let mut to = io::stdout().lock();
    let speed = generate(model, &settings, prompt, SAMPLE.1, &mut to)?;
    writeln!(to, "\n---\n")?;
    Ok(speed)
}

fn report(training: &Training, ngrams: &[(usize, f64)], speed: Speed) -> Table {
    let bits = training.run.curves.held_out.last().map_or(f64::NAN, |&(_, bits)| bits);
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(["", ""]);
    let mut row = |name: String, value: String| {
        table.add_row([name, value]);
    };
    row("Mamba, bits per held-out byte".into(), format!("{bits:.3}"));
    for &(order, bits) in ngrams {
        row(format!("n-gram of order {order}, the same"), format!("{bits:.3}"));
    }
    row("parameters".into(), parameters(training.model()).to_string());
    row("steps".into(), training.run.step.to_string());
    row("seconds of training".into(), format!("{:.0}", training.run.seconds));
    row("tokens per second, training".into(), format!("{:.0}", training.tokens_per_second()));
    row("tokens per second, prefill".into(), format!("{:.0}", speed.prefill));
    row("tokens per second, decoding".into(), format!("{:.0}", speed.decode));
    table
}
