//! What the operators without kernels for GPUs have in common on candle's tensors.

use candle_core::{Device, Result, Tensor};

use crate::Error;

/// Refuses tensors that are not on the processor.
pub(crate) fn check_processor(argument: &'static str, tensor: &Tensor) -> Result<()> {
    match tensor.device() {
        Device::Cpu => Ok(()),
        device => Err(elsewhere(argument, device.location()).into()),
    }
}

fn elsewhere(argument: &'static str, location: candle_core::DeviceLocation) -> Error {
    let expected = "a tensor on the processor (of linear time-invariant systems S4D alone runs on GPUs)";
    Error::argument(argument, expected, format_args!("one on {location:?}"))
}
