//! The element types that tensors may have.

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Name of an element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

mod sealed {
    #[cfg(feature = "cuda")]
    pub trait Sealed: cudarc::driver::DeviceRepr + cudarc::driver::ValidAsZeroBits {}
    #[cfg(not(feature = "cuda"))]
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// An element type of tensors: `f32`, [`f16`](struct@f16) or [`bf16`].
///
/// All arithmetic is done in `f32`; an element type only says how values are stored.
pub trait Element: Pod + Send + Sync + std::fmt::Debug + PartialOrd + sealed::Sealed {
    /// The type's name at run time.
    const DTYPE: DType;

    /// The value as `f32`, exactly.
    fn to_f32(self) -> f32;

    /// The nearest value of this type, ties to even.
    fn from_f32(x: f32) -> Self;

    /// Widens `src` into the equally long `dst`.
    fn widen(src: &[Self], dst: &mut [f32]);

    /// Rounds `src` into the equally long `dst`, as [`Element::from_f32`] does.
    fn narrow(src: &[f32], dst: &mut [Self]);
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn widen(src: &[Self], dst: &mut [f32]) {
        dst.copy_from_slice(src);
    }

    #[inline(always)]
    fn narrow(src: &[f32], dst: &mut [Self]) {
        dst.copy_from_slice(src);
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }

    #[inline(always)]
    fn widen(src: &[Self], dst: &mut [f32]) {
        src.convert_to_f32_slice(dst);
    }

    #[inline(always)]
    fn narrow(src: &[f32], dst: &mut [Self]) {
        dst.convert_from_f32_slice(src);
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        // Branch-free, so that `narrow` vectorises: round to nearest even in the upper half, and keep a NaN a NaN
        // (the addition could carry its payload into infinity) by setting its quiet bit instead.
        let bits = x.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
        let quiet = (bits >> 16) as u16 | 0x0040;
        bf16::from_bits(if x.is_nan() { quiet } else { rounded })
    }

    #[inline(always)]
    fn widen(src: &[Self], dst: &mut [f32]) {
        for (dst, src) in dst.iter_mut().zip(src) {
            *dst = Element::to_f32(*src);
        }
    }

    #[inline(always)]
    fn narrow(src: &[f32], dst: &mut [Self]) {
        for (dst, src) in dst.iter_mut().zip(src) {
            *dst = Element::from_f32(*src);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_the_half_crate_does() {
        // Every upper half, with the lower halves around the rounding points.
        for upper in 0..=u16::MAX {
            for lower in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(upper) << 16 | lower);
                let (ours, theirs) = (<bf16 as Element>::from_f32(x), bf16::from_f32(x));
                assert_eq!(ours.is_nan(), theirs.is_nan(), "{x:e}");
                assert!(ours.is_nan() || ours.to_bits() == theirs.to_bits(), "{x:e}: {ours} {theirs}");
            }
        }
    }
}
