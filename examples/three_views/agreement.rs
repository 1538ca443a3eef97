//! One signal through every view.

use comfy_table::{Table, presets};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selective_scan::lti::hippo::Measure;
use selective_scan::lti::{Complex64, Continuous, Diagonal, Recurrent, Rule, Spectrum, long_conv, s4d};
use selective_scan::{Result, View, ViewMut, scan};
use serde::Serialize;

/// How far two views are from each other.
#[derive(Debug, Serialize)]
pub struct Agreement {
    pub pair: &'static str,
    pub length: usize,
    pub error: f64,
    pub tolerance: f64,
}

/// The states of the system, which decay at the rates 1 to 8.
const STATES: usize = 8;
const DELTA: f64 = 0.01;

/// What the crate promises of `f32` against the same in `f64`.
const SINGLE: f64 = 1e-5;

/// S4D-Real: with real eigenvalues the system is one that the selective scan has, too.
struct System {
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
}

impl System {
    fn random(random: &mut StdRng) -> Self {
        let mut numbers = || (0..STATES).map(|_| random.random_range(-1.0..1.0)).collect();
        Self { a: (1..=STATES).map(|n| -(n as f32)).collect(), b: numbers(), c: numbers() }
    }

    fn diagonal(&self) -> Result<Diagonal> {
        let complex = |x: &[f32]| x.iter().map(|&x| Complex64::from(f64::from(x))).collect::<Vec<_>>();
        Diagonal::new(&complex(&self.a), &complex(&self.b), &complex(&self.c), 0.5, Spectrum::Real)
    }

    /// The scan, whose step sizes, B and C are the same at every step here.
    fn scan(&self, u: &[f32]) -> Result<Vec<f32>> {
        let delta = [DELTA as f32];
        let of_state = |x| View::new(x, [1, STATES]);
        let shape = [1, u.len(), 1];
        let inputs = scan::Inputs {
            d: Some(View::new(&[0.5], [1])),
            options: scan::Options {
                discretization: selective_scan::Discretization::ZeroOrderHold,
                ..scan::Options::default()
            },
            ..scan::Inputs::new(
                View::new(u, shape),
                View::new(&delta, shape).with_layout(0, [0, 0, 0]),
                of_state(&self.a),
                of_state(&self.b),
                of_state(&self.c),
            )
        };
        Ok(inputs.forward()?.out)
    }

    /// The operators of S4D, where a pair reads `2 Re(C x)`.
    fn s4d(&self, u: &[f32]) -> Result<[Vec<f32>; 3]> {
        let pairs = |x: &[f32], weight: f32| x.iter().flat_map(|x| [weight * x, 0.0]).collect::<Vec<_>>();
        let [a, b, c] = [pairs(&self.a, 1.0), pairs(&self.b, 1.0), pairs(&self.c, 0.5)];
        // The step size is that of the other views in f32 too: its logarithm is not.
        let log_delta = [(DELTA as f32).ln()];
        let complex = |x| View::new(x, [1, 2 * STATES]);
        let (u_view, d) = (View::new(u, [1, u.len(), 1]), Some(View::new(&[0.5f32], [1])));
        let inputs = s4d::Inputs {
            d,
            ..s4d::Inputs::new(u_view, View::new(&log_delta, [1]), complex(&a), complex(&b), complex(&c))
        };
        let sequence = inputs.forward()?.out;
        let kernel = s4d::cpu::kernel(&inputs, u.len())?;
        let by_transforms = long_conv::Inputs { d, ..long_conv::Inputs::new(u_view, View::new(&kernel, [1, u.len()])) };
        let recurrence = s4d::recurrence(inputs.log_delta, inputs.a, inputs.b, Rule::ZeroOrderHold)?;
        let mut state = [0.0f32; 2 * STATES];
        let mut steps = Vec::with_capacity(u.len());
        for u in u {
            let step = s4d::UpdateInputs {
                d,
                ..s4d::UpdateInputs::new(
                    View::new(std::slice::from_ref(u), [1, 1, 1]),
                    View::new(&recurrence, [1, s4d::RECURRENCE_ROWS, STATES]),
                    inputs.c,
                )
            };
            steps.extend(step.update(ViewMut::new(&mut state[..], [1, 1, 2 * STATES]))?);
        }
        Ok([sequence, by_transforms.forward()?, steps])
    }
}

/// All pairs at all lengths.
pub fn all(lengths: &[usize], seed: u64) -> Result<Vec<Agreement>> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut all = Vec::new();
    for &length in lengths {
        let system = System::random(&mut random);
        let u: Vec<f32> = (0..length).map(|_| random.random_range(-1.0..1.0)).collect();
        let wide: Vec<f64> = u.iter().map(|&x| x.into()).collect();
        let diagonal = system.diagonal()?;
        // As the operators in f32 have it.
        let delta = f64::from((DELTA as f32).ln()).exp();
        let steps = diagonal.discretize(delta, Rule::ZeroOrderHold)?;
        let recurrent = steps.sequence(&wide, &mut [0.0; 2 * STATES])?;
        let mut add = |pair, got: &[f64], tolerance| {
            all.push(Agreement { pair, length, error: error(got, &recurrent), tolerance });
        };
        // Runge and Kutta's local error is (|λ|h)^5/120, and 1/(|λ|h) steps are remembered: with 8 fine steps |λ|h is
        // 0.01 at most.
        let continuous = diagonal.integrate_held(&wide, delta, 8, &mut [0.0; 2 * STATES])?;
        add("continuous, recurrent", &continuous, 0.01f64.powi(4) / 120.0 * 10.0);
        // A transform rounds log2(2L) times, the recurrence as often as it remembers steps, 100: to 1.1e-16 each.
        let convolved = steps.convolution(&wide, &mut [0.0; 2 * STATES])?;
        add("recurrent, convolutional", &convolved, 1.1e-16 * 200.0);
        let single = |values: &[f32]| values.iter().map(|&x| x.into()).collect::<Vec<f64>>();
        add("recurrent, scan with constant parameters (f32)", &single(&system.scan(&u)?), SINGLE);
        let [sequence, by_transforms, one_by_one] = system.s4d(&u)?;
        add("recurrent, S4D in chunks (f32)", &single(&sequence), SINGLE);
        add("recurrent, S4D by transforms (f32)", &single(&by_transforms), SINGLE);
        add("recurrent, S4D step by step (f32)", &single(&one_by_one), SINGLE);
        if length <= 1024 {
            all.push(cauchy(length, &mut random)?);
        }
    }
    Ok(all)
}

/// S4's kernel, by the Cauchy kernel and by powers of the dense matrix.
fn cauchy(length: usize, random: &mut StdRng) -> Result<Agreement> {
    let order = 64;
    let c: Vec<_> = (0..order / 2)
        .map(|_| Complex64::new(random.random_range(-1.0..1.0), random.random_range(-1.0..1.0)))
        .collect();
    let system = Measure::LegS.low_rank(order)?.with_c(&c)?;
    let delta = 1.0 / length as f64;
    let got = system.discretize(delta, Rule::Bilinear)?.kernel(length);
    let want = system.to_dense().discretize(delta, Rule::Bilinear)?.kernel(length);
    // HiPPO's matrix has a norm of N², each number of which is rounded as often as there are powers, √L by halves.
    let tolerance = 1.1e-16 * (order * order) as f64 * (length as f64).sqrt() * 10.0;
    Ok(Agreement { pair: "kernel of S4, powers of its matrix", length, error: error(&got, &want), tolerance })
}

/// The norm of the difference, of that of what is wanted.
fn error(got: &[f64], want: &[f64]) -> f64 {
    let difference: f64 = got.iter().zip(want).map(|(x, y)| (x - y) * (x - y)).sum();
    (difference / want.iter().map(|x| x * x).sum::<f64>()).sqrt()
}

pub fn table(agreements: &[Agreement]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(["pair", "length", "error", "tolerance"]);
    for Agreement { pair, length, error, tolerance } in agreements {
        table.add_row([pair.to_string(), length.to_string(), format!("{error:.1e}"), format!("{tolerance:.1e}")]);
    }
    table
}
