//! The device, its clock and its memory.

use candle_core::Device;
#[cfg(feature = "candle-cuda")]
use cudarc::driver::{CudaEvent, CudaStream, sys::CUevent_flags};
#[cfg(feature = "candle-cuda")]
use std::sync::Arc;
use std::time::Instant;

use crate::Result;
#[cfg(feature = "candle-cuda")]
use crate::pool;
use crate::work::Lap;

/// Where models run.
pub struct Machine {
    pub device: Device,
    pub name: String,
    /// Whether training keeps what it otherwise computes again on the way back.
    pub keeps: bool,
    #[cfg(feature = "candle-cuda")]
    stream: Option<Arc<CudaStream>>,
}

impl Machine {
    /// A GPU if there is one and the features have it, unless the processor is asked for.
    pub fn open(on_cpu: bool, keeps: bool) -> Result<Self> {
        #[cfg(feature = "candle-cuda")]
        if !on_cpu {
            let device = Device::new_cuda(0)?;
            let stream = device.as_cuda_device()?.cuda_stream();
            // Freed memory stays for the next step, as the documentation of `cuda` advises.
            selective_scan::cuda::keep_freed_memory(stream.context());
            // SAFETY: this program puts all on that stream.
            unsafe { selective_scan::candle::use_one_stream(&device) };
            // Both this program and PyTorch then multiply f32 matrices as TF32.
            candle_core::cuda::set_gemm_reduced_precision_f32(true);
            let name = stream.context().name()?;
            return Ok(Self { device, name, keeps, stream: Some(stream) });
        }
        let name = match on_cpu {
            true => "the processor, as asked for",
            false => "the processor, as the feature `candle-cuda` is off",
        };
        Ok(Self {
            device: Device::Cpu,
            name: name.into(),
            keeps,
            #[cfg(feature = "candle-cuda")]
            stream: None,
        })
    }

    /// Waits until all is done.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.device.synchronize()?)
    }

    /// Begins to look for the peak of memory anew.
    pub fn reset_peak(&self) {
        #[cfg(feature = "candle-cuda")]
        if let Some(stream) = &self.stream {
            pool::reset_peak(stream.context());
        }
    }

    /// The most bytes that were allocated at a time, and that the device's pool held for them; nothing on a processor.
    pub fn peak(&self) -> Option<[u64; 2]> {
        #[cfg(feature = "candle-cuda")]
        if let Some(stream) = &self.stream {
            return pool::peak(stream.context()).map(|peak| [peak.used, peak.reserved]);
        }
        None
    }

    /// Gives freed memory back, for the next case or another program.
    pub fn trim(&self) -> Result<()> {
        self.synchronize()?;
        #[cfg(feature = "candle-cuda")]
        if let Some(stream) = &self.stream {
            pool::trim(stream.context());
        }
        Ok(())
    }

    /// The milliseconds from call to call of the function that `run` is given, by events on a GPU, so that what comes
    /// after one is not waited for.
    pub fn laps(&self, run: impl FnOnce(&mut Lap) -> Result<()>) -> Result<Vec<f64>> {
        let mut marks = Vec::new();
        self.synchronize()?;
        marks.push(self.mark()?);
        run(&mut || {
            marks.push(self.mark()?);
            Ok(())
        })?;
        self.synchronize()?;
        marks.windows(2).map(|pair| pair[0].until(&pair[1])).collect()
    }

    fn mark(&self) -> Result<Mark> {
        #[cfg(feature = "candle-cuda")]
        if let Some(stream) = &self.stream {
            let event = stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
            event.record(stream)?;
            return Ok(Mark::OnDevice(event));
        }
        Ok(Mark::OnHost(Instant::now()))
    }
}

/// A moment.
enum Mark {
    OnHost(Instant),
    #[cfg(feature = "candle-cuda")]
    OnDevice(CudaEvent),
}

impl Mark {
    /// Milliseconds until a later one, of the same kind.
    fn until(&self, later: &Self) -> Result<f64> {
        match (self, later) {
            (Self::OnHost(start), Self::OnHost(end)) => Ok((*end - *start).as_secs_f64() * 1e3),
            #[cfg(feature = "candle-cuda")]
            (Self::OnDevice(start), Self::OnDevice(end)) => Ok(f64::from(start.elapsed_ms(end)?)),
            #[cfg(feature = "candle-cuda")]
            _ => Err("moments of two kinds".into()),
        }
    }
}
