//! Text from a prompt: the prompt is read by the scan, all at once; then the state is carried on byte by byte.

use std::fs;
use std::io::{self, Write};
use std::time::Instant;

use candle_core::DType;
use selective_scan::candle::HostCopy;
use selective_scan::nn::LanguageModel;
use selective_scan::nn::decode::{Decoder, DecoderOptions};
use selective_scan::nn::train::RunFolder;
use selective_scan::sampling::Settings;

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
    let (top_k, top_p) = (top_k.unwrap_or(0) as u64, top_p.unwrap_or(1.0) as f32);
    let settings = Settings { temperature: temperature as f32, top_k, top_p, seed, ..Settings::default() };

    let mut to = io::stdout().lock();
    to.write_all(&prompt)?;
    let speed = generate(&model, &settings, &prompt, arguments.bytes, &mut to)?;
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
    settings: &Settings,
    prompt: &[u8],
    bytes: usize,
    to: &mut impl Write,
) -> Result<Speed> {
    let mut decoder = Decoder::new(model, &DecoderOptions::default())?;
    decoder.sampling().begin(0, settings, &[])?;
    let ids: Vec<_> = [MARK].iter().chain(prompt).map(|&byte| u32::from(byte)).collect();
    let mut token = HostCopy::<u32>::new(decoder.sampling().tokens())?;

    let start = Instant::now();
    let logits = decoder.prefill(&[&ids], &[0])?;
    decoder.sampling().sample(&logits, None)?;
    token.start()?;
    token.wait()?;
    let prefill = ids.len() as f64 / start.elapsed().as_secs_f64();

    let start = Instant::now();
    for _ in 0..bytes {
        // The next step goes on with the token where it is, while it comes here.
        decoder.step_chosen(&[0])?;
        to.write_all(&[token.wait()?[0] as u8])?;
        to.flush()?;
        token.start()?;
    }
    Ok(Speed { prefill, decode: bytes as f64 / start.elapsed().as_secs_f64() })
}
