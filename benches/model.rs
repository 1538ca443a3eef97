//! Times language models with random weights: steps of training, prompts, and decoding, with the peak of a GPU's memory.
//!
//! `cargo bench --features nn,candle-cuda --bench model -- [--repeats N] [--parts] [--keep] [--json] [CASE...]`
//!
//! A case is `train 130m bf16-f32 8 2048`: what is done, the model, its types, batch and length. Models are those of
//! Mamba's paper, 130m, 370m, 1.4b and 2.8b, with a vocabulary of 50,280 tokens, and `tiny`; types are `bf16`, `f32`, and
//! `bf16-f32`, which is arithmetic of bf16 on parameters of f32. Products of f32 matrices are TF32 on a GPU. Without the
//! feature `candle-cuda`, and with `--cpu`, all runs on the processor.
//!
//! `--serve` answers cases from standard input, for runs that alternate with another program's: see `benches/peers`.

#[path = "model/case.rs"]
mod case;
#[path = "model/machine.rs"]
mod machine;
#[path = "model/measure.rs"]
mod measure;
#[path = "model/parts.rs"]
mod parts;
#[cfg(feature = "candle-cuda")]
#[path = "cuda/pool.rs"]
mod pool;
#[path = "model/work.rs"]
mod work;

use std::io::{Write, stdin, stdout};

use clap::Parser;
use serde_json::{Value, json};

use case::{Case, What, name};
use machine::Machine;
use measure::{Measured, Prepared, mib};
use parts::Part;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

#[derive(Parser)]
struct Arguments {
    /// Only cases whose text contains this.
    #[arg(long, default_value = "")]
    filter: String,
    /// Timed runs of each.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Times the parts of training steps too: embedding, a layer, head and loss, optimizer.
    #[arg(long)]
    parts: bool,
    /// Prints a line of JSON for each case in place of the table.
    #[arg(long)]
    json: bool,
    /// Runs on the processor whatever there is.
    #[arg(long)]
    cpu: bool,
    /// Prints the cases and times none.
    #[arg(long)]
    list: bool,
    /// Training keeps more for the way back rather than compute it again: `recompute: false`, and states of the scan each 16 steps.
    #[arg(long)]
    keep: bool,
    /// Answers lines of standard input, each a case and a number of repeats, until its end.
    #[arg(long)]
    serve: bool,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
    /// Cases to time instead of the usual: `train 130m bf16,f32 8 2048`, each in quotes. Several values between commas
    /// stand for a case with each.
    cases: Vec<String>,
}

const CASES: &[&str] = &[
    "train 130m bf16-f32,bf16,f32 8 2048",
    "train 130m bf16-f32 8 512",
    "train 130m bf16-f32 1 65536",
    "train 370m,1.4b bf16-f32 2 2048",
    "train 2.8b bf16-f32 1 2048",
    "prefill 130m bf16 64,1 512",
    "decode 130m bf16 1,64 1",
    "decode 370m,1.4b,2.8b bf16 1 1",
    "serve 130m bf16 64 256",
];

/// What takes seconds without a GPU.
const CASES_ON_CPU: &[&str] =
    &["train tiny f32 4 256", "prefill tiny f32 4 256", "decode tiny f32 1,4 1", "serve tiny f32 4 32"];

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let usual = if cfg!(feature = "candle-cuda") && !arguments.cpu { CASES } else { CASES_ON_CPU };
    let texts: Vec<&str> = match &arguments.cases[..] {
        [] => usual.to_vec(),
        given => given.iter().map(String::as_str).collect(),
    };
    let mut cases = Vec::new();
    for text in texts {
        cases.extend(Case::expand(text)?.into_iter().filter(|case| case.to_string().contains(&arguments.filter)));
    }
    if arguments.list {
        cases.iter().for_each(|case| println!("{case}"));
        return Ok(());
    }
    let machine = Machine::open(arguments.cpu, arguments.keep)?;
    if arguments.serve {
        return serve(&machine);
    }
    if !arguments.json {
        println!("{}; milliseconds of a step, a prompt or a token, medians of {}", machine.name, arguments.repeats);
        println!("{HEAD}");
    }
    for case in &cases {
        let measured =
            Prepared::new(&machine, case).and_then(|mut prepared| prepared.measure(&machine, arguments.repeats));
        machine.trim()?;
        match measured {
            Ok(measured) if arguments.json => println!("{}", measured.json()),
            Ok(measured) => print_row(&measured),
            Err(error) if arguments.json => {
                println!("{}", json!({ "case": case.to_string(), "error": error.to_string() }))
            }
            Err(error) => println!("{} failed: {error}", start_of_row(case)),
        }
        if arguments.parts && case.what == What::Train {
            match parts::measure(&machine, case, arguments.repeats) {
                Ok(parts) if arguments.json => println!("{}", json_of_parts(case, &parts)),
                Ok(parts) => print_parts(&parts),
                Err(error) => eprintln!("the parts of {case} failed: {error}"),
            }
            machine.trim()?;
        }
    }
    Ok(())
}

/// Answers lines of a case and a number of repeats, `train 130m bf16 8 2048 3`, each by a line of JSON or by an `error`. The
/// last case stays prepared, so that asking for it again measures and does nothing else; `release` frees its memory.
fn serve(machine: &Machine) -> Result<()> {
    let mut prepared: Option<Prepared> = None;
    for line in stdin().lines() {
        let line = line?;
        let answer = match line.trim() {
            "" => continue,
            "release" => {
                prepared = None;
                machine.trim().map(|()| json!({ "device": machine.name }))
            }
            case => answer(machine, case, &mut prepared),
        };
        let answer = answer.or_else(|error| -> Result<Value> {
            // What is left of it would be in the way of the next.
            prepared = None;
            machine.trim()?;
            Ok(json!({ "error": error.to_string() }))
        })?;
        writeln!(stdout(), "{answer}")?;
        stdout().flush()?;
    }
    Ok(())
}

fn answer(machine: &Machine, line: &str, prepared: &mut Option<Prepared>) -> Result<Value> {
    let (case, repeats) = line.rsplit_once(' ').ok_or("expected a case and a number of repeats")?;
    let (case, repeats) = (Case::parse(case)?, repeats.parse()?);
    if prepared.as_ref().is_none_or(|ready| *ready.case() != case) {
        *prepared = None;
        machine.trim()?;
        *prepared = Some(Prepared::new(machine, &case)?);
    }
    let ready = prepared.as_mut().expect("it has just been prepared");
    Ok(ready.measure(machine, repeats)?.json())
}

const HEAD: &str = "what     model  types     batch  length        ms       min   forward  backward optimizer    tokens/s  \
                    peak MiB  held MiB";

fn start_of_row(case: &Case) -> String {
    let Case { what, model, mode, batch, length } = case;
    format!("{:8} {:6} {:9} {batch:5} {length:7}", name(what), name(model), name(mode))
}

fn print_row(measured: &Measured) {
    let phases = measured.phases.map_or([String::new(), String::new(), String::new()], |ms| ms.map(milliseconds));
    let [forward, backward, optimizer] = phases;
    let [used, held] =
        measured.peak.map_or(["-".into(), "-".into()], |peak| peak.map(|bytes| format!("{:.0}", mib(bytes))));
    println!(
        "{} {:>9} {:>9} {forward:>9} {backward:>9} {optimizer:>9} {:11.0} {used:>9} {held:>9}",
        start_of_row(&measured.case),
        milliseconds(measured.median),
        milliseconds(measured.min),
        measured.tokens_per_second()
    );
}

fn milliseconds(ms: f64) -> String {
    format!("{ms:.3}")
}

fn print_parts(parts: &[Part]) {
    println!("    {:22} {:>5} {:>9} {:>9} {:>9}", "part", "count", "forward", "backward", "all");
    for part in parts {
        let Part { name, count, forward, backward } = part;
        println!("    {name:22} {count:5} {forward:9.3} {backward:9.3} {:9.3}", part.total());
    }
}

fn json_of_parts(case: &Case, parts: &[Part]) -> Value {
    let row = |part: &Part| {
        let Part { name, count, forward, backward } = part;
        json!({ "part": name.trim(), "count": count, "forward_ms": forward, "backward_ms": backward })
    };
    json!({ "case": case.to_string(), "parts": parts.iter().map(row).collect::<Vec<_>>() })
}
