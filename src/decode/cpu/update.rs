//! The selective update: the step sizes by a product, then the state update.

use super::linear::normed;
use super::{Linear, LinearMut, SelectiveUpdateMut, UpdateProblem, linear_checked};
use crate::arguments::zeroed;
use crate::decode::{Columns, RowNorm};
use crate::simd::Isa;
use crate::state_update::{self, UpdateMut};
use crate::{Element, Projection, Result, View};

pub(super) fn run<T: Element, St: Element>(
    isa: Isa,
    problem: &UpdateProblem<T>,
    outputs: SelectiveUpdateMut<T, St>,
) -> Result<()> {
    let (inputs, sizes) = (problem.inputs, problem.sizes);
    if sizes.rows == 0 {
        return Ok(());
    }
    let columns = match (inputs.columns, outputs.columns) {
        (Columns::Projected { weight }, Some(columns)) => {
            linear_checked(isa, &Linear::new(inputs.u, weight).check()?, LinearMut::new(&mut *columns))?;
            View::new(columns, [sizes.rows, weight.shape[0]])
        }
        (Columns::Given(view), _) => view,
        (Columns::Projected { .. }, None) => unreachable!("`check_outputs` has found the buffer"),
    };
    let part = |first: usize, size: usize| {
        let View { data, offset, strides, .. } = columns;
        View { data, offset: offset + first * strides[1], shape: [sizes.rows, size], strides }
    };
    let norm = |part: usize| {
        inputs.norms.map(|norms| RowNorm { weight: norms.weights.map(|weights| weights[part]), eps: norms.eps })
    };
    let mut delta: Vec<T> = zeroed("u", &[sizes.rows, sizes.d_inner])?;
    let steps = Linear { norm: norm(0), ..Linear::new(part(0, sizes.dt_rank), inputs.dt_weight) };
    linear_checked(isa, &steps.check()?, LinearMut::new(&mut delta[..]))?;

    let (b, c) = (part(sizes.dt_rank, sizes.d_state), part(sizes.dt_rank + sizes.d_state, sizes.d_state));
    let normed = |view: View<T, 2>, part: usize| norm(part).map(|norm| normed::<T, T>(isa, view, norm)).transpose();
    let (normed_b, normed_c) = (normed(b, 1)?, normed(c, 2)?);
    let projection = |view, normed| Projection::Varying(of_one_group(of_one_token(view, normed)));
    let update = state_update::Inputs {
        z: inputs.z.map(|z| of_one_token(z, None)),
        d: inputs.d,
        delta_bias: inputs.delta_bias,
        slots: inputs.slots,
        options: state_update::Options { delta_softplus: true, ..Default::default() },
        ..state_update::Inputs::new(
            of_one_token(inputs.u, None),
            View::new(&delta, [sizes.rows, 1, sizes.d_inner]),
            inputs.a,
            projection(b, normed_b.as_deref()),
            projection(c, normed_c.as_deref()),
        )
    };
    state_update::cpu::update_checked(isa, &update.check()?, UpdateMut::new(outputs.state, outputs.out))
}

/// Rows, or others of the same shape in their place, as the only tokens of batch rows.
fn of_one_token<'a, T: Element>(view: View<'a, T, 2>, instead: Option<&'a [T]>) -> View<'a, T, 3> {
    let View { data, offset, shape: [rows, columns], strides: [row, column] } = match instead {
        Some(data) => View::new(data, view.shape),
        None => view,
    };
    View { data, offset, shape: [rows, 1, columns], strides: [row, 0, column] }
}

/// A projection that all channels share.
fn of_one_group<T: Element>(view: View<T, 3>) -> View<T, 4> {
    let View { data, offset, shape: [rows, tokens, columns], strides: [row, token, column] } = view;
    View { data, offset, shape: [rows, tokens, 1, columns], strides: [row, token, 0, column] }
}
