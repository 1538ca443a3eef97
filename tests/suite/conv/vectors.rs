//! The causal convolution against PyTorch.

use selective_scan::conv::{
    Gradients, Inputs, Options, Output, OutputGradients, OutputMut, UpdateInputs, UpdateMut, cpu, reference,
};
use selective_scan::{Isa, ViewMut};

use crate::support::vectors::{Case, Comparison, FORWARD, GRADIENTS, REFERENCE, widen};

fn inputs<'a>(case: &'a Case, cu_seqlens: &'a Option<Vec<usize>>) -> Inputs<'a, f32> {
    Inputs {
        x: case.view("x"),
        weight: case.view("weight"),
        bias: case.optional("bias"),
        initial_state: case.optional("initial_state"),
        cu_seqlens: cu_seqlens.as_deref(),
        options: Options { silu: case.option("silu"), reverse: case.option("reverse") },
    }
}

fn d_outputs(case: &Case) -> OutputGradients<'_, f32> {
    OutputGradients { d_out: case.view("d_out"), d_final_state: case.optional("d_final_state") }
}

fn outputs<T: Copy + Into<f64>>(output: &Output<T, T>) -> [(&'static str, Vec<f64>); 2] {
    [("out", widen(&output.out)), ("final_state", widen(&output.final_state))]
}

fn gradients<T: Copy + Into<f64>>(gradients: &Gradients<T, T>) -> Vec<(&'static str, Vec<f64>)> {
    let mut all = vec![("grad_x", widen(&gradients.x)), ("grad_weight", widen(&gradients.weight))];
    let optional = [("grad_bias", &gradients.bias), ("grad_initial_state", &gradients.initial_state)];
    all.extend(optional.into_iter().filter_map(|(name, data)| Some((name, widen(data.as_ref()?)))));
    all
}

/// Calls `test` with every case and its inputs.
fn for_each_case(mut test: impl FnMut(&Case, Inputs<f32>)) {
    for case in Case::all("conv") {
        let cu_seqlens = case.list("cu_seqlens");
        test(&case, inputs(&case, &cu_seqlens));
    }
}

#[test]
fn reference_forward() {
    let mut comparison = Comparison::new("f64 reference, convolution forward");
    for_each_case(|case, inputs| comparison.hold(case, REFERENCE, &outputs(&reference::forward(&inputs).unwrap())));
    comparison.finish();
}

#[test]
fn reference_backward() {
    let mut comparison = Comparison::new("f64 reference, convolution backward");
    for_each_case(|case, inputs| {
        let got = reference::backward(&inputs, d_outputs(case)).unwrap();
        comparison.hold(case, REFERENCE, &gradients(&got));
    });
    comparison.finish();
}

#[test]
fn cpu_forward_with_every_isa() {
    for isa in Isa::available() {
        let mut comparison = Comparison::new(format!("{isa:?}, convolution forward"));
        for_each_case(|case, inputs| {
            let mut output = Output {
                out: vec![f32::NAN; case.results["out"].len()],
                final_state: vec![f32::NAN; case.results["final_state"].len()],
            };
            let buffers = OutputMut { out: &mut output.out[..], final_state: Some(&mut output.final_state[..]) };
            cpu::forward_with(isa, &inputs, buffers).unwrap();
            comparison.hold(case, FORWARD, &outputs(&output));
        });
        comparison.finish();
    }
}

#[test]
fn cpu_backward_with_every_isa() {
    for isa in Isa::available() {
        let mut comparison = Comparison::new(format!("{isa:?}, convolution backward"));
        for_each_case(|case, inputs| {
            let mut got = Gradients::zeroed(&inputs).unwrap();
            cpu::backward_with(isa, &inputs, d_outputs(case), got.as_mut()).unwrap();
            comparison.hold(case, GRADIENTS, &gradients(&got));
        });
        comparison.finish();
    }
}

#[test]
fn inputs_forward_and_backward() {
    let mut comparison = Comparison::new("conv::Inputs");
    for_each_case(|case, inputs| {
        comparison.hold(case, FORWARD, &outputs(&inputs.forward().unwrap()));
        comparison.hold(case, GRADIENTS, &gradients(&inputs.backward(d_outputs(case)).unwrap()));
    });
    comparison.finish();
}

/// The in-place update carries a pool on as a convolution carries its states: the vectors are the same.
#[test]
fn cpu_update_with_every_isa() {
    for isa in Isa::available() {
        let mut comparison = Comparison::new(format!("{isa:?}, convolution update"));
        let mut cases = 0;
        for_each_case(|case, inputs| {
            let Inputs { x, weight, bias, initial_state, cu_seqlens, options } = inputs;
            if initial_state.is_none() || cu_seqlens.is_some() || options.reverse {
                return;
            }
            let (shape, mut pool) = case.inputs["initial_state"].clone();
            let mut out = vec![f32::NAN; case.results["out"].len()];
            let state = ViewMut::new(&mut pool, shape.try_into().unwrap());
            let inputs = UpdateInputs { bias, silu: options.silu, ..UpdateInputs::new(x, weight) };
            cpu::update_with(isa, &inputs, UpdateMut { state, out: &mut out[..], token_states: None }).unwrap();
            comparison.hold(case, FORWARD, &[("out", widen(&out)), ("final_state", widen(&pool))]);
            cases += 1;
        });
        assert!(cases >= 5, "only {cases} of the vectors fit an update");
        comparison.finish();
    }
}
