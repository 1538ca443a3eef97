//! What runs a problem.

use selective_scan::Isa;

/// A fast path.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Device {
    Cpu(Isa),
    #[cfg(feature = "cuda")]
    Cuda(selective_scan::scan::cuda::Plan),
}

impl Device {
    /// The device that results are usually taken from.
    pub fn best() -> Self {
        Self::Cpu(Isa::best())
    }

    /// All that this machine has.
    pub fn all() -> Vec<Self> {
        Isa::available().map(Self::Cpu).collect()
    }
}
