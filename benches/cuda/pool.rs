//! The memory that a device gives to streams: what is allocated in their order comes from its default pool.
#![allow(dead_code, reason = "each bench uses a part")]

use std::ffi::c_void;

use cudarc::driver::CudaContext;
use cudarc::driver::sys::{self, CUgraphMem_attribute_enum as Graph, CUmemPool_attribute_enum as Pool};

/// The most bytes at a time since [`reset_peak`].
#[derive(Clone, Copy)]
pub struct Peak {
    /// In allocations that were not freed: of tensors, and of workspaces that are allocated in a stream's order. It is
    /// what PyTorch's `max_memory_allocated` counts. What libraries take by themselves is in neither: code, contexts,
    /// and here cuBLAS's workspace of some 32 MiB, which PyTorch allocates itself and counts.
    pub used: u64,
    /// What the pool held of the device's memory for that, freed allocations that it kept for the next included.
    pub reserved: u64,
}

/// Begins to look for the peak anew, from what is allocated now on.
pub fn reset_peak(context: &CudaContext) {
    let mut zero = 0u64;
    let value: *mut c_void = (&raw mut zero).cast();
    // SAFETY: the driver gave the pool. Each call reads a 64-bit number, as its attribute is; a high-water mark may be set to zero.
    unsafe {
        if let Some(pool) = default_pool(context) {
            let _ = sys::cuMemPoolSetAttribute(pool, Pool::CU_MEMPOOL_ATTR_USED_MEM_HIGH, value);
            let _ = sys::cuMemPoolSetAttribute(pool, Pool::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH, value);
        }
        let device = context.cu_device();
        let _ = sys::cuDeviceSetGraphMemAttribute(device, Graph::CU_GRAPH_MEM_ATTR_USED_MEM_HIGH, value);
        let _ = sys::cuDeviceSetGraphMemAttribute(device, Graph::CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH, value);
    }
}

/// The peak, or nothing where the driver does not tell. Allocations within graphs have a pool of their own, whose peak is
/// added: the sum is no less than what there was at any time.
pub fn peak(context: &CudaContext) -> Option<Peak> {
    let pool = default_pool(context)?;
    let of_pool = |attribute| {
        let mut value = 0u64;
        // SAFETY: the driver gave the pool, and writes a 64-bit number, as the attribute is.
        let result = unsafe { sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut value).cast()) };
        (result == sys::CUresult::CUDA_SUCCESS).then_some(value)
    };
    let of_graphs = |attribute| {
        let mut value = 0u64;
        // SAFETY: the call writes a 64-bit number, as the attribute is.
        let result =
            unsafe { sys::cuDeviceGetGraphMemAttribute(context.cu_device(), attribute, (&raw mut value).cast()) };
        if result == sys::CUresult::CUDA_SUCCESS { value } else { 0 }
    };
    Some(Peak {
        used: of_pool(Pool::CU_MEMPOOL_ATTR_USED_MEM_HIGH)? + of_graphs(Graph::CU_GRAPH_MEM_ATTR_USED_MEM_HIGH),
        reserved: of_pool(Pool::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH)?
            + of_graphs(Graph::CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH),
    })
}

/// Gives memory that streams and graphs have freed back to the driver.
pub fn trim(context: &CudaContext) {
    // SAFETY: the driver gave the pool; what it refuses to give back, it keeps.
    unsafe {
        if let Some(pool) = default_pool(context) {
            let _ = sys::cuMemPoolTrimTo(pool, 0);
            let _ = sys::cuDeviceGraphMemTrim(context.cu_device());
        }
    }
}

/// The pool, if the driver has pools.
fn default_pool(context: &CudaContext) -> Option<sys::CUmemoryPool> {
    let mut pool = std::mem::MaybeUninit::uninit();
    // SAFETY: the call writes the handle or fails, and then it is not read. There is a context, so the driver is loaded.
    unsafe {
        let result = sys::cuDeviceGetDefaultMemPool(pool.as_mut_ptr(), context.cu_device());
        (result == sys::CUresult::CUDA_SUCCESS).then(|| pool.assume_init())
    }
}
