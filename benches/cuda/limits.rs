//! What the device can do at most, measured: the bounds of docs/cost-sheet.md for a real GPU.

use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

use crate::Result;
use crate::timing::{Work, zeros};

/// The highest rates of one GPU.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Of the processors while the special functions were measured, in Hz.
    pub clock: f64,
    /// Exponentials a second.
    pub special: f64,
    /// Instructions of warps a second: each processor issues four a clock.
    pub issue: f64,
    /// Bytes a second, read and written, of a copy within the device.
    pub copy: f64,
}

/// The least time that some work takes on each unit, in milliseconds.
#[derive(Clone, Copy)]
pub struct Bounds {
    pub special: f64,
    pub issue: f64,
    pub memory: f64,
}

impl Bounds {
    /// What takes longest.
    pub fn binding(&self) -> (&'static str, f64) {
        let units = [("special", self.special), ("issue", self.issue), ("memory", self.memory)];
        units.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("there are three")
    }
}

impl Limits {
    pub fn measure(stream: &Arc<CudaStream>) -> Result<Self> {
        let processors = stream.context().attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let (special, clock) = special(stream, processors)?;
        Ok(Self { clock, special, issue: 4.0 * processors as f64 * clock, copy: copy(stream)? })
    }

    pub fn bounds(&self, work: &Work) -> Bounds {
        Bounds {
            special: work.special / self.special * 1e3,
            issue: work.instructions / self.issue * 1e3,
            memory: work.bytes / self.copy * 1e3,
        }
    }
}

/// Milliseconds between two events.
fn elapsed(stream: &Arc<CudaStream>, run: impl FnOnce() -> Result<()>) -> Result<f64> {
    let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
    let (start, end) = (event()?, event()?);
    start.record(stream)?;
    run()?;
    end.record(stream)?;
    Ok(f64::from(start.elapsed_ms(&end)?))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

const RUNS: usize = 9;

/// Exponentials a second, and the clock meanwhile.
fn special(stream: &Arc<CudaStream>, processors: usize) -> Result<(f64, f64)> {
    /// In a turn of the kernel's loop.
    const CHAINS: usize = 8;
    const STEPS: usize = 8;
    let steps: String = (0..STEPS)
        .flat_map(|_| 0..CHAINS)
        // Negating is a property of the operand, not an instruction.
        .map(|i| format!("    neg.f32 %y{i}, %x{i};\n    ex2.approx.ftz.f32 %x{i}, %y{i};\n"))
        .collect();
    let module = stream.context().load_module(Ptx::from_src(include_str!("limits.ptx").replace("STEPS", &steps)))?;
    let kernel = module.load_function("special")?;
    let (blocks, threads) = (2 * processors, 1024);
    let mut times = zeros_u64(stream, 2)?;
    let mut out = zeros::<f32>(stream, blocks * threads)?;
    let config =
        LaunchConfig { grid_dim: (blocks as u32, 1, 1), block_dim: (threads as u32, 1, 1), shared_mem_bytes: 0 };
    let mut run = |turns: u32| {
        elapsed(stream, || {
            // SAFETY: the kernel takes these arguments, writes two times and a value of each thread, and nothing else.
            unsafe { stream.launch_builder(&kernel).arg(&mut times).arg(&mut out).arg(&turns).launch(config) }?;
            Ok(())
        })
        .and_then(|ms| Ok((ms, stream.clone_dtoh(&times)?)))
    };
    run(1)?;
    // About 5 ms, so that launching does not show.
    let first = 4;
    let turns = (f64::from(first) * 5.0 / run(first)?.0).clamp(1.0, 1e5) as u32;
    let each = (blocks * threads * CHAINS * STEPS) as f64 * f64::from(turns);
    let (mut rates, mut clocks) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let (ms, times) = run(turns)?;
        rates.push(each / ms * 1e3);
        clocks.push(times[0] as f64 / (times[1] as f64).max(1.0) * 1e9);
    }
    Ok((median(rates), median(clocks)))
}

fn zeros_u64(stream: &Arc<CudaStream>, len: usize) -> Result<cudarc::driver::CudaSlice<u64>> {
    Ok(stream.alloc_zeros(len)?)
}

fn copy(stream: &Arc<CudaStream>) -> Result<f64> {
    let bytes = 512 << 20;
    let from = stream.alloc_zeros::<u8>(bytes)?;
    let mut to = stream.alloc_zeros::<u8>(bytes)?;
    let mut times = Vec::new();
    for _ in 0..RUNS {
        times.push(elapsed(stream, || Ok(stream.memcpy_dtod(&from, &mut to)?))?);
    }
    Ok(2.0 * bytes as f64 / median(times) * 1e3)
}
