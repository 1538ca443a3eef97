//! HiPPO's systems: their matrices against what their states are by definition, and their normal forms.

use std::f64::consts::PI;

use selective_scan::lti::hippo::{Initial, Measure};
use selective_scan::lti::{Complex64, Continuous, Recurrent, Rule};

use super::{assert_same, norm, reals};
use crate::support::draw::seeded;

const ALL: [Measure; 3] = [Measure::LegS, Measure::LegT, Measure::Fourier];

/// The state's answer to an impulse is `exp(At) B`, which for LegS is `p_n(t) ω(t)` exactly.
#[test]
fn legs_answers_an_impulse_with_its_basis() {
    let order = 12;
    let system = Measure::LegS.system(order).unwrap();
    for t in [0.01, 0.3, 1.0, 4.0] {
        let steps = system.discretize(t, Rule::ZeroOrderHold).unwrap();
        let mut state = system.b().to_vec();
        steps.step(&mut state, 0.0);
        let want: Vec<f64> = Measure::LegS.basis(order, t).iter().map(|p| p * (-t).exp()).collect();
        // The exponential of a matrix of norm 100 t: 2^-53 of that, with room for the triangle's growth.
        assert_same(&state, &want, 1e-11, norm(&want), &format!("t = {t}"));
    }
}

/// The bases are orthonormal: sums over 20,000 midpoints, off by (frequency/20,000)² = 1e-5.
#[test]
fn the_bases_are_orthonormal() {
    let (order, points) = (10, 20_000);
    for measure in ALL {
        let mut products = vec![0.0; order * order];
        for i in 0..points {
            // Of LegS in x = e^-s, dx = -ω ds.
            let x = (i as f64 + 0.5) / f64::from(points);
            let p = measure.basis(order, if measure == Measure::LegS { -x.ln() } else { x });
            for (at, product) in products.iter_mut().enumerate() {
                *product += p[at / order] * p[at % order] / f64::from(points);
            }
        }
        for (at, product) in products.iter().enumerate() {
            let (n, k) = (at / order, at % order);
            // The sine of frequency 0 is no function.
            let want = if n == k && !(measure == Measure::Fourier && n == 1) { 1.0 } else { 0.0 };
            assert!((product - want).abs() < 1e-4, "{measure:?}: {n}, {k}: {product}");
        }
    }
}

/// `V (Λ - P P*) V*` is the matrix: the two systems carry the same states.
#[test]
fn the_normal_form_is_the_same_system() {
    let (mut rng, seed) = seeded();
    for measure in ALL {
        for order in [2, 8, 64] {
            let dense = measure.system(order).unwrap();
            let low_rank = measure.low_rank(order).unwrap();
            let (mut state, mut small) = (vec![0.0; order], vec![0.0; order]);
            let (mut slope, mut small_slope) = (state.clone(), state.clone());
            // A state that both have: what a few inputs leave.
            let u = reals(&mut rng, 20);
            let delta = 0.1 / order as f64;
            dense.discretize(delta, Rule::Bilinear).unwrap().sequence(&u, &mut state).unwrap();
            low_rank.discretize(delta, Rule::Bilinear).unwrap().sequence(&u, &mut small).unwrap();
            let back = measure.state_of_low_rank(order, &small).unwrap();
            // Eigenvectors are good to 2^-53 of the norm, order², over the smallest gap, 1 and more; 64² of these are
            // 1e-12.
            let what = format!("{measure:?}, order {order}, SEED={seed}");
            assert_same(&back, &state, 1e-10, norm(&u), &what);
            dense.derivative(&state, 0.7, &mut slope);
            low_rank.derivative(&small, 0.7, &mut small_slope);
            let back = measure.state_of_low_rank(order, &small_slope).unwrap();
            let size = norm(&dense.a()) * norm(&state).max(1e-3) + norm(dense.b());
            assert_same(&back, &slope, 1e-10, size, &format!("{what}: the slope"));
            let expected = if measure == Measure::LegS { -0.5 } else { 0.0 };
            assert!(low_rank.diagonal().a().iter().all(|a| a.re == expected && a.im >= 0.0), "{what}: eigenvalues");
        }
    }
}

/// The past of a smooth signal from the state alone: with more states it is known better, and with 64 well.
#[test]
fn the_past_is_in_the_state() {
    let (mut rng, seed) = seeded();
    let phases = reals(&mut rng, 3);
    let signal = |t: f64| (1..=3).map(|k| (2.0 * PI * k as f64 * t + PI * phases[k - 1]).sin()).sum::<f64>();
    let (delta, count) = (2.5e-4, 12_000);
    // The middle of each step, for the mean over it.
    let u: Vec<f64> = (0..count).map(|k| signal((k as f64 + 0.5) * delta)).collect();
    let now = count as f64 * delta;
    let ago: Vec<f64> = (0..80).map(|i| 0.1 + 0.01 * f64::from(i)).collect();
    let past: Vec<f64> = ago.iter().map(|s| signal(now - s)).collect();
    // Three turns in a window want some 20 polynomials before the error falls at all; the Fourier series is off by the
    // jump between the window's ends, which falls with the number of waves.
    for (measure, orders, bound) in
        [(Measure::LegT, [8, 16, 32], 2e-2), (Measure::Fourier, [8, 16, 64], 0.2), (Measure::LegS, [8, 32, 96], 0.1)]
    {
        let errors = orders.map(|order| {
            let mut state = vec![0.0; order];
            let steps = measure.system(order).unwrap().discretize(delta, Rule::Bilinear).unwrap();
            steps.sequence(&u, &mut state).unwrap();
            let got = measure.reconstruct(&state, &ago);
            let difference: Vec<f64> = got.iter().zip(&past).map(|(x, y)| x - y).collect();
            norm(&difference) / norm(&past)
        });
        println!("{measure:?}: {errors:?}");
        assert!(errors[0] > errors[1] && errors[1] > errors[2], "{measure:?}: {errors:?}, SEED={seed}");
        assert!(errors[2] < bound, "{measure:?}: {errors:?}, SEED={seed}");
    }
}

#[test]
fn initial_eigenvalues_are_those_of_the_paper() {
    let of = |initial: Initial, pairs| initial.eigenvalues(pairs).unwrap();
    assert_eq!(of(Initial::Real, 3).iter().map(|a| a.re).collect::<Vec<_>>(), [-1.0, -2.0, -3.0]);
    assert_eq!(of(Initial::Lin, 4)[3], Complex64::new(-0.5, 3.0 * PI));
    // N = 8 states in 4 pairs: 8/π (8/1 - 1).
    assert!((of(Initial::Inv, 4)[0] - Complex64::new(-0.5, 56.0 / PI)).norm() < 1e-12);
    // For many states the largest eigenvalues of LegS come to those of Inv (the paper's conjecture, to 5 % with 64
    // pairs).
    let (legs, inv) = (of(Initial::LegS, 64), of(Initial::Inv, 64));
    for k in 0..3 {
        let ratio = legs[63 - k].im / inv[k].im;
        assert!((ratio - 1.0).abs() < 0.05, "eigenvalue {k}: ratio {ratio}");
    }
    let refused = |result: Result<(), selective_scan::Error>| result.unwrap_err().to_string();
    assert_eq!(refused(Initial::Lin.eigenvalues(0).map(drop)), "`pairs`: expected from 1 to 256, got 0");
    assert_eq!(
        refused(Measure::LegS.low_rank(7).map(drop)),
        "`order`: expected an even number of states from 1 to 512, got 7"
    );
    assert_eq!(refused(Measure::LegT.system(0).map(drop)), "`order`: expected a number of states from 1 to 512, got 0");
}
