//! Against PyTorch, by the formulas of the papers (`tests/vectors/generate_lti.py`).

use selective_scan::lti::hippo::Measure;
use selective_scan::lti::s4d::{Gradients, Inputs, Options, Output, OutputGradients, OutputMut, cpu, reference};
use selective_scan::lti::{Dense, Rule, s4};
use selective_scan::{Isa, View};

use crate::support::vectors::{Case, Comparison, FORWARD, GRADIENTS, REFERENCE, widen};

fn cases(kind: &str) -> Vec<Case> {
    let cases: Vec<_> = Case::all("lti").into_iter().filter(|case| case.name.starts_with(kind)).collect();
    assert!(cases.len() >= 3, "only {} of {kind}", cases.len());
    cases
}

fn rule(case: &Case) -> Rule {
    match case.options["rule"].as_str().expect("a rule") {
        "zero_order_hold" => Rule::ZeroOrderHold,
        "bilinear" => Rule::Bilinear,
        "euler" => Rule::Euler,
        other => panic!("{}: {other}", case.name),
    }
}

fn for_each_s4d(mut test: impl FnMut(&Case, Inputs<f32>, OutputGradients<f32>)) {
    for case in cases("s4d_") {
        let cu_seqlens = case.list("cu_seqlens");
        let inputs = Inputs {
            d: case.optional("d"),
            initial_state: case.optional("initial_state"),
            cu_seqlens: cu_seqlens.as_deref(),
            options: Options { rule: rule(&case), reverse: case.option("reverse") },
            ..Inputs::new(case.view("u"), case.view("log_delta"), case.view("a"), case.view("b"), case.view("c"))
        };
        let d_outputs = OutputGradients { d_out: case.view("d_out"), d_final_state: case.optional("d_final_state") };
        test(&case, inputs, d_outputs);
    }
}

fn outputs<T: Copy + Into<f64>>(output: &Output<T, T>) -> [(&'static str, Vec<f64>); 2] {
    [("out", widen(&output.out)), ("final_state", widen(&output.final_state))]
}

fn gradients<T: Copy + Into<f64>>(gradients: &Gradients<T, T>) -> Vec<(&'static str, Vec<f64>)> {
    let mut all = vec![
        ("grad_u", widen(&gradients.u)),
        ("grad_log_delta", widen(&gradients.log_delta)),
        ("grad_a", widen(&gradients.a)),
        ("grad_b", widen(&gradients.b)),
        ("grad_c", widen(&gradients.c)),
    ];
    let optional = [("grad_d", &gradients.d), ("grad_initial_state", &gradients.initial_state)];
    all.extend(optional.into_iter().filter_map(|(name, data)| Some((name, widen(data.as_ref()?)))));
    all
}

#[test]
fn s4d_reference() {
    let mut comparison = Comparison::new("f64 reference, S4D");
    for_each_s4d(|case, inputs, d_outputs| {
        comparison.hold(case, REFERENCE, &outputs(&reference::forward(&inputs).unwrap()));
        comparison.hold(case, REFERENCE, &gradients(&reference::backward(&inputs, d_outputs).unwrap()));
    });
    comparison.finish();
}

#[test]
fn s4d_on_processors() {
    for isa in Isa::available() {
        let mut comparison = Comparison::new(format!("{isa:?}, S4D"));
        for_each_s4d(|case, inputs, d_outputs| {
            let (mut out, mut state) =
                (vec![0.0; inputs.u.shape.iter().product()], vec![0.0; case.results["final_state"].len()]);
            let to = OutputMut { final_state: Some(&mut state[..]), ..OutputMut::new(&mut out[..]) };
            cpu::forward_with(isa, &inputs, to).unwrap();
            comparison.hold(case, FORWARD, &outputs(&Output { out, final_state: state }));
            let mut all = Gradients::zeroed(&inputs).unwrap();
            cpu::backward_with(isa, &inputs, d_outputs, all.as_mut()).unwrap();
            comparison.hold(case, GRADIENTS, &gradients(&all));
        });
        comparison.finish();
    }
}

/// The kernel is computed in `f64` and rounded, as the gradients are: 2^-24 of each number. The powers of a dense
/// matrix that PyTorch takes, and the solution for `C`, lose some 1e-13.
#[test]
fn s4_kernels() {
    let mut comparison = Comparison::new("S4's kernels");
    for case in cases("s4_") {
        let length = usize::try_from(case.options["length"].as_u64().expect("a length")).unwrap();
        let kernel = s4::Kernel {
            log_delta: case.view("log_delta"),
            a: case.view("a"),
            p: case.view("p"),
            b: case.view("b"),
            c: case.view("c"),
        };
        let [d_inner, both] = kernel.a.shape;
        // C has no way out but by the recurrence: what it answers to an impulse is the kernel.
        let recurrence = kernel.recurrence(length).unwrap();
        let mut state = vec![0.0; d_inner * both];
        let mut answer = vec![vec![0.0f32; length]; d_inner];
        for t in 0..length {
            let u = vec![if t == 0 { 1.0 } else { 0.0 }; d_inner];
            for (row, y) in answer.iter_mut().zip(recurrence.step(&u, &mut state).unwrap()) {
                row[t] = y;
            }
        }
        // States are rounded at each of up to 24 steps.
        let by_steps = widen(&answer.concat());
        let error = by_steps.iter().zip(&case.results["kernel"]).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt();
        let size = case.results["kernel"].iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!(error <= 24.0 * 1.2e-7 * size, "{}: {error:e} of {size:e}", case.name);
        // And it is cut off again to what it was.
        let original: Vec<f32> = case.results["original"].iter().map(|&x| x as f32).collect();
        let original = s4::Kernel { c: View::new(&original, [d_inner, both]), ..kernel };
        let again = original.truncate(length).unwrap();
        let (_, c) = &case.inputs["c"];
        let error = again.iter().zip(c).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>().sqrt();
        let size = c.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
        // `C` was rounded to 2^-25, and is multiplied by a matrix of norm 2 at most.
        assert!(error <= 1e-6 * size, "{}: {error:e} of {size:e}", case.name);
        comparison.hold(
            &case,
            1e-6,
            &[("kernel", widen(&kernel.kernel(length).unwrap())), ("original", case.results["original"].clone())],
        );
        let all = kernel.backward(case.view("d_out")).unwrap();
        let mut got = vec![
            ("grad_log_delta", widen(&all.log_delta)),
            ("grad_a", widen(&all.a)),
            ("grad_b", widen(&all.b)),
            ("grad_c", widen(&all.c)),
        ];
        got.push(("grad_p", widen(&all.p)));
        comparison.hold(&case, 1e-6, &got);
    }
    comparison.finish();
}

#[test]
fn dense_discretizations() {
    let mut comparison = Comparison::new("dense systems");
    for case in cases("dense_") {
        let numbers = |name: &str| widen(&case.inputs[name].1);
        let (a, b) = (numbers("a"), numbers("b"));
        let steps = Dense::new(&a, &b, &b, 0.0).unwrap().discretize(numbers("delta")[0], rule(&case)).unwrap();
        comparison.hold(&case, REFERENCE, &[("a_bar", steps.a()), ("b_bar", steps.b().to_vec())]);
    }
    comparison.finish();
}

#[test]
fn hippo_matrices() {
    let mut comparison = Comparison::new("HiPPO");
    for case in cases("hippo_") {
        let measure = match case.options["measure"].as_str() {
            Some("legs") => Measure::LegS,
            Some("legt") => Measure::LegT,
            _ => Measure::Fourier,
        };
        let order = usize::try_from(case.options["order"].as_u64().expect("an order")).unwrap();
        let frequencies = measure.low_rank(order).unwrap().diagonal().a().iter().map(|a| a.im).collect();
        let matrix = measure.system(order).unwrap().a();
        comparison.hold(&case, REFERENCE, &[("matrix", matrix), ("frequencies", frequencies)]);
    }
    comparison.finish();
}
