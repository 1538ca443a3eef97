//! Decoding: a prompt is read by the scan, and texts go on from it token by token, by the state update, each in a slot of
//! its own. The model is small and random, and so is what it writes.
//!
//! `cargo run --release --features nn --example 05_decoding`

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use selective_scan::nn::{LanguageModel, LanguageModelConfig, Sampler, Sampling};

const LETTERS: &[u8; 27] = b"abcdefghijklmnopqrstuvwxyz ";

fn main() -> Result<()> {
    let device = Device::Cpu;
    // 27 tokens, 2 layers of width 64. The parameters are drawn. Without gradients nothing is kept for a backward pass.
    let (config, variables) = (LanguageModelConfig::new(LETTERS.len(), 2, 64), VarMap::new());
    let model = LanguageModel::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &device))?.detach()?;

    // A cache is the states of all layers, for four sequences here, and its size does not grow with their length: there
    // is nothing in it for every token.
    let cache = model.new_cache(4, DType::F32)?;
    let states = cache.layers().iter().filter_map(|layer| layer.as_mamba());
    let numbers: usize = states.map(|state| state.conv.elem_count() + state.ssm.elem_count()).sum();
    println!("{} slots, each of {} KiB", cache.slots(), numbers * size_of::<f32>() / cache.slots() / 1024);

    // The prompt goes to slot 0, all tokens at once. What comes out are the logits of what follows it.
    let prompt = tokens("the state of a ");
    let ids = Tensor::new(&prompt[..], &device)?.unsqueeze(0)?;
    let first = model.prefill(&ids, &cache, &[0])?; // (1, 27)

    // All four texts begin with this prompt, which is not read again: its states are copied.
    cache.copy_slots(&[0, 0, 0], &[1, 2, 3])?;
    let mut logits = first.broadcast_as((4, LETTERS.len()))?.contiguous()?;

    // One sampler chooses for each row in turn; the same seed chooses the same. `step` reads the token of each row, goes on
    // with the states of slot i for row i, and gives the logits after it.
    let mut sampler = Sampler::new(Sampling { temperature: 0.7, top_k: Some(8), seed: 2, ..Sampling::default() })?;
    let mut texts = vec![prompt; 4];
    for _ in 0..24 {
        let chosen = sampler.sample(&logits)?;
        texts.iter_mut().zip(&chosen).for_each(|(text, &token)| text.push(token));
        logits = model.step(&Tensor::new(&chosen[..], &device)?, &cache, None)?;
    }
    for (slot, text) in texts.iter().enumerate() {
        println!("slot {slot}: {}", letters(text));
    }

    // What stands in a slot is what reading its whole text would have left: the logits agree, within rounding.
    let fresh = model.new_cache(1, DType::F32)?;
    let whole = model.prefill(&Tensor::new(&texts[2][..], &device)?.unsqueeze(0)?, &fresh, None)?;
    let difference = (logits.narrow(0, 2, 1)? - &whole)?.abs()?.max_all()?.to_scalar::<f32>()?;
    println!("slot 2, token by token and read at once: the logits differ by {difference:.0e} at most");

    // A text that ended makes room for another one, while the rest go on. Rows need not be slots in order: here the batch
    // is slots 3 and 1.
    cache.reset(Some(&[3]))?;
    model.prefill(&Tensor::new(tokens("hello"), &device)?.unsqueeze(0)?, &cache, &[3])?;
    let next = model.step(&Tensor::new(&[tokens("o")[0], tokens("e")[0]], &device)?, &cache, &[3, 1])?;
    println!("slots 3 and 1 go on as a batch of two: logits {:?}", next.dims());
    Ok(())
}

fn tokens(text: &str) -> Vec<u32> {
    let token = |byte| LETTERS.iter().position(|&letter| letter == byte).expect("a letter or a space") as u32;
    text.bytes().map(token).collect()
}

fn letters(tokens: &[u32]) -> String {
    tokens.iter().map(|&token| char::from(LETTERS[token as usize])).collect()
}
