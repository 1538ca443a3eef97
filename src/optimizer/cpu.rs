//! AdamW on slices: two passes, each on all threads of the current rayon pool.
//!
//! Work is divided into chunks of a parameter's elements, by their number alone.

use half::{bf16, f16};
use rayon::prelude::*;

use super::{Gradient, Moments, Options, Parameter, Status, Values, check, power};
use crate::simd::{Isa, Kernel, Lanes};
use crate::{Element, Result, View, ViewMut};

/// Elements that a task works on.
const CHUNK: usize = 1 << 14;
/// Elements that are widened at a time.
const BLOCK: usize = 1 << 10;
/// Sums that run beside each other.
const SUMS: usize = 16;
/// The scale of losses stays between 1 and this.
const MOST_SCALE: f32 = (1u32 << 30) as f32;

/// What a step multiplies by, and whether it is taken: what [`begin`] finds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Factors {
    norm: f64,
    /// Of the gradients.
    gradient: f32,
    /// One over the root of the correction of mean squares.
    root: f32,
    /// The correction of means.
    correction: f64,
    is_taken: bool,
}

impl Factors {
    /// The norm of all gradients before they were clipped, over the scale of the loss.
    pub fn norm(&self) -> f64 {
        self.norm
    }

    /// Whether all gradients are finite, so that the step is taken.
    pub fn is_taken(&self) -> bool {
        self.is_taken
    }
}

/// The first pass: reads all gradients, and counts the step as taken or skipped.
///
/// # Errors
/// A number that makes no optimizer, and a gradient that is not contiguous in its storage; nothing is counted then.
pub fn begin(options: &Options, gradients: &[Gradient], status: &mut Status) -> Result<Factors> {
    check::begin(options, gradients)?;
    let chunks: Vec<_> = gradients.iter().map(Slice::of).flat_map(|slice| slice.chunks(CHUNK)).collect();
    let isa = Isa::best();
    let sums: Vec<f64> = chunks.into_par_iter().map(|chunk| isa.run(Squares(chunk))).collect();
    let total: f64 = sums.iter().sum();

    let (is_taken, divisor) = (total.is_finite(), f64::from(status.scale) * options.divisor);
    let norm = total.sqrt() / divisor;
    if is_taken {
        status.taken += 1;
        status.streak += 1;
    } else {
        status.skipped += 1;
        status.streak = 0;
    }
    match options.scale_interval {
        Some(_) if !is_taken => status.scale = (status.scale * 0.5).max(1.0),
        Some(interval) if status.streak >= interval.into() => {
            status.scale = (status.scale * 2.0).min(MOST_SCALE);
            status.streak = 0;
        }
        _ => {}
    }
    let shrink = options.clip.map_or(1.0, |clip| if norm > clip { clip / norm } else { 1.0 });
    let [correction, correction2] = [options.beta1, options.beta2].map(|beta| 1.0 - power(beta, status.taken));
    let (gradient, root) = ((shrink / divisor) as f32, (1.0 / correction2.sqrt()) as f32);
    Ok(Factors { norm, gradient, root, correction, is_taken })
}

/// The second pass: takes a step on `parameters`, unless it is skipped. The learning rate is that of the step, of which each
/// group has its part.
///
/// # Errors
/// What does not fit, by the names of the fields, and places that are not in the order of the parameters. Nothing is written
/// then.
pub fn update<'a>(
    options: &Options,
    learning_rate: f64,
    factors: &Factors,
    parameters: impl IntoIterator<Item = Parameter<'a>>,
    moments: Moments,
) -> Result<()> {
    update_with(Isa::best(), options, learning_rate, factors, parameters, moments)
}

/// [`update`] with the instruction set given (plain code if this processor does not have it).
///
/// # Errors
/// As [`update`].
pub fn update_with<'a>(
    isa: Isa,
    options: &Options,
    learning_rate: f64,
    factors: &Factors,
    parameters: impl IntoIterator<Item = Parameter<'a>>,
    moments: Moments,
) -> Result<()> {
    let parameters: Vec<_> = parameters.into_iter().collect();
    check::update(options, learning_rate, &parameters, &moments)?;
    if !factors.is_taken {
        return Ok(());
    }
    let mut tasks = Vec::new();
    let [mut mean, mut mean_square, mut master] =
        [moments.mean, moments.mean_square, moments.master].map(|rest| Rest { rest, at: 0 });
    for parameter in parameters {
        let place = parameter.place;
        let rate = learning_rate * parameter.group.learning_rate;
        let numbers = Numbers {
            gradient: factors.gradient,
            beta1: options.beta1 as f32,
            rest1: (1.0 - options.beta1) as f32,
            beta2: options.beta2 as f32,
            rest2: (1.0 - options.beta2) as f32,
            root: factors.root,
            eps: options.eps as f32,
            rate: (rate / factors.correction) as f32,
            kept: (1.0 - rate * parameter.group.weight_decay) as f32,
        };
        let (values, rounded) = match parameter.values {
            Values::F32(view) => (slice_mut(view), Rounded::Not),
            Values::F16(view) => (master.take(place.master, place.len), Rounded::F16(slice_mut(view))),
            Values::Bf16(view) => (master.take(place.master, place.len), Rounded::Bf16(slice_mut(view))),
        };
        let (mean, mean_square) = (mean.take(place.moments, place.len), mean_square.take(place.moments, place.len));
        let moments = mean.chunks_mut(CHUNK).zip(mean_square.chunks_mut(CHUNK));
        let gradients = Slice::of(&parameter.gradient).chunks(CHUNK);
        let chunks = values.chunks_mut(CHUNK).zip(rounded.chunks(CHUNK)).zip(moments.zip(gradients));
        tasks.extend(chunks.map(|((values, rounded), ((mean, mean_square), gradient))| Task {
            numbers,
            values,
            rounded,
            mean,
            mean_square,
            gradient,
        }));
    }
    tasks.into_par_iter().for_each(|task| isa.run(task));
    Ok(())
}

/// What is left of a buffer from which parts are taken in order.
struct Rest<'a> {
    rest: &'a mut [f32],
    /// Where it begins in the buffer.
    at: usize,
}

impl<'a> Rest<'a> {
    fn take(&mut self, from: usize, len: usize) -> &'a mut [f32] {
        let rest = std::mem::take(&mut self.rest);
        let (part, rest) = rest[from - self.at..].split_at_mut(len);
        (self.rest, self.at) = (rest, from + len);
        part
    }
}

/// The elements of a contiguous view. Those of an empty one may begin anywhere.
fn slice<'a, T: Element>(view: &View<'a, T, 1>) -> &'a [T] {
    match view.shape[0] {
        0 => &[],
        len => &view.data[view.offset..][..len],
    }
}

fn slice_mut<T: Element>(view: ViewMut<'_, T, 1>) -> &mut [T] {
    match view.shape[0] {
        0 => &mut [],
        len => &mut view.data[view.offset..][..len],
    }
}

/// Elements of a gradient.
#[derive(Clone, Copy)]
enum Slice<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl<'a> Slice<'a> {
    fn of(gradient: &Gradient<'a>) -> Self {
        match gradient {
            Gradient::F32(view) => Self::F32(slice(view)),
            Gradient::F16(view) => Self::F16(slice(view)),
            Gradient::Bf16(view) => Self::Bf16(slice(view)),
        }
    }

    fn chunks(self, size: usize) -> Box<dyn Iterator<Item = Self> + 'a> {
        match self {
            Self::F32(slice) => Box::new(slice.chunks(size).map(Self::F32)),
            Self::F16(slice) => Box::new(slice.chunks(size).map(Self::F16)),
            Self::Bf16(slice) => Box::new(slice.chunks(size).map(Self::Bf16)),
        }
    }
}

/// Where rounded values go.
enum Rounded<'a> {
    Not,
    F16(&'a mut [f16]),
    Bf16(&'a mut [bf16]),
}

impl<'a> Rounded<'a> {
    fn chunks(self, size: usize) -> Box<dyn Iterator<Item = Self> + 'a> {
        match self {
            Self::Not => Box::new(std::iter::repeat_with(|| Self::Not)),
            Self::F16(slice) => Box::new(slice.chunks_mut(size).map(Self::F16)),
            Self::Bf16(slice) => Box::new(slice.chunks_mut(size).map(Self::Bf16)),
        }
    }
}

/// The sum of the squares of a chunk. The order of its terms does not depend on the instruction set.
struct Squares<'a>(Slice<'a>);

impl Kernel for Squares<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) -> f64 {
        match self.0 {
            Slice::F32(chunk) => squares(chunk),
            Slice::F16(chunk) => squares(chunk),
            Slice::Bf16(chunk) => squares(chunk),
        }
    }
}

#[inline(always)]
fn squares<T: Element>(chunk: &[T]) -> f64 {
    let mut sums = [0f64; SUMS];
    let mut add = |values: &[f32]| {
        for (sum, x) in sums.iter_mut().zip(values) {
            *sum += f64::from(*x) * f64::from(*x);
        }
    };
    let mut widened = [0f32; BLOCK];
    for block in chunk.chunks(BLOCK) {
        let widened = &mut widened[..block.len()];
        T::widen(block, widened);
        let (whole, rest) = widened.as_chunks::<SUMS>();
        whole.iter().for_each(|values| add(values));
        add(rest);
    }
    sums.iter().sum()
}

/// What all elements of a parameter are multiplied by.
#[derive(Clone, Copy)]
struct Numbers {
    gradient: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    root: f32,
    eps: f32,
    rate: f32,
    kept: f32,
}

/// A chunk of a parameter. `values` are its masters, or the parameter itself if that is of `f32`.
struct Task<'a> {
    numbers: Numbers,
    values: &'a mut [f32],
    rounded: Rounded<'a>,
    mean: &'a mut [f32],
    mean_square: &'a mut [f32],
    gradient: Slice<'a>,
}

impl Kernel for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(mut self, _: S) {
        let mut widened = [0f32; BLOCK];
        for from in (0..self.values.len()).step_by(BLOCK) {
            let part = from..self.values.len().min(from + BLOCK);
            let widened = &mut widened[..part.len()];
            let gradient: &[f32] = match self.gradient {
                Slice::F32(gradient) => &gradient[part.clone()],
                Slice::F16(gradient) => {
                    Element::widen(&gradient[part.clone()], widened);
                    widened
                }
                Slice::Bf16(gradient) => {
                    Element::widen(&gradient[part.clone()], widened);
                    widened
                }
            };
            let values = &mut self.values[part.clone()];
            let (mean, mean_square) = (&mut self.mean[part.clone()], &mut self.mean_square[part.clone()]);
            advance(self.numbers, values, gradient, mean, mean_square);
            match &mut self.rounded {
                Rounded::Not => {}
                Rounded::F16(rounded) => Element::narrow(values, &mut rounded[part]),
                Rounded::Bf16(rounded) => Element::narrow(values, &mut rounded[part]),
            }
        }
    }
}

/// The step itself. Nothing is fused, so that every instruction set, and the kernels, round alike.
#[inline(always)]
fn advance(numbers: Numbers, values: &mut [f32], gradient: &[f32], mean: &mut [f32], mean_square: &mut [f32]) {
    let Numbers { gradient: factor, beta1, rest1, beta2, rest2, root, eps, rate, kept } = numbers;
    let moments = mean.iter_mut().zip(mean_square);
    for ((value, gradient), (mean, mean_square)) in values.iter_mut().zip(gradient).zip(moments) {
        let gradient = gradient * factor;
        *mean = *mean * beta1 + gradient * rest1;
        *mean_square = *mean_square * beta2 + gradient * gradient * rest2;
        let change = *mean / (mean_square.sqrt() * root + eps) * rate;
        *value = *value * kept - change;
    }
}
