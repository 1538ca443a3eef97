//! A training run in a folder, from which it goes on exactly where it stopped.
//!
//! Each checkpoint is a folder `step-N`: the model as Hugging Face has it, the optimizer's moments, and `run.json`, the
//! rest. It has this name only once it is complete; then older ones are removed.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use selective_scan::nn::{LanguageModel, Naming};
use serde::{Deserialize, Serialize};

use crate::data::Position;
use crate::optimizer::AdamW;
use crate::{Result, RunOptions};

const MOMENTS: &str = "moments.safetensors";
const RUN: &str = "run.json";

/// What a run is beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    pub options: RunOptions,
    /// Of the text, see [`Corpus`](crate::data::Corpus).
    pub fingerprint: u64,
    /// Steps taken.
    pub step: usize,
    /// Where the next step reads.
    pub position: Position,
    /// Seconds that its steps took.
    pub seconds: f64,
    pub curves: Curves,
}

/// Bits per byte against steps.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Curves {
    /// Means over the steps since the point before.
    pub train: Vec<(usize, f64)>,
    pub held_out: Vec<(usize, f64)>,
    /// The sum and number of the losses behind the last point of `train`.
    pub pending: (f64, usize),
}

/// The folder's newest checkpoint.
pub fn newest(folder: &Path) -> Result<Option<PathBuf>> {
    Ok(all(folder)?.pop().map(|(_, path)| path))
}

fn all(folder: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let at = |error| format!("{}: {error}", folder.display());
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(at)? {
        let path = entry.map_err(at)?.path();
        let step = path.file_name().and_then(|name| name.to_str()?.strip_prefix("step-")?.parse().ok());
        found.extend(step.map(|step| (step, path)));
    }
    found.sort();
    Ok(found)
}

/// Writes a checkpoint into `folder`.
pub fn save(folder: &Path, run: &Run, model: &LanguageModel, optimizer: &AdamW) -> Result<()> {
    let complete = folder.join(format!("step-{}", run.step));
    let unfinished = folder.join(format!("step-{}.part", run.step));
    remove(&unfinished)?;
    model.save(&unfinished, Naming::HuggingFace)?;
    candle_core::safetensors::save(&optimizer.moments(), unfinished.join(MOMENTS))?;
    fs::write(unfinished.join(RUN), serde_json::to_string_pretty(run)?)?;
    remove(&complete)?;
    fs::rename(&unfinished, &complete).map_err(|error| format!("{}: {error}", complete.display()))?;
    for (step, path) in all(folder)? {
        if step < run.step {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Removes all checkpoints of `folder`, so that another run can begin there.
pub fn clear(folder: &Path) -> Result<()> {
    all(folder)?.iter().try_for_each(|(_, path)| remove(path))
}

fn remove(path: &Path) -> Result<()> {
    if path.exists() {
        fs::remove_dir_all(path).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

/// Reads `run.json` of a checkpoint.
pub fn read_run(checkpoint: &Path) -> Result<Run> {
    let path = checkpoint.join(RUN);
    let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?)
}

/// Gives an optimizer the moments of a checkpoint behind so many steps.
pub fn restore(checkpoint: &Path, optimizer: &mut AdamW, steps: usize, device: &Device) -> Result<()> {
    let path = checkpoint.join(MOMENTS);
    let at = |error| format!("{}: {error}", path.display());
    let moments = candle_core::safetensors::load(&path, device).map_err(at)?;
    Ok(optimizer.restore(moments, steps).map_err(at)?)
}
