//! Products with matrices of which every lane has its own.

use crate::simd::{Lanes, Row};

/// Columns in a tile of a matrix. With a pair of vectors that it is multiplied by, a tile has 8 sums under way, as many
/// as two multiply-adds a cycle of 4 cycles each can keep apart.
pub(super) const TILE: usize = 4;

/// A matrix in tiles of [`TILE`] columns: of each tile row after row. The columns are a multiple of a tile.
pub(super) struct Tiles {
    rows: usize,
    columns: usize,
    data: Vec<Row>,
}

impl Tiles {
    pub fn zeros(rows: usize, columns: usize) -> Self {
        assert!(columns.is_multiple_of(TILE), "whole tiles");
        Self { rows, columns, data: vec![Row::ZERO; rows * columns] }
    }

    fn index(&self, row: usize, column: usize) -> usize {
        (column / TILE * self.rows + row) * TILE + column % TILE
    }

    pub fn at(&self, row: usize, column: usize) -> &Row {
        &self.data[self.index(row, column)]
    }

    pub fn at_mut(&mut self, row: usize, column: usize) -> &mut Row {
        let at = self.index(row, column);
        &mut self.data[at]
    }

    pub fn fill_zero(&mut self) {
        self.data.fill(Row::ZERO);
    }

    /// The same matrix with rows and columns exchanged.
    pub fn transposed(&self) -> Self {
        let mut to = Self::zeros(self.columns, self.rows);
        for row in 0..self.rows {
            for column in 0..self.columns {
                *to.at_mut(column, row) = *self.at(row, column);
            }
        }
        to
    }

    /// Sets each of `count` vectors in `out`, as long as the matrix has columns, to the product of the matrix with the
    /// vector in `from`, as long as it has rows.
    #[inline(always)]
    pub fn multiply<S: Lanes>(&self, simd: S, from: &[Row], out: &mut [Row], count: usize) {
        for tile in 0..self.columns / TILE {
            let matrix = &self.data[tile * self.rows * TILE..][..self.rows * TILE];
            for first in (0..count - count % 2).step_by(2) {
                self.multiply_tile::<S, 2>(simd, matrix, tile, from, out, first);
            }
            if count % 2 == 1 {
                self.multiply_tile::<S, 1>(simd, matrix, tile, from, out, count - 1);
            }
        }
    }

    #[inline(always)]
    fn multiply_tile<S: Lanes, const COUNT: usize>(
        &self,
        simd: S,
        matrix: &[Row],
        tile: usize,
        from: &[Row],
        out: &mut [Row],
        first: usize,
    ) {
        let vectors: [&[Row]; COUNT] = std::array::from_fn(|i| &from[(first + i) * self.rows..][..self.rows]);
        for lane in 0..Row::ZERO.vectors::<S>().len() {
            let mut sums = [[simd.splat_f32s(0.0); TILE]; COUNT];
            for row in 0..self.rows {
                let of_row = &matrix[row * TILE..][..TILE];
                for (sums, vector) in sums.iter_mut().zip(&vectors) {
                    let x = vector[row].vectors::<S>()[lane];
                    for (sum, m) in sums.iter_mut().zip(of_row) {
                        *sum = simd.fma(m.vectors::<S>()[lane], x, *sum);
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                let out = &mut out[(first + i) * self.columns + tile * TILE..][..TILE];
                for (out, sum) in out.iter_mut().zip(sums) {
                    out.vectors_mut::<S>()[lane] = *sum;
                }
            }
        }
    }

    /// Adds to the matrix the products of each of `count` columns in `left`, as long as it has rows, with a row in
    /// `right`, as long as it has columns.
    #[inline(always)]
    pub fn add_products<S: Lanes>(&mut self, simd: S, left: &[Row], right: &[Row], count: usize) {
        let (rows, columns) = (self.rows, self.columns);
        for tile in 0..columns / TILE {
            let matrix = &mut self.data[tile * rows * TILE..][..rows * TILE];
            for lane in 0..Row::ZERO.vectors::<S>().len() {
                // Two rows at a time, for 8 sums.
                for (pair, sums) in matrix.chunks_mut(2 * TILE).enumerate() {
                    add_pair(
                        simd,
                        lane,
                        sums,
                        |vector, i| {
                            (
                                &left[vector * rows + 2 * pair + i / TILE],
                                &right[vector * columns + tile * TILE + i % TILE],
                            )
                        },
                        count,
                    );
                }
            }
        }
    }
}

/// Adds `count` products to each of up to two tiles' rows of sums.
#[inline(always)]
fn add_pair<'r, S: Lanes>(
    simd: S,
    lane: usize,
    sums: &mut [Row],
    factors: impl Fn(usize, usize) -> (&'r Row, &'r Row),
    count: usize,
) {
    let mut all = [simd.splat_f32s(0.0); 2 * TILE];
    let len = sums.len();
    for (sum, row) in all.iter_mut().zip(&*sums) {
        *sum = row.vectors::<S>()[lane];
    }
    for vector in 0..count {
        if len == 2 * TILE {
            // The usual case, of a length that the compiler knows.
            for (i, sum) in all.iter_mut().enumerate() {
                let (x, y) = factors(vector, i);
                *sum = simd.fma(x.vectors::<S>()[lane], y.vectors::<S>()[lane], *sum);
            }
        } else {
            for (i, sum) in all[..len].iter_mut().enumerate() {
                let (x, y) = factors(vector, i);
                *sum = simd.fma(x.vectors::<S>()[lane], y.vectors::<S>()[lane], *sum);
            }
        }
    }
    for (sum, row) in all.iter().zip(sums) {
        row.vectors_mut::<S>()[lane] = *sum;
    }
}
