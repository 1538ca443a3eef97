//! The same by a kernel and Fourier transforms, as S4D is trained elsewhere: the convolutional view.

use std::sync::Arc;

use rayon::prelude::*;
use realfft::num_complex::Complex32;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};

use super::tables::Tables;
use super::{Block, Inputs, OutputMut, Problem, Wide, all_sequences, blocks};
use crate::lti::complex::exp_steps;
use crate::lti::fft::transform_len;
use crate::sequences::Sequence;
use crate::shared::Shared;
use crate::simd::{BLOCK, Row};
use crate::{Element, Result};
