//! The operators on candle's tensors. Each test is a function of the device; `gpu` calls them with another.

mod conv;
mod convert;
mod embedding;
mod errors;
#[cfg(feature = "candle-cuda")]
pub mod gpu;
mod graph;
mod host;
mod norm;
mod optimizer;
mod plain;
mod scan;
mod slots;
mod update;
mod vectors;
mod views;

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var, WithDType};
use selective_scan::candle::Scan;
use selective_scan::scan::Options;
use selective_scan::{Element, Projection, View};

use crate::scan::case::{self, Case, Results};
use crate::support::tolerance;

/// The inputs of a scan.
const INPUTS: [&str; 9] = ["u", "delta", "a", "b", "c", "z", "d", "delta_bias", "initial_state"];

/// A tensor with the elements of a view.
pub fn tensor<T: Element + WithDType, const R: usize>(view: &View<T, R>, device: &Device) -> Tensor {
    let count = view.shape.iter().product();
    let element = |mut i: usize| {
        let mut at = view.offset;
        for k in (0..R).rev() {
            at += i % view.shape[k] * view.strides[k];
            i /= view.shape[k];
        }
        view.data[at]
    };
    Tensor::from_vec((0..count).map(element).collect(), &view.shape, device).expect("as many as the shape says")
}

/// The elements of a tensor.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.flatten_all().and_then(|flat| flat.to_dtype(DType::F64));
    flat.and_then(|flat| flat.to_vec1()).expect("a tensor of numbers")
}

/// The tensors of a scan.
pub struct Problem {
    inputs: BTreeMap<&'static str, Tensor>,
    cu_seqlens: Option<Vec<usize>>,
    options: Options,
    d_out: Tensor,
    d_final_state: Option<Tensor>,
}

impl Problem {
    /// A case on a device; `tracked` says which inputs are variables.
    fn new<T: Element + WithDType>(case: &Case<T>, device: &Device, tracked: impl Fn(&str) -> bool) -> Self {
        let inputs = case.inputs();
        let projection = |projection: &Projection<T>| match projection {
            Projection::Varying(view) => tensor(view, device),
            Projection::Constant(view) => tensor(view, device),
        };
        let tensors = [
            ("u", Some(tensor(&inputs.u, device))),
            ("delta", Some(tensor(&inputs.delta, device))),
            ("a", Some(tensor(&inputs.a, device))),
            ("b", Some(projection(&inputs.b))),
            ("c", Some(projection(&inputs.c))),
            ("z", inputs.z.map(|view| tensor(&view, device))),
            ("d", inputs.d.map(|view| tensor(&view, device))),
            ("delta_bias", inputs.delta_bias.map(|view| tensor(&view, device))),
            ("initial_state", inputs.initial_state.map(|view| tensor(&view, device))),
        ];
        let d_outputs = case.d_outputs();
        Self {
            inputs: tensors
                .into_iter()
                .filter_map(|(name, tensor)| Some((name, track(tensor?, tracked(name)))))
                .collect(),
            cu_seqlens: inputs.cu_seqlens.map(<[usize]>::to_vec),
            options: inputs.options,
            d_out: tensor(&d_outputs.d_out, device),
            d_final_state: d_outputs.d_final_state.map(|view| tensor(&view, device)),
        }
    }

    fn get(&self, name: &str) -> &Tensor {
        &self.inputs[name]
    }

    fn scan(&self) -> Scan<'_> {
        Scan {
            z: self.inputs.get("z"),
            d: self.inputs.get("d"),
            delta_bias: self.inputs.get("delta_bias"),
            initial_state: self.inputs.get("initial_state"),
            cu_seqlens: self.cu_seqlens.as_deref(),
            options: self.options,
            ..Scan::new(self.get("u"), self.get("delta"), self.get("a"), self.get("b"), self.get("c"))
        }
    }

    /// A loss whose gradients at the results are those of the case.
    fn loss(&self, out: &Tensor, final_state: &Tensor) -> Tensor {
        let out = weighted(out, &self.d_out);
        match &self.d_final_state {
            Some(d_final_state) => (out + weighted(final_state, d_final_state)).expect("two numbers"),
            None => out,
        }
    }

    /// The gradient of each input, by name.
    fn gradients(&self, gradients: &GradStore) -> BTreeMap<&'static str, Vec<f64>> {
        let get = |(name, input): (&&'static str, &Tensor)| Some((*name, values(gradients.get(input)?)));
        self.inputs.iter().filter_map(get).collect()
    }
}

/// The tensor, as a variable or not.
fn track(tensor: Tensor, tracked: bool) -> Tensor {
    match tracked {
        true => Var::from_tensor(&tensor).expect("a copy").as_tensor().clone(),
        false => tensor,
    }
}

/// The sum of the elements times `weights`, as `f32`.
fn weighted(tensor: &Tensor, weights: &Tensor) -> Tensor {
    // candle's sum of half types on a GPU has a race in shared memory, which the simulated device reports.
    let product = tensor.mul(weights).and_then(|product| product.to_dtype(DType::F32));
    product.and_then(|product| product.sum_all()).expect("tensors of one shape")
}

/// Forward and backward of a case.
fn run<T: Element + WithDType>(case: &Case<T>, device: &Device) -> Results {
    let problem = Problem::new(case, device, |_| true);
    let (out, final_state) = problem.scan().forward_with_state().expect("the case is valid");
    assert_eq!((out.dtype(), final_state.dtype()), (<T as WithDType>::DTYPE, DType::F32));
    let store = problem.loss(&out, &final_state).backward().expect("a loss");
    let gradients = problem.gradients(&store);
    for (name, input) in &problem.inputs {
        let gradient = store.get(input).expect("every input is tracked");
        assert_eq!((gradient.dtype(), gradient.shape()), (input.dtype(), input.shape()), "{name}");
    }
    let mut tensors = vec![
        case::Tensor { name: "out", values: values(&out), is_activation: true, is_gradient: false },
        case::Tensor { name: "final_state", values: values(&final_state), is_activation: false, is_gradient: false },
    ];
    // In the order of the case's own results.
    for (gradient, input) in [
        ("d_u", "u"),
        ("d_delta", "delta"),
        ("d_z", "z"),
        ("d_a", "a"),
        ("d_b", "b"),
        ("d_c", "c"),
        ("d_d", "d"),
        ("d_delta_bias", "delta_bias"),
        ("d_initial_state", "initial_state"),
    ] {
        let Some(values) = gradients.get(input) else { continue };
        let is_activation = match input {
            "u" | "delta" | "z" => true,
            "b" => !case.flags.constant_b,
            "c" => !case.flags.constant_c,
            _ => false,
        };
        tensors.push(case::Tensor { name: gradient, values: values.clone(), is_activation, is_gradient: true });
    }
    Results(tensors)
}

/// Asserts that two sets of gradients agree within `bound`, by the norm of each.
#[track_caller]
fn assert_same(
    ours: &BTreeMap<&'static str, Vec<f64>>,
    expected: &BTreeMap<&'static str, Vec<f64>>,
    bound: f64,
    what: &str,
) {
    assert_eq!(ours.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{what}");
    for (name, expected) in expected {
        let error = tolerance::error(&ours[name], expected);
        assert!(error <= bound, "{what}: the gradient of {name} is off by {error:.1e}");
    }
}
