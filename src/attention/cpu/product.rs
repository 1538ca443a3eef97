//! The matrix product that attention is made of.

use crate::simd::{Lanes, Row};

/// A matrix of numbers at these distances from row to row and from column to column.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub column: usize,
}

/// Rows that are worked on at a time: as many sums as hide how long one takes.
const ROWS: usize = 8;

/// Adds `a·b` to `c`: `(m, k)` times `(k, n)` blocks of lanes, dense, to `(m, n)` blocks.
#[inline(always)]
pub(super) fn add_product<S: Lanes>(simd: S, c: &mut [Row], a: Matrix, b: &[Row], [m, k, n]: [usize; 3]) {
    if m == 0 || k == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * a.row + (k - 1) * a.column < a.data.len(), "a matrix within its data");
    let (c, b): (&mut [S::f32s], &[S::f32s]) = (bytemuck::cast_slice_mut(c), bytemuck::cast_slice(b));
    let n = n * Row::ZERO.vectors::<S>().len();
    assert!(m * n <= c.len() && k * n <= b.len(), "matrices within their data");
    let whole = m - m % ROWS;
    for first in (0..whole).step_by(ROWS) {
        // SAFETY: the rows lie below `m`, for which the assertions hold.
        unsafe { add_rows::<S, ROWS>(simd, c, a, b, [first, k, n]) };
    }
    for first in whole..m {
        // SAFETY: as above.
        unsafe { add_rows::<S, 1>(simd, c, a, b, [first, k, n]) };
    }
}

/// `R` rows of the product, from `first` on.
///
/// # Safety
/// Row `first + R - 1` lies in `a`, with `k` columns, and in `c`, with `n`; `b` has `k` rows of `n`.
#[inline(always)]
unsafe fn add_rows<S: Lanes, const R: usize>(
    simd: S,
    c: &mut [S::f32s],
    a: Matrix,
    b: &[S::f32s],
    [first, k, n]: [usize; 3],
) {
    for column in 0..n {
        let mut sums = [simd.splat_f32s(0.0); R];
        for i in 0..k {
            // SAFETY: `i < k` and `column < n`.
            let x = unsafe { *b.get_unchecked(i * n + column) };
            for (r, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `first + r` is a row of `a`, and `i` a column.
                let weight = unsafe { *a.data.get_unchecked((first + r) * a.row + i * a.column) };
                *sum = simd.fma(simd.splat_f32s(weight), x, *sum);
            }
        }
        for (r, sum) in sums.into_iter().enumerate() {
            let to = &mut c[(first + r) * n + column];
            *to = simd.add_f32s(*to, sum);
        }
    }
}
