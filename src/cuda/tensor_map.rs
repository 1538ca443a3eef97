//! How the copy engine finds boxes of tensors.

use std::mem::MaybeUninit;

use cudarc::driver::sys::{
    self, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle,
};

use super::params::TensorMap;
use crate::{DType, Element};

/// From which compute capability on there is a copy engine, as the driver numbers them.
#[cfg(feature = "lti")]
pub(crate) const COPIES_BOXES: i32 = 90;

impl TensorMap {
    /// Of `(batch, length, channels)` at an address, with strides of the former two in elements and contiguous channels, in boxes of so
    /// many rows, steps and channels; nothing if the engine cannot go through such a tensor. Only for devices that have it.
    pub fn new<T: Element>(
        data: u64,
        [batch, length, channels]: [usize; 3],
        strides: [i64; 2],
        box_extents: [usize; 3],
    ) -> Option<Self> {
        let data_type = match T::DTYPE {
            DType::F32 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            DType::F16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            DType::Bf16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        // Coordinates are of 32 bits, with room for boxes that begin before a tensor or end after it.
        let limit = (i32::MAX as usize) / 2;
        if [batch, length, channels].iter().any(|&extent| extent == 0 || extent > limit) {
            return None;
        }
        // The stride of what there is one of is nowhere used, but has to be one.
        let [of_row, of_step] = strides.map(|stride| u64::try_from(stride).ok().filter(|&stride| stride > 0));
        let of_step = if length == 1 { Some(channels as u64) } else { of_step }?;
        let of_row = if batch == 1 { Some(length as u64 * of_step) } else { of_row }?;
        let bytes = [of_step, of_row].map(|stride| stride * size_of::<T>() as u64);
        if bytes.iter().any(|&stride| !stride.is_multiple_of(16) || stride >= 1 << 40) || !data.is_multiple_of(16) {
            return None;
        }
        let extents = [channels, length, batch].map(|extent| extent as u64);
        let boxed = [2, 1, 0].map(|i: usize| box_extents[i] as u32);
        let mut map = MaybeUninit::<CUtensorMap>::uninit();
        // SAFETY: the arrays have as many entries as there are dimensions, strides one less. The driver writes a map and looks at no
        // tensor; that the kernel's boxes lie where there is one is for those who launch it.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                data_type,
                3,
                data as *mut _,
                extents.as_ptr(),
                bytes.as_ptr(),
                boxed.as_ptr(),
                [1; 3].as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        // SAFETY: the driver has written it.
        (result == sys::CUresult::CUDA_SUCCESS).then(|| Self { words: unsafe { map.assume_init() }.opaque })
    }
}
