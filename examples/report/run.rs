//! Which operator runs at which shape.

use std::error::Error;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use rayon::ThreadPool;
use selective_scan::{DType, Element};

use crate::Device;
use crate::attention::Attention;
use crate::common::{ConvData, Random, ScanData, UpdateData, pools};
use crate::conv;
#[cfg(feature = "cuda")]
use crate::gpu::Gpu;
use crate::measure::{self, Measured};
use crate::output::{Case, Rows};
use crate::scan;
use crate::unfused::{Unfused, tensor_bytes};
use crate::update;

/// The sizes of a model that an operator sees.
#[derive(Debug)]
pub struct Model {
    pub name: &'static str,
    pub d_inner: usize,
    pub d_state: usize,
}

pub const MODELS: [Model; 2] = [
    Model { name: "mamba-130m", d_inner: 1536, d_state: 16 },
    Model { name: "mamba-2.8b", d_inner: 5120, d_state: 16 },
];

/// The taps of Mamba's convolution.
const CONV_WIDTH: usize = 4;
/// The sequences that are decoded together.
const DECODE_BATCHES: [usize; 3] = [1, 8, 64];
/// Unfused tensors larger than this are not made.
const UNFUSED_BYTES: usize = 4 << 30;
/// Attention that should take longer than this, by four times the time at half the length, is left out.
const ATTENTION_SECONDS: f64 = 10.0;

/// What to run.
pub struct Plan {
    pub models: &'static [Model],
    pub lengths: Vec<usize>,
    pub threads: Vec<usize>,
    pub seed: u64,
    pub quick: bool,
    pub device: Device,
}

impl Plan {
    pub fn run<T: Element>(&self) -> Result<Rows, Box<dyn Error>> {
        let progress = ProgressBar::new((self.models.len() * (self.lengths.len() * STEPS_PER_LENGTH + 1)) as u64);
        progress.set_style(ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} {msg}")?);
        let mut session = Session {
            pools: if self.device.is_cpu() { pools(&self.threads)? } else { Vec::new() },
            #[cfg(feature = "cuda")]
            gpu: if self.device.is_cpu() { None } else { Some(Gpu::open()?) },
            budget: Duration::from_millis(if self.quick { 300 } else { 1000 }),
            random: Random::new(self.seed),
            rows: Rows::default(),
            progress,
        };
        for model in self.models {
            let mut attention = vec![None; session.pools.len()];
            for &len in &self.lengths {
                session.scan::<T>(model, len)?;
                session.conv::<T>(model, len)?;
                session.attention(model, len, &mut attention);
            }
            session.update::<T>(model)?;
        }
        session.progress.finish_and_clear();
        Ok(session.rows)
    }
}

/// The steps of the progress bar for each model and length.
const STEPS_PER_LENGTH: usize = 5;

struct Session {
    /// What to run on the CPU with: none if a GPU is reported on.
    pools: Vec<ThreadPool>,
    #[cfg(feature = "cuda")]
    gpu: Option<Gpu>,
    /// The time to spend on repeating one measurement.
    budget: Duration,
    random: Random,
    rows: Rows,
    progress: ProgressBar,
}

impl Session {
    /// Moves the progress bar on to what comes next.
    fn next(&self, what: &str, model: &Model, len: usize) {
        self.progress.set_message(format!("{what}, {}, L {len}", model.name));
        self.progress.inc(1);
    }

    /// Says what is left out for want of memory, if it is.
    fn lacks_memory(&mut self, what: &str, model: &Model, len: usize, needed: usize) -> bool {
        let lacks = available_memory().is_some_and(|available| needed > available);
        if lacks {
            let (name, needed) = (model.name, gibibytes(needed));
            self.rows.notes.push(format!("{what}, {name}, L {len}: needs {needed} of memory, left out"));
        }
        lacks
    }

    fn scan<T: Element>(&mut self, model: &Model, len: usize) -> Result<(), Box<dyn Error>> {
        let shape = [1, len, model.d_inner, model.d_state];
        if self.lacks_memory("selective scan", model, len, scan_bytes::<T>(shape)) {
            self.progress.inc(3);
            return Ok(());
        }
        self.next("reference", model, len);
        let data = ScanData::<T>::random(&mut self.random, shape);
        let exact = scan::Exact::new(&data)?;

        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            let [forward, backward] = gpu.scan(self.budget, &exact)?;
            let case = Case::on_gpu("selective_scan", T::DTYPE, shape);
            self.rows.push(case, "forward", forward, None);
            self.rows.push(case, "backward", backward, None);
            self.progress.inc(2);
            return Ok(());
        }

        self.next("unfused scan", model, len);
        let unfused = self.unfused(model, &data, &exact)?;

        self.next("selective scan", model, len);
        for (pool, unfused) in self.pools.iter().zip(unfused) {
            let case = Case::on(pool, "selective_scan", T::DTYPE, shape);
            let forward = pool.install(|| scan::forward(self.budget, &exact))?;
            self.rows.push(case, "forward", forward, unfused);
            let backward = pool.install(|| scan::backward(self.budget, &exact))?;
            self.rows.push(case, "backward", backward, None);
        }
        Ok(())
    }

    fn conv<T: Element>(&mut self, model: &Model, len: usize) -> Result<(), Box<dyn Error>> {
        self.next("causal convolution", model, len);
        let shape = [1, len, model.d_inner, CONV_WIDTH];
        // Two activations go in and one comes out.
        let needed = 3 * len * model.d_inner * size_of::<T>();
        if self.lacks_memory("causal convolution", model, len, needed) {
            return Ok(());
        }
        let data = ConvData::<T>::random(&mut self.random, shape);
        let exact = conv::Exact::new(&data)?;
        #[cfg(feature = "cuda")]
        if let Some(gpu) = &self.gpu {
            let [forward, backward] = gpu.conv(self.budget, &exact)?;
            let case = Case::on_gpu("causal_conv", T::DTYPE, shape);
            self.rows.push(case, "forward", forward, None);
            self.rows.push(case, "backward", backward, None);
        }
        for pool in &self.pools {
            let case = Case::on(pool, "causal_conv", T::DTYPE, shape);
            self.rows.push(case, "forward", pool.install(|| conv::forward(self.budget, &exact))?, None);
            self.rows.push(case, "backward", pool.install(|| conv::backward(self.budget, &exact))?, None);
        }
        Ok(())
    }

    fn update<T: Element>(&mut self, model: &Model) -> Result<(), Box<dyn Error>> {
        self.next("state update", model, 1);
        for batch in DECODE_BATCHES {
            let &Model { d_inner, d_state, .. } = model;
            let data = UpdateData::<T>::random(&mut self.random, [batch, d_inner, d_state]);
            #[cfg(feature = "cuda")]
            if let Some(gpu) = &self.gpu {
                let case = Case::on_gpu("state_update", T::DTYPE, [batch, 1, d_inner, d_state]);
                self.rows.push(case, "update", gpu.update(self.budget, &data)?, None);
            }
            for pool in &self.pools {
                let case = Case::on(pool, "state_update", T::DTYPE, [batch, 1, d_inner, d_state]);
                self.rows.push(case, "update", pool.install(|| update::update(self.budget, &data))?, None);
            }
        }
        Ok(())
    }

    /// The unfused scan's time on each number of threads.
    fn unfused<T: Element>(
        &mut self,
        model: &Model,
        data: &ScanData<T>,
        exact: &scan::Exact<T>,
    ) -> Result<Vec<Option<f64>>, Box<dyn Error>> {
        let bytes = tensor_bytes(data.len, data.d_inner, data.d_state);
        // The f32 copies of the inputs come on top.
        let needed = bytes + 6 * size_of::<f32>() * data.u.len();
        if bytes > UNFUSED_BYTES || available_memory().is_some_and(|available| needed > available) {
            self.rows.notes.push(format!(
                "{}, L {}: the unfused scan's tensors would take {}, left out",
                model.name,
                data.len,
                gibibytes(bytes)
            ));
            return Ok(vec![None; self.pools.len()]);
        }
        let mut unfused = Unfused::new(data);
        let times = self.pools.iter().map(|pool| {
            let seconds = pool.install(|| measure::seconds(self.budget, || unfused.forward()));
            // A comparison with code that computes something else would be worth nothing.
            let check = exact.check_out(&unfused.out);
            match check.within {
                true => Ok(Some(seconds)),
                false => Err(format!("the unfused scan is wrong: its relative error is {:.1e}", check.error).into()),
            }
        });
        times.collect()
    }

    fn attention(&mut self, model: &Model, len: usize, before: &mut [Option<(usize, f64)>]) {
        self.next("attention", model, len);
        if self.pools.is_empty() {
            return;
        }
        let fits = |before: &Option<(usize, f64)>| match before {
            Some((length, seconds)) => seconds * (len as f64 / *length as f64).powi(2) < ATTENTION_SECONDS,
            // Nothing was measured yet: surely short enough at the least length, unknown at others.
            None => len <= 4096,
        };
        if !before.iter().all(fits) {
            self.rows.notes.push(format!(
                "{}, L {len}: attention would take more than {ATTENTION_SECONDS} s on some numbers of threads, left out there",
                model.name
            ));
        }
        if !before.iter().any(fits) {
            return;
        }
        let mut attention = Attention::random(&mut self.random, len, model.d_inner);
        for (pool, before) in self.pools.iter().zip(before) {
            if !fits(before) {
                continue;
            }
            let seconds = pool.install(|| measure::seconds(self.budget, || attention.forward()));
            *before = Some((len, seconds));
            let case = Case::on(pool, "attention", DType::F32, [1, len, model.d_inner, model.d_state]);
            self.rows.push(case, "forward", Measured { seconds, check: attention.check() }, None);
        }
    }
}

/// About what timing the scan takes: four activations that go in, up to four that come out, and the checkpoints.
fn scan_bytes<T>([batch, len, d_inner, d_state]: [usize; 4]) -> usize {
    let channels = batch * len * d_inner;
    8 * channels * size_of::<T>() + channels / 64 * d_state * size_of::<f32>()
}

/// The memory that can still be used, where the system says.
fn available_memory() -> Option<usize> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? * 1024)
}

fn gibibytes(bytes: usize) -> String {
    format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
}
