//! Which slot of a pool each batch row has: a list on the host, or one that lies where the pool does.

use std::fmt;

use crate::{Error, Host, Memory, Result};

/// The slot in a pool of states that each batch row has.
///
/// A negative slot makes its row padding, which gives zero and touches no state. No two rows may have one slot, as they are
/// updated at the same time.
///
/// `D` is a list in a device's memory: [`DeviceSlots`] beside views, a tensor beside candle's. All else becomes `Slots` by
/// `into()`: slices, arrays and vectors of `i32` on the host, and `None`, for which row `i` has slot `i`.
///
/// # On a device
/// Work that is enqueued with a list on the host has that list for good; a list in a device's memory is read when the work
/// runs. A CUDA graph in which an update was captured therefore updates other slots once others have been written there.
///
/// What such a list says cannot be checked beforehand. The kernels take a slot that the pool does not have for padding.
/// **That no slot stands there twice is the caller's duty.** If one does, nothing beyond that state is touched, but what the
/// state then holds, and what its rows give, may be any mixture of theirs, and another one the next time.
#[derive(Debug, Clone, Copy, Default)]
pub enum Slots<'a, D = DeviceSlots<'a, Host>> {
    /// Row `i` has slot `i`: the pool has one for each row.
    #[default]
    Rows,
    /// `(batch)`, on the host. It is checked whole: a slot that the pool does not have, or that two rows have, is an error.
    Host(&'a [i32]),
    /// `(batch)`, on a device, see [above](Self#on-a-device).
    Device(D),
}

impl<'a, D> From<&'a [i32]> for Slots<'a, D> {
    fn from(list: &'a [i32]) -> Self {
        Self::Host(list)
    }
}

impl<'a, D, const N: usize> From<&'a [i32; N]> for Slots<'a, D> {
    fn from(list: &'a [i32; N]) -> Self {
        Self::Host(list)
    }
}

impl<'a, D> From<&'a Vec<i32>> for Slots<'a, D> {
    fn from(list: &'a Vec<i32>) -> Self {
        Self::Host(list)
    }
}

/// Without a list row `i` has slot `i`.
impl<'a, D> From<Option<&'a [i32]>> for Slots<'a, D> {
    fn from(list: Option<&'a [i32]>) -> Self {
        list.map_or(Self::Rows, Self::Host)
    }
}

impl<'a, M: Memory> From<DeviceSlots<'a, M>> for Slots<'a, DeviceSlots<'a, M>> {
    fn from(list: DeviceSlots<'a, M>) -> Self {
        Self::Device(list)
    }
}

/// Slots that lie in memory of kind `M`: `(batch)`, dense, a part of a buffer of `i32`. On the [`Host`] there are none, as a
/// list there is a slice.
pub struct DeviceSlots<'a, M: Memory> {
    /// The buffer.
    pub data: &'a M::SlotBuffer,
    /// Where the first slot lies, in elements.
    pub offset: usize,
    /// The number of slots.
    pub len: usize,
}

impl<M: Memory> Clone for DeviceSlots<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M: Memory> Copy for DeviceSlots<'_, M> {}

impl<M: Memory> fmt::Debug for DeviceSlots<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceSlots").field("offset", &self.offset).field("len", &self.len).finish_non_exhaustive()
    }
}

impl<M: Memory> Slots<'_, DeviceSlots<'_, M>> {
    /// Checks the slots against `batch` rows and a pool of `pool` slots.
    ///
    /// # Errors
    /// Another number of slots than rows, or for [`Slots::Rows`] a pool of another size; a part that its buffer does not
    /// have. On the host, a slot that the pool does not have, and two rows with one slot.
    pub(crate) fn check(&self, batch: usize, pool: usize) -> Result<()> {
        match self {
            Self::Rows => check_pool_size("state", batch, pool),
            Self::Host(list) => check_list(list, batch, pool),
            Self::Device(DeviceSlots { data, offset, len }) => {
                check_count(*len, batch)?;
                let buffer = M::slot_count(data);
                if offset.checked_add(*len).is_none_or(|end| end > buffer) {
                    let expected = format_args!("a buffer that holds offset {offset} and {len} slots");
                    return Err(Error::argument("slots", expected, format_args!("one of {buffer}")));
                }
                Ok(())
            }
        }
    }
}

impl<D> Slots<'_, D> {
    /// Whether a row is known to be padding. Those on the host must have been checked.
    pub(crate) fn is_padding(&self, row: usize) -> bool {
        matches!(self, Self::Host(list) if list[row] < 0)
    }
}

impl Slots<'_> {
    /// The slot of batch row `row`; `None` for padding. They must have been checked.
    #[inline(always)]
    pub(crate) fn get(&self, row: usize) -> Option<usize> {
        match self {
            Self::Rows => Some(row),
            Self::Host(list) => usize::try_from(list[row]).ok(),
            Self::Device(list) => match *list.data {},
        }
    }
}

/// Checks a pool, by the name of its argument, that has one slot for each row.
pub(crate) fn check_pool_size(argument: &'static str, batch: usize, pool: usize) -> Result<()> {
    if pool == batch {
        return Ok(());
    }
    let expected = format_args!("one slot for each of {batch} batch rows, since no `slots` are given");
    Err(Error::argument(argument, expected, format_args!("{pool} slots")))
}

pub(crate) fn check_count(count: usize, batch: usize) -> Result<()> {
    if count == batch {
        return Ok(());
    }
    Err(Error::argument("slots", format_args!("one for each of {batch} batch rows"), format_args!("{count}")))
}

/// Checks a list of slots against `batch` rows and a pool of `pool` slots.
pub(crate) fn check_list(list: &[i32], batch: usize, pool: usize) -> Result<()> {
    check_count(list.len(), batch)?;
    let mut used = Vec::with_capacity(list.len());
    for (row, &slot) in list.iter().enumerate() {
        match usize::try_from(slot) {
            Ok(index) if index >= pool => {
                let expected = format_args!("slots below {pool}, or negative ones for padding");
                return Err(Error::argument("slots", expected, format_args!("{slot} for row {row}")));
            }
            Ok(index) => used.push(index),
            Err(_) => {}
        }
    }
    used.sort_unstable();
    if let Some(pair) = used.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::argument("slots", "a different slot for every row", format_args!("{} twice", pair[0])));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_checked() {
        let rows: Slots = None.into();
        rows.check(2, 2).expect("one for each");
        assert_eq!(rows.get(1), Some(1));
        let slots: Slots = (&[3, -1, 0, i32::MIN]).into();
        slots.check(4, 4).expect("different ones");
        assert_eq!([0, 1, 2, 3].map(|row| slots.get(row)), [Some(3), None, Some(0), None]);
        let refused: [(Slots, usize, usize, &str); 4] = [
            (
                Slots::Rows,
                2,
                3,
                "`state`: expected one slot for each of 2 batch rows, since no `slots` are given, got 3 slots",
            ),
            (Slots::Host(&[0, 1]), 3, 4, "`slots`: expected one for each of 3 batch rows, got 2"),
            (
                Slots::Host(&[0, 4]),
                2,
                4,
                "`slots`: expected slots below 4, or negative ones for padding, got 4 for row 1",
            ),
            (Slots::Host(&[2, -1, 2]), 3, 4, "`slots`: expected a different slot for every row, got 2 twice"),
        ];
        for (slots, batch, pool, text) in refused {
            assert_eq!(slots.check(batch, pool).unwrap_err().to_string(), text);
        }
    }
}
