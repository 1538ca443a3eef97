//! Text from a prompt: the prompt is read by the scan, all at once; then the state is carried on byte by byte.

use std::fs;
use std::io::{self, Write};
use std::time::Instant;

use candle_core::{DType, Tensor};
use selective_scan::nn::train::RunFolder;
use selective_scan::nn::{LanguageModel, Sampler, Sampling};

use crate::data::MARK;
use crate::{GenerateArguments, Result};

/// Tokens per second of both parts.
#[derive(Debug, Clone, Copy)]
pub struct Speed {
    /// Reading the prompt.
    pub prefill: f64,
    /// Writing, a token at a time.
    pub decode: f64,
}

pub fn run(arguments: &GenerateArguments) -> Result<()> {
    let prompt = match &arguments.prompt_file {
        Some(file) => fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?,
        None => arguments.prompt.clone().into_bytes(),
    };
    let model = newest(arguments)?;
    let vocab = model.config().vocab_size;
    if vocab != 256 {
        return Err(format!("the model has {vocab} tokens, and is none of bytes").into());
    }
    let &GenerateArguments { temperature, top_k, top_p, seed, .. } = arguments;
    let sampler = Sampler::new(Sampling { temperature, top_k, top_p, seed, ..Sampling::default() })?;

    let mut to = io::stdout().lock();
    to.write_all(&prompt)?;
    let speed = generate(&model, sampler, &prompt, arguments.bytes, &mut to)?;
    writeln!(to)?;
    eprintln!(
        "\nread {} bytes at {:.0} a second, wrote {} at {:.0} a second",
        prompt.len() + 1,
        speed.prefill,
        arguments.bytes,
        speed.decode
    );
    Ok(())
}

/// Loads the newest model, again where training has put a newer one in its place meanwhile.
fn newest(arguments: &GenerateArguments) -> Result<LanguageModel> {
    let device = arguments.device.open()?;
    loop {
        let newest = RunFolder::newest(&arguments.from)?;
        let folder = newest.as_ref().unwrap_or(&arguments.from);
        match LanguageModel::load(folder, DType::F32, &device) {
            Err(_) if RunFolder::newest(&arguments.from)? != newest => {}
            result => return Ok(result?),
        }
    }
}

/// Writes `bytes` bytes that go on with `prompt`.
pub fn generate(
    model: &LanguageModel,
    mut sampler: Sampler,
    prompt: &[u8],
    bytes: usize,
    to: &mut impl Write,
) -> Result<Speed> {
    let model = model.detach()?;
    let cache = model.new_cache(1, DType::F32)?;
    let ids: Vec<_> = [MARK].iter().chain(prompt).map(|&byte| u32::from(byte)).collect();
    let read = ids.len();

    let start = Instant::now();
    let mut token =
        sampler.sample(&model.prefill(&Tensor::new(ids, model.device())?.unsqueeze(0)?, &cache, None)?)?;
    let prefill = read as f64 / start.elapsed().as_secs_f64();

    let start = Instant::now();
    for _ in 0..bytes {
        to.write_all(&[token[0] as u8])?;
        to.flush()?;
        token = sampler.sample(&model.step(&Tensor::new(&token[..], model.device())?, &cache, None)?)?;
    }
    Ok(Speed { prefill, decode: bytes as f64 / start.elapsed().as_secs_f64() })
}
