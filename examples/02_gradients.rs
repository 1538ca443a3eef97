//! The scan backward, on slices: what is kept between the passes, and how exact the gradients are.
//!
//! `cargo run --release --example 02_gradients`

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selective_scan::scan::{self, OutputGradients};
use selective_scan::{Result, View};

fn main() -> Result<()> {
    let (batch, length, d_inner, d_state) = (2, 512, 64, 16);
    let mut random = StdRng::seed_from_u64(1);
    let mut draw = |count: usize, low: f32, high: f32| -> Vec<f32> {
        (0..count).map(|_| random.random_range(low..high)).collect()
    };

    // What a Mamba block gives its scan: input, step sizes before softplus, gate, B, C, and the parameters A, D and bias.
    let activations = batch * length * d_inner;
    let (u, z) = (draw(activations, -1.0, 1.0), draw(activations, -1.0, 1.0));
    let delta = draw(activations, -5.0, 0.0);
    let (b, c) = (draw(batch * length * d_state, -1.0, 1.0), draw(batch * length * d_state, -1.0, 1.0));
    let a: Vec<f32> = (0..d_inner * d_state).map(|i| -((i % d_state + 1) as f32)).collect();
    let (d, delta_bias) = (vec![1.0; d_inner], draw(d_inner, -0.1, 0.1));
    let initial_state = draw(batch * d_inner * d_state, -1.0, 1.0);

    let (activation, projection) = ([batch, length, d_inner], [batch, length, 1, d_state]);
    let states = [batch, d_inner, d_state];
    let inputs = scan::Inputs {
        z: Some(View::new(&z, activation)),
        d: Some(View::new(&d, [d_inner])),
        delta_bias: Some(View::new(&delta_bias, [d_inner])),
        initial_state: Some(View::new(&initial_state, states)),
        options: scan::Options { delta_softplus: true, ..Default::default() },
        ..scan::Inputs::new(
            View::new(&u, activation),
            View::new(&delta, activation),
            View::new(&a, [d_inner, d_state]),
            View::new(&b, projection),
            View::new(&c, projection),
        )
    };

    // Forward keeps the states of one step in 64, and backward computes those between again. All of them would be
    // batch x length x d_inner x d_state numbers: more than everything else together.
    let (output, checkpoints) = inputs.forward_with_checkpoints()?;
    let (kept, all) = (inputs.checkpoint_len()?, activations * d_state);
    println!("kept for backward: {} KiB of checkpoints; all states would be {} KiB", kept / 256, all / 256);

    // The loss is Σ out²/2 + Σ final_state²/2, so that the gradients of both results are the results themselves.
    let d_final_state = Some(View::new(&output.final_state, states));
    let d_outputs = OutputGradients { d_final_state, ..View::new(&output.out, activation).into() };
    let gradients = inputs.backward(&checkpoints, d_outputs)?;

    // The same in f64 by the reference, which is the equations in plain loops. The inputs are the same f32 numbers.
    let exact = scan::reference::backward(&inputs, d_outputs)?;
    println!("\n{:14}{:>9}{:>12}{:>12}", "gradient of", "elements", "norm", "error");
    let optional = |name, ours: &Option<Vec<f32>>, exact: &Option<Vec<f64>>| {
        // There is a gradient for each input that was given.
        if let (Some(ours), Some(exact)) = (ours, exact) {
            compare(name, ours, exact);
        }
    };
    compare("u", &gradients.u, &exact.u);
    compare("delta", &gradients.delta, &exact.delta);
    compare("A", &gradients.a, &exact.a);
    compare("B", gradients.b.as_slice(), exact.b.as_slice());
    compare("C", gradients.c.as_slice(), exact.c.as_slice());
    optional("z", &gradients.z, &exact.z);
    optional("D", &gradients.d, &exact.d);
    optional("delta_bias", &gradients.delta_bias, &exact.delta_bias);
    optional("initial_state", &gradients.initial_state, &exact.initial_state);
    println!("\nAn f32 has a relative rounding error of 6e-8; what is summed over {length} steps has several of them.");
    Ok(())
}

/// Prints the norm of a gradient, and the norm of its error relative to that.
fn compare(name: &str, ours: &[f32], exact: &[f64]) {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut ours.iter().zip(exact).map(|(&ours, exact)| f64::from(ours) - exact));
    let size = norm(&mut exact.iter().copied());
    println!("{name:14}{:9}{size:12.3e}{:12.1e}", ours.len(), error / size);
}
