//! The state update in `f64`, one row, channel, token and state after another: the equations and nothing else.

use super::{Inputs, STATE_NAMES, UpdateOutput};
use crate::arguments::{Dims, zeroed};
use crate::reference::{input_weight, silu, softplus};
use crate::{Element, Projection, Result, View};

/// Runs the update without writing to the pool: the state after each token is returned instead.
///
/// States are not rounded between tokens. The results are what exact arithmetic on the inputs would give, to about 15
/// digits; those of padding rows are zero.
pub fn update<T: Element, St: Element>(inputs: &Inputs<T>, state: View<St, 3>) -> Result<UpdateOutput<f64, f64>> {
    let problem = inputs.check()?;
    let Dims { batch, len: tokens, d_inner, d_state, .. } = problem.dims;
    state.check("state", STATE_NAMES[0], [state.shape[0], d_inner, d_state])?;
    let slots = inputs.slots;
    slots.check(batch, state.shape[0])?;
    let mut output = UpdateOutput {
        out: zeroed("u", &[batch, tokens, d_inner])?,
        token_states: zeroed("u", &[batch, tokens, d_inner, d_state])?,
    };
    // Without tokens there may be more rows than can be counted through.
    let rows = (0..if tokens == 0 { 0 } else { batch }).filter_map(|row| Some((row, slots.get(row)?)));
    for (row, slot) in rows {
        for d in 0..d_inner {
            let group = d / problem.dims.group_channels();
            let mut h: Vec<f64> = (0..d_state).map(|n| state.at([slot, d, n]).into()).collect();
            for t in 0..tokens {
                let index = (row * tokens + t) * d_inner + d;
                let projection = |input: &Projection<T>, n| match input {
                    Projection::Varying(view) => f64::from(view.at([row, t, group, n])),
                    Projection::Constant(view) => f64::from(view.at([d, n])),
                };
                let u = f64::from(inputs.u.at([row, t, d]));
                let raw = f64::from(inputs.delta.at([row, t, d]))
                    + inputs.delta_bias.map_or(0.0, |view| f64::from(view.at([d])));
                let delta = if inputs.options.delta_softplus { softplus(raw).0 } else { raw };

                // Without D nothing goes past the states, not even the NaN of zero times infinity.
                let mut y = inputs.d.map_or(0.0, |view| f64::from(view.at([d])) * u);
                for (n, h) in h.iter_mut().enumerate() {
                    let a = f64::from(inputs.a.at([d, n]));
                    let weight = input_weight(inputs.options.discretization, delta, a);
                    *h = (delta * a).exp() * *h + weight * projection(&inputs.b, n) * u;
                    y += projection(&inputs.c, n) * *h;
                }
                output.out[index] = y * inputs.z.map_or(1.0, |z| silu(z.at([row, t, d]).into()));
                output.token_states[index * d_state..][..d_state].copy_from_slice(&h);
            }
        }
    }
    Ok(output)
}
