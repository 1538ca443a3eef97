//! How much of a signal's past is in a state.

use std::f64::consts::TAU;

use comfy_table::{Table, presets};
use nalgebra::{DMatrix, DVector};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selective_scan::Result;
use selective_scan::lti::hippo::Measure;
use selective_scan::lti::{Dense, Recurrent, Rule};

/// The error of the past for a kind of system, by the number of its states.
#[derive(Debug)]
pub struct Memory {
    pub system: &'static str,
    pub errors: Vec<(usize, f64)>,
}

/// Steps in the unit of time that is asked for.
const STEPS: usize = 2000;

/// A signal of six waves, the fastest of which turns six times in a unit of time.
fn signal(random: &mut StdRng) -> impl Fn(f64) -> f64 + use<> {
    let waves: Vec<(f64, f64)> =
        (0..6).map(|_| (random.random_range(0.5..6.0), random.random_range(0.0..1.0))).collect();
    move |t| waves.iter().map(|(frequency, phase)| (TAU * (frequency * t + phase)).sin()).sum()
}

pub fn all(quick: bool, seed: u64) -> Result<Vec<Memory>> {
    let mut random = StdRng::seed_from_u64(seed);
    let signal = signal(&mut random);
    let delta = 1.0 / STEPS as f64;
    // Three units of time, of which the first two are to be forgotten. Each step has the mean of the signal over it.
    let u: Vec<f64> = (0..3 * STEPS).map(|k| signal((k as f64 + 0.5) * delta)).collect();
    let ago: Vec<f64> = (1..100).map(|i| f64::from(i) / 100.0).collect();
    let past: Vec<f64> = ago.iter().map(|s| signal(3.0 - s)).collect();
    let orders: &[usize] = if quick { &[8, 32] } else { &[4, 8, 16, 32, 64] };
    let mut all = Vec::new();
    for (system, measure) in
        [("HiPPO-LegT", Measure::LegT), ("HiPPO, Fourier", Measure::Fourier), ("HiPPO-LegS", Measure::LegS)]
    {
        let error = |&order: &usize| {
            let mut state = vec![0.0; order];
            measure.system(order)?.discretize(delta, Rule::Bilinear)?.sequence(&u, &mut state)?;
            Ok((order, error(&measure.reconstruct(&state, &ago), &past)))
        };
        all.push(Memory { system, errors: orders.iter().map(error).collect::<Result<_>>()? });
    }
    let mut error = |&order: &usize| {
        let system = random_system(order, &mut random)?;
        let mut state = vec![0.0; order];
        system.discretize(delta, Rule::Bilinear)?.sequence(&u, &mut state)?;
        Ok((order, error(&best_guess(&system, &state, &ago)?, &past)))
    };
    let errors = orders.iter().map(&mut error).collect::<Result<_>>()?;
    all.push(Memory { system: "random stable A, best guess", errors });
    Ok(all)
}

/// A stable matrix: a skew-symmetric one, by which states turn into each other as fast as those of HiPPO do, less the
/// identity.
fn random_system(order: usize, random: &mut StdRng) -> Result<Dense> {
    let mut numbers = || -> Vec<f64> { (0..order * order).map(|_| random.random_range(-1.0..1.0)).collect() };
    let (skew, b) = (numbers(), numbers());
    let entry = |at: usize| {
        let (i, j) = (at / order, at % order);
        let own = if i == j { -1.0 } else { 0.0 };
        own + (order as f64).sqrt() * (skew[i * order + j] - skew[j * order + i])
    };
    let a: Vec<f64> = (0..order * order).map(entry).collect();
    Dense::new(&a, &b[..order], &vec![0.0; order], 0.0)
}

/// The past of least norm that leaves this state, by the answers of the states to an impulse: nobody can know more
/// without knowing the signal.
fn best_guess(system: &Dense, state: &[f64], ago: &[f64]) -> Result<Vec<f64>> {
    let (order, delta) = (state.len(), 1.0 / STEPS as f64);
    let steps = system.discretize(delta, Rule::Bilinear)?;
    // What an input of one step leaves in the state, so many steps later. Three units of time are all that there was.
    let mut answers = DMatrix::zeros(order, 3 * STEPS);
    let mut answer = vec![0.0; order];
    for k in 0..3 * STEPS {
        steps.step(&mut answer, if k == 0 { 1.0 } else { 0.0 });
        answers.set_column(k, &DVector::from_row_slice(&answer));
    }
    let gram = &answers * answers.transpose();
    let largest = gram.diagonal().max();
    let inverse = gram.pseudo_inverse(1e-12 * largest).unwrap_or_else(|_| DMatrix::zeros(order, order));
    let guess = answers.transpose() * (inverse * DVector::from_row_slice(state));
    Ok(ago.iter().map(|s| guess[(s * STEPS as f64).round() as usize]).collect())
}

fn error(got: &[f64], want: &[f64]) -> f64 {
    let difference: f64 = got.iter().zip(want).map(|(x, y)| (x - y) * (x - y)).sum();
    (difference / want.iter().map(|x| x * x).sum::<f64>()).sqrt()
}

pub fn table(memories: &[Memory]) -> Table {
    let mut table = Table::new();
    let orders = memories.first().map_or(&[][..], |memory| &memory.errors);
    let header = ["N".to_string()].into_iter().chain(orders.iter().map(|(order, _)| order.to_string()));
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    for Memory { system, errors } in memories {
        let cells = errors.iter().map(|(_, error)| format!("{:.1} %", 100.0 * error));
        table.add_row([system.to_string()].into_iter().chain(cells));
    }
    table
}
