//! Which kernels a call takes, and how sequences are divided into tiles: by their own sizes alone, so that none depends on what it is
//! packed or batched with.

use crate::attention::check::{Part, Problem};
use crate::cuda::params::attention as kernels;
use crate::cuda::params::attention::split::{PIECE, ROWS as FEW_ROWS};
use crate::cuda::{Cuda, GRID_COLUMNS};
use crate::{Element, Error, Result};

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
    pub fn of<T: Element>(problem: &Problem<T, Cuda>, rows: usize) -> Result<Self> {
        check(problem)?;
        let group = problem.sizes.group();
        let whole = |part: &Part| [(part.queries.len * group).div_ceil(rows), 0];
        let split = |part: &Part| {
            let (tiles, pieces) = ((part.queries.len * group).div_ceil(FEW_ROWS), part.keys.length.div_ceil(PIECE));
            [tiles * pieces, if pieces > 1 { tiles } else { 0 }]
        };
        if let Some((count, part)) = alike(problem) {
            let is_split = is_split(&part, group);
            let tiles_of = if is_split { split(&part) } else { whole(&part) };
            // What is joined is listed.
            if tiles_of[1] == 0 {
                let tiles = Some(Tiles::Rows { count, length: part.queries.len, tiles: tiles_of[0] });
                return Ok(if is_split { Self { whole: None, split: tiles } } else { Self { whole: tiles, split: None } });
            }
        }
        let (few, many): (Vec<_>, Vec<_>) = problem.parts().into_iter().partition(|part| is_split(part, group));
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

/// Batch rows that are all alike: how many, and the first. None if there is nothing to do.
fn alike<T: Element>(problem: &Problem<T, Cuda>) -> Option<(usize, Part)> {
    let is_dense = problem.inputs.keys.is_none() && problem.inputs.cu_seqlens.is_none();
    let first = (is_dense && problem.sizes.length > 0 && problem.sizes.batch > 0).then(|| problem.part(0))?;
    Some((problem.sizes.batch, first))
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
    pub fn of<T: Element>(problem: &Problem<T, Cuda>, rows: usize) -> Result<Self> {
        check(problem)?;
        let sizes = problem.sizes;
        let of_queries = |part: &Part| [(part.queries.len * sizes.group()).div_ceil(rows), 0];
        let of_keys = |part: &Part| [part.keys.length.div_ceil(rows), 0];
        if let Some((count, part)) = alike(problem) {
            let tiles = |tiles: [usize; 2]| Some(Tiles::Rows { count, length: part.queries.len, tiles: tiles[0] });
            let (queries, keys) = (tiles(of_queries(&part)), tiles(of_keys(&part)));
            return Ok(Self { queries, keys, leaves_keys: false });
        }
        let parts = problem.parts();
        let covered: usize = parts.iter().map(|part| part.keys.length).sum();
        let leaves_keys = covered < sizes.rows * sizes.steps;
        if parts.is_empty() {
            return Ok(Self { queries: None, keys: None, leaves_keys });
        }
        let (queries, keys) = (Tiles::listed(&parts, of_queries), Tiles::listed(&parts, of_keys));
        Ok(Self { queries: Some(queries), keys: Some(keys), leaves_keys })
    }
}

/// Checks that the kernels can count what there is.
fn check<T: Element>(problem: &Problem<T, Cuda>) -> Result<()> {
    let group = problem.sizes.group();
    let check = |part: &Part| {
        if part.queries.len.checked_mul(group).is_none_or(|rows| rows > MOST) {
            let got = format_args!("{} of {group}", part.queries.len).to_string();
            return Err(Error::argument("q", "sequences of at most 2^30 steps times the heads of a group", got));
        }
        if part.keys.length > MOST {
            return Err(Error::argument("k", "at most 2^30 keys of a sequence", part.keys.length));
        }
        Ok(())
    };
    match alike(problem) {
        Some((_, part)) => check(&part),
        None => problem.parts().iter().try_for_each(check),
    }
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
