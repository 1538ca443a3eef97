//! The operators on a GPU, timed with the device's own events and held to the reference.
//!
//! Inputs rotate through as many copies as exceed the second-level cache, and the first runs are not counted.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaSlice, CudaStream};
use selective_scan::cuda::{self, Cuda};
use selective_scan::scan::{self, GradientsMut, ProjectionGradient};
use selective_scan::{Element, ProjectionOf, View, ViewMut, conv, state_update};

use crate::common::{ConvData, ScanData, UpdateData};
use crate::measure::{Check, Deviation, FORWARD_BOUND, Measured};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// More than any GPU's second-level cache holds.
const BEYOND_CACHE: usize = 256 << 20;

/// A GPU and the stream on it that everything runs on.
pub struct Gpu(Arc<CudaStream>);

impl Gpu {
    pub fn open() -> Result<Self> {
        Ok(Self(cuda::context(0)?.new_stream()?))
    }

    fn copy<T: Element>(&self, data: &[T]) -> Result<CudaSlice<T>> {
        Ok(self.0.clone_htod(data)?)
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<CudaSlice<T>> {
        Ok(if len == 0 { self.0.null()? } else { self.0.alloc_zeros(len)? })
    }

    /// As many of what `make` makes as exceed the cache, if each takes `bytes`.
    fn rotation<S>(bytes: usize, make: impl Fn() -> Result<S>) -> Result<Vec<S>> {
        (0..BEYOND_CACHE.div_ceil(bytes.max(1)).clamp(2, 16)).map(|_| make()).collect()
    }

    /// The median time of `run`, which is told how often it has been called.
    fn seconds(&self, budget: Duration, mut run: impl FnMut(usize) -> Result<()>) -> Result<f64> {
        let mut calls = 0;
        let mut time = || -> Result<f64> {
            let event = || self.0.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
            let (start, end) = (event()?, event()?);
            start.record(&self.0)?;
            run(calls)?;
            end.record(&self.0)?;
            calls += 1;
            Ok(f64::from(start.elapsed_ms(&end)?) * 1e-3)
        };
        let warm = [time()?, time()?, time()?];
        let runs = (budget.as_secs_f64() / warm[2].max(1e-6)).clamp(3.0, 51.0) as usize;
        let mut times = (0..runs).map(|_| time()).collect::<Result<Vec<_>>>()?;
        times.sort_by(f64::total_cmp);
        Ok(times[runs / 2])
    }

    /// The scan, forward and backward.
    pub fn scan<T: Element>(&self, budget: Duration, exact: &crate::scan::Exact<T>) -> Result<[Measured; 2]> {
        let data = exact.data;
        let sets = Self::rotation(3 * size_of_val(&data.u[..]), || Scan::new(self, data))?;
        let (mut out, mut final_state) =
            (self.zeros::<T>(data.u.len())?, self.zeros::<f32>(data.batch * data.d_inner * data.d_state)?);
        let forward = self.seconds(budget, |i| {
            let outputs = scan::OutputMut { out: &mut out, final_state: Some(&mut final_state), checkpoints: None };
            Ok(scan::cuda::forward(&self.0, &sets[i % sets.len()].inputs(), outputs)?)
        })?;
        let output = scan::Output { out: self.0.clone_dtoh(&out)?, final_state: self.0.clone_dtoh(&final_state)? };
        let forward = Measured { seconds: forward, check: exact.check_output(&output) };

        let mut pass = sets[0].backward(self)?;
        let backward = self.seconds(budget, |i| pass.run(self, &sets[i % sets.len()]))?;
        let gradients = pass.download(self)?;
        let check = exact.check_gradients(&gradients, |part| {
            let part = Scan::new(self, part)?;
            let mut pass = part.backward(self)?;
            pass.run(self, &part)?;
            pass.download(self)
        })?;
        Ok([forward, Measured { seconds: backward, check }])
    }

    /// The convolution, forward and backward.
    pub fn conv<T: Element>(&self, budget: Duration, exact: &crate::conv::Exact<T>) -> Result<[Measured; 2]> {
        let data = exact.data;
        let ConvData { batch, len, d_inner, width, .. } = *data;
        let copies =
            Self::rotation(2 * size_of_val(&data.x[..]), || Ok((self.copy(&data.x)?, self.copy(&data.d_out)?)))?;
        let (weight, bias) = (self.copy(&data.weight)?, self.copy(&data.bias)?);
        let inputs = |i: usize| conv::Inputs {
            bias: Some(View::on_device(&bias, [d_inner])),
            options: conv::Options { silu: true, ..Default::default() },
            ..conv::Inputs::new(
                View::on_device(&copies[i % copies.len()].0, [batch, len, d_inner]),
                View::on_device(&weight, [d_inner, width]),
            )
        };
        let (mut out, mut state) = (self.zeros::<T>(data.x.len())?, self.zeros::<f32>(batch * (width - 1) * d_inner)?);
        let forward = self.seconds(budget, |i| {
            let outputs = conv::OutputMut { out: &mut out, final_state: Some(&mut state) };
            Ok(conv::cuda::forward(&self.0, &inputs(i), outputs)?)
        })?;
        let output = conv::Output { out: self.0.clone_dtoh(&out)?, final_state: self.0.clone_dtoh(&state)? };
        let forward = Measured { seconds: forward, check: exact.check_output(&output) };

        let mut x = self.zeros::<T>(data.x.len())?;
        let (mut d_weight, mut d_bias) = (self.zeros::<f32>(d_inner * width)?, self.zeros::<f32>(d_inner)?);
        let backward = self.seconds(budget, |i| {
            let d_out = View::on_device(&copies[i % copies.len()].1, [batch, len, d_inner]);
            let gradients =
                conv::GradientsMut { x: &mut x, weight: &mut d_weight, bias: Some(&mut d_bias), initial_state: None };
            Ok(conv::cuda::backward(&self.0, &inputs(i), d_out.into(), gradients)?)
        })?;
        let gradients = conv::Gradients {
            x: self.0.clone_dtoh(&x)?,
            weight: self.0.clone_dtoh(&d_weight)?,
            bias: Some(self.0.clone_dtoh(&d_bias)?),
            initial_state: None,
        };
        Ok([forward, Measured { seconds: backward, check: exact.check_gradients(&gradients) }])
    }

    /// The state update, one token for each row, on a pool of `f32` states.
    pub fn update<T: Element>(&self, budget: Duration, data: &UpdateData<T>) -> Result<Measured> {
        let host = data.inputs();
        let [batch, d_inner, d_state] = data.state_shape();
        let (activation, projection) = ([batch, 1, d_inner], [batch, 1, 1, d_state]);
        let [u, delta, z, b, c] = [&data.u, &data.delta, &data.z, &data.b, &data.c].map(|values| self.copy(values));
        let [a, d, delta_bias] = [&data.a, &data.d, &data.delta_bias].map(|values| self.copy(values));
        let (u, delta, z, b, c, a, d, delta_bias) = (u?, delta?, z?, b?, c?, a?, d?, delta_bias?);
        let inputs = state_update::Inputs {
            z: Some(View::on_device(&z, activation)),
            d: Some(View::on_device(&d, [d_inner])),
            delta_bias: Some(View::on_device(&delta_bias, [d_inner])),
            options: host.options,
            ..state_update::Inputs::new(
                View::on_device(&u, activation),
                View::on_device(&delta, activation),
                View::on_device(&a, [d_inner, d_state]),
                View::on_device(&b, projection),
                View::on_device(&c, projection),
            )
        };
        let mut pools = Self::rotation(size_of_val(&data.state[..]), || self.copy(&data.state))?;
        let mut out = self.zeros::<T>(data.u.len())?;
        let mut step = |state: &mut CudaSlice<f32>| {
            let state = ViewMut::on_device(state, data.state_shape());
            state_update::cuda::update(
                &self.0,
                &inputs,
                state_update::UpdateMut { state, out: &mut out, token_states: None },
            )
        };
        step(&mut pools[0])?;
        let state: Vec<f32> = self.0.clone_dtoh(&pools[0])?;
        let count = pools.len();
        let seconds = self.seconds(budget, |i| Ok(step(&mut pools[i % count])?))?;
        // The output of a first step again, from a fresh pool.
        step(&mut self.copy(&data.state)?)?;
        let out: Vec<T> = self.0.clone_dtoh(&out)?;
        let exact = state_update::reference::update(&host, View::new(&data.state, data.state_shape()))?;
        let deviations = [Deviation::of(&out, &exact.out), Deviation::of(&state, &exact.token_states)];
        Ok(Measured { seconds, check: Check::worst(deviations.map(|deviation| deviation.check(FORWARD_BOUND))) })
    }
}

/// A scan's inputs on the device.
struct Scan<'d, T: Element> {
    data: &'d ScanData<T>,
    activations: [CudaSlice<T>; 4],
    projections: [CudaSlice<T>; 2],
    parameters: [CudaSlice<f32>; 3],
}

impl<'d, T: Element> Scan<'d, T> {
    fn new(gpu: &Gpu, data: &'d ScanData<T>) -> Result<Self> {
        Ok(Self {
            data,
            activations: [gpu.copy(&data.u)?, gpu.copy(&data.delta)?, gpu.copy(&data.z)?, gpu.copy(&data.d_out)?],
            projections: [gpu.copy(&data.b)?, gpu.copy(&data.c)?],
            parameters: [gpu.copy(&data.a)?, gpu.copy(&data.d)?, gpu.copy(&data.delta_bias)?],
        })
    }

    fn inputs(&self) -> scan::Inputs<'_, T, Cuda> {
        let &ScanData { batch, len, d_inner, d_state, .. } = self.data;
        let (activation, projection) = ([batch, len, d_inner], [batch, len, 1, d_state]);
        let ([u, delta, z, _], [b, c], [a, d, bias]) = (&self.activations, &self.projections, &self.parameters);
        scan::Inputs {
            z: Some(View::on_device(z, activation)),
            d: Some(View::on_device(d, [d_inner])),
            delta_bias: Some(View::on_device(bias, [d_inner])),
            options: self.data.inputs().options,
            ..scan::Inputs::new(
                View::on_device(u, activation),
                View::on_device(delta, activation),
                View::on_device(a, [d_inner, d_state]),
                View::on_device(b, projection),
                View::on_device(c, projection),
            )
        }
    }

    /// What a backward pass needs, after a forward pass.
    fn backward(&self, gpu: &Gpu) -> Result<Backward<T>> {
        let inputs = self.inputs();
        let mut checkpoints = gpu.zeros(inputs.checkpoint_len()?)?;
        let mut out = gpu.zeros::<T>(self.data.u.len())?;
        let outputs = scan::OutputMut { out: &mut out, final_state: None, checkpoints: Some(&mut checkpoints) };
        scan::cuda::forward(&gpu.0, &inputs, outputs)?;
        let activation = || gpu.zeros::<T>(self.data.u.len());
        let projection = || gpu.zeros::<T>(self.data.b.len());
        Ok(Backward {
            checkpoints,
            activations: [activation()?, activation()?, activation()?],
            projections: [projection()?, projection()?],
            a: gpu.zeros(self.data.a.len())?,
            channels: [gpu.zeros(self.data.d_inner)?, gpu.zeros(self.data.d_inner)?],
        })
    }
}

/// The buffers of a backward pass.
struct Backward<T: Element> {
    checkpoints: CudaSlice<f32>,
    activations: [CudaSlice<T>; 3],
    projections: [CudaSlice<T>; 2],
    a: CudaSlice<f32>,
    channels: [CudaSlice<f32>; 2],
}

impl<T: Element> Backward<T> {
    fn run(&mut self, gpu: &Gpu, scan: &Scan<T>) -> Result<()> {
        let ([u, delta, z], [b, c], [d, delta_bias]) =
            (&mut self.activations, &mut self.projections, &mut self.channels);
        let gradients = GradientsMut {
            u,
            delta,
            a: &mut self.a,
            b: ProjectionOf::Varying(b),
            c: ProjectionOf::Varying(c),
            z: Some(z),
            d: Some(d),
            delta_bias: Some(delta_bias),
            initial_state: None,
        };
        let inputs = scan.inputs();
        let d_out = View::on_device(&scan.activations[3], inputs.u.shape);
        Ok(scan::cuda::backward(&gpu.0, &inputs, &self.checkpoints, d_out.into(), gradients)?)
    }

    fn download(&self, gpu: &Gpu) -> Result<scan::Gradients<T>> {
        let ([u, delta, z], [b, c], [d, delta_bias]) = (&self.activations, &self.projections, &self.channels);
        Ok(scan::Gradients {
            u: gpu.0.clone_dtoh(u)?,
            delta: gpu.0.clone_dtoh(delta)?,
            a: gpu.0.clone_dtoh(&self.a)?,
            b: ProjectionGradient::Varying(gpu.0.clone_dtoh(b)?),
            c: ProjectionGradient::Varying(gpu.0.clone_dtoh(c)?),
            z: Some(gpu.0.clone_dtoh(z)?),
            d: Some(gpu.0.clone_dtoh(d)?),
            delta_bias: Some(gpu.0.clone_dtoh(delta_bias)?),
            initial_state: None,
        })
    }
}
