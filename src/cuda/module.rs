//! The compiled kernels.

use std::hash::{Hash, Hasher};

/// A file of kernels in `kernels/`. Each is a constant of its own, so that a program holds those only that it uses.
#[derive(Clone, Copy)]
pub(crate) struct Module {
    /// Its path, without the extension.
    pub name: &'static str,
    /// What it was compiled to; empty in a build for documentation.
    pub fatbin: &'static [u8],
}

impl PartialEq for Module {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Module {}

impl Hash for Module {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

impl std::fmt::Debug for Module {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(self.name)
    }
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

#[cfg(feature = "candle-cuda")]
modules! {
    CONVERT = "common/convert",
}

#[cfg(feature = "lti")]
modules! {
    S4D_TABLES = "s4d/tables",
    S4D_FORWARD = "s4d/forward",
    S4D_BACKWARD = "s4d/backward",
    S4D_BACKWARD_STATES = "s4d/backward_states",
    S4D_GRADIENTS = "s4d/gradients",
    S4D_UPDATE = "s4d/update",
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
    SCAN_BACKWARD_NARROW = "scan/backward_narrow",
    SCAN_BACKWARD_GENERAL = "scan/backward_general",
    SCAN_BACKWARD_CHUNK_STATE = "scan/backward_chunk_state",
    STATE_UPDATE = "state_update/update",
    COMPLEX_SCAN_FORWARD = "complex_scan/forward",
    COMPLEX_SCAN_BACKWARD = "complex_scan/backward",
    COMPLEX_SCAN_UPDATE = "complex_scan/update",
    ATTENTION_FORWARD = "attention/forward",
    ATTENTION_SPLIT = "attention/split",
    ATTENTION_BACKWARD_QUERIES = "attention/backward_queries",
    ATTENTION_BACKWARD_KEYS = "attention/backward_keys",
    CONV_FORWARD = "conv/forward",
    CONV_BACKWARD = "conv/backward",
    CONV_UPDATE = "conv/update",
    DECODE_LAYERS = "decode/layers",
    DECODE_LINEAR = "decode/linear",
    DECODE_PROJECTED = "decode/projected",
    DECODE_UPDATE = "decode/update",
    LOSS_CROSS_ENTROPY = "loss/cross_entropy",
    NORM_FORWARD = "norm/forward",
    NORM_BACKWARD = "norm/backward",
    EMBEDDING_LOOKUP = "embedding/lookup",
    EMBEDDING_SORT = "embedding/sort",
    EMBEDDING_SUM = "embedding/sum",
    OPTIMIZER_SQUARES = "optimizer/squares",
    OPTIMIZER_BEGIN = "optimizer/begin",
    OPTIMIZER_UPDATE = "optimizer/update",
    SAMPLING_MAXIMUM = "sampling/maximum",
    SAMPLING_CHOOSE = "sampling/choose",
}
