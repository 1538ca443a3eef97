//! The views of one system agree.
//!
//! Errors are held to `2^-53 · (what rounds) · ‖K‖₁ ‖u‖`, which bounds the norm of what a convolution with `K` can
//! give.

use selective_scan::lti::hippo::Measure;
use selective_scan::lti::{Complex64, Diagonal, Recurrent, Rule, Spectrum, s4d};
use selective_scan::{Discretization, View, scan};

use super::{assert_same, dense, diagonal, low_rank, norm, numbers, reals};
use crate::support::draw::seeded;

const ROUNDING: f64 = 1.2e-16;

/// Recurrent, convolutional, and convolutional in two parts, from a state to a state.
fn views_agree(steps: &impl Recurrent, u: &[f64], state: &[f64], tolerance: f64, what: &str) {
    let sum = steps.kernel(u.len()).iter().map(|k| k.abs()).sum::<f64>();
    let scale = (sum + steps.feed_through().abs()) * norm(u) + norm(&steps.state_response(state, u.len()));
    let (mut recurrent, mut convolved) = (state.to_vec(), state.to_vec());
    let want = steps.sequence(u, &mut recurrent).unwrap();
    let got = steps.convolution(u, &mut convolved).unwrap();
    assert_same(&got, &want, tolerance, scale, what);
    // A state that is not read by C is still as large as what comes in.
    let state_scale = norm(&recurrent).max(norm(u));
    assert_same(&convolved, &recurrent, tolerance, state_scale, &format!("{what}: the state"));
    let at = u.len() / 3;
    let mut carried = state.to_vec();
    let mut parts = steps.convolution(&u[..at], &mut carried).unwrap();
    parts.extend(steps.convolution(&u[at..], &mut carried).unwrap());
    assert_same(&parts, &want, tolerance, scale, &format!("{what}: in two parts"));
    assert_same(&carried, &recurrent, tolerance, state_scale, &format!("{what}: the state of two parts"));
}

/// The recurrence rounds each step, and remembers 1/(0.2 Δ) of them, whose roundings add up like a walk's; a transform
/// of 2L loses its logarithm. With Δ = 0.05 that is √100 and 11 roundings, each with a few operations: 100 in all.
/// Powers of a dense matrix lose as many roundings as it has columns, each time that they are squared.
#[test]
fn recurrent_is_convolutional() {
    let (mut rng, seed) = seeded();
    for len in [1, 2, 63, 64, 65, 1000] {
        let u = reals(&mut rng, len);
        let state: Vec<f64> = numbers(&mut rng, 6).iter().flat_map(|x| [x.re, x.im]).collect();
        let what = |form: &str| format!("{form}, {len} steps, SEED={seed}");
        for rule in [Rule::ZeroOrderHold, Rule::Bilinear] {
            let steps = diagonal(&mut rng, 6, 20.0).discretize(0.05, rule).unwrap();
            views_agree(&steps, &u, &state, 100.0 * ROUNDING * 10.0, &what("diagonal"));
            let steps = dense(&mut rng, 12, 5.0).discretize(0.05, rule).unwrap();
            views_agree(&steps, &u, &state, 100.0 * ROUNDING * 100.0, &what("dense"));
        }
        for rank in [1, 2] {
            let steps = low_rank(&mut rng, 6, rank, 20.0).discretize(0.05, Rule::Bilinear).unwrap();
            views_agree(&steps, &u, &state, 100.0 * ROUNDING * 100.0, &what("low rank"));
        }
    }
}

/// The kernel of S4 by the Cauchy kernel and by powers of the dense matrix. Both are sums over the states, of terms as
/// large as `‖C‖ ‖B̄‖`; the transform has a logarithm of roundings, and `(2/Δ - A)⁻¹` the condition of HiPPO's matrix,
/// of norm N².
#[test]
fn the_cauchy_kernel_is_that_of_powers() {
    let (mut rng, seed) = seeded();
    for measure in [Measure::LegS, Measure::LegT, Measure::Fourier] {
        for (order, len) in [(2, 1), (8, 31), (32, 256), (64, 1024), (64, 1000)] {
            let c = numbers(&mut rng, order / 2);
            let system = measure.low_rank(order).unwrap().with_c(&c).unwrap();
            let delta = 1.0 / len as f64;
            let got = system.discretize(delta, Rule::Bilinear).unwrap().kernel(len);
            let want = system.to_dense().discretize(delta, Rule::Bilinear).unwrap().kernel(len);
            let scale = norm(&want).max(norm(system.to_dense().c()) * delta);
            let tolerance = 100.0 * ROUNDING * (order * order) as f64 * (len as f64).sqrt();
            assert_same(&got, &want, tolerance, scale, &format!("{measure:?}, {order}, {len}, SEED={seed}"));
        }
    }
}

/// Long sequences: 65,536 steps, and 1,048,576 of one. The slowest state forgets 0.2 Δ of itself at a step, so that as
/// many roundings as before are remembered; what grows is the angle, of which nothing may be lost.
#[test]
fn long_sequences_agree() {
    let (mut rng, seed) = seeded();
    for (len, pairs) in [(65_536, 4), (1 << 20, 1)] {
        let u = reals(&mut rng, len);
        let state = vec![0.5; 2 * pairs];
        for delta in [0.05, 1e-5] {
            let steps = diagonal(&mut rng, pairs, 300.0).discretize(delta, Rule::ZeroOrderHold).unwrap();
            // 1/(0.2 Δ) steps are remembered, of at most `len`: each state and each angle is rounded as often.
            let remembered = (5.0 / delta).min(len as f64);
            let tolerance = ROUNDING * (100.0 + 4.0 * remembered);
            views_agree(&steps, &u, &state, tolerance, &format!("{len} steps of {delta}, SEED={seed}"));
        }
    }
}

/// The selective scan with the same step size, B and C at every step is S4D with real eigenvalues, and S4D's pairs are
/// those of a system in `f64`: all within the 1e-5 that the crate promises of `f32`, so within twice that of each
/// other.
#[test]
fn the_scan_with_constant_parameters_is_s4d() {
    let (mut rng, seed) = seeded();
    for length in [1, 500, 65_536] {
        let (states, delta) = (6, 0.02f32);
        let mut numbers = |count: usize| reals(&mut rng, count).iter().map(|&x| x as f32).collect::<Vec<f32>>();
        let (u, b, c) = (numbers(length), numbers(states), numbers(states));
        let a: Vec<f32> = (0..states).map(|n| -0.3 * (n + 1) as f32).collect();
        let log_delta = [delta.ln()];
        // Its exponential, for the scan reads the step size itself.
        let delta = [log_delta[0].exp()];
        let (shape, of_state) = ([1, length, 1], |x| View::new(x, [1, states]));
        let options = scan::Options { discretization: Discretization::ZeroOrderHold, ..scan::Options::default() };
        let scanned = scan::Inputs {
            options,
            ..scan::Inputs::new(
                View::new(&u, shape),
                View::new(&delta, shape).with_layout(0, [0, 0, 0]),
                of_state(&a),
                of_state(&b),
                of_state(&c),
            )
        };
        let pairs = |x: &[f32], weight: f32| x.iter().flat_map(|x| [weight * x, 0.0]).collect::<Vec<f32>>();
        let [a, b, c] = [pairs(&a, 1.0), pairs(&b, 1.0), pairs(&c, 0.5)];
        let complex = |x| View::new(x, [1, 2 * states]);
        let s4d =
            s4d::Inputs::new(View::new(&u, shape), View::new(&log_delta, [1]), complex(&a), complex(&b), complex(&c));
        let wide = |values: Vec<f32>| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        let (one, other) = (wide(s4d.forward().unwrap().out), wide(scanned.forward().unwrap().out));
        // A single output may be of terms that cancel: |B| |C| Δ |u| of 6 states.
        let scale = norm(&one).max(0.1 * norm(&wide(u.clone())) * f64::from(delta[0]));
        assert_same(&other, &one, 2e-5, scale, &format!("{length} steps, SEED={seed}"));
        let numbers =
            |x: &[f32]| x.as_chunks().0.iter().map(|&[re, _]| Complex64::from(f64::from(re))).collect::<Vec<_>>();
        let system = Diagonal::new(&numbers(&a), &numbers(&b), &numbers(&c), 0.0, Spectrum::Pairs).unwrap();
        let steps = system.discretize(f64::from(log_delta[0]).exp(), Rule::ZeroOrderHold).unwrap();
        let exact = steps.sequence(&wide(u), &mut vec![0.0; 2 * states]).unwrap();
        assert_same(&one, &exact, 1e-5, scale, &format!("{length} steps, S4D, SEED={seed}"));
    }
}
