//! The selective scan: the recurrence of Mamba (S6), forward and backward.
//!
//! For every batch row, channel and state, with `Δ`, `B` and `C` projected from the input at each step:
//!
//! ```text
//! Δ_t = softplus(delta_t + delta_bias)          softplus if asked for
//! h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        or exact zero-order hold, see Discretization
//! y_t = Σ_n C_t h_t + D u_t                     summed over the d_state states
//! out = y · silu(z)                             if there is a gate z
//! ```
//!
//! Equations, names and symbols are those of Gu and Dao, *Mamba* (2023), arXiv 2312.00752. Only the state of one step is
//! ever held: neither `exp(ΔA)` nor `h` is stored for all steps, forward or backward.
//!
//! Activations are `(batch, length, d_inner)`. mamba_ssm's are `(batch, d_inner, length)`: such a tensor is read where it lies
//! through [`View::permuted`]. One that is passed as it is gives an error that says so, except where the length equals
//! `d_inner`: there nothing can tell, and the results are wrong. The page `docs/from-mamba-ssm.md` of the repository has all
//! arguments side by side.
//!
//! # Ranges
//!
//! All arithmetic is `f32`, with decays formed as `2^(Δ·(A·log2 e))`: each has a relative error of 2^-24 for each unit of
//! its exponent `Δ·A`, from rounding `A·log2 e` and the product, and decays near 1 and near 0 are as exact as others. On
//! processors rounding does not add up over steps, however many there are. On GPUs that holds forward for `f32` sequences
//! of more than 16,384 steps; shorter ones, and gradients within each part of a sequence that is split, may lose 2^-24 for
//! each step where all are rounded the same way. A state beyond about 1e38 may become infinite, or not a number, in a step
//! where plain arithmetic would just have kept it; so may one whose decay is formed of an infinite `A` and a `Δ` of 0, which
//! on GPUs stands for the steps that a sequence lacks to a multiple of 16, in its final state. An
//! output of type `f16` is infinite beyond 65,504, whatever the state is; `bf16` has the range of `f32`. (An output in `f32`
//! of half activations is had by widening these: the arithmetic is the same.)
//!
//! [`Inputs`] says what the operator reads; [`cpu`] runs it on slices, [`reference`](mod@reference) is the same written plainly in
//! `f64`. [`Inputs::forward`] and [`Inputs::backward`] allocate their results.

mod checkpoints;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod reference;

pub use checkpoints::Checkpoints;

use bytemuck::Pod;

use crate::arguments::{Dims, check_exchanged, zeroed};
use crate::sequences::{CHECKPOINT_STEPS, Sequences};
use crate::view::{check_len, check_optional};
use crate::{Discretization, Element, Error, Host, Memory, Projection, Result, View};

/// What a selective scan reads. `T` is the type of the activations; parameters and states are `f32`.
#[derive(Debug)]
pub struct Inputs<'a, T: Element, M: Memory = Host> {
    /// The input, `(batch, length, d_inner)`.
    pub u: View<'a, T, 3, M>,
    /// The step sizes before bias and softplus, `(batch, length, d_inner)`.
    pub delta: View<'a, T, 3, M>,
    /// The state matrix, diagonal, `(d_inner, d_state)`: negative for a state that decays.
    pub a: View<'a, f32, 2, M>,
    /// How the input enters the state.
    pub b: Projection<'a, T, M>,
    /// How the state is read.
    pub c: Projection<'a, T, M>,
    /// The gate, `(batch, length, d_inner)`.
    pub z: Option<View<'a, T, 3, M>>,
    /// The skip connection, `(d_inner)`.
    pub d: Option<View<'a, f32, 1, M>>,
    /// Added to `delta`, `(d_inner)`.
    pub delta_bias: Option<View<'a, f32, 1, M>>,
    /// The state before the first step, `(sequences, d_inner, d_state)`; zero if absent.
    pub initial_state: Option<View<'a, f32, 3, M>>,
    /// Packed sequences: with offsets `[0, l1, l1 + l2, …, length]` the batch is 1 and sequence `i` takes the steps from
    /// `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Otherwise every batch row is a sequence.
    pub cu_seqlens: Option<&'a [usize]>,
    /// The variant of the recurrence.
    pub options: Options,
}

/// Variants of the recurrence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Options {
    /// Pass `delta + delta_bias` through `softplus(x) = ln(1 + e^x)`, taken as the identity above 20.
    pub delta_softplus: bool,
    /// How the input is weighted.
    pub discretization: Discretization,
    /// Run from the last step of each sequence to its first, as the second half of a bidirectional model does. The
    /// initial state then stands behind the last step and the final state before the first.
    pub reverse: bool,
}

impl<T: Element, M: Memory> Clone for Inputs<'_, T, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element, M: Memory> Copy for Inputs<'_, T, M> {}

impl<'a, T: Element, M: Memory> Inputs<'a, T, M> {
    /// The inputs that every scan has; the others are absent and the options plain. Add them with struct update syntax:
    /// `Inputs { z: Some(z), ..Inputs::new(u, delta, a, b, c) }`.
    pub fn new(
        u: View<'a, T, 3, M>,
        delta: View<'a, T, 3, M>,
        a: View<'a, f32, 2, M>,
        b: impl Into<Projection<'a, T, M>>,
        c: impl Into<Projection<'a, T, M>>,
    ) -> Self {
        Self {
            u,
            delta,
            a,
            b: b.into(),
            c: c.into(),
            z: None,
            d: None,
            delta_bias: None,
            initial_state: None,
            cu_seqlens: None,
            options: Options::default(),
        }
    }

    /// The number of elements of [`OutputMut::checkpoints`]: one state of every channel for every 64 steps.
    pub fn checkpoint_len(&self) -> Result<usize> {
        let dims = self.check()?.dims;
        let slots = dims.batch * dims.len / CHECKPOINT_STEPS;
        // `d_inner` and `d_state` may belong to views with strides of zero, so that nothing has counted their product.
        slots.checked_mul(dims.d_inner).and_then(|n| n.checked_mul(dims.d_state)).ok_or_else(|| {
            let got = format_args!("shape {:?} with d_state {}", self.u.shape, dims.d_state).to_string();
            Error::argument("u", "a shape whose checkpoints can be counted", got)
        })
    }

    /// Checks every argument. This is the only place that does; all implementations read what it returns.
    pub(crate) fn check(&self) -> Result<Problem<'a, T, M>> {
        let dims = Dims::check(ACTIVATION_NAMES, &self.u, &self.a, &self.b, &self.c)?;
        let Dims { batch, len, d_inner, d_state, .. } = dims;
        let activations = [Some(("u", &self.u)), Some(("delta", &self.delta)), self.z.as_ref().map(|z| ("z", z))];
        for (name, view) in activations.into_iter().flatten() {
            check_exchanged(name, ACTIVATION_NAMES, view, [batch, len, d_inner])?;
        }
        for (name, view) in [("d", &self.d), ("delta_bias", &self.delta_bias)] {
            if let Some(view) = view {
                view.check(name, "(d_inner)", [d_inner])?;
            }
        }
        let sequences = Sequences::check(batch, len, self.cu_seqlens)?;
        if let Some(view) = &self.initial_state {
            view.check("initial_state", "(sequences, d_inner, d_state)", [sequences.count(), d_inner, d_state])?;
        }
        Ok(Problem { inputs: *self, dims, sequences })
    }
}

const ACTIVATION_NAMES: &str = "(batch, length, d_inner)";

/// Inputs that have passed [`Inputs::check`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a, T: Element, M: Memory = Host> {
    pub inputs: Inputs<'a, T, M>,
    pub dims: Dims,
    pub sequences: Sequences<'a>,
}

impl<T: Element, M: Memory> Problem<'_, T, M> {
    /// Whether a forward pass has nothing to write, whatever the number of channels or batch rows, which then can be more
    /// than could be counted through.
    pub fn is_nothing(&self, with_state: bool) -> bool {
        self.dims.batch * self.dims.len == 0 && !(with_state && self.sequences.count() > 0)
    }

    fn activation_shape(&self) -> [usize; 3] {
        [self.dims.batch, self.dims.len, self.dims.d_inner]
    }

    fn state_shape(&self) -> [usize; 3] {
        [self.sequences.count(), self.dims.d_inner, self.dims.d_state]
    }

    fn varying_shape(&self) -> [usize; 4] {
        [self.dims.batch, self.dims.len, self.dims.groups, self.dims.d_state]
    }

    /// Checks what a forward pass writes.
    pub fn check_outputs(&self, outputs: &OutputMut<T, M>) -> Result<()> {
        check_len("out", ACTIVATION_NAMES, &self.activation_shape(), M::len(outputs.out))?;
        if let Some(state) = &outputs.final_state {
            check_len("final_state", "(sequences, d_inner, d_state)", &self.state_shape(), M::len(state))?;
        }
        if let Some(checkpoints) = &outputs.checkpoints {
            self.check_checkpoints(M::len(checkpoints))?;
        }
        Ok(())
    }

    /// Checks what a backward pass reads beside the inputs, and what it writes.
    pub fn check_backward(
        &self,
        checkpoints: &M::Buffer<f32>,
        d_outputs: &OutputGradients<T, M>,
        gradients: &GradientsMut<T, M>,
    ) -> Result<()> {
        self.check_checkpoints(M::len(checkpoints))?;
        self.check_output_gradients(d_outputs)?;
        let (inputs, activation) = (&self.inputs, &self.activation_shape());
        let Dims { d_inner, d_state, .. } = self.dims;
        let names = ACTIVATION_NAMES;
        check_len("gradients.u", names, activation, M::len(gradients.u))?;
        check_len("gradients.delta", names, activation, M::len(gradients.delta))?;
        check_len("gradients.a", "(d_inner, d_state)", &[d_inner, d_state], M::len(gradients.a))?;
        self.check_projection_gradient("gradients.b", &inputs.b, &gradients.b)?;
        self.check_projection_gradient("gradients.c", &inputs.c, &gradients.c)?;
        let z = gradients.z.as_ref().map(|z| M::len(z));
        check_optional("gradients.z", names, inputs.z.is_some(), activation, z)?;
        let d = gradients.d.as_ref().map(|d| M::len(d));
        check_optional("gradients.d", "(d_inner)", inputs.d.is_some(), &[d_inner], d)?;
        let bias = gradients.delta_bias.as_ref().map(|bias| M::len(bias));
        check_optional("gradients.delta_bias", "(d_inner)", inputs.delta_bias.is_some(), &[d_inner], bias)?;
        let state = gradients.initial_state.as_ref().map(|state| M::len(state));
        let (given, names) = (inputs.initial_state.is_some(), "(sequences, d_inner, d_state)");
        check_optional("gradients.initial_state", names, given, &self.state_shape(), state)
    }

    /// Checks the gradients that flow into a backward pass.
    pub fn check_output_gradients(&self, d_outputs: &OutputGradients<T, M>) -> Result<()> {
        check_exchanged("d_out", ACTIVATION_NAMES, &d_outputs.d_out, self.activation_shape())?;
        match &d_outputs.d_final_state {
            Some(view) => view.check("d_final_state", "(sequences, d_inner, d_state)", self.state_shape()),
            None => Ok(()),
        }
    }

    fn check_checkpoints(&self, len: usize) -> Result<()> {
        let Dims { batch, len: steps, d_inner, d_state, .. } = self.dims;
        let shape = [batch * steps / CHECKPOINT_STEPS, d_state, d_inner];
        check_len("checkpoints", "(batch·length/64, d_state, d_inner)", &shape, len)
    }

    fn check_projection_gradient(
        &self,
        name: &'static str,
        input: &Projection<T, M>,
        gradient: &ProjectionMut<T, M>,
    ) -> Result<()> {
        let constant = [self.dims.d_inner, self.dims.d_state];
        match (input, gradient) {
            (Projection::Varying(_), ProjectionMut::Varying(data)) => {
                check_len(name, "(batch, length, groups, d_state)", &self.varying_shape(), M::len(data))
            }
            (Projection::Constant(_), ProjectionMut::Constant(data)) => {
                check_len(name, "(d_inner, d_state)", &constant, M::len(data))
            }
            (Projection::Varying(_), _) => Err(Error::argument(name, "Varying, as its input is", "Constant")),
            (Projection::Constant(_), _) => Err(Error::argument(name, "Constant, as its input is", "Varying")),
        }
    }
}

/// Where a forward pass writes. Every buffer is dense and is overwritten whole.
pub struct OutputMut<'a, T: Element, M: Memory = Host> {
    /// `(batch, length, d_inner)`.
    pub out: &'a mut M::Buffer<T>,
    /// The state behind the last step, `(sequences, d_inner, d_state)`.
    pub final_state: Option<&'a mut M::Buffer<f32>>,
    /// What a backward pass needs to recompute the states: [`Inputs::checkpoint_len`] elements, of which only that pass
    /// makes sense. A bare buffer does not say whose they are, and no backward pass can tell: whoever keeps it keeps it
    /// with its inputs and options. ([`Inputs::forward_with_checkpoints`] does.)
    pub checkpoints: Option<&'a mut M::Buffer<f32>>,
}

/// The gradients that flow into a backward pass.
#[derive(Debug)]
pub struct OutputGradients<'a, T: Element, M: Memory = Host> {
    /// The gradient of `out`, `(batch, length, d_inner)`.
    pub d_out: View<'a, T, 3, M>,
    /// The gradient of the final state, `(sequences, d_inner, d_state)`; zero if absent.
    pub d_final_state: Option<View<'a, f32, 3, M>>,
}

impl<T: Element, M: Memory> Clone for OutputGradients<'_, T, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element, M: Memory> Copy for OutputGradients<'_, T, M> {}

impl<'a, T: Element, M: Memory> From<View<'a, T, 3, M>> for OutputGradients<'a, T, M> {
    fn from(d_out: View<'a, T, 3, M>) -> Self {
        Self { d_out, d_final_state: None }
    }
}

/// Where a backward pass writes the gradient of each input: a dense buffer of the input's shape, overwritten whole.
/// Exactly the inputs that were given must have one.
#[allow(missing_docs, reason = "each field is the gradient of the input of that name")]
pub struct GradientsMut<'a, T: Element, M: Memory = Host> {
    pub u: &'a mut M::Buffer<T>,
    pub delta: &'a mut M::Buffer<T>,
    pub a: &'a mut M::Buffer<f32>,
    pub b: ProjectionMut<'a, T, M>,
    pub c: ProjectionMut<'a, T, M>,
    pub z: Option<&'a mut M::Buffer<T>>,
    pub d: Option<&'a mut M::Buffer<f32>>,
    pub delta_bias: Option<&'a mut M::Buffer<f32>>,
    pub initial_state: Option<&'a mut M::Buffer<f32>>,
}

/// Where the gradient of a [`Projection`] goes.
pub enum ProjectionMut<'a, T: Element, M: Memory = Host> {
    /// `(batch, length, groups, d_state)`.
    Varying(&'a mut M::Buffer<T>),
    /// `(d_inner, d_state)`.
    Constant(&'a mut M::Buffer<f32>),
}

/// The results of a forward pass: activations of type `T`, states of type `P`.
#[derive(Debug, Clone, PartialEq)]
pub struct Output<T, P = f32> {
    /// `(batch, length, d_inner)`.
    pub out: Vec<T>,
    /// The state behind the last step, `(sequences, d_inner, d_state)`.
    pub final_state: Vec<P>,
}

/// The gradient of every input that was given, dense and of the input's shape.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "each field is the gradient of the input of that name")]
pub struct Gradients<T, P = f32> {
    pub u: Vec<T>,
    pub delta: Vec<T>,
    pub a: Vec<P>,
    pub b: ProjectionGradient<T, P>,
    pub c: ProjectionGradient<T, P>,
    pub z: Option<Vec<T>>,
    pub d: Option<Vec<P>>,
    pub delta_bias: Option<Vec<P>>,
    pub initial_state: Option<Vec<P>>,
}

/// The gradient of a [`Projection`].
#[derive(Debug, Clone, PartialEq)]
pub enum ProjectionGradient<T, P = f32> {
    /// `(batch, length, groups, d_state)`.
    Varying(Vec<T>),
    /// `(d_inner, d_state)`.
    Constant(Vec<P>),
}

impl<T: Pod, P: Pod> ProjectionGradient<T, P> {
    fn zeroed_for<X: Element>(name: &'static str, input: &Projection<X>, problem: &Problem<X>) -> Result<Self> {
        Ok(match input {
            Projection::Varying(_) => Self::Varying(zeroed(name, &problem.varying_shape())?),
            Projection::Constant(view) => Self::Constant(zeroed(name, &view.shape)?),
        })
    }
}

impl<T: Element> ProjectionGradient<T> {
    /// The buffers, to be written.
    pub fn as_mut(&mut self) -> ProjectionMut<'_, T> {
        match self {
            Self::Varying(data) => ProjectionMut::Varying(data.as_mut_slice()),
            Self::Constant(data) => ProjectionMut::Constant(data.as_mut_slice()),
        }
    }
}

impl<T: Pod, P: Pod> Gradients<T, P> {
    fn zeroed_for<X: Element>(problem: &Problem<X>) -> Result<Self> {
        let inputs = &problem.inputs;
        let (activation, d_inner) = (problem.activation_shape(), problem.dims.d_inner);
        Ok(Self {
            u: zeroed("u", &activation)?,
            delta: zeroed("delta", &activation)?,
            a: zeroed("a", &inputs.a.shape)?,
            b: ProjectionGradient::zeroed_for("b", &inputs.b, problem)?,
            c: ProjectionGradient::zeroed_for("c", &inputs.c, problem)?,
            z: inputs.z.map(|_| zeroed("z", &activation)).transpose()?,
            d: inputs.d.map(|_| zeroed("d", &[d_inner])).transpose()?,
            delta_bias: inputs.delta_bias.map(|_| zeroed("delta_bias", &[d_inner])).transpose()?,
            initial_state: inputs.initial_state.map(|_| zeroed("initial_state", &problem.state_shape())).transpose()?,
        })
    }
}

impl<T: Element> Gradients<T> {
    /// Zeros for every input that is given.
    ///
    /// # Errors
    /// Inputs that do not fit each other, and one whose gradient does not fit in memory.
    pub fn zeroed(inputs: &Inputs<T>) -> Result<Self> {
        Self::zeroed_for(&inputs.check()?)
    }

    /// The buffers, to be written.
    pub fn as_mut(&mut self) -> GradientsMut<'_, T> {
        GradientsMut {
            u: &mut self.u,
            delta: &mut self.delta,
            a: &mut self.a,
            b: self.b.as_mut(),
            c: self.c.as_mut(),
            z: self.z.as_deref_mut(),
            d: self.d.as_deref_mut(),
            delta_bias: self.delta_bias.as_deref_mut(),
            initial_state: self.initial_state.as_deref_mut(),
        }
    }
}

impl<T: Pod, P: Pod> Output<T, P> {
    fn zeroed_for<X: Element>(problem: &Problem<X>) -> Result<Self> {
        Ok(Self {
            out: zeroed("u", &problem.activation_shape())?,
            final_state: zeroed("initial_state", &problem.state_shape())?,
        })
    }
}

impl<T: Element> Inputs<'_, T> {
    /// Runs the scan on the CPU. Keeps nothing for a backward pass.
    pub fn forward(&self) -> Result<Output<T>> {
        self.run(None)
    }

    /// Runs the scan on the CPU and also returns the checkpoints that [`Inputs::backward`] needs.
    pub fn forward_with_checkpoints(&self) -> Result<(Output<T>, Checkpoints)> {
        let mut states = zeroed("u", &[self.checkpoint_len()?])?;
        let output = self.run(Some(&mut states))?;
        Ok((output, Checkpoints::new(states, &self.check()?)))
    }

    fn run(&self, checkpoints: Option<&mut [f32]>) -> Result<Output<T>> {
        let mut output = Output::zeroed_for(&self.check()?)?;
        let (out, final_state) = (&mut output.out[..], Some(&mut output.final_state[..]));
        cpu::forward(self, OutputMut { out, final_state, checkpoints })?;
        Ok(output)
    }

    /// The gradient of every input that was given, on the CPU. `checkpoints` are those of a forward pass over the same
    /// inputs with the same options.
    ///
    /// # Errors
    /// An argument that does not fit, and checkpoints of other inputs or options: see [`Checkpoints`] for what is compared.
    pub fn backward<'a>(
        &self,
        checkpoints: &Checkpoints,
        d_outputs: impl Into<OutputGradients<'a, T>>,
    ) -> Result<Gradients<T>> {
        checkpoints.check(&self.check()?)?;
        let mut gradients = Gradients::zeroed(self)?;
        cpu::backward(self, &checkpoints.states, d_outputs.into(), gradients.as_mut())?;
        Ok(gradients)
    }
}
