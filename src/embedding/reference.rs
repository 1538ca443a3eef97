//! The gradient in `f64`, one row after another: the equation and nothing else.

use super::check;
use crate::arguments::zeroed;
use crate::{Element, Result, View};

/// The gradient of a matrix of `vocab_size` rows, `(vocab_size, width)`, from that of the rows that `ids` name.
///
/// # Errors
/// A gradient of another number of rows than there are ids, or that does not fit in memory.
pub fn backward<T: Element>(ids: &[u32], d_out: &View<T, 2>, vocab_size: usize) -> Result<Vec<f64>> {
    let width = d_out.shape[1];
    let mut d_table = zeroed("d_out", &[vocab_size, width])?;
    check(ids.len(), d_out, vocab_size, d_table.len())?;
    for (i, &id) in ids.iter().enumerate().filter(|(_, id)| (**id as usize) < vocab_size) {
        for j in 0..width {
            d_table[id as usize * width + j] += f64::from(d_out.at([i, j]));
        }
    }
    Ok(d_table)
}
