//! What a problem runs on.

use selective_scan::complex_scan::{
    Gradients, GradientsMut, Inputs, Output, OutputGradients, OutputMut, UpdateInputs, UpdateMut, UpdateOutput, cpu,
};
use selective_scan::{Element, Isa, ViewMut};

#[derive(Debug, Clone, Copy)]
pub enum On {
    Processor(Isa),
    #[cfg(feature = "cuda")]
    Gpu,
}

impl On {
    pub fn best() -> Self {
        Self::Processor(Isa::best())
    }

    pub fn run_forward<T: Element>(self, inputs: &Inputs<T>, to: OutputMut<T>) {
        match self {
            Self::Processor(isa) => cpu::forward_with(isa, inputs, to).unwrap(),
            #[cfg(feature = "cuda")]
            Self::Gpu => super::gpu::forward(inputs, to),
        }
    }

    pub fn run_backward<T: Element>(self, inputs: &Inputs<T>, d_outputs: OutputGradients<T>, to: GradientsMut<T>) {
        match self {
            Self::Processor(isa) => cpu::backward_with(isa, inputs, d_outputs, to).unwrap(),
            #[cfg(feature = "cuda")]
            Self::Gpu => super::gpu::backward(inputs, d_outputs, to),
        }
    }

    pub fn run_update<T: Element, St: Element>(self, inputs: &UpdateInputs<T>, to: UpdateMut<T, St>) {
        match self {
            Self::Processor(_) => cpu::update(inputs, to).unwrap(),
            #[cfg(feature = "cuda")]
            Self::Gpu => super::gpu::update(inputs, to),
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
        let mut token_states = vec![St::from_f32(f32::NAN); count * inputs.a.shape[1]];
        let to = UpdateMut { token_states: Some(&mut token_states[..]), ..UpdateMut::new(state, &mut out[..]) };
        self.run_update(inputs, to);
        UpdateOutput { out, token_states }
    }
}

/// The results of inputs, with the final state.
pub fn forward<T: Element>(on: On, inputs: &Inputs<T>) -> Output<T> {
    let sequences = selective_scan::count_sequences(inputs.u.shape[0], inputs.u.shape[1], inputs.cu_seqlens).unwrap();
    let mut output = Output {
        out: vec![T::from_f32(f32::NAN); inputs.u.shape.iter().product()],
        final_state: vec![f32::NAN; sequences * inputs.a.shape.iter().product::<usize>()],
    };
    let to = OutputMut { final_state: Some(&mut output.final_state[..]), ..OutputMut::new(&mut output.out[..]) };
    on.run_forward(inputs, to);
    output
}

/// The gradients of inputs, in buffers in which there is something else before.
pub fn backward<T: Element>(on: On, inputs: &Inputs<T>, d_outputs: OutputGradients<T>) -> Gradients<T> {
    let mut gradients = Gradients::zeroed(inputs).unwrap();
    for activation in [&mut gradients.u, &mut gradients.delta].into_iter().chain(&mut gradients.z) {
        activation.fill(T::from_f32(f32::NAN));
    }
    let optional = [&mut gradients.d, &mut gradients.delta_bias, &mut gradients.initial_state];
    for parameter in optional.into_iter().flatten().chain([&mut gradients.a]) {
        parameter.fill(f32::NAN);
    }
    for projection in [&mut gradients.b, &mut gradients.c] {
        match projection {
            selective_scan::ProjectionOf::Varying(values) => values.fill(T::from_f32(f32::NAN)),
            selective_scan::ProjectionOf::Constant(values) => values.fill(f32::NAN),
        }
    }
    on.run_backward(inputs, d_outputs, gradients.as_mut());
    gradients
}
