//! Many tensors brought into another type, or overwritten, at once: on GPUs a launch for all of them, where one for each takes
//! longer than its few bytes.

use candle_core::{DType, Result, Tensor};

use super::tensors::storage_of;
use crate::Error;

/// What [`Tensor::to_dtype`] gives of each tensor, outside of candle's graph.
///
/// On a GPU contiguous tensors of `f32`, `f16` and `bf16` are converted into one of these types in one launch; others one by one.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use selective_scan::candle::to_dtype_all;
///
/// let (x, y) = (Tensor::new(&[1f32, 2.0], &Device::Cpu)?, Tensor::new(&[3f32], &Device::Cpu)?);
/// let halves = to_dtype_all(&[&x, &y], DType::F16)?;
/// assert_eq!((halves[0].dtype(), halves[1].dims()), (DType::F16, &[1][..]));
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// A type that candle does not convert into; what the device refuses.
pub fn to_dtype_all(tensors: &[&Tensor], dtype: DType) -> Result<Vec<Tensor>> {
    #[cfg(feature = "candle-cuda")]
    let mut converted = gpu::converted(tensors, dtype)?;
    #[cfg(not(feature = "candle-cuda"))]
    let mut converted = std::collections::HashMap::<usize, Tensor>::new();
    let alone = |tensor: &Tensor| match tensor.elem_count() {
        // candle launches no kernel over nothing.
        0 => Tensor::zeros(tensor.shape(), dtype, tensor.device()),
        _ => tensor.detach().to_dtype(dtype),
    };
    let given = tensors.iter().enumerate();
    given.map(|(i, tensor)| converted.remove(&i).map_or_else(|| alone(tensor), Ok)).collect()
}

/// Overwrites each tensor of `to` with the values of its partner, brought into its type, or with zeros where there is none. They
/// may be parts of others, such as slots of a pool and several of one, as long as each is contiguous and none overlaps another.
///
/// On a GPU tensors of `f32`, `f16` and `bf16` are written in one launch for some dozens; others one by one.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use selective_scan::candle::write_each;
///
/// let pool = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu)?;
/// let state = Tensor::new(&[[5f32, 6.0]], &Device::Cpu)?;
/// write_each(&[(&pool.narrow(0, 1, 1)?, Some(&state))])?;
/// assert_eq!(pool.to_vec2::<f32>()?, [[1.0, 2.0], [5.0, 6.0]]);
/// write_each(&[(&pool, None)])?;
/// assert_eq!(pool.to_vec2::<f32>()?, [[0.0; 2]; 2]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// A tensor that is not contiguous, that candle tracks, that overlaps another, whose storage is also read, or whose partner has
/// another shape or device; then nothing is written. What the device refuses.
pub fn write_each(pairs: &[(&Tensor, Option<&Tensor>)]) -> Result<()> {
    check(pairs)?;
    #[cfg(feature = "candle-cuda")]
    let (joined, single): (Vec<_>, Vec<_>) = pairs.iter().copied().partition(|(to, from)| gpu::is_joined(to, *from));
    #[cfg(feature = "candle-cuda")]
    gpu::write_joined(&joined)?;
    #[cfg(not(feature = "candle-cuda"))]
    let single = pairs;
    for (to, from) in single.iter().filter(|(to, _)| to.elem_count() > 0) {
        match (to.rank(), from) {
            // candle writes along a dimension, which a scalar has not; its storage is the tensor's own then.
            (0, _) => {
                let from = from.map_or_else(|| to.zeros_like(), |from| from.detach().to_dtype(to.dtype()))?;
                to.reshape(1)?.slice_set(&from.reshape(1)?, 0, 0)?;
            }
            (_, Some(from)) => to.slice_set(&from.detach().to_dtype(to.dtype())?.contiguous()?, 0, 0)?,
            (_, None) => to.slice_set(&to.zeros_like()?, 0, 0)?,
        }
    }
    Ok(())
}

fn check(pairs: &[(&Tensor, Option<&Tensor>)]) -> Result<()> {
    let describe = |tensor: &Tensor| format!("shape {:?} on {:?}", tensor.dims(), tensor.device().location());
    for (to, from) in pairs {
        if !to.is_contiguous() {
            let got = format_args!("{:?}", to.layout()).to_string();
            return Err(Error::argument("to", "contiguous tensors", got).into());
        }
        if to.track_op() {
            let expected = "tensors outside of candle's graph, since they are overwritten";
            return Err(Error::argument("to", expected, "one in it").into());
        }
        if let Some(from) = from.filter(|from| describe(from) != describe(to)) {
            return Err(Error::argument("from", format_args!("{}, as `to`", describe(to)), describe(from)).into());
        }
    }
    let place = |to: &Tensor| (storage_of(to), to.layout().start_offset());
    let parts = pairs.iter().filter(|(to, _)| to.elem_count() > 0);
    let mut written: Vec<_> = parts.map(|(to, _)| (place(to), to.elem_count())).collect();
    written.sort_unstable();
    let overlap = |pair: &[((usize, usize), usize)]| {
        let [((storage, start), count), ((next, next_start), _)] = [pair[0], pair[1]];
        storage == next && next_start < start + count
    };
    if written.windows(2).any(overlap) {
        let expected = "parts that do not overlap, as they are written";
        return Err(Error::argument("to", expected, "a part that is written twice").into());
    }
    let mut read = pairs.iter().filter_map(|(_, from)| from.map(storage_of));
    if read.any(|storage| written.binary_search_by_key(&storage, |((storage, _), _)| *storage).is_ok()) {
        let expected = "storages that are not read, as they are written";
        return Err(Error::argument("to", expected, "one that a tensor of `from` reads").into());
    }
    Ok(())
}

#[cfg(feature = "candle-cuda")]
mod gpu {
    use std::collections::HashMap;

    use bytemuck::Zeroable;
    use candle_core::{DType, Device, Result, Tensor};

    use super::super::cuda::Gpu;
    use super::super::device::{Backend, Value, for_dtype};
    use super::super::graph;
    use super::super::tensors::{Arguments as Read, storage_of};
    use super::super::write_all::{MOST_WRITTEN, open_one, write_all};
    use crate::Error;
    use crate::cuda::params::{self, Conversion};
    use crate::cuda::{Arguments, convert_all};

    /// Whether it is of a type that a launch converts.
    fn is_float(dtype: DType) -> bool {
        matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
    }

    /// Whether a pair is written in one launch with others.
    pub fn is_joined(to: &Tensor, from: Option<&Tensor>) -> bool {
        let is_float = is_float(to.dtype()) && from.is_none_or(|from| is_float(from.dtype()) && from.is_contiguous());
        to.device().is_cuda() && is_float && to.elem_count() > 0
    }

    fn type_code(dtype: DType) -> Result<i64> {
        for_dtype!("from", dtype, |T| Ok::<_, candle_core::Error>(params::type_code(<T as crate::Element>::DTYPE)))
    }

    /// The tensors that are converted in one launch, by their places.
    pub fn converted(tensors: &[&Tensor], dtype: DType) -> Result<HashMap<usize, Tensor>> {
        let mut devices = tensors.iter().map(|tensor| tensor.device());
        let Some(Device::Cuda(device)) = devices.find(|device| device.is_cuda() && is_float(dtype)) else {
            return Ok(HashMap::new());
        };
        let is_there = |tensor: &Tensor| matches!(tensor.device(), Device::Cuda(other) if device.id() == other.id());
        let is_joined = |tensor: &Tensor| {
            let is_other = is_float(tensor.dtype()) && tensor.dtype() != dtype;
            is_other && tensor.is_contiguous() && tensor.elem_count() > 0 && is_there(tensor)
        };
        let joined: Vec<_> = tensors.iter().enumerate().filter(|(_, tensor)| is_joined(tensor)).collect();
        for_dtype!("dtype", dtype, |T| convert::<T>(&Gpu::new(device), &joined))
    }

    fn convert<T: Value>(gpu: &Gpu, tensors: &[(usize, &&Tensor)]) -> Result<HashMap<usize, Tensor>> {
        if tensors.is_empty() {
            return Ok(HashMap::new());
        }
        let mut read = Read::default();
        for (_, tensor) in tensors {
            read.add("tensors", tensor);
        }
        let locked = read.lock()?;
        let reader = locked.reader();
        let mut buffers = Vec::with_capacity(tensors.len());
        for (_, tensor) in tensors {
            buffers.push(gpu.allocate::<T>("tensors", tensor.dims())?);
        }
        let mut arguments = Arguments::new(&gpu.stream);
        let mut conversions = Vec::with_capacity(tensors.len());
        for ((_, tensor), buffer) in tensors.iter().zip(&mut buffers) {
            let storage = reader.storage::<Gpu>("tensors", tensor)?;
            conversions.push(Conversion {
                to: arguments.write("tensors", buffer)?,
                from: address(&mut arguments, storage, tensor)?,
                count: tensor.elem_count() as i64,
                to_type: params::type_code(<T as crate::Element>::DTYPE),
                from_type: type_code(tensor.dtype())?,
                ..Conversion::zeroed()
            });
        }
        let device = crate::cuda::Device::new(&gpu.stream)?;
        // SAFETY: the tensors are contiguous and of as many elements as the buffers, which are new.
        unsafe { convert_all(&device, &conversions) }?;
        drop(arguments);
        let stored = tensors.iter().zip(buffers);
        Ok(stored.map(|((i, tensor), buffer)| (*i, graph::untracked(gpu.store(buffer), tensor.dims()))).collect())
    }

    /// Where a contiguous tensor's elements lie.
    fn address<'a>(
        arguments: &mut Arguments<'a>,
        storage: &'a candle_core::CudaStorage,
        tensor: &Tensor,
    ) -> Result<u64> {
        let offset = tensor.layout().start_offset();
        for_dtype!("from", tensor.dtype(), |T| Ok(arguments.read("from", Gpu::elements::<T>(storage)?, offset)?))
    }

    /// Writes pairs that are [joined](is_joined) and checked.
    pub fn write_joined(pairs: &[(&Tensor, Option<&Tensor>)]) -> Result<()> {
        // Storages are locked a number of them at a time; of one there may be many parts.
        let mut rest = pairs;
        while !rest.is_empty() {
            let (mut storages, mut count) = (Vec::new(), 0);
            while let Some((to, _)) = rest.get(count) {
                let storage = storage_of(to);
                if !storages.contains(&storage) {
                    if storages.len() == MOST_WRITTEN {
                        break;
                    }
                    storages.push(storage);
                }
                count += 1;
            }
            write(&rest[..count], &storages)?;
            rest = &rest[count..];
        }
        Ok(())
    }

    /// Writes pairs to these storages.
    fn write(pairs: &[(&Tensor, Option<&Tensor>)], storages: &[usize]) -> Result<()> {
        let Some(Device::Cuda(device)) = pairs.first().map(|(to, _)| to.device()) else { return Ok(()) };
        let gpu = Gpu::new(device);
        let places: Vec<_> = pairs.iter().map(|(to, _)| storages.iter().position(|&at| at == storage_of(to))).collect();
        let first = |place| places.iter().position(|&other| other == Some(place)).map(|pair| pairs[pair].0);
        let written: Vec<_> = (0..storages.len()).filter_map(first).collect();
        let read: Vec<_> = pairs.iter().filter_map(|(_, from)| *from).collect();
        write_all("to", &written, &read, |opened, read| {
            let elsewhere = || Error::argument("from", "tensors where `to` lies", "one elsewhere");
            let mut arguments = Arguments::new(&gpu.stream);
            let mut beginnings = Vec::with_capacity(storages.len());
            for (storage, to) in opened.into_iter().zip(&written) {
                let storage = open_one::<Gpu>("to", storage)?;
                beginnings.push(for_dtype!("to", to.dtype(), |T| {
                    Ok::<_, candle_core::Error>(arguments.write("to", Gpu::elements_mut::<T>(storage)?)?)
                })?);
            }
            let (mut conversions, mut from_place) = (Vec::with_capacity(pairs.len()), 0);
            for ((to, from), place) in pairs.iter().zip(&places) {
                let beginning = place.map_or(0, |place| beginnings[place]);
                let mut conversion = Conversion {
                    to: beginning + (to.layout().start_offset() * to.dtype().size_in_bytes()) as u64,
                    count: to.elem_count() as i64,
                    to_type: type_code(to.dtype())?,
                    ..Conversion::zeroed()
                };
                if let Some(from) = from {
                    let storage = Gpu::open(read.storage(from_place)).ok_or_else(elsewhere)?;
                    conversion.from = address(&mut arguments, storage, from)?;
                    conversion.from_type = type_code(from.dtype())?;
                    from_place += 1;
                }
                conversions.push(conversion);
            }
            let device = crate::cuda::Device::new(&gpu.stream)?;
            // SAFETY: pairs are contiguous and of one shape, the parts that are written do not overlap, and none is read.
            unsafe { convert_all(&device, &conversions) }?;
            Ok(())
        })
    }
}
