//! The scan forward, on slices: what a step size does to the state, sequences that are packed, and a state that is passed
//! on from one call to the next.
//!
//! `cargo run --release --example 01_slices`

use std::time::Instant;

use selective_scan::{Discretization, Result, View, scan};

fn main() -> Result<()> {
    sample_and_hold()?;
    packed_and_passed_on()
}

/// One channel with one state. With exact zero-order hold, A = -1 and B = C = 1, a step is
/// `h = exp(-Δ) h + (1 - exp(-Δ)) u`: a large Δ takes the input and forgets the rest, and a Δ of zero keeps what there is.
/// A Mamba computes Δ from its input, and so chooses what it remembers: this is what is selective in it.
fn sample_and_hold() -> Result<()> {
    let u = [0.3f32, 0.8, -0.5, 0.1, 0.9, -0.7, 0.4, -0.2, 0.6, -0.9];
    let delta = [20.0f32, 0.0, 0.0, 20.0, 0.0, 0.0, 0.0, 20.0, 0.7, 0.7];
    let (a, ones) = ([-1.0f32], [1.0f32; 10]);
    // A view gives a slice a shape: activations are (batch, length, d_inner), A is (d_inner, d_state), and B and C are
    // (batch, length, groups, d_state).
    let (activation, projection) = (|data| View::new(data, [1, 10, 1]), View::new(&ones, [1, 10, 1, 1]));
    let inputs = scan::Inputs {
        options: scan::Options { discretization: Discretization::ZeroOrderHold, ..Default::default() },
        ..scan::Inputs::new(activation(&u), activation(&delta), View::new(&a, [1, 1]), projection, projection)
    };
    let out = inputs.forward()?.out;
    let row = |name: &str, values: &[f32]| {
        println!("{name:8}{}", values.iter().map(|x| format!("{x:6.1}")).collect::<String>());
    };
    row("u", &u);
    row("delta", &delta);
    row("out", &out);
    println!("Where delta is large the output takes u; where it is zero it holds it; at 0.7 it moves half way.\n");
    Ok(())
}

/// Sequences of 300, 50 and 650 steps, one after another in one call without padding: `cu_seqlens` says where each begins.
fn packed_and_passed_on() -> Result<()> {
    let (length, d_inner, d_state) = (1000, 256, 16);
    let wave = |count: usize, pace: f32| (0..count).map(|i| (i as f32 * pace).sin()).collect::<Vec<f32>>();
    let (u, b, c) = (wave(length * d_inner, 0.37), wave(length * d_state, 0.11), wave(length * d_state, 0.23));
    let delta = vec![-2.0; length * d_inner];
    // The paper's A: -1, -2, … for the states of each channel, so that they forget at different speeds.
    let a: Vec<f32> = (0..d_inner * d_state).map(|i| -((i % d_state + 1) as f32)).collect();

    let options = scan::Options { delta_softplus: true, ..Default::default() };
    // The steps from `first` to `last`: a part of a tensor is a view with an offset, and nothing is copied.
    let part = |first: usize, last: usize| {
        let activation = |data| View { offset: first * d_inner, ..View::new(data, [1, last - first, d_inner]) };
        let projection = |data| View { offset: first * d_state, ..View::new(data, [1, last - first, 1, d_state]) };
        let a = View::new(&a, [d_inner, d_state]);
        let inputs = scan::Inputs::new(activation(&u), activation(&delta), a, projection(&b), projection(&c));
        scan::Inputs { options, ..inputs }
    };

    let cu_seqlens = [0, 300, 350, length];
    let begun = Instant::now();
    let packed = scan::Inputs { cu_seqlens: Some(&cu_seqlens), ..part(0, length) }.forward()?;
    println!("{length} steps of {d_inner} channels in {:.1} ms", begun.elapsed().as_secs_f64() * 1e3);
    for (i, bounds) in cu_seqlens.windows(2).enumerate() {
        let alone = part(bounds[0], bounds[1]).forward()?;
        let same = alone.out == packed.out[bounds[0] * d_inner..bounds[1] * d_inner];
        println!("sequence {i}, {:3} steps: the same alone, to the bit? {same}", bounds[1] - bounds[0]);
    }

    // The last sequence in two calls, as a long prompt is read in chunks: the state goes from one to the next.
    let first = part(350, 600).forward()?;
    let state = View::new(&first.final_state, [1, d_inner, d_state]);
    let second = scan::Inputs { initial_state: Some(state), ..part(600, length) }.forward()?;
    let whole = &packed.final_state[2 * d_inner * d_state..];
    let difference = second.final_state.iter().zip(whole).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    println!("in two calls, the final state differs by {difference} at most");
    Ok(())
}
