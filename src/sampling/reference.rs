//! The choice in `f64`, one row after another: the equations and nothing else.

use super::{Settings, random};

/// The penalised logits `y` of a row of the vocabulary's logits, rounded to `f32` as they are everywhere. `occurred`
/// are the bits of its sequence.
pub fn penalised(logits: &[f32], settings: &Settings, occurred: Option<&[u32]>) -> Vec<f32> {
    let has_occurred = |v: usize| occurred.is_some_and(|words| words[v / 32] >> (v % 32) & 1 == 1);
    let penalised = |(v, &x): (usize, &f32)| {
        if !has_occurred(v) {
            return x;
        }
        let penalty = settings.repetition_penalty;
        let y = if x > 0.0 { x / penalty } else { x * penalty };
        if x.is_finite() { y.clamp(f32::MIN, f32::MAX) } else { x }
    };
    logits.iter().enumerate().map(penalised).collect()
}

/// The probability with which each token of a row is chosen, after all filters; `None` if the row has no token.
/// `logits` are those of the vocabulary, `occurred` the bits of its sequence.
pub fn probabilities(logits: &[f32], settings: &Settings, occurred: Option<&[u32]>) -> Option<Vec<f64>> {
    settings.check().ok()?;
    if logits.iter().any(|x| x.is_nan() || *x == f32::INFINITY) || logits.iter().all(|x| *x == f32::NEG_INFINITY) {
        return None;
    }
    let y = penalised(logits, settings, occurred);
    let mut order: Vec<usize> = (0..y.len()).collect();
    // The sort is stable: of equal ones the first comes first. (`partial_cmp` has 0 and -0 as equal.)
    order.sort_by(|&a, &b| y[b].partial_cmp(&y[a]).expect("none is NaN"));
    let mut probabilities = vec![0.0; y.len()];
    if settings.temperature == 0.0 {
        probabilities[order[0]] = 1.0;
        return Some(probabilities);
    }
    let most = f64::from(y[order[0]]);
    let weight = |v: usize| ((f64::from(y[v]) - most) / f64::from(settings.temperature)).exp();
    if settings.top_k > 0 {
        order.truncate(settings.top_k.try_into().unwrap_or(usize::MAX));
    }
    if settings.top_p < 1.0 {
        let total: f64 = order.iter().map(|&v| weight(v)).sum();
        let (mut kept, mut sum) = (0, 0.0);
        while kept < order.len() && (kept == 0 || sum < f64::from(settings.top_p) * total) {
            sum += weight(order[kept]);
            kept += 1;
        }
        order.truncate(kept);
    }
    order.retain(|&v| weight(v) >= f64::from(settings.min_p));
    let total: f64 = order.iter().map(|&v| weight(v)).sum();
    order.iter().for_each(|&v| probabilities[v] = weight(v) / total);
    Some(probabilities)
}

/// The token of a row, and the logarithm of its probability under the softmax of its logits; `None` if the row has
/// none.
pub fn sample(logits: &[f32], settings: &Settings, occurred: Option<&[u32]>) -> Option<(u32, f64)> {
    let probabilities = probabilities(logits, settings, occurred)?;
    let u = random::uniform(settings.seed, settings.position) as f64 / 2f64.powi(64);
    let mut sum = 0.0;
    let passes = |p: &f64| {
        sum += p;
        sum > u
    };
    // Rounding can leave the sum of all a little below 1.
    let last = probabilities.iter().rposition(|p| *p > 0.0)?;
    let token = probabilities.iter().position(passes).unwrap_or(last);
    Some((token as u32, log_probability(logits, token)))
}

/// The logarithm of a token's probability under the softmax of the vocabulary's logits.
pub fn log_probability(logits: &[f32], token: usize) -> f64 {
    let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let total: f64 = logits.iter().map(|&x| (f64::from(x) - most).exp()).sum();
    f64::from(logits[token]) - most - total.ln()
}
