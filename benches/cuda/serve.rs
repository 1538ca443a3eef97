//! Answers cases line by line, for a program that alternates this one's runs with another's.

use std::io::{Write, stdin, stdout};

use serde_json::json;

use crate::case::Case;
use crate::timing::Timed;
use crate::{Bench, Result};

/// Reads lines of a case and a number of repeats: `scan forward bf16 8 2048 2048 16 20`, variants before the number. Each
/// is answered by a line of JSON: the median and least milliseconds of a call, how many calls lie between
/// two events, its bound and what binds it; or an `error`.
/// The last case stays prepared, so that asking for it again measures and does nothing else; `release` frees its memory,
/// `limits` tells the device's rates.
pub fn run(bench: &Bench) -> Result<()> {
    let mut prepared: Option<(Case, Timed)> = None;
    for line in stdin().lines() {
        let line = line?;
        let answer = match line.trim() {
            "" => continue,
            "release" => {
                prepared = None;
                bench.trim().map(|()| json!({}))
            }
            "limits" => {
                let limits = &bench.limits;
                Ok(json!({
                    "device": bench.stream.context().name()?,
                    "special": limits.special,
                    "issue": limits.issue,
                    "copy": limits.copy,
                    "clock": limits.clock,
                }))
            }
            case => measure(bench, case, &mut prepared),
        };
        let answer = answer.unwrap_or_else(|error| json!({ "error": error.to_string() }));
        writeln!(stdout(), "{answer}")?;
        stdout().flush()?;
    }
    Ok(())
}

fn measure(bench: &Bench, line: &str, prepared: &mut Option<(Case, Timed)>) -> Result<serde_json::Value> {
    let (case, repeats) = line.rsplit_once(' ').ok_or("expected a case and a number of repeats")?;
    let (case, repeats) = (Case::parse(case)?, repeats.parse()?);
    if prepared.as_ref().is_none_or(|(ready, _)| *ready != case) {
        *prepared = None;
        bench.trim()?;
        *prepared = Some((case.clone(), bench.prepare(&case)?));
    }
    let (_, timed) = prepared.as_mut().expect("it has just been prepared");
    let times = timed.measure(repeats)?;
    let (by, bound) = bench.limits.bounds(&timed.work()).binding();
    Ok(json!({ "ms": times.median, "min": times.min, "calls": times.calls, "bound": bound, "by": by }))
}
