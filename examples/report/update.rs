//! The state update of decoding, timed and held to the reference.

use std::time::Duration;

use selective_scan::state_update::{UpdateMut, cpu, reference};
use selective_scan::{Element, Result, View, ViewMut};

use crate::common::{UpdateData, touched};
use crate::measure::{self, Check, Deviation, FORWARD_BOUND, Measured};

/// One token for each row, on a pool of `f32` states.
pub fn update<T: Element>(budget: Duration, data: &UpdateData<T>) -> Result<Measured> {
    let inputs = data.inputs();
    let mut state = data.state.clone();
    let mut out = touched::<T>(data.u.len());
    let step = |state: &mut [f32], out: &mut [T]| {
        cpu::update(&inputs, UpdateMut { state: ViewMut::new(state, data.state_shape()), out, token_states: None })
    };

    // One step is checked; the timed ones go on from it, each from the state that the last one left.
    step(&mut state, &mut out)?;
    let exact = reference::update(&inputs, View::new(&data.state, data.state_shape()))?;
    let deviations = [Deviation::of(&out, &exact.out), Deviation::of(&state, &exact.token_states)];
    let check = Check::worst(deviations.map(|deviation| deviation.check(FORWARD_BOUND)));

    let mut result = Ok(());
    let seconds = measure::seconds(budget, || result = step(&mut state, &mut out));
    result?;
    Ok(Measured { seconds, check })
}
