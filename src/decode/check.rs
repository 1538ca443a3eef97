//! The only checks of the arguments, on any memory.

use super::{Columns, Linear, LinearMut, SelectiveUpdate, SelectiveUpdateMut};
use crate::conv::{POOL_NAMES, WIDTHS};
use crate::norm::check_eps;
use crate::state_update::STATE_NAMES;
use crate::view::check_len;
use crate::{DType, Element, Error, Host, MAX_D_STATE, Memory, Result};

/// The sizes of a checked product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LinearSizes {
    pub rows: usize,
    pub features: usize,
    pub out_features: usize,
    /// The channels and the width of the convolution, none of them without one.
    pub conv: [usize; 2],
}

/// A product whose inputs have been checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LinearProblem<'a, X: Element, T: Element, M: Memory = Host> {
    pub inputs: Linear<'a, X, T, M>,
    pub sizes: LinearSizes,
}

/// Checks that a type is `T` or `f32`.
fn check_type<T: Element>(argument: &'static str, got: DType) -> Result<()> {
    if got == T::DTYPE || got == DType::F32 {
        return Ok(());
    }
    Err(Error::argument(argument, format_args!("f32 or {:?}, the type of `weight`", T::DTYPE), format_args!("{got:?}")))
}

impl<'a, X: Element, T: Element, M: Memory> Linear<'a, X, T, M> {
    /// Checks every argument but those of [`LinearProblem::check_outputs`].
    pub(crate) fn check(&self) -> Result<LinearProblem<'a, X, T, M>> {
        check_type::<T>("x", X::DTYPE)?;
        let ([rows, features], out_features) = (self.x.shape, self.weight.shape[0]);
        if features == 0 {
            return Err(Error::argument("x", "at least one feature", format_args!("shape {:?}", self.x.shape)));
        }
        if rows.checked_mul(out_features.max(features)).is_none_or(|count| count > isize::MAX as usize) {
            let got = format_args!("shapes {:?} and {:?}", self.x.shape, self.weight.shape).to_string();
            return Err(Error::argument("x", "fewer than 2^63 elements", got));
        }
        self.x.check("x", "(rows, features)", [rows, features])?;
        self.weight.check("weight", "(out_features, features)", [out_features, features])?;
        if let Some(bias) = &self.bias {
            bias.check("bias", "(out_features)", [out_features])?;
        }
        if let Some(norm) = &self.norm {
            check_eps(norm.eps)?;
            if let Some(weight) = &norm.weight {
                weight.check("norm.weight", "(features)", [features])?;
            }
        }
        let mut sizes = LinearSizes { rows, features, out_features, conv: [0, 0] };
        if let Some(conv) = &self.conv {
            let [d_inner, width] = conv.weight.shape;
            if d_inner > out_features || !WIDTHS.contains(&width) {
                let [least, most] = [WIDTHS.start(), WIDTHS.end()];
                let expected =
                    format_args!("at most {out_features} channels and a width of {least} to {most}").to_string();
                return Err(Error::argument("conv.weight", expected, format_args!("shape {:?}", conv.weight.shape)));
            }
            conv.weight.check("conv.weight", "(d_inner, width)", [d_inner, width])?;
            if let Some(bias) = &conv.bias {
                bias.check("conv.bias", "(d_inner)", [d_inner])?;
            }
            sizes.conv = [d_inner, width];
        }
        Ok(LinearProblem { inputs: *self, sizes })
    }
}

impl<X: Element, T: Element, M: Memory> LinearProblem<'_, X, T, M> {
    /// Checks what is written, and the slots.
    pub fn check_outputs<O: Element, St: Element>(&self, outputs: &LinearMut<O, St, M>) -> Result<()> {
        let LinearSizes { rows, out_features, conv: [d_inner, width], .. } = self.sizes;
        check_type::<T>("out", O::DTYPE)?;
        check_len("out", "(rows, out_features)", &[rows, out_features], M::len(outputs.out))?;
        match (&self.inputs.conv, &outputs.conv_state) {
            (None, None) => Ok(()),
            (None, Some(_)) => Err(Error::argument("conv_state", "none, as there is no convolution", "a pool")),
            (Some(_), None) => Err(Error::argument("conv_state", "a pool, as there is a convolution", "none")),
            (Some(_), _) if outputs.accumulate => {
                Err(Error::argument("accumulate", "false where there is a convolution", "true"))
            }
            (Some(_), _) if O::DTYPE != T::DTYPE => {
                let expected = format_args!("{:?} where there is a convolution", T::DTYPE).to_string();
                Err(Error::argument("out", expected, format_args!("{:?}", O::DTYPE)))
            }
            (Some(conv), Some(state)) => {
                state.check("conv_state", POOL_NAMES[0], [state.shape[0], width - 1, d_inner])?;
                conv.slots.check(rows, state.shape[0])
            }
        }
    }
}

/// The sizes of a checked update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UpdateSizes {
    pub rows: usize,
    pub d_inner: usize,
    pub d_state: usize,
    pub dt_rank: usize,
}

/// An update whose inputs have been checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UpdateProblem<'a, T: Element, M: Memory = Host> {
    pub inputs: SelectiveUpdate<'a, T, M>,
    pub sizes: UpdateSizes,
}

impl<'a, T: Element, M: Memory> SelectiveUpdate<'a, T, M> {
    /// Checks every argument but those of [`UpdateProblem::check_outputs`].
    pub(crate) fn check(&self) -> Result<UpdateProblem<'a, T, M>> {
        let ([rows, d_inner], [_, d_state], [_, dt_rank]) = (self.u.shape, self.a.shape, self.dt_weight.shape);
        if d_inner == 0 || dt_rank == 0 {
            let got = format_args!("{d_inner} and {dt_rank}").to_string();
            return Err(Error::argument("u, dt_weight", "at least one channel and a rank of at least 1", got));
        }
        if !(1..=MAX_D_STATE).contains(&d_state) {
            return Err(Error::argument("a", format_args!("1 to {MAX_D_STATE} states"), d_state));
        }
        if rows.checked_mul(d_inner).is_none_or(|count| count > isize::MAX as usize) {
            return Err(Error::argument("u", "fewer than 2^63 elements", format_args!("shape {:?}", self.u.shape)));
        }
        let activation = [rows, d_inner];
        self.u.check("u", "(rows, d_inner)", activation)?;
        let Some(columns) = dt_rank.checked_add(2 * d_state) else {
            return Err(Error::argument("dt_weight", "a rank that can be counted", dt_rank));
        };
        match &self.columns {
            Columns::Given(view) => view.check("columns", "(rows, dt_rank + 2 d_state)", [rows, columns])?,
            Columns::Projected { weight } => {
                weight.check("columns.weight", "(dt_rank + 2 d_state, d_inner)", [columns, d_inner])?;
            }
        }
        self.dt_weight.check("dt_weight", "(d_inner, dt_rank)", [d_inner, dt_rank])?;
        if let Some(norms) = &self.norms {
            check_eps(norms.eps)?;
            if let Some(weights) = &norms.weights {
                let checked =
                    [("norms.weights[0]", dt_rank), ("norms.weights[1]", d_state), ("norms.weights[2]", d_state)];
                for (weight, (name, size)) in weights.iter().zip(checked) {
                    weight.check(name, "(size)", [size])?;
                }
            }
        }
        self.a.check("a", "(d_inner, d_state)", [d_inner, d_state])?;
        for (name, view) in [("d", &self.d), ("delta_bias", &self.delta_bias)] {
            if let Some(view) = view {
                view.check(name, "(d_inner)", [d_inner])?;
            }
        }
        if let Some(z) = &self.z {
            z.check("z", "(rows, d_inner)", activation)?;
        }
        Ok(UpdateProblem { inputs: *self, sizes: UpdateSizes { rows, d_inner, d_state, dt_rank } })
    }
}

impl<T: Element, M: Memory> UpdateProblem<'_, T, M> {
    /// Checks what is written, and the slots.
    pub fn check_outputs<St: Element>(&self, outputs: &SelectiveUpdateMut<T, St, M>) -> Result<()> {
        let UpdateSizes { rows, d_inner, d_state, .. } = self.sizes;
        check_len("out", "(rows, d_inner)", &[rows, d_inner], M::len(outputs.out))?;
        match (&self.inputs.columns, &outputs.columns) {
            (Columns::Given(_), None) => {}
            (Columns::Given(_), Some(_)) => {
                return Err(Error::argument("columns", "nothing to write, as they are given", "a buffer"));
            }
            (Columns::Projected { .. }, None) => {
                return Err(Error::argument("columns", "a buffer, as they are projected", "none"));
            }
            (Columns::Projected { .. }, Some(columns)) => {
                let shape = [rows, self.sizes.dt_rank + 2 * d_state];
                check_len("columns", "(rows, dt_rank + 2 d_state)", &shape, M::len(columns))?;
            }
        }
        let state = &outputs.state;
        state.check("state", STATE_NAMES[0], [state.shape[0], d_inner, d_state])?;
        self.inputs.slots.check(rows, state.shape[0])
    }
}
