//! AdamW over many parameters at once (Loshchilov and Hutter 2019, arXiv 1711.05101), with clipping by the norm of all
//! gradients and masters of parameters in half types.
//!
//! A step over parameters `w` with gradients `g`, all arithmetic in `f32` but where it says otherwise:
//!
//! ```text
//! g   ← g / (scale · divisor)
//! norm = √(Σ g²)                                            of all parameters together, summed in f64 in a fixed order
//! g   ← g · min(1, clip / norm)
//! m   ← β1 m + (1 - β1) g          v ← β2 v + (1 - β2) g²
//! w   ← (1 - η λ) w - η/(1 - β1^t) · m / (√v / √(1 - β2^t) + ε)
//! ```
//!
//! `t` counts the steps that were taken, this one included; `η` is the learning rate, times that of the parameter's
//! [`Group`], whose weight decay is `λ`. `scale` is what the loss was multiplied by before its gradients were taken, so that
//! those of a model in `f16` do not vanish; it is 1 unless [`Status`] says otherwise.
//!
//! A parameter of `f32` is stepped where it lies. One of a half type has a master in `f32`, which is stepped, and of which
//! the parameter is the rounded value after each step: steps below half an epsilon of the parameter add up there.
//!
//! # Gradients that are not finite
//! If any gradient is infinite or not a number, the step is skipped: no parameter, moment or master changes, and
//! [`Status::skipped`] counts it. With [`Options::scale_interval`] the scale of the next loss is halved then, and doubled
//! after so many steps in a row that were taken, between 1 and 2^30 (Micikevicius et al. 2018, arXiv 1710.03740).
//!
//! # Two passes
//! The first, `begin`, reads all gradients and gives what the step multiplies by; the second, `update`, changes parameters,
//! all at once or some after others, each once. On GPUs neither waits for the device: norm, clipping, counts and scale stay
//! there. The bits are the same on any number of threads, with any instruction set, and in every run on a GPU, which sums the
//! norm in another order than processors and else rounds as they do.
//!
//! ```
//! use selective_scan::optimizer::{cpu, *};
//! use selective_scan::{DType, View, ViewMut};
//!
//! let (mut w, g) = ([1.0f32, -2.0], [0.5f32, 0.25]);
//! let layout = Layout::new([(DType::F32, w.len())])?;
//! let (mut mean, mut mean_square) = (vec![0.0; layout.moments], vec![0.0; layout.moments]);
//! let (options, mut status) = (Options::default(), Status::default());
//!
//! let gradient = Gradient::F32(View::new(&g, [2]));
//! let factors = cpu::begin(&options, &[gradient], &mut status)?;
//! let group = Group { learning_rate: 1.0, weight_decay: 0.0 };
//! let parameter = Parameter { values: Values::F32(ViewMut::new(&mut w, [2])), gradient, place: layout.places[0], group };
//! let moments = Moments { mean: &mut mean[..], mean_square: &mut mean_square[..], master: &mut [][..] };
//! cpu::update(&options, 0.1, &factors, [parameter], moments)?;
//! // The first step is as long as the learning rate, whatever the gradient's size.
//! assert!((w[0] - 0.9).abs() < 1e-6 && (w[1] + 2.1).abs() < 1e-6);
//! assert!((factors.norm() - 0.3125f64.sqrt()).abs() < 1e-12);
//! # Ok::<(), selective_scan::Error>(())
//! ```

#[cfg(feature = "candle")]
pub(crate) mod candle;
mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;

use half::{bf16, f16};

use crate::{DType, Element, Error, Host, Memory, Result, View, ViewMut};

/// What a step computes with, beside the learning rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// The share of the mean of gradients that a step keeps, 0.9.
    pub beta1: f64,
    /// The share of the mean of their squares that a step keeps, 0.95.
    pub beta2: f64,
    /// Added to the root of the mean of squares, 1e-8.
    pub eps: f64,
    /// Gradients whose norm, all together, is above this are shrunk to it.
    pub clip: Option<f64>,
    /// After so many steps in a row that were taken the scale of losses doubles, and after a skipped one it is halved. Without
    /// it, by default, the scale stays as it is.
    pub scale_interval: Option<u32>,
    /// What gradients are divided by, beside the scale: 1, or more where they are sums over parts of a batch.
    pub divisor: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, clip: None, scale_interval: None, divisor: 1.0 }
    }
}

/// How the parameters of a group are trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// What the learning rate of a step is multiplied by.
    pub learning_rate: f64,
    /// How much decays in a step, for a learning rate of 1.
    pub weight_decay: f64,
}

/// What is kept from step to step beside the moments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Status {
    /// Steps that were taken.
    pub taken: u64,
    /// Steps that were skipped, as a gradient was not finite.
    pub skipped: u64,
    /// Steps taken since one was skipped or the scale was changed.
    pub streak: u64,
    /// What the loss of the next step is to be multiplied by, a power of two.
    pub scale: f32,
}

impl Default for Status {
    fn default() -> Self {
        Self { taken: 0, skipped: 0, streak: 0, scale: 1.0 }
    }
}

/// Where the moments of a parameter, and its master, are among those of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The parameter's elements.
    pub len: usize,
    /// The first of its means, and of its mean squares.
    pub moments: usize,
    /// The first element of its master. It has none if it is of `f32`, and this is where the next begins.
    pub master: usize,
}

/// How moments and masters of many parameters lie one after another, each at a multiple of four elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// One for each parameter.
    pub places: Vec<Place>,
    /// The elements of all means, which is that of all mean squares.
    pub moments: usize,
    /// The elements of all masters.
    pub masters: usize,
}

impl Layout {
    /// That of parameters of these types and numbers of elements.
    ///
    /// # Errors
    /// More elements than can be counted.
    pub fn new(parameters: impl IntoIterator<Item = (DType, usize)>) -> Result<Self> {
        let mut layout = Self { places: Vec::new(), moments: 0, masters: 0 };
        for (dtype, len) in parameters {
            layout.places.push(Place { len, moments: layout.moments, master: layout.masters });
            let next = |from: usize| {
                let end = len.checked_next_multiple_of(4).and_then(|len| from.checked_add(len));
                end.filter(|&end| end <= isize::MAX as usize / 4)
                    .ok_or_else(|| Error::argument("parameters", "fewer elements than memory can hold", len))
            };
            layout.moments = next(layout.moments)?;
            if dtype != DType::F32 {
                layout.masters = next(layout.masters)?;
            }
        }
        Ok(layout)
    }
}

/// A gradient, contiguous, with one dimension: of `f32` or of the parameter's type.
#[derive(Debug, Clone, Copy)]
pub enum Gradient<'a, M: Memory = Host> {
    /// Of `f32`.
    F32(View<'a, f32, 1, M>),
    /// Of `f16`.
    F16(View<'a, f16, 1, M>),
    /// Of `bf16`.
    Bf16(View<'a, bf16, 1, M>),
}

/// The values of a parameter, contiguous, with one dimension.
#[derive(Debug)]
pub enum Values<'a, M: Memory = Host> {
    /// Of `f32`.
    F32(ViewMut<'a, f32, 1, M>),
    /// Of `f16`.
    F16(ViewMut<'a, f16, 1, M>),
    /// Of `bf16`.
    Bf16(ViewMut<'a, bf16, 1, M>),
}

/// A parameter in a step.
#[derive(Debug)]
pub struct Parameter<'a, M: Memory = Host> {
    /// Its values.
    pub values: Values<'a, M>,
    /// Its gradient, which was among those that `begin` read.
    pub gradient: Gradient<'a, M>,
    /// Where its moments are.
    pub place: Place,
    /// How it is trained.
    pub group: Group,
}

/// The moments of all parameters, zero at first, and the masters of those of half types, at first their values; see
/// [`Layout`].
#[derive(Debug)]
pub struct Moments<'a, M: Memory = Host> {
    /// Running means of gradients.
    pub mean: &'a mut M::Buffer<f32>,
    /// Running means of their squares.
    pub mean_square: &'a mut M::Buffer<f32>,
    /// Parameters before they were rounded.
    pub master: &'a mut M::Buffer<f32>,
}

/// Evaluates an expression on the view that an enum of element types holds.
macro_rules! for_view {
    ($enum:ident, $value:expr, |$view:ident| $body:expr) => {
        match $value {
            $crate::optimizer::$enum::F32($view) => $body,
            $crate::optimizer::$enum::F16($view) => $body,
            $crate::optimizer::$enum::Bf16($view) => $body,
        }
    };
}
use for_view;

fn dtype_of<T: Element, M: Memory>(_: &View<'_, T, 1, M>) -> DType {
    T::DTYPE
}

impl<M: Memory> Gradient<'_, M> {
    /// The element type.
    pub fn dtype(&self) -> DType {
        for_view!(Gradient, self, |view| dtype_of(view))
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        for_view!(Gradient, self, |view| view.shape[0])
    }
}

impl<M: Memory> Values<'_, M> {
    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::Bf16(_) => DType::Bf16,
        }
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        for_view!(Values, self, |view| view.shape[0])
    }
}

/// `base` to the power `n`, by products in a fixed order, which the kernels take too.
fn power(mut base: f64, mut n: u64) -> f64 {
    let mut result = 1.0;
    while n > 0 {
        if n % 2 == 1 {
            result *= base;
        }
        base *= base;
        n /= 2;
    }
    result
}
