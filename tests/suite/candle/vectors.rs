//! The operators on candle's tensors against PyTorch.

use candle_core::{Device, Tensor, Var};
use selective_scan::candle::{CausalConv, Scan};
use selective_scan::{conv, scan};

use super::values;
use crate::support::vectors::{Case, Comparison, FORWARD, GRADIENTS};

/// An input of a case as a variable on a device.
fn variable(case: &Case, name: &str, device: &Device) -> Option<Tensor> {
    let (shape, data) = case.inputs.get(name)?;
    let tensor = Tensor::from_slice(data, &shape[..], device).expect("as many as the shape says");
    Some(Var::from_tensor(&tensor).expect("a copy").as_tensor().clone())
}

/// Holds an operator's results, and the gradients of the vectors' loss, to the vectors.
fn hold(
    comparisons: &mut [Comparison; 2],
    case: &Case,
    (out, final_state): (Tensor, Tensor),
    inputs: &[(&'static str, Option<&Tensor>)],
) {
    comparisons[0].hold(case, FORWARD, &[("out", values(&out)), ("final_state", values(&final_state))]);
    let part = |result: &Tensor, weights: &str| {
        let weights = variable(case, weights, out.device())?.detach();
        Some(result.mul(&weights).and_then(|product| product.sum_all()).expect("of one shape"))
    };
    let loss = part(&out, "d_out").expect("the vectors have it");
    let loss = match part(&final_state, "d_final_state") {
        Some(state) => (loss + state).expect("two numbers"),
        None => loss,
    };
    let store = loss.backward().expect("a loss");
    let gradient = |(name, input): &(&'static str, Option<&Tensor>)| {
        Some((*name, values(store.get((*input)?).expect("every input is tracked"))))
    };
    comparisons[1].hold(case, GRADIENTS, &inputs.iter().filter_map(gradient).collect::<Vec<_>>());
}

pub fn scan(device: &Device) {
    let mut comparisons = ["forward", "backward"].map(|pass| Comparison::new(format!("candle, {pass}")));
    for case in Case::all("scan") {
        let cu_seqlens: Option<Vec<usize>> = case.list("cu_seqlens");
        let get = |name: &str| variable(&case, name, device);
        let [u, delta, a, b, c] = ["u", "delta", "a", "b", "c"].map(|name| get(name).expect("every case has it"));
        let [z, d, delta_bias, initial_state] = ["z", "d", "delta_bias", "initial_state"].map(get);
        let scan = Scan {
            z: z.as_ref(),
            d: d.as_ref(),
            delta_bias: delta_bias.as_ref(),
            initial_state: initial_state.as_ref(),
            cu_seqlens: cu_seqlens.as_deref(),
            options: scan::Options {
                delta_softplus: case.option("delta_softplus"),
                discretization: case.discretization(),
                reverse: case.option("reverse"),
                ..Default::default()
            },
            ..Scan::new(&u, &delta, &a, &b, &c)
        };
        let inputs = [
            ("grad_u", Some(&u)),
            ("grad_delta", Some(&delta)),
            ("grad_a", Some(&a)),
            ("grad_b", Some(&b)),
            ("grad_c", Some(&c)),
            ("grad_z", z.as_ref()),
            ("grad_d", d.as_ref()),
            ("grad_delta_bias", delta_bias.as_ref()),
            ("grad_initial_state", initial_state.as_ref()),
        ];
        hold(&mut comparisons, &case, scan.forward_with_state().expect("valid"), &inputs);
    }
    comparisons.into_iter().for_each(Comparison::finish);
}

pub fn conv(device: &Device) {
    let mut comparisons = ["forward", "backward"].map(|pass| Comparison::new(format!("candle, convolution {pass}")));
    for case in Case::all("conv") {
        let cu_seqlens: Option<Vec<usize>> = case.list("cu_seqlens");
        let get = |name: &str| variable(&case, name, device);
        let [x, weight] = ["x", "weight"].map(|name| get(name).expect("every case has it"));
        let [bias, initial_state] = ["bias", "initial_state"].map(get);
        let conv = CausalConv {
            bias: bias.as_ref(),
            initial_state: initial_state.as_ref(),
            cu_seqlens: cu_seqlens.as_deref(),
            options: conv::Options { silu: case.option("silu"), reverse: case.option("reverse") },
            ..CausalConv::new(&x, &weight)
        };
        let inputs = [
            ("grad_x", Some(&x)),
            ("grad_weight", Some(&weight)),
            ("grad_bias", bias.as_ref()),
            ("grad_initial_state", initial_state.as_ref()),
        ];
        hold(&mut comparisons, &case, conv.forward_with_state().expect("valid"), &inputs);
    }
    comparisons.into_iter().for_each(Comparison::finish);
}

#[test]
fn scan_and_its_gradients() {
    scan(&Device::Cpu);
}

#[test]
fn convolution_and_its_gradients() {
    conv(&Device::Cpu);
}
