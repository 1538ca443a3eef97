//! A training run in a folder, from which it goes on exactly where it stopped.
//!
//! Each checkpoint is a folder `step-N`: the model as Hugging Face has it, the optimizer's moments, and `run.json`, the
//! rest. It has this name only once it is complete; then older ones are removed. Under `step-N.part` are those that are not
//! complete yet, or not any more. One process at a time trains in a folder, which it locks.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use candle_core::Device;
use selective_scan::nn::train::AdamW;
use selective_scan::nn::{CheckpointFormat, LanguageModel};
use serde::{Deserialize, Serialize};

use crate::data::Position;
use crate::{Result, RunOptions};

const MOMENTS: &str = "moments.safetensors";
const RUN: &str = "run.json";
const LOCK: &str = ".lock";
/// The end of the names of what is no checkpoint, or none any more.
const PART: &str = ".part";

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
    /// The sum and number of the losses after the last point of `train`.
    pub pending: (f64, usize),
}

/// Makes the folder of a run, takes it for this process as long as what is given lives, and removes what a process that
/// was killed has left.
pub fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let at = |error| format!("{}: {error}", path.display());
    fs::create_dir_all(folder).map_err(at)?;
    let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(at)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(format!("{}: another process trains in this folder", folder.display()).into());
        }
        Err(TryLockError::Error(error)) => return Err(at(error).into()),
    }
    all(folder, PART)?.iter().try_for_each(|(_, path)| remove(path))?;
    Ok(file)
}

/// The folder's newest checkpoint.
pub fn newest(folder: &Path) -> Result<Option<PathBuf>> {
    Ok(all(folder, "")?.pop().map(|(_, path)| path))
}

/// All that are called `step-N` and then `end`, by their steps.
fn all(folder: &Path, end: &str) -> Result<Vec<(usize, PathBuf)>> {
    let at = |error| format!("{}: {error}", folder.display());
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(at)? {
        let path = entry.map_err(at)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let step = name.and_then(|name| name.strip_prefix("step-")?.strip_suffix(end)?.parse().ok());
        found.extend(step.map(|step| (step, path)));
    }
    found.sort();
    Ok(found)
}

/// Writes a checkpoint into `folder`.
pub fn save(folder: &Path, run: &Run, model: &LanguageModel, optimizer: &AdamW) -> Result<()> {
    let (complete, unfinished) = (path(folder, run.step), part(folder, run.step));
    remove(&unfinished)?;
    model.save(&unfinished, CheckpointFormat::HuggingFace)?;
    let (moments, rest) = (unfinished.join(MOMENTS), unfinished.join(RUN));
    candle_core::safetensors::save(&optimizer.moments(), &moments)?;
    let finish = || {
        fs::write(&rest, serde_json::to_string_pretty(run)?)?;
        // That of any new file, where the other is for its owner alone.
        fs::set_permissions(&moments, fs::metadata(&rest)?.permissions())?;
        for file in [&moments, &rest] {
            File::open(file)?.sync_all()?;
        }
        fs::rename(&unfinished, &complete)?;
        if cfg!(unix) {
            // Older ones go only when this one's name survives a loss of power.
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    };
    finish().map_err(|error: Box<dyn std::error::Error>| format!("{}: {error}", complete.display()))?;
    for (step, _) in all(folder, "")? {
        if step < run.step {
            retire(folder, step)?;
        }
    }
    Ok(())
}

/// Removes all checkpoints of `folder`, so that another run can begin there.
pub fn clear(folder: &Path) -> Result<()> {
    all(folder, "")?.iter().try_for_each(|&(step, _)| retire(folder, step))
}

fn path(folder: &Path, step: usize) -> PathBuf {
    folder.join(format!("step-{step}"))
}

fn part(folder: &Path, step: usize) -> PathBuf {
    folder.join(format!("step-{step}{PART}"))
}

/// Removes a checkpoint, which is none any more before its first file goes.
fn retire(folder: &Path, step: usize) -> Result<()> {
    let (from, to) = (path(folder, step), part(folder, step));
    if from.exists() {
        remove(&to)?;
        fs::rename(&from, &to).map_err(|error| format!("{}: {error}", from.display()))?;
        remove(&to)?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    if path.exists() {
        fs::remove_dir_all(path).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

/// Reads `run.json` of a checkpoint. What it says is checked as the command line is.
pub fn read_run(checkpoint: &Path) -> Result<Run> {
    let path = checkpoint.join(RUN);
    let read = || {
        let run: Run = serde_json::from_str(&fs::read_to_string(&path)?)?;
        run.options.check()?;
        Ok(run)
    };
    Ok(read().map_err(|error: Box<dyn std::error::Error>| format!("{}: {error}", path.display()))?)
}

/// Gives an optimizer the moments of a checkpoint after that many steps.
pub fn restore(checkpoint: &Path, optimizer: &mut AdamW, steps: usize, device: &Device) -> Result<()> {
    let path = checkpoint.join(MOMENTS);
    let at = |error| format!("{}: {error}", path.display());
    let moments = candle_core::safetensors::load(&path, device).map_err(at)?;
    Ok(optimizer.restore(moments, steps).map_err(at)?)
}
