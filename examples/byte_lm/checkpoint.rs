//! What a training run is beside its tensors: it stands in the checkpoints, from which the run goes on exactly where it
//! stopped.

use std::path::Path;

use selective_scan::nn::train;
use serde::{Deserialize, Serialize};

use crate::data::Position;
use crate::{Result, RunOptions};

/// What a run is beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    pub options: RunOptions,
    /// Of the text, see [`Corpus`](crate::data::Corpus).
    pub fingerprint: u64,
    /// Steps taken, which the trainer counts.
    #[serde(skip)]
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

/// What a checkpoint says of its run. It is checked as the command line is.
pub fn read_run(checkpoint: &Path) -> Result<Run> {
    let (step, run) = train::read_run::<Run>(checkpoint)?;
    run.options.check().map_err(|error| format!("{}: {error}", checkpoint.join("run.json").display()))?;
    Ok(Run { step, ..run })
}
