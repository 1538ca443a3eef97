//! The operators on candle's tensors.

use candle_core::{Device, Tensor, Var};
use selective_scan::candle::{CausalConv, ConvUpdate, Scan, StateUpdate};

#[test]
fn smoke() {
    let dev = Device::Cpu;
    let v = |shape: &[usize]| Var::randn(0f32, 1.0, shape, &dev).unwrap();
    let (u, delta, a, b, c, z) =
        (v(&[2, 5, 4]), v(&[2, 5, 4]), v(&[4, 3]), v(&[2, 5, 3]), v(&[2, 5, 3]), v(&[2, 5, 4]));
    let a = a.abs().unwrap().neg().unwrap();
    let scan = Scan { z: Some(&z), ..Scan::new(&u, &delta, &a, &b, &c) };
    let (out, state) = scan.forward_with_state().unwrap();
    let loss = (out.sum_all().unwrap() + state.sum_all().unwrap()).unwrap();
    let g = loss.backward().unwrap();
    for t in [&u, &delta, &b, &c, &z] {
        println!("{:?}", g.get(t).unwrap().sum_all().unwrap().to_scalar::<f32>());
    }
    let w = v(&[4, 4]);
    let y = CausalConv::new(&u, &w).forward().unwrap();
    let g = y.sum_all().unwrap().backward().unwrap();
    println!("{:?}", g.get(&w).unwrap().to_vec2::<f32>());
    let pool = Tensor::zeros((2, 4, 3), candle_core::DType::F32, &dev).unwrap();
    StateUpdate::new(&u, &delta, &a, &b, &c).update(&pool).unwrap();
    println!("{:?}", pool.to_vec3::<f32>());
    let pool = Tensor::zeros((2, 3, 4), candle_core::DType::F32, &dev).unwrap();
    ConvUpdate::new(&u, &w).update(&pool).unwrap();
    println!("{:?}", pool.to_vec3::<f32>());
    println!("{}", ConvUpdate::new(&u, &w).update(&u.narrow(1, 0, 3).unwrap()).unwrap_err());
}
