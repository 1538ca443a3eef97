//! The scan's results and gradients.

use candle_core::{DType, Device, WithDType};
use half::{bf16, f16};
use selective_scan::Element;

use super::{Problem, assert_same, plain, run, values, weighted};
use crate::scan::case::{Case, Flags, Shape};
use crate::support::draw::seeded;
use crate::support::tolerance;

const SHAPE: Shape = Shape { batch: 2, len: 70, d_inner: 6, d_state: 5 };

/// Every pair of flags in one type, held to the reference.
pub fn agrees_with_the_reference<T: Element + WithDType>(device: &Device, shape: Shape, rows: usize) {
    let (mut rng, seed) = seeded();
    for row in 0..rows {
        let case = Case::<T>::new(&mut rng, shape, Flags::pairwise(row));
        let what = || format!("row {row} of the flags, seed {seed}");
        run(&case, device).assert_close(&case.reference(), <T as Element>::DTYPE, &what);
    }
}

#[test]
fn in_every_type_agrees_with_the_reference() {
    agrees_with_the_reference::<f32>(&Device::Cpu, SHAPE, 16);
    agrees_with_the_reference::<f16>(&Device::Cpu, SHAPE, 16);
    agrees_with_the_reference::<bf16>(&Device::Cpu, SHAPE, 16);
}

/// What comes out is what the operators on slices give, and nothing is computed otherwise. (candle adds each gradient to
/// zero, so a negative zero may have become a positive one; they compare equal.)
#[test]
fn has_the_bits_of_the_scan_on_slices() {
    let (mut rng, seed) = seeded();
    for row in 0..16 {
        let case = Case::<f32>::new(&mut rng, SHAPE, Flags::pairwise(row));
        let (ours, slices) = (run(&case, &Device::Cpu), case.run(crate::support::device::Device::best()));
        assert_eq!(ours.0.len(), slices.0.len(), "row {row}, seed {seed}");
        for (ours, slices) in ours.0.iter().zip(&slices.0) {
            assert_eq!(ours.name, slices.name);
            assert!(ours.values == slices.values, "{} of row {row}, seed {seed}", ours.name);
        }
    }
}

/// A loss on the output, on the final state and on both, beside the same scan in candle's own operators.
pub fn agrees_with_plain_operators(device: &Device, shape: Shape, rows: usize) {
    let (mut rng, seed) = seeded();
    for row in 0..rows {
        let flags = Flags { d_final_state: true, ..Flags::pairwise(row) };
        let case = Case::<f32>::new(&mut rng, shape, flags);
        let problem = Problem::new(&case, device, |_| true);
        let d_final_state = problem.d_final_state.as_ref().expect("asked for");
        let (out, final_state) = problem.scan().forward_with_state().expect("the case is valid");
        let (plain_out, plain_state) = plain::scan(&problem.scan()).expect("the case is valid");
        // What the crate promises in f32; the other side is computed in f64.
        for (ours, expected) in [(&out, &plain_out), (&final_state, &plain_state)] {
            let error = tolerance::error(&values(ours), &values(expected));
            assert!(error <= 1e-5, "row {row}, seed {seed}: off by {error:.1e}");
        }
        let double = |tensor: &candle_core::Tensor| tensor.to_dtype(DType::F64).expect("a float");
        let ours = [weighted(&out, &problem.d_out), weighted(&final_state, d_final_state)];
        let expected = [weighted(&plain_out, &double(&problem.d_out)), weighted(&plain_state, &double(d_final_state))];
        for (what, parts) in [("out", &[0][..]), ("final_state", &[1]), ("both", &[0, 1])] {
            let gradients = |losses: &[candle_core::Tensor; 2]| {
                let loss = parts.iter().map(|&i| losses[i].clone()).reduce(|x, y| (x + y).expect("two numbers"));
                problem.gradients(&loss.expect("a part").backward().expect("a loss"))
            };
            let (ours, mut expected) = (gradients(&ours), gradients(&expected));
            // An input that the final state does not depend on has no gradient there, or ours of zero.
            for (name, ours) in &ours {
                expected.entry(name).or_insert_with(|| vec![0.0; ours.len()]);
            }
            assert_same(&ours, &expected, 1e-4, &format!("loss on {what}, row {row}, seed {seed}"));
        }
    }
}

#[test]
fn gradients_agree_with_plain_operators() {
    agrees_with_plain_operators(&Device::Cpu, Shape { batch: 2, len: 9, d_inner: 6, d_state: 5 }, 16);
}

/// `forward` gives the output of `forward_with_state`, and `(batch, length, d_state)` is one group.
#[test]
fn forward_and_one_group() {
    let (mut rng, seed) = seeded();
    let case = Case::<f32>::new(&mut rng, SHAPE, Flags::mamba());
    let problem = Problem::new(&case, &Device::Cpu, |_| true);
    let scan = problem.scan();
    let (out, _) = scan.forward_with_state().expect("the case is valid");
    assert_eq!(values(&scan.forward().expect("the case is valid")), values(&out), "seed {seed}");
    let [b, c] = [scan.b, scan.c].map(|projection| super::track(projection.squeeze(2).expect("one group"), true));
    let flat = selective_scan::candle::Scan { b: &b, c: &c, ..scan };
    let flat_out = flat.forward().expect("the case is valid");
    assert_eq!(values(&flat_out), values(&out), "seed {seed}");
    let gradients = weighted(&flat_out, &problem.d_out).backward().expect("a loss");
    let four = weighted(&out, &problem.d_out).backward().expect("a loss");
    for (three, name) in [(&b, "b"), (&c, "c")] {
        let gradient = gradients.get(three).expect("tracked");
        assert_eq!(gradient.dims(), three.dims());
        assert_eq!(values(gradient), values(four.get(problem.get(name)).expect("tracked")), "{name}, seed {seed}");
    }
}

/// Without steps or without sequences there is nothing to do, and the state stays as it is.
#[test]
fn nothing_to_scan() {
    for (batch, len) in [(2, 0), (0, 3)] {
        let shape = Shape { batch, len, d_inner: 2, d_state: 3 };
        let case = Case::<f32>::new(&mut seeded().0, shape, Flags { initial_state: true, ..Flags::mamba() });
        let problem = Problem::new(&case, &Device::Cpu, |_| true);
        let (out, state) = problem.scan().forward_with_state().expect("the case is valid");
        assert_eq!(out.dims(), [batch, len, 2]);
        assert_eq!(values(&state), values(problem.get("initial_state")));
        let loss = state.sum_all().expect("a tensor");
        let gradients = loss.backward().expect("a loss");
        let gradient = gradients.get(problem.get("initial_state")).expect("tracked");
        assert_eq!(values(gradient), vec![1.0; batch * 6]);
    }
}
