//! Work on tensors that are there already, done again and again.

use std::fmt;

#[cfg(feature = "candle-cuda")]
use candle_core::Storage;
use candle_core::{Device, Result, Tensor};

#[cfg(feature = "candle-cuda")]
use crate::Error;

/// Work that writes to tensors which stay where they are, such as a step of decoding, to be done as often as is wanted.
///
/// On a GPU what the operators of this crate launch is recorded once, and repeated as one CUDA graph, in which large layers of Mamba are one
/// launch (see `decode::cuda::join_layers`); on the processor the work is done anew each time.
pub struct Repeated {
    work: Box<dyn Fn() -> Result<()> + Send + Sync>,
    tensors: Vec<Tensor>,
    #[cfg(feature = "candle-cuda")]
    recorded: Option<Recorded>,
}

/// How [`Repeated`] work is done.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Repetition {
    /// By calling it.
    Call,
    /// By a CUDA graph of so many launches.
    Graph {
        /// The number of launches.
        launches: usize,
    },
    /// By launches one after another, as the driver has refused a graph.
    Launches {
        /// The number of launches.
        launches: usize,
        /// What the driver said.
        why: String,
    },
}

#[cfg(feature = "candle-cuda")]
struct Recorded {
    device: candle_core::CudaDevice,
    recording: crate::cuda::Recording,
    graph: crate::Result<crate::cuda::Graph>,
    /// Where the tensors lay.
    addresses: Vec<u64>,
}

impl fmt::Debug for Repeated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Repeated").field("how", &self.how()).finish_non_exhaustive()
    }
}

impl Repeated {
    /// Takes the work, and on a GPU records it, without doing it.
    ///
    /// # Safety
    /// On a GPU `work` must launch through operators of this crate alone, which read and write `tensors` and nothing else.
    ///
    /// # Errors
    /// Those of `work`, on a GPU; an operator there that needs memory of its own.
    pub unsafe fn new(
        device: &Device,
        tensors: Vec<Tensor>,
        work: impl Fn() -> Result<()> + Send + Sync + 'static,
    ) -> Result<Self> {
        #[cfg(feature = "candle-cuda")]
        let recorded = match device {
            Device::Cuda(device) => {
                let recording = crate::cuda::record(device.cuda_stream().context(), &work)?;
                let joined = crate::decode::cuda::join_layers(recording.clone())?;
                // A device that refuses what is joined may take it launch by launch.
                let (recording, graph) = match joined.graph() {
                    Err(_) if joined.len() < recording.len() => (recording.clone(), recording.graph()),
                    graph => (joined, graph),
                };
                Some(Recorded { device: device.clone(), recording, graph, addresses: addresses(&tensors)? })
            }
            _ => None,
        };
        #[cfg(not(feature = "candle-cuda"))]
        let _ = device;
        Ok(Self {
            work: Box::new(work),
            tensors,
            #[cfg(feature = "candle-cuda")]
            recorded,
        })
    }

    /// How the work is done.
    pub fn how(&self) -> Repetition {
        #[cfg(feature = "candle-cuda")]
        if let Some(Recorded { recording, graph, .. }) = &self.recorded {
            let launches = recording.len();
            return match graph {
                Ok(_) => Repetition::Graph { launches },
                Err(error) => Repetition::Launches { launches, why: error.to_string() },
            };
        }
        Repetition::Call
    }

    /// Does the work; on a GPU it is enqueued.
    ///
    /// # Errors
    /// Those of the work. A tensor whose storage has been replaced since, on a GPU. What the device refuses.
    pub fn run(&self) -> Result<()> {
        self.run_by(true)
    }

    /// [`run`](Self::run) without a graph, by launches one after another: the same bits, for comparison.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_plainly(&self) -> Result<()> {
        self.run_by(false)
    }

    #[cfg_attr(not(feature = "candle-cuda"), expect(unused_variables, reason = "there is no GPU"))]
    fn run_by(&self, with_graph: bool) -> Result<()> {
        #[cfg(feature = "candle-cuda")]
        if let Some(Recorded { device, recording, graph, addresses: expected }) = &self.recorded {
            if addresses(&self.tensors)? != *expected {
                let got = "one whose storage was replaced";
                return Err(Error::argument("tensors", "tensors that stay where they were recorded", got).into());
            }
            let stream = device.cuda_stream();
            // SAFETY: the tensors are all that the launches touch, as the caller of `new` has promised; they are alive and where
            // they were. candle does all its work on a device on this stream, so that nothing else uses them meanwhile.
            return Ok(match graph {
                Ok(graph) if with_graph => unsafe { graph.launch(&stream) },
                _ => unsafe { recording.launch(&stream) },
            }?);
        }
        (self.work)()
    }

    /// The tensors that the work reads and writes.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }
}

/// Where tensors lie on a device.
#[cfg(feature = "candle-cuda")]
fn addresses(tensors: &[Tensor]) -> Result<Vec<u64>> {
    use candle_core::cuda_backend::CudaStorageSlice as Slice;
    use cudarc::driver::{CudaSlice, DevicePtr};
    fn of<T>(slice: &CudaSlice<T>) -> u64 {
        slice.device_ptr(slice.stream()).0
    }
    let address = |tensor: &Tensor| match &*tensor.storage_and_layout().0 {
        Storage::Cuda(storage) => match &storage.slice {
            Slice::U8(slice) => Ok(of(slice)),
            Slice::U32(slice) => Ok(of(slice)),
            Slice::I16(slice) => Ok(of(slice)),
            Slice::I32(slice) => Ok(of(slice)),
            Slice::I64(slice) => Ok(of(slice)),
            Slice::BF16(slice) => Ok(of(slice)),
            Slice::F16(slice) => Ok(of(slice)),
            Slice::F32(slice) => Ok(of(slice)),
            Slice::F64(slice) => Ok(of(slice)),
            _ => Err(Error::argument("tensors", "tensors of plain numbers", "others").into()),
        },
        _ => Err(Error::argument("tensors", "tensors on the device", "one elsewhere").into()),
    };
    tensors.iter().map(address).collect()
}
