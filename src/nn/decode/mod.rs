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
pub(crate) use pool::{PoolWrites, check_pools, check_slots, copy, grow, put, reset, take};
pub use sampler::{Sampler, Sampling};

use candle_core::Result;

use crate::nn::argument;

/// Checks that all are tokens of a model's.
fn check_tokens(name: &'static str, tokens: &[u32], vocab_size: usize) -> Result<()> {
    match tokens.iter().enumerate().find(|(_, token)| **token as usize >= vocab_size) {
        None => Ok(()),
        Some((at, token)) => {
            let expected = format_args!("tokens from 0 to {}", vocab_size - 1).to_string();
            Err(argument(name, expected, format_args!("{token} at {at}")))
        }
    }
}
