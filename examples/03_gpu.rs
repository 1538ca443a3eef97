//! The scan on an NVIDIA GPU, forward and backward: the same views, over device memory, and a stream that the kernels are
//! enqueued on. What comes out is compared with the processor's.
//!
//! `cargo run --release --features cuda --example 03_gpu`

use selective_scan::cudarc::driver::CudaSlice;
use selective_scan::scan::{Gradients, GradientsMut, Inputs, Options, OutputMut, cuda};
use selective_scan::{Projection, ProjectionOf, Result, View};

fn main() -> Result<()> {
    // A program with the feature `cuda` starts everywhere; where there is no driver or no GPU, this is an error.
    let context = match selective_scan::cuda::context(0) {
        Ok(context) => context,
        Err(error) => {
            println!("There is no GPU to run this on: {error}");
            return Ok(());
        }
    };
    let stream = context.default_stream();

    let (batch, length, d_inner, d_state) = (2, 200, 64, 16);
    let wave = |count: usize, pace: f32| (0..count).map(|i| (i as f32 * pace).sin()).collect::<Vec<f32>>();
    let (activations, projections) = (batch * length * d_inner, batch * length * d_state);
    let (u, delta, d_out) = (wave(activations, 0.37), vec![-2.0; activations], wave(activations, 0.53));
    let (b, c) = (wave(projections, 0.11), wave(projections, 0.23));
    let a: Vec<f32> = (0..d_inner * d_state).map(|i| -((i % d_state + 1) as f32)).collect();
    let options = Options { delta_softplus: true, ..Default::default() };
    let (activation, matrix, projection) = ([batch, length, d_inner], [d_inner, d_state], [batch, length, 1, d_state]);

    // What the GPU reads has to be there first. A view of it differs in its kind of memory alone.
    let upload = |data: &[f32]| stream.clone_htod(data);
    let on_gpu = (upload(&u)?, upload(&delta)?, upload(&a)?, upload(&b)?, upload(&c)?, upload(&d_out)?);
    let inputs = Inputs {
        options,
        ..Inputs::new(
            View::on_device(&on_gpu.0, activation),
            View::on_device(&on_gpu.1, activation),
            View::on_device(&on_gpu.2, matrix),
            View::on_device(&on_gpu.3, projection),
            View::on_device(&on_gpu.4, projection),
        )
    };

    // Forward, with checkpoints for the backward pass. The caller allocates what is written; the call returns at once.
    let mut out = stream.alloc_zeros::<f32>(activations)?;
    let mut checkpoints = stream.alloc_zeros::<f32>(inputs.checkpoint_len()?)?;
    let outputs = OutputMut { checkpoints: Some(&mut checkpoints), ..OutputMut::new(&mut out) };
    cuda::forward(&stream, &inputs, outputs)?;

    // Backward, on the same stream and so after it: a buffer for the gradient of each input that was given.
    let zeros = |count| stream.alloc_zeros::<f32>(count);
    let (mut d_u, mut d_delta, mut d_a) = (zeros(activations)?, zeros(activations)?, zeros(a.len())?);
    let (mut d_b, mut d_c) = (zeros(projections)?, zeros(projections)?);
    let (d_b_out, d_c_out) = (ProjectionOf::Varying(&mut d_b), ProjectionOf::Varying(&mut d_c));
    let gradients = GradientsMut::new(&mut d_u, &mut d_delta, &mut d_a, d_b_out, d_c_out);
    cuda::backward(&stream, &inputs, &checkpoints, View::on_device(&on_gpu.5, activation).into(), gradients)?;

    // The same on the processor.
    let [b, c] = [&b, &c].map(|data| Projection::from(View::new(data, projection)));
    let (u, delta) = (View::new(&u, activation), View::new(&delta, activation));
    let inputs = Inputs { options, ..Inputs::new(u, delta, View::new(&a, matrix), b, c) };
    let (output, checkpoints) = inputs.forward_with_checkpoints()?;
    let expected: Gradients<f32> = inputs.backward(&checkpoints, View::new(&d_out, activation))?;

    println!("{}, compute capability {:?}", context.name()?, context.compute_capability()?);
    // Copying back waits for the kernels.
    let compare = |name: &str, on_gpu: &CudaSlice<f32>, expected: &[f32]| -> Result<()> {
        let ours = stream.clone_dtoh(on_gpu)?;
        let largest = expected.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let difference = ours.iter().zip(expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        println!("{name:12} at most {largest:9.3}, differs from the processor's by {difference:.1e} at most");
        Ok(())
    };
    compare("out", &out, &output.out)?;
    compare("d_u", &d_u, &expected.u)?;
    compare("d_delta", &d_delta, &expected.delta)?;
    compare("d_a", &d_a, &expected.a)?;
    compare("d_b", &d_b, expected.b.as_slice())?;
    compare("d_c", &d_c, expected.c.as_slice())
}
