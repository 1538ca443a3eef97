//! The selective scan on tensors.

use candle_core::{Result, Tensor};

use super::device::{Backend, Value, for_dtype, on_device};
use super::graph::{self, Backward, Computed, Gradient};
use super::tensors::{Argument, Opened, Reader, both, given};
use crate::scan::{GradientsMut, Inputs, Options, OutputGradients, OutputMut, ProjectionMut};
use crate::sequences::Sequences;

/// A selective scan over tensors; see [`scan`](crate::scan) for what it computes.
///
/// `T` stands for the element type of `u`: `f32`, `f16` or `bf16`. Tensors may have any strides. Channels-last, such as a
/// column range of a projection's output, is the fast layout and is not copied.
///
/// Gradients flow to every tensor here, from the output and from the final state.
#[derive(Debug, Clone, Copy)]
pub struct Scan<'a> {
    /// The input, `(batch, length, d_inner)` of `T`.
    pub u: &'a Tensor,
    /// The step sizes before bias and softplus, `(batch, length, d_inner)` of `T`.
    pub delta: &'a Tensor,
    /// The state matrix, diagonal, `(d_inner, d_state)` of `f32`: negative for a state that decays.
    pub a: &'a Tensor,
    /// How the input enters the state: `(batch, length, groups, d_state)` of `T`, or `(batch, length, d_state)` of `T`
    /// for one group, or `(d_inner, d_state)` of `f32` if it is the same at every step.
    pub b: &'a Tensor,
    /// How the state is read, of one of the shapes that `b` may have.
    pub c: &'a Tensor,
    /// The gate, `(batch, length, d_inner)` of `T`.
    pub z: Option<&'a Tensor>,
    /// The skip connection, `(d_inner)` of `f32`.
    pub d: Option<&'a Tensor>,
    /// Added to `delta`, `(d_inner)` of `f32`.
    pub delta_bias: Option<&'a Tensor>,
    /// The state before the first step, `(sequences, d_inner, d_state)` of `f32`; zero if absent.
    pub initial_state: Option<&'a Tensor>,
    /// Packed sequences: with offsets `[0, l1, l1 + l2, …, length]` the batch is 1 and sequence `i` takes the steps from
    /// `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Otherwise every batch row is a sequence.
    pub cu_seqlens: Option<&'a [usize]>,
    /// The variant of the recurrence.
    pub options: Options,
}

const NAME: &str = "selective-scan";
const ACTIVATION: &str = "(batch, length, d_inner)";
const STATE: &str = "(sequences, d_inner, d_state)";

impl<'a> Scan<'a> {
    /// The tensors that every scan has; the others are absent and the options plain. Add them with struct update syntax:
    /// `Scan { z: Some(&z), ..Scan::new(&u, &delta, &a, &b, &c) }`.
    pub fn new(u: &'a Tensor, delta: &'a Tensor, a: &'a Tensor, b: &'a Tensor, c: &'a Tensor) -> Self {
        Self {
            u,
            delta,
            a,
            b,
            c,
            z: None,
            d: None,
            delta_bias: None,
            initial_state: None,
            cu_seqlens: None,
            options: Options::default(),
        }
    }

    /// Runs the scan: `(batch, length, d_inner)` of `T`.
    ///
    /// # Errors
    /// An argument that does not fit, which the message names. What the device refuses.
    pub fn forward(&self) -> Result<Tensor> {
        Ok(self.run(false)?.0)
    }

    /// Runs the scan and also gives the state behind the last step, `(sequences, d_inner, d_state)` of `f32`.
    ///
    /// # Errors
    /// As [`Scan::forward`].
    pub fn forward_with_state(&self) -> Result<(Tensor, Tensor)> {
        self.run(true).map(both)
    }

    fn arguments(&self) -> Vec<Argument<'a>> {
        let Self { u, delta, a, b, c, z, d, delta_bias, initial_state, .. } = *self;
        let optional = [("z", z), ("d", d), ("delta_bias", delta_bias), ("initial_state", initial_state)];
        given([("u", u), ("delta", delta), ("a", a), ("b", b), ("c", c)], optional)
    }

    fn run(&self, with_state: bool) -> Result<(Tensor, Option<Tensor>)> {
        let arguments = self.arguments();
        let tensors: Vec<_> = arguments.iter().map(|(_, tensor)| *tensor).collect();
        let tracked = graph::is_tracked(&tensors);
        let results = {
            let opened = Opened::new(&arguments)?;
            let reader = opened.reader();
            on_device!("u", self.u, |backend| for_dtype!("u", self.u.dtype(), |T| {
                let inputs = inputs(backend, &reader, self.cu_seqlens, self.options)?;
                compute::<_, T>(backend, &inputs, with_state, tracked)
            }))
        }?;
        let Results { out, final_state, checkpoints } = results;
        let Some(checkpoints) = checkpoints else {
            return Ok((out.untracked(), final_state.map(Computed::untracked)));
        };
        let kept = Kept {
            u: self.u.clone(),
            delta: self.delta.clone(),
            a: self.a.clone(),
            b: self.b.clone(),
            c: self.c.clone(),
            z: self.z.cloned(),
            d: self.d.cloned(),
            delta_bias: self.delta_bias.cloned(),
            initial_state: self.initial_state.cloned(),
            cu_seqlens: self.cu_seqlens.map(<[usize]>::to_vec),
            options: self.options,
            checkpoints,
        };
        graph::attach(NAME, &tensors, out, final_state, kept)
    }
}

/// What a forward pass gives.
struct Results {
    out: Computed,
    final_state: Option<Computed>,
    /// Those that a backward pass needs, if one may follow.
    checkpoints: Option<Tensor>,
}

fn inputs<'l, B: Backend, T: Value>(
    _: &B,
    reader: &Reader<'l>,
    cu_seqlens: Option<&'l [usize]>,
    options: Options,
) -> Result<Inputs<'l, T, B::Memory>> {
    Ok(Inputs {
        z: reader.optional::<B, T, 3>("z", ACTIVATION)?,
        d: reader.optional::<B, f32, 1>("d", "(d_inner)")?,
        delta_bias: reader.optional::<B, f32, 1>("delta_bias", "(d_inner)")?,
        initial_state: reader.optional::<B, f32, 3>("initial_state", STATE)?,
        cu_seqlens,
        options,
        ..Inputs::new(
            reader.view::<B, T, 3>("u", ACTIVATION)?,
            reader.view::<B, T, 3>("delta", ACTIVATION)?,
            reader.view::<B, f32, 2>("a", "(d_inner, d_state)")?,
            reader.projection::<B, T>("b")?,
            reader.projection::<B, T>("c")?,
        )
    })
}

fn compute<B: Backend, T: Value>(
    backend: &B,
    inputs: &Inputs<T, B::Memory>,
    with_state: bool,
    with_checkpoints: bool,
) -> Result<Results> {
    let [batch, len, d_inner] = inputs.u.shape;
    let sequences = Sequences::check(batch, len, inputs.cu_seqlens)?.count();
    let state = [sequences, d_inner, inputs.a.shape[1]];
    let slots = [if with_checkpoints { inputs.checkpoint_len()? } else { 0 }];
    let mut out = backend.allocate::<T>("u", &inputs.u.shape)?;
    let mut final_state = with_state.then(|| backend.allocate::<f32>("initial_state", &state)).transpose()?;
    let mut checkpoints = with_checkpoints.then(|| backend.allocate::<f32>("u", &slots)).transpose()?;
    let outputs = OutputMut {
        out: B::borrow(&mut out),
        final_state: final_state.as_mut().map(B::borrow),
        checkpoints: checkpoints.as_mut().map(B::borrow),
    };
    backend.scan_forward(inputs, outputs)?;
    Ok(Results {
        out: Computed::new(backend.store(out), inputs.u.shape),
        final_state: final_state.map(|data| Computed::new(backend.store(data), state)),
        checkpoints: checkpoints.map(|data| graph::untracked(backend.store(data), slots[0])),
    })
}

/// What a backward pass needs: the inputs and the checkpoints.
struct Kept {
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    z: Option<Tensor>,
    d: Option<Tensor>,
    delta_bias: Option<Tensor>,
    initial_state: Option<Tensor>,
    cu_seqlens: Option<Vec<usize>>,
    options: Options,
    checkpoints: Tensor,
}

impl Backward for Kept {
    fn backward(&self, d_out: &Tensor, d_final_state: Option<&Tensor>) -> Result<Vec<Tensor>> {
        let mut arguments = self.scan().arguments();
        arguments.extend([("checkpoints", &self.checkpoints), ("d_out", d_out)]);
        arguments.extend(d_final_state.map(|tensor| ("d_final_state", tensor)));
        let opened = Opened::new(&arguments)?;
        let reader = opened.reader();
        on_device!("u", self.u, |backend| for_dtype!("u", self.u.dtype(), |T| {
            self.gradients::<_, T>(backend, &reader)
        }))
    }
}

impl Kept {
    fn scan(&self) -> Scan<'_> {
        Scan {
            z: self.z.as_ref(),
            d: self.d.as_ref(),
            delta_bias: self.delta_bias.as_ref(),
            initial_state: self.initial_state.as_ref(),
            cu_seqlens: self.cu_seqlens.as_deref(),
            options: self.options,
            ..Scan::new(&self.u, &self.delta, &self.a, &self.b, &self.c)
        }
    }

    /// The gradients in the order of [`Scan::arguments`].
    fn gradients<B: Backend, T: Value>(&self, backend: &B, reader: &Reader) -> Result<Vec<Tensor>> {
        let inputs = inputs::<B, T>(backend, reader, self.cu_seqlens.as_deref(), self.options)?;
        let checkpoints = reader.view::<B, f32, 1>("checkpoints", "(elements)")?;
        let d_outputs = OutputGradients {
            d_out: reader.view::<B, T, 3>("d_out", ACTIVATION)?,
            d_final_state: reader.optional::<B, f32, 3>("d_final_state", STATE)?,
        };

        let mut u = Gradient::<B, T>::new(backend, "u", &self.u)?;
        let mut delta = Gradient::<B, T>::new(backend, "delta", &self.delta)?;
        let mut a = Gradient::<B, f32>::new(backend, "a", &self.a)?;
        let mut b = ProjectionGradient::<B, T>::new(backend, "b", &self.b)?;
        let mut c = ProjectionGradient::<B, T>::new(backend, "c", &self.c)?;
        let mut z = Gradient::<B, T>::optional(backend, "z", &self.z)?;
        let mut d = Gradient::<B, f32>::optional(backend, "d", &self.d)?;
        let mut delta_bias = Gradient::<B, f32>::optional(backend, "delta_bias", &self.delta_bias)?;
        let mut initial_state = Gradient::<B, f32>::optional(backend, "initial_state", &self.initial_state)?;
        let gradients = GradientsMut {
            u: u.as_mut(),
            delta: delta.as_mut(),
            a: a.as_mut(),
            b: b.as_mut(),
            c: c.as_mut(),
            z: z.as_mut().map(Gradient::as_mut),
            d: d.as_mut().map(Gradient::as_mut),
            delta_bias: delta_bias.as_mut().map(Gradient::as_mut),
            initial_state: initial_state.as_mut().map(Gradient::as_mut),
        };
        backend.scan_backward(&inputs, checkpoints.data, d_outputs, gradients)?;

        let mut all = vec![u.tensor(backend), delta.tensor(backend), a.tensor(backend)];
        all.extend([b.tensor(backend), c.tensor(backend)]);
        all.extend(z.map(|gradient| gradient.tensor(backend)));
        all.extend([d, delta_bias, initial_state].into_iter().flatten().map(|gradient| gradient.tensor(backend)));
        Ok(all)
    }
}

/// The gradient of `b` or `c`.
enum ProjectionGradient<'t, B: Backend, T: Value> {
    Varying(Gradient<'t, B, T>),
    Constant(Gradient<'t, B, f32>),
}

impl<'t, B: Backend, T: Value> ProjectionGradient<'t, B, T> {
    fn new(backend: &B, name: &'static str, input: &'t Tensor) -> Result<Self> {
        Ok(match input.rank() {
            2 => Self::Constant(Gradient::new(backend, name, input)?),
            _ => Self::Varying(Gradient::new(backend, name, input)?),
        })
    }

    fn as_mut(&mut self) -> ProjectionMut<'_, T, B::Memory> {
        match self {
            Self::Varying(gradient) => ProjectionMut::Varying(gradient.as_mut()),
            Self::Constant(gradient) => ProjectionMut::Constant(gradient.as_mut()),
        }
    }

    fn tensor(self, backend: &B) -> Tensor {
        match self {
            Self::Varying(gradient) => gradient.tensor(backend),
            Self::Constant(gradient) => gradient.tensor(backend),
        }
    }
}
