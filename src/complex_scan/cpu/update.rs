//! The update in place: the states of a channel one after another, in `f64`.

use rayon::prelude::*;

use super::{UpdateMut, UpdateProblem};
use crate::complex_scan::number::Number;
use crate::pool::Pool;
use crate::reference::{silu, softplus};
use crate::shared::Shared;
use crate::{Element, Projection};

pub(super) fn run<T: Element, St: Element>(problem: &UpdateProblem<T>, outputs: UpdateMut<T, St>) {
    let (inputs, sizes) = (&problem.inputs, problem.sizes);
    if sizes.batch == 0 || sizes.length == 0 {
        return;
    }
    let (pool, out) = (Pool::new(outputs.state), Shared::new(outputs.out));
    let token_states = outputs.token_states.map(Shared::new);
    let count = 2 * sizes.d_state;
    (0..sizes.batch * sizes.d_inner).into_par_iter().with_min_len(16).for_each_init(
        || (vec![0.0f32; count], vec![St::zeroed(); count]),
        |(numbers, rounded), task| {
            let (row, d) = (task / sizes.d_inner, task % sizes.d_inner);
            let group = d / sizes.group_channels();
            let at = |token: usize| (row * sizes.length + token) * sizes.d_inner + d;
            let slot = inputs.slots.get(row);
            if let Some(slot) = slot {
                // SAFETY: the slots of different rows differ, so this task alone works on this channel of this slot.
                unsafe { pool.read([slot, d, 0], numbers) };
            }
            for token in 0..sizes.length {
                let mut y = 0.0;
                rounded.fill(St::zeroed());
                if let Some(slot) = slot {
                    let place = [row, token, d];
                    let u = f64::from(inputs.u.at(place));
                    let raw = f64::from(inputs.delta.at(place))
                        + inputs.delta_bias.map_or(0.0, |view| f64::from(view.at([d])));
                    let delta = if inputs.delta_softplus { softplus(raw).0 } else { raw };
                    let projection = |input: &Projection<T>, n: usize| {
                        let part = |k| match input {
                            Projection::Varying(view) => f64::from(view.at([row, token, group, k])),
                            Projection::Constant(view) => f64::from(view.at([d, k])),
                        };
                        Number { re: part(2 * n), im: part(2 * n + 1) }
                    };
                    for (n, state) in numbers.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                        let part = |k| f64::from(inputs.a.at([d, 2 * n + k]));
                        let decay = (Number { re: part(0), im: part(1) } * delta).exp();
                        let before = Number { re: state[0].into(), im: state[1].into() };
                        let h = decay * before + projection(&inputs.b, n) * (delta * u);
                        y += 2.0 * (projection(&inputs.c, n) * h).re;
                        *state = [h.re as f32, h.im as f32];
                    }
                    y += inputs.d.map_or(0.0, |view| f64::from(view.at([d])) * u);
                    y *= inputs.z.map_or(1.0, |view| silu(view.at(place).into()));
                    // SAFETY: as above.
                    unsafe { pool.write([slot, d, 0], numbers) };
                    // As the pool holds it, for the next token.
                    St::narrow(numbers, rounded);
                    St::widen(rounded, numbers);
                }
                // SAFETY (both): this task alone works on this channel of this row.
                let to = unsafe { out.part(at(token)..at(token) + 1) };
                to[0] = T::from_f32(y as f32);
                if let Some(all) = &token_states {
                    unsafe { all.part(at(token) * count..(at(token) + 1) * count) }.copy_from_slice(rounded);
                }
            }
        },
    );
}
