//! Steps over fixed buffers are the model's own steps, whoever is decoded beside a sequence, and graphs give what launches do.

use candle_core::{DType, Device, Tensor};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
#[cfg(feature = "candle-cuda")]
use selective_scan::candle::Repetition;
use selective_scan::nn::decode::{Decoder, DecoderOptions};
use selective_scan::nn::{LanguageModel, MambaConfig, Norms};

use super::{SAME, assert_close, bits, causal_blocks, random, rebuilt, refusal, relative_error};

/// Tokens of the vocabulary of 11.
fn tokens(random: &mut StdRng, count: usize) -> Vec<u32> {
    (0..count).map(|_| random.random_range(0..11)).collect()
}

/// A model of two layers, with a vocabulary of 11.
fn model(
    block: &MambaConfig,
    dtype: DType,
    residual_in_f32: bool,
    random: &mut StdRng,
    device: &Device,
) -> LanguageModel {
    let (model, _) = super::model(block, random);
    let mut config = model.config().clone();
    config.backbone.residual_in_f32 = residual_in_f32;
    rebuilt(&model, &config, dtype, device)
}

fn decoder(model: &LanguageModel, slots: usize, state_dtype: DType) -> Decoder {
    Decoder::new(model, &DecoderOptions { slots, state_dtype, ..Default::default() }).unwrap()
}

/// Blocks whose steps are joined, one of which with sizes that are no multiples of anything.
fn joined_blocks() -> Vec<(&'static str, MambaConfig)> {
    let mut blocks: Vec<_> = causal_blocks().into_iter().filter(|(_, config)| config.selective).collect();
    let aligned = MambaConfig { d_inner: 32, dt_rank: 4, norms: Norms::None, ..MambaConfig::new(16) };
    blocks.push(("aligned", aligned));
    blocks
}

/// Sequences of different lengths, some steps after their prompts: logits of the decoder and of the model.
pub fn steps_are_the_models(device: &Device) {
    let mut random = random();
    let types = [(DType::F32, true), (DType::F32, false), (DType::BF16, true), (DType::F16, false)];
    for (name, config) in causal_blocks().into_iter().chain(joined_blocks().pop()) {
        for (dtype, residual_in_f32) in types {
            // candle multiplies no matrices of half types on processors; there the model widens them, and rounds elsewhere.
            let model = model(&config, dtype, residual_in_f32, &mut random, device);
            let state_dtype = if dtype == DType::F16 { DType::F16 } else { DType::F32 };
            let mut decoder = decoder(&model, 5, state_dtype);
            let cache = model.new_cache(5, state_dtype).unwrap();
            let mut slots = [0i32, 1, 2, 3, 4];
            slots.shuffle(&mut random);
            let prompts: Vec<_> = (0..3).map(|i| tokens(&mut random, 1 + 2 * i)).collect();
            let prompts: Vec<_> = prompts.iter().map(Vec::as_slice).collect();
            let got = decoder.prefill(&prompts, &slots[..3]).unwrap();
            for (i, prompt) in prompts.iter().enumerate() {
                let ids = Tensor::new(*prompt, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
                let expected = model.prefill(&ids, &cache, &slots[i..=i]).unwrap();
                assert_close(&got.narrow(0, i, 1).unwrap(), &expected, tolerance(dtype), name);
            }
            for step in 0..4 {
                // Other sequences each time, and a row of padding.
                let active: Vec<i32> = (0..3).filter(|i| (step + i) % 3 > 0).map(|i| slots[i]).chain([-1]).collect();
                let next = tokens(&mut random, active.len());
                let got = decoder.step(&next, &active).unwrap();
                let expected = model.step(&Tensor::new(next, &Device::Cpu).unwrap(), &cache, &active).unwrap();
                for row in 0..active.len() - 1 {
                    let (got, expected) = (got.narrow(0, row, 1).unwrap(), expected.narrow(0, row, 1).unwrap());
                    let error = relative_error(&got, &expected);
                    assert!(error <= tolerance(dtype), "{name}, {dtype:?}, step {step}, row {row}: {error:e}");
                }
            }
        }
    }
}

/// Both round what they compute at the same places, and differ in the order of sums: in a half type that turns a rounding here and
/// there, of which a few in 20 or 32 terms with some layers behind them are within a few of the type's units.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => SAME,
        DType::F16 => 8.0 * 2f64.powi(-11),
        _ => 8.0 * 2f64.powi(-8),
    }
}

/// A sequence gets the same bits alone and among others, in any row.
pub fn company_changes_no_bit(device: &Device) {
    let mut random = random();
    for (name, config) in joined_blocks() {
        for dtype in [DType::F32, DType::BF16] {
            let model = model(&config, dtype, true, &mut random, device);
            let mut decoders = [(); 2].map(|()| decoder(&model, 12, DType::F32));
            // What prefill gives depends on the company within rounding: the states are the same to begin with.
            for slot in 0..12 {
                let length = random.random_range(1..4);
                let prompt = tokens(&mut random, length);
                for decoder in &decoders {
                    decoder.prefill(&[&prompt], &[slot]).unwrap();
                }
            }
            for rows in [1, 2, 5, 9, 12] {
                let mut slots: Vec<i32> = (0..12).collect();
                slots.shuffle(&mut random);
                let (slots, next) = (&slots[..rows], tokens(&mut random, rows));
                let together = decoders[0].step(&next, slots).unwrap();
                for row in 0..rows {
                    let alone = decoders[1].step(&next[row..=row], &slots[row..=row]).unwrap();
                    let row_of = together.narrow(0, row, 1).unwrap();
                    assert_eq!(bits(&row_of), bits(&alone), "{name}, {dtype:?}, row {row} of {rows}");
                }
            }
        }
    }
}

#[test]
fn steps_on_the_processor_are_the_models() {
    steps_are_the_models(&Device::Cpu);
}

#[test]
fn company_changes_no_bit_on_the_processor() {
    company_changes_no_bit(&Device::Cpu);
}

/// On a GPU a step is a graph of three or four launches a layer and two, and plain launches give its bits.
#[cfg(feature = "candle-cuda")]
pub fn graphs_are_launches(device: &Device) {
    let mut random = random();
    for (name, config) in joined_blocks() {
        let model = model(&config, DType::BF16, true, &mut random, device);
        let mut decoders = [(); 2].map(|()| decoder(&model, 3, DType::BF16));
        // x_proj is within the update where it can be read in vectors.
        let of_layer = if name == "aligned" { 3 } else { 4 };
        assert_eq!(decoders[0].how(2).unwrap(), Repetition::Graph { launches: of_layer * 2 + 2 }, "{name}");
        decoders[1].launch_plainly(true);
        for _ in 0..5 {
            let (next, slots) = (tokens(&mut random, 2), if random.random() { [2, 0] } else { [1, -1] });
            let [graph, launches] = decoders.each_mut().map(|decoder| bits(&decoder.step(&next, &slots).unwrap()));
            assert_eq!(graph[..11], launches[..11], "{name}");
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let mut random = random();
    let device = Device::Cpu;
    let model = model(&joined_blocks()[0].1, DType::F32, true, &mut random, &device);
    let options = DecoderOptions { slots: 0, ..Default::default() };
    assert_eq!(refusal(Decoder::new(&model, &options)), "`slots`: expected at least 1, got 0");
    let mut decoder = decoder(&model, 2, DType::F32);
    let before: Vec<_> =
        decoder.cache().layers().iter().flat_map(|layer| bits(&layer.as_mamba().unwrap().ssm)).collect();
    let refused = [
        (&[1u32][..], &[0i32, 1][..], "`tokens`: expected 2, one for each slot, got 1"),
        (&[1, 11], &[0, 1], "`tokens`: expected tokens from 0 to 10, got 11 at 1"),
        (&[1, 2], &[1, 1], "`slots`: expected a different slot for every row, got 1 twice"),
        (&[1], &[2], "`slots`: expected slots below 2, or negative ones for padding, got 2 for row 0"),
    ];
    for (tokens, slots, text) in refused {
        assert_eq!(refusal(decoder.step(tokens, slots)), text);
    }
    assert_eq!(refusal(decoder.how(3)), "`rows`: expected at most 2, as there are slots, got 3");
    let after: Vec<_> =
        decoder.cache().layers().iter().flat_map(|layer| bits(&layer.as_mamba().unwrap().ssm)).collect();
    assert_eq!(before, after);
    let block = MambaConfig { bidirectional: true, ..joined_blocks()[0].1.clone() };
    let model = self::model(&block, DType::F32, true, &mut random, &device);
    assert!(refusal(Decoder::new(&model, &DecoderOptions::default())).starts_with("`bidirectional`"));
}
