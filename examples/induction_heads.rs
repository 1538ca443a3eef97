//! Induction heads: a sequence of random tokens has a special one somewhere, and ends with it again; the answer is the
//! token that stood after it the first time.
//!
//! ```text
//! 5 2 9 4 * 7 1 1 8 … 3 6 *
//!                         7
//! ```
//!
//! Trained at one length, tested at lengths far beyond it: Gu and Dao, *Mamba* (2023), arXiv 2312.00752, section 4.1.2,
//! table 2 and appendix E.1, whose sizes `--paper` takes: trained at 256, tested at 64 to 2^20. There Mamba is the one
//! model that answers right at every length.
//!
//! Long sequences are drawn and read in chunks, the states carried from one to the next (`prefill`), so memory does not
//! grow with length.
//!
//! ```text
//! cargo run --release --features nn,avx512-gemm --example induction_heads
//! ```
//!
//! By default sequences are short at first and grow to 256 (`--start`, `--stage`), and the learning rate is ten times
//! the paper's: 2500 steps then do what 204,800 did there.

#[path = "synthetic/mod.rs"]
mod synthetic;

use std::error::Error;
use std::num::NonZeroUsize;

use candle_core::{D, DType, Tensor};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use rand::Rng;
use rand::rngs::StdRng;
use selective_scan::nn::LanguageModel;

use synthetic::{Kind, Options, Settings, Streams, Task, Trained, percent, table, train};

/// Trains a selective and a time-invariant model to recall a token, and prints their accuracy at other lengths
#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    options: Options,

    /// Longest sequence to test; the shortest has 64 tokens, each next one four times as many
    #[arg(long, value_name = "L", default_value_t = 1 << 20, value_parser = clap::value_parser!(u32).range(64..))]
    longest: u32,

    /// Sequences to test at each length, while they have no more tokens than --test-tokens together
    #[arg(long, value_name = "N", default_value = "512")]
    test: NonZeroUsize,

    /// Tokens to test at each length; there are 8 sequences at least
    #[arg(long, value_name = "N", default_value = "1048576")]
    test_tokens: NonZeroUsize,
}

const DEFAULT: Settings = Settings {
    steps: 2500,
    length: 256,
    start: 16,
    stage: 500,
    batch: 8,
    vocab: 16,
    layers: 2,
    d_model: 64,
    d_state: 16,
    lr: 1e-2,
    warmup: 100,
    decay: 0,
    evaluate: 250,
    // It answers right at the length of training long before it does at others.
    target: 2.0,
    seed: 0,
};

const PAPER: Settings = Settings { steps: 204_800, start: 256, lr: 1e-3, warmup: 0, evaluate: 8192, ..DEFAULT };

/// What is compared: Mamba's block without selection and with it, which read on from states.
const COMPARED: [Kind; 2] = [Kind::Invariant, Kind::Selective];

/// The token that is followed by what is to be recalled.
const SPECIAL: u32 = 0;

/// Tokens of a chunk in all sequences together.
const CHUNK: usize = 1 << 14;

/// A sequence of `length` tokens, drawn piece by piece.
struct Sequence {
    random: StdRng,
    length: usize,
    vocab: u32,
    /// Where the special token is the first time.
    place: usize,
    /// The token after it.
    answer: u32,
    drawn: usize,
}

impl Sequence {
    fn new(random: &mut StdRng, length: usize, vocab: usize) -> Self {
        // The answer follows it, and then the special token once more.
        let place = random.random_range(0..length - 2);
        let vocab = vocab as u32;
        let answer = random.random_range(SPECIAL + 1..vocab);
        let random = rand::SeedableRng::from_rng(random);
        Self { random, length, vocab, place, answer, drawn: 0 }
    }

    /// Appends the next tokens.
    fn draw(&mut self, count: usize, ids: &mut Vec<u32>) {
        for step in self.drawn..self.drawn + count {
            ids.push(match step {
                _ if step == self.place || step + 1 == self.length => SPECIAL,
                _ if step == self.place + 1 => self.answer,
                _ => self.random.random_range(SPECIAL + 1..self.vocab),
            });
        }
        self.drawn += count;
    }
}

struct InductionHeads {
    vocab: usize,
}

impl Task for InductionHeads {
    fn answers(&self) -> usize {
        1
    }

    fn draw(&self, length: usize, random: &mut StdRng, ids: &mut Vec<u32>, targets: &mut Vec<u32>) {
        let mut sequence = Sequence::new(random, length, self.vocab);
        sequence.draw(length, ids);
        targets.push(sequence.answer);
    }
}

/// How many of the sequences are answered right, read in chunks.
fn right(model: &LanguageModel, mut sequences: Vec<Sequence>, bar: &ProgressBar) -> candle_core::Result<usize> {
    let (count, length) = (sequences.len(), sequences[0].length);
    let chunk = (CHUNK / count).max(1);
    let cache = model.new_cache(count, DType::F32)?;
    let mut logits = None;
    for from in (0..length).step_by(chunk) {
        let steps = chunk.min(length - from);
        let mut ids = Vec::with_capacity(count * steps);
        for sequence in &mut sequences {
            sequence.draw(steps, &mut ids);
        }
        logits = Some(model.prefill(&Tensor::from_vec(ids, (count, steps), model.device())?, &cache, None)?);
        bar.inc((count * steps) as u64);
    }
    let answers = logits.expect("at least one chunk").argmax(D::Minus1)?.to_vec1::<u32>()?;
    Ok(answers.iter().zip(&sequences).filter(|(answer, sequence)| **answer == sequence.answer).count())
}

impl Arguments {
    /// Lengths, and how many sequences are tested at each.
    fn tests(&self) -> Vec<(usize, usize)> {
        let lengths =
            (6..32).step_by(2).map(|exponent| 1 << exponent).filter(|&length| length <= self.longest as usize);
        lengths.map(|length| (length, (self.test_tokens.get() / length).clamp(8, self.test.get().max(8)))).collect()
    }

    /// The sequences answered right at each of the lengths.
    fn test(&self, trained: &Trained, settings: &Settings) -> candle_core::Result<Vec<usize>> {
        let mut random = Streams::new(settings.seed).test;
        let tests = self.tests();
        let tokens = tests.iter().map(|&(length, count)| (length as u64).saturating_mul(count as u64));
        let bar = ProgressBar::new(tokens.fold(0, u64::saturating_add)).with_prefix(trained.kind.name());
        bar.set_style(ProgressStyle::with_template("{prefix} tests [{bar:30}] {pos}/{len} tokens").expect("valid"));
        let mut all = Vec::with_capacity(tests.len());
        for (length, count) in tests {
            let mut sequences = Vec::new();
            if sequences.try_reserve_exact(count).is_err() {
                let message = "--test, --test-tokens: expected sequences that fit in memory";
                return Err(candle_core::Error::msg(format_args!("{message}, got {count}")));
            }
            sequences.extend((0..count).map(|_| Sequence::new(&mut random, length, settings.vocab)));
            all.push(right(trained.model.as_blocks()?, sequences, &bar)?);
        }
        bar.finish_and_clear();
        Ok(all)
    }

    fn run(&self) -> Result<(), Box<dyn Error>> {
        let settings = self.options.settings(DEFAULT, PAPER)?;
        let Settings { length, vocab, layers, d_model, seed, .. } = settings;
        let shortest = length.min(settings.start);
        if shortest < 3 {
            return Err(format!("--length, --start: expected at least 3, got {shortest}").into());
        }
        if vocab < 3 {
            return Err(format!("--vocab: expected at least the special token and 2 others, 3, got {vocab}").into());
        }
        let device = self.options.device()?;
        println!(
            "trained at length {length}; {layers} layers of width {d_model}; seed {seed}; by chance {:.1} %",
            100.0 / (vocab - 1) as f64
        );
        let (mut trainings, mut columns) = (Vec::new(), Vec::new());
        let models = self.options.models(&COMPARED)?;
        for &kind in &models {
            let trained = train(kind, &InductionHeads { vocab }, &settings, &device)?;
            let begin = std::time::Instant::now();
            columns.push(self.test(&trained, &settings)?);
            trainings.push([
                kind.name().into(),
                trained.parameters.to_string(),
                trained.steps.to_string(),
                format!("{:.0} s", trained.time.as_secs_f64()),
                format!("{:.0} s", begin.elapsed().as_secs_f64()),
            ]);
        }
        println!("{}", table(["model", "parameters", "steps", "training", "tests"], trainings));
        let rows = self.tests().into_iter().enumerate().map(|(row, (length, count))| {
            let mut cells = vec![length.to_string(), count.to_string()];
            cells.extend(columns.iter().map(|column| percent(column[row], count)));
            cells
        });
        let header = ["length", "sequences"].into_iter().chain(models.iter().map(|kind| kind.name()));
        println!("\n{}", table(header, rows));
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    Arguments::parse().run()
}
