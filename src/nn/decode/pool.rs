//! Pools of states: tensors whose first dimension is the slots', which are written in place.

use candle_core::{Result, Tensor};

use crate::candle::{check_pool, write_each};
use crate::nn::{argument, check_room};

/// Checks that all pools of a layer can be written, before one is, and gives their shapes. Each comes with the name of the
/// argument and of its dimensions; the last is what the others are compared with.
pub(crate) fn check_pools<const N: usize>(pools: [(&'static str, &str, &Tensor); N]) -> Result<[[usize; 3]; N]> {
    let mut shapes = [[0; 3]; N];
    for (shape, (name, names, pool)) in shapes.iter_mut().zip(pools) {
        *shape = check_pool(name, names, pool)?;
        if !pool.is_contiguous() {
            let got = format_args!("shape {:?} with strides {:?}", pool.dims(), pool.stride());
            return Err(argument(name, "a contiguous tensor", got));
        }
    }
    let Some((&last_shape, &(last, _, last_pool))) = shapes.last().zip(pools.last()) else { return Ok(shapes) };
    for (shape, (name, _, pool)) in shapes.iter().zip(pools) {
        if shape[0] != last_shape[0] {
            return Err(argument(name, format_args!("{} slots, as `{last}`", last_shape[0]), shape[0]));
        }
        let locations = [pool, last_pool].map(|pool| pool.device().location());
        if locations[0] != locations[1] {
            let expected = format_args!("a tensor on {:?}, as `{last}`", locations[1]);
            return Err(argument(name, expected, format_args!("one on {:?}", locations[0])));
        }
    }
    Ok(shapes)
}

/// Checks that there are these slots in a pool of `count`; negative ones only where they may be padding.
pub(crate) fn check_slots(name: &'static str, slots: &[i32], count: usize, padding: bool) -> Result<()> {
    let is_there = |slot: i32| usize::try_from(slot).map_or(padding, |slot| slot < count);
    match slots.iter().find(|&&slot| !is_there(slot)) {
        None => Ok(()),
        Some(slot) if padding => Err(argument(name, format_args!("slots below {count}"), slot)),
        Some(slot) => Err(argument(name, format_args!("slots from 0 on and below {count}"), slot)),
    }
}

/// Zeroes slots of pools that have been checked, or all. Negative ones are passed over.
pub(crate) fn reset(pools: &[&Tensor], slots: Option<&[i32]>) -> Result<()> {
    let zero = |pools: &[&Tensor]| write_each(&pools.iter().map(|&pool| (pool, None)).collect::<Vec<_>>());
    let Some(slots) = slots else { return zero(pools) };
    for slot in slots.iter().filter_map(|&slot| usize::try_from(slot).ok()) {
        let of_slot: Vec<_> = pools.iter().map(|pool| pool.narrow(0, slot, 1)).collect::<Result<_>>()?;
        zero(&of_slot.iter().collect::<Vec<_>>())?;
    }
    Ok(())
}

/// What is to be written to pools, which is done for some dozens of them at once.
#[derive(Default)]
pub(crate) struct PoolWrites(Vec<(Tensor, Tensor)>);

impl PoolWrites {
    /// How many elements wait at most: beside so many, launches are short.
    const MOST_WAITING: usize = 1 << 24;

    /// Will write `from` to `to`, a contiguous part of a pool. Nothing may write there before, nor read what is to be there.
    pub fn add(&mut self, to: Tensor, from: Tensor) -> Result<()> {
        self.0.push((to, from));
        let waiting: usize = self.0.iter().map(|(to, _)| to.elem_count()).sum();
        if waiting > Self::MOST_WAITING { self.write() } else { Ok(()) }
    }

    /// Writes what waits.
    pub fn write(&mut self) -> Result<()> {
        let pairs: Vec<_> = self.0.iter().map(|(to, from)| (to, Some(from))).collect();
        write_each(&pairs)?;
        self.0.clear();
        Ok(())
    }
}

/// Copies of slots that have been checked, one after another.
pub(crate) fn take(pool: &Tensor, slots: &[i32]) -> Result<Tensor> {
    if slots.is_empty() || pool.elem_count() == 0 {
        return Tensor::zeros([&[slots.len()], &pool.dims()[1..]].concat(), pool.dtype(), pool.device());
    }
    let slots: Vec<u32> = slots.iter().map(|slot| slot.unsigned_abs()).collect();
    pool.index_select(&Tensor::new(slots, pool.device())?, 0)
}

/// Writes rows, which may be of another type or elsewhere, to slots that have been checked.
pub(crate) fn put(pool: &Tensor, rows: &Tensor, slots: &[i32]) -> Result<()> {
    let rows = rows.to_device(pool.device())?.to_dtype(pool.dtype())?.contiguous()?;
    for (row, slot) in slots.iter().enumerate() {
        pool.slice_set(&rows.narrow(0, row, 1)?, 0, slot.unsigned_abs() as usize)?;
    }
    Ok(())
}

/// Copies slots that have been checked onto others. All are read before any is written.
pub(crate) fn copy(pool: &Tensor, from: &[i32], to: &[i32]) -> Result<()> {
    put(pool, &take(pool, from)?, to)
}

/// A pool of more slots, the first of which are copies of these and the rest zero.
pub(crate) fn grow(pool: &Tensor, slots: usize) -> Result<Tensor> {
    let shape = [&[slots], &pool.dims()[1..]].concat();
    check_room("slots", &shape, pool.dtype(), pool.device())?;
    let grown = Tensor::zeros(shape, pool.dtype(), pool.device())?;
    if pool.elem_count() > 0 {
        grown.slice_set(pool, 0, 0)?;
    }
    Ok(grown)
}
