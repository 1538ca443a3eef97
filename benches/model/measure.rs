//! Times and peaks of a case.

use std::time::Instant;

use serde_json::{Value, json};

use crate::Result;
use crate::case::{Case, What, name};
use crate::machine::Machine;
use crate::work::{Training, Work};

/// A case that is ready, warmed up.
pub struct Prepared {
    case: Case,
    work: Work,
    /// How many are timed as one.
    calls: usize,
}

/// What was measured of a case, in milliseconds of a call.
pub struct Measured {
    pub case: Case,
    pub parameters: usize,
    pub median: f64,
    pub min: f64,
    /// Medians of a training step's phases.
    pub phases: Option<[f64; 3]>,
    /// The most bytes that were allocated, and held for that, in the timed calls.
    pub peak: Option<[u64; 2]>,
}

impl Prepared {
    /// Calls that are timed as one take this long together, in milliseconds: the host runs ahead of the device in them, as
    /// it does in a long run.
    const TOGETHER: f64 = 200.0;

    pub fn new(machine: &Machine, case: &Case) -> Result<Self> {
        let config = case.model.config(machine.keeps);
        let mut prepared = Self { case: case.clone(), work: Work::new(&config, case, &machine.device)?, calls: 1 };
        // The first loads kernels and asks the driver for memory.
        prepared.timed(machine)?;
        if !matches!(prepared.work, Work::Serve(_)) {
            let first = prepared.timed(machine)?;
            prepared.calls = ((Self::TOGETHER / first).ceil() as usize).clamp(2, 512);
        }
        Ok(prepared)
    }

    pub fn case(&self) -> &Case {
        &self.case
    }

    /// Milliseconds of a call, by a clock that starts and stops when the device has nothing to do.
    fn timed(&mut self, machine: &Machine) -> Result<f64> {
        match &mut self.work {
            // Of texts of one token nothing but their prompts takes time.
            Work::Serve(serving) => {
                let length = serving.length;
                let prompts = clocked(machine, || serving.run(1))?;
                Ok((clocked(machine, || serving.run(length))? - prompts) / serving.steps())
            }
            work => Ok(clocked(machine, || (0..self.calls).try_for_each(|_| work.run()))? / self.calls as f64),
        }
    }

    pub fn measure(&mut self, machine: &Machine, repeats: usize) -> Result<Measured> {
        machine.reset_peak();
        let times = (0..repeats.max(1)).map(|_| self.timed(machine)).collect::<Result<Vec<_>>>()?;
        let peak = machine.peak();
        let phases = match &mut self.work {
            Work::Train(training) => {
                let laps = (0..repeats.max(1)).map(|_| machine.laps(|lap| training.phases(lap)));
                let laps = laps.collect::<Result<Vec<_>>>()?;
                let phase = |i: usize| median(laps.iter().map(|laps| laps[i]).collect());
                Some([phase(0), phase(1), phase(2)])
            }
            Work::Prefill(_) | Work::Decode(_) | Work::Serve(_) => None,
        };
        let min = times.iter().copied().fold(f64::INFINITY, f64::min);
        let parameters = self.work.parameters();
        Ok(Measured { case: self.case.clone(), parameters, median: median(times), min, phases, peak })
    }
}

/// Milliseconds of what is done, from an idle device to an idle device.
fn clocked(machine: &Machine, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    machine.synchronize()?;
    let start = Instant::now();
    run()?;
    machine.synchronize()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

impl Measured {
    pub fn tokens_per_second(&self) -> f64 {
        let tokens = if self.case.what == What::Serve { self.case.batch } else { self.case.tokens() };
        tokens as f64 / self.median * 1e3
    }

    /// A line for programs.
    pub fn json(&self) -> Value {
        let Case { what, model, mode, batch, length } = &self.case;
        let mut line = json!({
            "what": name(what), "model": name(model), "dtype": name(mode), "batch": batch, "length": length,
            "parameters": self.parameters, "ms": self.median, "min": self.min, "tokens_per_s": self.tokens_per_second(),
        });
        for (phase, ms) in Training::PHASES.into_iter().zip(self.phases.into_iter().flatten()) {
            line[format!("{phase}_ms")] = json!(ms);
        }
        if let Some(peak) = self.peak {
            let [used, reserved] = peak.map(mib);
            line["peak_mib"] = json!(used);
            line["reserved_mib"] = json!(reserved);
        }
        line
    }
}

pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
