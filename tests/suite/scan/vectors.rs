//! The selective scan against PyTorch.

use selective_scan::Isa;
use selective_scan::scan::{
    Gradients, Inputs, Options, Output, OutputGradients, OutputMut, ProjectionGradient, cpu, reference,
};

use crate::support::vectors::{Case, Comparison, FORWARD, GRADIENTS, REFERENCE, widen};

fn inputs<'a>(case: &'a Case, cu_seqlens: &'a Option<Vec<usize>>) -> Inputs<'a, f32> {
    Inputs {
        u: case.view("u"),
        delta: case.view("delta"),
        a: case.view("a"),
        b: case.projection("b"),
        c: case.projection("c"),
        z: case.optional("z"),
        d: case.optional("d"),
        delta_bias: case.optional("delta_bias"),
        initial_state: case.optional("initial_state"),
        cu_seqlens: cu_seqlens.as_deref(),
        options: Options {
            delta_softplus: case.option("delta_softplus"),
            discretization: case.discretization(),
            reverse: case.option("reverse"),
            ..Options::default()
        },
    }
}

fn d_outputs(case: &Case) -> OutputGradients<'_, f32> {
    OutputGradients { d_out: case.view("d_out"), d_final_state: case.optional("d_final_state") }
}

fn outputs<T: Copy + Into<f64>>(output: &Output<T, T>) -> [(&'static str, Vec<f64>); 2] {
    [("out", widen(&output.out)), ("final_state", widen(&output.final_state))]
}

fn gradients<T: Copy + Into<f64>>(gradients: &Gradients<T, T>) -> Vec<(&'static str, Vec<f64>)> {
    let projection = |gradient: &ProjectionGradient<T, T>| match gradient {
        ProjectionGradient::Varying(data) | ProjectionGradient::Constant(data) => widen(data),
    };
    let mut all = vec![
        ("grad_u", widen(&gradients.u)),
        ("grad_delta", widen(&gradients.delta)),
        ("grad_a", widen(&gradients.a)),
        ("grad_b", projection(&gradients.b)),
        ("grad_c", projection(&gradients.c)),
    ];
    let optional = [
        ("grad_z", &gradients.z),
        ("grad_d", &gradients.d),
        ("grad_delta_bias", &gradients.delta_bias),
        ("grad_initial_state", &gradients.initial_state),
    ];
    all.extend(optional.into_iter().filter_map(|(name, data)| Some((name, widen(data.as_ref()?)))));
    all
}

/// Calls `test` with every case and its inputs.
fn for_each_case(mut test: impl FnMut(&Case, Inputs<f32>)) {
    for case in Case::all("scan") {
        let cu_seqlens = case.list("cu_seqlens");
        test(&case, inputs(&case, &cu_seqlens));
    }
}

#[test]
fn reference_forward() {
    let mut comparison = Comparison::new("f64 reference, forward");
    for_each_case(|case, inputs| comparison.hold(case, REFERENCE, &outputs(&reference::forward(&inputs).unwrap())));
    comparison.finish();
}

#[test]
fn reference_backward() {
    let mut comparison = Comparison::new("f64 reference, backward");
    for_each_case(|case, inputs| {
        let got = reference::backward(&inputs, d_outputs(case)).unwrap();
        comparison.hold(case, REFERENCE, &gradients(&got));
    });
    comparison.finish();
}

/// The outputs and checkpoints of a forward pass with one instruction set.
fn forward_with(isa: Isa, inputs: &Inputs<f32>, states: usize) -> (Output<f32>, Vec<f32>) {
    let mut output =
        Output { out: vec![f32::NAN; inputs.u.shape.iter().product()], final_state: vec![f32::NAN; states] };
    let mut checkpoints = vec![f32::NAN; inputs.checkpoint_len().unwrap()];
    let buffers = OutputMut {
        out: &mut output.out[..],
        final_state: Some(&mut output.final_state[..]),
        checkpoints: Some(&mut checkpoints[..]),
    };
    cpu::forward_with(isa, inputs, buffers).unwrap();
    (output, checkpoints)
}

#[test]
fn cpu_forward_with_every_isa() {
    for isa in Isa::available() {
        let mut comparison = Comparison::new(format!("{isa:?}, forward"));
        for_each_case(|case, inputs| {
            let (output, _) = forward_with(isa, &inputs, case.results["final_state"].len());
            comparison.hold(case, FORWARD, &outputs(&output));
        });
        comparison.finish();
    }
}

#[test]
fn cpu_backward_with_every_isa() {
    for isa in Isa::available() {
        let mut comparison = Comparison::new(format!("{isa:?}, backward"));
        for_each_case(|case, inputs| {
            let (_, checkpoints) = forward_with(isa, &inputs, case.results["final_state"].len());
            let mut got = Gradients::zeroed(&inputs).unwrap();
            cpu::backward_with(isa, &inputs, &checkpoints, d_outputs(case), got.as_mut()).unwrap();
            comparison.hold(case, GRADIENTS, &gradients(&got));
        });
        comparison.finish();
    }
}

#[test]
fn inputs_forward() {
    let mut comparison = Comparison::new("Inputs::forward");
    for_each_case(|case, inputs| {
        let output = inputs.forward().unwrap();
        assert_eq!(output, inputs.forward_with_checkpoints().unwrap().0, "{}: checkpoints change nothing", case.name);
        comparison.hold(case, FORWARD, &outputs(&output));
    });
    comparison.finish();
}

#[test]
fn inputs_backward() {
    let mut comparison = Comparison::new("Inputs::backward");
    for_each_case(|case, inputs| {
        let (_, checkpoints) = inputs.forward_with_checkpoints().unwrap();
        comparison.hold(case, GRADIENTS, &gradients(&inputs.backward(&checkpoints, d_outputs(case)).unwrap()));
    });
    comparison.finish();
}
