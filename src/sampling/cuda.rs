//! The choice on NVIDIA GPUs; see [`cuda`](crate::cuda) for how tensors are passed.
//!
//! Two kernels are launched, whatever the settings, which they read from device memory: a call that was captured in a
//! CUDA graph serves every setting, and replays go on from the positions and the bits that those before have left.
//! Nothing is allocated where the slots are [`Slots::Rows`](crate::Slots) or a [`DeviceSlots`](crate::DeviceSlots) (or
//! a list of at most 512 on the host, which a graph keeps as it is); what the kernels leave for each other lies in a
//! [`Workspace`] of the caller's.
//!
//! A row is divided over several blocks. Greedy choices read it once, those by a temperature and min-p twice; top-k and
//! top-p take two or three readings more, by one block.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits};

use super::check::{Lens, Problem};
use super::{INVALID, Inputs, MAX_VOCAB_SIZE, Settings};
use crate::cuda::params::sampling::{self as kernels, BINS, THREADS, TILE, WARPS};
use crate::cuda::{Arguments, Cuda, Device, Kernel, Module, is_vectorizable, params};
use crate::pool::cuda::SlotList;
use crate::{Error, Result, View};

const _: () = assert!(kernels::INVALID == INVALID as u64, "both sides have the same token for none");
const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<Settings>() == size_of::<kernels::Settings>());
    assert!(offset_of!(Settings, seed) == offset_of!(kernels::Settings, seed));
    assert!(offset_of!(Settings, position) == offset_of!(kernels::Settings, position));
    assert!(offset_of!(Settings, top_k) == offset_of!(kernels::Settings, top_k));
    assert!(offset_of!(Settings, temperature) == offset_of!(kernels::Settings, temperature));
    assert!(offset_of!(Settings, top_p) == offset_of!(kernels::Settings, top_p));
    assert!(offset_of!(Settings, min_p) == offset_of!(kernels::Settings, min_p));
    assert!(offset_of!(Settings, repetition_penalty) == offset_of!(kernels::Settings, repetition_penalty));
};

// SAFETY (both): it is plain data without padding, `Pod`, of the layout that the kernels take it to have.
unsafe impl DeviceRepr for Settings {}
unsafe impl ValidAsZeroBits for Settings {}

/// What is read and brought up to date for each sequence, and where tokens are written, all in device memory. The
/// fields are those of [`StateMut`](super::StateMut).
#[derive(Debug)]
pub struct StateMut<'a> {
    /// `(sequences)`.
    pub settings: &'a mut CudaSlice<Settings>,
    /// `(sequences, ⌈vocab / 32⌉)`.
    pub occurred: Option<&'a mut CudaSlice<u32>>,
    /// `(sequences)`. Those that no row is of are left as they are.
    pub tokens: &'a mut CudaSlice<u32>,
    /// `(sequences)`. Those that no row is of are left as they are.
    pub log_probs: Option<&'a mut CudaSlice<f32>>,
}

impl<'a> StateMut<'a> {
    /// Neither bits nor log-probabilities.
    pub fn new(settings: &'a mut CudaSlice<Settings>, tokens: &'a mut CudaSlice<u32>) -> Self {
        Self { settings, occurred: None, tokens, log_probs: None }
    }
}

/// Memory in which the kernels of a call leave things for one another: some 25 KB for each row. What it holds between
/// calls is of no account; calls that may run at the same time need one each.
#[derive(Debug)]
pub struct Workspace {
    data: CudaSlice<u64>,
    rows: usize,
    vocab_size: usize,
}

impl Workspace {
    /// Memory for calls of at most so many rows and tokens of the vocabulary.
    ///
    /// # Errors
    /// More tokens than [`MAX_VOCAB_SIZE`], more rows than there is memory for. What the driver refuses.
    pub fn new(stream: &Arc<CudaStream>, rows: usize, vocab_size: usize) -> Result<Self> {
        if vocab_size > MAX_VOCAB_SIZE {
            return Err(Error::argument("vocab_size", format_args!("at most {MAX_VOCAB_SIZE}"), vocab_size));
        }
        let per_row = Parts::of(1, vocab_size).len;
        // Blocks are counted by 31 bits.
        let fits = rows.checked_mul(tiles(vocab_size)).is_some_and(|blocks| blocks <= i32::MAX as usize);
        if !fits || rows.checked_mul(per_row + 1).is_none_or(|len| len > isize::MAX as usize / 8) {
            return Err(Error::argument("rows", "as many as fit in memory", rows));
        }
        let data = Device::new(stream)?.workspace("choosing tokens", Parts::of(rows, vocab_size).len)?;
        Ok(Self { data, rows, vocab_size })
    }

    fn check(&self, rows: usize, vocab_size: usize) -> Result<()> {
        if rows > self.rows || vocab_size > self.vocab_size {
            let expected = format_args!("one for {rows} rows of {vocab_size} tokens").to_string();
            let got = format_args!("one for {} rows of {}", self.rows, self.vocab_size).to_string();
            return Err(Error::argument("workspace", expected, got));
        }
        Ok(())
    }
}

/// Chooses the token of each row on the stream's device, asynchronously.
///
/// # Errors
/// An argument that does not fit, see [`Inputs`] and [`StateMut`], or that lies on another device; a workspace for fewer
/// rows or tokens. Nothing is written then. What the driver refuses.
pub fn sample(
    stream: &Arc<CudaStream>,
    inputs: &Inputs<Cuda>,
    state: StateMut,
    workspace: &mut Workspace,
) -> Result<()> {
    let StateMut { settings, occurred, tokens, log_probs } = state;
    let lens = Lens {
        settings: settings.len(),
        occurred: occurred.as_ref().map(|words| words.len()),
        tokens: tokens.len(),
        log_probs: log_probs.as_ref().map(|values| values.len()),
    };
    let Problem { rows, vocab_size, words, offset, stride } = inputs.check(&lens)?;
    let sequences = settings.len();
    workspace.check(rows, vocab_size)?;
    let (device, mut arguments) = (Device::new(stream)?, Arguments::new(stream));
    let View { data, .. } = inputs.logits;
    let logits = arguments.read("logits", data, offset)?;
    let slots = SlotList::new(&device, &mut arguments, inputs.slots, sequences)?;
    let layout = Layout::new(rows, vocab_size);
    let of_settings = (settings.len() * size_of::<Settings>()) as u64;
    let params = kernels::Sample {
        logits,
        stride: stride as i64,
        tokens: vocab_size as i64,
        tiles: layout.tiles as i64,
        chunks: layout.chunks as i64,
        chunk_tiles: layout.chunk_tiles as i64,
        words: words as i64,
        settings: arguments.write("settings", settings)?,
        occurred: occurred.map_or(Ok(0), |occurred| arguments.write("occurred", occurred))?,
        chosen: arguments.write("tokens", tokens)?,
        log_probs: arguments.write_optional("log_probs", log_probs)?,
        workspace: Parts::of(rows, vocab_size).at(arguments.write("workspace", &mut workspace.data)?),
        is_whole: is_vectorizable::<f32>(logits, &[stride as i64], params::QUAD).into(),
        slots: slots.params,
    };
    if rows == 0 {
        return Ok(());
    }
    let early = [params.settings..params.settings + of_settings, slots.storage.clone()];
    for (module, name) in [(Module::SAMPLING_MAXIMUM, "sampling_maximum"), (Module::SAMPLING_CHOOSE, "sampling_choose")]
    {
        // SAFETY: every address and extent has been checked, slots on the device by the kernels; the workspace has room
        // for so many rows and tokens, and what the second kernel reads there the first has written. Each row is
        // finished by one block. Where a caller has put a slot on the device twice, its settings and bits are those of
        // one of the rows or the other. Settings, which only the second kernel writes and at its end, and slots are read early.
        unsafe {
            device.launch_overlapping(
                &Kernel::new(module, [name]),
                [rows * layout.chunks, 1],
                THREADS,
                0,
                &params,
                &early,
            )
        }?;
    }
    Ok(())
}

fn tiles(vocab_size: usize) -> usize {
    vocab_size.div_ceil(TILE)
}

/// How rows are divided, by the shape alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    tiles: usize,
    chunk_tiles: usize,
    chunks: usize,
}

impl Layout {
    /// A tile to each warp, but where there are many rows no more blocks than devices run at a time, twice.
    fn new(rows: usize, vocab_size: usize) -> Self {
        const BLOCKS: usize = 512;
        let tiles = tiles(vocab_size);
        let turns = (rows * tiles).div_ceil(WARPS * BLOCKS).clamp(1, tiles.div_ceil(WARPS).max(1));
        Self { tiles, chunk_tiles: turns * WARPS, chunks: tiles.div_ceil(turns * WARPS) }
    }
}

/// Where the parts of a workspace begin, in words of 64 bits.
struct Parts {
    sums: usize,
    log_sums: usize,
    bin_sums: usize,
    bin_counts: usize,
    done: usize,
    len: usize,
}

impl Parts {
    /// The parts for so many rows. Those for fewer rows or tokens need no more.
    fn of(rows: usize, vocab_size: usize) -> Self {
        let tiles = tiles(vocab_size);
        // In front of them a maximum of two words for each chunk, which has all tiles of a block's warps at least.
        let sums = rows * 2 * tiles.div_ceil(WARPS);
        let log_sums = sums + rows * tiles;
        let bin_sums = log_sums + rows * tiles;
        let bin_counts = bin_sums + rows * BINS;
        let done = bin_counts + rows * BINS / 2;
        Self { sums, log_sums, bin_sums, bin_counts, done, len: done + rows.div_ceil(2) }
    }

    fn at(&self, address: u64) -> kernels::Workspace {
        let at = |word: usize| address + (word * size_of::<u64>()) as u64;
        kernels::Workspace {
            maxima: at(0),
            sums: at(self.sums),
            log_sums: at(self.log_sums),
            bin_sums: at(self.bin_sums),
            bin_counts: at(self.bin_counts),
            done: at(self.done),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_divided_by_their_number() {
        let layout = |rows, vocab_size| {
            let Layout { tiles, chunk_tiles, chunks } = Layout::new(rows, vocab_size);
            (tiles, chunk_tiles, chunks)
        };
        assert_eq!(layout(1, 1), (1, 16, 1));
        assert_eq!(layout(1, 50_280), (99, 16, 7));
        assert_eq!(layout(64, 50_280), (99, 16, 7));
        assert_eq!(layout(256, 50_280), (99, 64, 2));
        assert_eq!(layout(5000, 50_280), (99, 112, 1));
        assert_eq!(layout(1, 256_000), (500, 16, 32));
    }
}
