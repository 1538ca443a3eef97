//! Random scans, and what they are held to.

use rand::Rng;
use rand::rngs::StdRng;
use selective_scan::scan::{self, CheckpointSteps, Inputs, Options, OutputGradients, OutputMut, ProjectionGradient};
use selective_scan::{DType, Discretization, Element, Projection, View};

use crate::support::device::Device;
use crate::support::draw::normal;
use crate::support::strided::{Layout, Strided};
use crate::support::tolerance::error;

/// What a scan has beside the inputs that every scan has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flags {
    pub softplus: bool,
    pub z: bool,
    pub d: bool,
    pub delta_bias: bool,
    pub initial_state: bool,
    pub d_final_state: bool,
    pub reverse: bool,
    pub hold: bool,
    pub constant_b: bool,
    pub constant_c: bool,
    pub grouped: bool,
    pub packed: bool,
    pub time_contiguous: bool,
    pub column_slice: bool,
}

impl Flags {
    /// Row `row` of 16 in which every two flags meet in all four combinations: the orthogonal array of strength 2
    /// whose column `k` is the parity of the bits that `row` and `k` share.
    pub fn pairwise(row: usize) -> Self {
        let mut column = 0usize;
        Self::each(|| {
            column += 1;
            (row & column).count_ones() % 2 == 1
        })
    }

    /// Flag `i` is bit `i`.
    pub fn from_bits(mut bits: u16) -> Self {
        Self::each(|| {
            bits = bits.rotate_right(1);
            bits >> 15 == 1
        })
    }

    fn each(mut next: impl FnMut() -> bool) -> Self {
        Self {
            softplus: next(),
            z: next(),
            d: next(),
            delta_bias: next(),
            initial_state: next(),
            d_final_state: next(),
            reverse: next(),
            hold: next(),
            constant_b: next(),
            constant_c: next(),
            grouped: next(),
            packed: next(),
            time_contiguous: next(),
            column_slice: next(),
        }
    }

    /// What Mamba uses.
    pub fn mamba() -> Self {
        Self { softplus: true, z: true, d: true, delta_bias: true, ..Self::default() }
    }
}

/// The sizes of a problem.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub batch: usize,
    pub len: usize,
    pub d_inner: usize,
    pub d_state: usize,
}

/// A random problem with the gradients that flow into it. All tensors are there, whichever `flags` ask for.
#[derive(Debug, Clone)]
pub struct Case<T> {
    pub shape: Shape,
    pub flags: Flags,
    pub groups: usize,
    pub u: Strided<T>,
    pub delta: Strided<T>,
    pub z: Strided<T>,
    pub a: Vec<f32>,
    /// `(batch, len, groups, d_state)`
    pub b: Vec<T>,
    pub c: Vec<T>,
    /// `(d_inner, d_state)`
    pub constant_b: Vec<f32>,
    pub constant_c: Vec<f32>,
    pub d: Vec<f32>,
    pub delta_bias: Vec<f32>,
    pub initial_state: Vec<f32>,
    pub cu_seqlens: Vec<usize>,
    pub d_out: Strided<T>,
    pub d_final_state: Vec<f32>,
    pub checkpoint_steps: CheckpointSteps,
}

impl<T: Element> Case<T> {
    pub fn new(rng: &mut StdRng, mut shape: Shape, flags: Flags) -> Self {
        let mut cu_seqlens = vec![0];
        if flags.packed {
            // The same number of steps in a single row, cut at random; a cut may fall on another.
            shape = Shape { batch: 1, len: shape.batch * shape.len, ..shape };
            cu_seqlens.extend((0..3).map(|_| rng.random_range(0..=shape.len)));
            cu_seqlens.push(shape.len);
            cu_seqlens.sort();
        }
        let Shape { batch, len, d_inner, d_state } = shape;
        let groups = match d_inner {
            d if flags.grouped && d % 3 == 0 => 3,
            d if flags.grouped && d % 2 == 0 => 2,
            _ => 1,
        };
        let sequences = if flags.packed { cu_seqlens.len() - 1 } else { batch };
        let (states, projected) = (sequences * d_inner * d_state, batch * len * groups * d_state);
        let activation = [batch, len, d_inner];
        let layout = Layout { time_contiguous: flags.time_contiguous, column_slice: flags.column_slice };
        // Step sizes from 0.003 to 0.7 after softplus, or as they are.
        let (low, high) = if flags.softplus { (-6.0, 0.0) } else { (0.001, 0.7) };
        Self {
            shape,
            flags,
            groups,
            cu_seqlens,
            u: Strided::new(activation, layout, || normal(rng)),
            delta: Strided::new(activation, layout, || rng.random_range(low..high)),
            z: Strided::new(activation, layout, || normal(rng)),
            // Mamba's -1, -2, …, scattered.
            a: (0..d_inner * d_state).map(|i| -((i % d_state + 1) as f32) * rng.random_range(0.7..1.4)).collect(),
            b: (0..projected).map(|_| T::from_f32(normal(rng))).collect(),
            c: (0..projected).map(|_| T::from_f32(normal(rng))).collect(),
            constant_b: (0..d_inner * d_state).map(|_| normal(rng)).collect(),
            constant_c: (0..d_inner * d_state).map(|_| normal(rng)).collect(),
            d: (0..d_inner).map(|_| normal(rng)).collect(),
            // A negative step size would let states grow beyond all bounds.
            delta_bias: (0..d_inner).map(|_| rng.random_range(0.0..0.1)).collect(),
            initial_state: (0..states).map(|_| normal(rng)).collect(),
            d_out: Strided::new(activation, layout, || normal(rng)),
            d_final_state: (0..states).map(|_| normal(rng)).collect(),
            checkpoint_steps: [CheckpointSteps::Every16, CheckpointSteps::Every32, CheckpointSteps::Every64]
                [rng.random_range(0..3)],
        }
    }

    pub fn sequences(&self) -> usize {
        if self.flags.packed { self.cu_seqlens.len() - 1 } else { self.shape.batch }
    }

    pub fn inputs(&self) -> Inputs<'_, T> {
        let Shape { batch, len, d_inner, d_state } = self.shape;
        let flags = self.flags;
        let projection = |varying, constant, is_constant| -> Projection<'_, T> {
            if is_constant {
                View::new(constant, [d_inner, d_state]).into()
            } else {
                View::new(varying, [batch, len, self.groups, d_state]).into()
            }
        };
        let states = [self.sequences(), d_inner, d_state];
        Inputs {
            z: flags.z.then(|| self.z.view()),
            d: flags.d.then(|| View::new(&self.d, [d_inner])),
            delta_bias: flags.delta_bias.then(|| View::new(&self.delta_bias, [d_inner])),
            initial_state: flags.initial_state.then(|| View::new(&self.initial_state, states)),
            cu_seqlens: flags.packed.then_some(&self.cu_seqlens[..]),
            options: Options {
                delta_softplus: flags.softplus,
                discretization: if flags.hold { Discretization::ZeroOrderHold } else { Discretization::Euler },
                reverse: flags.reverse,
                checkpoint_steps: self.checkpoint_steps,
            },
            ..Inputs::new(
                self.u.view(),
                self.delta.view(),
                View::new(&self.a, [d_inner, d_state]),
                projection(&self.b, &self.constant_b, flags.constant_b),
                projection(&self.c, &self.constant_c, flags.constant_c),
            )
        }
    }

    pub fn d_outputs(&self) -> OutputGradients<'_, T> {
        let states = [self.sequences(), self.shape.d_inner, self.shape.d_state];
        let d_final_state = self.flags.d_final_state.then(|| View::new(&self.d_final_state, states));
        OutputGradients { d_out: self.d_out.view(), d_final_state }
    }

    /// The results by the float64 reference.
    pub fn reference(&self) -> Results {
        let output = scan::reference::forward(&self.inputs()).expect("the case is valid");
        let gradients = scan::reference::backward(&self.inputs(), self.d_outputs()).expect("the case is valid");
        Results::new(output, gradients, |x| x, |x| x)
    }

    /// The same problem run by a fast path.
    pub fn run(&self, device: Device) -> Results {
        let (output, gradients) = self.run_both(device);
        Results::new(output, gradients, |x: T| f64::from(x.to_f32()), f64::from)
    }

    /// Forward with checkpoints, then backward.
    pub fn run_both(&self, device: Device) -> (scan::Output<T>, scan::Gradients<T>) {
        let (inputs, Shape { batch, len, d_inner, d_state }) = (self.inputs(), self.shape);
        let mut output = scan::Output {
            out: vec![T::from_f32(f32::NAN); batch * len * d_inner],
            final_state: vec![f32::NAN; self.sequences() * d_inner * d_state],
        };
        let mut checkpoints = vec![f32::NAN; inputs.checkpoint_len().expect("the case is valid")];
        let mut gradients = scan::Gradients::zeroed(&inputs).expect("the case is valid");
        let to = OutputMut {
            out: &mut output.out[..],
            final_state: Some(&mut output.final_state[..]),
            checkpoints: Some(&mut checkpoints[..]),
        };
        match device {
            Device::Cpu(isa) => {
                scan::cpu::forward_with(isa, &inputs, to).expect("the case is valid");
                scan::cpu::backward_with(isa, &inputs, &checkpoints, self.d_outputs(), gradients.as_mut())
                    .expect("the case is valid");
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(plan) => super::gpu::both_passes(plan, &inputs, to, self.d_outputs(), &mut gradients),
        }
        (output, gradients)
    }

    /// Holds a fast path to the reference.
    pub fn check(&self, device: Device, what: &dyn Fn() -> String) {
        self.run(device).assert_close(&self.reference(), T::DTYPE, what);
    }
}

impl Case<f32> {
    /// The element of the input that the `i`-th element of the named gradient belongs to.
    pub fn element(&mut self, gradient: &str, i: usize) -> &mut f32 {
        let Shape { len, d_inner: d, .. } = self.shape;
        let index = [i / d / len.max(1), i / d % len.max(1), i % d];
        let values = match gradient {
            "d_u" => return self.u.at_mut(index),
            "d_delta" => return self.delta.at_mut(index),
            "d_z" => return self.z.at_mut(index),
            "d_a" => &mut self.a,
            "d_b" if self.flags.constant_b => &mut self.constant_b,
            "d_b" => &mut self.b,
            "d_c" if self.flags.constant_c => &mut self.constant_c,
            "d_c" => &mut self.c,
            "d_d" => &mut self.d,
            "d_delta_bias" => &mut self.delta_bias,
            "d_initial_state" => &mut self.initial_state,
            other => panic!("no gradient {other}"),
        };
        &mut values[i]
    }

    /// Applies `change` to every input.
    pub fn for_each(&mut self, change: impl Fn(&mut f32)) {
        let activations = [&mut self.u, &mut self.delta, &mut self.z].map(|activation| &mut activation.data);
        let parameters = [
            &mut self.a,
            &mut self.b,
            &mut self.c,
            &mut self.constant_b,
            &mut self.constant_c,
            &mut self.d,
            &mut self.delta_bias,
            &mut self.initial_state,
        ];
        activations.into_iter().chain(parameters).flatten().for_each(change);
    }
}

/// One tensor of the results.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub name: &'static str,
    pub values: Vec<f64>,
    /// Whether the fast path stores it in the type of the activations.
    pub is_activation: bool,
    pub is_gradient: bool,
}

/// All that a forward and a backward pass give.
#[derive(Debug, Clone, PartialEq)]
pub struct Results(pub Vec<Tensor>);

impl Results {
    fn new<T: Copy, P: Copy>(
        output: scan::Output<T, P>,
        gradients: scan::Gradients<T, P>,
        activation: impl Fn(T) -> f64,
        parameter: impl Fn(P) -> f64,
    ) -> Self {
        let mut tensors = Vec::new();
        let mut push = |name: &'static str, activations: Option<&[T]>, parameters: Option<&[P]>| {
            let values: Vec<f64> = match (activations, parameters) {
                (Some(values), _) => values.iter().map(|&x| activation(x)).collect(),
                (_, Some(values)) => values.iter().map(|&x| parameter(x)).collect(),
                _ => return,
            };
            let (is_activation, is_gradient) = (activations.is_some(), name.starts_with("d_"));
            tensors.push(Tensor { name, values, is_activation, is_gradient });
        };
        push("out", Some(&output.out), None);
        push("final_state", None, Some(&output.final_state));
        push("d_u", Some(&gradients.u), None);
        push("d_delta", Some(&gradients.delta), None);
        push("d_z", gradients.z.as_deref(), None);
        push("d_a", None, Some(&gradients.a));
        for (name, gradient) in [("d_b", &gradients.b), ("d_c", &gradients.c)] {
            match gradient {
                ProjectionGradient::Varying(values) => push(name, Some(values), None),
                ProjectionGradient::Constant(values) => push(name, None, Some(values)),
            }
        }
        push("d_d", None, gradients.d.as_deref());
        push("d_delta_bias", None, gradients.delta_bias.as_deref());
        push("d_initial_state", None, gradients.initial_state.as_deref());
        Self(tensors)
    }

    pub fn get(&self, name: &str) -> &[f64] {
        &self.0.iter().find(|tensor| tensor.name == name).expect("a result of this name").values
    }

    /// Checks every tensor against the reference.
    ///
    /// In f32 the error may be 1e-5 of the result's norm, and 1e-4 in gradients: a hundred roundings of 6e-8, and a
    /// thousand where sums run over channels and steps. A narrower type may add twice what rounding the exact result to
    /// it costs: once is unavoidable, and the f32 error can move a value to the next.
    pub fn assert_close(&self, reference: &Self, dtype: DType, what: &dyn Fn() -> String) {
        assert_eq!(self.0.len(), reference.0.len());
        for (ours, exact) in self.0.iter().zip(&reference.0) {
            // Below the range of normal numbers f32 has fewer digits and then none.
            let normal = |x: &f64| if x.abs() < f64::from(f32::MIN_POSITIVE) { 0.0 } else { *x };
            let ours = Tensor { values: ours.values.iter().map(normal).collect(), ..ours.clone() };
            let exact = Tensor { values: exact.values.iter().map(normal).collect(), ..exact.clone() };
            let rounded: Vec<f64> = match dtype {
                DType::F16 if ours.is_activation => round(&exact.values, half::f16::from_f64),
                DType::Bf16 if ours.is_activation => round(&exact.values, half::bf16::from_f64),
                _ => exact.values.clone(),
            };
            let bound = if ours.is_gradient { 1e-4 } else { 1e-5 } + 2.0 * error(&rounded, &exact.values);
            let error = error(&ours.values, &exact.values);
            assert!(error <= bound, "{}: error {error:.2e} above {bound:.2e}; {}", ours.name, what());
        }
    }
}

fn round<H: Into<f64>>(values: &[f64], narrow: impl Fn(f64) -> H) -> Vec<f64> {
    values.iter().map(|&x| narrow(x).into()).collect()
}
