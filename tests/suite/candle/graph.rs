//! How the scan stands in candle's graph: what it tracks, several of them, backward again and from several threads.

use std::collections::BTreeMap;
use std::sync::{Arc, Barrier};

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Tensor};
use selective_scan::candle::Scan;

use super::{INPUTS, Problem, assert_same, plain, values, weighted};
use crate::scan::case::{Case, Flags, Shape};
use crate::support::draw::seeded;
use crate::support::memory;

const SHAPE: Shape = Shape { batch: 1, len: 3, d_inner: 2, d_state: 3 };

fn everything() -> Flags {
    Flags { initial_state: true, d_final_state: true, ..Flags::mamba() }
}

/// Exactly the inputs that are tracked get gradients, the same ones whatever else is tracked.
pub fn partly_tracked(device: &Device, subsets: impl Iterator<Item = usize>) {
    let (mut rng, seed) = seeded();
    let case = Case::<f32>::new(&mut rng, SHAPE, everything());
    let gradients = |subset: usize| {
        let is_tracked =
            |name: &str| subset >> INPUTS.iter().position(|input| *input == name).expect("an input") & 1 == 1;
        let problem = Problem::new(&case, device, is_tracked);
        let (out, final_state) = problem.scan().forward_with_state().expect("the case is valid");
        assert_eq!((out.track_op(), final_state.track_op()), (subset != 0, subset != 0), "subset {subset:b}");
        let store = problem.loss(&out, &final_state).backward().expect("a loss");
        let gradients = problem.gradients(&store);
        let tracked: BTreeMap<_, _> = INPUTS.iter().filter(|name| is_tracked(name)).map(|name| (name, ())).collect();
        assert!(gradients.keys().eq(tracked.keys().copied()), "subset {subset:b}: {:?}", gradients.keys());
        gradients
    };
    let all = gradients((1 << INPUTS.len()) - 1);
    for subset in subsets {
        for (name, gradient) in gradients(subset) {
            assert_eq!(gradient, all[name], "{name} in subset {subset:b}, seed {seed}");
        }
    }
}

#[test]
fn every_subset_of_inputs_may_be_tracked() {
    partly_tracked(&Device::Cpu, 0..1 << INPUTS.len());
}

/// One scan feeds another, both share inputs, and one input is given twice to the same scan.
pub fn two_in_one_graph(device: &Device) {
    let (mut rng, seed) = seeded();
    let shape = Shape { batch: 2, len: 7, d_inner: 4, d_state: 3 };
    let case = Case::<f32>::new(&mut rng, shape, everything());
    let problem = Problem::new(&case, device, |_| true);
    let first = problem.scan();
    let loss = |scan: &dyn Fn(&Scan) -> (Tensor, Tensor)| {
        let (out, state) = scan(&first);
        let (out, state) =
            (out.to_dtype(candle_core::DType::F32).unwrap(), state.to_dtype(candle_core::DType::F32).unwrap());
        let second = Scan { u: &out, z: Some(first.u), initial_state: Some(&state), ..first };
        let (out, state) = scan(&second);
        let out = weighted(&out, &problem.d_out.to_dtype(out.dtype()).unwrap());
        (out + weighted(&state, &state.ones_like().unwrap())).expect("two numbers")
    };
    let ours = loss(&|scan| scan.forward_with_state().expect("the case is valid"));
    let expected = loss(&|scan| plain::scan(scan).expect("the case is valid"));
    let gradients = |loss: Tensor| problem.gradients(&loss.backward().expect("a loss"));
    assert_same(&gradients(ours), &gradients(expected), 1e-4, &format!("seed {seed}"));
}

#[test]
fn scans_share_inputs_and_feed_each_other() {
    two_in_one_graph(&Device::Cpu);
}

/// The same graph walked again gives the same, and what a walk leaves does not reach the next.
pub fn repeated(device: &Device) {
    let (mut rng, seed) = seeded();
    let case = Case::<f32>::new(&mut rng, SHAPE, everything());
    let problem = Problem::new(&case, device, |_| true);
    let (out, final_state) = problem.scan().forward_with_state().expect("the case is valid");
    let losses = [
        weighted(&out, &problem.d_out),
        weighted(&final_state, problem.d_final_state.as_ref().expect("asked for")),
        problem.loss(&out, &final_state),
    ];
    let gradients = |loss: &Tensor| problem.gradients(&loss.backward().expect("a loss"));
    let first: Vec<_> = losses.iter().map(gradients).collect();
    assert_ne!(first[0], first[2], "the final state counts, seed {seed}");
    for i in [2, 0, 1, 1, 2, 0, 0] {
        assert_eq!(gradients(&losses[i]), first[i], "loss {i}, seed {seed}");
    }
}

#[test]
fn backward_again_gives_the_same() {
    repeated(&Device::Cpu);
}

/// Waits in the backward pass until as many threads as the barrier is for have come there.
struct Meet(Arc<Barrier>);

impl CustomOp1 for Meet {
    fn name(&self) -> &'static str {
        "meet"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, candle_core::Shape)> {
        Ok((storage.clone(), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        self.0.wait();
        Ok(Some(gradient.clone()))
    }
}

/// Threads walk one graph, and meet where one of them has left the gradient of the final state and neither has taken it.
#[test]
fn threads_may_walk_one_graph() {
    let (mut rng, seed) = seeded();
    let case = Case::<f32>::new(&mut rng, Shape { len: 40, ..SHAPE }, everything());
    let problem = Problem::new(&case, &Device::Cpu, |_| true);
    let (out, final_state) = problem.scan().forward_with_state().expect("the case is valid");
    let gradients = |loss: &Tensor| problem.gradients(&loss.backward().expect("a loss"));
    let alone = [weighted(&out, &problem.d_out), problem.loss(&out, &final_state)].map(|loss| gradients(&loss));
    let met = out.apply_op1(Meet(Arc::new(Barrier::new(2)))).expect("a copy");
    let losses = [weighted(&met, &problem.d_out), problem.loss(&met, &final_state)];
    std::thread::scope(|scope| {
        for i in [0, 1] {
            let (gradients, losses, alone) = (&gradients, &losses, &alone);
            scope.spawn(move || {
                let all: Vec<_> = (0..100).map(|_| gradients(&losses[i])).collect();
                assert!(all.iter().all(|gradients| *gradients == alone[i]), "loss {i}, seed {seed}");
            });
        }
    });
}

/// Gradients of gradients are refused, for ours are computed outside of candle's graph. candle asks for them by a variable
/// that it reads once in each thread, so this needs a process of its own.
#[test]
fn not_differentiable_twice() {
    let program = std::env::current_exe().expect("this program");
    let child = std::process::Command::new(program)
        .args(["--exact", "candle::graph::differentiate_twice", "--ignored"])
        .env("CANDLE_GRAD_DO_NOT_DETACH", "1")
        .output()
        .expect("this program runs");
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
}

#[test]
#[ignore = "run by not_differentiable_twice, with a variable that changes candle"]
fn differentiate_twice() {
    let case = Case::<f32>::new(&mut seeded().0, SHAPE, Flags::mamba());
    let problem = Problem::new(&case, &Device::Cpu, |_| true);
    let out = problem.scan().forward().expect("the case is valid");
    // The gradient of a square depends on the output.
    let loss = out.sqr().and_then(|squares| squares.sum_all()).expect("a tensor");
    let error = loss.backward().expect_err("the gradient at the output is tracked").to_string();
    assert!(error.contains("selective-scan: cannot be differentiated twice"), "{error}");
}

/// Results of untracked inputs hold nothing, and results of tracked ones are not changed by what is kept.
#[test]
fn tracking_changes_no_value() {
    let (mut rng, seed) = seeded();
    for row in 0..16 {
        let case = Case::<f32>::new(&mut rng, Shape { len: 130, ..SHAPE }, Flags::pairwise(row));
        let run = |tracked: bool| Problem::new(&case, &Device::Cpu, |_| tracked).scan().forward_with_state();
        let ((out, state), (tracked_out, tracked_state)) = (run(false).expect("valid"), run(true).expect("valid"));
        assert!(!out.track_op() && !state.track_op() && tracked_out.track_op() && tracked_state.track_op());
        assert_eq!(values(&out), values(&tracked_out), "row {row}, seed {seed}");
        assert_eq!(values(&state), values(&tracked_state), "row {row}, seed {seed}");
    }
}

/// Without gradients nothing is kept but the results; with them, one state of each channel for as many steps as the options say,
/// and after a backward pass no more than before.
#[test]
fn what_is_kept() {
    let shape = Shape { batch: 2, len: 640, d_inner: 32, d_state: 16 };
    let case = Case::<f32>::new(&mut seeded().0, shape, everything());
    let (results, checkpoints) =
        (4 * (2 * 640 * 32 + 2 * 32 * 16), 4 * 2 * 640 / case.checkpoint_steps.get() * 32 * 16);
    let nodes = 8 << 10;
    let check = || {
        for (tracked, kept) in [(false, results), (true, results + checkpoints)] {
            let problem = Problem::new(&case, &Device::Cpu, |name| tracked && name == "u");
            let run = || problem.scan().forward_with_state().expect("the case is valid");
            drop(run());
            let (held, (out, final_state)) = memory::held_by(run);
            assert!((kept..kept + nodes).contains(&held), "{held} bytes, of {kept}; tracked: {tracked}");
            let loss = problem.loss(&out, &final_state);
            let (held, ()) = memory::held_by(|| drop(loss.backward().expect("a loss")));
            assert!(held < nodes, "{held} bytes left by a backward pass");
        }
    };
    // On one thread, so that the same frees what allocates.
    rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread").install(check);
}
