//! AdamW on candle's variables.

use std::collections::HashSet;

use candle_core::{CpuStorage, DType, Device, Result, Tensor, Var};

use super::{Gradient, Group, Layout, Moments, Options, Parameter, Place, Status, Values, cpu};
use crate::candle::device::{Backend, Cpu, Value, on_device, unsupported};
use crate::candle::graph;
use crate::candle::tensors::storage_of;
use crate::candle::write_all::{MOST_WRITTEN, Read, StorageMut, open, open_one, write_all};
use crate::{Error, View, ViewMut};

/// A device that takes steps of AdamW.
pub(crate) trait OptimizerBackend: Backend {
    type Factors;

    /// The first pass, which also gives the norm of the gradients, one element.
    fn begin(
        &self,
        options: &Options,
        gradients: &[Gradient<Self::Memory>],
        counts: &mut Self::Storage,
        scale: &mut Self::Storage,
    ) -> Result<(Self::Factors, Self::Owned<f32>)>;

    fn update<'a>(
        &self,
        options: &Options,
        learning_rate: f64,
        factors: &Self::Factors,
        parameters: Vec<Parameter<'a, Self::Memory>>,
        moments: Moments<'a, Self::Memory>,
    ) -> crate::Result<()>;
}

impl OptimizerBackend for Cpu {
    type Factors = cpu::Factors;

    fn begin(
        &self,
        options: &Options,
        gradients: &[Gradient],
        counts: &mut CpuStorage,
        scale: &mut CpuStorage,
    ) -> Result<(cpu::Factors, Vec<f32>)> {
        let CpuStorage::I64(counts) = counts else { unreachable!("it was made so") };
        let scale = Cpu::elements_mut::<f32>(scale)?;
        let [taken, skipped, streak] = [counts[0], counts[1], counts[2]].map(i64::cast_unsigned);
        let mut status = Status { taken, skipped, streak, scale: scale[0] };
        let factors = cpu::begin(options, gradients, &mut status)?;
        let Status { taken, skipped, streak, scale: next } = status;
        counts.copy_from_slice(&[taken, skipped, streak].map(u64::cast_signed));
        scale[0] = next;
        Ok((factors, vec![factors.norm() as f32]))
    }

    fn update<'a>(
        &self,
        options: &Options,
        learning_rate: f64,
        factors: &cpu::Factors,
        parameters: Vec<Parameter<'a>>,
        moments: Moments<'a>,
    ) -> crate::Result<()> {
        cpu::update(options, learning_rate, factors, parameters, moments)
    }
}

#[cfg(feature = "candle-cuda")]
impl OptimizerBackend for crate::candle::cuda::Gpu {
    type Factors = super::cuda::Factors;

    fn begin(
        &self,
        options: &Options,
        gradients: &[Gradient<Self::Memory>],
        counts: &mut candle_core::CudaStorage,
        scale: &mut candle_core::CudaStorage,
    ) -> Result<(Self::Factors, Self::Owned<f32>)> {
        let mut norm = self.allocate::<f32>("norm", &[1])?;
        let counts = counts.as_cuda_slice_mut::<i64>()?;
        let status = super::cuda::StatusMut { counts, scale: Self::elements_mut::<f32>(scale)? };
        let factors = super::cuda::begin(&self.stream, options, gradients, status, &mut norm)?;
        Ok((factors, norm))
    }

    fn update<'a>(
        &self,
        options: &Options,
        learning_rate: f64,
        factors: &Self::Factors,
        parameters: Vec<Parameter<'a, Self::Memory>>,
        moments: Moments<'a, Self::Memory>,
    ) -> crate::Result<()> {
        super::cuda::update(&self.stream, options, learning_rate, factors, parameters, moments)
    }
}

/// The state of [AdamW](crate::optimizer) over variables, on their device: moments, masters of variables in half types, the
/// counts of steps and the scale of losses.
///
/// ```
/// use candle_core::{Device, Var};
/// use selective_scan::candle::AdamWState;
/// use selective_scan::optimizer::{Group, Options};
///
/// let w = Var::new(&[1f32, -2.0], &Device::Cpu)?;
/// let mut state = AdamWState::new(std::slice::from_ref(&w))?;
/// let group = Group { learning_rate: 1.0, weight_decay: 0.0 };
/// for _ in 0..50 {
///     let gradients = w.sqr()?.sum_all()?.backward()?;
///     let gradient = gradients.get(&w).unwrap();
///     state.step(&Options::default(), 0.1, &[group], std::slice::from_ref(gradient))?;
/// }
/// assert!(w.to_vec1::<f32>()?.iter().all(|w| w.abs() < 0.5));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct AdamWState {
    variables: Vec<Var>,
    layout: Layout,
    device: Device,
    /// Those of all variables, one after another.
    mean: Tensor,
    mean_square: Tensor,
    master: Tensor,
    /// Steps taken, steps skipped and the streak.
    counts: Tensor,
    scale: Tensor,
}

impl AdamWState {
    /// The state before any step. Masters are the variables as they are now.
    ///
    /// # Errors
    /// A variable that is not of `f32`, `f16` or `bf16`, that is not contiguous, that is given twice, or that lies on another
    /// device than the first. No room on the device.
    pub fn new(variables: &[Var]) -> Result<Self> {
        let device = variables.first().map_or(Device::Cpu, |variable| variable.device().clone());
        let mut ids = HashSet::new();
        let mut sizes = Vec::with_capacity(variables.len());
        for variable in variables {
            let found = variable.device().location();
            if found != device.location() {
                let expected = format_args!("variables on {:?}, as the first", device.location()).to_string();
                return Err(Error::argument("variables", expected, format_args!("one on {found:?}")).into());
            }
            if !variable.is_contiguous() {
                let got = format_args!("strides {:?}", variable.stride());
                return Err(Error::argument("variables", "contiguous variables", got).into());
            }
            if !ids.insert(variable.id()) {
                return Err(Error::argument("variables", "each variable once", "one that comes twice").into());
            }
            sizes.push((element_type(variable.dtype())?, variable.elem_count()));
        }
        let layout = Layout::new(sizes)?;
        // Devices allocate nothing of no size.
        let zeros = |len: usize| Tensor::zeros(len.max(1), DType::F32, &device);
        let state = Self {
            mean: zeros(layout.moments)?,
            mean_square: zeros(layout.moments)?,
            master: zeros(layout.masters)?,
            counts: Tensor::zeros(3, DType::I64, &device)?,
            scale: Tensor::ones(1, DType::F32, &device)?,
            variables: variables.to_vec(),
            layout,
            device,
        };
        for (index, variable) in state.variables.iter().enumerate() {
            if state.has_master(index) {
                state.set_master(index, variable.as_tensor())?;
            }
        }
        Ok(state)
    }

    /// The variables, in the order in which they were given.
    pub fn variables(&self) -> &[Var] {
        &self.variables
    }

    /// The device that they lie on; the processor if there are none.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Takes a step by the gradient of each variable, of `f32` or of the variable's type, and gives their norm before they were
    /// clipped, a scalar of `f32` on the device. Nothing waits for the device. A step whose gradients are not finite is
    /// skipped, see [the module](crate::optimizer); its norm is not finite then.
    ///
    /// # Errors
    /// Numbers that make no step; another number of groups or gradients than variables; a gradient of another shape, type or
    /// device, or in a variable's storage. Nothing is written then. What the device refuses.
    pub fn step(
        &mut self,
        options: &Options,
        learning_rate: f64,
        groups: &[Group],
        gradients: &[Tensor],
    ) -> Result<Tensor> {
        options.check()?;
        super::check::not_negative("learning_rate", learning_rate)?;
        groups.iter().try_for_each(Group::check)?;
        for (name, got) in [("groups", groups.len()), ("gradients", gradients.len())] {
            if got != self.variables.len() {
                let expected = format_args!("{}, one for each variable", self.variables.len()).to_string();
                return Err(Error::argument(name, expected, got).into());
            }
        }
        for (variable, gradient) in self.variables.iter().zip(gradients) {
            let fits = gradient.dims() == variable.dims()
                && [DType::F32, variable.dtype()].contains(&gradient.dtype())
                && gradient.device().location() == self.device.location();
            if !fits {
                let describe = |tensor: &Tensor| {
                    format!("{:?} of {} on {:?}", tensor.dims(), tensor.dtype().as_str(), tensor.device().location())
                };
                let expected = format_args!("{}, as the variable, or f32", describe(variable)).to_string();
                return Err(Error::argument("gradients", expected, describe(gradient)).into());
            }
        }
        let gradients: Vec<_> = gradients.iter().map(|gradient| gradient.contiguous()).collect::<Result<_>>()?;
        // Here rather than when locks are taken, as the step has been counted by then.
        let written: HashSet<_> = self.variables.iter().map(|variable| storage_of(variable)).collect();
        if gradients.iter().any(|gradient| written.contains(&storage_of(gradient))) {
            return Err(Error::argument("gradients", "storages of their own", "the storage of a variable").into());
        }
        on_device!("variables", self.mean, |backend| self.step_on(backend, options, learning_rate, groups, &gradients))
    }

    fn step_on<B: OptimizerBackend>(
        &self,
        backend: &B,
        options: &Options,
        learning_rate: f64,
        groups: &[Group],
        gradients: &[Tensor],
    ) -> Result<Tensor> {
        let (factors, norm) = self.begin_on(backend, options, gradients)?;
        // The moments are written too.
        let most = MOST_WRITTEN - 4;
        for first in (0..gradients.len()).step_by(most) {
            let part = first..gradients.len().min(first + most);
            self.update_on(backend, options, learning_rate, &factors, &groups[part.clone()], gradients, part)?;
        }
        Ok(graph::untracked(backend.store(norm), ()))
    }

    fn begin_on<B: OptimizerBackend>(
        &self,
        backend: &B,
        options: &Options,
        gradients: &[Tensor],
    ) -> Result<(B::Factors, B::Owned<f32>)> {
        let read: Vec<_> = gradients.iter().collect();
        write_all("gradients", &[&self.counts, &self.scale], &read, |written, read| {
            let [counts, scale] = open::<B, 2>("variables", written)?;
            let gradients: Vec<_> = gradients
                .iter()
                .enumerate()
                .map(|(i, tensor)| gradient::<B>(tensor, read, i))
                .collect::<Result<_>>()?;
            backend.begin(options, &gradients, counts, scale)
        })
    }

    /// Updates the variables of a part.
    #[allow(clippy::too_many_arguments, reason = "what a step has, for a part of the variables")]
    fn update_on<B: OptimizerBackend>(
        &self,
        backend: &B,
        options: &Options,
        learning_rate: f64,
        factors: &B::Factors,
        groups: &[Group],
        gradients: &[Tensor],
        part: std::ops::Range<usize>,
    ) -> Result<()> {
        let (variables, places) = (&self.variables[part.clone()], &self.layout.places[part.clone()]);
        let gradients = &gradients[part];
        let moments = [&self.mean, &self.mean_square, &self.master];
        let written: Vec<_> = moments.into_iter().chain(variables.iter().map(Var::as_tensor)).collect();
        let read: Vec<_> = gradients.iter().collect();
        write_all("variables", &written, &read, |mut written, read| {
            let values = written.split_off(3);
            let [mean, mean_square, master] = open::<B, 3>("variables", written)?;
            let moments = Moments {
                mean: B::elements_mut::<f32>(mean)?,
                mean_square: B::elements_mut::<f32>(mean_square)?,
                master: B::elements_mut::<f32>(master)?,
            };
            let mut parameters = Vec::with_capacity(variables.len());
            for (i, (storage, variable)) in values.into_iter().zip(variables).enumerate() {
                let values = values_of::<B>(variable, storage)?;
                let gradient = gradient::<B>(&gradients[i], read, i)?;
                parameters.push(Parameter { values, gradient, place: places[i], group: groups[i] });
            }
            Ok(backend.update(options, learning_rate, factors, parameters, moments)?)
        })
    }

    /// The counts of steps and the scale of the next loss. This waits for the device.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn status(&self) -> Result<Status> {
        let counts = self.counts.to_vec1::<i64>()?;
        let [taken, skipped, streak] = [counts[0], counts[1], counts[2]].map(i64::cast_unsigned);
        Ok(Status { taken, skipped, streak, scale: self.scale.to_vec1::<f32>()?[0] })
    }

    /// Goes on from other counts and another scale.
    ///
    /// # Errors
    /// A scale that is no power of two from 1 to 2^30; counts beyond 2^63. What the device refuses.
    pub fn set_status(&mut self, status: Status) -> Result<()> {
        let Status { taken, skipped, streak, scale } = status;
        if !(1.0..=2f32.powi(30)).contains(&scale) || scale.to_bits() << 9 != 0 {
            return Err(Error::argument("scale", "a power of two from 1 to 2^30", scale).into());
        }
        let signed =
            |count: u64| i64::try_from(count).map_err(|_| Error::argument("status", "counts below 2^63", count));
        let counts = [signed(taken)?, signed(skipped)?, signed(streak)?];
        self.counts.slice_set(&Tensor::new(&counts, &self.device)?, 0, 0)?;
        self.scale.slice_set(&Tensor::new(&[scale], &self.device)?, 0, 0)
    }

    /// What the loss of the next step is to be multiplied by, a scalar of `f32` on the device that later steps leave alone.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn scale(&self) -> Result<Tensor> {
        self.scale.force_contiguous()?.reshape(())
    }

    /// Whether variable number `index` has a master, which those of half types have.
    ///
    /// # Panics
    /// If there is no such variable.
    pub fn has_master(&self, index: usize) -> bool {
        self.variables[index].dtype() != DType::F32
    }

    /// Copies of the mean, the mean square and, if there is one, the master of variable number `index`, of its shape, in `f32`.
    ///
    /// # Errors
    /// What the device refuses.
    ///
    /// # Panics
    /// If there is no such variable.
    pub fn moments(&self, index: usize) -> Result<([Tensor; 2], Option<Tensor>)> {
        let Place { len, moments, master } = self.layout.places[index];
        let copy =
            |from: &Tensor, at| from.narrow(0, at, len)?.force_contiguous()?.reshape(self.variables[index].shape());
        let master = self.has_master(index).then(|| copy(&self.master, master)).transpose()?;
        Ok(([copy(&self.mean, moments)?, copy(&self.mean_square, moments)?], master))
    }

    /// Goes on from other moments of variable number `index`.
    ///
    /// # Errors
    /// Another number of elements than the variable's. What the device refuses.
    ///
    /// # Panics
    /// If there is no such variable.
    pub fn set_moments(&mut self, index: usize, [mean, mean_square]: [&Tensor; 2]) -> Result<()> {
        let Place { len, moments, .. } = self.layout.places[index];
        set(&self.mean, "mean", mean, moments, len)?;
        set(&self.mean_square, "mean_square", mean_square, moments, len)
    }

    /// Goes on from another master of variable number `index`, which has one. The variable stays as it is until the next step.
    ///
    /// # Errors
    /// Another number of elements than the variable's. What the device refuses.
    ///
    /// # Panics
    /// If there is no such variable, or it has no master.
    pub fn set_master(&self, index: usize, master: &Tensor) -> Result<()> {
        assert!(self.has_master(index), "variable {index} has no master");
        let Place { len, master: at, .. } = self.layout.places[index];
        set(&self.master, "master", master, at, len)
    }
}

/// Writes a tensor's elements from `at` on.
fn set(to: &Tensor, name: &'static str, from: &Tensor, at: usize, len: usize) -> Result<()> {
    if from.elem_count() != len {
        return Err(Error::argument(name, format_args!("{len} elements"), from.elem_count()).into());
    }
    if len == 0 {
        return Ok(());
    }
    let from = from.detach().to_device(to.device())?.to_dtype(DType::F32)?;
    to.slice_set(&from.contiguous()?.flatten_all()?, 0, at)
}

fn element_type(dtype: DType) -> crate::Result<crate::DType> {
    match dtype {
        DType::F32 => Ok(crate::DType::F32),
        DType::F16 => Ok(crate::DType::F16),
        DType::BF16 => Ok(crate::DType::Bf16),
        other => Err(unsupported("variables", other)),
    }
}

/// A contiguous tensor as one dimension.
fn view<'r, B: Backend, T: Value>(tensor: &Tensor, read: &'r Read, index: usize) -> Result<View<'r, T, 1, B::Memory>> {
    let elsewhere = || Error::argument("gradients", "gradients on the variables' device", "one elsewhere");
    let data = B::elements::<T>(B::open(read.storage(index)).ok_or_else(elsewhere)?)?;
    Ok(View { data, offset: tensor.layout().start_offset(), shape: [tensor.elem_count()], strides: [1] })
}

fn gradient<'r, B: Backend>(tensor: &Tensor, read: &'r Read, index: usize) -> Result<Gradient<'r, B::Memory>> {
    match element_type(tensor.dtype())? {
        crate::DType::F32 => Ok(Gradient::F32(view::<B, _>(tensor, read, index)?)),
        crate::DType::F16 => Ok(Gradient::F16(view::<B, _>(tensor, read, index)?)),
        crate::DType::Bf16 => Ok(Gradient::Bf16(view::<B, _>(tensor, read, index)?)),
    }
}

fn values_of<'w, B: Backend>(variable: &Var, storage: StorageMut<'w>) -> Result<Values<'w, B::Memory>> {
    let storage = open_one::<B>("variables", storage)?;
    let (offset, shape) = (variable.layout().start_offset(), [variable.elem_count()]);
    Ok(match element_type(variable.dtype())? {
        crate::DType::F32 => Values::F32(ViewMut { data: B::elements_mut(storage)?, offset, shape, strides: [1] }),
        crate::DType::F16 => Values::F16(ViewMut { data: B::elements_mut(storage)?, offset, shape, strides: [1] }),
        crate::DType::Bf16 => Values::Bf16(ViewMut { data: B::elements_mut(storage)?, offset, shape, strides: [1] }),
    })
}
