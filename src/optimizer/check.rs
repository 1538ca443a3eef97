//! The only checks of a step's arguments, on any memory.

use super::{Gradient, Group, Moments, Options, Parameter, for_view};
use crate::{DType, Error, Memory, Result};

pub(super) fn not_negative(argument: &'static str, value: f64) -> Result<()> {
    if value >= 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(Error::argument(argument, "a finite number, 0 or more", value))
}

impl Options {
    /// Checks the numbers that a step computes with.
    ///
    /// # Errors
    /// One that makes no optimizer, by name.
    pub fn check(&self) -> Result<()> {
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::argument(name, "0 or more and below 1", beta));
            }
        }
        not_negative("eps", self.eps)?;
        if let Some(clip) = self.clip
            && !(clip > 0.0 && clip.is_finite())
        {
            return Err(Error::argument("clip", "a norm above 0", clip));
        }
        if !(self.divisor > 0.0 && self.divisor.is_finite()) {
            return Err(Error::argument("divisor", "a finite number above 0", self.divisor));
        }
        match self.scale_interval {
            Some(0) => Err(Error::argument("scale_interval", "1 step or more", 0)),
            _ => Ok(()),
        }
    }
}

impl Group {
    /// Checks the numbers of a group.
    ///
    /// # Errors
    /// One that is negative or not finite, by name.
    pub fn check(&self) -> Result<()> {
        not_negative("learning_rate", self.learning_rate)?;
        not_negative("weight_decay", self.weight_decay)
    }
}

/// What is one element beside the other.
fn contiguous(argument: &'static str, stride: usize, len: usize) -> Result<()> {
    if stride == 1 || len < 2 {
        return Ok(());
    }
    Err(Error::argument(argument, "contiguous elements", format_args!("elements {stride} apart")))
}

/// Checks what the first pass reads.
pub(super) fn begin<M: Memory>(options: &Options, gradients: &[Gradient<'_, M>]) -> Result<()> {
    options.check()?;
    gradients.iter().try_for_each(gradient)
}

fn gradient<M: Memory>(gradient: &Gradient<'_, M>) -> Result<()> {
    for_view!(Gradient, gradient, |view| {
        view.check("gradient", "(elements)", view.shape)?;
        contiguous("gradient", view.strides[0], view.shape[0])
    })
}

/// Checks what the second pass reads and writes: moments and masters of each parameter come after those of the one before, so
/// that no two share any.
pub(super) fn update<M: Memory>(
    options: &Options,
    learning_rate: f64,
    parameters: &[Parameter<'_, M>],
    moments: &Moments<'_, M>,
) -> Result<()> {
    options.check()?;
    not_negative("learning_rate", learning_rate)?;
    let lens = [("mean", M::len::<f32>(moments.mean)), ("mean_square", M::len::<f32>(moments.mean_square))];
    let masters = M::len::<f32>(moments.master);
    let (mut moment, mut master) = (0, 0);
    for parameter in parameters {
        parameter.group.check()?;
        gradient(&parameter.gradient)?;
        let place = parameter.place;
        for_view!(Values, &parameter.values, |view| {
            view.check("values", "(elements)", [place.len])?;
            contiguous("values", view.strides[0], place.len)?;
        });
        let (dtype, found) = (parameter.values.dtype(), parameter.gradient.dtype());
        if found != DType::F32 && found != dtype {
            return Err(Error::argument("gradient", format_args!("F32 or {dtype:?}"), format_args!("{found:?}")));
        }
        if parameter.gradient.elements() != place.len {
            let got = format_args!("{}", parameter.gradient.elements()).to_string();
            return Err(Error::argument("gradient", format_args!("{} elements, as the parameter", place.len), got));
        }
        let next = |argument: &'static str, from: usize, before: usize, len: usize| {
            let end = from.checked_add(place.len).filter(|&end| from >= before && end <= len);
            let expected = || format!("{} elements from {before} or after in a buffer of {len}", place.len);
            end.ok_or_else(|| Error::argument(argument, expected(), format_args!("those from {from} on")))
        };
        for (name, len) in lens {
            next(name, place.moments, moment, len)?;
        }
        moment = place.moments + place.len;
        if dtype != DType::F32 {
            master = next("master", place.master, master, masters)?;
        }
    }
    Ok(())
}
