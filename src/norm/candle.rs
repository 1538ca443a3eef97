//! The norm on candle's tensors.

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Result, Shape, Tensor};
use half::{bf16, f16};

use super::check::{BackwardProblem, Problem, WEIGHT};
use super::{BackwardInputs, GradientsMut, Inputs, Options, OutputMut, cpu};
use crate::candle::device::{Backend, Cpu, Value, on_device, unsupported};
use crate::candle::graph::{self, Backward, Computed};
use crate::candle::tensors::{Arguments, Reader, both, has_rows};
use crate::simd::Isa;
use crate::{Element, Error};

const NAME: &str = "rms-norm";

/// Calls a generic method for the types of the input, of the residual and of the output, the latter two with the names of
/// their arguments.
macro_rules! for_types {
    ($x:expr, $stream:expr, $out:expr, |$X:ident, $S:ident, $O:ident| $body:expr) => {
        match ($x, $stream.1, $out.1) {
            (DType::F32, DType::F32, DType::F32) => for_types!(@ $X = f32, $S = f32, $O = f32, $body),
            (DType::F32, DType::F32, DType::F16) => for_types!(@ $X = f32, $S = f32, $O = f16, $body),
            (DType::F32, DType::F32, DType::BF16) => for_types!(@ $X = f32, $S = f32, $O = bf16, $body),
            (DType::F16, DType::F16, DType::F16) => for_types!(@ $X = f16, $S = f16, $O = f16, $body),
            (DType::BF16, DType::BF16, DType::BF16) => for_types!(@ $X = bf16, $S = bf16, $O = bf16, $body),
            (DType::F16, DType::F32, DType::F16) => for_types!(@ $X = f16, $S = f32, $O = f16, $body),
            (DType::BF16, DType::F32, DType::BF16) => for_types!(@ $X = bf16, $S = f32, $O = bf16, $body),
            _ => Err(unfit($x, $stream, $out).into()),
        }
    };
    (@ $X:ident = $x:ty, $S:ident = $s:ty, $O:ident = $o:ty, $body:expr) => {{
        type $X = $x;
        type $S = $s;
        type $O = $o;
        $body
    }};
}

/// What is wrong with types that do not go together.
fn unfit(x: DType, (stream, s): (&'static str, DType), (out, o): (&'static str, DType)) -> Error {
    let expected = |types: String, argument, got| Error::argument(argument, types, format_args!("{got:?}"));
    match x {
        DType::F32 if s != DType::F32 => expected("dtype F32, as `x`".into(), stream, s),
        DType::F32 => unsupported(out, o),
        DType::F16 | DType::BF16 if s != x && s != DType::F32 => expected(format!("dtype F32 or {x:?}"), stream, s),
        DType::F16 | DType::BF16 => expected(format!("dtype {x:?}, as `x`"), out, o),
        _ => unsupported("x", x),
    }
}

/// A device that norms.
pub(crate) trait NormBackend: Backend {
    fn forward<X: Value, S: Value, O: Value>(
        &self,
        problem: &Problem<X, S, Self::Memory>,
        outputs: OutputMut<S, O, Self::Memory>,
    ) -> crate::Result<()>;

    fn backward<X: Value, S: Value, O: Value>(
        &self,
        problem: &BackwardProblem<X, S, O, Self::Memory>,
        gradients: GradientsMut<X, S, Self::Memory>,
    ) -> crate::Result<()>;
}

impl NormBackend for Cpu {
    fn forward<X: Value, S: Value, O: Value>(
        &self,
        problem: &Problem<X, S>,
        outputs: OutputMut<S, O>,
    ) -> crate::Result<()> {
        cpu::forward_checked(Isa::best(), problem, outputs)
    }

    fn backward<X: Value, S: Value, O: Value>(
        &self,
        problem: &BackwardProblem<X, S, O>,
        gradients: GradientsMut<X, S>,
    ) -> crate::Result<()> {
        cpu::backward_checked(Isa::best(), problem, gradients)
    }
}

#[cfg(feature = "candle-cuda")]
impl NormBackend for crate::candle::cuda::Gpu {
    fn forward<X: Value, S: Value, O: Value>(
        &self,
        problem: &Problem<X, S, Self::Memory>,
        outputs: OutputMut<S, O, Self::Memory>,
    ) -> crate::Result<()> {
        super::cuda::forward_checked(&self.stream, problem, outputs)
    }

    fn backward<X: Value, S: Value, O: Value>(
        &self,
        problem: &BackwardProblem<X, S, O, Self::Memory>,
        gradients: GradientsMut<X, S, Self::Memory>,
    ) -> crate::Result<()> {
        super::cuda::backward_checked(&self.stream, problem, gradients)
    }
}

/// The RMS norm over tensors, with the residual added and with a gate; see [`norm`](crate::norm) for what it computes.
///
/// `X` stands for the element type of `x`: `f32`, `f16` or `bf16`; `S` for that of the residual, or of `x` where there is
/// none. The last dimension is normed; those before it are any number of them. Tensors whose rows lie at one distance from
/// each other, as those of a column slice do, are not copied.
///
/// Gradients flow to every tensor here, from the norm and from the sum.
///
/// ```
/// # use candle_core::{DType, Device, Tensor, Var};
/// use selective_scan::candle::RmsNorm;
///
/// // A residual stream of f32 beside half activations.
/// let x = Var::zeros((2, 3, 8), DType::BF16, &Device::Cpu)?;
/// let residual = Tensor::randn(0f32, 1.0, (2, 3, 8), &Device::Cpu)?;
/// let weight = Tensor::ones(8, DType::F32, &Device::Cpu)?;
/// let norm = RmsNorm { residual: Some(&residual), weight: Some(&weight), ..RmsNorm::new(&x) };
/// let (out, sum) = norm.forward_with_residual()?;
/// assert_eq!((out.dtype(), sum.dtype()), (DType::BF16, DType::F32));
/// let gradients = out.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&x).unwrap().dtype(), DType::BF16);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm<'a> {
    /// The input, `(.., width)` of `X`.
    pub x: &'a Tensor,
    /// Added to the input: of the shape of `x`, of `f32` or `X`.
    pub residual: Option<&'a Tensor>,
    /// Multiplies what is normed, `(width)` of `f32`.
    pub weight: Option<&'a Tensor>,
    /// The gate, of the shape of `x` and of `X`.
    pub z: Option<&'a Tensor>,
    /// The variant of the norm.
    pub options: Options,
    /// The type of the result: `X` or, where that is `f32`, also `f16` or `bf16`.
    pub dtype: DType,
}

impl<'a> RmsNorm<'a> {
    /// The norm of `x`, in its type; all else is absent or plain. Add it with struct update syntax:
    /// `RmsNorm { weight: Some(&weight), ..RmsNorm::new(&x) }`.
    pub fn new(x: &'a Tensor) -> Self {
        Self { x, residual: None, weight: None, z: None, options: Options::default(), dtype: x.dtype() }
    }

    /// Runs the norm: of the shape of `x` and of `dtype`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names. What the device refuses.
    pub fn forward(&self) -> Result<Tensor> {
        Ok(self.run(false)?.0)
    }

    /// Runs the norm and also gives the sum that was normed, `x + residual` before any gate: of the shape of `x` and of
    /// `S`. Without a residual that is a copy of `x`.
    ///
    /// # Errors
    /// As [`RmsNorm::forward`].
    pub fn forward_with_residual(&self) -> Result<(Tensor, Tensor)> {
        self.run(true).map(both)
    }

    /// The gradients of a norm without residual and gate, from that of the norm and, if it was given, of the sum. This is
    /// what candle's backward pass does; here nothing is recorded in its graph. Where there was a residual, `x` is the sum.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names. What the device refuses.
    pub fn backward(&self, d_out: &Tensor, d_residual_out: Option<&Tensor>) -> Result<RmsNormGradients> {
        for (name, tensor) in [("residual", self.residual), ("z", self.z)] {
            if tensor.is_some() {
                return Err(Error::argument(name, "none, for `backward`", "a tensor").into());
            }
        }
        let s = as_rows(self.x)?;
        let x_dtype = if s.dtype() == DType::F32 { d_out.dtype() } else { s.dtype() };
        let given =
            Given { s: &s, weight: self.weight, z: None, d_out, d_residual_out, options: self.options, x_dtype };
        let is_narrower = x_dtype != s.dtype();
        let wanted = Wanted { x: is_narrower, residual: true, weight: self.weight.is_some(), z: false };
        let Found { x, residual, weight, .. } = given.gradients(wanted)?;
        let sum = residual.ok_or_else(|| candle_core::Error::Msg(format!("{NAME}: a gradient was left out")))?;
        Ok(RmsNormGradients { x: x.unwrap_or_else(|| sum.clone()), sum, weight })
    }

    fn tensors(&self) -> impl Iterator<Item = (&'static str, &'a Tensor)> {
        let optional = [("residual", self.residual), ("weight", self.weight), ("z", self.z)];
        let optional = optional.into_iter().filter_map(|(name, tensor)| Some((name, tensor?)));
        [("x", self.x)].into_iter().chain(optional)
    }

    fn run(&self, with_residual_out: bool) -> Result<(Tensor, Option<Tensor>)> {
        let [x, residual, z] = [Some(self.x), self.residual, self.z].map(|tensor| tensor.map(as_rows).transpose());
        let (x, residual, z) = (x?, residual?, z?);
        let with_rows =
            RmsNorm { x: x.as_deref().unwrap_or(self.x), residual: residual.as_deref(), z: z.as_deref(), ..*self };
        with_rows.run_on_rows(with_residual_out)
    }

    fn run_on_rows(&self, with_residual_out: bool) -> Result<(Tensor, Option<Tensor>)> {
        let tensors: Vec<_> = self.tensors().map(|(_, tensor)| tensor).collect();
        let is_tracked = graph::is_tracked(&tensors);
        // A backward pass needs the sum.
        let keeps_sum = is_tracked && self.residual.is_some();
        let (out, sum) = self.compute(with_residual_out || keeps_sum)?;
        if !is_tracked {
            return Ok((out.untracked(), sum.map(Computed::untracked)));
        }
        let s = Arc::new(OnceLock::new());
        let kept = Kept {
            s: s.clone(),
            weight: self.weight.map(Tensor::detach),
            z: self.z.map(Tensor::detach),
            options: self.options,
            has_residual: self.residual.is_some(),
            x_dtype: self.x.dtype(),
            shape: self.x.shape().clone(),
            wanted: Wanted {
                x: self.x.track_op(),
                residual: self.residual.is_some_and(Tensor::track_op),
                weight: self.weight.is_some_and(Tensor::track_op),
                z: self.z.is_some_and(Tensor::track_op),
            },
        };
        if !with_residual_out {
            let sum = sum.map_or_else(|| self.x.detach(), Computed::untracked);
            let (out, _) = graph::attach(NAME, &tensors, out, None, kept)?;
            let Ok(()) = s.set(sum) else { unreachable!("it is set here alone") };
            return Ok((out, None));
        }
        let (out, sum) = graph::attach(NAME, &tensors, out, sum, kept)?;
        // The result and what is kept of it are one storage; detached, it is not part of the graph, which would keep itself.
        let stored = match (&sum, self.residual) {
            (Some(sum), Some(_)) => sum.detach(),
            _ => self.x.detach(),
        };
        let Ok(()) = s.set(stored) else { unreachable!("it is set here alone") };
        Ok((out, sum))
    }

    /// The norm and, if it is wanted, the sum.
    fn compute(&self, with_residual_out: bool) -> Result<(Computed, Option<Computed>)> {
        let mut arguments = Arguments::default();
        self.tensors().for_each(|(name, tensor)| arguments.add(name, tensor));
        let locked = arguments.lock()?;
        let stream = ("residual", self.residual.map_or(self.x.dtype(), Tensor::dtype));
        on_device!("x", self.x, |backend| for_types!(self.x.dtype(), stream, ("dtype", self.dtype), |X, S, O| {
            self.compute_on::<_, X, S, O>(backend, locked.reader(), with_residual_out)
        }))
    }

    fn compute_on<B: NormBackend, X: Value, S: Value, O: Value>(
        &self,
        backend: &B,
        reader: Reader,
        with_residual_out: bool,
    ) -> Result<(Computed, Option<Computed>)> {
        let inputs = Inputs::<X, S, B::Memory> {
            x: reader.rows::<B, X>("x", self.x, self.x)?,
            residual: self.residual.map(|tensor| reader.rows::<B, S>("residual", tensor, self.x)).transpose()?,
            weight: self.weight.map(|tensor| reader.view::<B, f32, 1>("weight", WEIGHT, tensor)).transpose()?,
            z: self.z.map(|tensor| reader.rows::<B, X>("z", tensor, self.x)).transpose()?,
            options: self.options,
        };
        let (problem, shape) = (inputs.check::<O>()?, self.x.dims());
        let mut out = backend.allocate::<O>("x", shape)?;
        let mut sum = with_residual_out.then(|| backend.allocate::<S>("x", shape)).transpose()?;
        let outputs = OutputMut { out: B::borrow(&mut out), residual_out: sum.as_mut().map(B::borrow) };
        backend.forward(&problem, outputs)?;
        let computed = |storage| Computed::of_shape(storage, self.x.shape().clone());
        Ok((computed(backend.store(out)), sum.map(|sum| computed(backend.store(sum)))))
    }
}

/// What [`RmsNorm::backward`] gives.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RmsNormGradients {
    /// The gradient of what is normed, of its shape and type.
    pub sum: Tensor,
    /// The same in the type of the norm's gradient: that of what was added to a residual stream of `f32`.
    pub x: Tensor,
    /// The gradient of the weight if there is one, `(width)` of `f32`.
    pub weight: Option<Tensor>,
}

/// A tensor whose rows lie at one distance from each other: the same or, where they do not, a copy.
fn as_rows(tensor: &Tensor) -> Result<Cow<'_, Tensor>> {
    match has_rows(tensor) {
        true => Ok(Cow::Borrowed(tensor)),
        false => tensor.contiguous().map(Cow::Owned),
    }
}

/// Which gradients somebody asks for.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    x: bool,
    residual: bool,
    weight: bool,
    z: bool,
}

/// What a backward pass needs.
struct Kept {
    /// What was normed, which is set as soon as the result is there.
    s: Arc<OnceLock<Tensor>>,
    weight: Option<Tensor>,
    z: Option<Tensor>,
    options: Options,
    has_residual: bool,
    x_dtype: DType,
    shape: Shape,
    wanted: Wanted,
}

impl Backward for Kept {
    fn backward(&self, d_out: &Tensor, d_residual_out: Option<&Tensor>) -> Result<Vec<Option<Tensor>>> {
        let Some(s) = self.s.get() else { unreachable!("nothing is differentiated before it is there") };
        let given = Given {
            s,
            weight: self.weight.as_ref(),
            z: self.z.as_ref(),
            d_out,
            d_residual_out,
            options: self.options,
            x_dtype: self.x_dtype,
        };
        let gradients = given.gradients(self.wanted)?;
        let shaped = |gradient: Option<Tensor>| gradient.map(|tensor| tensor.reshape(&self.shape)).transpose();
        // In the order of the inputs.
        let mut all = vec![shaped(gradients.x)?];
        if self.has_residual {
            all.push(shaped(gradients.residual)?);
        }
        if self.weight.is_some() {
            all.push(gradients.weight);
        }
        if self.z.is_some() {
            all.push(shaped(gradients.z)?);
        }
        Ok(all)
    }
}

/// The tensors of a backward pass.
struct Given<'a> {
    s: &'a Tensor,
    weight: Option<&'a Tensor>,
    z: Option<&'a Tensor>,
    d_out: &'a Tensor,
    d_residual_out: Option<&'a Tensor>,
    options: Options,
    x_dtype: DType,
}

/// Those gradients that were wanted.
#[derive(Default)]
struct Found {
    x: Option<Tensor>,
    residual: Option<Tensor>,
    weight: Option<Tensor>,
    z: Option<Tensor>,
}

impl Given<'_> {
    fn gradients(&self, wanted: Wanted) -> Result<Found> {
        let d_out = as_rows(self.d_out)?;
        let d_residual_out = self.d_residual_out.map(as_rows).transpose()?;
        let given = Given { d_out: &d_out, d_residual_out: d_residual_out.as_deref(), ..*self };
        let mut arguments = Arguments::default();
        arguments.add("s", given.s);
        arguments.add("d_out", given.d_out);
        let optional = [("weight", given.weight), ("z", given.z), ("d_residual_out", given.d_residual_out)];
        for (name, tensor) in optional {
            tensor.into_iter().for_each(|tensor| arguments.add(name, tensor));
        }
        let locked = arguments.lock()?;
        let (stream, out) = (("s", given.s.dtype()), ("d_out", given.d_out.dtype()));
        on_device!("s", given.s, |backend| for_types!(self.x_dtype, stream, out, |X, S, O| {
            given.gradients_on::<_, X, S, O>(backend, locked.reader(), wanted)
        }))
    }

    fn gradients_on<B: NormBackend, X: Value, S: Value, O: Value>(
        &self,
        backend: &B,
        reader: Reader,
        wanted: Wanted,
    ) -> Result<Found> {
        let rows_of_s = |name, tensor: &Tensor| reader.rows::<B, S>(name, tensor, self.s);
        let inputs = BackwardInputs::<X, S, O, B::Memory> {
            s: rows_of_s("s", self.s)?,
            weight: self.weight.map(|tensor| reader.view::<B, f32, 1>("weight", WEIGHT, tensor)).transpose()?,
            z: self.z.map(|tensor| reader.rows::<B, X>("z", tensor, self.s)).transpose()?,
            d_out: reader.rows::<B, O>("d_out", self.d_out, self.s)?,
            d_residual_out: self.d_residual_out.map(|tensor| rows_of_s("d_residual_out", tensor)).transpose()?,
            options: self.options,
        };
        let problem = inputs.check()?;
        let shape = self.s.dims();
        // Of one type, the two are one tensor.
        let is_one = <X as Element>::DTYPE == <S as Element>::DTYPE;
        let with_x = wanted.x && !(is_one && wanted.residual);
        let mut d_x = with_x.then(|| backend.allocate::<X>("s", shape)).transpose()?;
        let mut d_residual = wanted.residual.then(|| backend.allocate::<S>("s", shape)).transpose()?;
        let width = &shape[shape.len() - 1..];
        let mut d_weight = wanted.weight.then(|| backend.allocate::<f32>("weight", width)).transpose()?;
        let mut d_z = wanted.z.then(|| backend.allocate::<X>("z", shape)).transpose()?;
        let gradients = GradientsMut {
            x: d_x.as_mut().map(B::borrow),
            residual: d_residual.as_mut().map(B::borrow),
            weight: d_weight.as_mut().map(B::borrow),
            z: d_z.as_mut().map(B::borrow),
        };
        backend.backward(&problem, gradients)?;
        let residual = d_residual.map(|data| graph::untracked(backend.store(data), shape));
        let x = match d_x {
            Some(data) => Some(graph::untracked(backend.store(data), shape)),
            None => residual.clone().filter(|_| wanted.x),
        };
        Ok(Found {
            x,
            residual,
            weight: d_weight.map(|data| graph::untracked(backend.store(data), width)),
            z: d_z.map(|data| graph::untracked(backend.store(data), shape)),
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// The backward pass on its own has the bits of candle's.
    #[test]
    fn the_parts_are_those_of_the_operator() -> Result<()> {
        let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu);
        let (x, weight) = (Var::from_tensor(&random(&[3, 5, 24])?)?, Var::from_tensor(&random(&[24])?)?);
        let (d_out, d_sum) = (random(&[3, 5, 24])?.to_dtype(DType::BF16)?, random(&[3, 5, 24])?);
        let norm = RmsNorm { weight: Some(&weight), dtype: DType::BF16, ..RmsNorm::new(&x) };
        let (out, sum) = norm.forward_with_residual()?;
        let loss = ((&out * &d_out)?.to_dtype(DType::F32)?.sum_all()? + (&sum * &d_sum)?.sum_all()?)?;
        let gradients = loss.backward()?;

        let (detached, of_weight) = (x.detach(), weight.detach());
        let norm = RmsNorm { weight: Some(&of_weight), dtype: DType::BF16, ..RmsNorm::new(&detached) };
        let parts = norm.forward_with_residual()?;
        let same = |ours: &Tensor, theirs: &Tensor| -> Result<()> {
            assert_eq!((ours.dtype(), ours.dims()), (theirs.dtype(), theirs.dims()));
            let bits = |tensor: &Tensor| tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>();
            assert_eq!(bits(ours)?, bits(theirs)?);
            Ok(())
        };
        let RmsNormGradients { sum: d_s, x: rounded, weight: d_weight } = norm.backward(&d_out, Some(&d_sum))?;
        same(&rounded, &d_s.to_dtype(DType::BF16)?)?;
        same(&parts.0, &out)?;
        same(&parts.1, &sum)?;
        same(&d_s, gradients.get(&x).expect("it is a variable"))?;
        same(&d_weight.expect("there is a weight"), gradients.get(&weight).expect("it is a variable"))
    }
}
