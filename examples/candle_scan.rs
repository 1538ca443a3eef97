//! A selective scan on candle's tensors: `B` and `C` come out of one projection, and a gradient goes back into it.

use candle_core::{Device, Result, Tensor, Var};
use selective_scan::candle::Scan;
use selective_scan::scan::Options;

fn main() -> Result<()> {
    let device = Device::Cpu;
    let (batch, length, d_inner, d_state) = (2, 512, 64, 16);
    let x = Tensor::randn(0f32, 1.0, (batch, length, d_inner), &device)?;
    let delta = Tensor::randn(-4f32, 1.0, (batch, length, d_inner), &device)?;
    let gate = Tensor::randn(0f32, 1.0, (batch, length, d_inner), &device)?;
    let projection = Var::randn(0f32, 0.1, (d_inner, 2 * d_state), &device)?;
    // The state matrix of the paper: -1, -2, … for every channel.
    let a = Tensor::arange(1f32, (d_state + 1) as f32, &device)?.neg()?.broadcast_as((d_inner, d_state))?;

    // Halves of the projection's output, read where they lie.
    let projected = x.broadcast_matmul(&projection)?;
    let halves = projected.chunk(2, 2)?;
    let options = Options { delta_softplus: true, ..Default::default() };
    let scan = Scan { z: Some(&gate), options, ..Scan::new(&x, &delta, &a, &halves[0], &halves[1]) };
    let (out, final_state) = scan.forward_with_state()?;
    println!("out {:?}, final state {:?}", out.shape(), final_state.shape());

    let loss = out.sqr()?.mean_all()?;
    let gradients = loss.backward()?;
    let gradient = gradients.get(&projection).expect("the loss depends on it");
    println!("loss {:.4}, gradient {:?}", loss.to_scalar::<f32>()?, gradient.shape());
    Ok(())
}
