//! Pools of states that are updated in place: which slot a batch row uses, and how slots are written and restored.

#[cfg(feature = "candle")]
pub(crate) mod candle;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod slots;

pub(crate) use slots::check_pool_size;
pub use slots::{DeviceSlots, Slots};
#[cfg(feature = "candle")]
pub(crate) use slots::{check_count, check_list};

use std::fmt;

use rayon::prelude::*;

use crate::shared::Shared;
use crate::view::check_len;
use crate::{Element, Error, Host, Memory, Result, View, ViewMut};

/// What an update in place reads and writes. `T` is the type of the activations and `St` that of the states.
///
/// `state_shape` stands for the two dimensions that one state has: `(d_inner, d_state)` for
/// [`state_update`](crate::state_update) and `(width - 1, d_inner)` for [`conv`](crate::conv).
pub struct UpdateMut<'a, T: Element, St: Element, M: Memory = Host> {
    /// The pool, `(slots, ..state_shape)`, read and brought up to date. Any strides, as long as every element has a
    /// place of its own; slots that no batch row names are left alone.
    pub state: ViewMut<'a, St, 3, M>,
    /// `(batch, tokens, d_inner)`, dense, overwritten whole: zeros for padding rows.
    pub out: &'a mut M::Buffer<T>,
    /// The state after each token, `(batch, tokens, ..state_shape)`, dense, overwritten whole: zeros for padding rows.
    /// [`rollback`] restores a state from it.
    pub token_states: Option<&'a mut M::Buffer<St>>,
}

impl<'a, T: Element, St: Element, M: Memory> UpdateMut<'a, T, St, M> {
    /// The buffers that every update has; the states after each token are not kept. Add their buffer with struct update
    /// syntax: `UpdateMut { token_states: Some(&mut states), ..UpdateMut::new(state, &mut out) }`.
    pub fn new(state: ViewMut<'a, St, 3, M>, out: &'a mut M::Buffer<T>) -> Self {
        Self { state, out, token_states: None }
    }
}

impl<T: Element, St: Element, M: Memory> fmt::Debug for UpdateMut<'_, T, St, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UpdateMut")
            .field("state", &self.state)
            .field("out", &M::len(self.out))
            .field("token_states", &self.token_states.as_ref().map(|states| M::len(states)))
            .finish()
    }
}

/// The results of an update that keeps the state after each token.
#[derive(Debug, Clone, PartialEq)]
pub struct UpdateOutput<T, St> {
    /// `(batch, tokens, d_inner)`.
    pub out: Vec<T>,
    /// `(batch, tokens, ..state_shape)`, as [`UpdateMut::token_states`].
    pub token_states: Vec<St>,
}

impl<T: Element, St: Element, M: Memory> UpdateMut<'_, T, St, M> {
    /// Checks the pool, the slots and the buffers against activations of shape `activation` and states of
    /// `state_shape`. `names` are those of the dimensions of the pool and of `token_states`.
    pub(crate) fn check(
        &self,
        activation: [usize; 3],
        state_shape: [usize; 2],
        names: [&str; 2],
        slots: Slots<DeviceSlots<M>>,
    ) -> Result<()> {
        let ([batch, tokens, _], [rows, columns]) = (activation, state_shape);
        check_pool(&self.state, state_shape, names[0], batch, slots)?;
        check_len("out", "(batch, tokens, d_inner)", &activation, M::len(self.out))?;
        if let Some(states) = &self.token_states {
            check_len("token_states", names[1], &[batch, tokens, rows, columns], M::len(states))?;
        }
        Ok(())
    }
}

/// Checks a pool and that each of `batch` rows has a slot in it.
fn check_pool<St: Element, M: Memory>(
    state: &ViewMut<St, 3, M>,
    [rows, columns]: [usize; 2],
    names: &str,
    batch: usize,
    slots: Slots<DeviceSlots<M>>,
) -> Result<()> {
    state.check("state", names, [state.shape[0], rows, columns])?;
    slots.check(batch, state.shape[0])
}

/// A checked pool, the rows of which go to different tasks.
pub(crate) struct Pool<'a, St> {
    data: Shared<'a, St>,
    offset: usize,
    strides: [usize; 3],
}

impl<'a, St: Element> Pool<'a, St> {
    /// The pool of a view that has passed [`ViewMut::check`].
    pub fn new(view: ViewMut<'a, St, 3>) -> Self {
        Self { data: Shared::new(view.data), offset: view.offset, strides: view.strides }
    }

    #[inline(always)]
    fn index(&self, index: [usize; 3]) -> usize {
        let [slot, row, column] = self.strides;
        self.offset + index[0] * slot + index[1] * row + index[2] * column
    }

    /// The `len` rows of `columns` elements from `row` on, if they lie one after another.
    ///
    /// # Safety
    /// While the result lives, no other call may give out, read or write any of these rows.
    #[allow(clippy::mut_from_ref, reason = "the caller keeps the rows disjoint")]
    #[inline(always)]
    pub unsafe fn dense(&self, [slot, row]: [usize; 2], len: usize, columns: usize) -> Option<&mut [St]> {
        if self.strides[2] != 1 || self.strides[1] != columns {
            return None;
        }
        let at = self.index([slot, row, 0]);
        // SAFETY: these elements are those of the rows and no others, which the caller leaves to this call.
        Some(unsafe { self.data.part(at..at + len * columns) })
    }

    /// Widens the `to.len()` elements from `index` on along the last dimension.
    ///
    /// # Safety
    /// No other call may give out or write any of these elements at the same time.
    #[inline(always)]
    pub unsafe fn read(&self, index: [usize; 3], to: &mut [f32]) {
        let (at, stride) = (self.index(index), self.strides[2]);
        // SAFETY (both): only elements that the caller leaves to this call are touched.
        if stride == 1 {
            St::widen(unsafe { self.data.part(at..at + to.len()) }, to);
        } else {
            for (i, to) in to.iter_mut().enumerate() {
                let at = at + i * stride;
                *to = unsafe { self.data.part(at..at + 1) }[0].to_f32();
            }
        }
    }

    /// Rounds `from` into the elements from `index` on along the last dimension.
    ///
    /// # Safety
    /// No other call may give out, read or write any of these elements at the same time.
    #[inline(always)]
    pub unsafe fn write(&self, index: [usize; 3], from: &[f32]) {
        let (at, stride) = (self.index(index), self.strides[2]);
        // SAFETY (both): only elements that the caller leaves to this call are touched.
        if stride == 1 {
            St::narrow(from, unsafe { self.data.part(at..at + from.len()) });
        } else {
            for (i, &from) in from.iter().enumerate() {
                let at = at + i * stride;
                let to = unsafe { self.data.part(at..at + 1) };
                to[0] = St::from_f32(from);
            }
        }
    }

    /// Copies the last dimension of `from` at `source` into the row that starts at `index`.
    ///
    /// # Safety
    /// No other call may give out, read or write any element of this row at the same time.
    unsafe fn copy(&self, index: [usize; 3], from: &View<St, 4>, source: [usize; 4]) {
        let (at, source, len) = (self.index(index), from.index(source), from.shape[3]);
        // SAFETY (both): only elements that the caller leaves to this call are touched.
        if self.strides[2] == 1 && from.strides[3] == 1 {
            unsafe { self.data.part(at..at + len) }.copy_from_slice(&from.data[source..source + len]);
        } else {
            for i in 0..len {
                let at = at + i * self.strides[2];
                let to = unsafe { self.data.part(at..at + 1) };
                to[0] = from.data[source + i * from.strides[3]];
            }
        }
    }
}

/// Puts states of a pool back to what they were after a token, after the tokens that follow it have been rejected.
///
/// `state` is the pool, `(slots, ..state_shape)`; `token_states` is what an update over the same `slots` left in
/// [`UpdateMut::token_states`], `(batch, tokens, ..state_shape)`. The slot of batch row `i` gets the state after the
/// first `accepted[i]` tokens. A padding row (a negative slot) touches nothing, and its `accepted` is not looked at (but
/// where slots lie on a device, which rows are padding is not known, and every count is checked).
///
/// # Errors
/// Shapes and slots must fit each other as in the update. `accepted` must be from 1 to `tokens`: the state before the
/// first token is not among those that the update keeps, so it cannot be restored. Nothing is written on an error.
pub fn rollback<'s, St: Element>(
    state: ViewMut<St, 3>,
    token_states: View<St, 4>,
    slots: impl Into<Slots<'s>>,
    accepted: &[usize],
) -> Result<()> {
    let slots = slots.into();
    check_rollback(&state, &token_states, slots, accepted)?;
    let [_, _, rows, columns] = token_states.shape;
    if columns == 0 {
        return Ok(());
    }
    let pool = Pool::new(state);
    accepted.par_iter().enumerate().for_each(|(row, &accepted)| {
        let Some(slot) = slots.get(row) else { return };
        for i in 0..rows {
            // SAFETY: the slots of different rows differ, so this task alone works on this one.
            unsafe { pool.copy([slot, i, 0], &token_states, [row, accepted - 1, i, 0]) };
        }
    });
    Ok(())
}

/// Checks the arguments of [`rollback`].
pub(crate) fn check_rollback<St: Element, M: Memory>(
    state: &ViewMut<St, 3, M>,
    token_states: &View<St, 4, M>,
    slots: Slots<DeviceSlots<M>>,
    accepted: &[usize],
) -> Result<()> {
    let [batch, tokens, rows, columns] = token_states.shape;
    token_states.check("token_states", "(batch, tokens, ..state_shape)", token_states.shape)?;
    if accepted.len() != batch {
        let expected = format_args!("one count for each of {batch} batch rows");
        return Err(Error::argument("accepted", expected, format_args!("{}", accepted.len())));
    }
    check_pool(state, [rows, columns], "(slots, ..state_shape)", batch, slots)?;
    for (row, &accepted) in accepted.iter().enumerate() {
        if !slots.is_padding(row) && !(1..=tokens).contains(&accepted) {
            let why = if accepted == 0 { " (the state before the first token is not kept)" } else { "" };
            let expected = format_args!("from 1 to {tokens} tokens of each row").to_string();
            return Err(Error::argument("accepted", expected, format_args!("{accepted} for row {row}{why}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strided_pool_is_read_and_written_in_place() {
        let mut data: Vec<f32> = (0..60).map(|i| i as f32).collect();
        // (2 slots, 3 rows, 2 columns), columns 5 apart, rows 1 apart.
        let view = ViewMut { data: &mut data[..], offset: 4, shape: [2, 3, 2], strides: [20, 1, 5] };
        view.check("state", "", [2, 3, 2]).unwrap();
        let pool = Pool::new(view);
        let mut row = [0.0; 2];
        // SAFETY: nothing else uses the pool.
        unsafe {
            assert!(pool.dense([1, 2], 1, 2).is_none());
            pool.read([1, 2, 0], &mut row);
            pool.write([0, 1, 0], &row);
        }
        assert_eq!(row, [26.0, 31.0]);
        assert_eq!((data[5], data[10]), (26.0, 31.0));
    }
}
