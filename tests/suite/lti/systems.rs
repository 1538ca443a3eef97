//! What is known of a system beforehand: its discretizations in closed form, their orders, and what is refused.

use selective_scan::Error;
use selective_scan::lti::{Complex64, Continuous, Dense, Diagonal, LowRank, Recurrent, Rule, Spectrum};

use super::{assert_same, dense, diagonal, low_rank, norm, numbers, reals};
use crate::support::draw::seeded;

/// A mass without friction: `x'' = u`. Its matrix is singular, and its hold is known: position Δ²/2, speed Δ.
#[test]
fn a_singular_matrix_is_held_exactly() {
    let system = Dense::new(&[0.0, 1.0, 0.0, 0.0], &[0.0, 1.0], &[1.0, 0.0], 0.0).unwrap();
    for delta in [1e-3, 0.5, 7.0] {
        let steps = system.discretize(delta, Rule::ZeroOrderHold).unwrap();
        // exp's own arithmetic: a few roundings of 2^-53.
        assert_same(&steps.a(), &[1.0, delta, 0.0, 1.0], 1e-14, 1.0 + delta, "exp");
        assert_same(steps.b(), &[delta * delta / 2.0, delta], 1e-14, delta * (1.0 + delta), "the input");
    }
    // And so does a diagonal system with the eigenvalue 0, whose hold is Δ B, or Δ (1 + ΔA/2) where ΔA is small.
    let b = [Complex64::new(2.0, 1.0); 2];
    let a = [Complex64::ZERO, Complex64::new(-3e-9, 2e-9)];
    let steps = Diagonal::new(&a, &b, &b, 0.0, Spectrum::Pairs).unwrap().discretize(0.25, Rule::ZeroOrderHold).unwrap();
    assert_eq!(steps.b()[0], b[0] * 0.25);
    let want = b[1] * 0.25 * (1.0 + a[1] * 0.125);
    // The next term is 1e-19. `exp(ΔA) - 1` by a subtraction would be off by 1e-16/1e-9.
    assert!((steps.b()[1] - want).norm() <= 1e-15 * want.norm(), "{} instead of {want}", steps.b()[1]);
}

/// All rules, of a diagonal and of a low-rank system and of the same as dense ones.
#[test]
fn forms_of_one_system_have_one_recurrence() {
    let (mut rng, seed) = seeded();
    for rule in [Rule::ZeroOrderHold, Rule::Bilinear, Rule::Euler] {
        let system = diagonal(&mut rng, 5, 10.0);
        let u = reals(&mut rng, 40);
        let mut states = [numbers(&mut rng, 5).iter().flat_map(|x| [x.re, x.im]).collect::<Vec<f64>>(), Vec::new()];
        states[1] = states[0].clone();
        // A step turns by up to one radian; an exponential or inverse of the matrix, of norm 10, loses 1e-15 of it,
        // over the 1/(0.2·0.1) = 50 steps that it remembers.
        let one = system.discretize(0.1, rule).unwrap().sequence(&u, &mut states[0]).unwrap();
        let other = system.to_dense().discretize(0.1, rule).unwrap().sequence(&u, &mut states[1]).unwrap();
        // Euler's rule grows where a step turns by much: by 2^0.5 a step at most, 1e6 over the 40.
        let scale = norm(&one).max(norm(&states[0])).max(norm(&u));
        assert_same(&one, &other, 1e-12, scale, &format!("{rule:?}, SEED={seed}"));
        assert_same(&states[0], &states[1], 1e-12, scale, &format!("{rule:?}, state, SEED={seed}"));
    }
    for rank in 0..=3 {
        let system = low_rank(&mut rng, 6, rank, 30.0);
        let u = reals(&mut rng, 50);
        let (mut state, mut dense_state) = (vec![0.0; 12], vec![0.0; 12]);
        let one = system.discretize(0.05, Rule::Bilinear).unwrap().sequence(&u, &mut state).unwrap();
        let steps = system.to_dense().discretize(0.05, Rule::Bilinear).unwrap();
        let other = steps.sequence(&u, &mut dense_state).unwrap();
        // As above, with 1/(0.2·0.05) = 100 steps; outputs are sums of 12 terms of about the input's size.
        assert_same(&one, &other, 1e-12, norm(&u), &format!("rank {rank}, SEED={seed}"));
        assert_same(&state, &dense_state, 1e-12, norm(&u), &format!("rank {rank}, state, SEED={seed}"));
    }
}

/// With an input that changes within a step, the bilinear rule's error falls with the square of the step, Euler's with
/// the step. The measured order is the logarithm of the ratio of the errors at a step and at half of it.
#[test]
fn the_rules_have_their_orders() {
    let system = Diagonal::new(
        &[Complex64::new(-0.5, 3.0), Complex64::new(-0.3, 1.0)],
        &[Complex64::new(1.0, 0.5); 2],
        &[Complex64::new(0.7, -0.2), Complex64::new(0.4, 0.9)],
        0.0,
        Spectrum::Pairs,
    )
    .unwrap();
    let input = |t: f64| (2.0 * t).sin() + 0.3 * t;
    let mut exact = vec![0.0; 4];
    // Runge and Kutta's error: (3/4096)^4 = 3e-13.
    system.integrate(input, 0.0..1.0, 4096, &mut exact).unwrap();
    let error = |rule: Rule, count: usize| {
        let delta = 1.0 / count as f64;
        let steps = system.discretize(delta, rule).unwrap();
        // The bilinear rule takes the mean of the input at both ends of a step, Euler's the one at its start.
        let u: Vec<f64> = (0..count)
            .map(|k| (input(k as f64 * delta), input((k + 1) as f64 * delta)))
            .map(|(start, end)| if rule == Rule::Euler { start } else { 0.5 * (start + end) })
            .collect();
        let mut state = vec![0.0; 4];
        steps.sequence(&u, &mut state).unwrap();
        let difference: Vec<f64> = state.iter().zip(&exact).map(|(x, y)| x - y).collect();
        norm(&difference)
    };
    for (rule, order) in [(Rule::Bilinear, 2.0), (Rule::Euler, 1.0)] {
        for count in [64, 128, 256] {
            let measured = (error(rule, count) / error(rule, 2 * count)).log2();
            // The next term of the error is smaller by |λ|Δ = 3/64, of which the quotient keeps half.
            assert!((measured - order).abs() <= 0.05, "{rule:?} with {count} steps: order {measured}");
        }
    }
}

/// With zero-order hold an input that is held over the steps gives what fine integration gives, however large the
/// steps.
#[test]
fn a_held_input_is_exact() {
    let (mut rng, seed) = seeded();
    for delta in [0.02, 0.7, 3.0] {
        let u = reals(&mut rng, 30);
        // |λ| is at most 6.1, so that |λ|h is at most 1/20 in the fine steps, and the slowest decay is 0.2.
        let fine = (delta * 6.1 * 20.0_f64).ceil() as usize;
        let mut state = vec![0.3; 8];
        let mut other = state.clone();
        let system = diagonal(&mut rng, 4, 6.0);
        let continuous = system.integrate_held(&u, delta, fine, &mut state).unwrap();
        let recurrent = system.discretize(delta, Rule::ZeroOrderHold).unwrap().sequence(&u, &mut other).unwrap();
        // A fine step of fourth order is off by (|λ|h)^5/120 of the state, 2.6e-9, and 1/(0.2 h) of them are
        // remembered: with h = 0.05/6.1 that is 610, hence 1.6e-6 of a state that is itself 1/0.2 of the input at most.
        let scale = norm(&u) / 0.2;
        assert_same(&recurrent, &continuous, 1.6e-6, scale, &format!("delta {delta}, SEED={seed}"));
        assert_same(&other, &state, 1.6e-6, scale, &format!("delta {delta}, state, SEED={seed}"));
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let (mut rng, _) = seeded();
    let refused = |result: Result<(), Error>, text: &str| {
        assert_eq!(result.unwrap_err().to_string(), text);
    };
    let one = [Complex64::ONE];
    refused(Dense::new(&[], &[], &[], 0.0).map(drop), "`b`: expected at least one state, got none");
    refused(
        Dense::new(&[1.0; 3], &[1.0; 2], &[1.0; 2], 0.0).map(drop),
        "`a`: expected 2 x 2 numbers, as `b` has 2, got 3",
    );
    refused(
        Dense::new(&[1.0; 4], &[1.0; 2], &[1.0; 3], 0.0).map(drop),
        "`c`: expected 2 numbers, one for each state, got 3",
    );
    refused(
        Diagonal::new(&one, &[], &one, 0.0, Spectrum::Pairs).map(drop),
        "`b`: expected 1 numbers, one for each state, got 0",
    );
    refused(
        Diagonal::new(&[Complex64::I], &one, &one, 0.0, Spectrum::Real).map(drop),
        "`a`: expected real eigenvalues, as the spectrum says, got 0+1i",
    );
    let system = dense(&mut rng, 3, 1.0);
    for delta in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let text = format!("`delta`: expected a positive and finite step, got {delta}");
        refused(system.discretize(delta, Rule::ZeroOrderHold).map(drop), &text);
    }
    let growing = Dense::new(&[4.0], &[1.0], &[1.0], 0.0).unwrap();
    refused(
        growing.discretize(0.5, Rule::Bilinear).map(drop),
        "`delta`: expected no eigenvalue of the system to be 2/delta, for delta = 0.5, got one that is",
    );
    let system = low_rank(&mut rng, 2, 1, 1.0);
    refused(
        system.discretize(0.1, Rule::Euler).map(drop),
        "`rule`: expected Bilinear (for a matrix with low rank; `to_dense` takes all), got Euler",
    );
    refused(
        LowRank::new(system.diagonal().clone(), &[vec![Complex64::ONE; 2]], &[]).map(drop),
        "`q`: expected 1 vectors, as `p` has, got 0",
    );
    refused(
        LowRank::new(system.diagonal().clone(), &vec![vec![Complex64::ONE; 2]; 5], &[]).map(drop),
        "`p`: expected 4 vectors at most, got 5",
    );
    let steps = system.discretize(0.1, Rule::Bilinear).unwrap();
    refused(steps.sequence(&[1.0], &mut [0.0; 3]).map(drop), "`state`: expected 4 numbers, one for each state, got 3");
    refused(
        steps.convolution(&[1.0], &mut [0.0; 5]).map(drop),
        "`state`: expected 4 numbers, one for each state, got 5",
    );
    refused(
        system.integrate_held(&[1.0], 0.1, 0, &mut [0.0; 4]).map(drop),
        "`fine`: expected at least one step, got 0",
    );
}
