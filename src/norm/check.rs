//! The only checks of a norm's arguments, on any memory.

use super::{BackwardInputs, GradientsMut, Inputs, Options, OutputMut};
use crate::view::check_len;
use crate::{DType, Element, Error, Host, Memory, Result, View};

pub(super) const ROWS: &str = "(rows, width)";
pub(super) const WEIGHT: &str = "(width)";

/// Checks what is added to a mean of squares.
pub(crate) fn check_eps(eps: f64) -> Result<()> {
    if eps >= 0.0 && eps.is_finite() {
        return Ok(());
    }
    Err(Error::argument("eps", "0 or more, and finite", eps))
}

/// The sizes of a checked problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub rows: usize,
    pub width: usize,
    /// The columns that are normed together.
    pub group_size: usize,
}

impl Sizes {
    /// Checks the sizes that a tensor and the options give.
    fn check<T: Element, M: Memory>(argument: &'static str, view: &View<T, 2, M>, options: &Options) -> Result<Self> {
        let [rows, width] = view.shape;
        if width == 0 {
            return Err(Error::argument(argument, "at least one column", format_args!("shape {:?}", view.shape)));
        }
        if rows.checked_mul(width).is_none_or(|count| count > isize::MAX as usize) {
            return Err(Error::argument(argument, "fewer than 2^63 elements", format_args!("shape {:?}", view.shape)));
        }
        let Options { eps, group_size, .. } = *options;
        check_eps(eps)?;
        let group_size = group_size.unwrap_or(width);
        if group_size == 0 || !width.is_multiple_of(group_size) {
            return Err(Error::argument("group_size", format_args!("a divisor of the width, {width}"), group_size));
        }
        Ok(Self { rows, width, group_size })
    }

    pub fn groups(&self) -> usize {
        self.width / self.group_size
    }

    fn shape(&self) -> [usize; 2] {
        [self.rows, self.width]
    }
}

/// Checks the types that go together.
fn check_types(x: DType, (stream, s): (&'static str, DType), (out, o): (&'static str, DType)) -> Result<()> {
    if s != DType::F32 && s != x {
        return Err(Error::argument(stream, format_args!("f32 or {x:?}, the type of `x`"), format_args!("{s:?}")));
    }
    if o != x && x != DType::F32 {
        return Err(Error::argument(out, format_args!("{x:?}, the type of `x`"), format_args!("{o:?}")));
    }
    Ok(())
}

impl<'a, X: Element, S: Element, M: Memory> Inputs<'a, X, S, M> {
    /// Checks every argument. This is the only place that does; all implementations read what it returns.
    pub(crate) fn check<O: Element>(&self) -> Result<Problem<'a, X, S, M>> {
        let sizes = Sizes::check("x", &self.x, &self.options)?;
        check_types(X::DTYPE, ("residual", S::DTYPE), ("out", O::DTYPE))?;
        self.x.check("x", ROWS, sizes.shape())?;
        if let Some(view) = &self.residual {
            view.check("residual", ROWS, sizes.shape())?;
        }
        if let Some(view) = &self.weight {
            view.check("weight", WEIGHT, [sizes.width])?;
        }
        if let Some(view) = &self.z {
            view.check("z", ROWS, sizes.shape())?;
        }
        Ok(Problem { inputs: *self, sizes })
    }
}

impl<'a, X: Element, S: Element, O: Element, M: Memory> BackwardInputs<'a, X, S, O, M> {
    /// Checks every argument, as [`Inputs::check`] does.
    pub(crate) fn check(&self) -> Result<BackwardProblem<'a, X, S, O, M>> {
        let sizes = Sizes::check("s", &self.s, &self.options)?;
        check_types(X::DTYPE, ("s", S::DTYPE), ("d_out", O::DTYPE))?;
        self.s.check("s", ROWS, sizes.shape())?;
        if let Some(view) = &self.weight {
            view.check("weight", WEIGHT, [sizes.width])?;
        }
        if let Some(view) = &self.z {
            view.check("z", ROWS, sizes.shape())?;
        }
        self.d_out.check("d_out", ROWS, sizes.shape())?;
        if let Some(view) = &self.d_residual_out {
            view.check("d_residual_out", ROWS, sizes.shape())?;
        }
        Ok(BackwardProblem { inputs: *self, sizes })
    }
}

/// Inputs that have passed [`Inputs::check`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a, X: Element, S: Element, M: Memory = Host> {
    pub inputs: Inputs<'a, X, S, M>,
    pub sizes: Sizes,
}

impl<X: Element, S: Element, M: Memory> Problem<'_, X, S, M> {
    /// Checks what a forward pass writes.
    pub fn check_outputs<O: Element>(&self, outputs: &OutputMut<S, O, M>) -> Result<()> {
        check_len("out", ROWS, &self.sizes.shape(), M::len(outputs.out))?;
        match &outputs.residual_out {
            Some(buffer) => check_len("residual_out", ROWS, &self.sizes.shape(), M::len(buffer)),
            None => Ok(()),
        }
    }
}

/// Inputs that have passed [`BackwardInputs::check`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct BackwardProblem<'a, X: Element, S: Element, O: Element, M: Memory = Host> {
    pub inputs: BackwardInputs<'a, X, S, O, M>,
    pub sizes: Sizes,
}

impl<X: Element, S: Element, O: Element, M: Memory> BackwardProblem<'_, X, S, O, M> {
    /// Checks what a backward pass writes.
    pub fn check_gradients(&self, gradients: &GradientsMut<X, S, M>) -> Result<()> {
        let shape = self.sizes.shape();
        if let Some(buffer) = &gradients.x {
            check_len("gradients.x", ROWS, &shape, M::len(buffer))?;
        }
        if let Some(buffer) = &gradients.residual {
            check_len("gradients.residual", ROWS, &shape, M::len(buffer))?;
        }
        if let Some(buffer) = &gradients.weight {
            check_len("gradients.weight", WEIGHT, &shape[1..], M::len(buffer))?;
        }
        match (&gradients.z, &self.inputs.z) {
            (Some(_), None) => Err(Error::argument("gradients.z", "none, since the input is absent", "a buffer")),
            (Some(buffer), Some(_)) => check_len("gradients.z", ROWS, &shape, M::len(buffer)),
            (None, _) => Ok(()),
        }
    }
}
