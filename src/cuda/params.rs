//! What kernels take and how they are launched, as the files `kernels/*/params.cuh` say: build.rs reads them and writes the same
//! structs and constants for Rust, a module for each namespace. Addresses are in bytes, strides in elements.

use bytemuck::Zeroable;

use super::{Arguments, Cuda};
use crate::{Element, Result, View, ViewMut};

#[allow(dead_code, reason = "some constants are for the kernels alone")]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/params.rs"));
}

pub(crate) use generated::common::*;
pub(crate) use generated::{conv, scan, state_update};

/// The reader of those files, for its tests.
#[cfg(test)]
#[path = "../../kernels/params.rs"]
mod reader;

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
    pub fn activation<T: Element>(
        &mut self,
        argument: &'static str,
        view: &View<'a, T, 3, Cuda>,
    ) -> Result<Activation> {
        let (data, [batch, step, channel]) = self.view(argument, view)?;
        Ok(Activation { data, batch, step, channel })
    }

    pub fn optional_activation<T: Element>(
        &mut self,
        argument: &'static str,
        view: &Option<View<'a, T, 3, Cuda>>,
    ) -> Result<Activation> {
        view.as_ref().map_or(Ok(Activation::zeroed()), |view| self.activation(argument, view))
    }

    pub fn matrix(&mut self, argument: &'static str, view: &View<'a, f32, 2, Cuda>) -> Result<Matrix> {
        let (data, [channel, state]) = self.view(argument, view)?;
        Ok(Matrix { data, channel, state })
    }

    pub fn vector(&mut self, argument: &'static str, view: &Option<View<'a, f32, 1, Cuda>>) -> Result<Vector> {
        let Some(view) = view else { return Ok(Vector::zeroed()) };
        let (data, [channel]) = self.view(argument, view)?;
        Ok(Vector { data, channel })
    }

    pub fn states(&mut self, argument: &'static str, view: &Option<View<'a, f32, 3, Cuda>>) -> Result<States> {
        let Some(view) = view else { return Ok(States::zeroed()) };
        let (data, [sequence, channel, state]) = self.view(argument, view)?;
        Ok(States { data, sequence, channel, state })
    }

    pub fn projection<T: Element>(
        &mut self,
        argument: &'static str,
        projection: &crate::Projection<'a, T, Cuda>,
    ) -> Result<Projection> {
        match projection {
            crate::Projection::Varying(view) => {
                let (data, [batch, step, group, state]) = self.view(argument, view)?;
                Ok(Projection { data, batch, step, group, channel: 0, state, constant: 0 })
            }
            crate::Projection::Constant(view) => {
                let (data, [channel, state]) = self.view(argument, view)?;
                Ok(Projection { data, batch: 0, step: 0, group: 0, channel, state, constant: 1 })
            }
        }
    }

    /// The pool of an update, to be read and written.
    pub fn pool<St: Element>(&mut self, argument: &'static str, view: ViewMut<'a, St, 3, Cuda>) -> Result<Pool> {
        let data = self.write(argument, view.data)?;
        let [slot, row, column] = view.strides.map(|stride| stride as i64);
        // A view of no elements may start anywhere.
        Ok(Pool { data: data.wrapping_add((view.offset * size_of::<St>()) as u64), slot, row, column })
    }

    /// The states of a convolution.
    pub fn state_rows(
        &mut self,
        argument: &'static str,
        view: &Option<View<'a, f32, 3, Cuda>>,
    ) -> Result<conv::StateRows> {
        let Some(view) = view else { return Ok(conv::StateRows::zeroed()) };
        let (data, [sequence, row, channel]) = self.view(argument, view)?;
        Ok(conv::StateRows { data, sequence, row, channel })
    }
}
