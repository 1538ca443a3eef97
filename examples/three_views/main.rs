//! One signal through the three views of a linear time-invariant system and through the selective scan; how much of a
//! signal's past HiPPO's states hold; and what each view takes on this machine.
//!
//! ```text
//! cargo run --release --features lti --example three_views -- --quick
//! ```
//!
//! `--json` prints the list of agreements, `{pair, length, error, tolerance}`, and nothing else. Exits with status 1 if
//! a pair does not agree, and with 2 if it could not run.

mod agreement;
mod attention;
mod memory;
mod plot;
mod times;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Shows that the views of a system agree, what its state remembers, and what each view costs
#[derive(Debug, Parser)]
struct Arguments {
    /// Short sequences only: seconds instead of minutes
    #[arg(long)]
    quick: bool,

    /// Print the agreements as JSON and nothing else
    #[arg(long)]
    json: bool,

    /// Where to draw [default: three_views.svg, unless --quick or --json]
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,

    /// Seed of the signals
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl Arguments {
    fn run(&self) -> Result<bool, Box<dyn Error>> {
        let lengths: &[usize] = if self.quick { &[64, 1024] } else { &[64, 1024, 65_536, 1 << 20] };
        let agreements = agreement::all(lengths, self.seed)?;
        let agree = agreements.iter().all(|agreement| agreement.error <= agreement.tolerance);
        if self.json {
            println!("{}", serde_json::to_string_pretty(&agreements)?);
            return Ok(agree);
        }
        println!("The views agree (error by the norm, of the size that the tolerance is of):\n");
        println!("{}\n", agreement::table(&agreements));
        let memories = memory::all(self.quick, self.seed)?;
        println!("What is left of the last unit of time in N states (error of the past that is had from them):\n");
        println!("{}\n", memory::table(&memories));
        let times = times::all(self.quick, self.seed)?;
        println!("What the views take, one thread, {} channels of {} pairs:\n", times::CHANNELS, times::PAIRS);
        println!("{}", times::table(&times));
        let default_plot = (!self.quick).then(|| PathBuf::from("three_views.svg"));
        if let Some(path) = self.plot.clone().or(default_plot) {
            plot::draw(&path, &memories, &times).map_err(|error| format!("cannot draw {}: {error}", path.display()))?;
            println!("\nerrors and times are drawn in {}", path.display());
        }
        Ok(agree)
    }
}

fn main() -> ExitCode {
    match Arguments::parse().run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
