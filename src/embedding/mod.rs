//! An embedding matrix, in whose rows tokens are looked up, and its gradient.
//!
//! A lookup gives row `ids[i]` of the matrix as row `i`, of the matrix's type or widened to `f32`; with slots, row `ids[slots[i]]`, so
//! that a sequence's last token can stay in its slot, and zeros for padding. A token that the matrix does not have gives a row that
//! is not a number: on a device nobody looks at tokens that were chosen there.
//!
//! With row `i` of a tensor made from row `ids[i]` of the matrix, the gradient of the matrix is
//!
//! ```text
//! d_table_v = Σ d_out_i            summed over the i with ids[i] = v, in ascending order
//! ```
//!
//! and zero where there are none. It is `f32` (`f64` in the reference), whatever the type `T` of `d_out`: a half type would
//! lose most of a sum of many rows. Nothing is added by atomics, so that the same bits come again.
//!
//! An id that is not in the vocabulary names no row, and adds to none: it is for whoever looked it up to refuse it.

#[cfg(feature = "candle")]
pub(crate) mod candle;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;

use crate::view::check_len;
use crate::{DeviceSlots, Element, Error, Memory, Result, Slots, View};

/// The only checks of the arguments, on any memory: of `count` ids, and a table of `table_len` elements.
fn check<T: Element, M: Memory>(
    count: usize,
    d_out: &View<T, 2, M>,
    vocab_size: usize,
    table_len: usize,
) -> Result<()> {
    let width = d_out.shape[1];
    d_out.check("d_out", "(ids, width)", [count, width])?;
    // Ids have 32 bits.
    if vocab_size > u32::MAX as usize {
        return Err(Error::argument("vocab_size", "at most 2^32 - 1", vocab_size));
    }
    check_len("d_table", "(vocab_size, width)", &[vocab_size, width], table_len)
}

/// The only checks of a lookup's arguments, on any memory: of `count` ids, and results of `out_len` elements.
fn check_lookup<T: Element, O: Element, M: Memory>(
    count: usize,
    slots: &Slots<DeviceSlots<M>>,
    table: &View<T, 2, M>,
    out_len: usize,
) -> Result<usize> {
    table.check("table", "(vocab_size, width)", table.shape)?;
    if O::DTYPE != T::DTYPE && O::DTYPE != crate::DType::F32 {
        let expected = format_args!("f32 or {:?}, the type of `table`", T::DTYPE).to_string();
        return Err(Error::argument("out", expected, format_args!("{:?}", O::DTYPE)));
    }
    let rows = match slots {
        Slots::Rows => count,
        Slots::Host(list) => list.len(),
        Slots::Device(list) => list.len,
    };
    slots.check(rows, count)?;
    check_len("out", "(rows, width)", &[rows, table.shape[1]], out_len)?;
    Ok(rows)
}
