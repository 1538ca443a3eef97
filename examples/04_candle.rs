//! A selective scan on candle's tensors, with gradients: `B` and `C` come out of one projection, which learns to make the
//! scan do what another projection makes it do.
//!
//! `cargo run --release --features candle --example 04_candle`

use candle_core::{D, Device, Result, Tensor, Var};
use selective_scan::candle::Scan;
use selective_scan::scan::Options;

fn main() -> Result<()> {
    let device = Device::Cpu;
    let (batch, length, d_inner, d_state) = (2, 256, 64, 16);
    let x = Tensor::randn(0f32, 1.0, (batch, length, d_inner), &device)?;
    let delta = Tensor::randn(-4f32, 1.0, (batch, length, d_inner), &device)?;
    let gate = Tensor::randn(0f32, 1.0, (batch, length, d_inner), &device)?;
    // The state matrix of the paper: -1, -2, … for every channel, one row that is read for all.
    let a = Tensor::arange(1f32, (d_state + 1) as f32, &device)?.neg()?.broadcast_as((d_inner, d_state))?;

    // Everything that the scan takes is a tensor of candle's, and so is what it gives.
    let run = |projection: &Tensor| -> Result<(Tensor, Tensor)> {
        // Halves of the projection's output, read where they lie: the scan takes any strides and copies nothing.
        let projected = x.broadcast_matmul(projection)?;
        let halves = projected.chunk(2, D::Minus1)?;
        let options = Options { delta_softplus: true, ..Default::default() };
        let scan = Scan { z: Some(&gate), options, ..Scan::new(&x, &delta, &a, &halves[0], &halves[1]) };
        scan.forward_with_state()
    };

    let (target, final_state) = run(&Tensor::randn(0f32, 0.1, (d_inner, 2 * d_state), &device)?)?;
    println!("out {:?}, final state {:?}", target.shape(), final_state.shape());
    let size = target.sqr()?.mean_all()?;

    // Where an input is tracked the scan keeps checkpoints, and candle's `backward` runs the backward kernels. Steps along
    // the gradient, each as long as the loss and the gradient say that the way to zero is.
    let projection = Var::randn(0f32, 0.1, (d_inner, 2 * d_state), &device)?;
    for step in 0..=60 {
        let (out, _) = run(&projection)?;
        let loss = (out - &target)?.sqr()?.mean_all()?.div(&size)?;
        let gradients = loss.backward()?;
        let gradient = gradients.get(&projection).expect("the loss depends on it");
        let (loss, slope) = (loss.to_scalar::<f32>()?, gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
        if step % 10 == 0 {
            println!("step {step:3}: loss {loss:.4}, norm of the gradient {:.4}", slope.sqrt());
        }
        projection.set(&(projection.as_tensor() - gradient * f64::from(loss / slope))?)?;
    }
    Ok(())
}
