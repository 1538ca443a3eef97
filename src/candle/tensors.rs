//! candle's tensors as a kind of an operator's tensors, and how they become views without a copy.

use std::convert::Infallible;
use std::marker::PhantomData;

use candle_core::{DType, Storage, StorageRef, Tensor, WithDType};

use super::device::{Backend, Buffer, SlotsOf, Value};
use super::{Slots, graph};
use crate::kinds::{Buffers, Field, Kind, Map, Mut, Nothing, Pair, ProjectionAs, ProjectionOf, Ref, Views};
use crate::{Error, Result, View};

/// candle's tensors, of any element type.
#[derive(Debug)]
pub struct CandleTensors;

impl Kind for CandleTensors {
    type Activation<const R: usize> = Tensor;
    type Parameter<const R: usize> = Tensor;
}

/// `B` or `C`, which is constant if it has two dimensions.
pub(crate) fn projection(tensor: &Tensor) -> ProjectionOf<&Tensor, &Tensor> {
    match tensor.rank() {
        2 => ProjectionOf::Constant(tensor),
        _ => ProjectionOf::Varying(tensor),
    }
}

/// Clones tensors, to be kept for a backward pass.
pub(crate) struct Keep;

impl<'a> Map<Ref<'a, CandleTensors>, CandleTensors> for Keep {
    type Error = Infallible;

    fn activation<const R: usize>(&mut self, _: Field, tensor: &'a Tensor) -> Result<Tensor, Infallible> {
        Ok(tensor.clone())
    }

    fn parameter<const R: usize>(&mut self, _: Field, tensor: &'a Tensor) -> Result<Tensor, Infallible> {
        Ok(tensor.clone())
    }
}

/// What was computed together with something that was requested.
pub(crate) fn both<T>((first, second): (T, Option<T>)) -> (T, T) {
    match second {
        Some(second) => (first, second),
        None => unreachable!("it was requested"),
    }
}

/// The tensors of a call by name, on one device. An operator's are added by a `map`.
#[derive(Default)]
pub(crate) struct Arguments<'a>(Vec<(&'static str, &'a Tensor)>);

impl<'a> Arguments<'a> {
    pub fn add(&mut self, name: &'static str, tensor: &'a Tensor) {
        self.0.push((name, tensor));
    }

    /// Adds the slots, if they are a tensor.
    pub fn add_slots(&mut self, slots: Slots<'a>) {
        if let Slots::Device(tensor) = slots {
            self.add("slots", tensor);
        }
    }

    pub fn tensors(&self) -> Vec<&'a Tensor> {
        self.0.iter().map(|(_, tensor)| *tensor).collect()
    }

    /// Checks that all lie where the first does.
    pub fn check_devices(&self) -> Result<()> {
        let Some((first, tensor)) = self.0.first() else { return Ok(()) };
        let location = tensor.device().location();
        for (name, tensor) in &self.0 {
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

    /// Looks up which storage each tensor reads. No lock may be held.
    pub fn storages(&self) -> Storages<'a> {
        Storages(self.0.iter().map(|&(name, tensor)| Stored { name, tensor, storage: storage_of(tensor) }).collect())
    }

    /// Checks the devices and locks all storages.
    pub fn lock(&self) -> Result<Locked<'a>> {
        self.check_devices()?;
        let storages = self.storages();
        Ok(Locked { guards: storages.lock(|_| true), storages })
    }
}

impl<'a> Map<Ref<'a, CandleTensors>, Nothing> for Arguments<'a> {
    type Error = Infallible;

    fn activation<const R: usize>(&mut self, field: Field, tensor: &'a Tensor) -> Result<(), Infallible> {
        self.add(field.name, tensor);
        Ok(())
    }

    fn parameter<const R: usize>(&mut self, field: Field, tensor: &'a Tensor) -> Result<(), Infallible> {
        self.add(field.name, tensor);
        Ok(())
    }
}

/// Which storage a tensor reads: tensors that share one have the same.
pub(crate) fn storage_of(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    std::ptr::from_ref::<Storage>(&storage).addr()
}

/// A tensor and the storage that it reads.
#[derive(Clone, Copy)]
pub(crate) struct Stored<'a> {
    pub name: &'static str,
    tensor: &'a Tensor,
    pub storage: usize,
}

/// The storages of a call's tensors.
pub(crate) struct Storages<'a>(Vec<Stored<'a>>);

/// Storages that are locked for reading, each with what [`storage_of`] says.
///
/// candle has a lock on each storage. Each is taken once however many tensors share it, as taking one again waits for
/// ever if another thread came to write in between; and in the order of their addresses, as candle's own operators in
/// place do, so that no two threads wait for each other. (candle tells which storage a tensor reads only to who holds its
/// lock, so that [`Arguments::storages`] takes and releases each before.)
pub(crate) type Guards<'a> = Vec<(usize, StorageRef<'a>)>;

impl<'a> Storages<'a> {
    pub fn iter(&self) -> impl Iterator<Item = &Stored<'a>> {
        self.0.iter()
    }

    /// Locks those for which `which` is true of [`storage_of`].
    pub fn lock(&self, which: impl Fn(usize) -> bool) -> Guards<'a> {
        let mut wanted: Vec<_> = self.0.iter().filter(|stored| which(stored.storage)).collect();
        wanted.sort_unstable_by_key(|stored| stored.storage);
        wanted.dedup_by_key(|stored| stored.storage);
        wanted.iter().map(|stored| (stored.storage, stored.tensor.storage_and_layout().0)).collect()
    }
}

/// A call's tensors, all of whose storages are locked.
pub(crate) struct Locked<'a> {
    storages: Storages<'a>,
    guards: Guards<'a>,
}

impl Locked<'_> {
    pub fn reader(&self) -> Reader<'_> {
        Reader { storages: &self.storages, guards: [&self.guards, &[]] }
    }
}

/// Reads tensors as views while their storages are locked.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'l> {
    storages: &'l Storages<'l>,
    guards: [&'l [(usize, StorageRef<'l>)]; 2],
}

impl<'l> Reader<'l> {
    /// `guards` must be of the storages of all tensors.
    pub fn new(storages: &'l Storages<'l>, guards: [&'l [(usize, StorageRef<'l>)]; 2]) -> Self {
        Self { storages, guards }
    }

    /// What reads an operator's tensors, activations as elements of type `T`: for a `map`.
    pub fn views<B: Backend, T: Value>(self) -> ReadViews<'l, B, T> {
        ReadViews { reader: self, of: PhantomData }
    }

    /// One tensor, whose dimensions have these names.
    pub fn view<B: Backend, T: Value, const R: usize>(
        &self,
        name: &'static str,
        dims: &str,
        tensor: &Tensor,
    ) -> candle_core::Result<View<'l, T, R, B::Memory>> {
        let layout = tensor.layout();
        let rank = || Error::argument(name, format_args!("shape {dims}"), format_args!("{:?}", layout.dims()));
        let shape = layout.dims().try_into().map_err(|_| rank())?;
        let strides = layout.stride().try_into().map_err(|_| rank())?;
        let data = self.elements::<B, T>(name, tensor)?;
        Ok(View { data, offset: layout.start_offset(), shape, strides })
    }

    /// A tensor of the shape of `like` as its rows, whatever the dimensions before the last; of a tensor that
    /// [`has_rows`].
    pub fn rows<B: Backend, T: Value>(
        &self,
        name: &'static str,
        tensor: &Tensor,
        like: &Tensor,
    ) -> candle_core::Result<View<'l, T, 2, B::Memory>> {
        let layout = tensor.layout();
        let expected =
            |expected: &dyn std::fmt::Display| Error::argument(name, expected, format_args!("{:?}", layout.dims()));
        if layout.dims() != like.dims() {
            return Err(expected(&format_args!("shape {:?}", like.dims())).into());
        }
        let (Some(&width), Some(&column)) = (layout.dims().last(), layout.stride().last()) else {
            return Err(expected(&"at least one dimension").into());
        };
        let Some(row) = row_stride(tensor) else {
            return Err(expected(&"rows at one distance from each other").into());
        };
        let rows = layout.dims()[..layout.dims().len() - 1].iter().product();
        let data = self.elements::<B, T>(name, tensor)?;
        Ok(View { data, offset: layout.start_offset(), shape: [rows, width], strides: [row, column] })
    }

    /// The slots of an update. A tensor on the processor is a list on the host.
    pub fn slots<'s, B: Backend>(&self, slots: Slots<'s>) -> candle_core::Result<SlotsOf<'s, B>>
    where
        'l: 's,
    {
        match slots {
            Slots::Rows => Ok(crate::Slots::Rows),
            Slots::Host(list) => Ok(crate::Slots::Host(list)),
            Slots::Device(tensor) => {
                let len = check_slots(tensor)?;
                B::slots(self.storage::<B>("slots", tensor)?, tensor.layout().start_offset(), len)
            }
        }
    }

    fn elements<B: Backend, T: Value>(
        &self,
        name: &'static str,
        tensor: &Tensor,
    ) -> candle_core::Result<&'l Buffer<B, T>> {
        check_dtype(name, <T as WithDType>::DTYPE, tensor.dtype())?;
        B::elements(self.storage::<B>(name, tensor)?)
    }

    /// candle's storage of a tensor, whatever its elements.
    pub fn storage<B: Backend>(&self, name: &'static str, tensor: &Tensor) -> Result<&'l B::Storage> {
        let stored = self.storages.iter().find(|stored| std::ptr::eq(stored.tensor, tensor));
        let storage = stored.and_then(|stored| {
            let mut guards = self.guards.iter().copied().flatten();
            guards.find(|(storage, _)| *storage == stored.storage).map(|(_, guard)| &**guard)
        });
        storage.and_then(B::open).ok_or_else(|| {
            // `check_devices` has seen to it, except where another thread moves a variable between the two.
            Error::argument(name, "a tensor on the device of the others", "one elsewhere")
        })
    }
}

/// Whether the rows of a tensor, along its last dimension, lie at one distance from each other, as those of a dense one and
/// of a slice of its columns do.
pub(crate) fn has_rows(tensor: &Tensor) -> bool {
    row_stride(tensor).is_some()
}

/// That distance; none if there are several.
fn row_stride(tensor: &Tensor) -> Option<usize> {
    if tensor.elem_count() == 0 {
        return Some(0);
    }
    let before_last = tensor.rank().saturating_sub(1);
    let dims = tensor.dims()[..before_last].iter().zip(&tensor.stride()[..before_last]);
    // From the last of them on, the rows that the dimensions so far reach, and the distance of these.
    let (mut rows, mut distance) = (1, 0);
    for (&count, &stride) in dims.rev().filter(|(count, _)| **count > 1) {
        if rows == 1 {
            distance = stride;
        } else if stride != rows * distance {
            return None;
        }
        rows *= count;
    }
    Some(distance)
}

/// See [`Reader::views`].
pub(crate) struct ReadViews<'l, B, T> {
    reader: Reader<'l>,
    of: PhantomData<(B, T)>,
}

impl<'a, 'l, B: Backend, T: Value> Map<Ref<'a, CandleTensors>, Views<'l, T, B::Memory>> for ReadViews<'l, B, T> {
    type Error = candle_core::Error;

    fn activation<const R: usize>(
        &mut self,
        field: Field,
        tensor: &'a Tensor,
    ) -> candle_core::Result<View<'l, T, R, B::Memory>> {
        self.reader.view::<B, T, R>(field.name, field.dims, tensor)
    }

    fn parameter<const R: usize>(
        &mut self,
        field: Field,
        tensor: &'a Tensor,
    ) -> candle_core::Result<View<'l, f32, R, B::Memory>> {
        self.reader.view::<B, f32, R>(field.name, field.dims, tensor)
    }

    fn projection(
        &mut self,
        field: Field,
        tensor: ProjectionOf<&'a Tensor, &'a Tensor>,
    ) -> candle_core::Result<ProjectionAs<Views<'l, T, B::Memory>>> {
        let Field { name, dims, constant_dims, .. } = field;
        let tensor = match tensor {
            ProjectionOf::Constant(tensor) => {
                return Ok(ProjectionOf::Constant(self.reader.view::<B, f32, 2>(name, constant_dims, tensor)?));
            }
            ProjectionOf::Varying(tensor) => tensor,
        };
        match tensor.rank() {
            3 => {
                let View { data, offset, shape, strides } = self.reader.view::<B, T, 3>(name, dims, tensor)?;
                let [batch, len, d_state] = shape;
                // There is one group, so that its stride does not matter.
                let strides = [strides[0], strides[1], 0, strides[2]];
                Ok(ProjectionOf::Varying(View { data, offset, shape: [batch, len, 1, d_state], strides }))
            }
            4 => Ok(ProjectionOf::Varying(self.reader.view::<B, T, 4>(name, dims, tensor)?)),
            _ => {
                let of_one_group = dims.replace("groups, ", "");
                let expected = format_args!("shape {dims}, {of_one_group} or {constant_dims}").to_string();
                Err(Error::argument(name, expected, format_args!("{:?}", tensor.dims())).into())
            }
        }
    }
}

/// Checks that a tensor can be a list of slots, whatever they are, and gives their number.
pub(crate) fn check_slots(tensor: &Tensor) -> Result<usize> {
    check_dtype("slots", DType::I32, tensor.dtype())?;
    let &[len] = tensor.dims() else {
        return Err(Error::argument("slots", "shape (batch)", format_args!("{:?}", tensor.dims())));
    };
    if !tensor.is_contiguous() {
        return Err(Error::argument("slots", "a contiguous tensor", format_args!("stride {:?}", tensor.stride())));
    }
    Ok(len)
}

/// Checks the element type of an argument.
fn check_dtype(name: &'static str, expected: DType, got: DType) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::argument(name, format_args!("dtype {expected:?}"), format_args!("{got:?}")))
}

/// Buffers that own their memory on a device.
pub(crate) struct Owned<B, T>(PhantomData<(B, T)>);

impl<B: Backend, T: Value> Kind for Owned<B, T> {
    type Activation<const R: usize> = B::Owned<T>;
    type Parameter<const R: usize> = B::Owned<f32>;
}

/// Allocates a buffer for the gradient of every tensor.
pub(crate) struct Allocate<'b, B>(pub &'b B);

impl<'a, B: Backend, T: Value> Map<Ref<'a, CandleTensors>, Owned<B, T>> for Allocate<'_, B> {
    type Error = Error;

    fn activation<const R: usize>(&mut self, field: Field, tensor: &'a Tensor) -> Result<B::Owned<T>> {
        self.0.allocate(field.name, tensor.dims())
    }

    fn parameter<const R: usize>(&mut self, field: Field, tensor: &'a Tensor) -> Result<B::Owned<f32>> {
        self.0.allocate(field.name, tensor.dims())
    }
}

/// Lends buffers, to be written.
pub(crate) struct Lend;

impl<'a, B: Backend, T: Value> Map<Mut<'a, Owned<B, T>>, Buffers<'a, T, B::Memory>> for Lend {
    type Error = Infallible;

    fn activation<const R: usize>(
        &mut self,
        _: Field,
        buffer: &'a mut B::Owned<T>,
    ) -> Result<&'a mut Buffer<B, T>, Infallible> {
        Ok(B::borrow(buffer))
    }

    fn parameter<const R: usize>(
        &mut self,
        _: Field,
        buffer: &'a mut B::Owned<f32>,
    ) -> Result<&'a mut Buffer<B, f32>, Infallible> {
        Ok(B::borrow(buffer))
    }
}

/// Makes tensors of buffers, each of the shape of the tensor beside it.
pub(crate) struct Store<'b, B>(pub &'b B);

impl<B: Backend> Store<'_, B> {
    fn tensor<T: Value>(&self, buffer: B::Owned<T>, like: &Tensor) -> Tensor {
        graph::untracked(self.0.store(buffer), like.shape())
    }
}

impl<'a, B: Backend, T: Value> Map<Pair<Owned<B, T>, Ref<'a, CandleTensors>>, CandleTensors> for Store<'_, B> {
    type Error = Infallible;

    fn activation<const R: usize>(
        &mut self,
        _: Field,
        (buffer, like): (B::Owned<T>, &'a Tensor),
    ) -> Result<Tensor, Infallible> {
        Ok(self.tensor(buffer, like))
    }

    fn parameter<const R: usize>(
        &mut self,
        _: Field,
        (buffer, like): (B::Owned<f32>, &'a Tensor),
    ) -> Result<Tensor, Infallible> {
        Ok(self.tensor(buffer, like))
    }
}

/// Tensors in the order in which they are listed.
#[derive(Default)]
pub(crate) struct List(pub Vec<Option<Tensor>>);

impl Map<CandleTensors, Nothing> for List {
    type Error = Infallible;

    fn activation<const R: usize>(&mut self, _: Field, tensor: Tensor) -> Result<(), Infallible> {
        self.0.push(Some(tensor));
        Ok(())
    }

    fn parameter<const R: usize>(&mut self, _: Field, tensor: Tensor) -> Result<(), Infallible> {
        self.0.push(Some(tensor));
        Ok(())
    }
}
