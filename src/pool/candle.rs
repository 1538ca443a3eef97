//! Rollbacks of pools that are candle's tensors.

use candle_core::{Result, Tensor};

use crate::candle::device::{Backend, Cpu, Value};
use crate::candle::in_place::{InPlace, RunsOn, Updated, in_place};
use crate::candle::tensors::{Arguments, Reader};
use crate::{View, ViewMut};

/// A device that rolls pools back.
trait RollbackBackend: Backend {
    fn rollback<St: Value>(
        &self,
        state: ViewMut<St, 3, Self::Memory>,
        token_states: View<St, 4, Self::Memory>,
        slots: Option<&[i32]>,
        accepted: &[usize],
    ) -> crate::Result<()>;
}

impl RollbackBackend for Cpu {
    fn rollback<St: Value>(
        &self,
        state: ViewMut<St, 3>,
        token_states: View<St, 4>,
        slots: Option<&[i32]>,
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
        slots: Option<&[i32]>,
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
pub fn rollback(state: &Tensor, token_states: &Tensor, slots: Option<&[i32]>, accepted: &[usize]) -> Result<()> {
    in_place(&Rollback { token_states, slots, accepted }, state, false)?;
    Ok(())
}

struct Rollback<'a> {
    token_states: &'a Tensor,
    slots: Option<&'a [i32]>,
    accepted: &'a [usize],
}

impl InPlace for Rollback<'_> {
    const NAME: &'static str = "rollback";
    const STATE: &'static str = "(slots, ..state_shape)";

    fn arguments(&self) -> Arguments<'_> {
        let mut arguments = Arguments::default();
        arguments.add("token_states", self.token_states);
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
        backend.rollback(state, token_states, self.slots, self.accepted)?;
        Ok((self.token_states.clone(), None))
    }
}
