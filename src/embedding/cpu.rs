//! The lookup and the gradient on the CPU; the gradient is parallel over tokens.

use rayon::prelude::*;

use super::{check, check_lookup};
use crate::arguments::zeroed;
use crate::{Element, Result, Slots, View};

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

/// Writes the rows of `table`, `(vocab_size, width)`, that `ids` name to `out`, `(rows, width)`: row `i` is that of `ids[i]` or, with
/// slots, of `ids[slots[i]]`; zeros for padding, NaN for a token that the table does not have.
///
/// # Errors
/// Results of a type that is neither the table's nor `f32`, or of another length; slots that are none of the ids. Nothing is written
/// then.
pub fn lookup<T: Element, O: Element>(ids: &[u32], slots: Slots, table: &View<T, 2>, out: &mut [O]) -> Result<()> {
    check_lookup::<T, O, _>(ids.len(), &slots, table, out.len())?;
    let [vocab_size, width] = table.shape;
    if out.is_empty() {
        return Ok(());
    }
    for (i, to) in out.chunks_exact_mut(width).enumerate() {
        let Some(slot) = slots.get(i) else {
            to.fill(O::from_f32(0.0));
            continue;
        };
        let id = ids[slot] as usize;
        for (j, to) in to.iter_mut().enumerate() {
            *to = O::from_f32(if id < vocab_size { table.at([id, j]) } else { f32::NAN });
        }
    }
    Ok(())
}
