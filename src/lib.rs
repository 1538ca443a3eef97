//! The selective scan of Mamba (S6), fused: forward and backward, for training, prefill and decoding.
//!
//! | operator | module | what it does |
//! |---|---|---|
//! | selective scan | [`scan`] | runs the recurrence over whole sequences, dense or packed, with gradients |
//! | scan with complex states | [`complex_scan`] | the same with complex `A`, `B` and `C`, with gradients and in place |
//! | state update | [`state_update`] | advances a pool of states by one token or a few, in place |
//! | attention | [`attention`] | causal attention with grouped heads, in blocks, with gradients |
//! | causal convolution | [`conv`] | the short depthwise convolution in front of the scan, with gradients |
//! | gradient of an embedding | [`embedding`] | sums the gradients of the rows that tokens were looked up in |
//! | cross entropy | [`loss`] | the loss of rows of logits, with its gradient in their place |
//! | RMS norm | [`norm`] | the norm between layers, with the residual added and with a gate, with gradients |
//! | AdamW | [`optimizer`] | a step of training over many parameters at once |
//! | linear time-invariant systems | `lti`, a feature | HiPPO, S4 and S4D: kernels, recurrences and long convolutions, with gradients, on processors; S4D on GPUs too |
//!
//! With the features of the same names, the module `candle` has the operators on candle's tensors, with gradients in
//! candle's graph, and the module `nn` the Mamba block, a language model, and layers of S4.
//!
//! Each has a CPU path that is vectorised for AVX-512, AVX2, NEON or plain code, chosen at run time, and runs on the
//! threads of the current rayon pool; and a `float64` reference that is the equations written down, which the rest is
//! tested against. Activations are `f32`, `f16` or `bf16`; parameters and states are `f32`, and so is all arithmetic
//! but that of complex states, which is `f64`.
//!
//! Tensors are [`View`]s: strides over storage that stays the caller's. Channels-last, as projections produce it, is the
//! fast layout; a column slice of a projection's output is such a view and is not copied.
//!
//! ```
//! use selective_scan::{View, scan};
//!
//! // One sequence of 3 steps, 2 channels with 4 states each.
//! let (batch, length, d_inner, d_state) = (1, 3, 2, 4);
//! let u = [1.0f32, -1.0, 0.5, 2.0, 0.0, 1.0];
//! let delta = [0.1f32; 6];
//! let a = [-1.0, -2.0, -3.0, -4.0, -1.0, -2.0, -3.0, -4.0];
//! let (b, c) = ([1.0f32; 12], [0.25f32; 12]);
//! let z = [1.0f32; 6];
//!
//! let activation = [batch, length, d_inner];
//! let inputs = scan::Inputs {
//!     z: Some(View::new(&z, activation)),
//!     options: scan::Options { delta_softplus: true, ..Default::default() },
//!     ..scan::Inputs::new(
//!         View::new(&u, activation),
//!         View::new(&delta, activation),
//!         View::new(&a, [d_inner, d_state]),
//!         View::new(&b, [batch, length, 1, d_state]),
//!         View::new(&c, [batch, length, 1, d_state]),
//!     )
//! };
//! let (output, checkpoints) = inputs.forward_with_checkpoints()?;
//! assert_eq!(output.out.len(), 6);
//! assert_eq!(output.final_state.len(), d_inner * d_state);
//!
//! // The gradients of the sum of all outputs.
//! let gradients = inputs.backward(&checkpoints, View::new(&[1.0f32; 6], activation))?;
//! assert_eq!(gradients.a.len(), d_inner * d_state);
//! # Ok::<(), selective_scan::Error>(())
//! ```
//!
//! # Features
//! | feature | what it adds |
//! |---|---|
//! | none | the operators on slices |
//! | `candle` | the operators on the tensors of [candle](https://docs.rs/candle-core), with gradients: the module `candle` |
//! | `lti` | linear time-invariant systems, which Mamba grew from: the module `lti`, and its operators in `candle` where that is on. A feature because it brings 15 packages, for matrix exponentials, eigenvalues and Fourier transforms |
//! | `nn` | the Mamba block, language models and layers of S4 on candle's tensors: the module `nn`; brings `candle` and `lti` |
//! | `cuda` | the operators on NVIDIA GPUs, on memory of [cudarc](https://docs.rs/cudarc)'s: the module `cuda`, and one of that name in the module of each operator |
//! | `candle-cuda` | the module `candle`, and `nn` where it is on, for tensors on NVIDIA GPUs too; brings `candle`, `cuda` and candle's own `cuda` |
//! | `avx512-gemm` | AVX-512 in candle's matrix products, those of other crates in the program included, whose bits it may change; brings `candle` |
//!
//! With `cuda`, building needs nvcc; running needs a driver, without which a program starts and gets an error when it asks
//! for a GPU. With `candle-cuda` it does not start: candle links the CUDA libraries (the driver, cuBLAS, cuRAND), so that
//! they must be there. `candle` and `cuda` without it are two modules that know nothing of each other.
//!
//! # Promises
//! - Neither pass stores anything for every step, channel and state. Forward keeps one state of each channel for every
//!   64 steps if a backward pass is to follow, else nothing; backward recomputes.
//! - The same inputs give the same bits, on any number of threads, and in every run on the same GPU. What a sequence gets
//!   from an operator does not depend on what it is packed with or, on processors, batched with; only the gradients of
//!   parameters sum over the batch. Of a model this holds within rounding, since candle's matrix products depend on the
//!   number of rows.
//! - Every argument is checked before any work starts. A bad one gives an [`Error`] that names it, and nothing is
//!   written.
//!
//! # Versions
//! Fields may be added in minor releases to the structs of inputs, outputs, options and configurations: end literals and
//! patterns of them with `..`, as in `Options { reverse: true, ..Default::default() }`. The crates whose types stand in the API are exported
//! again: [`half`], and with the features that bring them `candle_core`, `candle_nn` and `cudarc`.

// The README's examples, which need `nn`. That for GPUs is the one of the module `cuda`.
#[cfg(all(doctest, feature = "nn"))]
#[doc = include_str!("../README.md")]
struct Readme;

mod arguments;
pub mod attention;
#[cfg(feature = "candle")]
pub mod candle;
pub mod complex_scan;
pub mod conv;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod decode;
mod element;
pub mod embedding;
mod error;
mod kinds;
pub mod loss;
#[cfg(feature = "lti")]
pub mod lti;
#[cfg(feature = "nn")]
pub mod nn;
pub mod norm;
pub mod optimizer;
mod pool;
mod reference;
pub mod sampling;
pub mod scan;
mod sequences;
mod shared;
mod simd;
pub mod state_update;
mod tasks;
mod view;

#[cfg(feature = "candle")]
pub use candle_core;
#[cfg(feature = "nn")]
pub use candle_nn;
#[cfg(feature = "cuda")]
pub use cudarc;
pub use half;

pub use arguments::{Discretization, MAX_D_STATE, Projection};
pub use element::{DType, Element};
pub use error::{Error, Result};
pub use kinds::{Buffers, Kind, ProjectionOf, Vectors, Views};
pub use pool::{DeviceSlots, Slots};
pub use sequences::count_sequences;
pub use simd::Isa;
pub use view::{Host, Memory, View, ViewMut};
