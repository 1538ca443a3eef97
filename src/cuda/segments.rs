//! How kernels are told of the parts of packed sequences.

use super::params::PackedSegment;
use crate::sequences::Sequence;

/// The segments of a sequence, of `steps` steps each but the last.
pub(crate) fn packed_segments(sequence: &Sequence, steps: usize) -> impl Iterator<Item = PackedSegment> {
    let &Sequence { index, start, len, .. } = sequence;
    let count = len.div_ceil(steps).max(1);
    (0..count).map(move |rank| {
        let first = rank * steps;
        PackedSegment {
            sequence: index as i64,
            start: start as i64,
            len: len as i64,
            first: first as i64,
            steps: steps.min(len - first) as i64,
            rank: rank as i64,
            segments_after: (count - 1 - rank) as i64,
        }
    })
}
