//! The scan with complex states against PyTorch.

use selective_scan::Isa;
use selective_scan::complex_scan::{Gradients, Inputs, Options, Output, OutputGradients, reference};

use super::device::{On, backward, forward};
use crate::support::vectors::{Case, Comparison, FORWARD, GRADIENTS, REFERENCE, widen};

fn inputs<'a>(case: &'a Case, cu_seqlens: &'a Option<Vec<usize>>) -> Inputs<'a, f32> {
    Inputs {
        z: case.optional("z"),
        d: case.optional("d"),
        delta_bias: case.optional("delta_bias"),
        initial_state: case.optional("initial_state"),
        cu_seqlens: cu_seqlens.as_deref(),
        options: Options { delta_softplus: case.option("delta_softplus"), reverse: case.option("reverse") },
        ..Inputs::new(case.view("u"), case.view("delta"), case.view("a"), case.projection("b"), case.projection("c"))
    }
}

fn d_outputs(case: &Case) -> OutputGradients<'_, f32> {
    OutputGradients { d_out: case.view("d_out"), d_final_state: case.optional("d_final_state") }
}

fn outputs<T: Copy + Into<f64>>(output: &Output<T, T>) -> [(&'static str, Vec<f64>); 2] {
    [("out", widen(&output.out)), ("final_state", widen(&output.final_state))]
}

fn gradients<T: Copy + Into<f64>>(gradients: &Gradients<T, T>) -> Vec<(&'static str, Vec<f64>)> {
    let mut all = vec![
        ("grad_u", widen(&gradients.u)),
        ("grad_delta", widen(&gradients.delta)),
        ("grad_a", widen(&gradients.a)),
        ("grad_b", widen(gradients.b.as_slice())),
        ("grad_c", widen(gradients.c.as_slice())),
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
    for case in Case::all("complex_scan") {
        let cu_seqlens = case.list("cu_seqlens");
        test(&case, inputs(&case, &cu_seqlens));
    }
}

#[test]
fn reference_agrees() {
    let mut comparison = Comparison::new("f64 reference");
    for_each_case(|case, inputs| {
        comparison.hold(case, REFERENCE, &outputs(&reference::forward(&inputs).unwrap()));
        let got = reference::backward(&inputs, d_outputs(case)).unwrap();
        comparison.hold(case, REFERENCE, &gradients(&got));
    });
    comparison.finish();
}

/// Holds the results of what a problem runs on to PyTorch's.
fn agree(on: On) {
    let mut comparison = Comparison::new(format!("{on:?}"));
    for_each_case(|case, inputs| {
        comparison.hold(case, FORWARD, &outputs(&forward(on, &inputs)));
        comparison.hold(case, GRADIENTS, &gradients(&backward(on, &inputs, d_outputs(case))));
    });
    comparison.finish();
}

#[test]
fn processors_agree() {
    Isa::available().map(On::Processor).for_each(agree);
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::*;

    #[test]
    fn gpus_agree() {
        if crate::support::gpu::stream().is_some() {
            agree(On::Gpu);
        }
    }
}
