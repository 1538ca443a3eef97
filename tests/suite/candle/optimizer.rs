//! AdamW on candle's variables.

use candle_core::{DType, Device, Tensor, Var};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selective_scan::candle::AdamWState;
use selective_scan::optimizer::{Group, Options, Status};

use super::values;
use crate::support::draw::seeded;

fn random() -> StdRng {
    let (_, seed) = seeded();
    println!("SEED={seed}");
    StdRng::seed_from_u64(seed)
}

fn tensor(random: &mut StdRng, shape: &[usize], dtype: DType, device: &Device) -> Tensor {
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, device).unwrap().to_dtype(dtype).unwrap()
}

/// More variables than are written to at once, of several types and shapes.
fn variables(random: &mut StdRng, device: &Device) -> Vec<Var> {
    let dtypes = [DType::F32, DType::BF16, DType::F32, DType::F16];
    // On GPUs candle has no tensors of no elements.
    let none: &[usize] = if device.is_cpu() { &[0, 2] } else { &[1, 2] };
    let shapes = [&[3, 4][..], &[5], &[2, 3, 1], &[], none, &[33]];
    let one = |i: usize| Var::from_tensor(&tensor(random, shapes[i % 6], dtypes[i % 4], device)).unwrap();
    (0..130).map(one).collect()
}

fn bits(tensor: &Tensor) -> Vec<u64> {
    values(tensor).into_iter().map(f64::to_bits).collect()
}

/// AdamW by candle's own operators, in `f32`.
struct Plain {
    master: Tensor,
    mean: Tensor,
    mean_square: Tensor,
}

impl Plain {
    fn step(&mut self, options: &Options, rate: f64, decay: f64, t: i32, gradient: &Tensor) {
        let Options { beta1, beta2, eps, .. } = *options;
        let [correction1, correction2] = [beta1, beta2].map(|beta| 1.0 - beta.powi(t));
        let gradient = gradient.to_dtype(DType::F32).unwrap();
        self.mean = ((&self.mean * beta1).unwrap() + (&gradient * (1.0 - beta1)).unwrap()).unwrap();
        let square = gradient.sqr().unwrap();
        self.mean_square = ((&self.mean_square * beta2).unwrap() + (square * (1.0 - beta2)).unwrap()).unwrap();
        let root = (self.mean_square.sqrt().unwrap() * correction2.sqrt().recip()).unwrap();
        let change = (&self.mean / root.affine(1.0, eps).unwrap()).unwrap().affine(rate / correction1, 0.0).unwrap();
        self.master = ((&self.master * (1.0 - rate * decay)).unwrap() - change).unwrap();
    }
}

/// The operators round as these do, one by one; powers and roots of the corrections may differ in their last bits.
pub fn agrees_with_plain_operators(device: &Device) {
    let mut random = random();
    let variables = variables(&mut random, device);
    let options = Options::default();
    let mut state = AdamWState::new(&variables).unwrap();
    let mut plain: Vec<_> = variables
        .iter()
        .map(|variable| {
            let master = variable.to_dtype(DType::F32).unwrap().copy().unwrap();
            let zeros = master.zeros_like().unwrap();
            Plain { master, mean: zeros.clone(), mean_square: zeros }
        })
        .collect();
    let group = |i: usize| Group { learning_rate: 1.0 / (1 + i % 3) as f64, weight_decay: 0.1 * (i % 2) as f64 };
    let groups: Vec<_> = (0..variables.len()).map(group).collect();
    for t in 1..=5 {
        // Of the variable's type or f32, and some of them transposed.
        let gradients: Vec<_> = variables
            .iter()
            .enumerate()
            .map(|(i, variable)| {
                let dtype = if i % 3 == 0 { DType::F32 } else { variable.dtype() };
                match variable.dims() {
                    &[rows, columns] => tensor(&mut random, &[columns, rows], dtype, device).t().unwrap(),
                    dims => tensor(&mut random, dims, dtype, device),
                }
            })
            .collect();
        let norm = state.step(&options, 0.01, &groups, &gradients).unwrap();
        assert_eq!((norm.dims().len(), norm.dtype()), (0, DType::F32));
        let squares: f64 = gradients.iter().flat_map(values).map(|x| x * x).sum();
        assert!((values(&norm)[0] - squares.sqrt()).abs() <= 1.2e-7 * squares.sqrt());
        for (i, plain) in plain.iter_mut().enumerate() {
            let Group { learning_rate, weight_decay } = groups[i];
            plain.step(&options, 0.01 * learning_rate, weight_decay, t, &gradients[i]);
        }
    }
    for (i, (variable, plain)) in variables.iter().zip(&plain).enumerate() {
        let ([mean, square], master) = state.moments(i).unwrap();
        assert_eq!(master.is_some(), variable.dtype() != DType::F32);
        let exact = master.unwrap_or_else(|| variable.as_tensor().clone());
        for (got, want) in [(&mean, &plain.mean), (&square, &plain.mean_square), (&exact, &plain.master)] {
            assert_eq!(got.dims(), variable.dims());
            for (got, want) in values(got).into_iter().zip(values(want)) {
                // A few units in the last place of numbers up to 1.
                assert!((got - want).abs() <= 5e-7, "variable {i}: {got} for {want}");
            }
        }
        assert_eq!(bits(variable), bits(&exact.to_dtype(variable.dtype()).unwrap()), "variable {i}");
    }
}

/// Another state that was given the numbers of one goes on with its bits; the copies that were taken stay as they were.
pub fn goes_on_to_the_bit(device: &Device) {
    let mut random = random();
    let variables = variables(&mut random, device);
    let copies = |variables: &[Var]| -> Vec<Var> {
        variables.iter().map(|variable| Var::from_tensor(&variable.copy().unwrap()).unwrap()).collect()
    };
    let options = Options { clip: Some(1.0), ..Options::default() };
    let groups = vec![Group { learning_rate: 1.0, weight_decay: 0.1 }; variables.len()];
    let mut gradients =
        || variables.iter().map(|v| tensor(&mut random, v.dims(), v.dtype(), device)).collect::<Vec<_>>();
    let mut state = AdamWState::new(&variables).unwrap();
    for _ in 0..2 {
        state.step(&options, 1e-3, &groups, &gradients()).unwrap();
    }
    let others = copies(&variables);
    let mut other = AdamWState::new(&others).unwrap();
    for i in 0..variables.len() {
        let ([mean, square], master) = state.moments(i).unwrap();
        other.set_moments(i, [&mean, &square]).unwrap();
        if let Some(master) = master {
            other.set_master(i, &master).unwrap();
        }
    }
    other.set_status(state.status().unwrap()).unwrap();
    for _ in 0..2 {
        let gradients = gradients();
        let norms = [&mut state, &mut other].map(|state| state.step(&options, 1e-3, &groups, &gradients).unwrap());
        assert_eq!(bits(&norms[0]), bits(&norms[1]));
    }
    for (variable, other) in variables.iter().zip(&others) {
        assert_eq!(bits(variable), bits(other));
    }
    assert_eq!(state.status().unwrap(), Status { taken: 4, skipped: 0, streak: 4, scale: 1.0 });
    // A scale that was asked for does not change with the next step.
    state.set_status(Status { scale: 4.0, ..Status::default() }).unwrap();
    let (scale, mut bad) = (state.scale().unwrap(), gradients());
    bad[0] = (&bad[0] * f64::NAN).unwrap();
    let halving = Options { scale_interval: Some(9), ..options };
    let before = bits(&variables[0]);
    assert!(!values(&state.step(&halving, 1e-3, &groups, &bad).unwrap())[0].is_finite());
    assert_eq!((values(&scale)[0], state.status().unwrap().scale), (4.0, 2.0));
    assert_eq!((bits(&variables[0]), state.status().unwrap().skipped), (before, 1));
}

/// Whatever does not fit, by name, with nothing written.
pub fn refuses_what_does_not_fit(device: &Device) {
    let mut random = random();
    let variable = Var::from_tensor(&tensor(&mut random, &[2, 3], DType::BF16, device)).unwrap();
    let good = tensor(&mut random, &[2, 3], DType::BF16, device);
    let group = Group { learning_rate: 1.0, weight_decay: 0.0 };
    let mut state = AdamWState::new(std::slice::from_ref(&variable)).unwrap();
    let before = bits(&variable);
    let mut refused = |word: &str, groups: &[Group], gradients: &[Tensor], rate: f64| {
        let message = state.step(&Options::default(), rate, groups, gradients).unwrap_err().to_string();
        assert!(message.contains(&format!("`{word}`")), "{word}: {message}");
    };
    refused("learning_rate", &[group], std::slice::from_ref(&good), -1.0);
    refused("groups", &[], std::slice::from_ref(&good), 0.1);
    refused("gradients", &[group], &[], 0.1);
    refused("gradients", &[group], &[good.flatten_all().unwrap()], 0.1);
    refused("gradients", &[group], &[good.to_dtype(DType::F16).unwrap()], 0.1);
    refused("gradients", &[group], &[variable.as_detached_tensor()], 0.1);
    assert_eq!(bits(&variable), before);
    assert_eq!(state.status().unwrap(), Status::default());

    let refused = |variables: &[Var]| AdamWState::new(variables).unwrap_err().to_string();
    assert!(refused(&[variable.clone(), variable.clone()]).contains("once"));
    assert!(refused(&[Var::zeros(3, DType::F64, &Device::Cpu).unwrap()]).contains("`variables`"));
}

#[test]
fn agrees_with_plain_operators_on_the_cpu() {
    agrees_with_plain_operators(&Device::Cpu);
}

#[test]
fn goes_on_to_the_bit_on_the_cpu() {
    goes_on_to_the_bit(&Device::Cpu);
}

#[test]
fn refuses_what_does_not_fit_on_the_cpu() {
    refuses_what_does_not_fit(&Device::Cpu);
}
