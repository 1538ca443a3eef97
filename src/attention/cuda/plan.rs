//! Which kernels a call takes, and how sequences are divided into tiles: by their own sizes alone, so that none depends on what it is
//! packed or batched with.

use crate::attention::check::{Part, Problem};
use crate::cuda::GRID_COLUMNS;
use crate::cuda::params::attention as kernels;
use crate::cuda::params::attention::split::{PIECE, ROWS as FEW_ROWS};
use crate::{Element, Error, Memory, Result};

/// The most rows, and keys, of a sequence: kernels count them, and tiles beyond them, in 32 bits.
const MOST: usize = 1 << 30;

/// Rows up to which keys are split if they are more than a piece.
const MOST_SPLIT: usize = 4 * FEW_ROWS;

/// What divides sequences into tiles, and how the kernels find them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Tiles {
    /// Batch rows of so many queries and as many keys, all with as many tiles.
    Rows { count: usize, length: usize, tiles: usize },
    /// Sequences, those with most keys first.
    Listed { parts: Vec<Listed>, tiles: usize, joined: usize },
}

/// A sequence, and how many tiles those before it have, and blocks that join.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Listed {
    /// Batch row, first step and number of the queries; row, first step and number of the keys.
    pub queries: [usize; 3],
    pub keys: [usize; 3],
    pub tile: usize,
    pub joined: usize,
}

impl Tiles {
    pub fn count(&self) -> usize {
        match self {
            Self::Rows { count, tiles, .. } => count * tiles,
            Self::Listed { tiles, .. } => *tiles,
        }
    }

    /// Tiles whose pieces a second kernel joins.
    pub fn joined(&self) -> usize {
        match self {
            Self::Rows { .. } => 0,
            Self::Listed { joined, .. } => *joined,
        }
    }

    /// The queries of the sequence that has most.
    pub fn most_queries(&self) -> usize {
        match self {
            Self::Rows { length, .. } => *length,
            Self::Listed { parts, .. } => parts.iter().map(|part| part.queries[2]).max().unwrap_or(0),
        }
    }

    /// The tiles of each part as `tiles_of` says, and those of the parts that are joined.
    fn listed(parts: &[Part], tiles_of: impl Fn(&Part) -> [usize; 2]) -> Self {
        let mut parts: Vec<_> = parts.iter().collect();
        parts.sort_by_key(|part| std::cmp::Reverse(part.keys.length));
        let [mut tiles, mut joined] = [0; 2];
        let listed = |part: &Part| {
            let Part { queries, keys, .. } = part;
            let listed = Listed {
                queries: [queries.batch, queries.start, queries.len],
                keys: [keys.row, keys.start, keys.length],
                tile: tiles,
                joined,
            };
            let [more, more_joined] = tiles_of(part);
            (tiles, joined) = (tiles + more, joined + more_joined);
            listed
        };
        let parts = parts.into_iter().map(listed).collect();
        Self::Listed { parts, tiles, joined }
    }
}

/// The sequences of a forward pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Forward {
    /// Those of which a block goes over all keys.
    pub whole: Option<Tiles>,
    /// Those of few queries, whose keys are split.
    pub split: Option<Tiles>,
}

impl Forward {
    /// With tiles of so many rows where keys are not split.
    pub fn of<T: Element, M: Memory>(problem: &Problem<T, M>, rows: usize) -> Result<Self> {
        let (group, sequences) = (problem.sizes.group(), Sequences::of(problem)?);
        let whole = |part: &Part| [(part.queries.len * group).div_ceil(rows), 0];
        let split = |part: &Part| {
            let (tiles, pieces) = ((part.queries.len * group).div_ceil(FEW_ROWS), part.keys.length.div_ceil(PIECE));
            [tiles * pieces, if pieces > 1 { tiles } else { 0 }]
        };
        let parts = match sequences {
            Sequences::Alike { count, part } => {
                let is_split = is_split(&part, group);
                let tiles_of = if is_split { split(&part) } else { whole(&part) };
                // What is joined is listed.
                if tiles_of[1] == 0 {
                    let tiles = Some(Tiles::Rows { count, length: part.queries.len, tiles: tiles_of[0] });
                    let (whole, split) = if is_split { (None, tiles) } else { (tiles, None) };
                    return Ok(Self { whole, split });
                }
                problem.parts()
            }
            Sequences::Listed(parts) => parts,
        };
        let (few, many): (Vec<_>, Vec<_>) = parts.into_iter().partition(|part| is_split(part, group));
        let some = |parts: &[Part], tiles_of: &dyn Fn(&Part) -> [usize; 2]| {
            (!parts.is_empty()).then(|| Tiles::listed(parts, tiles_of))
        };
        Ok(Self { whole: some(&many, &whole), split: some(&few, &split) })
    }
}

/// Whether the keys of a sequence are split, or could be: of so few rows a block's warps share the keys.
fn is_split(part: &Part, group: usize) -> bool {
    let rows = part.queries.len * group;
    rows <= FEW_ROWS || rows <= MOST_SPLIT && part.keys.length > PIECE
}

/// The sequences of a call, of which the kernels can count what there is.
enum Sequences {
    /// Batch rows that are all as the first, of at least one step.
    Alike { count: usize, part: Part },
    /// Those of at least one step.
    Listed(Vec<Part>),
}

impl Sequences {
    fn of<T: Element, M: Memory>(problem: &Problem<T, M>) -> Result<Self> {
        let (sizes, group) = (problem.sizes, problem.sizes.group());
        let is_dense = problem.inputs.keys.is_none() && problem.inputs.cu_seqlens.is_none();
        if is_dense && sizes.length > 0 && sizes.batch > 0 {
            let part = problem.part(0);
            check(&part, group)?;
            return Ok(Self::Alike { count: sizes.batch, part });
        }
        let parts = problem.parts();
        parts.iter().try_for_each(|part| check(part, group))?;
        Ok(Self::Listed(parts))
    }
}

/// The tiles of a backward pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backward {
    pub queries: Option<Tiles>,
    pub keys: Option<Tiles>,
    /// Whether there are keys that no query has.
    pub leaves_keys: bool,
}

impl Backward {
    /// With tiles of so many rows.
    pub fn of<T: Element, M: Memory>(problem: &Problem<T, M>, rows: usize) -> Result<Self> {
        let sizes = problem.sizes;
        let of_queries = |part: &Part| [(part.queries.len * sizes.group()).div_ceil(rows), 0];
        let of_keys = |part: &Part| [part.keys.length.div_ceil(rows), 0];
        let parts = match Sequences::of(problem)? {
            Sequences::Alike { count, part } => {
                let tiles = |tiles: [usize; 2]| Some(Tiles::Rows { count, length: part.queries.len, tiles: tiles[0] });
                let (queries, keys) = (tiles(of_queries(&part)), tiles(of_keys(&part)));
                return Ok(Self { queries, keys, leaves_keys: false });
            }
            Sequences::Listed(parts) => parts,
        };
        let covered: usize = parts.iter().map(|part| part.keys.length).sum();
        let leaves_keys = covered < sizes.rows * sizes.steps;
        if parts.is_empty() {
            return Ok(Self { queries: None, keys: None, leaves_keys });
        }
        let (queries, keys) = (Tiles::listed(&parts, of_queries), Tiles::listed(&parts, of_keys));
        Ok(Self { queries: Some(queries), keys: Some(keys), leaves_keys })
    }
}

/// Checks that the kernels can count the rows and keys of a sequence.
fn check(part: &Part, group: usize) -> Result<()> {
    if part.queries.len.checked_mul(group).is_none_or(|rows| rows > MOST) {
        let got = format_args!("{} of {group}", part.queries.len).to_string();
        return Err(Error::argument("q", "sequences of at most 2^30 steps times the heads of a group", got));
    }
    if part.keys.length > MOST {
        return Err(Error::argument("k", "at most 2^30 keys of a sequence", part.keys.length));
    }
    Ok(())
}

/// The blocks of a launch: `per_tile` for each tile.
pub(super) fn grid(tiles: usize, per_tile: usize) -> Result<[usize; 2]> {
    match tiles.checked_mul(per_tile).filter(|&blocks| blocks <= GRID_COLUMNS) {
        Some(blocks) => Ok([blocks, 1]),
        None => {
            let got = format_args!("{tiles} tiles times {per_tile}").to_string();
            Err(Error::argument("q", "rows and heads for less than 2^31 blocks", got))
        }
    }
}

impl From<Listed> for kernels::Part {
    fn from(listed: Listed) -> Self {
        let [batch, start, length] = listed.queries.map(|n| n as i64);
        let [row, first, keys] = listed.keys.map(|n| n as i64);
        Self { batch, start, length, row, first, keys, tile: listed.tile as i64, joined: listed.joined as i64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::View;
    use crate::attention::{Inputs, KeyRange};

    /// Heads of 8, of which two read one head of keys; what is not there is one element that is repeated.
    fn inputs<'a>(
        batch: usize,
        length: usize,
        keys: Option<&'a [KeyRange]>,
        ends: Option<&'a [usize]>,
    ) -> Inputs<'a, f32> {
        let view = |shape| View::new(&[0.0][..], shape).with_layout(0, [0; 4]);
        let [rows, steps] = if keys.is_some() { [4, 1 << 31] } else { [batch, length] };
        let k = view([rows, steps, 2, 8]);
        Inputs { keys, cu_seqlens: ends, ..Inputs::new(view([batch, length, 4, 8]), k, k) }
    }

    fn forward(inputs: Inputs<f32>) -> Result<Forward> {
        Forward::of(&inputs.check().expect("the arguments fit"), 64)
    }

    #[test]
    fn batch_rows_need_no_table() {
        let rows = |count, length, tiles| Some(Tiles::Rows { count, length, tiles });
        assert_eq!(forward(inputs(3, 100, None, None)).unwrap(), Forward { whole: rows(3, 100, 4), split: None });
        assert_eq!(forward(inputs(3, 8, None, None)).unwrap(), Forward { whole: None, split: rows(3, 8, 1) });
        for nothing in [inputs(3, 0, None, None), inputs(0, 9, None, None)] {
            assert_eq!(forward(nothing).unwrap(), Forward { whole: None, split: None });
        }
    }

    /// Each by its own size, those with most keys first, and only those of several pieces are joined.
    #[test]
    fn sequences_are_divided_each_by_itself() {
        let ends = [0, 1, 1, 71, 74, 104];
        let range = |(row, length)| KeyRange { row, start: 5, length };
        let keys = [(0, 256), (1, 7), (1, 300), (2, 257), (3, 1000)].map(range);
        let Forward { whole: Some(Tiles::Listed { parts: whole, tiles: 3, joined: 0 }), split: Some(split) } =
            forward(inputs(1, 104, Some(&keys), Some(&ends))).unwrap()
        else {
            panic!("70 queries of two heads take three tiles of 64")
        };
        assert_eq!(whole, [Listed { queries: [0, 1, 70], keys: [1, 5, 300], tile: 0, joined: 0 }]);
        let listed = |queries, row, length, tile, joined| Listed { queries, keys: [row, 5, length], tile, joined };
        let parts = vec![
            // 60 rows in four tiles, four pieces each.
            listed([0, 74, 30], 3, 1000, 0, 0),
            listed([0, 71, 3], 2, 257, 16, 4),
            listed([0, 0, 1], 0, 256, 18, 5),
        ];
        assert_eq!(split, Tiles::Listed { parts, tiles: 19, joined: 5 });
    }

    #[test]
    fn what_cannot_be_counted_is_refused() {
        let error = forward(inputs(1, (1 << 29) + 1, None, None)).unwrap_err().to_string();
        assert!(error.starts_with("`q`: expected sequences of at most 2^30 steps"), "{error}");
        let keys = [KeyRange { row: 0, start: 0, length: (1 << 30) + 1 }];
        let error = forward(inputs(1, 3, Some(&keys), None)).unwrap_err().to_string();
        assert!(error.starts_with("`k`: expected at most 2^30 keys of a sequence"), "{error}");
        assert!(grid(1 << 20, 1 << 11).unwrap_err().to_string().starts_with("`q`: "));
        assert_eq!(grid(1 << 20, 2000).unwrap(), [2000 << 20, 1]);
    }

    #[test]
    fn keys_that_no_query_has_are_known() {
        let keys = [KeyRange { row: 1, start: 0, length: 9 }];
        let of = |inputs: Inputs<f32>| Backward::of(&inputs.check().expect("the arguments fit"), 64).unwrap();
        assert!(of(inputs(1, 3, Some(&keys), None)).leaves_keys);
        assert!(!of(inputs(2, 3, None, None)).leaves_keys);
        assert!(!of(inputs(1, 3, None, Some(&[0, 0, 3]))).leaves_keys);
    }
}
