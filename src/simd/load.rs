//! Vectors of elements as they are stored, widened in registers.

use half::{bf16, f16};

use super::{Lanes, Row};
use crate::{DType, Element};

/// The [`F32_LANES`](pulp::Simd::F32_LANES) elements of `from` as a vector.
#[inline(always)]
pub(crate) fn load<S: Lanes, T: Element>(simd: S, from: &[T]) -> S::f32s {
    match T::DTYPE {
        DType::F32 => bytemuck::pod_read_unaligned(bytemuck::cast_slice(from)),
        DType::F16 => simd.widen_f16s(bytemuck::cast_slice(from)),
        DType::Bf16 => widen_bf16s(simd, bytemuck::cast_slice(from)),
    }
}

/// [`load`] of a type that fills the upper half of an `f32`.
#[inline(always)]
fn widen_bf16s<S: Lanes>(_: S, from: &[bf16]) -> S::f32s {
    let mut lanes = Row::ZERO;
    for (to, from) in lanes.0[..S::F32_LANES].iter_mut().zip(&from[..S::F32_LANES]) {
        *to = f32::from_bits(u32::from(from.to_bits()) << 16);
    }
    lanes.vectors::<S>()[0]
}

/// [`load`] without an instruction for it.
#[inline(always)]
pub(super) fn widen_f16s<S: Lanes>(simd: S, from: &[f16]) -> S::f32s {
    // What is between the two types' exponents, and what an infinity has more than a number.
    const BIAS: u32 = (127 - 15) << 23;
    const LARGEST_EXPONENT: u32 = 31 << 23;
    // A subnormal number counts steps of 2^-24: it is what its digits add to 2^-14.
    const LEAST: u32 = BIAS + (1 << 23);
    let mut lanes = Row::ZERO;
    for (to, from) in lanes.0[..S::F32_LANES].iter_mut().zip(&from[..S::F32_LANES]) {
        *to = f32::from_bits(u32::from(from.to_bits()));
    }
    let halves = simd.transmute_u32s_f32s(lanes.vectors::<S>()[0]);
    let splat = |bits| simd.splat_u32s(bits);
    let bits = simd.wrapping_dyn_shl_u32s(simd.and_u32s(halves, splat(0x7fff)), splat(13));
    let sign = simd.wrapping_dyn_shl_u32s(simd.and_u32s(halves, splat(0x8000)), splat(16));
    let is_number = simd.less_than_u32s(bits, splat(LARGEST_EXPONENT));
    let normal = simd.add_u32s(bits, simd.select_u32s(is_number, splat(BIAS), splat(2 * BIAS)));
    let above_least = simd.transmute_f32s_u32s(simd.add_u32s(bits, splat(LEAST)));
    let subnormal = simd.sub_f32s(above_least, simd.transmute_f32s_u32s(splat(LEAST)));
    let is_subnormal = simd.less_than_u32s(bits, splat(1 << 23));
    let size = simd.select_u32s(is_subnormal, simd.transmute_u32s_f32s(subnormal), normal);
    simd.transmute_f32s_u32s(simd.or_u32s(sign, size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{BLOCK, Isa, Kernel};

    struct Load<'t, T>(&'t [T], &'t mut Row);

    impl<T: Element> Kernel for Load<'_, T> {
        type Output = ();

        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) {
            for (to, from) in self.1.vectors_mut::<S>().iter_mut().zip(self.0.chunks_exact(S::F32_LANES)) {
                *to = load(simd, from);
            }
        }
    }

    fn every<T: Element>(value: impl Fn(u16) -> T) {
        const STEP: usize = if cfg!(miri) { 997 } else { 1 };
        for isa in Isa::available() {
            for first in (0..=u16::MAX).step_by(BLOCK * STEP) {
                let from: [T; BLOCK] = std::array::from_fn(|i| value(first.wrapping_add(i as u16)));
                let mut row = Row::ZERO;
                isa.run(Load(&from, &mut row));
                for (from, got) in from.into_iter().zip(row.0) {
                    let want = from.to_f32();
                    let same = if want.is_nan() { got.is_nan() } else { got.to_bits() == want.to_bits() };
                    assert!(same, "{isa:?}: {from:?} became {got}");
                }
            }
        }
    }

    #[test]
    fn every_half_is_widened_exactly() {
        every(f16::from_bits);
        every(bf16::from_bits);
        every(|i| f32::from_bits(u32::from(i) << 16 | 1));
    }
}
