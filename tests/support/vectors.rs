//! What the operators are held to beside their references: PyTorch computed the vectors of `tests/vectors/generate.py` in
//! `f64`, the gradients by autograd.

use std::collections::BTreeMap;

use safetensors::{Dtype, SafeTensors};
use selective_scan::{Discretization, Projection, View};
use serde_json::Value;

/// `f64` against `f64`, measured 1e-15: both sides round each operation to 1.1e-16, in different orders and with
/// different exponentials, and the recurrence forgets old errors. The rest is room for another libm or PyTorch. It must
/// not be looser, for softplus differs from the identity above 20 by only 1e-10 of its value.
pub const REFERENCE: f64 = 1e-12;
/// The accuracy that the crate promises in `f32`, relative by the norm of each tensor.
pub const FORWARD: f64 = 1e-5;
pub const GRADIENTS: f64 = 1e-4;

/// One case of a file: inputs and the gradients that flow in are `f32`, results `f64`.
pub struct Case {
    pub name: String,
    pub options: Value,
    pub inputs: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    pub results: BTreeMap<String, Vec<f64>>,
}

impl Case {
    /// The cases that generate.py wrote for an operator.
    pub fn all(operator: &str) -> Vec<Self> {
        let path = format!("{}/tests/vectors/{operator}.safetensors", env!("CARGO_MANIFEST_DIR"));
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let options = header.metadata().as_ref().and_then(|metadata| metadata.get("options")).expect("options");
        let options: BTreeMap<String, Value> = serde_json::from_str(options).unwrap();
        let mut cases: BTreeMap<String, Self> = options
            .into_iter()
            .map(|(name, options)| {
                let case = Self { name: name.clone(), options, inputs: BTreeMap::new(), results: BTreeMap::new() };
                (name, case)
            })
            .collect();
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let (case, name) = name.split_once('/').expect("case/tensor");
            let case = cases.get_mut(case).expect("a case that has options");
            match tensor.dtype() {
                Dtype::F32 => {
                    let data = tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
                    case.inputs.insert(name.into(), (tensor.shape().into(), data));
                }
                Dtype::F64 => {
                    let data = tensor.data().as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
                    case.results.insert(name.into(), data);
                }
                dtype => panic!("{}/{name} is {dtype:?}", case.name),
            }
        }
        assert!(cases.len() > 10, "{path} has only {} cases", cases.len());
        cases.into_values().collect()
    }

    pub fn optional<const R: usize>(&self, name: &str) -> Option<View<'_, f32, R>> {
        let (shape, data) = self.inputs.get(name)?;
        let shape = shape[..].try_into().unwrap_or_else(|_| panic!("{}/{name} is of shape {shape:?}", self.name));
        Some(View::new(data, shape))
    }

    pub fn view<const R: usize>(&self, name: &str) -> View<'_, f32, R> {
        self.optional(name).unwrap_or_else(|| panic!("{}/{name} is missing", self.name))
    }

    pub fn projection(&self, name: &str) -> Projection<'_, f32> {
        match self.inputs[name].0.len() {
            2 => Projection::Constant(self.view(name)),
            _ => Projection::Varying(self.view(name)),
        }
    }

    pub fn option(&self, name: &str) -> bool {
        self.options[name].as_bool().unwrap_or_else(|| panic!("{}: {name} is no bool", self.name))
    }

    /// A list of whole numbers, or nothing.
    pub fn list<T: serde::de::DeserializeOwned>(&self, name: &str) -> Option<Vec<T>> {
        serde_json::from_value(self.options[name].clone()).unwrap()
    }

    pub fn discretization(&self) -> Discretization {
        if self.option("zero_order_hold") { Discretization::ZeroOrderHold } else { Discretization::Euler }
    }
}

/// Compares results with the vectors; says at the end what was out of bounds, all of it.
pub struct Comparison {
    what: String,
    failures: Vec<String>,
    largest: f64,
}

impl Comparison {
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), failures: Vec::new(), largest: 0.0 }
    }

    /// Holds the results of one case to `bound`. They must be all the results that the vectors have in this group, the
    /// gradients or the rest.
    pub fn hold(&mut self, case: &Case, bound: f64, results: &[(&str, Vec<f64>)]) {
        let of_gradients = |name: &str| name.starts_with("grad_");
        let group = of_gradients(results[0].0);
        let mut names: Vec<_> = results.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        let expected: Vec<_> = case.results.keys().filter(|name| of_gradients(name) == group).collect();
        assert_eq!(names, expected, "{}: the results of {}", self.what, case.name);
        for (name, got) in results {
            let error = relative_error(got, &case.results[*name]);
            self.largest = self.largest.max(error);
            // Not `error > bound`, which NaN would pass.
            let within = error <= bound;
            if !within {
                self.failures.push(format!("{}/{name}: {error:.1e}", case.name));
            }
        }
    }

    pub fn finish(self) {
        println!("{}: largest error {:.1e}", self.what, self.largest);
        assert!(self.failures.is_empty(), "{}: out of bounds:\n  {}", self.what, self.failures.join("\n  "));
    }
}

/// The norm of the difference over the norm of what is expected; of an expected zero, the norm itself.
fn relative_error(got: &[f64], expected: &[f64]) -> f64 {
    if got.len() != expected.len() {
        return f64::INFINITY;
    }
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let scale = norm(&mut expected.iter().copied());
    let error = norm(&mut got.iter().zip(expected).map(|(got, expected)| got - expected));
    if scale == 0.0 { error } else { error / scale }
}

/// Results of either precision as `f64`.
pub fn widen<T: Copy + Into<f64>>(values: &[T]) -> Vec<f64> {
    values.iter().map(|&x| x.into()).collect()
}
