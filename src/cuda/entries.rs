//! Launches over many tensors, which travel in the launches themselves; `kernels/common/entries.cuh` is the kernels' side.

use super::{GRID_COLUMNS, blocks};

/// The entries of each launch, with the elements of each, and its blocks: as few launches as there is room for all entries in, and for their blocks in a
/// grid.
pub(crate) fn launches<E>(entries: &[(usize, E)], chunk: usize, most: usize) -> Vec<(&[(usize, E)], usize)> {
    let (mut launches, mut from, mut grid) = (Vec::new(), 0, 0usize);
    for (at, &(count, _)) in entries.iter().enumerate() {
        let own = blocks(count, chunk);
        if at - from == most || (at > from && grid.saturating_add(own) > GRID_COLUMNS) {
            launches.push((&entries[from..at], grid));
            (from, grid) = (at, 0);
        }
        grid += own;
    }
    if from < entries.len() {
        launches.push((&entries[from..], grid));
    }
    launches
}

/// Writes the entries of a launch to what travels in it: each as `placed` makes it of the entry and the number of its first block.
pub(crate) fn place<E: Copy>(to: &mut [E], part: &[(usize, E)], chunk: usize, placed: impl Fn(E, usize) -> E) {
    let mut first_block = 0;
    for (to, &(count, entry)) in to.iter_mut().zip(part) {
        *to = placed(entry, first_block);
        first_block += blocks(count, chunk);
    }
}

#[cfg(test)]
mod tests {
    use super::launches;

    #[test]
    fn every_entry_is_in_one_launch() {
        let entries: Vec<_> = (0..23).map(|i| (i * 100 + 1, i)).collect();
        for most in [1, 5, 22, 23, 60] {
            let launches = launches(&entries, 128, most);
            assert_eq!(launches.len(), 23usize.div_ceil(most));
            let all: Vec<_> = launches.iter().flat_map(|(part, _)| part.iter().map(|&(_, i)| i)).collect();
            assert_eq!(all, (0..23).collect::<Vec<_>>());
            for (part, grid) in launches {
                assert_eq!(grid, part.iter().map(|(count, _)| count.div_ceil(128)).sum::<usize>());
            }
        }
        // More blocks than a grid has: each gets its own.
        let huge = [(1usize << 41, ()), (1 << 41, ()), (5, ())];
        assert_eq!(launches(&huge, 2048, 60).len(), 2);
        assert!(launches::<()>(&[], 128, 4).is_empty());
    }
}
