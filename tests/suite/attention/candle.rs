//! Attention on candle's tensors.

use candle_core::{DType, Device, Tensor, Var};
use selective_scan::attention::{Inputs, KeyRange, reference};
use selective_scan::candle::Attention;

use super::Case;
use crate::candle::{tensor, values};
use crate::support::draw::seeded;
use crate::support::memory::peak_of;
use crate::support::tolerance::error;
use crate::support::vectors::{FORWARD, GRADIENTS};

/// Values and gradients through candle's graph, of all tensors and of one alone.
#[test]
fn gradients_flow_to_what_is_tracked() {
    let (mut rng, seed) = seeded();
    for _ in 0..6 {
        let mut case = Case::<f32>::draw(&mut rng, 70);
        // Where scores are far apart, gradients cancel: that is for the operator's own tests.
        for tensor in [&mut case.q, &mut case.k] {
            tensor.data.iter_mut().for_each(|x| *x = x.clamp(-1.0, 1.0));
        }
        let inputs = case.inputs();
        let exact = reference::backward(&inputs, case.d_out.view()).unwrap();
        let device = Device::Cpu;
        let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(|view| Var::from_tensor(&tensor(view, &device)).unwrap());
        let d_out = tensor(&case.d_out.view(), &device);
        let Inputs { scale, cu_seqlens, keys, causal, .. } = inputs;
        let operator = Attention { scale, cu_seqlens, keys, causal, ..Attention::new(&q, &k, &v) };
        let out = operator.forward().unwrap();
        assert!(error(&values(&out), &reference::forward(&inputs).unwrap().out) < FORWARD, "SEED={seed}");
        let gradients = (&out * &d_out).unwrap().sum_all().unwrap().backward().unwrap();
        for (variable, exact) in [(&q, &exact.q), (&k, &exact.k), (&v, &exact.v)] {
            assert!(error(&values(gradients.get(variable).unwrap()), exact) < GRADIENTS, "SEED={seed}");
        }
        let (q, v) = (q.detach(), v.detach());
        let operator = Attention { scale, cu_seqlens, keys, causal, ..Attention::new(&q, &k, &v) };
        let loss = (operator.forward().unwrap() * &d_out).unwrap().sum_all().unwrap();
        assert!(error(&values(loss.backward().unwrap().get(&k).unwrap()), &exact.k) < GRADIENTS, "SEED={seed}");
    }
}

/// A head of 2,048 steps has 16 MB of scores; what is there at a time are a few tensors of 128 kB, and blocks for each thread.
#[test]
fn scores_are_never_all_there() {
    let device = Device::Cpu;
    let random = || Var::randn(0f32, 1.0, (1, 2048, 1, 16), &device).unwrap();
    let (q, k, v) = (random(), random(), random());
    let peak = peak_of(|| {
        let out = Attention::new(&q, &k, &v).forward().unwrap();
        out.sum_all().unwrap().backward().unwrap();
    })
    .0;
    assert!(peak < 4 << 20, "{peak} bytes");
}

#[test]
fn bad_tensors_are_named() {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    let q = zeros(&[1, 3, 4, 2], DType::F32);
    let refused = |k: &Tensor, v: &Tensor, text: &str| {
        let error = Attention::new(&q, k, v).forward().unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    };
    let k = zeros(&[1, 3, 2, 2], DType::F32);
    refused(&zeros(&[3, 2, 2], DType::F32), &k, "`k`: expected shape (rows, steps, kv_heads, d_head), got [3, 2, 2]");
    refused(&k, &zeros(&[1, 3, 2, 2], DType::F16), "`v`: expected dtype F32, got F16");
    let shared = Var::from_tensor(&k).unwrap();
    let keys = [KeyRange { row: 0, start: 0, length: 3 }; 2];
    let operator = Attention { keys: Some(&keys), cu_seqlens: Some(&[0, 1, 3]), ..Attention::new(&q, &shared, &k) };
    let error = operator.forward().unwrap_err().to_string();
    assert!(error.contains("`keys`: expected keys of one sequence each"), "{error}");
}
