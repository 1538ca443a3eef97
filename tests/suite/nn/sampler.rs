//! Which tokens are chosen, and how often.

use candle_core::{DType, Device, Tensor};
use rand::Rng;
use rand::rngs::StdRng;
use selective_scan::nn::{Sampler, Sampling};

use super::{random, refusal};

fn logits(random: &mut StdRng, tokens: usize) -> Vec<f32> {
    (0..tokens).map(|_| random.random_range(-3.0..3.0)).collect()
}

fn rows(logits: &[f32], count: usize) -> Tensor {
    Tensor::new(logits, &Device::Cpu).unwrap().unsqueeze(0).unwrap().repeat((count, 1)).unwrap()
}

/// How often each token was chosen in `draws` draws.
fn counts(sampling: Sampling, logits: &[f32], draws: usize) -> Vec<usize> {
    let mut counts = vec![0; logits.len()];
    for token in Sampler::new(sampling).unwrap().sample(&rows(logits, draws)).unwrap() {
        counts[token as usize] += 1;
    }
    counts
}

/// The tokens from the likeliest on.
fn order(logits: &[f32]) -> Vec<usize> {
    let mut order: Vec<_> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    order
}

fn probabilities(logits: &[f32], temperature: f64) -> Vec<f64> {
    let weights: Vec<_> = logits.iter().map(|x| (f64::from(*x) / temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}

/// Holds counts to probabilities: each within six deviations, which chance exceeds once in 10^9.
fn assert_frequencies(counts: &[usize], probabilities: &[f64], what: &str) {
    let draws = counts.iter().sum::<usize>() as f64;
    for (token, (&count, &p)) in counts.iter().zip(probabilities).enumerate() {
        let deviation = (draws * p * (1.0 - p)).sqrt();
        assert!(
            (count as f64 - draws * p).abs() <= 6.0 * deviation + 1.0,
            "{what}, token {token}: {count} of {draws}, {p}"
        );
    }
}

#[test]
fn frequencies_are_the_models_probabilities() {
    let mut random = random();
    for temperature in [0.5, 1.0, 2.0] {
        let logits = logits(&mut random, 12);
        let counts = counts(Sampling { temperature, seed: random.random(), ..Sampling::default() }, &logits, 20_000);
        assert_frequencies(&counts, &probabilities(&logits, temperature), &format!("temperature {temperature}"));
    }
}

#[test]
fn no_temperature_is_greedy() {
    let mut random = random();
    let logits = logits(&mut random, 40);
    let best = order(&logits)[0];
    // At 1e-7 the next token weighs e^(-10^7 · the distance): nothing, as 40 random numbers lie farther apart than that.
    for temperature in [0.0, 1e-7] {
        let sampling = Sampling { temperature, seed: random.random(), ..Sampling::default() };
        assert_eq!(counts(sampling, &logits, 100)[best], 100, "temperature {temperature}");
    }
    let ties = [0.0, 2.0, 1.0, 2.0];
    assert_eq!(counts(Sampling::greedy(), &ties, 10), [0, 10, 0, 0], "the first of several");
}

#[test]
fn top_k_and_top_p_leave_the_likeliest() {
    let mut random = random();
    let (logits, draws) = (logits(&mut random, 30), 20_000);
    let (order, p) = (order(&logits), probabilities(&logits, 1.0));
    let mut check = |sampling: Sampling, kept: usize, what: &str| {
        let sampling = Sampling { seed: random.random(), ..sampling };
        let total: f64 = order[..kept].iter().map(|&token| p[token]).sum();
        let mut expected = vec![0.0; p.len()];
        for &token in &order[..kept] {
            expected[token] = p[token] / total;
        }
        let counts = counts(sampling, &logits, draws);
        assert!(order[kept..].iter().all(|&token| counts[token] == 0), "{what}: a token that was left out");
        assert_frequencies(&counts, &expected, what);
    };
    for k in [1, 2, 7, 30, 31] {
        check(Sampling { top_k: Some(k), ..Sampling::default() }, k.min(30), &format!("top_k {k}"));
    }
    let reached = |limit: f64, of: usize| {
        let total: f64 = order[..of].iter().map(|&token| p[token]).sum();
        let mut sum = 0.0;
        order[..of].iter().position(|&token| {
            sum += p[token];
            sum >= limit * total
        })
    };
    for limit in [1e-9, 0.3, 0.5, 0.9, 0.99] {
        let kept = reached(limit, 30).unwrap() + 1;
        check(Sampling { top_p: Some(limit), ..Sampling::default() }, kept, &format!("top_p {limit}"));
    }
    check(Sampling { top_p: Some(1.0), ..Sampling::default() }, 30, "top_p 1");
    // top_p counts what top_k has left.
    let kept = reached(0.8, 5).unwrap() + 1;
    check(Sampling { top_k: Some(5), top_p: Some(0.8), ..Sampling::default() }, kept, "both");
}

/// A high temperature makes the weights of all tokens equal, but not the tokens.
#[test]
fn top_k_leaves_the_likeliest_at_any_temperature() {
    let mut random = random();
    let (logits, draws) = (logits(&mut random, 30), 2_000);
    let order = order(&logits);
    for temperature in [1e-3, 1.0, 1e8, 1e16, f64::MAX] {
        let sampling = Sampling { temperature, top_k: Some(4), seed: random.random(), ..Sampling::default() };
        let all = counts(sampling, &logits, draws);
        assert!(order[4..].iter().all(|&token| all[token] == 0), "temperature {temperature}: {all:?}");
        if temperature >= 1e8 {
            assert_frequencies(&order[..4].iter().map(|&token| all[token]).collect::<Vec<_>>(), &[0.25; 4], "four");
        }
        // Of equal weights, half of the probability is half of the tokens.
        if temperature >= 1e16 {
            let sampling = Sampling { top_k: None, top_p: Some(0.5), ..sampling };
            let all = counts(sampling, &logits, draws);
            assert!(order[15..].iter().all(|&token| all[token] == 0), "temperature {temperature}: {all:?}");
        }
    }
    // Equally likely tokens come in their order, and -0 is 0.
    let sampling = Sampling { top_k: Some(2), ..Sampling::default() };
    let counts = counts(sampling, &[-1.0, -0.0, 0.0, 0.0], 100);
    assert!(counts[0] == 0 && counts[3] == 0, "{counts:?}");
}

#[test]
fn what_is_refused_takes_no_random_number() {
    let mut random = random();
    let logits = rows(&logits(&mut random, 50), 2);
    let sampling = Sampling { seed: random.random(), ..Sampling::default() };
    let (mut first, mut second) = (Sampler::new(sampling).unwrap(), Sampler::new(sampling).unwrap());
    let bad = Tensor::new(&[[0f32, 1.0], [0.0, f32::NAN]], &Device::Cpu).unwrap();
    refusal(first.sample(&bad));
    let draw = |sampler: &mut Sampler| (0..8).map(|_| sampler.sample(&logits).unwrap()).collect::<Vec<_>>();
    assert_eq!(draw(&mut first), draw(&mut second));
}

#[test]
fn no_rows_have_no_tokens() {
    let mut sampler = Sampler::new(Sampling::default()).unwrap();
    let empty = |rows: usize, tokens: usize| Tensor::zeros((rows, tokens), DType::F32, &Device::Cpu).unwrap();
    assert!(sampler.sample(&empty(0, 5)).unwrap().is_empty());
    assert!(refusal(sampler.sample(&empty(2, 0))).contains("a token that is possible"));
    assert!(refusal(sampler.sample(&empty(1, 5).squeeze(0).unwrap())).contains("(batch, vocab_size)"));
}

#[test]
fn a_seed_is_a_sequence() {
    let mut random = random();
    let logits = rows(&logits(&mut random, 50), 64);
    let seed = random.random();
    let draw = |seed| {
        let mut sampler = Sampler::new(Sampling { seed, ..Sampling::default() }).unwrap();
        [sampler.sample(&logits).unwrap(), sampler.sample(&logits).unwrap()]
    };
    let [first, second] = draw(seed);
    assert_eq!([first.clone(), second.clone()], draw(seed));
    assert_ne!(first, second);
    assert_ne!(first, draw(seed ^ 1)[0]);
}

#[test]
fn what_says_nothing_is_refused() {
    let new = |sampling| Sampler::new(sampling).map(|_| ());
    let base = Sampling::default();
    for temperature in [-0.1, f64::NAN, f64::INFINITY] {
        let message = refusal(new(Sampling { temperature, ..base }));
        assert!(message.contains("`temperature`: expected a finite number, 0 or more"), "{message}");
    }
    assert!(Sampler::new(Sampling { temperature: -0.0, ..base }).is_ok(), "minus zero is zero");
    assert!(refusal(new(Sampling { top_k: Some(0), ..base })).contains("top_k"));
    for p in [0.0, 1.1, f64::NAN] {
        assert!(refusal(new(Sampling { top_p: Some(p), ..base })).contains("top_p"));
    }
    for sampling in [base, Sampling::greedy()] {
        let mut sampler = Sampler::new(sampling).unwrap();
        for bad in [[0.0, f32::NAN], [f32::INFINITY, 0.0], [f32::NEG_INFINITY; 2]] {
            assert!(refusal(sampler.sample(&rows(&bad, 1))).contains("logits"));
        }
        assert_eq!(sampler.sample(&rows(&[f32::NEG_INFINITY, 0.0], 3)).unwrap(), [1, 1, 1]);
    }
}
