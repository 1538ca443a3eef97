//! Random inputs as a trained model's layers see them, shared by the report and the benches.
#![allow(dead_code, reason = "each program uses a part")]

use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};
use selective_scan::scan::Inputs;
use selective_scan::{Element, View, conv, scan, state_update};

/// A source of random tensors: the same seed gives the same tensors on any number of threads.
pub struct Random(SmallRng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(SmallRng::seed_from_u64(seed))
    }

    /// `len` values of `draw`, rounded to `T`.
    pub fn fill<T: Element>(&mut self, len: usize, draw: impl Fn(&mut SmallRng) -> f32 + Sync) -> Vec<T> {
        const CHUNK: usize = 1 << 16;
        let stream = self.0.next_u64();
        let mut data = vec![T::from_f32(0.0); len];
        data.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| {
            let mut random = SmallRng::seed_from_u64(stream.wrapping_add(i as u64));
            chunk.fill_with(|| T::from_f32(draw(&mut random)));
        });
        data
    }

    /// Values of mean 0 and variance 1.
    pub fn normal<T: Element>(&mut self, len: usize) -> Vec<T> {
        self.fill(len, normal)
    }
}

/// Mean 0, variance 1, nearly normal: the sum of four uniform values, which one draw gives.
fn normal(random: &mut SmallRng) -> f32 {
    let bits = random.next_u64();
    let sum: u32 = (0..4).map(|i| (bits >> (16 * i)) as u32 & 0xffff).sum();
    // Four values of variance 65536²/12.
    (sum as f32 - 131_070.0) * (3f32.sqrt() / 65_536.0)
}

/// A buffer whose pages have been written, so that the first timed run does not pay for mapping them.
pub fn touched<T: Element>(len: usize) -> Vec<T> {
    vec![T::from_f32(1.0); len]
}

/// A pool of threads for each of `counts`.
pub fn pools(counts: &[usize]) -> Result<Vec<ThreadPool>, ThreadPoolBuildError> {
    counts.iter().map(|&threads| ThreadPoolBuilder::new().num_threads(threads).build()).collect()
}

/// One thread, and as many as the machine runs at once.
pub fn default_threads() -> Vec<usize> {
    let mut counts = vec![1, std::thread::available_parallelism().map_or(1, |threads| threads.get())];
    counts.dedup();
    counts
}

/// What a selective scan reads in a Mamba block, and the gradient of its output.
pub struct ScanData<T> {
    pub batch: usize,
    pub len: usize,
    pub d_inner: usize,
    pub d_state: usize,
    pub u: Vec<T>,
    pub delta: Vec<T>,
    pub z: Vec<T>,
    pub b: Vec<T>,
    pub c: Vec<T>,
    pub a: Vec<f32>,
    pub d: Vec<f32>,
    pub delta_bias: Vec<f32>,
    pub d_out: Vec<T>,
}

impl<T: Element> ScanData<T> {
    pub fn random(random: &mut Random, [batch, len, d_inner, d_state]: [usize; 4]) -> Self {
        let (activation, projection) = (batch * len * d_inner, batch * len * d_state);
        Self {
            batch,
            len,
            d_inner,
            d_state,
            u: random.normal(activation),
            delta: random.fill(activation, raw_delta),
            z: random.normal(activation),
            b: random.normal(projection),
            c: random.normal(projection),
            a: state_matrix(d_inner, d_state),
            d: random.fill(d_inner, skip),
            delta_bias: random.fill(d_inner, delta_bias),
            d_out: random.normal(activation),
        }
    }

    /// With gate, skip connection, bias and softplus, as in Mamba.
    pub fn inputs(&self) -> Inputs<'_, T> {
        let &Self { batch, len, d_inner, d_state, .. } = self;
        let (activation, projection) = ([batch, len, d_inner], [batch, len, 1, d_state]);
        Inputs {
            z: Some(View::new(&self.z, activation)),
            d: Some(View::new(&self.d, [d_inner])),
            delta_bias: Some(View::new(&self.delta_bias, [d_inner])),
            options: scan::Options { delta_softplus: true, ..Default::default() },
            ..Inputs::new(
                View::new(&self.u, activation),
                View::new(&self.delta, activation),
                View::new(&self.a, [d_inner, d_state]),
                View::new(&self.b, projection),
                View::new(&self.c, projection),
            )
        }
    }

    /// The same problem over storage `(batch, d_inner, length)`, where the steps of a channel are neighbours. The values
    /// are those of [`ScanData::inputs`] in another order: just as random, but not the same.
    pub fn time_contiguous(&self) -> Inputs<'_, T> {
        let inputs = self.inputs();
        let strides = [self.len * self.d_inner, 1, self.len];
        Inputs {
            u: inputs.u.with_layout(0, strides),
            delta: inputs.delta.with_layout(0, strides),
            z: inputs.z.map(|z| z.with_layout(0, strides)),
            ..inputs
        }
    }

    /// The problem of some of the channels alone.
    pub fn channels(&self, picks: &[usize]) -> Self {
        let parameter = |data: &[f32], width| gather(data, self.d_inner, picks, width);
        let activation = |data: &[T]| -> Vec<T> {
            data.chunks(self.d_inner).flat_map(|row| picks.iter().map(|&pick| row[pick])).collect()
        };
        Self {
            d_inner: picks.len(),
            u: activation(&self.u),
            delta: activation(&self.delta),
            z: activation(&self.z),
            b: self.b.clone(),
            c: self.c.clone(),
            a: parameter(&self.a, self.d_state),
            d: parameter(&self.d, 1),
            delta_bias: parameter(&self.delta_bias, 1),
            d_out: activation(&self.d_out),
            ..*self
        }
    }
}

/// What a causal convolution reads in a Mamba block, and the gradient of its output.
pub struct ConvData<T> {
    pub batch: usize,
    pub len: usize,
    pub d_inner: usize,
    pub width: usize,
    pub x: Vec<T>,
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
    pub d_out: Vec<T>,
}

impl<T: Element> ConvData<T> {
    pub fn random(random: &mut Random, [batch, len, d_inner, width]: [usize; 4]) -> Self {
        Self {
            batch,
            len,
            d_inner,
            width,
            x: random.normal(batch * len * d_inner),
            weight: random.fill(d_inner * width, |random| 0.5 * normal(random)),
            bias: random.fill(d_inner, |random| 0.5 * normal(random)),
            d_out: random.normal(batch * len * d_inner),
        }
    }

    /// With bias and SiLU, as in Mamba.
    pub fn inputs(&self) -> conv::Inputs<'_, T> {
        let x = View::new(&self.x, [self.batch, self.len, self.d_inner]);
        conv::Inputs {
            bias: Some(View::new(&self.bias, [self.d_inner])),
            options: conv::Options { silu: true, ..Default::default() },
            ..conv::Inputs::new(x, View::new(&self.weight, [self.d_inner, self.width]))
        }
    }

    /// The same problem over storage `(batch, d_inner, length)`; see [`ScanData::time_contiguous`].
    pub fn time_contiguous(&self) -> conv::Inputs<'_, T> {
        let inputs = self.inputs();
        conv::Inputs { x: inputs.x.with_layout(0, [self.len * self.d_inner, 1, self.len]), ..inputs }
    }

    /// The problem of some of the channels alone.
    pub fn channels(&self, picks: &[usize]) -> Self {
        let activation = |data: &[T]| -> Vec<T> {
            data.chunks(self.d_inner).flat_map(|row| picks.iter().map(|&pick| row[pick])).collect()
        };
        Self {
            d_inner: picks.len(),
            x: activation(&self.x),
            weight: gather(&self.weight, self.d_inner, picks, self.width),
            bias: gather(&self.bias, self.d_inner, picks, 1),
            d_out: activation(&self.d_out),
            ..*self
        }
    }
}

/// What one step of decoding reads: a token and a state for each of `batch` rows.
pub struct UpdateData<T> {
    pub batch: usize,
    pub d_inner: usize,
    pub d_state: usize,
    pub state: Vec<f32>,
    pub u: Vec<T>,
    pub delta: Vec<T>,
    pub z: Vec<T>,
    pub b: Vec<T>,
    pub c: Vec<T>,
    pub a: Vec<f32>,
    pub d: Vec<f32>,
    pub delta_bias: Vec<f32>,
}

impl<T: Element> UpdateData<T> {
    pub fn random(random: &mut Random, [batch, d_inner, d_state]: [usize; 3]) -> Self {
        Self {
            batch,
            d_inner,
            d_state,
            state: random.normal(batch * d_inner * d_state),
            u: random.normal(batch * d_inner),
            delta: random.fill(batch * d_inner, raw_delta),
            z: random.normal(batch * d_inner),
            b: random.normal(batch * d_state),
            c: random.normal(batch * d_state),
            a: state_matrix(d_inner, d_state),
            d: random.fill(d_inner, skip),
            delta_bias: random.fill(d_inner, delta_bias),
        }
    }

    pub fn state_shape(&self) -> [usize; 3] {
        [self.batch, self.d_inner, self.d_state]
    }

    pub fn inputs(&self) -> state_update::Inputs<'_, T> {
        let &Self { batch, d_inner, d_state, .. } = self;
        let (activation, projection) = ([batch, 1, d_inner], [batch, 1, 1, d_state]);
        state_update::Inputs {
            z: Some(View::new(&self.z, activation)),
            d: Some(View::new(&self.d, [d_inner])),
            delta_bias: Some(View::new(&self.delta_bias, [d_inner])),
            options: state_update::Options { delta_softplus: true, ..Default::default() },
            ..state_update::Inputs::new(
                View::new(&self.u, activation),
                View::new(&self.delta, activation),
                View::new(&self.a, [d_inner, d_state]),
                View::new(&self.b, projection),
                View::new(&self.c, projection),
            )
        }
    }
}

/// The rows `picks` of a `(channels, width)` tensor.
fn gather<T: Copy>(data: &[T], channels: usize, picks: &[usize], width: usize) -> Vec<T> {
    debug_assert_eq!(data.len(), channels * width);
    picks.iter().flat_map(|&pick| &data[pick * width..][..width]).copied().collect()
}

/// A as Mamba starts from: -1, -2, … for the states of each channel.
fn state_matrix(d_inner: usize, d_state: usize) -> Vec<f32> {
    (0..d_inner * d_state).map(|i| -((i % d_state + 1) as f32)).collect()
}

/// A weight of the skip connection.
fn skip(random: &mut SmallRng) -> f32 {
    1.0 + 0.1 * normal(random)
}

/// A step size before bias and softplus. One in 256 is large: a token that makes the state forget what came before.
fn raw_delta(random: &mut SmallRng) -> f32 {
    let boost = if random.random_ratio(1, 256) { 6.0 } else { 0.0 };
    normal(random) + boost
}

/// A bias as Mamba draws it: softplus gives a step size between 0.001 and 0.1, evenly in its logarithm.
fn delta_bias(random: &mut SmallRng) -> f32 {
    let delta = (random.random_range(0.001f32.ln()..0.1f32.ln())).exp();
    delta.exp_m1().ln()
}
