//! The compiled kernels and their loading.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use cudarc::driver::sys::CUfunction_attribute;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use cudarc::nvrtc::Ptx;

use crate::{Error, Result};

/// A file of kernels, by its path in `kernels/`.
#[derive(Clone, Copy)]
pub(crate) struct Module {
    name: &'static str,
    fatbin: &'static [u8],
}

macro_rules! modules {
    ($($constant:ident = $name:literal),* $(,)?) => {
        impl Module {
            $(pub const $constant: Self = Self {
                name: $name,
                fatbin: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")),
            };)*
        }
    };
}

modules! {
    UPLOAD = "common/upload",
    REDUCE_PARTIALS = "common/reduce_partials",
    ROLLBACK = "common/rollback",
    SCAN_FORWARD = "scan/forward",
    SCAN_FORWARD_GENERAL = "scan/forward_general",
    SCAN_FORWARD_FEW_CHANNELS = "scan/forward_few_channels",
    SCAN_CHUNK_STATE = "scan/chunk_state",
    SCAN_BACKWARD = "scan/backward",
    SCAN_BACKWARD_GENERAL = "scan/backward_general",
    SCAN_BACKWARD_CHUNK_STATE = "scan/backward_chunk_state",
    STATE_UPDATE = "state_update/update",
    CONV_FORWARD = "conv/forward",
    CONV_BACKWARD = "conv/backward",
    CONV_UPDATE = "conv/update",
}

/// What has been loaded into one context.
struct Loaded {
    context: Arc<CudaContext>,
    modules: HashMap<&'static str, Arc<CudaModule>>,
    functions: HashMap<String, CudaFunction>,
}

static LOADED: LazyLock<Mutex<Vec<Loaded>>> = LazyLock::new(Mutex::default);

impl Module {
    /// The kernel `name` in `context`, with leave to use `dynamic_shared` bytes of dynamic shared memory.
    pub fn function(&self, context: &Arc<CudaContext>, name: &str, dynamic_shared: usize) -> Result<CudaFunction> {
        // A panic while the lock was held cannot have left a map half changed.
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let index = loaded.iter().position(|loaded| Arc::ptr_eq(&loaded.context, context)).unwrap_or_else(|| {
            let (modules, functions) = Default::default();
            loaded.push(Loaded { context: context.clone(), modules, functions });
            loaded.len() - 1
        });
        let Loaded { modules, functions, .. } = &mut loaded[index];
        if let Some(function) = functions.get(name) {
            return Ok(function.clone());
        }
        if !modules.contains_key(self.name) {
            if self.fatbin.is_empty() {
                let action = format!("loading the kernels of {}", self.name);
                return Err(Error::Cuda { action, message: "this build is for its documentation and has none".into() });
            }
            let image = Ptx::from_binary(self.fatbin.to_vec());
            let module = context
                .load_module(image)
                .map_err(|error| Error::cuda(format_args!("loading the kernels of {}", self.name), error))?;
            modules.insert(self.name, module);
        }
        let error = |error| Error::cuda(format_args!("loading the kernel {name}"), error);
        let function = modules[self.name].load_function(name).map_err(error)?;
        if dynamic_shared > 0 {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, dynamic_shared as i32).map_err(error)?;
        }
        functions.insert(name.into(), function.clone());
        Ok(function)
    }
}
