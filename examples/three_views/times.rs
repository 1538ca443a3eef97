//! What each view takes, by the length of the sequence.

use std::hint::black_box;
use std::time::Instant;

use comfy_table::{Table, presets};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rayon::ThreadPoolBuilder;
use selective_scan::lti::{long_conv, s4d};
use selective_scan::{View, ViewMut};

use crate::attention::{HEAD, attention};

/// As many channels as a head of attention has.
pub const CHANNELS: usize = HEAD;
/// The pairs of states of each.
pub const PAIRS: usize = 32;

/// Seconds, by the length of the sequence.
#[derive(Debug)]
pub struct Times {
    pub view: &'static str,
    pub seconds: Vec<(usize, f64)>,
}

/// The least of several runs.
fn seconds(mut run: impl FnMut()) -> f64 {
    let (start, mut least) = (Instant::now(), f64::INFINITY);
    let mut runs = 0;
    while runs == 0 || (runs < 20 && start.elapsed().as_secs_f64() < 0.5) {
        let start = Instant::now();
        run();
        least = least.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    least
}

pub fn all(quick: bool, seed: u64) -> Result<Vec<Times>, Box<dyn std::error::Error>> {
    let lengths: Vec<usize> = (8..=if quick { 11 } else { 16 }).map(|exponent| 1 << exponent).collect();
    let pool = ThreadPoolBuilder::new().num_threads(1).build()?;
    let names = ["recurrence, in chunks", "recurrence, step by step", "kernel and transforms", "softmax attention"];
    let mut all = names.map(|view| Times { view, seconds: Vec::new() });
    for length in lengths {
        let times = pool.install(|| at(length, seed))?;
        for (times, seconds) in all.iter_mut().zip(times) {
            times.seconds.extend(seconds.map(|seconds| (length, seconds)));
        }
    }
    Ok(all.into())
}

/// The times at one length; none of attention where it would take minutes.
fn at(length: usize, seed: u64) -> selective_scan::Result<[Option<f64>; 4]> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut numbers = |count: usize| -> Vec<f32> { (0..count).map(|_| random.random_range(-1.0..1.0)).collect() };
    let (u, b, c) = (numbers(length * CHANNELS), numbers(2 * CHANNELS * PAIRS), numbers(2 * CHANNELS * PAIRS));
    let log_delta = vec![-4.0f32; CHANNELS];
    let a: Vec<f32> = (0..CHANNELS * PAIRS).flat_map(|i| [-0.5, std::f32::consts::PI * (i % PAIRS) as f32]).collect();
    let complex = |x| View::new(x, [CHANNELS, 2 * PAIRS]);
    let inputs = s4d::Inputs::new(
        View::new(&u, [1, length, CHANNELS]),
        View::new(&log_delta, [CHANNELS]),
        complex(&a),
        complex(&b),
        complex(&c),
    );
    let chunks = seconds(|| drop(black_box(inputs.forward())));
    let transforms = seconds(|| {
        let kernel = s4d::cpu::kernel(&inputs, length).expect("as in the forward pass");
        let kernel = View::new(&kernel, [CHANNELS, length]);
        drop(black_box(long_conv::Inputs::new(inputs.u, kernel).forward()));
    });
    let recurrence = s4d::recurrence(inputs.log_delta, inputs.a, inputs.b, inputs.options.rule)?;
    let recurrence = View::new(&recurrence, [CHANNELS, s4d::RECURRENCE_ROWS, PAIRS]);
    let mut state = vec![0.0f32; CHANNELS * 2 * PAIRS];
    let steps = seconds(|| {
        for u in u.chunks_exact(CHANNELS) {
            let update = s4d::UpdateInputs::new(View::new(u, [1, 1, CHANNELS]), recurrence, inputs.c);
            drop(black_box(update.update(ViewMut::new(&mut state[..], [1, CHANNELS, 2 * PAIRS]))));
        }
    });
    let quadratic = (length <= 1 << 14).then(|| seconds(|| drop(black_box(attention(&u, &u, &u)))));
    Ok([Some(chunks), Some(steps), Some(transforms), quadratic])
}

/// With the unit that fits.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.0} µs", s * 1e6),
        s if s < 1.0 => format!("{:.3} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

pub fn table(all: &[Times]) -> Table {
    let mut table = Table::new();
    let lengths = all.first().map_or(&[][..], |times| &times.seconds);
    let header = ["length".to_string()].into_iter().chain(lengths.iter().map(|(length, _)| length.to_string()));
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    for Times { view, seconds } in all {
        let cells = seconds.iter().map(|(_, seconds)| duration(*seconds));
        table.add_row([view.to_string()].into_iter().chain(cells));
    }
    table
}
