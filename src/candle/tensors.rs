//! Tensors read as views, without a copy.

use candle_core::{DType, Storage, StorageRef, Tensor, WithDType};

use super::device::{Backend, Value};
use crate::{Error, Projection, Result, View};

/// A named argument.
pub(super) type Argument<'a> = (&'static str, &'a Tensor);

/// The arguments that every call has, and those of `optional` that are there.
pub(super) fn given<'a, const N: usize, const M: usize>(
    always: [Argument<'a>; N],
    optional: [(&'static str, Option<&'a Tensor>); M],
) -> Vec<Argument<'a>> {
    always.into_iter().chain(optional.into_iter().filter_map(|(name, tensor)| Some((name, tensor?)))).collect()
}

/// What was computed together with something that was asked for.
pub(super) fn both<T>((first, second): (T, Option<T>)) -> (T, T) {
    match second {
        Some(second) => (first, second),
        None => unreachable!("it was asked for"),
    }
}

/// Checks that all arguments lie where the first does.
pub(super) fn check_devices(arguments: &[Argument]) -> Result<()> {
    let Some((first, tensor)) = arguments.first() else { return Ok(()) };
    let location = tensor.device().location();
    for (name, tensor) in arguments {
        let found = tensor.device().location();
        if found != location {
            return Err(Error::argument(
                name,
                format_args!("a tensor on {location:?}, as `{first}`"),
                format_args!("one on {found:?}"),
            ));
        }
    }
    Ok(())
}

/// Which storage a tensor reads: tensors that share one have the same.
pub(super) fn storage_of(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    std::ptr::from_ref::<Storage>(&storage).addr()
}

/// Storages that are locked for reading.
///
/// candle has a lock on each storage. Each is taken once however many tensors share it, as taking one again waits for
/// ever if another thread came to write in between; and in the order of their addresses, as candle's own operators in
/// place do, so that no two threads wait for each other.
pub(super) struct Locked<'a> {
    storages: Vec<(usize, StorageRef<'a>)>,
}

impl<'a> Locked<'a> {
    /// Locks those storages of `arguments` for which `which` is true of [`storage_of`].
    pub fn new(arguments: &[Keyed<'a>], which: impl Fn(usize) -> bool) -> Self {
        let mut wanted: Vec<_> = arguments.iter().filter(|argument| which(argument.storage)).collect();
        wanted.sort_unstable_by_key(|argument| argument.storage);
        wanted.dedup_by_key(|argument| argument.storage);
        let lock = |argument: &&Keyed<'a>| (argument.storage, argument.tensor.storage_and_layout().0);
        Self { storages: wanted.iter().map(lock).collect() }
    }

    fn get(&self, storage: usize) -> Option<&Storage> {
        self.storages.iter().find(|(key, _)| *key == storage).map(|(_, storage)| &**storage)
    }
}

/// An argument and its storage.
#[derive(Clone, Copy)]
pub(super) struct Keyed<'a> {
    pub name: &'static str,
    pub tensor: &'a Tensor,
    pub storage: usize,
}

/// Looks up the storages of `arguments`. No lock may be held.
pub(super) fn keyed<'a>(arguments: &[Argument<'a>]) -> Vec<Keyed<'a>> {
    arguments.iter().map(|&(name, tensor)| Keyed { name, tensor, storage: storage_of(tensor) }).collect()
}

/// Arguments on one device, all of whose storages are locked.
pub(super) struct Opened<'a> {
    arguments: Vec<Keyed<'a>>,
    locked: Locked<'a>,
}

impl<'a> Opened<'a> {
    pub fn new(arguments: &[Argument<'a>]) -> Result<Self> {
        check_devices(arguments)?;
        let arguments = keyed(arguments);
        let locked = Locked::new(&arguments, |_| true);
        Ok(Self { arguments, locked })
    }

    pub fn reader(&self) -> Reader<'_> {
        Reader::new(&self.arguments, &self.locked)
    }
}

/// Arguments whose storages are locked, to be read as views.
pub(super) struct Reader<'l> {
    arguments: &'l [Keyed<'l>],
    locked: &'l Locked<'l>,
    also: Option<&'l Locked<'l>>,
}

impl<'l> Reader<'l> {
    /// `locked` must hold the storages of all `arguments`.
    pub fn new(arguments: &'l [Keyed<'l>], locked: &'l Locked<'l>) -> Self {
        Self { arguments, locked, also: None }
    }

    /// More storages, which the first need not hold then.
    pub fn and(self, also: &'l Locked<'l>) -> Self {
        Self { also: Some(also), ..self }
    }

    /// The argument called `name`, which must be there.
    pub fn view<B: Backend, T: Value, const R: usize>(
        &self,
        name: &'static str,
        names: &str,
    ) -> candle_core::Result<View<'l, T, R, B::Memory>> {
        self.optional::<B, T, R>(name, names)?
            .ok_or_else(|| Error::argument(name, format_args!("a tensor {names}"), "none").into())
    }

    /// The argument called `name`, if it is there.
    pub fn optional<B: Backend, T: Value, const R: usize>(
        &self,
        name: &'static str,
        names: &str,
    ) -> candle_core::Result<Option<View<'l, T, R, B::Memory>>> {
        let Some(argument) = self.arguments.iter().find(|argument| argument.name == name) else { return Ok(None) };
        let layout = argument.tensor.layout();
        let rank = || Error::argument(name, format_args!("shape {names}"), format_args!("{:?}", layout.dims()));
        let shape = layout.dims().try_into().map_err(|_| rank())?;
        let strides = layout.stride().try_into().map_err(|_| rank())?;
        let data = self.elements::<B, T>(argument)?;
        Ok(Some(View { data, offset: layout.start_offset(), shape, strides }))
    }

    /// `B` or `C`, of two, three or four dimensions.
    pub fn projection<B: Backend, T: Value>(
        &self,
        name: &'static str,
    ) -> candle_core::Result<Projection<'l, T, B::Memory>> {
        let rank = self.arguments.iter().find(|argument| argument.name == name).map(|argument| argument.tensor.rank());
        Ok(match rank {
            Some(2) => Projection::Constant(self.view::<B, f32, 2>(name, "(d_inner, d_state)")?),
            Some(3) => {
                let View { data, offset, shape, strides } = self.view::<B, T, 3>(name, "(batch, length, d_state)")?;
                let [batch, len, d_state] = shape;
                // There is one group, so that its stride does not matter.
                let strides = [strides[0], strides[1], 0, strides[2]];
                Projection::Varying(View { data, offset, shape: [batch, len, 1, d_state], strides })
            }
            _ => Projection::Varying(self.view::<B, T, 4>(
                name,
                "(batch, length, groups, d_state), (batch, length, d_state) or (d_inner, d_state)",
            )?),
        })
    }

    fn elements<B: Backend, T: Value>(&self, argument: &Keyed) -> candle_core::Result<&'l super::device::Buffer<B, T>> {
        check_dtype(argument.name, <T as WithDType>::DTYPE, argument.tensor.dtype())?;
        let storage = self.locked.get(argument.storage).or_else(|| self.also?.get(argument.storage));
        let storage = storage.and_then(B::open).ok_or_else(|| {
            // `check_devices` has seen to it, except where another thread moves a variable between the two.
            Error::argument(argument.name, "a tensor on the device of the others", "one elsewhere")
        })?;
        B::elements(storage)
    }
}

/// Checks the element type of an argument.
pub(super) fn check_dtype(name: &'static str, expected: DType, got: DType) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::argument(name, format_args!("dtype {expected:?}"), format_args!("{got:?}")))
}
