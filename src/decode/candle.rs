//! The operators on candle's tensors, which write to tensors that are there already.

use candle_core::{CpuStorage, DType, Result, Tensor, WithDType};

use super::{ColumnNorms, Columns, ConvStep, Linear, LinearMut, RowNorm, SelectiveUpdate, SelectiveUpdateMut, cpu};
use crate::candle::device::{Backend, Buffer, Cpu, SlotsOf, Value, for_dtype, on_device};
use crate::candle::write_all::{Read, open, open_one, write_all};
use crate::candle::{Slots, check_pool};
use crate::conv::POOL_NAMES;
use crate::state_update::STATE_NAMES;
use crate::{Error, View, ViewMut};

/// A device that runs a decoding step's operators.
pub(crate) trait DecodeBackend: Backend {
    fn linear<X: Value, T: Value, O: Value, St: Value>(
        &self,
        inputs: &Linear<X, T, Self::Memory>,
        outputs: LinearMut<O, St, Self::Memory>,
    ) -> crate::Result<()>;

    fn selective_update<T: Value, St: Value>(
        &self,
        inputs: &SelectiveUpdate<T, Self::Memory>,
        outputs: SelectiveUpdateMut<T, St, Self::Memory>,
    ) -> crate::Result<()>;

    fn lookup<T: Value, O: Value>(
        &self,
        ids: &Self::Storage,
        slots: SlotsOf<Self>,
        table: &View<T, 2, Self::Memory>,
        out: &mut Buffer<Self, O>,
    ) -> Result<()>;
}

impl DecodeBackend for Cpu {
    fn linear<X: Value, T: Value, O: Value, St: Value>(
        &self,
        inputs: &Linear<X, T>,
        outputs: LinearMut<O, St>,
    ) -> crate::Result<()> {
        cpu::linear(inputs, outputs)
    }

    fn selective_update<T: Value, St: Value>(
        &self,
        inputs: &SelectiveUpdate<T>,
        outputs: SelectiveUpdateMut<T, St>,
    ) -> crate::Result<()> {
        cpu::selective_update(inputs, outputs)
    }

    fn lookup<T: Value, O: Value>(
        &self,
        ids: &CpuStorage,
        slots: crate::Slots,
        table: &View<T, 2>,
        out: &mut [O],
    ) -> Result<()> {
        Ok(crate::embedding::cpu::lookup(ids.as_slice()?, slots, table, out)?)
    }
}

#[cfg(feature = "candle-cuda")]
impl DecodeBackend for crate::candle::cuda::Gpu {
    fn linear<X: Value, T: Value, O: Value, St: Value>(
        &self,
        inputs: &Linear<X, T, Self::Memory>,
        outputs: LinearMut<O, St, Self::Memory>,
    ) -> crate::Result<()> {
        super::cuda::linear(&self.stream, inputs, outputs)
    }

    fn selective_update<T: Value, St: Value>(
        &self,
        inputs: &SelectiveUpdate<T, Self::Memory>,
        outputs: SelectiveUpdateMut<T, St, Self::Memory>,
    ) -> crate::Result<()> {
        super::cuda::selective_update(&self.stream, inputs, outputs)
    }

    fn lookup<T: Value, O: Value>(
        &self,
        ids: &Self::Storage,
        slots: SlotsOf<Self>,
        table: &View<T, 2, Self::Memory>,
        out: &mut Buffer<Self, O>,
    ) -> Result<()> {
        Ok(crate::embedding::cuda::lookup(&self.stream, ids.as_cuda_slice()?, slots, table, out)?)
    }
}

/// The tensors that a call reads.
#[derive(Default)]
struct Reads<'a>(Vec<(&'static str, &'a Tensor)>);

/// The number of a tensor among them.
#[derive(Clone, Copy)]
struct Place(usize);

impl<'a> Reads<'a> {
    fn add(&mut self, name: &'static str, tensor: &'a Tensor) -> Place {
        self.0.push((name, tensor));
        Place(self.0.len() - 1)
    }

    fn add_if(&mut self, name: &'static str, tensor: Option<&'a Tensor>) -> Option<Place> {
        tensor.map(|tensor| self.add(name, tensor))
    }

    fn add_slots(&mut self, slots: Slots<'a>) -> Option<Place> {
        match slots {
            Slots::Device(tensor) => Some(self.add("slots", tensor)),
            _ => None,
        }
    }

    fn tensors(&self) -> Vec<&'a Tensor> {
        self.0.iter().map(|(_, tensor)| *tensor).collect()
    }

    /// Checks that all lie where `out` does, and it outside of candle's graph.
    fn check_out(&self, out: &Tensor) -> Result<()> {
        let location = out.device().location();
        for (name, tensor) in &self.0 {
            let found = tensor.device().location();
            if found != location {
                let expected = format_args!("a tensor on {location:?}, as `out`").to_string();
                return Err(Error::argument(name, expected, format_args!("one on {found:?}")).into());
            }
        }
        if out.track_op() {
            let expected = "a tensor outside of candle's graph, since it is overwritten";
            return Err(Error::argument("out", expected, "one in it").into());
        }
        let storage_len = out.layout().start_offset() + out.elem_count();
        if !out.is_contiguous() || out.layout().start_offset() > 0 {
            let got = format_args!("strides {:?} from {} on", out.stride(), storage_len - out.elem_count()).to_string();
            return Err(Error::argument("out", "a dense tensor, the whole of its storage", got).into());
        }
        Ok(())
    }
}

/// The tensors of a call while their storages are locked.
struct Reader<'l, 'a> {
    reads: &'l Reads<'a>,
    read: &'l Read<'l>,
}

impl<'l> Reader<'l, '_> {
    fn storage<B: Backend>(&self, place: Place) -> Result<&'l B::Storage> {
        B::open(self.read.storage(place.0)).ok_or_else(|| {
            // `check_out` has seen to it, except where another thread moves a variable between the two.
            let name = self.reads.0[place.0].0;
            Error::argument(name, "a tensor on the device of the others", "one elsewhere").into()
        })
    }

    fn view<B: Backend, T: Value, const R: usize>(&self, place: Place) -> Result<View<'l, T, R, B::Memory>> {
        let (name, tensor) = self.reads.0[place.0];
        let layout = tensor.layout();
        let rank = || Error::argument(name, format_args!("{R} dimensions"), format_args!("{:?}", layout.dims()));
        let shape = layout.dims().try_into().map_err(|_| rank())?;
        let strides = layout.stride().try_into().map_err(|_| rank())?;
        let expected = <T as WithDType>::DTYPE;
        if tensor.dtype() != expected {
            let got = format_args!("{:?}", tensor.dtype()).to_string();
            return Err(Error::argument(name, format_args!("dtype {expected:?}"), got).into());
        }
        let data = B::elements(self.storage::<B>(place)?)?;
        Ok(View { data, offset: layout.start_offset(), shape, strides })
    }

    fn view_if<B: Backend, T: Value, const R: usize>(
        &self,
        place: Option<Place>,
    ) -> Result<Option<View<'l, T, R, B::Memory>>> {
        place.map(|place| self.view::<B, T, R>(place)).transpose()
    }

    fn slots<'s, B: Backend>(&self, slots: Slots<'s>, place: Option<Place>) -> Result<SlotsOf<'s, B>>
    where
        'l: 's,
    {
        match (slots, place) {
            (Slots::Device(tensor), Some(place)) => {
                let len = crate::candle::tensors::check_slots(tensor)?;
                B::slots(self.storage::<B>(place)?, tensor.layout().start_offset(), len)
            }
            (Slots::Host(list), _) => Ok(crate::Slots::Host(list)),
            _ => Ok(crate::Slots::Rows),
        }
    }
}

/// A tensor of three dimensions that is written.
fn pool<'t, B: Backend, St: Value>(
    storage: &'t mut B::Storage,
    tensor: &Tensor,
    names: &str,
) -> Result<ViewMut<'t, St, 3, B::Memory>> {
    let shape = check_pool("state", names, tensor)?;
    let layout = tensor.layout();
    let rank = |_| Error::argument("state", format_args!("shape {names}"), format_args!("{:?}", layout.dims()));
    let strides = layout.stride().try_into().map_err(rank)?;
    Ok(ViewMut { data: B::elements_mut(storage)?, offset: layout.start_offset(), shape, strides })
}

/// The types that go with matrices of type `T`: `T`, or `f32`.
macro_rules! full_or {
    ($argument:literal, $dtype:expr, $T:ty, |$X:ident| $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $X = f32;
                $body
            }
            dtype if dtype == <$T as WithDType>::DTYPE => {
                type $X = $T;
                $body
            }
            dtype => {
                let expected = format_args!("dtype F32 or {:?}, as `weight`", <$T as WithDType>::DTYPE).to_string();
                Err(Error::argument($argument, expected, format_args!("{dtype:?}")).into())
            }
        }
    };
}

/// A product of few rows with a matrix, see [`decode`](crate::decode).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use selective_scan::candle::DecodeLinear;
///
/// let x = Tensor::new(&[[1f32, 2.0]], &Device::Cpu)?;
/// let weight = Tensor::new(&[[3f32, 4.0], [5.0, 6.0], [7.0, 8.0]], &Device::Cpu)?;
/// let out = Tensor::ones((1, 3), DType::F32, &Device::Cpu)?;
/// DecodeLinear::new(&x, &weight).add_to(&out)?;
/// assert_eq!(out.to_vec2::<f32>()?, [[12.0, 18.0, 24.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct DecodeLinear<'a> {
    /// `(rows, features)`, of the type of `weight` or of `f32`.
    pub x: &'a Tensor,
    /// `(out_features, features)` of `f32`, `f16` or `bf16`.
    pub weight: &'a Tensor,
    /// Added to the product, `(out_features)` of `f32`.
    pub bias: Option<&'a Tensor>,
    /// The RMS norm of the rows before the product: its weight, `(features)` of `f32`, and what is added to the mean square.
    pub norm: Option<(&'a Tensor, f64)>,
}

/// A step of the causal convolution on the first columns of a product, see [`decode::ConvStep`](crate::decode::ConvStep).
#[derive(Debug, Clone, Copy)]
pub struct DecodeConv<'a> {
    /// `(d_inner, width)` of `f32`.
    pub weight: &'a Tensor,
    /// `(d_inner)` of `f32`.
    pub bias: Option<&'a Tensor>,
    /// The pool, `(slots, width - 1, d_inner)` of `f32`, `f16` or `bf16`, read and brought up to date.
    pub state: &'a Tensor,
    /// The slot of each row's state.
    pub slots: Slots<'a>,
}

/// Where the inputs of a product stand among what is read.
struct LinearPlaces {
    x: Place,
    weight: Place,
    bias: Option<Place>,
    norm: Option<(Place, f64)>,
}

impl<'a> DecodeLinear<'a> {
    /// The plain product.
    pub fn new(x: &'a Tensor, weight: &'a Tensor) -> Self {
        Self { x, weight, bias: None, norm: None }
    }

    /// Writes the product to `out`, `(rows, out_features)`, dense, of the type of `weight` or of `f32`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names; nothing is written then. `out` must not share its storage with
    /// what is read, nor be part of candle's graph. What the device refuses.
    pub fn write(&self, out: &Tensor) -> Result<()> {
        on_device!("out", out, |backend| self.run(backend, out, false))
    }

    /// Adds the product to `out`, rounding once.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn add_to(&self, out: &Tensor) -> Result<()> {
        on_device!("out", out, |backend| self.run(backend, out, true))
    }

    /// [`write`](Self::write) with the convolution of the first columns.
    ///
    /// # Errors
    /// As [`write`](Self::write); `out` must be of the type of `weight`. A pool that shares its storage with another argument, or
    /// that candle tracks.
    pub fn write_with_conv(&self, out: &Tensor, conv: &DecodeConv) -> Result<()> {
        on_device!("out", out, |backend| self.run_with_conv(backend, out, conv))
    }

    fn add_reads<'r>(&self, reads: &mut Reads<'r>) -> LinearPlaces
    where
        'a: 'r,
    {
        LinearPlaces {
            x: reads.add("x", self.x),
            weight: reads.add("weight", self.weight),
            bias: reads.add_if("bias", self.bias),
            norm: self.norm.map(|(weight, eps)| (reads.add("norm", weight), eps)),
        }
    }

    fn run<B: DecodeBackend>(&self, backend: &B, out: &Tensor, accumulate: bool) -> Result<()> {
        let mut reads = Reads::default();
        let places = self.add_reads(&mut reads);
        reads.check_out(out)?;
        write_all("out", &[out], &reads.tensors(), |written, read| {
            let reader = Reader { reads: &reads, read };
            let [storage] = open::<B, 1>("out", written)?;
            for_dtype!("weight", self.weight.dtype(), |T| full_or!("x", self.x.dtype(), T, |X| {
                full_or!("out", out.dtype(), T, |O| {
                    let inputs = places.inputs::<B, X, T>(&reader)?;
                    let outputs = LinearMut { accumulate, ..LinearMut::new(B::elements_mut::<O>(storage)?) };
                    Ok(backend.linear(&inputs, outputs)?)
                })
            }))
        })
    }

    fn run_with_conv<B: DecodeBackend>(&self, backend: &B, out: &Tensor, conv: &DecodeConv) -> Result<()> {
        check_pool("conv.state", POOL_NAMES[0], conv.state)?;
        let mut reads = Reads::default();
        let places = self.add_reads(&mut reads);
        let (weight, bias) = (reads.add("conv.weight", conv.weight), reads.add_if("conv.bias", conv.bias));
        let slots = reads.add_slots(conv.slots);
        reads.check_out(out)?;
        write_all("out", &[out, conv.state], &reads.tensors(), |written, read| {
            let reader = Reader { reads: &reads, read };
            let [out_storage, state] = open::<B, 2>("out", written)?;
            for_dtype!("weight", self.weight.dtype(), |T| full_or!("x", self.x.dtype(), T, |X| {
                for_dtype!("conv.state", conv.state.dtype(), |St| {
                    let step = ConvStep {
                        weight: reader.view::<B, f32, 2>(weight)?,
                        bias: reader.view_if::<B, f32, 1>(bias)?,
                        slots: reader.slots::<B>(conv.slots, slots)?,
                    };
                    let inputs = Linear { conv: Some(step), ..places.inputs::<B, X, T>(&reader)? };
                    let outputs = LinearMut {
                        out: B::elements_mut::<T>(out_storage)?,
                        accumulate: false,
                        conv_state: Some(pool::<B, St>(state, conv.state, POOL_NAMES[0])?),
                    };
                    Ok(backend.linear(&inputs, outputs)?)
                })
            }))
        })
    }
}

impl LinearPlaces {
    fn inputs<'l, B: Backend, X: Value, T: Value>(
        &self,
        reader: &Reader<'l, '_>,
    ) -> Result<Linear<'l, X, T, B::Memory>> {
        let norm = |(weight, eps)| {
            Ok::<_, candle_core::Error>(RowNorm { weight: Some(reader.view::<B, f32, 1>(weight)?), eps })
        };
        Ok(Linear {
            bias: reader.view_if::<B, f32, 1>(self.bias)?,
            norm: self.norm.map(norm).transpose()?,
            ..Linear::new(reader.view::<B, X, 2>(self.x)?, reader.view::<B, T, 2>(self.weight)?)
        })
    }
}

/// What `x_proj` gives, see [`decode::Columns`](crate::decode::Columns).
#[derive(Debug, Clone, Copy)]
pub enum DecodeColumns<'a> {
    /// As it is, `(rows, dt_rank + 2 d_state)`.
    Given(&'a Tensor),
    /// By a product with `u` before the update.
    Projected {
        /// The weight of `x_proj`, `(dt_rank + 2 d_state, d_inner)`.
        weight: &'a Tensor,
        /// Where the product is written, `(rows, dt_rank + 2 d_state)`, dense.
        to: &'a Tensor,
    },
}

/// A selective state update of one token, see [`decode::SelectiveUpdate`](crate::decode::SelectiveUpdate).
#[derive(Debug, Clone, Copy)]
pub struct DecodeUpdate<'a> {
    /// `(rows, d_inner)` of `f32`, `f16` or `bf16`; the type of all but parameters, which are `f32`.
    pub u: &'a Tensor,
    /// The low-rank step sizes, B and C of each row.
    pub columns: DecodeColumns<'a>,
    /// `(d_inner, dt_rank)`.
    pub dt_weight: &'a Tensor,
    /// `(d_inner, d_state)` of `f32`.
    pub a: &'a Tensor,
    /// `(d_inner)` of `f32`.
    pub d: Option<&'a Tensor>,
    /// `(d_inner)` of `f32`.
    pub delta_bias: Option<&'a Tensor>,
    /// `(rows, d_inner)`.
    pub z: Option<&'a Tensor>,
    /// RMS norms of the three parts of `columns`: their weights, of `f32`, or none, and what is added to the mean squares.
    pub norms: Option<(Option<[&'a Tensor; 3]>, f64)>,
    /// The slot of each row's state.
    pub slots: Slots<'a>,
}

impl<'a> DecodeUpdate<'a> {
    /// What every update has; row `i` has slot `i`.
    pub fn new(u: &'a Tensor, columns: DecodeColumns<'a>, dt_weight: &'a Tensor, a: &'a Tensor) -> Self {
        let (d, delta_bias, z, norms, slots) = (None, None, None, None, Slots::Rows);
        Self { u, columns, dt_weight, a, d, delta_bias, z, norms, slots }
    }

    /// Brings the pool `state`, `(slots, d_inner, d_state)` of `f32`, `f16` or `bf16`, up to date, and writes to `out`,
    /// `(rows, d_inner)`, dense.
    ///
    /// # Errors
    /// As [`DecodeLinear::write_with_conv`].
    pub fn update(&self, state: &Tensor, out: &Tensor) -> Result<()> {
        on_device!("out", out, |backend| self.run(backend, state, out))
    }

    fn run<B: DecodeBackend>(&self, backend: &B, state: &Tensor, out: &Tensor) -> Result<()> {
        check_pool("state", STATE_NAMES[0], state)?;
        let mut reads = Reads::default();
        let [u, dt_weight, a] =
            [("u", self.u), ("dt_weight", self.dt_weight), ("a", self.a)].map(|(name, tensor)| reads.add(name, tensor));
        // What is read of the columns, and what is written.
        let (columns, projected) = match self.columns {
            DecodeColumns::Given(columns) => (reads.add("columns", columns), None),
            DecodeColumns::Projected { weight, to } => (reads.add("columns.weight", weight), Some(to)),
        };
        let d = reads.add_if("d", self.d);
        let delta_bias = reads.add_if("delta_bias", self.delta_bias);
        let z = reads.add_if("z", self.z);
        let norms = self.norms.map(|(weights, eps)| (weights.map(|all| all.map(|w| reads.add("norms", w))), eps));
        let slots = reads.add_slots(self.slots);
        reads.check_out(out)?;
        if let Some(to) = projected {
            reads.check_out(to)?;
        }
        let written: Vec<_> = [out, state].into_iter().chain(projected).collect();
        write_all("out", &written, &reads.tensors(), |mut written, read| {
            let reader = Reader { reads: &reads, read };
            let projected = written.drain(2..).next().map(|to| open_one::<B>("columns", to)).transpose()?;
            let [out_storage, state_storage] = open::<B, 2>("out", written)?;
            for_dtype!("u", self.u.dtype(), |T| for_dtype!("state", state.dtype(), |St| {
                let weights = |[dt, b, c]: [Place; 3]| -> Result<_> {
                    let view = |place| reader.view::<B, f32, 1>(place);
                    Ok([view(dt)?, view(b)?, view(c)?])
                };
                let norms = match norms {
                    Some((all, eps)) => Some(ColumnNorms { weights: all.map(weights).transpose()?, eps }),
                    None => None,
                };
                let of_columns = reader.view::<B, T, 2>(columns)?;
                let columns = match projected {
                    Some(_) => Columns::Projected { weight: of_columns },
                    None => Columns::Given(of_columns),
                };
                let inputs = SelectiveUpdate {
                    u: reader.view::<B, T, 2>(u)?,
                    columns,
                    dt_weight: reader.view::<B, T, 2>(dt_weight)?,
                    norms,
                    a: reader.view::<B, f32, 2>(a)?,
                    d: reader.view_if::<B, f32, 1>(d)?,
                    delta_bias: reader.view_if::<B, f32, 1>(delta_bias)?,
                    z: reader.view_if::<B, T, 2>(z)?,
                    slots: reader.slots::<B>(self.slots, slots)?,
                };
                let outputs = SelectiveUpdateMut {
                    state: pool::<B, St>(state_storage, state, STATE_NAMES[0])?,
                    out: B::elements_mut::<T>(out_storage)?,
                    columns: projected.map(B::elements_mut::<T>).transpose()?,
                };
                Ok(backend.selective_update(&inputs, outputs)?)
            }))
        })
    }
}

/// Writes the rows of `table`, `(vocab_size, width)` of `f32`, `f16` or `bf16`, that `ids` of `u32` name to `out`, `(rows, width)`,
/// dense, of the table's type or of `f32`: row `i` is that of token `ids[i]` or, with slots, `ids[slots[i]]`; zeros for padding. A
/// token that the table does not have gives a row that is not a number, as nobody looks at tokens that a device has chosen.
///
/// # Errors
/// An argument that does not fit, which the message names; nothing is written then. What the device refuses.
pub fn embedding_lookup<'s>(ids: &Tensor, slots: impl Into<Slots<'s>>, table: &Tensor, out: &Tensor) -> Result<()> {
    let slots = slots.into();
    on_device!("out", out, |backend| look_up(backend, ids, slots, table, out))
}

fn look_up<B: DecodeBackend>(backend: &B, ids: &Tensor, slots: Slots, table: &Tensor, out: &Tensor) -> Result<()> {
    let mut reads = Reads::default();
    let (of_ids, of_table, of_slots) = (reads.add("ids", ids), reads.add("table", table), reads.add_slots(slots));
    reads.check_out(out)?;
    if ids.dtype() != DType::U32 || ids.rank() != 1 || !ids.is_contiguous() || ids.layout().start_offset() > 0 {
        let got = format_args!("{:?} of {:?}", ids.layout(), ids.dtype()).to_string();
        return Err(Error::argument("ids", "(ids) of U32, dense, the whole of its storage", got).into());
    }
    write_all("out", &[out], &reads.tensors(), |written, read| {
        let reader = Reader { reads: &reads, read };
        let [storage] = open::<B, 1>("out", written)?;
        for_dtype!("table", table.dtype(), |T| full_or!("out", out.dtype(), T, |O| {
            let view = reader.view::<B, T, 2>(of_table)?;
            let slots = reader.slots::<B>(slots, of_slots)?;
            backend.lookup(reader.storage::<B>(of_ids)?, slots, &view, B::elements_mut::<O>(storage)?)
        }))
    })
}
