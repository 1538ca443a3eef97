//! Searches with beams find the texts that transformers finds (`tests/vectors/generate_generation.py`).

use candle_core::{DType, Device};
use selective_scan::nn::LanguageModel;
use selective_scan::nn::decode::{Decoder, DecoderOptions, SearchOptions};

use super::{causal_blocks, checkpoint, model, random, refusal};
use crate::support::vectors::Case;

#[test]
fn beams_are_those_of_transformers() {
    let searches = Case::all("generation").into_iter().filter(|case| case.name.starts_with("search"));
    for case in searches {
        let size = |name: &str| case.options[name].as_u64().unwrap() as usize;
        let folder = checkpoint(case.options["model"].as_str().unwrap());
        let model = LanguageModel::load(folder, DType::F32, &Device::Cpu).unwrap();
        let decoder_options = DecoderOptions { slots: size("beams"), ..Default::default() };
        let mut decoder = Decoder::new(&model, &decoder_options).unwrap();
        let (beams, max_tokens) = (size("beams"), size("tokens"));
        let options = SearchOptions { beams, max_tokens, length_penalty: 0.0, ..Default::default() };
        let prompt: Vec<u32> = case.inputs["prompt"].1.iter().map(|&token| token as u32).collect();
        let found = decoder.search(&prompt, &options).unwrap();
        let texts: Vec<u32> = case.results["texts"].iter().map(|&token| token as u32).collect();
        assert_eq!(found.len(), size("beams"), "{}", case.name);
        for (i, found) in found.iter().enumerate() {
            assert_eq!(found.tokens, texts[i * size("tokens")..][..size("tokens")], "{}, text {i}", case.name);
            // Logits in `f32` are within 1e-5 of those in `f64`, in each of the tokens.
            let error = (found.score - case.results["scores"][i]).abs();
            assert!(error <= 1e-4 * size("tokens") as f64, "{}, text {i}: {error:e}", case.name);
        }
    }
}

/// A text ends where a stop token is likelier than all that goes on; of several by their length.
#[test]
fn texts_end_at_stop_tokens() {
    let mut random = random();
    let (model, _) = model(&causal_blocks()[0].1, &mut random);
    let decoder_options = DecoderOptions { slots: 3, ..Default::default() };
    let mut decoder = Decoder::new(&model, &decoder_options).unwrap();
    let mut options = SearchOptions { beams: 3, max_tokens: 8, ..Default::default() };
    let all = decoder.search(&[1, 2], &options).unwrap();
    options.stop_tokens = (0..11).collect();
    // Every token ends the text: the best are three that have none.
    let none = decoder.search(&[1, 2], &options).unwrap();
    assert!(none.len() == 3 && none.iter().all(|found| found.tokens.is_empty() && found.score < 0.0));
    assert!(none[0].score >= none[1].score && none[1].score >= none[2].score);
    options.stop_tokens = vec![all[0].tokens[3]];
    for found in decoder.search(&[1, 2], &options).unwrap() {
        assert!(!found.tokens.contains(&all[0].tokens[3]) && found.tokens.len() <= 8);
    }
    // One beam is the likeliest token each time.
    (options.beams, options.stop_tokens) = (1, Vec::new());
    let greedy = decoder.search(&[1, 2], &options).unwrap();
    decoder.cache().reset(None).unwrap();
    let mut logits = decoder.prefill(&[&[1, 2]], &[0]).unwrap();
    for &token in &greedy[0].tokens {
        assert_eq!(logits.argmax(1).unwrap().to_vec1::<u32>().unwrap(), [token]);
        logits = decoder.step(&[token], &[0]).unwrap();
    }
    options.beams = 4;
    assert_eq!(refusal(decoder.search(&[1], &options)), "`beams`: expected 1 to 3, the number of slots, got 4");
    options.beams = 1;
    assert_eq!(refusal(decoder.search(&[], &options)), "`prompt`: expected at least one token, got none");
    assert_eq!(refusal(decoder.search(&[11], &options)), "`prompt`: expected tokens from 0 to 10, got 11 at 0");
    options.max_tokens = 0;
    assert_eq!(refusal(decoder.search(&[1], &options)), "`max_tokens`: expected at least 1, got 0");
}
