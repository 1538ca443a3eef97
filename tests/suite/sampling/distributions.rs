//! How often tokens are chosen, beside exact probabilities.

use selective_scan::sampling::{Settings, reference};

use super::Case;
use crate::support::device::Device;
use crate::support::draw::{Draw, seeded};

/// Chi-square of counts beside probabilities. It is beyond this bound once in e^30 (1e13) times by the tail of the
/// distribution (Laurent and Massart 2000, lemma 1: beyond d + 2 √(d x) + 2 x with a probability of e^-x at most). The
/// counts' own tail is a little heavier where 50 are expected, which leaves four powers of ten.
#[track_caller]
fn assert_distributed(counts: &[u64], probabilities: &[f64], what: &str) {
    let draws = counts.iter().sum::<u64>() as f64;
    // Tokens that are rarer are counted together.
    let (mut statistic, mut cells, mut rare) = (0.0, 0, (0.0, 0.0));
    for (&count, &probability) in counts.iter().zip(probabilities) {
        let (count, expected) = (count as f64, probability * draws);
        assert!(expected > 0.0 || count == 0.0, "a token that is left out, {what}");
        if expected < 50.0 {
            rare = (rare.0 + count, rare.1 + expected);
        } else {
            (statistic, cells) = (statistic + (count - expected).powi(2) / expected, cells + 1);
        }
    }
    if rare.1 >= 50.0 {
        (statistic, cells) = (statistic + (rare.0 - rare.1).powi(2) / rare.1, cells + 1);
    } else {
        // A Poisson number of this mean is beyond 200 less than once in 1e40 times.
        assert!(rare.0 <= 200.0, "{rare:?}, {what}");
    }
    let (freedom, x) = (f64::from((cells - 1).max(0)), 30.0);
    let bound = freedom + 2.0 * (freedom * x).sqrt() + 2.0 * x;
    assert!(statistic <= bound, "{statistic} of {cells} cells, at most {bound}, {what}");
}

/// Draws by seeds at one position, or by positions of one seed.
pub fn tokens_come_with_their_probabilities(device: Device, draws: usize) {
    let (_, seed) = seeded();
    let draw = &mut Draw::new(seed);
    let vocab = 23;
    let logits: Vec<f32> = draw.uniform(vocab, -2.0, 2.0);
    let default = Settings { seed, position: seed >> 20, ..Settings::default() };
    let variants = [
        default,
        Settings { temperature: 0.6, ..default },
        Settings { temperature: 3.0, top_k: 9, ..default },
        Settings { top_p: 0.7, ..default },
        Settings { min_p: 0.2, ..default },
        Settings { top_k: 15, top_p: 0.9, min_p: 0.1, repetition_penalty: 1.5, ..default },
    ];
    for (i, variant) in variants.into_iter().enumerate() {
        let bits = vec![0b1010_0110_0101_u32];
        let of = |n: usize| match i % 2 {
            0 => Settings { seed: variant.seed.wrapping_add(n as u64), ..variant },
            _ => Settings { position: variant.position.wrapping_add(n as u64), ..variant },
        };
        let mut case = Case::of(&vec![&logits[..]; draws], &(0..draws).map(of).collect::<Vec<_>>());
        case.occurred = Some(vec![bits[0]; draws]);
        let mut counts = vec![0; vocab];
        for token in case.run(device, false).tokens {
            counts[token as usize] += 1;
        }
        let probabilities = reference::probabilities(&logits, &variant, Some(&bits)).expect("there is a token");
        assert_distributed(&counts, &probabilities, &format!("{variant:?}, {device:?}, SEED={seed}"));
    }
}

#[test]
fn many_draws() {
    tokens_come_with_their_probabilities(Device::best(), 40_000);
}
