//! Writing to the storages of several tensors at once.
//!
//! candle hands out a storage to be written only within an operator in place on one tensor, while its lock is held. So an
//! operator that writes to several runs within the others: each adds its storage to those that are held and runs the next one,
//! and the innermost does the work. As everywhere, locks are taken in the order of the storages' addresses, each once.

use std::cell::RefCell;

use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Result, Storage, StorageRef, Tensor};

use super::device::Backend;
use super::tensors::storage_of;
use crate::Error;

/// The most tensors that are written to at once: each takes some hundred bytes of the stack, or a thousand in a program that
/// is not optimised.
pub(crate) const MOST_WRITTEN: usize = 64;

/// A storage that is locked to be written.
pub(crate) enum StorageMut<'a> {
    Cpu(&'a mut CpuStorage),
    #[cfg(feature = "candle-cuda")]
    Cuda(&'a mut CudaStorage),
}

/// Storages that are locked to be read, by the order in which their tensors were given.
pub(crate) struct Read<'r> {
    keys: &'r [usize],
    /// In the order of the keys.
    guards: Vec<(usize, StorageRef<'r>)>,
}

impl Read<'_> {
    /// The storage of tensor number `index`.
    pub fn storage(&self, index: usize) -> &Storage {
        match self.guards.binary_search_by_key(&self.keys[index], |(key, _)| *key) {
            Ok(at) => &self.guards[at].1,
            Err(_) => unreachable!("all were locked"),
        }
    }
}

/// Calls `work` with the storages of `written`, to be written, and of `read`.
///
/// # Errors
/// A tensor of `written`, named `argument`, whose storage is also another's or one of `read`; what `work` gives.
pub(crate) fn write_all<R>(
    argument: &'static str,
    written: &[&Tensor],
    read: &[&Tensor],
    work: impl FnOnce(Vec<StorageMut>, &Read) -> Result<R>,
) -> Result<R> {
    debug_assert!(written.len() <= MOST_WRITTEN);
    let keys: Vec<_> = read.iter().map(|tensor| storage_of(tensor)).collect();
    let reads = read.iter().zip(&keys).map(|(tensor, &key)| Step { key, tensor, place: None });
    let writes = written.iter().enumerate();
    let writes = writes.map(|(place, tensor)| Step { key: storage_of(tensor), tensor, place: Some(place) });
    let mut steps: Vec<_> = reads.chain(writes).collect();
    steps.sort_by_key(|step| step.key);
    steps.dedup_by(|a, b| a.key == b.key && a.place.is_none() && b.place.is_none());
    if steps.windows(2).any(|pair| pair[0].key == pair[1].key) {
        let expected = "a storage of its own, as it is written";
        return Err(
            Error::argument(argument, expected, "one that another argument reads or that is written twice").into()
        );
    }
    let written = written.iter().map(|_| None).collect();
    advance(&steps, Held { written, read: Read { keys: &keys, guards: Vec::new() }, work })
}

/// The storages that are written, on one kind of device. An error that one lies elsewhere names `argument`.
pub(crate) fn open<'t, B: Backend, const N: usize>(
    argument: &'static str,
    written: Vec<StorageMut<'t>>,
) -> Result<[&'t mut B::Storage; N]> {
    let opened: Vec<_> = written.into_iter().map(|storage| open_one::<B>(argument, storage)).collect::<Result<_>>()?;
    match opened.try_into() {
        Ok(opened) => Ok(opened),
        Err(_) => unreachable!("as many as were given"),
    }
}

/// One of them.
pub(crate) fn open_one<'t, B: Backend>(argument: &'static str, storage: StorageMut<'t>) -> Result<&'t mut B::Storage> {
    // The devices were checked, but another thread may move a variable between the two.
    let elsewhere = || Error::argument(argument, format_args!("{argument} on one device"), "one elsewhere");
    Ok(B::open_mut(storage).ok_or_else(elsewhere)?)
}

/// A storage to be locked.
struct Step<'t> {
    key: usize,
    tensor: &'t Tensor,
    /// Its number among those that are written, if it is.
    place: Option<usize>,
}

/// What is locked so far, and what is to be done with all.
struct Held<'h, W> {
    written: Vec<Option<StorageMut<'h>>>,
    read: Read<'h>,
    work: W,
}

/// Takes the locks of `steps`, and then does the work.
fn advance<'h, W, R>(steps: &'h [Step<'h>], mut held: Held<'h, W>) -> Result<R>
where
    W: FnOnce(Vec<StorageMut>, &Read) -> Result<R>,
{
    for (at, step) in steps.iter().enumerate() {
        let Some(place) = step.place else {
            held.read.guards.push((step.key, step.tensor.storage_and_layout().0));
            continue;
        };
        let nested =
            Nested { rest: &steps[at + 1..], place, held: RefCell::new(Some(held)), result: RefCell::new(None) };
        step.tensor.inplace_op1(&nested)?;
        return match nested.result.into_inner() {
            Some(result) => Ok(result),
            None => unreachable!("candle ran the operator"),
        };
    }
    let written = held.written.into_iter().flatten().collect();
    (held.work)(written, &held.read)
}

/// An operator in place that goes on with the rest of the storages.
struct Nested<'h, W, R> {
    rest: &'h [Step<'h>],
    place: usize,
    held: RefCell<Option<Held<'h, W>>>,
    result: RefCell<Option<R>>,
}

impl<W, R> Nested<'_, W, R>
where
    W: FnOnce(Vec<StorageMut>, &Read) -> Result<R>,
{
    fn run(&self, storage: StorageMut) -> Result<()> {
        let Some(Held { mut written, read, work }) = self.held.take() else {
            unreachable!("candle runs an operator once")
        };
        written[self.place] = Some(storage);
        *self.result.borrow_mut() = Some(advance(self.rest, Held { written, read, work })?);
        Ok(())
    }
}

impl<W, R> InplaceOp1 for Nested<'_, W, R>
where
    W: FnOnce(Vec<StorageMut>, &Read) -> Result<R>,
{
    fn name(&self) -> &'static str {
        "write-all"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        self.run(StorageMut::Cpu(storage))
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        self.run(StorageMut::Cuda(storage))
    }

    #[cfg(not(feature = "candle-cuda"))]
    fn cuda_fwd(&self, _: &mut CudaStorage, _: &Layout) -> Result<()> {
        // candle may have been built for GPUs by another crate's wish.
        Err(super::device::elsewhere("parameters", "an NVIDIA GPU").into())
    }

    fn metal_fwd(&self, _: &mut candle_core::MetalStorage, _: &Layout) -> Result<()> {
        Err(super::device::elsewhere("parameters", "a Metal device").into())
    }
}
