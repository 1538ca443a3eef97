//! What a problem of S4D runs on.

#[cfg(feature = "cuda")]
use selective_scan::lti::s4d::cuda::Plan;
use selective_scan::lti::s4d::{
    Gradients, GradientsMut, Inputs, Output, OutputGradients, OutputMut, UpdateInputs, UpdateMut, UpdateOutput, cpu,
};
use selective_scan::{DType, Element, Isa, ViewMut};

use super::case::Case;
use crate::support::vectors::FORWARD;

#[derive(Debug, Clone, Copy)]
pub enum On {
    Processor(Isa),
    #[cfg(feature = "cuda")]
    Gpu(Plan),
}

impl On {
    /// What states may be off by, of the size of their terms. On GPUs inputs of bf16 enter them by matrices of two parts, which leave
    /// out 2^-17 of each term, 7.6e-6; terms may be a few times as large as what is left of them.
    pub fn state_tolerance(self, inputs: DType) -> f64 {
        let is_on_processor = matches!(self, Self::Processor(_));
        if is_on_processor || inputs != DType::Bf16 { FORWARD } else { 4.0 * 2f64.powi(-17) }
    }

    pub fn best() -> Self {
        Self::Processor(Isa::best())
    }

    pub fn run_forward<T: Element>(self, inputs: &Inputs<T>, outputs: OutputMut<T>) {
        match self {
            Self::Processor(isa) => cpu::forward_with(isa, inputs, outputs).unwrap(),
            #[cfg(feature = "cuda")]
            Self::Gpu(plan) => super::gpu::forward(plan, inputs, outputs),
        }
    }

    pub fn run_backward<T: Element>(self, inputs: &Inputs<T>, d_outputs: OutputGradients<T>, to: GradientsMut<T>) {
        match self {
            Self::Processor(isa) => cpu::backward_with(isa, inputs, d_outputs, to).unwrap(),
            #[cfg(feature = "cuda")]
            Self::Gpu(plan) => super::gpu::backward(plan, inputs, d_outputs, to),
        }
    }

    pub fn run_update<T: Element, St: Element>(self, inputs: &UpdateInputs<T>, outputs: UpdateMut<T, St>) {
        match self {
            Self::Processor(isa) => cpu::update_with(isa, inputs, outputs).unwrap(),
            #[cfg(feature = "cuda")]
            Self::Gpu(_) => super::gpu::update(inputs, outputs),
        }
    }

    /// An update with the state after each token.
    pub fn update<T: Element, St: Element>(
        self,
        inputs: &UpdateInputs<T>,
        state: ViewMut<St, 3>,
    ) -> UpdateOutput<T, St> {
        let count: usize = inputs.u.shape.iter().product();
        let mut out = vec![T::from_f32(f32::NAN); count];
        let mut token_states = vec![St::from_f32(f32::NAN); count * inputs.c.shape[1]];
        let outputs = UpdateMut { token_states: Some(&mut token_states[..]), ..UpdateMut::new(state, &mut out[..]) };
        self.run_update(inputs, outputs);
        UpdateOutput { out, token_states }
    }
}

/// The results of inputs, with the final state.
pub fn outputs<T: Element>(on: On, inputs: &Inputs<T>) -> Output<T> {
    let states = selective_scan::count_sequences(inputs.u.shape[0], inputs.u.shape[1], inputs.cu_seqlens).unwrap();
    let (mut out, mut final_state) = (
        vec![T::from_f32(f32::NAN); inputs.u.shape.iter().product()],
        vec![f32::NAN; states * inputs.a.shape.iter().product::<usize>()],
    );
    let to = OutputMut { final_state: Some(&mut final_state[..]), ..OutputMut::new(&mut out[..]) };
    on.run_forward(inputs, to);
    Output { out, final_state }
}

pub fn forward<T: Element>(on: On, case: &Case<T>) -> Output<T> {
    outputs(on, &case.inputs())
}

pub fn backward<T: Element>(on: On, case: &Case<T>) -> Gradients<T> {
    let mut gradients = Gradients::zeroed(&case.inputs()).unwrap();
    gradients.u.fill(T::from_f32(f32::NAN));
    for parameter in [&mut gradients.a, &mut gradients.b, &mut gradients.c, &mut gradients.log_delta] {
        parameter.fill(f32::NAN);
    }
    on.run_backward(&case.inputs(), case.d_outputs(), gradients.as_mut());
    gradients
}
