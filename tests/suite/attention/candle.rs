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

#[test]
fn gradients_flow_to_what_is_tracked() {
    gradients_flow(&Device::Cpu);
}

/// Values and gradients through candle's graph, of all tensors and of one alone.
pub fn gradients_flow(device: &Device) {
    let (mut rng, seed) = seeded();
    for _ in 0..6 {
        let mut case = Case::<f32>::draw(&mut rng, 70);
        // Where scores are far apart, gradients cancel: that is for the operator's own tests.
        for tensor in [&mut case.q, &mut case.k] {
            tensor.data.iter_mut().for_each(|x| *x = x.clamp(-1.0, 1.0));
        }
        let inputs = case.inputs();
        let exact = reference::backward(&inputs, case.d_out.view()).unwrap();
        let [q, k, v] = [&inputs.q, &inputs.k, &inputs.v].map(|view| Var::from_tensor(&tensor(view, device)).unwrap());
        let d_out = tensor(&case.d_out.view(), device);
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

/// Both passes outside of candle's graph, on the device and on the processor: these differ by roundings of results, and of weights
/// on one of them, 2^-9 each.
#[cfg(feature = "candle-cuda")]
pub fn like_the_processor(device: &Device) {
    let random = |shape: [usize; 4]| {
        let tensor = Tensor::randn(0f32, 1.0, &shape, &Device::Cpu).unwrap();
        tensor.to_dtype(DType::BF16).unwrap()
    };
    let (cu_seqlens, ranges) = ([0, 1, 1, 41], [(1, 0, 300), (0, 9, 0), (0, 2, 45)]);
    let keys = ranges.map(|(row, start, length)| KeyRange { row, start, length });
    let [q, d_out] = [(); 2].map(|()| random([1, 41, 4, 32]));
    let [k, v] = [(); 2].map(|()| random([2, 300, 2, 32]));
    let run = |device: &Device| {
        let [q, k, v, d_out] = [&q, &k, &v, &d_out].map(|tensor| tensor.to_device(device).unwrap());
        let operator = Attention { cu_seqlens: Some(&cu_seqlens), keys: Some(&keys), ..Attention::new(&q, &k, &v) };
        let (out, lse) = operator.forward_with_lse().unwrap();
        let gradients = operator.backward(&out, &lse, &d_out).unwrap();
        [out, lse, gradients.q, gradients.k, gradients.v].map(|tensor| values(&tensor.to_dtype(DType::F32).unwrap()))
    };
    for (name, (ours, theirs)) in ["out", "lse", "q", "k", "v"].iter().zip(run(device).iter().zip(&run(&Device::Cpu))) {
        assert!(error(ours, theirs) < 4e-3, "{name}: {:.1e}", error(ours, theirs));
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
    bad_tensors(&Device::Cpu);
}

/// The messages are the same wherever tensors lie.
pub fn bad_tensors(device: &Device) {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, device).unwrap();
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
