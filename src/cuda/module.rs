//! The compiled kernels.

macro_rules! modules {
    ($($module:ident = $name:literal),* $(,)?) => {
        /// A file of kernels in `kernels/`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub(crate) enum Module {
            $($module,)*
        }

        impl Module {
            /// Its path, without the extension.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$module => $name,)*
                }
            }

            /// What it was compiled to; empty in a build for documentation.
            pub fn fatbin(self) -> &'static [u8] {
                match self {
                    $(Self::$module => include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")),)*
                }
            }
        }
    };
}

modules! {
    Upload = "common/upload",
    ReducePartials = "common/reduce_partials",
    Rollback = "common/rollback",
    ScanForward = "scan/forward",
    ScanForwardGeneral = "scan/forward_general",
    ScanForwardFewChannels = "scan/forward_few_channels",
    ScanChunkState = "scan/chunk_state",
    ScanBackward = "scan/backward",
    ScanBackwardGeneral = "scan/backward_general",
    ScanBackwardChunkState = "scan/backward_chunk_state",
    StateUpdate = "state_update/update",
    ConvForward = "conv/forward",
    ConvBackward = "conv/backward",
    ConvUpdate = "conv/update",
}
