//! Mamba, a Transformer, an LSTM and a hybrid, of as many parameters and on the same text: how well each predicts bytes that it
//! has not seen, how fast it trains, reads and writes, and how much it has to keep for that.
//!
//! ```text
//! cargo run --release --features nn --example compare -- --quick
//! ```
//!
//! Each trains by AdamW along a cosine, with the learning rate of the same short list that does best in short runs. Attention is
//! this crate's, in blocks; the LSTM is candle-nn's. `--json` prints a list of `{model, parameters, bits_per_byte, length,
//! train_tokens_per_s, prefill_tokens_per_s, decode_tokens_per_s, state_bytes}` and nothing else; what was not measured is `null`.
//! The picture is drawn in any case.
//! Decoding at a length is of one sequence after so many tokens; training is of steps whose sequences have that length.
//!
//! On a GPU models are larger and see more text, in larger batches:
//!
//! ```text
//! cargo run --release --features nn,candle-cuda --example compare -- --device cuda
//! ```
//!
//! The cell of the LSTM is some tens of launches a step there, so that it takes a quarter of an hour where the others take a minute:
//! `--models mamba,transformer,hybrid` leaves it out, and `--beside FILE` shows what an earlier run has measured of it.

#[allow(dead_code, reason = "another example's, of which this one uses a part")]
#[path = "../byte_lm/data.rs"]
mod data;
mod measure;
mod models;
mod output;
mod plot;
mod train;

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use candle_core::Device;
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

use data::Corpus;
use measure::Row;
use models::Kind;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Trains and times four kinds of models of the same size, side by side
#[derive(Debug, Parser)]
struct Arguments {
    /// Small models, few steps and short sequences: under three minutes, too few steps for what a Transformer comes to
    #[arg(long)]
    quick: bool,

    /// Text files, in UTF-8 [default: the repository's own documents and sources]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,

    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,

    /// Print the results as JSON and nothing else
    #[arg(long)]
    json: bool,

    /// Where to draw
    #[arg(long, value_name = "FILE", default_value = "compare.svg")]
    plot: PathBuf,

    /// Models to compare
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Kind::ALL, hide_default_value = true)]
    models: Vec<Kind>,

    /// The JSON of an earlier run with the same options, of other models, to be shown in the same table and picture
    #[arg(long, value_name = "FILE")]
    beside: Option<PathBuf>,

    /// Steps of each training run [default: 400, with --quick 150, on a GPU 500]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,

    /// Seed of the weights, of what is held out, and of the order of training
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Where the models run
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DeviceKind {
    Cpu,
    Cuda,
}

/// How much is done.
struct Plan {
    models: Vec<Kind>,
    /// The width of the residual streams.
    d_model: usize,
    /// Mamba blocks; the others have fewer layers, which weigh as much together.
    blocks: usize,
    steps: usize,
    /// Sequences in a step of training, and their length.
    batch: usize,
    length: usize,
    rates: &'static [f64],
    /// Held-out bytes.
    held_out: usize,
    /// Of steps of training that are timed.
    train_lengths: &'static [usize],
    /// Of texts that are read and gone on with.
    contexts: &'static [usize],
    seed: u64,
}

impl Plan {
    fn new(arguments: &Arguments) -> Self {
        let mut models = arguments.models.clone();
        // In the order of the table, and none twice.
        models.sort_by_key(|&kind| kind as usize);
        models.dedup();
        let full = Self {
            models,
            d_model: 128,
            blocks: 8,
            steps: arguments.steps.unwrap_or(400),
            batch: 8,
            length: 256,
            rates: &[1e-3, 3e-3, 1e-2, 3e-2],
            held_out: 128 << 10,
            train_lengths: &[256, 1024, 4096, 16_384],
            contexts: &[256, 1024, 4096, 16_384, 65_536],
            seed: arguments.seed,
        };
        match (arguments.quick, arguments.device) {
            (true, _) => Self {
                d_model: 64,
                blocks: 4,
                steps: arguments.steps.unwrap_or(150),
                length: 128,
                held_out: 16 << 10,
                train_lengths: &[256, 1024],
                contexts: &[256, 1024, 4096],
                ..full
            },
            (false, DeviceKind::Cpu) => full,
            // What a step of the LSTM takes there does not depend on how much is in it.
            (false, DeviceKind::Cuda) => {
                Self { d_model: 256, steps: arguments.steps.unwrap_or(500), batch: 32, held_out: 512 << 10, ..full }
            }
        }
    }

    /// The steps of a run that chooses a learning rate.
    fn short_steps(&self) -> usize {
        self.steps.div_ceil(4)
    }

    /// What a bar counts: steps of training, and lengths that are timed.
    fn work(&self) -> u64 {
        let training = self.steps + self.rates.len() * self.short_steps();
        (self.models.len() * (training + self.train_lengths.len() + self.contexts.len())) as u64
    }
}

/// What an earlier run has measured of models that are not among those of this one.
fn earlier(file: Option<&Path>, plan: &Plan) -> Result<Vec<Row>> {
    let Some(file) = file else { return Ok(Vec::new()) };
    let of_file = |error: &dyn Display| format!("--beside: {}: {error}", file.display());
    let text = std::fs::read_to_string(file).map_err(|error| of_file(&error))?;
    let rows: Vec<Row> = serde_json::from_str(&text).map_err(|error| of_file(&error))?;
    let others = Kind::ALL.iter().filter(|kind| !plan.models.contains(kind)).map(|kind| kind.name());
    let others: Vec<_> = others.collect();
    for row in &rows {
        if !others.contains(&&*row.model) {
            let expected = format_args!("expected models that are not in --models, {others:?}, got {:?}", row.model);
            return Err(of_file(&expected).into());
        }
        if !plan.contexts.contains(&row.length) {
            let expected = format_args!("expected lengths among {:?}, got {}", plan.contexts, row.length);
            return Err(of_file(&expected).into());
        }
    }
    Ok(rows)
}

fn run(arguments: &Arguments) -> Result<()> {
    let device = match arguments.device {
        DeviceKind::Cpu => Device::Cpu,
        DeviceKind::Cuda => Device::new_cuda(0).map_err(|error| format!("--device cuda: {error}"))?,
    };
    // SAFETY: all that this program does is put on candle's stream.
    unsafe { selective_scan::candle::use_one_stream(&device) };
    if arguments.steps == Some(0) {
        return Err("--steps: expected at least 1, got 0".into());
    }
    let plan = Plan::new(arguments);
    let mut corpus = Corpus::read(&arguments.text, 0.1, plan.seed)?;
    train::shorten(&mut corpus.held_out, [plan.held_out, plan.length]);
    if corpus.held_out.is_empty() {
        return Err("the text that is held out is shorter than a sequence of training".into());
    }
    // Drawn on standard error, where that is a terminal: beside `--json` too.
    let bar = ProgressBar::new(plan.work());
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {elapsed_precise} {msg}")?);
    bar.enable_steady_tick(Duration::from_secs(1));
    let (mut results, mut runs) = (earlier(arguments.beside.as_deref(), &plan)?, Vec::new());
    for (kind, config) in models::equally_large(&plan)? {
        let trained = train::tuned(kind, &config, &plan, &corpus, &device, &bar)?;
        let rows = measure::all(kind, &trained, &plan, &device, &bar)?;
        if arguments.json {
            // What is there already, should the rest be stopped.
            bar.suspend(|| eprintln!("{}", output::table(&rows)));
        }
        results.extend(rows);
        runs.push(output::Run { model: kind.name(), rates: trained.rates, chosen: trained.learning_rate });
    }
    bar.finish_and_clear();
    // Each model's rows together, in the order of the table.
    results.sort_by_key(|row| Kind::ALL.iter().position(|kind| kind.name() == row.model));
    plot::draw(&arguments.plot, &results).map_err(|error| format!("{}: {error}", arguments.plot.display()))?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&results)?);
        return Ok(());
    }
    println!("{}", output::table(&results));
    println!(
        "\nBits per byte at the end of short runs, by which learning rates are chosen:\n\n{}",
        output::runs(&runs)
    );
    println!("\n{}", output::notes(&results, &plan, corpus.train.len(), corpus.held_out_bytes()));
    println!("drawn in {}", arguments.plot.display());
    Ok(())
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
