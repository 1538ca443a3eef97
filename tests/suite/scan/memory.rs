//! Memory that a forward and a backward pass take beside their inputs, outputs and gradients.

use selective_scan::scan::{CheckpointSteps, Gradients, OutputMut, cpu};

use super::case::{Case, Flags, Shape};
use crate::support::draw::seeded;
use crate::support::memory::{count_this_thread, peak_of_counted_threads};

#[test]
fn peak_of_a_long_sequence() {
    let shape = Shape { batch: 1, len: 16_384, d_inner: 1536, d_state: 16 };
    let checkpoint_steps = CheckpointSteps::Every64;
    let case = Case::<f32> { checkpoint_steps, ..Case::new(&mut seeded().0, shape, Flags::mamba()) };
    let inputs = case.inputs();
    let mut out = vec![0.0f32; 16_384 * 1536];
    let mut state = vec![0.0; 1536 * 16];
    let mut gradients = Gradients::zeroed(&inputs).expect("valid");
    // u, delta, z and their gradients, out and its gradient; B, C and theirs; what is left is small.
    let given = 4 * (8 * 16_384 * 1536 + 4 * 16_384 * 16);

    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).start_handler(|_| count_this_thread());
    let pool = pool.build().expect("a pool of threads");
    pool.install(|| {
        let mut checkpoints = vec![0.0; inputs.checkpoint_len().expect("valid")];
        let to =
            OutputMut { out: &mut out[..], final_state: Some(&mut state[..]), checkpoints: Some(&mut checkpoints[..]) };
        cpu::forward(&inputs, to).expect("valid");
        cpu::backward(&inputs, &checkpoints, case.d_outputs(), gradients.as_mut()).expect("valid");
    });
    let extra = peak_of_counted_threads() as f64 / given as f64;
    println!("{extra:.3} of the bytes of inputs, outputs and gradients");
    // The checkpoints are 1/64 · 16 states for 8 values of each step and channel, 3 %; the partial sums of B and C as
    // much; the buffers of a tile next to nothing. The requirement is 1.5.
    assert!(extra < 0.1, "{extra:.3} of the bytes of inputs, outputs and gradients");
}
