//! The text: what is read, which part is held out, and in which order training sees the rest.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::Result;

/// Stands before every piece, so that its first byte too is predicted from something. No text has it.
pub const MARK: u8 = 0;

/// A file that is longer is several pieces, so that a single long file can be divided.
const LONGEST_PIECE: usize = 64 << 10;

/// The repository's own text.
const DEFAULT_TEXT: [&str; 9] =
    ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "src", "kernels", "tests", "examples", "benches"];
const EXTENSIONS: [&str; 7] = ["rs", "md", "cu", "cuh", "py", "sh", "toml"];

/// Text to learn from, and text to be measured by, which has no piece in common with it.
#[derive(Debug)]
pub struct Corpus {
    /// The pieces to learn from, one after another, a mark before each.
    pub train: Vec<u8>,
    /// The other pieces, a mark before each.
    pub held_out: Vec<Vec<u8>>,
    /// Tells this text, divided this way, from others.
    pub fingerprint: u64,
}

impl Corpus {
    /// Reads `files`, or the repository's own text if there are none, and holds out whole pieces, drawn by `seed`, until
    /// they are a share of `fraction` of the bytes.
    pub fn read(files: &[PathBuf], fraction: f64, seed: u64) -> Result<Self> {
        let mut pieces = Vec::new();
        if files.is_empty() {
            let root = Path::new(env!("CARGO_MANIFEST_DIR"));
            let mut found = Vec::new();
            // A published package lacks some.
            for path in DEFAULT_TEXT.map(|name| root.join(name)).into_iter().filter(|path| path.exists()) {
                find(&path, &mut found)?;
            }
            for file in found {
                divide(&read(&file)?, &mut pieces);
            }
        } else {
            for file in files {
                divide(&read(file)?, &mut pieces);
            }
        }
        Self::divide(pieces, fraction, seed)
    }

    /// The same from pieces.
    pub fn divide(mut pieces: Vec<Vec<u8>>, fraction: f64, seed: u64) -> Result<Self> {
        // The same piece twice could fall on both sides.
        let mut seen = HashSet::new();
        pieces.retain(|piece| !piece.is_empty() && seen.insert(piece.clone()));
        pieces.shuffle(&mut StdRng::seed_from_u64(seed));
        let wanted = fraction * pieces.iter().map(Vec::len).sum::<usize>() as f64;
        let mut corpus = Self { train: Vec::new(), held_out: Vec::new(), fingerprint: 0 };
        let mut held_out = 0;
        for piece in pieces {
            let marked = [&[MARK], &piece[..]].concat();
            if (held_out as f64) < wanted {
                held_out += piece.len();
                corpus.held_out.push(marked);
            } else {
                corpus.train.extend(marked);
            }
        }
        if corpus.held_out.is_empty() || corpus.train.is_empty() {
            return Err(
                "the text is too short: there must be a piece to learn from and one to hold out, where a piece \
                        is a file or 64 KiB of a longer one"
                    .into(),
            );
        }
        // FNV-1a, as it must be the same in another build.
        let bytes = corpus.train.iter().chain([&MARK, &MARK]).chain(corpus.held_out.iter().flatten());
        corpus.fingerprint =
            bytes.fold(0xcbf2_9ce4_8422_2325, |h, &byte| (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        Ok(corpus)
    }

    /// The bytes of text held out, which are the bytes that are predicted.
    pub fn held_out_bytes(&self) -> usize {
        self.held_out.iter().map(|piece| piece.len() - 1).sum()
    }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
    if bytes.contains(&MARK) || str::from_utf8(&bytes).is_err() {
        return Err(format!("{}: not a text in UTF-8", file.display()).into());
    }
    Ok(bytes)
}

/// The text files at and under `path`, in an order that is the same everywhere.
fn find(path: &Path, to: &mut Vec<PathBuf>) -> Result<()> {
    let at = |error| format!("{}: {error}", path.display());
    if !path.is_dir() {
        if path.extension().and_then(|extension| extension.to_str()).is_some_and(|it| EXTENSIONS.contains(&it)) {
            to.push(path.into());
        }
        return Ok(());
    }
    let entries = fs::read_dir(path).map_err(at)?.map(|entry| Ok(entry?.path()));
    let mut entries = entries.collect::<std::io::Result<Vec<_>>>().map_err(at)?;
    entries.sort();
    entries.iter().try_for_each(|entry| find(entry, to))
}

/// Divides a long text into pieces that end with lines.
fn divide(mut text: &[u8], to: &mut Vec<Vec<u8>>) {
    while text.len() > LONGEST_PIECE {
        let end = text[..LONGEST_PIECE].iter().rposition(|&byte| byte == b'\n').map_or(LONGEST_PIECE, |at| at + 1);
        let (piece, rest) = text.split_at(end);
        to.push(piece.into());
        text = rest;
    }
    to.push(text.into());
}

/// Where training stands in the text. This is the whole state of its random numbers: those of an epoch follow from the
/// seed and the epoch's number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// How often the text has been gone through.
    pub epoch: u64,
    /// How many windows of this epoch have been seen.
    pub windows: usize,
}

/// Windows of the text. In every epoch each byte is learnt from once, but for a few at the ends, in windows that begin
/// elsewhere than in the epoch before and come in another order.
pub struct Windows<'a> {
    text: &'a [u8],
    length: usize,
    seed: u64,
    position: Position,
    starts: Vec<usize>,
}

impl<'a> Windows<'a> {
    /// Windows of `length` bytes and the one after them, from `position` on.
    pub fn new(text: &'a [u8], length: usize, seed: u64, position: Position) -> Result<Self> {
        // Wherever the first begins, one must fit.
        if text.len() / 2 < length {
            return Err(format!("there are {} bytes to learn from, too few for windows of {length}", text.len()).into());
        }
        let mut windows = Self { text, length, seed, position, starts: Vec::new() };
        windows.shuffle();
        Ok(windows)
    }

    pub fn position(&self) -> Position {
        self.position
    }

    /// The next windows: what is read, and after each byte the one to be predicted.
    pub fn next(&mut self, batch: usize) -> (Vec<u32>, Vec<u32>) {
        let (mut ids, mut targets) = (Vec::new(), Vec::new());
        for _ in 0..batch {
            if self.position.windows >= self.starts.len() {
                self.position = Position { epoch: self.position.epoch + 1, windows: 0 };
                self.shuffle();
            }
            let start = self.starts[self.position.windows];
            self.position.windows += 1;
            let window = &self.text[start..=start + self.length];
            ids.extend(window[..self.length].iter().map(|&byte| u32::from(byte)));
            targets.extend(window[1..].iter().map(|&byte| u32::from(byte)));
        }
        (ids, targets)
    }

    fn shuffle(&mut self) {
        let mut random = StdRng::seed_from_u64(self.seed ^ (self.position.epoch + 1).rotate_left(32));
        let first = random.random_range(0..self.length);
        self.starts = (first..self.text.len() - self.length).step_by(self.length).collect();
        self.starts.shuffle(&mut random);
    }
}
