//! The folder of a training run.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use candle_core::{Error, Result};

const LOCK: &str = ".lock";
/// The end of the names of what is no checkpoint, or none any more.
const PART: &str = ".part";

/// The folder of a training run, and its newest checkpoint. One process at a time trains in a folder, as long as this lives.
///
/// A checkpoint is a folder `step-N`, which has this name only once it is complete; then older ones are removed. Under
/// `step-N.part` are those that are not complete yet, or not any more.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    /// Locked.
    _lock: File,
}

impl RunFolder {
    /// Makes the folder if there is none, takes it for this process, and removes what a process that was killed has left.
    ///
    /// # Errors
    /// Another process trains there; what the file system refuses.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let lock = path.join(LOCK);
        fs::create_dir_all(&path).map_err(|error| at(&path, error))?;
        let file = File::options().write(true).create(true).truncate(false).open(&lock);
        let file = file.map_err(|error| at(&lock, error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(at(&path, "another process trains in this folder")),
            Err(TryLockError::Error(error)) => return Err(at(&lock, error)),
        }
        all(&path, PART)?.iter().try_for_each(|(_, path)| remove(path))?;
        Ok(Self { path, _lock: file })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The newest checkpoint of a folder, also of one that another process trains in; none if there is no such folder.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn newest(path: impl AsRef<Path>) -> Result<Option<PathBuf>> {
        Ok(all(path.as_ref(), "")?.pop().map(|(_, path)| path))
    }

    /// Removes all checkpoints, so that another run can begin here.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn clear(&self) -> Result<()> {
        all(&self.path, "")?.iter().try_for_each(|&(step, _)| self.retire(step))
    }

    /// Makes a checkpoint of what `write` writes into the folder that it is given, and then removes older ones.
    pub(super) fn add(&self, step: usize, write: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let (complete, unfinished) = (self.checkpoint(step), self.part(step));
        remove(&unfinished)?;
        fs::create_dir_all(&unfinished).map_err(|error| at(&unfinished, error))?;
        write(&unfinished)?;
        let finish = || {
            for entry in fs::read_dir(&unfinished)? {
                File::open(entry?.path())?.sync_all()?;
            }
            // One of the same step, from a run that was resumed further back.
            if complete.exists() {
                fs::remove_dir_all(&complete)?;
            }
            fs::rename(&unfinished, &complete)?;
            if cfg!(unix) {
                // Older ones go only when this one's name survives a loss of power.
                File::open(&self.path)?.sync_all()?;
            }
            Ok(())
        };
        finish().map_err(|error: std::io::Error| at(&complete, error))?;
        for (older, _) in all(&self.path, "")? {
            if older < step {
                self.retire(older)?;
            }
        }
        Ok(complete)
    }

    fn checkpoint(&self, step: usize) -> PathBuf {
        self.path.join(format!("step-{step}"))
    }

    fn part(&self, step: usize) -> PathBuf {
        self.path.join(format!("step-{step}{PART}"))
    }

    /// Removes a checkpoint, which is none any more before its first file goes.
    fn retire(&self, step: usize) -> Result<()> {
        let (from, to) = (self.checkpoint(step), self.part(step));
        if from.exists() {
            remove(&to)?;
            fs::rename(&from, &to).map_err(|error| at(&from, error))?;
            remove(&to)?;
        }
        Ok(())
    }
}

/// All that are called `step-N` and then `end`, by their steps.
fn all(folder: &Path, end: &str) -> Result<Vec<(usize, PathBuf)>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(|error| at(folder, error))? {
        let path = entry.map_err(|error| at(folder, error))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let step = name.and_then(|name| name.strip_prefix("step-")?.strip_suffix(end)?.parse().ok());
        found.extend(step.map(|step| (step, path)));
    }
    found.sort();
    Ok(found)
}

fn remove(path: &Path) -> Result<()> {
    if path.exists() {
        fs::remove_dir_all(path).map_err(|error| at(path, error))?;
    }
    Ok(())
}

/// An error with the path that it is about.
pub(super) fn at(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::msg(format_args!("{}: {error}", path.display()))
}
