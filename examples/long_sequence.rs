//! A training step of one Mamba block on a long sequence, its time and its memory, beside the same block written in
//! candle's own operators at the longest length that fits in the same memory.
//!
//! Each measurement is a process of its own, whose peak memory the system knows. The plain block keeps what candle's graph
//! needs of every step: some ten tensors of `(d_inner, d_state)`.

use std::time::{Duration, Instant};

use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use clap::{Parser, ValueEnum};
use comfy_table::{CellAlignment, Table, presets};
use selective_scan::nn::{Mamba, MambaConfig};

type Error = Box<dyn std::error::Error>;

#[derive(Parser)]
#[command(about = "A training step of a Mamba block on a long sequence, fused and in candle's own operators")]
struct Args {
    /// Steps of the sequence.
    #[arg(long, default_value_t = 16_384)]
    length: usize,
    /// Width of the block; it has twice as many channels, with 16 states each.
    #[arg(long, default_value_t = 256)]
    d_model: usize,
    /// Memory that the plain block may take, in GiB.
    #[arg(long, default_value_t = 4.0)]
    limit: f64,
    /// Training steps of each measurement; the fastest counts.
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Measure this block at `--length` and print seconds forward, seconds backward and bytes.
    #[arg(long, hide = true)]
    measure: Option<Block>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Block {
    Fused,
    Plain,
}

/// What a training step takes.
struct Cost {
    forward: f64,
    backward: f64,
    bytes: u64,
}

fn main() -> Result<(), Error> {
    let args = Args::parse();
    // candle walks its graph, and drops it, by recursion: the plain block's is as deep as its sequence is long.
    let stack = std::thread::Builder::new().stack_size(2 << 30);
    let run = stack.spawn(|| run(args).map_err(|error| error.to_string()))?;
    Ok(run.join().map_err(|_| "the measuring thread panicked")??)
}

fn run(args: Args) -> Result<(), Error> {
    if let Some(block) = args.measure {
        let cost = measure(&args, block)?;
        println!("{} {} {}", cost.forward, cost.backward, cost.bytes);
        return Ok(());
    }
    check(&args)?;
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(["block", "steps", "forward", "backward", "peak memory"]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut add = |name: &str, length: usize, cost: &Cost| {
        let seconds = |seconds: f64| format!("{:.2?}", Duration::from_secs_f64(seconds));
        let gib = format!("{:.2} GiB", cost.bytes as f64 / GIB);
        table.add_row([name.into(), length.to_string(), seconds(cost.forward), seconds(cost.backward), gib]);
    };
    let fused = in_a_process(&args, Block::Fused, args.length, args.repeats)?;
    add("fused", args.length, &fused);
    let (longest, plain) = longest(&args)?;
    add("plain candle", longest, &plain);
    add("fused", longest, &in_a_process(&args, Block::Fused, longest, args.repeats)?);
    println!("One block, d_model {}, f32, batch 1, {} threads:\n\n{table}", args.d_model, rayon::current_num_threads());
    Ok(())
}

const GIB: f64 = (1u64 << 30) as f64;

/// Lengths of the plain block are multiples of this.
const CHUNK: usize = 64;

/// The longest length, in whole chunks, at which the plain block stays within the limit. Memory grows in proportion to
/// the length, so two short runs say where to look.
fn longest(args: &Args) -> Result<(usize, Cost), Error> {
    let run = |length: usize| in_a_process(args, Block::Plain, length, 1);
    let fits = |cost: &Cost| cost.bytes as f64 <= args.limit * GIB;
    let [short, long] = [4 * CHUNK, 16 * CHUNK];
    let [low, high] = [run(short)?.bytes as f64, run(long)?.bytes as f64];
    let per_step = (high - low) / (long - short) as f64;
    let guess = short as f64 + (args.limit * GIB - low) / per_step;
    let mut length = (guess.max(0.0) as usize / CHUNK).max(1) * CHUNK;
    let mut cost = run(length)?;
    while !fits(&cost) {
        let over = (cost.bytes as f64 - args.limit * GIB) / per_step;
        let less = (over as usize).div_ceil(CHUNK).max(1) * CHUNK;
        if less >= length {
            return Err(format!("not even {CHUNK} steps of the plain block fit in {} GiB", args.limit).into());
        }
        length -= less;
        cost = run(length)?;
    }
    loop {
        let more = run(length + CHUNK)?;
        if !fits(&more) {
            return Ok((length, cost));
        }
        (length, cost) = (length + CHUNK, more);
    }
}

fn in_a_process(args: &Args, block: Block, length: usize, repeats: usize) -> Result<Cost, Error> {
    let name = if block == Block::Fused { "fused" } else { "plain" };
    eprintln!("{name}, {length} steps");
    let output = std::process::Command::new(std::env::current_exe()?)
        .args(["--measure", name, "--length", &length.to_string(), "--d-model", &args.d_model.to_string()])
        .args(["--repeats", &repeats.to_string()])
        .stderr(std::process::Stdio::inherit())
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    match text.split_whitespace().collect::<Vec<_>>()[..] {
        [forward, backward, bytes] if output.status.success() => {
            Ok(Cost { forward: forward.parse()?, backward: backward.parse()?, bytes: bytes.parse()? })
        }
        _ => Err(format!("{name} at {length} steps: {}", output.status).into()),
    }
}

fn measure(args: &Args, block: Block) -> Result<Cost, Error> {
    let model = Model::new(args.d_model)?;
    let x = Tensor::randn(0f32, 1.0, (1, args.length, args.d_model), &Device::Cpu)?;
    let mut best = Cost { forward: f64::INFINITY, backward: f64::INFINITY, bytes: 0 };
    for _ in 0..args.repeats.max(1) {
        let started = Instant::now();
        let loss = model.loss(block, &x)?;
        let between = Instant::now();
        loss.backward()?;
        let (forward, backward) = ((between - started).as_secs_f64(), between.elapsed().as_secs_f64());
        if forward + backward < best.forward + best.backward {
            best = Cost { forward, backward, bytes: 0 };
        }
    }
    Ok(Cost { bytes: peak_memory()?, ..best })
}

/// The most memory that this process has had, in bytes.
fn peak_memory() -> Result<u64, Error> {
    let status = std::fs::read_to_string("/proc/self/status")
        .map_err(|error| format!("peak memory is read from /proc, which Linux has: {error}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM in /proc/self/status")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}

/// Asserts that both blocks compute the same: the loss and the gradients of all parameters, within 1e-3 of their norm, as
/// both round every operation to f32.
fn check(args: &Args) -> Result<(), Error> {
    let model = Model::new(args.d_model)?;
    let x = Tensor::randn(0f32, 1.0, (1, 2 * CHUNK, args.d_model), &Device::Cpu)?;
    let gradients = |block| -> Result<GradStore, Error> { Ok(model.loss(block, &x)?.backward()?) };
    let (fused, plain) = (gradients(Block::Fused)?, gradients(Block::Plain)?);
    let norm = |x: &Tensor| -> candle_core::Result<f32> { x.sqr()?.sum_all()?.sqrt()?.to_scalar() };
    for (name, var) in model.parameters.data().lock().expect("nobody else has it").iter() {
        let missing = || format!("no gradient of {name}");
        let (fused, plain) = (fused.get(var).ok_or_else(missing)?, plain.get(var).ok_or_else(missing)?);
        let error = norm(&(fused - plain)?)? / norm(plain)?;
        if error.is_nan() || error > 1e-3 {
            return Err(format!("the gradients of {name} differ by {error:.1e}").into());
        }
    }
    Ok(())
}

/// One block's parameters, and the two ways to run it.
struct Model {
    parameters: VarMap,
    fused: Mamba,
    config: MambaConfig,
}

impl Model {
    fn new(d_model: usize) -> Result<Self, Error> {
        let (parameters, config) = (VarMap::new(), MambaConfig::new(d_model));
        let fused = Mamba::new(&config, VarBuilder::from_varmap(&parameters, DType::F32, &Device::Cpu))?;
        Ok(Self { parameters, fused, config })
    }

    fn loss(&self, block: Block, x: &Tensor) -> candle_core::Result<Tensor> {
        let out = match block {
            Block::Fused => self.fused.forward(x)?,
            Block::Plain => self.plain(x)?,
        };
        out.sqr()?.mean_all()
    }

    fn parameter(&self, name: &str) -> candle_core::Result<Tensor> {
        let all = self.parameters.data().lock().expect("nobody else has it");
        let var = all.get(name).ok_or_else(|| candle_core::Error::Msg(format!("no parameter {name}")))?;
        Ok(var.as_tensor().clone())
    }

    /// The block in candle's operators, step by step.
    fn plain(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let &MambaConfig { d_inner, d_state, d_conv, dt_rank, .. } = &self.config;
        let linear = |x: &Tensor, name: &str| x.broadcast_matmul(&self.parameter(name)?.t()?);
        let length = x.dim(1)?;
        let projected = linear(x, "in_proj.weight")?;
        let (x, z) = (projected.narrow(2, 0, d_inner)?, projected.narrow(2, d_inner, d_inner)?);

        let padded = x.pad_with_zeros(1, d_conv - 1, 0)?;
        let weight = self.parameter("conv1d.weight")?.squeeze(1)?;
        let mut sum = self.parameter("conv1d.bias")?.broadcast_as((1, length, d_inner))?;
        for k in 0..d_conv {
            sum = (sum + padded.narrow(1, k, length)?.broadcast_mul(&weight.narrow(1, k, 1)?.squeeze(1)?)?)?;
        }
        let u = sum.silu()?;

        let columns = linear(&u, "x_proj.weight")?;
        let (b, c) = (columns.narrow(2, dt_rank, d_state)?, columns.narrow(2, dt_rank + d_state, d_state)?);
        let delta = linear(&columns.narrow(2, 0, dt_rank)?, "dt_proj.weight")?;
        let delta = (delta.broadcast_add(&self.parameter("dt_proj.bias")?)?.exp()? + 1.0)?.log()?;
        let a = self.parameter("A_log")?.exp()?.neg()?;

        let mut state = Tensor::zeros((1, d_inner, d_state), DType::F32, x.device())?;
        let mut outputs = Vec::with_capacity(length);
        for start in (0..length).step_by(CHUNK) {
            // A step is cut from a chunk, not from the whole: the gradient of a range is as large as what it is cut from.
            let [u, delta, b, c] = [&u, &delta, &b, &c].map(|x| x.narrow(1, start, CHUNK.min(length - start)));
            let (u, delta, b, c) = (u?, delta?, b?, c?);
            for t in 0..u.dim(1)? {
                let step = |x: &Tensor| x.narrow(1, t, 1);
                let (delta, u) = (step(&delta)?.transpose(1, 2)?, step(&u)?.transpose(1, 2)?);
                let decay = delta.broadcast_mul(&a)?.exp()?;
                let input = (delta * u)?.broadcast_mul(&step(&b)?)?;
                state = ((decay * state)? + input)?;
                outputs.push(state.broadcast_mul(&step(&c)?)?.sum(D::Minus1)?.unsqueeze(1)?);
            }
        }
        // The skip connection stands first, so that candle comes to its gradient last: once a gradient that depends on a
        // parameter is in a sum, candle keeps every partial sum that follows, here one as large as `u` for each chunk.
        let y = (u.broadcast_mul(&self.parameter("D")?)? + Tensor::cat(&outputs, 1)?)?;
        linear(&(y * z.silu()?)?, "out_proj.weight")
    }
}
