//! What kernels take and how they are launched, as the files `kernels/*/params.cuh` say: build.rs reads them and writes the same
//! structs and constants for Rust, a module for each namespace. Addresses are in bytes, strides in elements.

use super::{Arguments, Cuda};
use crate::{DType, Element, Result, ViewMut};

#[allow(dead_code, reason = "some constants are for the kernels alone")]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/params.rs"));
}

pub(crate) use generated::common::*;
#[cfg(feature = "lti")]
pub(crate) use generated::s4d;
pub(crate) use generated::{
    attention, complex_scan, conv, decode, embedding, loss, optimizer, rms_norm, sampling, scan, state_update,
};

/// The reader of those files, for its tests.
#[cfg(test)]
#[path = "../../kernels/params.rs"]
mod reader;

/// The type of elements, for a kernel that is not made for one.
pub(crate) fn type_code(dtype: DType) -> i64 {
    match dtype {
        DType::F32 => TYPE_F32,
        DType::F16 => TYPE_F16,
        DType::Bf16 => TYPE_BF16,
    }
}

/// The flags that are set.
pub(crate) fn flags<const N: usize>(flags: [(bool, u64); N]) -> u64 {
    flags.into_iter().filter(|(is_set, _)| *is_set).fold(0, |all, (_, flag)| all | flag)
}

macro_rules! with_inputs {
    ($($name:ty),*) => {$(
        impl AsMut<scan::Inputs> for $name {
            fn as_mut(&mut self) -> &mut scan::Inputs {
                &mut self.inputs
            }
        }
    )*};
}

with_inputs!(scan::Forward, scan::Backward);

impl Upload {
    pub fn zeroed_boxed() -> Box<Self> {
        bytemuck::allocation::zeroed_box()
    }
}

impl<'a> Arguments<'a> {
    /// The pool of an update, to be read and written.
    pub fn pool<St: Element>(&mut self, argument: &'static str, view: ViewMut<'a, St, 3, Cuda>) -> Result<Pool> {
        let data = self.write(argument, view.data)?;
        let [slot, row, column] = view.strides.map(|stride| stride as i64);
        // A view of no elements may start anywhere.
        Ok(Pool { data: data.wrapping_add((view.offset * size_of::<St>()) as u64), slot, row, column })
    }
}
