//! Times the operators on a GPU at model shapes, beside the bounds that the same GPU sets, measured in the same run.
//!
//! `cargo bench --features cuda --bench cuda -- [--filter TEXT] [--repeats N] [--csv FILE] [CASE...]`
//!
//! Times are medians of CUDA events over sets of inputs that together exceed the second-level cache; all sets run between
//! two events as one graph, so that the time is the device's and not that of launching. `--serve` answers cases from
//! standard input instead, for runs that alternate with another program's: see `benches/peers`.

#[path = "cuda/attention.rs"]
mod attention;
#[cfg(feature = "candle-cuda")]
#[path = "cuda/candle.rs"]
mod candle;
#[path = "cuda/case.rs"]
mod case;
#[path = "cuda/limits.rs"]
mod limits;
#[path = "cuda/memory.rs"]
mod memory;
#[path = "cuda/optimizer.rs"]
mod optimizer;
#[path = "cuda/pool.rs"]
mod pool;
#[path = "cuda/report.rs"]
mod report;
#[path = "cuda/rows.rs"]
mod rows;
#[cfg(feature = "lti")]
#[path = "cuda/s4d.rs"]
mod s4d;
#[path = "cuda/scan.rs"]
mod scan;
#[path = "cuda/serve.rs"]
mod serve;
#[path = "cuda/timing.rs"]
mod timing;

use std::path::PathBuf;
use std::sync::Arc;

use clap::Parser;
use cudarc::driver::CudaStream;
use half::{bf16, f16};
use selective_scan::cuda;

use case::Case;
use limits::Limits;
use timing::{Prepared, Timed};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

#[derive(Parser)]
struct Arguments {
    /// Only cases whose text contains this.
    #[arg(long, default_value = "")]
    filter: String,
    /// Timed runs of each.
    #[arg(long, default_value_t = 20)]
    repeats: usize,
    /// Writes the table here too, with the command, the GPU, its driver and clocks at its head.
    #[arg(long)]
    csv: Option<PathBuf>,
    /// Times each call by itself, launch included, instead of graphs of many.
    #[arg(long)]
    no_graphs: bool,
    /// Prints the cases and times none.
    #[arg(long)]
    list: bool,
    /// Answers lines of standard input, each a case and a number of repeats, until its end.
    #[arg(long)]
    serve: bool,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
    /// Cases to time instead of the usual: `scan forward bf16 8 2048 2048 16`, each in quotes.
    cases: Vec<String>,
}

/// What is timed: operator, direction, type, batch, length, d_inner (of a loss and of sampling the vocabulary), d_state or
/// width (of a norm the size of a group, of attention that of a head, of an embedding the vocabulary, of a loss and of sampling 1), and words for variants. Several
/// values between commas stand for a case with each.
const CASES: &[&str] = &[
    "scan forward,backward bf16,f32 8 2048 2048 16",
    "scan forward,backward bf16,f32 64 512 1536 16",
    "scan forward,backward bf16,f32 1 65536 2048 16",
    "scan forward,backward bf16,f32 1 512,1024,2048,4096,8192,16384,32768,65536,131072,262144,524288 1024 16",
    "scan forward,backward bf16,f32 2048 16 1536 16",
    "scan forward,backward bf16,f32 8 2000 2048 16",
    "scan forward,backward bf16,f32 8 1100 2048 16",
    "scan forward,backward bf16,f32 8 2048 2048 64",
    "scan forward,backward f16 8 2048 2048 16",
    // As planned, and no sequence split: which bits a sequence gets does not then depend on whether it is packed.
    "scan forward,backward bf16,f32 1 16384 2048 16 packed",
    "scan forward,backward bf16,f32 1 16384 2048 16 packed whole",
    "scan forward bf16 8 2048 2048 16 one,four",
    "scan forward bf16 64 512 1536 16 one,four",
    "state update bf16 1,2,4,8,16,32,64,128,256,512 1 1536,5120 16",
    "state update f32 1,64,512 1 5120 16",
    "state update bf16 256 1 5120 16 slots,bf16-states",
    "state update bf16 64 1 2048 128",
    "conv forward,backward bf16,f32 8 2048 2048 4",
    "conv forward,backward bf16,f32 64 512 1536 4",
    "conv forward,backward bf16,f32 1 65536 2048 4",
    "conv forward,backward bf16,f32 1 512,1024,2048,4096,8192,16384,32768,65536,131072,262144,524288 1024 4",
    "conv forward,backward bf16,f32 2048 16 1536 4",
    "conv forward,backward bf16,f32 8 2000,1100 2048 4",
    "conv forward,backward bf16 8 2000 2050 4",
    "conv forward,backward bf16 8 2048 2048 2,3,8",
    "conv forward,backward bf16,f32 1 16384 2048 4 packed",
    "conv update bf16 1,8,64,512 1 5120 4",
    "conv update bf16 512 1 5120 4 f32-states",
    "attention forward,backward bf16,f32 1 512,2048,8192,32768 1024 64",
    "attention forward,backward bf16 1 8192 1024 128",
    "attention forward,backward bf16 1 8192 1024 64 kv-heads-4",
    "attention forward,backward bf16 1 16384 1024 64 packed",
    "attention forward bf16 1,64 1 1024 64 keys-512",
    "attention forward bf16 1,64 1 1024 64 keys-8192",
    "loss forward,backward bf16,f32 1 2048,5248 50280 1",
    "loss backward bf16 1 16384 256,257,8192 1",
    // The parameters of 130m and 1.4b: layers, tokens, d_inner and d_state.
    "optimizer step f32,bf16 24 50280 1536 16",
    "optimizer step f32,bf16 48 50280 4096 16",
    "norm forward,backward bf16,f32 8 2048 768 768",
    "norm forward,backward bf16,f32 8 2048 2048 2048",
    "norm forward bf16 8 2048 768 768 residual",
    "norm forward bf16 8 2048 2048 2048 residual",
    "norm forward,backward bf16 8 2048 2048 256",
    "norm forward,backward bf16 8 2048 16 16",
    "embedding backward bf16,f32 8 2048 768 50280",
    "embedding backward f32 8 2048 768 50280 half",
    "embedding backward f32 8 2048 768 256",
    "sampling choose f32 1,16,64,256 1 50280 1",
    "sampling choose f32 1,64 1 50280 1 greedy,min-p,top-k,top-p,penalty,log-probs",
    "sampling choose f32 1,64 1 256000 1",
];

/// With the feature `lti`, as the above; the last number is that of pairs.
#[cfg(feature = "lti")]
const LTI_CASES: &[&str] = &[
    "s4d forward,backward bf16,f32 64 1024,4096 768 32",
    "s4d forward,backward bf16 16 16384 768 32",
    "s4d forward,backward bf16 8 32768 768 32",
    "s4d forward,backward bf16 1 4096,65536 768 32",
    "s4d forward,backward bf16 1 16384 768 32 packed",
];
#[cfg(not(feature = "lti"))]
const LTI_CASES: &[&str] = &[];

/// Where cases run, and what bounds them there.
struct Bench {
    stream: Arc<CudaStream>,
    limits: Limits,
    graphs: bool,
}

impl Bench {
    fn open(graphs: bool) -> Result<Self> {
        let stream = cuda::context(0)?.new_stream()?;
        // One stream does all: there is nothing to track, and no graph could be captured otherwise.
        // SAFETY: every buffer is used on this stream alone.
        unsafe { stream.context().disable_event_tracking() };
        let limits = Limits::measure(&stream)?;
        Ok(Self { stream, limits, graphs })
    }

    fn prepare(&self, case: &Case) -> Result<Timed> {
        let stream = &self.stream;
        let prepared: Result<Prepared> = match (case.operator.as_str(), case.dtype.as_str()) {
            ("scan", "f32") => scan::prepare::<f32>(stream, case),
            ("scan", "f16") => scan::prepare::<f16>(stream, case),
            ("scan", "bf16") => scan::prepare::<bf16>(stream, case),
            ("conv", "f32") => memory::conv::<f32>(stream, case),
            ("conv", "f16") => memory::conv::<f16>(stream, case),
            ("conv", "bf16") => memory::conv::<bf16>(stream, case),
            ("state", "f32") => memory::state_update::<f32>(stream, case),
            ("state", "f16") => memory::state_update::<f16>(stream, case),
            ("state", "bf16") => memory::state_update::<bf16>(stream, case),
            ("attention", "f32") => attention::prepare::<f32>(stream, case),
            ("attention", "f16") => attention::prepare::<f16>(stream, case),
            ("attention", "bf16") => attention::prepare::<bf16>(stream, case),
            ("loss", "f32") => memory::loss::<f32>(stream, case),
            ("loss", "f16") => memory::loss::<f16>(stream, case),
            ("loss", "bf16") => memory::loss::<bf16>(stream, case),
            ("optimizer", "f32") => optimizer::step::<f32>(stream, case),
            ("optimizer", "f16") => optimizer::step::<f16>(stream, case),
            ("optimizer", "bf16") => optimizer::step::<bf16>(stream, case),
            ("norm", "f32") => rows::norm::<f32>(stream, case),
            ("norm", "f16") => rows::norm::<f16>(stream, case),
            ("norm", "bf16") => rows::norm::<bf16>(stream, case),
            ("embedding", "f32") => rows::embedding::<f32>(stream, case),
            ("embedding", "f16") => rows::embedding::<f16>(stream, case),
            ("embedding", "bf16") => rows::embedding::<bf16>(stream, case),
            #[cfg(feature = "lti")]
            ("s4d", "f32") => s4d::prepare::<f32>(stream, case),
            #[cfg(feature = "lti")]
            ("s4d", "f16") => s4d::prepare::<f16>(stream, case),
            #[cfg(feature = "lti")]
            ("s4d", "bf16") => s4d::prepare::<bf16>(stream, case),
            ("sampling", "f32") => rows::sampling(stream, case),
            #[cfg(feature = "candle-cuda")]
            ("candle", "f32") => candle::prepare(case),
            _ => Err(format!("no operator of this name and type: `{case}`").into()),
        };
        Timed::new(prepared?, self.graphs)
    }

    /// Gives freed memory back, for the next case or another program.
    fn trim(&self) -> Result<()> {
        self.stream.synchronize()?;
        pool::trim(self.stream.context());
        Ok(())
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let texts: Vec<&str> = match &arguments.cases[..] {
        [] => [CASES, LTI_CASES].concat(),
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
    let bench = Bench::open(!arguments.no_graphs)?;
    if arguments.serve {
        return serve::run(&bench);
    }
    let mut report = report::Report::new(&bench, arguments.csv.as_deref())?;
    for case in &cases {
        let measured = bench.prepare(case).and_then(|mut timed| {
            let times = timed.measure(arguments.repeats)?;
            Ok((times, timed.work()))
        });
        report.row(&bench.limits, case, measured)?;
        bench.trim()?;
    }
    report.close(&bench)
}
