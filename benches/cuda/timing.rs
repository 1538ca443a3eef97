//! Medians of CUDA events, and inputs to rotate over.

use std::sync::Arc;

use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaSlice, CudaStream};
use selective_scan::{Element, View, cuda::Cuda};

use crate::Result;

/// Bytes that a rotation of inputs exceeds; no GPU has a larger cache yet.
const BEYOND_CACHE: usize = 256 << 20;

/// As many sets of `bytes` each as exceed the cache, but no more than a graph launches swiftly: the smallest state pools,
/// of 100 kB, then still come to 200 MB.
pub fn sets(bytes: usize) -> usize {
    BEYOND_CACHE.div_ceil(bytes.max(1)).clamp(2, 2048)
}

/// What an operator does at the very least, whatever the implementation: see `kernels/budget/cost_sheet.py`.
#[derive(Clone, Copy, Default)]
pub struct Work {
    /// Special functions.
    pub special: f64,
    /// Instructions of warps.
    pub instructions: f64,
    /// Bytes read and written, each once.
    pub bytes: f64,
    /// (Step, channel, state) triples of a scan.
    pub state_steps: f64,
}

impl Work {
    /// Of an operator that runs over `steps` (step, channel) pairs and `d_state` states of each: instructions and special
    /// functions are for each state and for each pair.
    pub fn new(steps: usize, d_state: usize, instructions: [f64; 2], special: [f64; 2], bytes: usize) -> Self {
        let all = |[state, step]: [f64; 2]| (state * d_state as f64 + step) * steps as f64;
        Self {
            special: all(special),
            instructions: all(instructions) / 32.0,
            bytes: bytes as f64,
            state_steps: (steps * d_state) as f64,
        }
    }
}

/// Something to time: `run` is told which of `sets` sets of inputs to use.
pub struct Prepared {
    pub stream: Arc<CudaStream>,
    pub sets: usize,
    /// Whether calls can be captured in a graph.
    pub can_capture: bool,
    pub work: Work,
    pub run: Box<dyn FnMut(usize) -> Result<()>>,
}

/// Milliseconds of a call, of which there were `calls` between two events.
#[derive(Clone, Copy)]
pub struct Times {
    pub calls: usize,
    pub median: f64,
    pub min: f64,
}

/// What is timed, warmed up.
pub struct Timed {
    prepared: Prepared,
    /// A call with each set.
    graph: Option<CudaGraph>,
    next: usize,
}

impl Timed {
    pub fn new(mut prepared: Prepared, graphs: bool) -> Result<Self> {
        let Prepared { stream, sets, can_capture, run, .. } = &mut prepared;
        (0..(*sets).min(3)).try_for_each(&mut *run)?;
        stream.synchronize()?;
        let graph = if graphs && *can_capture { capture(stream, *sets, run)? } else { None };
        if let Some(graph) = &graph {
            graph.launch()?;
            stream.synchronize()?;
        }
        Ok(Self { prepared, graph, next: 0 })
    }

    pub fn work(&self) -> Work {
        self.prepared.work
    }

    /// The times of `repeats` graphs, or of as many calls where there is none.
    pub fn measure(&mut self, repeats: usize) -> Result<Times> {
        let Prepared { stream, sets, run, .. } = &mut self.prepared;
        let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let calls = if self.graph.is_some() { *sets } else { 1 };
        let mut times = Vec::with_capacity(repeats.max(1));
        for _ in 0..repeats.max(1) {
            let (start, end) = (event()?, event()?);
            start.record(stream)?;
            match &self.graph {
                Some(graph) => graph.launch()?,
                None => run(self.next % *sets)?,
            }
            end.record(stream)?;
            self.next += 1;
            times.push(f64::from(start.elapsed_ms(&end)?) / calls as f64);
        }
        times.sort_by(f64::total_cmp);
        Ok(Times { calls, median: times[times.len() / 2], min: times[0] })
    }
}

/// A call with each set as a graph, or nothing where the driver captures none.
fn capture(
    stream: &Arc<CudaStream>,
    sets: usize,
    run: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Option<CudaGraph>> {
    if stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).is_err() {
        return Ok(None);
    }
    let ran = (0..sets).try_for_each(run);
    // Also after a failure, which leaves the stream capturing.
    let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    ran?;
    Ok(graph?)
}

/// Dense tensors of one shape in one buffer.
pub struct Sets<T> {
    pub data: CudaSlice<T>,
    len: usize,
}

impl<T: Element> Sets<T> {
    /// `sets` tensors of `len` elements, pseudorandom between `low` and `high`.
    pub fn uniform(stream: &Arc<CudaStream>, sets: usize, len: usize, [low, high]: [f32; 2]) -> Result<Self> {
        // Each starts where any access of the kernels is aligned.
        let stride = len.next_multiple_of(64);
        Ok(Self { data: uniform(stream, sets * stride, [low, high])?, len: stride })
    }

    /// Where tensor `i` starts.
    pub fn offset(&self, i: usize) -> usize {
        i * self.len
    }

    pub fn view<const R: usize>(&self, i: usize, shape: [usize; R]) -> View<'_, T, R, Cuda> {
        View { offset: self.offset(i), ..View::on_device(&self.data, shape) }
    }
}

/// Pseudorandom values between `low` and `high`. Their period is long enough that no kernel meets the same row twice in a
/// tile, and short enough that a buffer of gigabytes is filled by copies on the device.
pub fn uniform<T: Element>(stream: &Arc<CudaStream>, len: usize, [low, high]: [f32; 2]) -> Result<CudaSlice<T>> {
    const PERIOD: usize = (1 << 21) + 64;
    let mut state = (len as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values: Vec<T> = (0..len.min(PERIOD))
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            T::from_f32(low + (high - low) * ((state >> 40) as f32 / (1 << 24) as f32))
        })
        .collect();
    let period = stream.clone_htod(&values)?;
    if len <= PERIOD {
        return Ok(period);
    }
    // SAFETY: all of it is written below before anything reads it.
    let mut all = unsafe { stream.alloc::<T>(len) }?;
    for start in (0..len).step_by(PERIOD) {
        let count = PERIOD.min(len - start);
        stream.memcpy_dtod(&period.slice(..count), &mut all.slice_mut(start..start + count))?;
    }
    Ok(all)
}

pub fn zeros<T: Element>(stream: &Arc<CudaStream>, len: usize) -> Result<CudaSlice<T>> {
    Ok(match len {
        0 => stream.null()?,
        _ => stream.alloc_zeros(len)?,
    })
}
