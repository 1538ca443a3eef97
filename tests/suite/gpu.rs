//! The suite's problems on a GPU, or on a simulated one: whatever the CUDA driver's library that is found leads to.

use std::any::Any;
use std::sync::{Arc, OnceLock};

use cudarc::driver::{CudaSlice, CudaStream};
use half::{bf16, f16};
use selective_scan::cuda::{self, Cuda};
use selective_scan::scan::cuda::{Lanes, Plan};
use selective_scan::scan::{self, Gradients, Inputs, OutputGradients, OutputMut};
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

/// Forward with checkpoints on the device.
pub fn scan<T: Element>(
    plan: Plan,
    inputs: &Inputs<T>,
    to: OutputMut<T>,
    _d_outputs: OutputGradients<T>,
    _gradients: &mut Gradients<T>,
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
}

fn check<T: Element>(plan: Plan, shape: Shape, flags: Flags) {
    let (mut rng, seed) = seeded();
    let case = Case::<T>::new(&mut rng, shape, flags);
    let what = || format!("SEED={seed} {:?} {plan:?} {shape:?} {flags:?}", T::DTYPE);
    let mut ours = case.run(Device::Cuda(plan));
    let mut reference = case.reference();
    ours.0.truncate(2);
    reference.0.truncate(2);
    ours.assert_close(&reference, T::DTYPE, &what);
}

fn plans() -> [Plan; 4] {
    let (one, four) = (Some(Lanes::One), Some(Lanes::Four));
    [
        Plan { segment_steps: Some(usize::MAX), lanes: one },
        Plan { segment_steps: Some(usize::MAX), lanes: four },
        Plan { segment_steps: Some(64), lanes: one },
        Plan { segment_steps: Some(128), lanes: four },
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
