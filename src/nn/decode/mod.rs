//! What decoding needs beside a model: the states that it carries, and the choice of tokens.

mod cache;
mod pool;
mod sampler;

pub use cache::Cache;
pub(crate) use pool::{check_pools, check_slots, copy, grow, put, reset, take};
pub use sampler::{Sampler, Sampling};
