//! Trains adapters of low rank (LoRA; Hu et al. 2021, arXiv 2106.09685) beside the frozen matrices of a model of bytes, and
//! saves the two merged.
//!
//! ```text
//! cargo run --release --features nn --example byte_lm -- --steps 500          # a model to begin with
//! cargo run --release --features nn --example finetune -- target/byte_lm/step-500 book.txt target/finetuned
//! cargo run --release --features nn --example byte_lm -- generate --from target/finetuned
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use clap::Parser;
use selective_scan::nn::train::{AdamWConfig, Schedule, Trainer, TrainerConfig, cross_entropy};
use selective_scan::nn::{Checkpoint, LanguageModel, SaveOptions};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Trains adapters on a text, and saves the model with them
#[derive(Debug, Parser)]
struct Arguments {
    /// Folder of a checkpoint of a model of bytes
    from: PathBuf,
    /// Text to learn
    text: PathBuf,
    /// Folder to write to
    to: PathBuf,
    /// Rank of the adapters
    #[arg(long, value_name = "N", default_value_t = 4)]
    rank: usize,
    /// Steps of training, each with a sequence of 512 bytes
    #[arg(long, value_name = "N", default_value_t = 200)]
    steps: usize,
    /// Highest learning rate
    #[arg(long, value_name = "RATE", default_value_t = 1e-2)]
    learning_rate: f64,
}

/// The adapters of a model: for each matrix `(out, in)`, `up` `(out, rank)` and `down` `(rank, in)`. What is added to the
/// matrix is their product, which is zero at first.
struct Adapters(BTreeMap<String, [Var; 2]>);

impl Adapters {
    fn new(model: &LanguageModel, rank: usize) -> Result<Self> {
        let mut adapters = BTreeMap::new();
        for (name, matrix) in model.named_tensors() {
            if name.ends_with("in_proj.weight") || name.ends_with("out_proj.weight") {
                let ((out, fan_in), device) = (matrix.dims2()?, matrix.device());
                let up = Var::zeros((out, rank), DType::F32, device)?;
                let down = Var::randn(0f32, (fan_in as f32).sqrt().recip(), (rank, fan_in), device)?;
                adapters.insert(name, [up, down]);
            }
        }
        Ok(Self(adapters))
    }

    /// The variables by name, for an optimizer.
    fn variables(&self) -> Result<VarMap> {
        let map = VarMap::new();
        {
            let mut variables = map.data().lock().map_err(|_| "the lock of the variables is poisoned")?;
            for (name, [up, down]) in &self.0 {
                variables.insert(format!("{name}.up"), up.clone());
                variables.insert(format!("{name}.down"), down.clone());
            }
        }
        Ok(map)
    }

    /// The model with the adapters' products added. Gradients come to the adapters.
    fn apply(&self, model: &LanguageModel) -> candle_core::Result<LanguageModel> {
        model.map_parameters(|name, matrix| match self.0.get(name) {
            Some([up, down]) => matrix + up.matmul(down)?,
            None => Ok(matrix.clone()),
        })
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let checkpoint = Checkpoint::read(&arguments.from, &Device::Cpu)?;
    let model = checkpoint.model(DType::F32)?;
    let text: Vec<u32> = fs::read(&arguments.text)?.into_iter().map(u32::from).collect();
    let length = 512.min(text.len().saturating_sub(1));
    if length == 0 {
        return Err(format!("{}: expected two bytes or more", arguments.text.display()).into());
    }
    let adapters = Adapters::new(&model, arguments.rank)?;
    let config = TrainerConfig {
        learning_rate: arguments.learning_rate,
        schedule: Schedule::Cosine { warmup: 10, last: 0.0 },
        steps: arguments.steps,
        optimizer: AdamWConfig { weight_decay: 0.0, clip: Some(1.0), ..AdamWConfig::default() },
        ..TrainerConfig::default()
    };
    let variables = adapters.variables()?;
    // What is trained is the model with its adapters, of which the variables are the adapters'.
    let mut trainer = Trainer::new((model, adapters), &variables, config)?;
    for step in 0..arguments.steps {
        let start = step * length % (text.len() - length);
        let part = |from: usize| Tensor::new(&text[from..from + length], &Device::Cpu)?.unsqueeze(0);
        let report = trainer.step(&[(part(start)?, part(start + 1)?)], |(model, adapters), (ids, targets)| {
            // The sums are computed again, for the adapters have changed.
            cross_entropy(&adapters.apply(model)?.forward(ids)?, targets)
        })?;
        if step % 20 == 0 || step + 1 == arguments.steps {
            println!("step {step}: {:.3} bits per byte", report.loss()? / std::f32::consts::LN_2);
        }
    }
    let (model, adapters) = trainer.model();
    let merged = adapters.apply(model)?.detach()?;
    checkpoint.save(&merged, &arguments.to, &SaveOptions::new(checkpoint.format))?;
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
