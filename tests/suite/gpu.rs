//! The suite's problems on a GPU, or on a simulated one: whatever the CUDA driver's library that is found leads to.

use std::any::Any;
use std::sync::{Arc, OnceLock};

use cudarc::driver::{CudaSlice, CudaStream};
use half::{bf16, f16};
use selective_scan::cuda::{self, Cuda};
use selective_scan::scan::cuda::{PerLane, Plan};
use selective_scan::scan::{
    self, Gradients, GradientsMut, Inputs, OutputGradients, OutputMut, ProjectionGradient, ProjectionMut,
};
use selective_scan::{Element, Projection, View, ViewMut, state_update};

use crate::case::{Case, Device, Flags, Shape, seeded};

/// The stream that tests work on, or nothing (said once) where there is no device.
pub fn stream() -> Option<Arc<CudaStream>> {
    static STREAM: OnceLock<Option<Arc<CudaStream>>> = OnceLock::new();
    let open = || match cuda::context(0) {
        Ok(context) => Some(context.default_stream()),
        Err(error) => {
            eprintln!("no GPU, and none simulated ({error}): the tests that need one are skipped");
            None
        }
    };
    STREAM.get_or_init(open).clone()
}

/// Device copies of host tensors, for as long as the arena lives.
pub struct Copies {
    stream: Arc<CudaStream>,
    slices: typed_arena::Arena<Box<dyn Any>>,
}

impl Copies {
    pub fn new(stream: &Arc<CudaStream>) -> Self {
        Self { stream: stream.clone(), slices: typed_arena::Arena::new() }
    }

    pub fn slice<T: Element>(&self, data: &[T]) -> &mut CudaSlice<T> {
        let slice = match data.len() {
            0 => self.stream.null(),
            _ => self.stream.clone_htod(data),
        };
        let kept = self.slices.alloc(Box::new(slice.expect("the device has room")));
        kept.downcast_mut().expect("it is what was put there")
    }

    pub fn view<T: Element, const R: usize>(&self, view: &View<T, R>) -> View<'_, T, R, Cuda> {
        let View { data, offset, shape, strides } = *view;
        View { data: self.slice(data), offset, shape, strides }
    }

    pub fn projection<T: Element>(&self, projection: &Projection<T>) -> Projection<'_, T, Cuda> {
        match projection {
            Projection::Varying(view) => Projection::Varying(self.view(view)),
            Projection::Constant(view) => Projection::Constant(self.view(view)),
        }
    }

    /// Copies back what a kernel has written.
    pub fn download<T: Element>(&self, from: &CudaSlice<T>, to: &mut [T]) {
        assert_eq!(from.len(), to.len());
        if !to.is_empty() {
            self.stream.memcpy_dtoh(from, to).expect("the kernels that wrote it succeeded");
        }
    }

    /// A buffer of `len` elements that hold something else than what is going to be written.
    pub fn poisoned<T: Element>(&self, len: usize) -> &mut CudaSlice<T> {
        self.slice(&vec![T::from_f32(f32::NAN); len])
    }
}

/// A rollback on the device.
pub fn rollback<St: Element>(
    state: ViewMut<St, 3>,
    token_states: View<St, 4>,
    slots: Option<&[i32]>,
    accepted: &[usize],
) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let ViewMut { data, offset, shape, strides } = state;
    let pool = copies.slice(data);
    let state = ViewMut { data: &mut *pool, offset, shape, strides };
    let token_states = copies.view(&token_states);
    state_update::cuda::rollback(&stream, state, token_states, slots, accepted).expect("the case is valid");
    copies.download(pool, data);
}

/// Forward with checkpoints, then backward, on the device.
pub fn scan<T: Element>(
    plan: Plan,
    inputs: &Inputs<T>,
    to: OutputMut<T>,
    d_outputs: OutputGradients<T>,
    gradients: &mut Gradients<T>,
) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let on_device = Inputs {
        u: copies.view(&inputs.u),
        delta: copies.view(&inputs.delta),
        a: copies.view(&inputs.a),
        b: copies.projection(&inputs.b),
        c: copies.projection(&inputs.c),
        z: inputs.z.as_ref().map(|view| copies.view(view)),
        d: inputs.d.as_ref().map(|view| copies.view(view)),
        delta_bias: inputs.delta_bias.as_ref().map(|view| copies.view(view)),
        initial_state: inputs.initial_state.as_ref().map(|view| copies.view(view)),
        cu_seqlens: inputs.cu_seqlens,
        options: inputs.options,
    };
    let out = copies.poisoned(to.out.len());
    let mut final_state = to.final_state.as_ref().map(|state| copies.poisoned(state.len()));
    let mut checkpoints = to.checkpoints.as_ref().map(|states| copies.poisoned(states.len()));
    let outputs =
        OutputMut { out: &mut *out, final_state: final_state.as_deref_mut(), checkpoints: checkpoints.as_deref_mut() };
    scan::cuda::forward_with(plan, &stream, &on_device, outputs).expect("the case is valid");
    copies.download(out, to.out);
    if let (Some(from), Some(to)) = (final_state, to.final_state) {
        copies.download(from, to);
    }
    let Some(checkpoints) = checkpoints else { return };

    let d_outputs = OutputGradients {
        d_out: copies.view(&d_outputs.d_out),
        d_final_state: d_outputs.d_final_state.as_ref().map(|view| copies.view(view)),
    };
    let mut on_device_gradients = OnDevice::like(&copies, gradients);
    scan::cuda::backward_with(plan, &stream, &on_device, checkpoints, d_outputs, on_device_gradients.as_mut())
        .expect("the case is valid");
    on_device_gradients.download(&copies, gradients);
}

/// Gradients on the device.
struct OnDevice<'c, T: Element> {
    u: &'c mut CudaSlice<T>,
    delta: &'c mut CudaSlice<T>,
    a: &'c mut CudaSlice<f32>,
    b: ProjectionMut<'c, T, Cuda>,
    c: ProjectionMut<'c, T, Cuda>,
    z: Option<&'c mut CudaSlice<T>>,
    d: Option<&'c mut CudaSlice<f32>>,
    delta_bias: Option<&'c mut CudaSlice<f32>>,
    initial_state: Option<&'c mut CudaSlice<f32>>,
}

impl<'c, T: Element> OnDevice<'c, T> {
    fn like(copies: &'c Copies, gradients: &Gradients<T>) -> Self {
        let projection = |gradient: &ProjectionGradient<T>| match gradient {
            ProjectionGradient::Varying(data) => ProjectionMut::Varying(copies.poisoned(data.len())),
            ProjectionGradient::Constant(data) => ProjectionMut::Constant(copies.poisoned(data.len())),
        };
        let parameter = |data: &Option<Vec<f32>>| data.as_ref().map(|data| copies.poisoned(data.len()));
        Self {
            u: copies.poisoned(gradients.u.len()),
            delta: copies.poisoned(gradients.delta.len()),
            a: copies.poisoned(gradients.a.len()),
            b: projection(&gradients.b),
            c: projection(&gradients.c),
            z: gradients.z.as_ref().map(|data| copies.poisoned(data.len())),
            d: parameter(&gradients.d),
            delta_bias: parameter(&gradients.delta_bias),
            initial_state: parameter(&gradients.initial_state),
        }
    }

    fn as_mut(&mut self) -> GradientsMut<'_, T, Cuda> {
        fn projection<'p, T: Element>(gradient: &'p mut ProjectionMut<'_, T, Cuda>) -> ProjectionMut<'p, T, Cuda> {
            match gradient {
                ProjectionMut::Varying(data) => ProjectionMut::Varying(&mut **data),
                ProjectionMut::Constant(data) => ProjectionMut::Constant(&mut **data),
            }
        }
        GradientsMut {
            u: self.u,
            delta: self.delta,
            a: self.a,
            b: projection(&mut self.b),
            c: projection(&mut self.c),
            z: self.z.as_deref_mut(),
            d: self.d.as_deref_mut(),
            delta_bias: self.delta_bias.as_deref_mut(),
            initial_state: self.initial_state.as_deref_mut(),
        }
    }

    fn download(&self, copies: &Copies, to: &mut Gradients<T>) {
        copies.download(self.u, &mut to.u);
        copies.download(self.delta, &mut to.delta);
        copies.download(self.a, &mut to.a);
        for (from, to) in [(&self.b, &mut to.b), (&self.c, &mut to.c)] {
            match (from, to) {
                (ProjectionMut::Varying(from), ProjectionGradient::Varying(to)) => copies.download(from, to),
                (ProjectionMut::Constant(from), ProjectionGradient::Constant(to)) => copies.download(from, to),
                _ => unreachable!("the device's gradients were made like the host's"),
            }
        }
        if let (Some(from), Some(to)) = (&self.z, &mut to.z) {
            copies.download(from, to);
        }
        let parameters = [
            (&self.d, &mut to.d),
            (&self.delta_bias, &mut to.delta_bias),
            (&self.initial_state, &mut to.initial_state),
        ];
        for (from, to) in parameters {
            if let (Some(from), Some(to)) = (from, to) {
                copies.download(from, to);
            }
        }
    }
}

fn check<T: Element>(plan: Plan, shape: Shape, flags: Flags) {
    let (mut rng, seed) = seeded();
    let case = Case::<T>::new(&mut rng, shape, flags);
    let what = || format!("SEED={seed} {:?} {plan:?} {shape:?} {flags:?}", T::DTYPE);
    case.check(Device::Cuda(plan), &what);
}

fn plans() -> [Plan; 5] {
    let (one, two, four) = (Some(PerLane::One), Some(PerLane::Two), Some(PerLane::Four));
    [
        Plan { segment_steps: Some(usize::MAX), per_lane: one },
        Plan { segment_steps: Some(usize::MAX), per_lane: four },
        Plan { segment_steps: Some(64), per_lane: one },
        Plan { segment_steps: Some(64), per_lane: two },
        Plan { segment_steps: Some(128), per_lane: four },
    ]
}

fn forward_flags<T: Element>() {
    if stream().is_none() {
        return;
    }
    for plan in plans() {
        for row in 0..16 {
            for (len, d_state, d_inner) in [(70, 16, 42), (131, 5, 36), (150, 16, 72), (20, 40, 10)] {
                check::<T>(plan, Shape { batch: 2, len, d_inner, d_state }, Flags::pairwise(row));
            }
            check::<T>(
                plan,
                Shape { batch: 2, len: 150, d_inner: 96, d_state: 16 },
                Flags {
                    hold: false,
                    constant_b: false,
                    constant_c: false,
                    time_contiguous: false,
                    column_slice: false,
                    ..Flags::pairwise(row)
                },
            );
        }
    }
}

#[test]
fn forward_f32() {
    forward_flags::<f32>();
}
#[test]
fn forward_f16() {
    forward_flags::<f16>();
}
#[test]
fn forward_bf16() {
    forward_flags::<bf16>();
}
