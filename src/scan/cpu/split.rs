//! Carrying states over the segments of split sequences.

use rayon::prelude::*;

use crate::Element;
use crate::shared::Shared;
use crate::simd::{Decay, Isa, Kernel, Lanes, Row};

use super::super::Problem;
use super::{Block, BlockParameters, Plan, Reader, Segment};

/// What each segment does to a state that enters it: `h` becomes `exp(A ΣΔ) h + s`, where `s`, the chunk state, is what it makes
/// of zero.
///
/// All segments are run from zero at once for their `s` and `ΣΔ`, which are then applied one after another. The same
/// holds for the gradient of the state, which enters a segment at its end.
pub(super) struct ChunkStates {
    unit: Vec<BlockParameters>,
    d_inner: usize,
    d_state: usize,
    /// ΣΔ for each segment and block.
    sums: Vec<Row>,
    /// `s`, `(segments, d_state, d_inner)`.
    reached: Vec<f32>,
}

impl ChunkStates {
    /// `run` takes the state of a segment and a block from zero through the segment and returns ΣΔ.
    pub fn new<T: Element>(
        problem: &Problem<T>,
        plan: &Plan,
        run: impl Fn(&BlockParameters, &Segment, &mut [Row]) -> Row + Sync,
    ) -> Self {
        let (d_inner, d_state) = (problem.dims.d_inner, problem.dims.d_state);
        let reader = Reader { problem };
        let unit: Vec<_> = plan.blocks.iter().map(|&block| BlockParameters::read(&reader, block)).collect();
        let mut reached = vec![0.0; plan.segments.len() * d_state * d_inner];
        let shared = Shared::new(&mut reached);
        let sums = (0..plan.segments.len() * unit.len())
            .into_par_iter()
            .map(|task| {
                let (segment, parameters) = (&plan.segments[task / unit.len()], &unit[task % unit.len()]);
                let mut h = vec![Row::ZERO; d_state];
                let sum = run(parameters, segment, &mut h);
                let block = parameters.block;
                for (n, row) in h.iter().enumerate() {
                    let at = (segment.index * d_state + n) * d_inner + block.first;
                    // SAFETY: this task alone works on this segment and these channels.
                    unsafe { shared.part(at..at + block.width) }.copy_from_slice(&row.0[..block.width]);
                }
                sum
            })
            .collect();
        Self { unit, d_inner, d_state, sums, reached }
    }

    /// The state that enters each segment, `(segments, d_state, d_inner)`. `order` is that in which states are handed
    /// on, and `start` gives the state that enters the first segment of a sequence.
    pub fn chain<'s>(
        &self,
        isa: Isa,
        order: impl Iterator<Item = &'s Segment>,
        start: impl Fn(&Segment, Block, &mut [Row]),
    ) -> Vec<f32> {
        let mut entering = vec![0.0; self.reached.len()];
        let mut before: Option<&Segment> = None;
        for segment in order {
            let before = before.replace(segment).filter(|before| before.sequence.index == segment.sequence.index);
            for (i, parameters) in self.unit.iter().enumerate() {
                let block = parameters.block;
                let mut h = vec![Row::ZERO; self.d_state];
                match before {
                    None => start(segment, block, &mut h),
                    Some(before) => {
                        self.read(&entering, before, block, &mut h);
                        let sum = &self.sums[before.index * self.unit.len() + i];
                        isa.run(Carry { h: &mut h, sum, a: &parameters.a });
                        let mut reached = vec![Row::ZERO; self.d_state];
                        self.read(&self.reached, before, block, &mut reached);
                        h.iter_mut().zip(&reached).for_each(|(h, reached)| h.add(reached));
                    }
                }
                for (n, row) in h.iter().enumerate() {
                    let at = (segment.index * self.d_state + n) * self.d_inner + block.first;
                    entering[at..at + block.width].copy_from_slice(&row.0[..block.width]);
                }
            }
        }
        entering
    }

    fn read(&self, states: &[f32], segment: &Segment, block: Block, out: &mut [Row]) {
        state_rows(states, segment.index, self.d_inner, block, out);
    }
}

/// A block's channels of the `index`-th of states that are laid out `(…, d_state, d_inner)`.
pub(super) fn state_rows(states: &[f32], index: usize, d_inner: usize, block: Block, out: &mut [Row]) {
    let d_state = out.len();
    for (n, row) in out.iter_mut().enumerate() {
        let at = (index * d_state + n) * d_inner + block.first;
        *row = Row::ZERO;
        row.0[..block.width].copy_from_slice(&states[at..at + block.width]);
    }
}

/// Multiplies states by `exp(A ΣΔ)`.
struct Carry<'t> {
    h: &'t mut [Row],
    sum: &'t Row,
    /// log2(e)·A
    a: &'t [Row],
}

impl Kernel for Carry<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        for (h, a) in self.h.iter_mut().zip(self.a) {
            let exponents = self.sum.vectors::<S>().iter().zip(a.vectors::<S>());
            for (h, (sum, a)) in h.vectors_mut::<S>().iter_mut().zip(exponents) {
                *h = Decay::exp2(simd, simd.mul_f32s(*sum, *a)).apply(simd, *h);
            }
        }
    }
}
