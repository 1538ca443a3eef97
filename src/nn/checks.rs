//! The checks of arguments that the modules of `nn` share. They use public items of the rest of the crate alone.

use std::fmt::Display;

use candle_core::{DType, Device, Result, Tensor};

/// An argument that does not fit.
pub(crate) fn argument(name: &'static str, expected: impl Display, got: impl Display) -> candle_core::Error {
    crate::Error::Argument { argument: name, expected: expected.to_string(), got: got.to_string() }.into()
}

/// Refuses types in which no model computes.
pub(crate) fn check_model_dtype(dtype: DType) -> Result<DType> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => Ok(dtype),
        other => Err(argument("dtype", "f32, f16 or bf16", other.as_str())),
    }
}

pub(crate) fn check_eps(name: &'static str, eps: f64) -> Result<()> {
    if eps >= 0.0 && eps.is_finite() { Ok(()) } else { Err(argument(name, "an epsilon of 0 or more", eps)) }
}

/// Refuses what does not fit in memory, by the name of the argument that asks for it: candle would panic or end the
/// program. The tensors of a device tell of this by themselves.
pub(crate) fn check_room(name: &'static str, shape: &[usize], dtype: DType, device: &Device) -> Result<()> {
    let bytes = shape.iter().try_fold(dtype.size_in_bytes(), |bytes, &size| bytes.checked_mul(size));
    let fits = match (bytes, device) {
        (Some(bytes), Device::Cpu) => {
            let mut room = Vec::<u8>::new();
            let fits = room.try_reserve_exact(bytes).is_ok();
            // Or the compiler leaves out what nobody uses.
            std::hint::black_box(&mut room);
            fits
        }
        (Some(bytes), _) => bytes <= isize::MAX as usize,
        (None, _) => false,
    };
    if fits {
        return Ok(());
    }
    let got = format_args!("{shape:?} of {}", dtype.as_str());
    Err(argument(name, "sizes that fit in memory", got))
}

/// So many parameters have an address each, in any type.
pub(crate) const COUNTABLE: usize = isize::MAX as usize / 8;

/// The elements of all shapes together, if they can be counted.
pub(crate) fn sum(shapes: &[[usize; 3]]) -> Option<usize> {
    let product = |shape: &[usize; 3]| shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size));
    shapes.iter().try_fold(0usize, |total, shape| total.checked_add(product(shape)?))
}

/// Refuses to be differentiated twice: the gradients of our own operators are computed outside of candle's graph.
pub(crate) fn check_once(name: &'static str, gradient: &Tensor) -> Result<()> {
    if gradient.track_op() {
        return Err(candle_core::Error::Msg(format!(
            "{name}: cannot be differentiated twice, and its gradient is itself tracked (CANDLE_GRAD_DO_NOT_DETACH)"
        )));
    }
    Ok(())
}

/// Checks a pool of states that is to be written in place: of three dimensions, each element in a place of its own, outside
/// of candle's graph. Gives its shape; `names` are its dimensions.
pub(crate) fn check_pool(name: &'static str, names: &str, pool: &Tensor) -> Result<[usize; 3]> {
    let &[slots, rows, columns] = pool.dims() else {
        return Err(argument(name, format_args!("shape {names}"), format_args!("{:?}", pool.dims())));
    };
    if !matches!(pool.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Err(argument(name, "dtype F32, F16 or BF16", format_args!("{:?}", pool.dtype())));
    }
    let strides = || format!("shape {:?} with strides {:?}", pool.dims(), pool.stride());
    if pool.dims().iter().zip(pool.stride()).any(|(&size, &stride)| size > 1 && stride == 0) {
        return Err(argument(name, "strides that give every element a place of its own", strides()));
    }
    if pool.track_op() {
        let expected = "a tensor outside of candle's graph, since it is overwritten (detach and copy it: \
                        `state.detach().copy()`)";
        let got = if pool.is_variable() { "a variable" } else { "one that candle tracks for a backward pass" };
        return Err(argument(name, expected, got));
    }
    if !pool.is_contiguous() {
        return Err(argument(name, "a contiguous tensor", strides()));
    }
    Ok([slots, rows, columns])
}

/// Checks how `batch` rows of `length` steps are divided into sequences, and gives their number.
pub(crate) fn check_sequences(batch: usize, length: usize, cu_seqlens: Option<&[usize]>) -> Result<usize> {
    let Some(offsets) = cu_seqlens else { return Ok(batch) };
    let refuse = |expected: String, got: String| Err(argument("cu_seqlens", expected, got));
    if batch != 1 {
        return refuse("a batch of 1 beside it".into(), format!("a batch of {batch}"));
    }
    let (Some(&first), Some(&last)) = (offsets.first(), offsets.last()) else {
        return refuse("at least one offset, the first 0".into(), "none".into());
    };
    if first != 0 {
        return refuse("0 as its first offset".into(), first.to_string());
    }
    if let Some(i) = offsets.windows(2).position(|pair| pair[0] > pair[1]) {
        let got = format!("{} before {} at {}", offsets[i], offsets[i + 1], i + 1);
        return refuse("offsets that never decrease".into(), got);
    }
    if last != length {
        return refuse(format!("the length {length} as its last offset"), last.to_string());
    }
    Ok(offsets.len() - 1)
}

/// The slot of each row: its own number, or what a list says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slots<'a>(Option<&'a [i32]>);

impl<'a> Slots<'a> {
    /// Checks that each of `rows` has a slot in a pool of `count`, and none that of another row.
    pub fn check(slots: Option<&'a [i32]>, rows: usize, count: usize) -> Result<Self> {
        let Some(list) = slots else {
            if count != rows {
                let expected = format_args!("one slot for each of {rows} rows, since no `slots` are given");
                return Err(argument("cache", expected, format_args!("{count} slots")));
            }
            return Ok(Self(None));
        };
        if list.len() != rows {
            return Err(argument("slots", format_args!("one for each of {rows} rows"), list.len()));
        }
        for (row, &slot) in list.iter().enumerate() {
            if usize::try_from(slot).is_ok_and(|slot| slot >= count) {
                let expected = format_args!("slots below {count}, or negative ones for padding");
                return Err(argument("slots", expected, format_args!("{slot} for row {row}")));
            }
        }
        let mut used: Vec<_> = list.iter().filter(|&&slot| slot >= 0).collect();
        used.sort_unstable();
        if let Some(pair) = used.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(argument("slots", "a different slot for every row", format_args!("{} twice", pair[0])));
        }
        Ok(Self(slots))
    }

    /// The slot of a row; none for padding.
    pub fn get(&self, row: usize) -> Option<usize> {
        match self.0 {
            None => Some(row),
            Some(slots) => usize::try_from(slots[row]).ok(),
        }
    }
}
