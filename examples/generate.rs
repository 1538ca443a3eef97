//! Writes texts with a checkpoint: several prompts at once, tokens as they come.
//!
//! ```text
//! cargo run --release --features nn --example generate -- FOLDER "The state of a system" "Once upon a time"
//! cargo run --release --features nn --example generate -- FOLDER --samples 4 --temperature 0.8 --top-p 0.95 "Call me"
//! ```
//!
//! The folder is Hugging Face's or state-spaces/mamba's, with the `tokenizer.json` of its tokenizer. A model of 256 tokens without
//! one is taken for a model of bytes, such as `byte_lm` trains. With the feature `candle-cuda` and `--device cuda` it runs on a GPU.

use std::collections::HashMap;
use std::io::{Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use candle_core::{DType, Device};
use clap::{Parser, ValueEnum};
use selective_scan::nn::LanguageModel;
use selective_scan::nn::decode::{Event, FinishReason, Generator, GeneratorOptions, Request};
use selective_scan::sampling::Settings;
use tokenizers::Tokenizer;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// Writes texts with a checkpoint
#[derive(Debug, Parser)]
struct Arguments {
    /// Folder of a checkpoint
    folder: PathBuf,
    /// What the texts begin with
    #[arg(required = true)]
    prompts: Vec<String>,
    /// File of the tokenizer, if it is not in the folder
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Texts for each prompt
    #[arg(long, value_name = "N", default_value_t = 1)]
    samples: usize,
    /// Most tokens of a text
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// What logits are divided by; 0 takes the likeliest token always
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Only the N likeliest tokens; 0 for all
    #[arg(long, value_name = "N", default_value_t = 0)]
    top_k: u64,
    /// Only the likeliest tokens that have this probability together
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Only tokens of at least this times the probability of the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// What the logits of tokens that have occurred are divided by
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Where random numbers begin
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Texts at a time; others wait
    #[arg(long, value_name = "N", default_value_t = 16)]
    slots: usize,
    /// Type in which the model computes
    #[arg(long, value_enum, default_value_t = Type::F32)]
    dtype: Type,
    /// Where it runs
    #[arg(long, value_enum, default_value_t = Place::Cpu)]
    device: Place,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Type {
    F32,
    F16,
    Bf16,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Place {
    Cpu,
    Cuda,
}

/// What stands between texts and tokens.
enum Text {
    Tokens(Box<Tokenizer>),
    /// A token is a byte.
    Bytes,
}

impl Text {
    /// The tokenizer of a model of so many tokens.
    fn open(arguments: &Arguments, vocab_size: usize) -> Result<Self> {
        let file = arguments.tokenizer.clone().unwrap_or_else(|| arguments.folder.join("tokenizer.json"));
        match file.exists() {
            true => Ok(Self::Tokens(Box::new(Tokenizer::from_file(file)?))),
            false if vocab_size == 256 => Ok(Self::Bytes),
            false => Err(format!("{}: there is no such file, and the model is none of bytes", file.display()).into()),
        }
    }

    fn tokens(&self, text: &str) -> Result<Vec<u32>> {
        match self {
            Self::Tokens(tokenizer) => Ok(tokenizer.encode(text, true)?.get_ids().to_vec()),
            Self::Bytes => Ok(text.bytes().map(u32::from).collect()),
        }
    }

    fn text(&self, tokens: &[u32]) -> Result<String> {
        match self {
            Self::Tokens(tokenizer) => tokenizer.decode(tokens, true),
            Self::Bytes => {
                let bytes: Vec<u8> = tokens.iter().map(|&token| token as u8).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
        }
    }

    /// The end of a text that has come to be whole since `shown` bytes of it were shown. The last character may be the first bytes of
    /// one whose others are to come.
    fn new_part<'t>(&self, text: &'t str, shown: usize) -> &'t str {
        let whole = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        whole.get(shown..).unwrap_or_default()
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let device = match arguments.device {
        Place::Cpu => Device::Cpu,
        Place::Cuda if cfg!(feature = "candle-cuda") => Device::new_cuda(0)?,
        Place::Cuda => return Err("for a GPU, build with --features nn,candle-cuda".into()),
    };
    // SAFETY: all that this program does is put on candle's stream.
    unsafe { selective_scan::candle::use_one_stream(&device) };
    let dtype = match arguments.dtype {
        Type::F32 => DType::F32,
        Type::F16 => DType::F16,
        Type::Bf16 => DType::BF16,
    };
    let model = LanguageModel::load(&arguments.folder, dtype, &device)?;
    let text = Text::open(arguments, model.config().vocab_size)?;

    let options = GeneratorOptions { slots: arguments.slots.max(arguments.samples), ..Default::default() };
    let mut generator = Generator::new(&model, &options)?;
    let (mut read, mut texts) = (0, HashMap::new());
    for prompt in &arguments.prompts {
        let &Arguments { temperature, top_k, top_p, min_p, repetition_penalty, seed, .. } = arguments;
        let mut request = Request::new(text.tokens(prompt)?);
        request.settings =
            Settings { temperature, top_k, top_p, min_p, repetition_penalty, seed, ..Settings::default() };
        (request.samples, request.max_tokens) = (arguments.samples, arguments.max_tokens);
        request.stop_tokens = model.config().eos_token_ids();
        read += request.prompt.len();
        let first = generator.submit(request)?;
        texts.extend((first..first + arguments.samples as u64).map(|sequence| (sequence, (prompt, Vec::new()))));
    }

    let started = Instant::now();
    write_all(&mut generator, &text, &mut texts)?;
    let (seconds, written) =
        (started.elapsed().as_secs_f64(), texts.values().map(|(_, tokens)| tokens.len()).sum::<usize>());
    eprintln!("{read} tokens read and {written} written in {seconds:.2} s: {:.0} a second", written as f64 / seconds);
    Ok(())
}

/// Shows a single text as it comes, and several when they are whole.
fn write_all(generator: &mut Generator, text: &Text, texts: &mut HashMap<u64, (&String, Vec<u32>)>) -> Result<()> {
    let is_single = texts.len() == 1;
    let (mut out, mut shown) = (stdout().lock(), 0);
    if let Some((prompt, _)) = texts.values().next().filter(|_| is_single) {
        write!(out, "{prompt}")?;
        out.flush()?;
    }
    while !generator.is_idle() {
        for event in generator.turn()? {
            match event {
                Event::Token { sequence, token, .. } => {
                    let Some((_, tokens)) = texts.get_mut(&sequence) else { continue };
                    tokens.push(token);
                    if is_single {
                        let whole = text.text(tokens)?;
                        let part = text.new_part(&whole, shown);
                        write!(out, "{part}")?;
                        out.flush()?;
                        shown += part.len();
                    }
                }
                Event::Finished { sequence, reason } => {
                    let Some((prompt, tokens)) = texts.get(&sequence) else { continue };
                    let whole = text.text(tokens)?;
                    match is_single {
                        true => writeln!(out, "{}", whole.get(shown..).unwrap_or_default())?,
                        false => writeln!(out, "--- {sequence}\n{prompt}{whole}")?,
                    }
                    if reason == FinishReason::Invalid {
                        eprintln!("text {sequence} ends early: the model's logits are no numbers");
                    }
                }
                _ => {}
            }
        }
    }
    Ok(())
}
