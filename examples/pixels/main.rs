//! Images read one pixel at a time: the sequence that S4's papers measure memory by (sequential MNIST; Gu, Goel and Ré 2022,
//! arXiv 2111.00396). What was written at the top must still be known at the bottom, hundreds of steps later.
//!
//! ```text
//! cargo run --release --features nn,avx512-gemm --example pixels                          # 8 x 8 digits, a table in minutes
//! cargo run --release --features nn,avx512-gemm --example pixels -- --quick               # … in seconds
//! cargo run --release --features nn,candle-cuda --example pixels -- --data MNIST --device cuda --model s6-both
//! ```
//!
//! S4D with each way to begin, S4, and Mamba's layer in one direction and in two, of one width and depth. `--json` prints
//! the list of rows, `{model, parameters, epochs, seconds, images_per_second, loss, right, asked}`, and nothing else.

#[path = "../digits/mod.rs"]
mod digits;
mod model;

use std::error::Error;
use std::process::ExitCode;

use candle_nn::VarBuilder;
use clap::Parser;
use digits::{Base, Options, Recipe, percent, table, train};
use model::{Classifier, Kind};
use selective_scan::nn::s4_group;
use selective_scan::nn::train::Group;
use serde::Serialize;

/// Trains models that read images one pixel at a time to tell them apart, and prints how many they get right
#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    options: Options,

    /// Which model to train; may be repeated [default: all]
    #[arg(long, value_enum)]
    model: Vec<Kind>,

    /// States of each channel: real ones of S6, and pairs of S4 and S4D [default: 16, and 32 pairs]
    #[arg(long, value_name = "N")]
    d_state: Option<usize>,
}

const FULL: Base = Base { epochs: 30, layers: 2, d_model: 64 };
const QUICK: Base = Base { epochs: 8, layers: 1, d_model: 32 };

/// A model and what came of it.
#[derive(Debug, Serialize)]
struct Row {
    model: &'static str,
    parameters: usize,
    epochs: usize,
    seconds: f64,
    images_per_second: f64,
    loss: f64,
    right: usize,
    asked: usize,
}

impl Arguments {
    fn run(&self) -> Result<(), Box<dyn Error>> {
        let digits = self.options.digits()?;
        let device = self.options.device()?;
        let sizes = self.options.sizes(FULL, QUICK);
        let all = [Kind::S4dLegs, Kind::S4dLin, Kind::S4dInv, Kind::S4dReal, Kind::S4, Kind::S6, Kind::S6Both];
        let kinds = if self.model.is_empty() { &all } else { &self.model[..] };
        if !self.options.json() {
            println!(
                "{} images of {} steps to train on, {} times; {} held out; {} layers of width {}; seed {}",
                digits.train.len(),
                digits.train.size(),
                sizes.epochs,
                digits.test.len(),
                sizes.layers,
                sizes.d_model,
                self.options.seed(),
            );
        }
        let mut rows = Vec::new();
        for &kind in kinds {
            let config = kind.config(sizes, &digits, self.d_state, self.options.seed());
            let decay = self.options.weight_decay();
            // S4's papers train the systems' own parameters at a tenth of the rate of the others.
            let group = |name: &str| match kind.is_s4() {
                true => s4_group(name, 0.1, decay),
                false => {
                    Group { learning_rate: 1.0, weight_decay: if name.ends_with("_proj.weight") { decay } else { 0.0 } }
                }
            };
            let recipe = Recipe {
                name: kind.name(),
                epochs: sizes.epochs,
                learning_rate: self.options.learning_rate(kind.learning_rate()),
                group: &group,
            };
            let build = |vb: VarBuilder<'_>| Classifier::new(&config, vb);
            let trained = train(&recipe, &digits, &self.options, &device, build)?;
            let seconds = trained.time.as_secs_f64();
            rows.push(Row {
                model: kind.name(),
                parameters: trained.parameters,
                epochs: sizes.epochs,
                seconds,
                images_per_second: trained.images as f64 / seconds,
                loss: trained.loss,
                right: trained.right,
                asked: trained.asked,
            });
        }
        if self.options.json() {
            println!("{}", serde_json::to_string_pretty(&rows)?);
            return Ok(());
        }
        let header = ["model", "parameters", "time", "images/s", "loss in training", "held-out images right"];
        let cells = rows.iter().map(|row| {
            [
                row.model.to_string(),
                row.parameters.to_string(),
                format!("{:.0} s", row.seconds),
                format!("{:.0}", row.images_per_second),
                format!("{:.4}", row.loss),
                percent(row.right, row.asked),
            ]
        });
        println!("{}", table(header, cells));
        Ok(())
    }
}

fn main() -> ExitCode {
    match Arguments::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
