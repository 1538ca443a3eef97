//! The operators in `f64`, one row and one column after another: the equations and nothing else. Nothing is rounded on the way.

use super::{ColumnNorms, Columns, Linear, SelectiveUpdate};
use crate::arguments::zeroed;
use crate::conv::POOL_NAMES;
use crate::reference::{silu, softplus};
use crate::state_update::STATE_NAMES;
use crate::{Element, Error, Result, View};

/// A row, normed: divided by the root of its mean square.
fn rms_norm(row: &mut [f64], weight: Option<View<f32, 1>>, eps: f64) {
    let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
    for (i, x) in row.iter_mut().enumerate() {
        *x *= weight.map_or(1.0, |weight| f64::from(weight.at([i]))) / (mean + eps).sqrt();
    }
}

/// The product without what was there before, `(rows, out_features)`, and the inputs of the convolution, which are its first
/// columns before it. The pool, `(slots, width - 1, d_inner)`, is read and not written; its states afterwards are those
/// without their first row and with the input as their last.
///
/// # Errors
/// An argument that does not fit, which the message names.
pub fn linear<X: Element, T: Element, St: Element>(
    inputs: &Linear<X, T>,
    conv_state: Option<View<St, 3>>,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let sizes = inputs.check()?.sizes;
    let (columns, [d_inner, width]) = (sizes.out_features, sizes.conv);
    let mut out: Vec<f64> = zeroed("x", &[sizes.rows, columns])?;
    let mut inputs_of_conv: Vec<f64> = zeroed("x", &[sizes.rows, d_inner])?;
    if let (Some(conv), Some(state)) = (&inputs.conv, &conv_state) {
        state.check("conv_state", POOL_NAMES[0], [state.shape[0], width - 1, d_inner])?;
        conv.slots.check(sizes.rows, state.shape[0])?;
    }
    for row in 0..sizes.rows {
        let mut x: Vec<f64> = (0..sizes.features).map(|i| inputs.x.at([row, i]).into()).collect();
        if let Some(norm) = &inputs.norm {
            rms_norm(&mut x, norm.weight, norm.eps);
        }
        let out = &mut out[row * columns..][..columns];
        for (j, out) in out.iter_mut().enumerate() {
            *out = x.iter().enumerate().map(|(i, x)| x * f64::from(inputs.weight.at([j, i]))).sum();
            *out += inputs.bias.map_or(0.0, |bias| f64::from(bias.at([j])));
        }
        let Some(conv) = &inputs.conv else { continue };
        let Some(state) = &conv_state else {
            return Err(Error::argument("conv_state", "a pool, as there is a convolution", "none"));
        };
        inputs_of_conv[row * d_inner..][..d_inner].copy_from_slice(&out[..d_inner]);
        for (channel, out) in out[..d_inner].iter_mut().enumerate() {
            let Some(slot) = conv.slots.get(row) else {
                *out = 0.0;
                continue;
            };
            let before = (0..width - 1).map(|k| f64::from(state.at([slot, k, channel])));
            let bias = conv.bias.map_or(0.0, |bias| f64::from(bias.at([channel])));
            let weights = (0..width).map(|k| f64::from(conv.weight.at([channel, k])));
            *out = silu(bias + before.chain([*out]).zip(weights).map(|(x, w)| x * w).sum::<f64>());
        }
    }
    Ok((out, inputs_of_conv))
}

/// The output of an update, `(rows, d_inner)`, and the state after it of each row, `(rows, d_inner, d_state)`, zero for
/// padding. The pool is read and not written.
///
/// # Errors
/// An argument that does not fit, which the message names.
pub fn selective_update<T: Element, St: Element>(
    inputs: &SelectiveUpdate<T>,
    state: View<St, 3>,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let sizes = inputs.check()?.sizes;
    let (d_inner, d_state, dt_rank) = (sizes.d_inner, sizes.d_state, sizes.dt_rank);
    state.check("state", STATE_NAMES[0], [state.shape[0], d_inner, d_state])?;
    inputs.slots.check(sizes.rows, state.shape[0])?;
    let mut out: Vec<f64> = zeroed("u", &[sizes.rows, d_inner])?;
    let mut after: Vec<f64> = zeroed("u", &[sizes.rows, d_inner, d_state])?;
    for row in 0..sizes.rows {
        let Some(slot) = inputs.slots.get(row) else { continue };
        let column = |i: usize| -> f64 {
            match inputs.columns {
                Columns::Given(columns) => columns.at([row, i]).into(),
                Columns::Projected { weight } => {
                    let products = |k| f64::from(inputs.u.at([row, k])) * f64::from(weight.at([i, k]));
                    (0..d_inner).map(products).sum()
                }
            }
        };
        let mut columns: Vec<f64> = (0..dt_rank + 2 * d_state).map(column).collect();
        let (dt, rest) = columns.split_at_mut(dt_rank);
        let (b, c) = rest.split_at_mut(d_state);
        if let Some(ColumnNorms { weights, eps }) = inputs.norms {
            for (i, part) in [&mut *dt, &mut *b, &mut *c].into_iter().enumerate() {
                rms_norm(part, weights.map(|weights| weights[i]), eps);
            }
        }
        for channel in 0..d_inner {
            let vector = |view: Option<View<f32, 1>>| view.map_or(0.0, |view| f64::from(view.at([channel])));
            let delta: f64 =
                dt.iter().enumerate().map(|(r, dt)| dt * f64::from(inputs.dt_weight.at([channel, r]))).sum();
            let (delta, u) = (softplus(delta + vector(inputs.delta_bias)).0, f64::from(inputs.u.at([row, channel])));
            let mut y = inputs.d.map_or(0.0, |d| f64::from(d.at([channel])) * u);
            for n in 0..d_state {
                let h = f64::from(state.at([slot, channel, n]));
                let h = (delta * f64::from(inputs.a.at([channel, n]))).exp() * h + delta * b[n] * u;
                after[(row * d_inner + channel) * d_state + n] = h;
                y += c[n] * h;
            }
            out[row * d_inner + channel] = y * inputs.z.map_or(1.0, |z| silu(z.at([row, channel]).into()));
        }
    }
    Ok((out, after))
}
