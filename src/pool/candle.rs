//! Slots and rollbacks of pools that are candle's tensors.

use std::borrow::Cow;

use candle_core::{Result, Tensor};

use super::{check_count, check_list, check_pool_size};
use crate::candle::device::{Backend, Cpu, SlotsOf, Value};
use crate::candle::in_place::{InPlace, RunsOn, Updated, in_place};
use crate::candle::tensors::{Arguments, Reader, check_slots};
use crate::{Error, View, ViewMut};

/// The slots of an update of candle's tensors: a list on the host, or a tensor of `i32`, `(batch)`, where the pool is.
///
/// One on the processor is read and checked as a list on the host. One on a GPU stays there: nothing waits for it, and what it
/// says cannot be checked, see [`Slots`](crate::Slots#on-a-device). (`Tensor::slice_set` of candle 0.11 does not copy `i32` on
/// a GPU. An [`InplaceOp1`](candle_core::InplaceOp1) of one's own does, by a copy to the storage's slice.)
pub type Slots<'a> = crate::Slots<'a, &'a Tensor>;

impl<'a> From<&'a Tensor> for Slots<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self::Device(tensor)
    }
}

impl Slots<'_> {
    /// Checks the slots against `batch` rows and a pool, whose first dimension is the slots', before anything is written to it.
    /// `argument` is the pool's name in an error. A tensor on a GPU is not read.
    ///
    /// # Errors
    /// Another number of slots than rows, or for [`Slots::Rows`](crate::Slots::Rows) a pool of another size; a tensor of another
    /// type, on another device, or with gaps. On the host, a slot that the pool does not have, and two rows with one slot.
    pub fn check(&self, batch: usize, argument: &'static str, pool: &Tensor) -> Result<()> {
        self.checked(batch, argument, pool).map(|_| ())
    }

    /// The slot of each row, where the host knows it, and `None` for padding. Arguments are those of [`check`](Self::check).
    ///
    /// # Errors
    /// As [`check`](Self::check); a tensor on a GPU.
    pub fn of_rows(&self, batch: usize, argument: &'static str, pool: &Tensor) -> Result<Vec<Option<usize>>> {
        match self.checked(batch, argument, pool)? {
            Checked::Rows => Ok((0..batch).map(Some).collect()),
            Checked::Host(list) => Ok(list.iter().map(|&slot| usize::try_from(slot).ok()).collect()),
            Checked::Device => {
                let (expected, got) = ("a list on the host, by which states are copied", "a tensor on a GPU");
                Err(Error::argument("slots", expected, got).into())
            }
        }
    }

    fn checked(&self, batch: usize, argument: &'static str, pool: &Tensor) -> Result<Checked<'_>> {
        let none = || Error::argument(argument, "a tensor of states in slots", "one of no dimensions");
        let count = pool.dims().first().copied().ok_or_else(none)?;
        let list = match *self {
            Self::Rows => {
                check_pool_size(argument, batch, count)?;
                return Ok(Checked::Rows);
            }
            Self::Host(list) => Cow::Borrowed(list),
            Self::Device(tensor) => {
                check_count(check_slots(tensor)?, batch)?;
                let [ours, pools] = [tensor, pool].map(|tensor| tensor.device().location());
                if ours != pools {
                    let expected = format_args!("a tensor on {pools:?}, as `{argument}`").to_string();
                    return Err(Error::argument("slots", expected, format_args!("one on {ours:?}")).into());
                }
                if !tensor.device().is_cpu() {
                    return Ok(Checked::Device);
                }
                Cow::Owned(tensor.to_vec1()?)
            }
        };
        check_list(&list, batch, count)?;
        Ok(Checked::Host(list))
    }
}

/// Slots that have been checked, and are read once for that.
enum Checked<'a> {
    Rows,
    Host(Cow<'a, [i32]>),
    /// What they are is known on the device alone.
    Device,
}

/// A device that rolls pools back.
trait RollbackBackend: Backend {
    fn rollback<St: Value>(
        &self,
        state: ViewMut<St, 3, Self::Memory>,
        token_states: View<St, 4, Self::Memory>,
        slots: SlotsOf<Self>,
        accepted: &[usize],
    ) -> crate::Result<()>;
}

impl RollbackBackend for Cpu {
    fn rollback<St: Value>(
        &self,
        state: ViewMut<St, 3>,
        token_states: View<St, 4>,
        slots: crate::Slots,
        accepted: &[usize],
    ) -> crate::Result<()> {
        super::rollback(state, token_states, slots, accepted)
    }
}

#[cfg(feature = "candle-cuda")]
impl RollbackBackend for crate::candle::cuda::Gpu {
    fn rollback<St: Value>(
        &self,
        state: ViewMut<St, 3, Self::Memory>,
        token_states: View<St, 4, Self::Memory>,
        slots: SlotsOf<Self>,
        accepted: &[usize],
    ) -> crate::Result<()> {
        super::cuda::rollback(&self.stream, state, token_states, slots, accepted)
    }
}

/// Puts states of a pool back to what they were after a token, after the tokens that follow it have been rejected; see
/// [`state_update::rollback`](crate::state_update::rollback). It serves pools of either update.
///
/// `state` is the pool, and `token_states` what the update gave for the same `slots`, of the same element type. The slot
/// of batch row `i` gets the state after the first `accepted[i]` tokens.
///
/// # Errors
/// An argument that does not fit, which the message names; then nothing is written. `state` must not share its storage
/// with `token_states`, nor be a variable or part of candle's graph: see [`StateUpdate::update`](crate::candle::StateUpdate::update). What the
/// device refuses.
pub fn rollback<'s>(
    state: &Tensor,
    token_states: &Tensor,
    slots: impl Into<Slots<'s>>,
    accepted: &[usize],
) -> Result<()> {
    in_place(&Rollback { token_states, slots: slots.into(), accepted }, state, false)?;
    Ok(())
}

struct Rollback<'a> {
    token_states: &'a Tensor,
    slots: Slots<'a>,
    accepted: &'a [usize],
}

impl InPlace for Rollback<'_> {
    const NAME: &'static str = "rollback";
    const STATE: &'static str = "(slots, ..state_shape)";

    fn arguments(&self) -> Arguments<'_> {
        let mut arguments = Arguments::default();
        arguments.add("token_states", self.token_states);
        arguments.add_slots(self.slots);
        arguments
    }
}

impl<B: RollbackBackend> RunsOn<B> for Rollback<'_> {
    fn run<St: Value>(
        &self,
        backend: &B,
        reader: Reader,
        state: ViewMut<St, 3, B::Memory>,
        _: bool,
    ) -> Result<Updated> {
        let token_states =
            reader.view::<B, St, 4>("token_states", "(batch, tokens, ..state_shape)", self.token_states)?;
        backend.rollback(state, token_states, reader.slots::<B>(self.slots)?, self.accepted)?;
        Ok((self.token_states.clone(), None))
    }
}
