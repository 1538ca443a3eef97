//! Images in patches: Vision Mamba beside a Transformer of the same size, how many images each gets right, and what each
//! takes as images have more patches.
//!
//! ```text
//! cargo run --release --features nn,avx512-gemm --example images                 # 8 x 8 digits, then up to 16,384 patches
//! cargo run --release --features nn,avx512-gemm --example images -- --quick      # … in seconds
//! cargo run --release --features nn,candle-cuda --example images -- --data MNIST --patch 4 --device cuda
//! ```
//!
//! Attention compares each patch with every other, and takes time that grows with the square of their number; its memory does
//! not, as this crate computes it in blocks. `--json` prints `{accuracy: [...], cost: [...]}` and nothing else.

mod cost;
#[path = "../digits/mod.rs"]
mod digits;
mod model;

use std::error::Error;
use std::process::ExitCode;

use candle_nn::VarBuilder;
use clap::Parser;
use digits::{Base, Options, Recipe, percent, table, train};
use model::{Classifier, Kind, Sizes};
use selective_scan::nn::train::Group;
use serde::Serialize;

/// Trains Vision Mamba and a Transformer to tell images apart, and prints what they get right and what they take
#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    options: Options,

    /// Rows and columns of a patch [default: a quarter of the rows of an image]
    #[arg(long, value_name = "PIXELS")]
    patch: Option<usize>,

    /// Which model; may be repeated [default: all]
    #[arg(long, value_enum)]
    model: Vec<Kind>,

    /// The most patches of an image whose cost is measured: a power of four from 64 on; 0 for none
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    patches: usize,

    /// Measure the cost of one model on images of so many patches along each axis, and print seconds and bytes
    #[arg(long, hide = true, value_name = "N")]
    measure: Option<usize>,
}

const FULL: Base = Base { epochs: 60, layers: 4, d_model: 64 };
const QUICK: Base = Base { epochs: 10, layers: 2, d_model: 32 };

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

/// All that is printed as JSON.
#[derive(Debug, Serialize)]
struct Report {
    accuracy: Vec<Row>,
    cost: Vec<cost::Row>,
}

impl Arguments {
    fn run(&self) -> Result<(), Box<dyn Error>> {
        let base = self.options.sizes(FULL, QUICK);
        if let Some(side) = self.measure {
            let kind = self.model.first().ok_or("--measure: expected a --model, got none")?;
            return cost::measure(*kind, side, base, &self.options);
        }
        let all = [Kind::Vim, Kind::Transformer];
        let kinds = if self.model.is_empty() { &all } else { &self.model[..] };
        let accuracy = kinds.iter().map(|&kind| self.train(kind, base)).collect::<Result<Vec<_>, _>>()?;
        if !self.options.json() {
            self.print(&accuracy);
        }
        let most = if self.options.quick() { self.patches.min(1024) } else { self.patches };
        let cost = cost::rows(kinds, most, &self.options)?;
        match self.options.json() {
            true => println!("{}", serde_json::to_string_pretty(&Report { accuracy, cost })?),
            false if cost.is_empty() => {}
            false => println!("\nOne image at a time, without gradients:\n\n{}", cost::table(&cost)),
        }
        Ok(())
    }

    fn train(&self, kind: Kind, base: Base) -> Result<Row, Box<dyn Error>> {
        let (digits, device) = (self.options.digits()?, self.options.device()?);
        let image = [digits.train.rows, digits.train.columns];
        let patch = self.patch.unwrap_or((image[0] / 4).max(1));
        let sizes = Sizes { image, patch, classes: digits.classes(), base, seed: self.options.seed() };
        let decay = self.options.weight_decay();
        // Matrices of the layers decay, as those of language models do.
        let decays = |name: &str| name.ends_with("_proj.weight");
        let group = |name: &str| Group { learning_rate: 1.0, weight_decay: if decays(name) { decay } else { 0.0 } };
        let recipe = Recipe {
            name: kind.name(),
            epochs: base.epochs,
            learning_rate: self.options.learning_rate(kind.learning_rate()),
            group: &group,
        };
        let build = |vb: VarBuilder<'_>| Classifier::new(kind, &sizes, vb);
        let trained = train(&recipe, &digits, &self.options, &device, build)?;
        let seconds = trained.time.as_secs_f64();
        Ok(Row {
            model: kind.name(),
            parameters: trained.parameters,
            epochs: base.epochs,
            seconds,
            images_per_second: trained.images as f64 / seconds,
            loss: trained.loss,
            right: trained.right,
            asked: trained.asked,
        })
    }

    fn print(&self, rows: &[Row]) {
        let header = ["model", "parameters", "training", "images/s", "loss in training", "held-out images right"];
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
