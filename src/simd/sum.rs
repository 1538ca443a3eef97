//! Sums of many terms, channel by channel.

use super::{Decay, Kernel, Lanes, Row};

/// A value that is carried through many decays and additions, with what rounding has cost it, to be made good in the next:
/// its error does not grow with their number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Carried<V> {
    pub value: V,
    pub lost: V,
}

impl<V: Copy> Carried<V> {
    /// The value times `decay`.
    #[inline(always)]
    pub fn decayed<S: Lanes<f32s = V>>(self, simd: S, decay: Decay<V>) -> Self {
        let Self { value, lost } = self.plus(simd, simd.mul_f32s(decay.w, self.value));
        Self { value: simd.scale(value, decay.k), lost: simd.scale(lost, decay.k) }
    }

    /// The value plus `x`. Nothing is lost where `x` is the smaller one, and no more than a rounding where it is not.
    #[inline(always)]
    pub fn plus<S: Lanes<f32s = V>>(self, simd: S, x: V) -> Self {
        let x = simd.add_f32s(x, self.lost);
        let value = simd.add_f32s(self.value, x);
        Self { value, lost: simd.sub_f32s(x, simd.sub_f32s(value, self.value)) }
    }
}

/// The sum of the few rows of a tile, by eights so that it loses no more than the roundings of 16 terms.
pub(crate) struct SumTile<'t>(pub &'t [Row]);

impl Kernel for SumTile<'_> {
    type Output = Row;

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) -> Row {
        let mut total = Row::ZERO;
        for rows in self.0.chunks(8) {
            for lane in 0..Row::ZERO.vectors::<S>().len() {
                let vectors = rows.iter().map(|row| row.vectors::<S>()[lane]);
                let sum = vectors.fold(simd.splat_f32s(0.0), |sum, x| simd.add_f32s(sum, x));
                let total = &mut total.vectors_mut::<S>()[lane];
                *total = simd.add_f32s(*total, sum);
            }
        }
        total
    }
}

/// A sum that keeps what rounding takes from it (Kahan, 1965): its error does not grow with the number of terms. A plain
/// sum of 4 million equal terms is off in the third digit, because all additions between two powers of two are rounded by
/// the same amount in the same direction.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sum {
    pub total: Row,
    /// What `total` has too much.
    excess: Row,
}

impl Sum {
    pub const ZERO: Self = Self { total: Row::ZERO, excess: Row::ZERO };

    /// Adds to the `lane`-th vector.
    #[inline(always)]
    pub fn add<S: Lanes>(&mut self, simd: S, lane: usize, x: S::f32s) {
        let (total, excess) = (&mut self.total.vectors_mut::<S>()[lane], &mut self.excess.vectors_mut::<S>()[lane]);
        let x = simd.sub_f32s(x, *excess);
        let sum = simd.add_f32s(*total, x);
        let rounding = simd.sub_f32s(simd.sub_f32s(sum, *total), x);
        // Of an infinite sum the difference is not a number, and must not become part of it.
        *excess = simd.select_f32s(simd.equal_f32s(rounding, rounding), rounding, simd.splat_f32s(0.0));
        *total = sum;
    }

    /// Adds to every channel.
    #[inline(always)]
    pub fn add_row<S: Lanes>(&mut self, simd: S, row: &Row) {
        for (lane, x) in row.vectors::<S>().iter().enumerate() {
            self.add(simd, lane, *x);
        }
    }
}

/// Adds rows to a sum.
pub(crate) struct SumRows<'t> {
    pub rows: &'t [Row],
    pub sum: &'t mut Sum,
}

impl Kernel for SumRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        for row in self.rows {
            self.sum.add_row(simd, row);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{BLOCK, Isa};

    /// The two roundings that are left, of the last term and of the sum, are each at most 2^-24 of the sum.
    #[test]
    fn four_million_equal_terms_lose_a_rounding() {
        const TERMS: usize = if cfg!(miri) { 1 << 10 } else { 1 << 22 };
        for isa in Isa::available() {
            let mut sum = Sum::ZERO;
            let row = Row(std::array::from_fn(|i| 0.1 + 0.01 * i as f32));
            for _ in 0..TERMS / 64 {
                isa.run(SumRows { rows: &[row; 64], sum: &mut sum });
            }
            for i in 0..BLOCK {
                let exact = f64::from(row.0[i]) * TERMS as f64;
                let error = (f64::from(sum.total.0[i]) - exact).abs() / exact;
                assert!(error <= 2f64.powi(-23), "{isa:?}, {}: off by {error:.1e}", row.0[i]);
            }
        }
    }
}
