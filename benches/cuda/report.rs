//! The table, on standard output and in a file.

use std::fs::File;
use std::io::{BufRead, Write};
use std::path::Path;
use std::process::Command;

use cudarc::driver::sys;

use crate::case::Case;
use crate::limits::Limits;
use crate::timing::{Times, Work};
use crate::{Bench, Result};

pub struct Report {
    file: Option<File>,
}

const COLUMNS: &str = "operator,direction,dtype,batch,len,d_inner,d_state or width,variant,median ms,min ms,rate,unit,\
                       special ms,issue ms,memory ms,bound ms,bound by,part of bound";

impl Report {
    pub fn new(bench: &Bench, csv: Option<&Path>) -> Result<Self> {
        let mut report = Self { file: csv.map(File::create).transpose()? };
        // The path of the program is no part of the command.
        let arguments: Vec<_> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
        let features = if cfg!(feature = "candle-cuda") { "candle-cuda" } else { "cuda" };
        report.line(&format!("# cargo bench --features {features} --bench cuda -- {}", arguments.join(" ")))?;
        for line in device(bench) {
            report.line(&format!("# {line}"))?;
        }
        report.limits("at the start", &bench.limits)?;
        report.line(COLUMNS)?;
        Ok(report)
    }

    fn line(&mut self, line: &str) -> Result<()> {
        println!("{line}");
        if let Some(file) = &mut self.file {
            writeln!(file, "{line}")?;
        }
        Ok(())
    }

    fn limits(&mut self, when: &str, limits: &Limits) -> Result<()> {
        let Limits { clock, special, issue, copy } = limits;
        self.line(&format!(
            "# measured {when}: {:.3} T exponentials/s, {:.1} T instructions of warps/s at {:.0} MHz, copy {:.0} GB/s",
            special * 1e-12,
            issue * 1e-12,
            clock * 1e-6,
            copy * 1e-9
        ))
    }

    pub fn row(&mut self, limits: &Limits, case: &Case, measured: Result<(Times, Work)>) -> Result<()> {
        let Case { operator, direction, dtype, batch, len, d_inner, last, variant } = case;
        let start = format!("{operator},{direction},{dtype},{batch},{len},{d_inner},{last},{}", variant.join(" "));
        let (times, work) = match measured {
            Ok(measured) => measured,
            Err(error) => {
                let message = error.to_string().replace([',', '\n'], ";");
                return self.line(&format!("{start},failed: {message}"));
            }
        };
        let (rate, unit) = match work.state_steps {
            0.0 => (work.bytes / times.median * 1e-6, "GB/s"),
            steps => (steps / times.median * 1e-9, "T state steps/s"),
        };
        let bounds = limits.bounds(&work);
        let (by, bound) = bounds.binding();
        self.line(&format!(
            "{start},{:.5},{:.5},{rate:.4},{unit},{:.5},{:.5},{:.5},{bound:.5},{by},{:.3}",
            times.median,
            times.min,
            bounds.special,
            bounds.issue,
            bounds.memory,
            bound / times.median
        ))
    }

    /// What the device can do after all that.
    pub fn close(mut self, bench: &Bench) -> Result<()> {
        let limits = Limits::measure(&bench.stream)?;
        self.limits("at the end", &limits)
    }
}

/// The device, its driver and its clocks, as far as they can be read.
fn device(bench: &Bench) -> Vec<String> {
    let context = bench.stream.context();
    let mut version = 0;
    // SAFETY: the call writes one number.
    let known = unsafe { sys::cuDriverGetVersion(&mut version) } == sys::CUresult::CUDA_SUCCESS;
    let name = context.name().unwrap_or_else(|_| "an unknown device".into());
    let mut lines = vec![match known {
        true => format!("{name}, driver for CUDA {}.{}", version / 1000, version % 1000 / 10),
        false => name,
    }];
    let fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit";
    let asked = Command::new("nvidia-smi").args([&format!("--query-gpu={fields}"), "--format=csv"]).output();
    if let Ok(output) = asked.as_ref()
        && output.status.success()
    {
        lines
            .extend(output.stdout.lines().map_while(std::result::Result::ok).map(|line| format!("nvidia-smi: {line}")));
    }
    if !bench.graphs {
        lines.push("each call timed by itself, launch included".into());
    }
    lines
}
