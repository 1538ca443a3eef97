//! An operator's tensors as kernels take them.

use bytemuck::Zeroable;
use cudarc::driver::CudaSlice;

use super::{Arguments, Cuda, params};
use crate::kinds::{Buffers, Field, Kind, Map, Views};
use crate::{Element, ProjectionOf, Result, View};

/// A tensor on a device: the address of its first element, in bytes, and the distances between neighbours along each
/// dimension, in elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strided<const R: usize> {
    pub data: u64,
    pub strides: [i64; R],
}

/// Tensors by address and strides.
pub(crate) struct DeviceViews;

impl Kind for DeviceViews {
    type Activation<const R: usize> = Strided<R>;
    type Parameter<const R: usize> = Strided<R>;
}

/// Buffers by address.
pub(crate) struct DeviceBuffers;

impl Kind for DeviceBuffers {
    type Activation<const R: usize> = u64;
    type Parameter<const R: usize> = u64;
}

impl<'a, 'v: 'a, T: Element> Map<Views<'v, T, Cuda>, DeviceViews> for Arguments<'a> {
    type Error = crate::Error;

    fn activation<const R: usize>(&mut self, field: Field, view: View<'v, T, R, Cuda>) -> Result<Strided<R>> {
        self.view(field.name, &view)
    }

    fn parameter<const R: usize>(&mut self, field: Field, view: View<'v, f32, R, Cuda>) -> Result<Strided<R>> {
        self.view(field.name, &view)
    }
}

impl<'a, 'b: 'a, T: Element> Map<Buffers<'b, T, Cuda>, DeviceBuffers> for Arguments<'a> {
    type Error = crate::Error;

    fn activation<const R: usize>(&mut self, field: Field, buffer: &'b mut CudaSlice<T>) -> Result<u64> {
        self.write(field.gradient, buffer)
    }

    fn parameter<const R: usize>(&mut self, field: Field, buffer: &'b mut CudaSlice<f32>) -> Result<u64> {
        self.write(field.gradient, buffer)
    }
}

/// What a kernel takes for a tensor that may be absent: zeros, of which the address is null.
pub(crate) fn or_null<X, P: Zeroable + From<X>>(tensor: Option<X>) -> P {
    tensor.map_or_else(P::zeroed, P::from)
}

impl From<Strided<3>> for params::Activation {
    fn from(tensor: Strided<3>) -> Self {
        let [batch, step, channel] = tensor.strides;
        Self { data: tensor.data, batch, step, channel }
    }
}

impl From<Strided<2>> for params::Matrix {
    fn from(tensor: Strided<2>) -> Self {
        let [channel, state] = tensor.strides;
        Self { data: tensor.data, channel, state }
    }
}

impl From<Strided<2>> for params::Rows {
    fn from(tensor: Strided<2>) -> Self {
        let [row, column] = tensor.strides;
        Self { data: tensor.data, row, column }
    }
}

impl From<Strided<1>> for params::Vector {
    fn from(tensor: Strided<1>) -> Self {
        let [channel] = tensor.strides;
        Self { data: tensor.data, channel }
    }
}

impl From<Strided<3>> for params::States {
    fn from(tensor: Strided<3>) -> Self {
        let [sequence, channel, state] = tensor.strides;
        Self { data: tensor.data, sequence, channel, state }
    }
}

impl From<Strided<3>> for params::conv::StateRows {
    fn from(tensor: Strided<3>) -> Self {
        let [sequence, row, channel] = tensor.strides;
        Self { data: tensor.data, sequence, row, channel }
    }
}

impl From<ProjectionOf<Strided<4>, Strided<2>>> for params::Projection {
    fn from(tensor: ProjectionOf<Strided<4>, Strided<2>>) -> Self {
        match tensor {
            ProjectionOf::Varying(Strided { data, strides: [batch, step, group, state] }) => {
                Self { data, batch, step, group, channel: 0, state, constant: 0 }
            }
            ProjectionOf::Constant(Strided { data, strides: [channel, state] }) => {
                Self { data, batch: 0, step: 0, group: 0, channel, state, constant: 1 }
            }
        }
    }
}
