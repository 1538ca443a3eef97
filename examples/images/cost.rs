//! What a model takes for images of more and more patches. Each measurement is a process of its own, whose peak of memory
//! the system knows.

use std::error::Error;
use std::process::{Command, Stdio};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use serde::Serialize;

use crate::digits::{self, Base, Model, Options};
use crate::model::{Classifier, Kind, Sizes};

/// Pixels along each side of a patch.
const PATCH: usize = 4;

/// The cost of an image.
#[derive(Debug, Serialize)]
pub struct Row {
    pub model: &'static str,
    pub patches: usize,
    pub images_per_second: f64,
    /// Of the process, beyond what it had before the first image; on a GPU nothing is known of it.
    pub bytes: Option<u64>,
}

/// The costs of models on images of 64 patches, four times as many, and so on up to `most`.
pub fn rows(kinds: &[Kind], most: usize, options: &Options) -> Result<Vec<Row>, Box<dyn Error>> {
    let sides = (3..).map(|exponent| 1usize << exponent).take_while(|side| side * side <= most);
    let mut rows = Vec::new();
    for side in sides {
        for &kind in kinds {
            rows.push(in_a_process(kind, side, options)?);
        }
    }
    Ok(rows)
}

fn in_a_process(kind: Kind, side: usize, options: &Options) -> Result<Row, Box<dyn Error>> {
    let (name, patches) = (kind.name(), side * side);
    eprintln!("{name}, {patches} patches");
    // The program's own flags, then what is measured.
    let output = Command::new(std::env::current_exe()?)
        .args(options.of_sizes())
        .args(["--model", kind.flag(), "--measure", &side.to_string()])
        .stderr(Stdio::inherit())
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    match text.split_whitespace().collect::<Vec<_>>()[..] {
        [seconds, bytes] if output.status.success() => Ok(Row {
            model: name,
            patches,
            images_per_second: 1.0 / seconds.parse::<f64>()?,
            bytes: bytes.parse().ok(),
        }),
        _ => Err(format!("{name} at {patches} patches: {}", output.status).into()),
    }
}

/// Prints the seconds that an image takes, of several the fastest, and the bytes.
pub fn measure(kind: Kind, side: usize, base: Base, options: &Options) -> Result<(), Box<dyn Error>> {
    let (device, variables) = (options.device()?, VarMap::new());
    let image = [side.checked_mul(PATCH).ok_or("--measure: expected fewer patches")?; 2];
    let sizes = Sizes { image, patch: PATCH, classes: 10, base, seed: options.seed() };
    Classifier::new(kind, &sizes, VarBuilder::from_varmap(&variables, DType::F32, &device))?;
    // Once more, of tensors of which candle tracks nothing.
    let data = variables.data().lock().map_err(|_| "the lock of the variables is poisoned")?;
    let tensors = data.iter().map(|(name, variable)| (name.clone(), variable.as_detached_tensor())).collect();
    drop(data);
    let model = Classifier::new(kind, &sizes, VarBuilder::from_tensors(tensors, DType::F32, &device))?;
    let images = Tensor::randn(0f32, 1.0, (1, image[0], image[1]), &device)?;
    let before = peak_memory();
    let (mut best, begin) = (f64::INFINITY, Instant::now());
    let mut repeats = 0;
    while repeats < 2 || (repeats < 20 && begin.elapsed().as_secs_f64() < 2.0) {
        let started = Instant::now();
        // Reading the logits waits for the device.
        model.forward(&images)?.to_vec2::<f32>()?;
        best = best.min(started.elapsed().as_secs_f64());
        repeats += 1;
    }
    let bytes = match (&device, before, peak_memory()) {
        (Device::Cpu, Some(before), Some(after)) => (after - before).to_string(),
        _ => "unknown".into(),
    };
    println!("{best} {bytes}");
    Ok(())
}

/// The most memory that this process has had, in bytes, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib * 1024)
}

/// As the README has it.
pub fn table(rows: &[Row]) -> impl std::fmt::Display {
    let cells = rows.iter().map(|row| {
        let mib = |bytes: u64| format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20));
        [
            row.model.to_string(),
            row.patches.to_string(),
            match row.images_per_second {
                many if many >= 100.0 => format!("{many:.0}"),
                few => format!("{few:.2}"),
            },
            row.bytes.map_or("-".into(), mib),
        ]
    });
    digits::table(["model", "patches", "images/s", "memory"], cells)
}
