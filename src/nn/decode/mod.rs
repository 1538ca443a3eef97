//! Decoding: the states that a model carries, its steps over fixed buffers, and the choice of tokens.

mod beams;
mod cache;
mod decoder;
mod draft;
mod generator;
mod pool;
mod sampler;

pub use beams::{Found, SearchOptions};
pub use cache::Cache;
pub use decoder::{Decoder, DecoderOptions};
pub use draft::Draft;
pub use generator::{Event, FinishReason, Generator, GeneratorOptions, Request};
pub(crate) use pool::{check_pools, check_slots, copy, grow, put, reset, take};
pub use sampler::{Sampler, Sampling};
