//! The only checks of a loss's arguments, on any memory.

use super::{Inputs, InputsMut, Options};
use crate::view::check_len;
use crate::{Element, Error, Memory, Result, View, ViewMut};

const NAMES: &str = "(rows, vocab)";

/// The sizes of arguments that have been checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem {
    pub rows: usize,
    pub vocab: usize,
    /// Where the first row starts, and the distance from one to the next.
    pub offset: usize,
    pub stride: usize,
    pub options: Options,
    /// What the gradient is multiplied by, if there is to be one.
    pub scale: Option<f32>,
}

impl<T: Element, M: Memory> Inputs<'_, T, M> {
    /// Checks every argument but the buffer of the losses.
    pub(crate) fn check(&self) -> Result<Problem> {
        let View { offset, shape, strides, .. } = self.logits;
        self.logits.check("logits", NAMES, shape)?;
        Problem { offset, options: self.options, ..Problem::check::<M>(shape, strides, self.targets)? }.check_options()
    }
}

impl<T: Element, M: Memory> InputsMut<'_, T, M> {
    /// Checks every argument but the buffer of the losses.
    pub(crate) fn check(&self) -> Result<Problem> {
        let ViewMut { offset, shape, strides, .. } = self.logits;
        self.logits.check("logits", NAMES, shape)?;
        let problem = Problem::check::<M>(shape, strides, self.targets)?;
        Problem { offset, options: self.options, scale: Some(self.scale), ..problem }.check_options()
    }
}

impl Problem {
    fn check<M: Memory>([rows, vocab]: [usize; 2], strides: [usize; 2], targets: &M::Tokens) -> Result<Self> {
        // Kernels index a row by 32 bits.
        if vocab == 0 || vocab > i32::MAX as usize {
            let expected = format_args!("from 1 to {} logits in a row", i32::MAX).to_string();
            return Err(Error::argument("logits", expected, format_args!("shape {:?}", [rows, vocab])));
        }
        if strides[1] != 1 && vocab > 1 && rows > 0 {
            let got = format_args!("strides {strides:?}").to_string();
            return Err(Error::argument("logits", "logits of a row that are neighbours in memory", got));
        }
        if rows.checked_mul(vocab).is_none_or(|count| count > isize::MAX as usize) {
            return Err(Error::argument(
                "logits",
                "fewer than 2^63 elements",
                format_args!("shape {:?}", [rows, vocab]),
            ));
        }
        check_len("targets", "(rows)", &[rows], M::token_count(targets))?;
        Ok(Self { rows, vocab, offset: 0, stride: strides[0], options: Options::default(), scale: None })
    }

    fn check_options(self) -> Result<Self> {
        let Options { label_smoothing, z_loss } = self.options;
        if !(0.0..=1.0).contains(&label_smoothing) {
            return Err(Error::argument("label_smoothing", "a number from 0 to 1", label_smoothing));
        }
        if !(z_loss >= 0.0 && z_loss.is_finite()) {
            return Err(Error::argument("z_loss", "a finite number of 0 or more", z_loss));
        }
        match self.scale {
            Some(scale) if !scale.is_finite() => Err(Error::argument("scale", "a finite number", scale)),
            _ => Ok(self),
        }
    }

    /// Checks the buffer of the losses.
    pub fn check_losses(&self, len: usize) -> Result<()> {
        check_len("losses", "(rows)", &[self.rows], len)
    }
}
