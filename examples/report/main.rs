//! What the operators do on this machine, in one command: each is held to the `f64` reference and timed at the shapes
//! of real models, the scan beside the same scan unfused and beside softmax attention of the same width.
//!
//! ```text
//! cargo run --release --example report -- --quick
//! ```
//!
//! Exits with status 1 if a result is less accurate than the crate promises, and with 2 if it could not run.

#[path = "../common/mod.rs"]
mod common;

mod attention;
mod conv;
#[cfg(feature = "cuda")]
mod gpu;
mod math;
mod measure;
mod output;
mod plot;
mod run;
mod scan;
mod unfused;
mod update;

use std::error::Error;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use half::{bf16, f16};

use output::Rows;
use run::{MODELS, Model, Plan};

/// Checks every operator against the f64 reference and times it at the shapes of mamba-130m and mamba-2.8b
///
/// Times are medians of several runs, or single where a run takes more than a second. One state step is one time step of
/// one channel and state; for the convolution, n counts its taps instead of states, and attention is given the n of the
/// scan that it stands beside. The unfused scan and attention always run in f32.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where the operators run
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,

    /// Threads to run on; may be repeated [default: 1, and all cores]
    #[arg(long, value_name = "N")]
    threads: Vec<NonZeroUsize>,

    /// Type of the activations
    #[arg(long, value_enum, default_value_t = Type::F32)]
    dtype: Type,

    /// Whose shapes to take [default: both, or 130m with --quick]
    #[arg(long, value_enum)]
    model: Option<Choice>,

    /// Longest sequence; lengths are the powers of two from 512 on
    #[arg(long, value_name = "L", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(512..))]
    max_length: u32,

    /// Only mamba-130m at lengths 512 and 2048: under a minute
    #[arg(long)]
    quick: bool,

    /// Print a JSON list of the results and nothing else on the standard output
    #[arg(long)]
    json: bool,

    /// Where to draw time against length [default: report.svg, nothing with --quick or --json]
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,

    /// Seed of the random inputs [default: drawn afresh]
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Device {
    Cpu,
    /// The first GPU: the operators alone, timed by its own events, since the unfused scan and attention here are code
    /// for the CPU
    #[cfg(feature = "cuda")]
    Cuda,
}

impl Device {
    fn is_cpu(self) -> bool {
        matches!(self, Self::Cpu)
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Type {
    F32,
    F16,
    Bf16,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Choice {
    #[value(name = "130m")]
    Small,
    #[value(name = "2.8b")]
    Large,
    Both,
}

impl Arguments {
    fn plan(&self) -> Plan {
        let default_model = if self.quick { Choice::Small } else { Choice::Both };
        let models: &[Model] = match self.model.unwrap_or(default_model) {
            Choice::Small => &MODELS[..1],
            Choice::Large => &MODELS[1..],
            Choice::Both => &MODELS,
        };
        let longest = self.max_length as usize;
        let lengths = if self.quick { vec![512, 2048] } else { (9..32).map(|exponent| 1 << exponent).collect() };
        let mut threads: Vec<_> = self.threads.iter().map(|n| n.get()).collect();
        if !self.device.is_cpu() {
            threads = vec![1];
        } else if threads.is_empty() {
            threads = common::default_threads();
        }
        threads.sort_unstable();
        threads.dedup();
        Plan {
            models,
            lengths: lengths.into_iter().filter(|&length| length <= longest).collect(),
            threads,
            seed: self.seed.unwrap_or_else(rand::random),
            quick: self.quick,
            device: self.device,
        }
    }

    fn run(&self) -> Result<bool, Box<dyn Error>> {
        let plan = self.plan();
        let rows = match self.dtype {
            Type::F32 => plan.run::<f32>()?,
            Type::F16 => plan.run::<f16>()?,
            Type::Bf16 => plan.run::<bf16>()?,
        };
        self.show(&plan, &rows)?;
        Ok(rows.failures().next().is_none())
    }

    fn show(&self, plan: &Plan, rows: &Rows) -> Result<(), Box<dyn Error>> {
        if self.json {
            println!("{}", rows.json()?);
        } else {
            println!("{}", rows.table());
        }
        // With --json the standard output is for the list alone.
        let say = |line: String| if self.json { eprintln!("{line}") } else { println!("{line}") };
        for note in &rows.notes {
            say(format!("note: {note}"));
        }
        let default_plot = (!self.quick && !self.json).then(|| PathBuf::from("report.svg"));
        if let Some(path) = self.plot.clone().or(default_plot) {
            plot::draw(&path, plan, rows).map_err(|error| format!("cannot draw {}: {error}", path.display()))?;
            say(format!("time against length is drawn in {}", path.display()));
        }
        say(format!("seed of the inputs: {}", plan.seed));
        for row in rows.failures() {
            say(format!("TOO INACCURATE: {row}"));
        }
        match rows.failures().count() {
            0 => say(format!("all {} relative errors are within their bounds", rows.rows.len())),
            failures => say(format!("{failures} of {} relative errors exceed their bounds", rows.rows.len())),
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    match Arguments::parse().run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
