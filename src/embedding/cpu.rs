//! The gradient on the CPU: parallel over tokens.

use rayon::prelude::*;

use super::check;
use crate::arguments::zeroed;
use crate::{Element, Result, View};

/// Writes the gradient of a matrix of `vocab_size` rows, `d_table`, `(vocab_size, width)`, from that of the rows that `ids`
/// name, `d_out`, `(ids, width)`. It is summed in `f64`, so that a token that is there a million times loses nothing, and
/// rounded once.
///
/// # Errors
/// A gradient of another number of rows than there are ids, or a buffer of another length. Nothing is written then.
pub fn backward<T: Element>(ids: &[u32], d_out: &View<T, 2>, vocab_size: usize, d_table: &mut [f32]) -> Result<()> {
    check(ids.len(), d_out, vocab_size, d_table.len())?;
    let width = d_out.shape[1];
    if d_table.is_empty() {
        return Ok(());
    }
    // Where the rows of each token begin in `order`: the rows, sorted by token.
    let mut starts: Vec<usize> = zeroed("vocab_size", &[vocab_size + 1])?;
    let known = || ids.iter().enumerate().filter(|(_, id)| (**id as usize) < vocab_size);
    for (_, &id) in known() {
        starts[id as usize + 1] += 1;
    }
    for token in 0..vocab_size {
        starts[token + 1] += starts[token];
    }
    let (mut next, mut order) = (starts.clone(), vec![0usize; starts[vocab_size]]);
    for (row, &id) in known() {
        let place = &mut next[id as usize];
        order[*place] = row;
        *place += 1;
    }
    let tokens = d_table.par_chunks_mut(width).zip(starts.par_windows(2)).with_min_len(16);
    tokens.for_each_init(
        || (vec![0.0f64; width], vec![0.0f32; width]),
        |(sums, wide), (to, range)| {
            let rows = &order[range[0]..range[1]];
            if rows.is_empty() {
                return to.fill(0.0);
            }
            sums.fill(0.0);
            for &row in rows {
                d_out.widen_row([row, 0], wide);
                for (sum, x) in sums.iter_mut().zip(&*wide) {
                    *sum += f64::from(*x);
                }
            }
            for (to, sum) in to.iter_mut().zip(&*sums) {
                *to = *sum as f32;
            }
        },
    );
    Ok(())
}
