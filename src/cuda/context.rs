//! What is known of a context: its device, the kernels that have been loaded into it, and tables that they read.

use std::collections::HashMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute, CUstreamCaptureStatus};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaSlice};
use cudarc::nvrtc::Ptx;

use super::record::is_recording;
use super::{Device, Module};
use crate::{Error, Result};

/// What of a device decides how work is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Properties {
    /// The number of its multiprocessors.
    pub processors: usize,
    /// Bytes of shared memory that a block can have.
    pub shared_memory: usize,
}

impl Properties {
    fn of(context: &CudaContext) -> Result<Self> {
        let ask = |attribute| {
            let answer = context.attribute(attribute);
            answer.map_err(|error| Error::cuda("asking the device for its size", error))
        };
        let processors = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared_memory = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        Ok(Self { processors: processors.max(1) as usize, shared_memory: shared_memory.max(0) as usize })
    }

    /// Blocks of `bytes` of shared memory that a multiprocessor has room for: it has as much as one block can have and what the driver
    /// keeps of each. At least one.
    pub fn blocks_by_shared_memory(self, bytes: usize) -> usize {
        const KEPT: usize = 1024;
        ((self.shared_memory + KEPT) / (bytes + KEPT)).max(1)
    }
}

/// A kernel: where it is, and the parts of its name, which `_` joins.
///
/// Two are the same if the parts are, at the same addresses: a kernel that is named in several places may be loaded as often.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel {
    pub module: Module,
    pub name: [&'static str; 4],
    /// The most bytes of dynamic shared memory that any launch of it asks for.
    pub most_shared: usize,
}

impl Kernel {
    /// A kernel without dynamic shared memory, by up to four parts of its name.
    pub fn new<const N: usize>(module: Module, parts: [&'static str; N]) -> Self {
        const { assert!(N <= 4) };
        let mut name = [""; 4];
        name[..N].copy_from_slice(&parts);
        Self { module, name, most_shared: 0 }
    }
}

impl Kernel {
    fn parts(&self) -> [(*const u8, usize); 4] {
        self.name.map(|part| (part.as_ptr(), part.len()))
    }
}

impl PartialEq for Kernel {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for Kernel {}

impl Hash for Kernel {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.parts().hash(state);
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut parts = self.name.iter().filter(|part| !part.is_empty());
        f.write_str(parts.next().unwrap_or(&""))?;
        parts.try_for_each(|part| write!(f, "_{part}"))
    }
}

/// One for each CUDA context that has been used. It lives as long as the process, and keeps the CUDA context alive.
pub(crate) struct Context {
    cuda: Arc<CudaContext>,
    pub properties: Properties,
    modules: Mutex<HashMap<Module, Arc<CudaModule>>>,
    kernels: RwLock<HashMap<Kernel, CudaFunction>>,
    tables: Mutex<Vec<Table>>,
}

/// Found by comparing pointers: there are as many as devices, mostly.
static CONTEXTS: RwLock<Vec<&'static Context>> = RwLock::new(Vec::new());

impl Context {
    pub fn of(cuda: &Arc<CudaContext>) -> Result<&'static Self> {
        let find = |contexts: &[&'static Self]| contexts.iter().find(|known| Arc::ptr_eq(&known.cuda, cuda)).copied();
        // (For all locks here: a panic while one was held cannot have left what it guards half changed.)
        if let Some(known) = find(&CONTEXTS.read().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(known);
        }
        let mut contexts = CONTEXTS.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = find(&contexts) {
            return Ok(known);
        }
        let (modules, kernels, tables) = Default::default();
        let properties = Properties::of(cuda)?;
        let new: &Self = Box::leak(Box::new(Self { cuda: cuda.clone(), properties, modules, kernels, tables }));
        contexts.push(new);
        Ok(new)
    }

    /// The function of a kernel, which is loaded when it is wanted first.
    pub fn function(&self, kernel: &Kernel) -> Result<CudaFunction> {
        if let Some(function) = self.kernels.read().unwrap_or_else(PoisonError::into_inner).get(kernel) {
            return Ok(function.clone());
        }
        let error = |error| Error::cuda(format_args!("loading the kernel {kernel}"), error);
        let function = self.module(kernel.module)?.load_function(&kernel.to_string()).map_err(error)?;
        if kernel.most_shared > 0 {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, kernel.most_shared as i32).map_err(error)?;
        }
        self.kernels.write().unwrap_or_else(PoisonError::into_inner).insert(*kernel, function.clone());
        Ok(function)
    }

    fn module(&self, module: Module) -> Result<Arc<CudaModule>> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = modules.get(&module) {
            return Ok(loaded.clone());
        }
        let action = format!("loading the kernels of {}", module.name);
        if module.fatbin.is_empty() {
            return Err(Error::Cuda { action, message: "this build is for its documentation and has none".into() });
        }
        let image = Ptx::from_binary(module.fatbin.to_vec());
        let loaded = self.cuda.load_module(image).map_err(|error| Error::cuda(action, error))?;
        modules.insert(module, loaded.clone());
        Ok(loaded)
    }
}

/// Numbers in device memory, uploaded on a stream.
struct Table {
    numbers: Box<[u64]>,
    uploaded: Arc<CudaSlice<u64>>,
}

/// Tables that are kept for each stream, and the longest that is.
const MOST_TABLES: usize = 16;
const LONGEST_TABLE: usize = 1 << 16;

impl Device<'_> {
    /// A table in device memory.
    ///
    /// It is kept for the next call on this stream that wants the same: every layer and operator of a model reads the same
    /// tables of a packed batch, or the same slots. While the stream is captured a table is uploaded for the call alone, as
    /// a graph may be launched when it would be kept no more.
    pub fn table(&self, what: &str, numbers: &[u64]) -> Result<Arc<CudaSlice<u64>>> {
        if is_recording() {
            return self.upload(what, numbers).map(Arc::new);
        }
        let status = self.stream.capture_status().map_err(|error| Error::cuda("asking for a capture", error))?;
        let is_captured = status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        if is_captured || numbers.len() > LONGEST_TABLE {
            return self.upload(what, numbers).map(Arc::new);
        }
        let is_here = |table: &&Table| table.uploaded.stream().cu_stream() == self.stream.cu_stream();
        let mut tables = self.context.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = tables.iter().position(|table| is_here(&table) && *table.numbers == *numbers) {
            // What was used last is found first.
            tables[..=at].rotate_right(1);
            return Ok(tables[0].uploaded.clone());
        }
        let uploaded = Arc::new(self.upload(what, numbers)?);
        // A table that is dropped is freed in the order of its stream, after what has been launched there. Those of other
        // streams stay, as these may be captured just now, which a free would end.
        if tables.iter().filter(is_here).count() == MOST_TABLES
            && let Some(oldest) = tables.iter().rposition(|table| is_here(&table))
        {
            tables.remove(oldest);
        }
        tables.insert(0, Table { numbers: numbers.into(), uploaded: uploaded.clone() });
        Ok(uploaded)
    }
}

#[cfg(test)]
mod tests {
    mod gpu {
        use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

        use super::super::*;

        /// As many tables as make a stream drop its oldest, beside a stream that is captured; skipped, and said so, where
        /// there is no device.
        #[test]
        fn a_captured_stream_is_left_alone() {
            let context = match crate::cuda::context(0) {
                Ok(context) => context,
                Err(error) => return eprintln!("no GPU, and none simulated ({error}): skipped"),
            };
            let streams = [(); 2].map(|()| context.new_stream().expect("a stream"));
            let devices = streams.each_ref().map(|stream| Device::new(stream).expect("a device"));
            let first = devices[0].table("a table", &[7]).expect("room");
            drop(first);
            streams[0].begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).expect("a capture");
            for number in 0..2 * MOST_TABLES as u64 {
                devices[1].table("a table", &[number]).expect("room");
            }
            let status = streams[0].capture_status().expect("a status");
            assert_eq!(status, CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE);
            let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
            streams[0].end_capture(flags).expect("the capture is whole");
            // What was uploaded before is found again, and what is new still goes through.
            for numbers in [[7], [8]] {
                let table = devices[0].table("a table", &numbers).expect("room");
                assert_eq!(streams[0].clone_dtoh(&*table).expect("numbers"), numbers);
            }
            let kept = devices[1].context.tables.lock().unwrap_or_else(PoisonError::into_inner);
            let of_second = |table: &&Table| table.uploaded.stream().cu_stream() == streams[1].cu_stream();
            assert_eq!(kept.iter().filter(of_second).count(), MOST_TABLES);
        }
    }
}
