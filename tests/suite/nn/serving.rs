//! Sequences that join, leave, share prompts and are cut off get the texts that they would get alone.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use selective_scan::View;
use selective_scan::nn::decode::{
    Cache, Decoder, DecoderOptions, Event, FinishReason, Generator, GeneratorOptions, Request,
};
use selective_scan::nn::{LanguageModel, MambaConfig};
use selective_scan::sampling::{self, Settings};

use super::{SAME, assert_close, causal_blocks, model, random, rebuilt, refusal};

const VOCAB: usize = 11;

fn settings(random: &mut StdRng) -> Settings {
    Settings {
        temperature: if random.random_range(0..3) == 0 { 0.0 } else { random.random_range(0.3..1.5) },
        top_k: random.random_range(0..6),
        top_p: if random.random() { 1.0 } else { random.random_range(0.5..1.0) },
        repetition_penalty: if random.random() { 1.0 } else { 1.3 },
        seed: random.random(),
        ..Settings::default()
    }
}

fn request(random: &mut StdRng) -> Request {
    let length = random.random_range(1..20);
    let prompt: Vec<u32> = (0..length).map(|_| random.random_range(0..VOCAB as u32)).collect();
    let mut request = Request::new(prompt);
    request.settings = settings(random);
    request.max_tokens = random.random_range(1..12);
    if random.random_range(0..3) == 0 {
        request.stop_tokens = vec![random.random_range(0..VOCAB as u32)];
    }
    request
}

/// A text by the model's own calls and the choice on slices: tokens with log-probabilities, and why it ends.
fn alone(model: &LanguageModel, request: &Request) -> (Vec<(u32, f32)>, FinishReason) {
    let cache = model.new_cache(1, DType::F32).unwrap();
    if let Some(start) = &request.start {
        cache.put(start, &[0]).unwrap();
    }
    let ids = Tensor::new(&request.prompt[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let mut logits = model.prefill(&ids, &cache, None).unwrap();
    let (mut settings, mut bits) = ([request.settings], vec![0; sampling::words(VOCAB)]);
    sampling::mark(&mut bits, &request.prompt).unwrap();
    let mut text = Vec::new();
    loop {
        let row = logits.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (mut token, mut log_prob) = ([0], [0.0]);
        let state = sampling::StateMut {
            occurred: Some(&mut bits),
            log_probs: Some(&mut log_prob),
            ..sampling::StateMut::new(&mut settings, &mut token)
        };
        sampling::Inputs::new(View::new(&row, [1, VOCAB])).sample(state).unwrap();
        if request.stop_tokens.contains(&token[0]) {
            return (text, FinishReason::Stop(token[0]));
        }
        text.push((token[0], log_prob[0]));
        if text.len() == request.max_tokens {
            return (text, FinishReason::Length);
        }
        logits = model.step(&Tensor::new(&token, &Device::Cpu).unwrap(), &cache, None).unwrap();
    }
}

/// What has been heard of a sequence.
#[derive(Default)]
struct Heard {
    text: Vec<(u32, f32)>,
    reason: Option<FinishReason>,
}

fn listen(events: Vec<Event>, heard: &mut HashMap<u64, Heard>) {
    for event in events {
        match event {
            Event::Token { sequence, token, log_prob } => {
                let heard = heard.entry(sequence).or_default();
                assert!(heard.reason.is_none(), "sequence {sequence} goes on after its end");
                heard.text.push((token, log_prob.expect("they were asked for")));
            }
            Event::Finished { sequence, reason } => {
                let before = heard.entry(sequence).or_default().reason.replace(reason);
                assert!(before.is_none(), "sequence {sequence} ends twice");
            }
            _ => unreachable!("there are no others"),
        }
    }
}

/// Whether two texts are one, log-probabilities within rounding.
fn is_same((got, reason): &(Vec<(u32, f32)>, FinishReason), heard: &Heard) -> bool {
    let tokens = |text: &[(u32, f32)]| text.iter().map(|(token, _)| *token).collect::<Vec<_>>();
    tokens(got) == tokens(&heard.text) && heard.reason == Some(*reason)
}

/// Requests that come at any time, several samples of some, some cancelled; prompts in small chunks.
pub fn texts_are_those_of_sequences_alone(device: &Device, requests: usize, slots: usize, prompt_tokens: usize) {
    let mut random = random();
    let blocks = causal_blocks();
    for (name, config) in [&blocks[0], &blocks[2], &blocks[4]] {
        let model = on(device, config, &mut random);
        let options = GeneratorOptions { slots, prompt_tokens, log_probs: true, ..Default::default() };
        let mut generator = Generator::new(&model, &options).unwrap();
        let (mut expected, mut cancelled, mut heard) = (HashMap::new(), Vec::new(), HashMap::new());
        let mut submitted = 0;
        while submitted < requests || !generator.is_idle() {
            while submitted < requests && random.random_range(0..3) > 0 {
                let mut request = request(&mut random);
                request.samples = random.random_range(1..=3.min(slots));
                let first = generator.submit(request.clone()).unwrap();
                for i in 0..request.samples as u64 {
                    let mut sample = request.clone();
                    sample.settings.seed = sample.settings.seed.wrapping_add(i);
                    expected.insert(first + i, sample);
                }
                submitted += 1;
            }
            if random.random_range(0..10) == 0 && !expected.is_empty() {
                let sequence = random.random_range(0..expected.len() as u64);
                let is_over = heard.get(&sequence).is_some_and(|heard: &Heard| heard.reason.is_some());
                if generator.cancel(sequence) {
                    assert!(!is_over, "{name}: sequence {sequence} was over");
                    cancelled.push(sequence);
                }
            }
            listen(generator.turn().unwrap(), &mut heard);
        }
        assert_eq!(generator.load(), (0, 0));
        let mut different = Vec::new();
        for (sequence, request) in &expected {
            let (heard, wanted) = (&heard[sequence], alone(&model, request));
            if cancelled.contains(sequence) {
                assert_eq!(heard.reason, Some(FinishReason::Cancelled), "{name}: {sequence}");
                continue;
            }
            match is_same(&wanted, heard) {
                true => {
                    for ((_, got), (_, wanted)) in heard.text.iter().zip(&wanted.0) {
                        assert!((got - wanted).abs() <= 1e-3 * wanted.abs().max(1.0), "{name}: {got} and {wanted}");
                    }
                }
                false => different.push(*sequence),
            }
        }
        // What a prompt leaves depends on its company within some 1e-6, which changes a choice where that is as near: one in 10^5 tokens,
        // or one of a thousand texts. That it is more than one in 50, and than two of few, will not be seen.
        assert!(different.len() <= 2.max(expected.len() / 50), "{name}: {different:?} of {}", expected.len());
    }
}

/// A small model on a device, with a vocabulary of 11.
fn on(device: &Device, config: &MambaConfig, random: &mut StdRng) -> LanguageModel {
    let (model, _) = model(config, random);
    rebuilt(&model, model.config(), DType::F32, device)
}

/// What is done to sequences in any order: chunks of prompts, alone and packed, steps, drafts that are taken back in part, copies onto
/// other slots, exchanges, and new sequences. In the end each slot gives the logits of all that its sequence has read.
pub fn slots_hold_what_was_read(device: &Device, operations: usize) {
    const SLOTS: usize = 6;
    let mut random = random();
    for (name, config) in causal_blocks() {
        let model = on(device, &config, &mut random);
        let options = DecoderOptions { slots: SLOTS, ..Default::default() };
        let mut decoder = Decoder::new(&model, &options).unwrap();
        let mut texts: Vec<Vec<u32>> = vec![Vec::new(); SLOTS];
        for _ in 0..operations {
            let mut slots: Vec<i32> = (0..SLOTS as i32).collect();
            slots.shuffle(&mut random);
            slots.truncate(random.random_range(1..=SLOTS));
            let tokens = |random: &mut StdRng, most: usize| -> Vec<u32> {
                let count = random.random_range(1..=most);
                (0..count).map(|_| random.random_range(0..VOCAB as u32)).collect()
            };
            match random.random_range(0..6) {
                0 => {
                    let parts: Vec<_> = slots.iter().map(|_| tokens(&mut random, 9)).collect();
                    let views: Vec<_> = parts.iter().map(Vec::as_slice).collect();
                    decoder.prefill(&views, &slots).unwrap();
                    slots.iter().zip(&parts).for_each(|(&slot, part)| texts[slot as usize].extend(part));
                }
                1 | 2 => {
                    let next: Vec<_> = slots.iter().map(|_| tokens(&mut random, 1)[0]).collect();
                    decoder.step(&next, &slots).unwrap();
                    slots.iter().zip(next).for_each(|(&slot, token)| texts[slot as usize].push(token));
                }
                3 => {
                    let count = random.random_range(1..=4);
                    let drafted: Vec<Vec<u32>> = slots
                        .iter()
                        .map(|_| (0..count).map(|_| random.random_range(0..VOCAB as u32)).collect())
                        .collect();
                    let ids =
                        Tensor::new(drafted.concat(), &Device::Cpu).unwrap().reshape((slots.len(), count)).unwrap();
                    let (_, draft) = model.draft(&ids, decoder.cache(), &slots).unwrap();
                    let accepted: Vec<_> = slots.iter().map(|_| random.random_range(1..=count)).collect();
                    draft.accept(&accepted).unwrap();
                    for ((&slot, drafted), accepted) in slots.iter().zip(&drafted).zip(accepted) {
                        texts[slot as usize].extend(&drafted[..accepted]);
                    }
                }
                4 => {
                    // Onto other slots, or round in a circle.
                    let mut to = slots.clone();
                    to.rotate_left(1);
                    let from: Vec<_> = match random.random() {
                        true => slots.clone(),
                        false => vec![slots[0]; slots.len()],
                    };
                    decoder.cache().copy_slots(&from, &to).unwrap();
                    let before = texts.clone();
                    from.iter().zip(to).for_each(|(&from, to)| texts[to as usize] = before[from as usize].clone());
                }
                _ => {
                    decoder.cache().reset(Some(&slots[..1])).unwrap();
                    texts[slots[0] as usize].clear();
                }
            }
        }
        let next = vec![5u32; SLOTS];
        let got = decoder.step(&next, &[0, 1, 2, 3, 4, 5]).unwrap();
        for (slot, text) in texts.iter().enumerate() {
            let cache = model.new_cache(1, DType::F32).unwrap();
            let whole = Tensor::new([&text[..], &[5]].concat(), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            let expected = model.prefill(&whole, &cache, None).unwrap();
            assert_close(&got.narrow(0, slot, 1).unwrap(), &expected, SAME, &format!("{name}, slot {slot}: {text:?}"));
        }
    }
}

#[test]
fn slots_on_the_processor_hold_what_was_read() {
    slots_hold_what_was_read(&Device::Cpu, 300);
}

#[test]
fn texts_on_the_processor() {
    texts_are_those_of_sequences_alone(&Device::Cpu, 300, 7, 9);
    texts_are_those_of_sequences_alone(&Device::Cpu, 60, 1, 1000);
}

/// A beginning that is read once, for many requests.
#[test]
fn requests_share_a_beginning() {
    let mut random = random();
    let model = on(&Device::Cpu, &causal_blocks()[1].1, &mut random);
    let options = GeneratorOptions { log_probs: true, ..Default::default() };
    let generator = &mut Generator::new(&model, &options).unwrap();
    let beginning = [3u32, 1, 4, 1, 5];
    let read = model.new_cache(2, DType::F32).unwrap();
    model.prefill(&Tensor::new(&[beginning], &Device::Cpu).unwrap(), &read, &[1]).unwrap();
    let start: Cache = read.take(&[1]).unwrap();
    let mut expected = HashMap::new();
    for _ in 0..20 {
        let mut request = request(&mut random);
        // Penalties know of what stands in the request alone.
        request.settings.repetition_penalty = 1.0;
        let whole = Request::new([&beginning[..], &request.prompt].concat());
        let mut whole = whole;
        (whole.settings, whole.max_tokens) = (request.settings, request.max_tokens);
        whole.stop_tokens = request.stop_tokens.clone();
        request.start = Some(start.clone());
        expected.insert(generator.submit(request).unwrap(), alone(&model, &whole));
    }
    let mut heard = HashMap::new();
    while !generator.is_idle() {
        listen(generator.turn().unwrap(), &mut heard);
    }
    let different = expected.iter().filter(|(sequence, wanted)| !is_same(wanted, &heard[sequence])).count();
    assert!(different <= 2, "{different} of 20");
}

#[test]
fn requests_that_do_not_fit_are_refused() {
    let mut random = random();
    let model = on(&Device::Cpu, &causal_blocks()[0].1, &mut random);
    let options = GeneratorOptions { prompt_tokens: 0, ..Default::default() };
    assert_eq!(refusal(Generator::new(&model, &options)), "`prompt_tokens`: expected at least 1, got 0");
    let mut generator = Generator::new(&model, &GeneratorOptions::default()).unwrap();
    let refused = |generator: &mut Generator, change: &dyn Fn(&mut Request)| {
        let mut request = Request::new([1, 2]);
        change(&mut request);
        refusal(generator.submit(request))
    };
    let cache = |slots| model.new_cache(slots, DType::F32).unwrap();
    let other = on(&Device::Cpu, &MambaConfig { d_state: 4, ..causal_blocks()[0].1.clone() }, &mut random);
    type Change<'a> = &'a dyn Fn(&mut Request);
    let cases: [(Change, &str); 7] = [
        (&|request| request.prompt.clear(), "`prompt`: expected at least one token, got none"),
        (&|request| request.prompt = vec![1, 11], "`prompt`: expected tokens from 0 to 10, got 11 at 1"),
        (&|request| request.max_tokens = 0, "`max_tokens`: expected at least 1, got 0"),
        (&|request| request.samples = 9, "`samples`: expected 1 to 8, the number of slots, got 9"),
        (&|request| request.settings.top_p = 0.0, "`top_p`: expected above 0 and at most 1, got 0"),
        (&|request| request.start = Some(cache(2)), "`start`: expected states of one slot, got 2"),
        (
            &|request| request.start = Some(other.new_cache(1, DType::F32).unwrap()),
            "`start`: expected states of the same model, got those of another",
        ),
    ];
    for (change, text) in cases {
        assert_eq!(refused(&mut generator, change), text);
    }
    assert!(generator.is_idle() && generator.turn().unwrap().is_empty());
    assert!(!generator.cancel(0));
}
