//! The forward pass.

use rayon::prelude::*;

use super::block::{Block, Channels, advance, read_out};
use super::math::{LANES, WideNumber};
use super::{OutputMut, Problem};
use crate::Element;
use crate::reference::silu;
use crate::sequences::Sequence;
use crate::shared::Shared;
use crate::simd::{Isa, Kernel, Lanes};

pub(super) fn run<T: Element>(isa: Isa, problem: &Problem<T>, outputs: OutputMut<T>) {
    let sizes = problem.sizes;
    // Without a step there may be more rows or channels than can be counted through.
    if sizes.batch * sizes.length == 0 && (outputs.final_state.is_none() || sizes.sequences == 0) {
        return;
    }
    let (channels, out) = (sizes.group_channels(), Shared::new(outputs.out));
    let final_state = outputs.final_state.map(Shared::new);
    let per_group = Block::count(channels);
    let blocks = sizes.groups * per_group;
    (0..sizes.sequences * blocks).into_par_iter().for_each(|task| {
        let (sequence, index) = (problem.sequences.get(task / blocks), task % blocks);
        let block = Block::of_group(channels, index / per_group, index % per_group);
        let mut states = vec![WideNumber::ZERO; sizes.d_state];
        let channels = Channels::new(problem, block);
        channels.read_states(&problem.inputs.initial_state, sequence, &mut states);
        let channels = isa.run(Pass { channels, sequence, states: &mut states, out: &out });
        if let Some(state) = &final_state {
            // SAFETY: this task alone works on this sequence for these channels.
            channels.write_states(&states, unsafe { state.part(channels.state_range(sequence)) });
        }
    });
}

struct Pass<'t, 'p, 'a, T: Element> {
    channels: Channels<'p, 'a, T>,
    sequence: Sequence,
    states: &'t mut [WideNumber],
    out: &'t Shared<'t, T>,
}

impl<'p, 'a, T: Element> Kernel for Pass<'_, 'p, 'a, T> {
    type Output = Channels<'p, 'a, T>;

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) -> Self::Output {
        let Self { mut channels, sequence, states, out } = self;
        let inputs = &channels.problem.inputs;
        let width = channels.block.width;
        for i in 0..sequence.len {
            let t = sequence.step(i, inputs.options.reverse);
            let step = channels.read(sequence, t);
            advance(&channels.a, &channels.b, &step, states);
            let mut y = read_out(&channels.c, inputs.d.is_some().then_some(&channels.d), &step, states);
            if let Some(z) = &inputs.z {
                let z = channels.row(z, sequence, t);
                for i in 0..LANES {
                    y.0[i] *= silu(z.0[i]);
                }
            }
            // SAFETY: this task alone works on these steps and channels.
            let to = unsafe { out.part(channels.range(sequence, t)) };
            T::narrow(&y.0.map(|y| y as f32)[..width], to);
        }
        channels
    }
}
