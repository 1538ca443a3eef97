//! Filters leave the probabilities that those of transformers leave (`tests/vectors/generate_generation.py`).

use selective_scan::sampling::{Settings, mark, reference, words};

use crate::support::vectors::Case;

#[test]
fn probabilities_are_those_of_transformers() {
    let cases: Vec<_> = Case::all("generation").into_iter().filter(|case| case.name.starts_with("sampling")).collect();
    assert!(cases.len() > 10);
    for case in cases {
        let number = |name: &str, otherwise: f32| case.options[name].as_f64().map_or(otherwise, |value| value as f32);
        let settings = Settings {
            temperature: number("temperature", 1.0),
            top_k: number("top_k", 0.0) as u64,
            top_p: number("top_p", 1.0),
            min_p: number("min_p", 0.0),
            repetition_penalty: number("repetition_penalty", 1.0),
            ..Settings::default()
        };
        let logits = &case.inputs["logits"].1;
        let mut bits = vec![0; words(logits.len())];
        let occurred: Vec<u32> = case.inputs["occurred"].1.iter().map(|&token| token as u32).collect();
        mark(&mut bits, &occurred).expect("they are in the vocabulary");
        let got = reference::probabilities(logits, &settings, Some(&bits)).expect("there are some");
        for (token, (got, want)) in got.iter().zip(&case.results["probabilities"]).enumerate() {
            // Settings and penalised logits are `f32` here: 6e-8 of logits up to 10 over a temperature of 0.7, and twice of that for
            // what it is divided by.
            assert!((got - want).abs() <= 5e-6 * want, "{}, token {token}: {got} and {want}", case.name);
        }
    }
}
