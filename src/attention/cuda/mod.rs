//! Attention on NVIDIA GPUs; see [`cuda`](crate::cuda) for how tensors are passed.
//!
//! The rows of a sequence are the queries that read one head of keys, those of a step's heads next to each other. A block takes a tile
//! of rows over all keys that these see, a tile of keys after another, the next one on its way meanwhile; one launch takes the tiles of
//! all sequences and heads. Both products are of the tensor cores. Half types are multiplied as they are, and weights rounded to
//! their type, by which an output is off about as much as by its own rounding; slopes, which add up to zero, are taken in two parts.
//! `f32` is multiplied in two parts, too, as exactly as in `f32`.
//!
//! Where few queries see many keys, as in decoding, the keys are split into pieces of 256 and a second kernel joins them. Sequences are
//! divided each by its own numbers of queries and keys, whatever the device and whatever they are packed or batched with: so they
//! get the same bits. (A query on its own and the same query among many others may be divided otherwise, and differ by roundings.)
//!
//! The backward pass goes twice over everything, for the gradients of queries and for those of keys and values, each of which one block
//! sums in a fixed order. It reads an output of `f32` alone: of half types the mean of a query's slopes is computed again.
//!
//! Tensors may have any strides. Rows are read 16 bytes at a time if they are contiguous, and `d_head` and all other strides are
//! multiples of that; element by element otherwise, and slower. A `d_head` takes the time of the next of 32, 64, 128 and 256.

mod backward;
mod forward;
mod launch;
mod plan;

pub use backward::backward;
#[cfg(feature = "candle-cuda")]
pub(crate) use backward::backward_checked;
pub use forward::forward;
#[cfg(feature = "candle-cuda")]
pub(crate) use forward::forward_checked;
