//! What the operators of this module have in common on candle's tensors.

use candle_core::{Device, Result, Tensor};

use crate::Error;

/// Refuses tensors that are not on the processor: nothing here has kernels for a GPU.
pub(crate) fn check_processor(argument: &'static str, tensor: &Tensor) -> Result<()> {
    match tensor.device() {
        Device::Cpu => Ok(()),
        device => Err(elsewhere(argument, device.location()).into()),
    }
}

fn elsewhere(argument: &'static str, location: candle_core::DeviceLocation) -> Error {
    let expected = "a tensor on the processor (linear time-invariant systems have no kernels for GPUs)";
    Error::argument(argument, expected, format_args!("one on {location:?}"))
}
