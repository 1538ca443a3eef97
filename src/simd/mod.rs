//! One generic algorithm on every instruction set: dispatch, rows of channels, and the vector operations that
//! [`pulp::Simd`] does not have.

mod load;
mod math;
mod sum;

pub(crate) use load::load;
pub(crate) use math::{Decay, exp, hold_inverse, hold_weight, polynomial, silu, silu_grad, softplus};
pub(crate) use sum::{Carried, Sum, SumRows, SumTile};

use half::f16;
use pulp::{NullaryFnOnce, Simd};

use crate::Element;

/// Channels in a block, the unit in which the CPU path divides work. It is the widest vector there is, so that the
/// division, and with it the order of every sum over channels, does not depend on the instruction set.
pub(crate) const BLOCK: usize = 16;

/// One value for each channel of a block.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Row(pub [f32; BLOCK]);

impl Row {
    pub const ZERO: Self = Self([0.0; BLOCK]);

    /// Adds `other` channel by channel.
    pub fn add(&mut self, other: &Self) {
        for (x, y) in self.0.iter_mut().zip(other.0) {
            *x += y;
        }
    }

    /// Rounds the channels that `to` has room for.
    #[inline(always)]
    pub fn narrow<T: Element>(&self, to: &mut [T]) {
        match to.len() {
            // The common case, with a length known to the compiler.
            BLOCK => T::narrow(&self.0, &mut to[..BLOCK]),
            width => T::narrow(&self.0[..width], to),
        }
    }

    /// The row seen as vectors of `S`.
    #[inline(always)]
    pub fn vectors<S: Simd>(&self) -> &[S::f32s] {
        bytemuck::cast_slice(&self.0)
    }

    /// The row seen as vectors of `S`, to be written.
    #[inline(always)]
    pub fn vectors_mut<S: Simd>(&mut self) -> &mut [S::f32s] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

/// An instruction set that the CPU path has code for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// 16 lanes: x86-64-v4 (AVX-512 F, BW, CD, DQ and VL).
    Avx512,
    /// 8 lanes: x86-64-v3 (AVX2, FMA and F16C).
    Avx2,
    /// 4 lanes on AArch64.
    Neon,
    /// Plain code on any processor.
    Portable,
}

impl Isa {
    /// All instruction sets, the widest first.
    const ALL: [Self; 4] = [Self::Avx512, Self::Avx2, Self::Neon, Self::Portable];

    /// The widest instruction set of this processor, found once.
    pub fn best() -> Self {
        static BEST: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Self::available().next().unwrap_or(Self::Portable))
    }

    /// The instruction sets of this processor, the widest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => pulp::x86::V4::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => v3::is_available(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => pulp::aarch64::Neon::is_available(),
            Self::Portable => true,
            #[allow(unreachable_patterns, reason = "the sets of other architectures")]
            _ => false,
        }
    }

    /// Runs `kernel` compiled for this instruction set, or plain if the processor does not have it.
    #[inline(always)]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                if let Some(simd) = pulp::x86::V4::try_new() {
                    return simd.vectorize(Call(simd, kernel));
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                if v3::is_available()
                    && let Some(simd) = pulp::x86::V3::try_new()
                {
                    // SAFETY: the processor has been found to have all of these instructions.
                    return unsafe { v3::run(simd, kernel) };
                }
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => {
                if let Some(simd) = pulp::aarch64::Neon::try_new() {
                    return simd.vectorize(Call(simd, kernel));
                }
            }
            _ => {}
        }
        Call(pulp::Scalar128b, kernel).call()
    }
}

/// Code that is generic over the instruction set. Every function it calls must be `#[inline(always)]` to be compiled
/// for that set.
pub(crate) trait Kernel {
    type Output;

    fn run<S: Lanes>(self, simd: S) -> Self::Output;
}

struct Call<S, K>(S, K);

impl<S: Lanes, K: Kernel> NullaryFnOnce for Call<S, K> {
    type Output = K::Output;

    #[inline(always)]
    fn call(self) -> K::Output {
        self.1.run(self.0)
    }
}

/// Vectors of `f32` with what binary exponentials need.
///
/// An exponential `2^y` is kept as two parts, `k = round(y)` and `f = y - k`, because multiplying by `2^k` is exact.
pub(crate) trait Lanes: Simd {
    /// `a·b + c`, rounded once where the instruction set can.
    #[inline(always)]
    fn fma(self, a: Self::f32s, b: Self::f32s, c: Self::f32s) -> Self::f32s {
        self.mul_add_f32s(a, b, c)
    }

    /// `1/x` within a relative 2^-23, for a normal `x` whose reciprocal is normal.
    #[inline(always)]
    fn reciprocal(self, x: Self::f32s) -> Self::f32s {
        self.div_f32s(self.splat_f32s(1.0), x)
    }

    /// Bounds `x` to `low..=high`, keeping NaN.
    #[inline(always)]
    fn clamp(self, x: Self::f32s, low: f32, high: f32) -> Self::f32s {
        // x86 returns the second operand when either is NaN, and NEON returns NaN.
        let x = self.min_f32s(self.splat_f32s(high), x);
        self.max_f32s(self.splat_f32s(low), x)
    }

    /// `(k, f)` for any `y`; `k` is from -127 to 128, where [`Lanes::scale`] gives zero and infinity.
    #[inline(always)]
    fn split(self, y: Self::f32s) -> (Self::f32s, Self::f32s) {
        let y = self.clamp(y, -127.0, 128.0);
        // Adding 1.5·2^23 leaves no bits for a fraction.
        let magic = self.splat_f32s(12_582_912.0);
        let k = self.sub_f32s(self.add_f32s(y, magic), magic);
        (k, self.sub_f32s(y, k))
    }

    /// `x·2^k` for a `k` of [`Lanes::split`].
    #[inline(always)]
    fn scale(self, x: Self::f32s, k: Self::f32s) -> Self::f32s {
        self.mul_f32s(x, self.exp2_integer(k))
    }

    /// `2^k` for a `k` of [`Lanes::split`].
    #[inline(always)]
    fn exp2_integer(self, k: Self::f32s) -> Self::f32s {
        // The integer k + 127 stands in the low bits of this sum; moved up it is the exponent field.
        let biased = self.add_f32s(k, self.splat_f32s(12_582_912.0 + 127.0));
        let bits = self.transmute_u32s_f32s(biased);
        self.transmute_f32s_u32s(self.wrapping_dyn_shl_u32s(bits, self.splat_u32s(23)))
    }

    /// The first `F32_LANES` of `from`, exactly.
    #[inline(always)]
    fn widen_f16s(self, from: &[f16]) -> Self::f32s {
        load::widen_f16s(self, from)
    }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for pulp::x86::V4 {
    // One Newton step doubles the 14 bits of the estimate, in a third of a division's time.
    #[inline(always)]
    fn reciprocal(self, x: Self::f32s) -> Self::f32s {
        let estimate = bytemuck::cast(self.avx512f._mm512_rcp14_ps(bytemuck::cast(x)));
        let error = self.negate_mul_add_f32s(x, estimate, self.splat_f32s(1.0));
        self.fma(estimate, error, estimate)
    }

    // AVX-512 has the rest as an instruction, which takes any y: of an infinite one it is zero. (The integer has one too,
    // which takes twice as long as the difference.) Results below 2^-126 are subnormal rather than zero.
    #[inline(always)]
    fn split(self, y: Self::f32s) -> (Self::f32s, Self::f32s) {
        const NEAREST_EVEN_QUIET: i32 = 0x08;
        let f = bytemuck::cast(self.avx512dq._mm512_reduce_ps::<NEAREST_EVEN_QUIET>(bytemuck::cast(y)));
        (self.sub_f32s(y, f), f)
    }

    #[inline(always)]
    fn scale(self, x: Self::f32s, k: Self::f32s) -> Self::f32s {
        bytemuck::cast(self.avx512f._mm512_scalef_ps(bytemuck::cast(x), bytemuck::cast(k)))
    }

    #[inline(always)]
    fn exp2_integer(self, k: Self::f32s) -> Self::f32s {
        self.scale(self.splat_f32s(1.0), k)
    }

    #[inline(always)]
    fn widen_f16s(self, from: &[f16]) -> Self::f32s {
        let halves: [u16; 16] = bytemuck::pod_read_unaligned(bytemuck::cast_slice(&from[..16]));
        bytemuck::cast(self.avx512f._mm512_cvtph_ps(bytemuck::cast(halves)))
    }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for pulp::x86::V3 {
    #[inline(always)]
    fn widen_f16s(self, from: &[f16]) -> Self::f32s {
        let halves: [u16; 8] = bytemuck::pod_read_unaligned(bytemuck::cast_slice(&from[..8]));
        // SAFETY: kernels meet this set in `v3::run` alone, for which the processor must have F16C.
        bytemuck::cast(unsafe { std::arch::x86_64::_mm256_cvtph_ps(bytemuck::cast(halves)) })
    }
}

/// x86-64-v3 with F16C, which is a part of it that pulp leaves out.
#[cfg(target_arch = "x86_64")]
mod v3 {
    use super::{Kernel, Lanes};
    use pulp::x86::V3;

    pub fn is_available() -> bool {
        V3::is_available() && std::is_x86_feature_detected!("f16c")
    }

    /// Runs a kernel compiled for these instructions.
    ///
    /// # Safety
    /// [`is_available`] must hold.
    #[target_feature(enable = "sse,sse2,sse3,ssse3,sse4.1,sse4.2,fxsr,popcnt,avx,avx2,bmi1,bmi2,fma,lzcnt,f16c")]
    pub unsafe fn run<K: Kernel>(simd: V3, kernel: K) -> K::Output
    where
        V3: Lanes,
    {
        kernel.run(simd)
    }
}

#[cfg(target_arch = "aarch64")]
impl Lanes for pulp::aarch64::Neon {}

impl Lanes for pulp::Scalar128b {
    // Without the instruction, a fused multiply-add is a library call fifty times as slow.
    #[inline(always)]
    fn fma(self, a: Self::f32s, b: Self::f32s, c: Self::f32s) -> Self::f32s {
        self.add_f32s(self.mul_f32s(a, b), c)
    }

    // `f32::min` drops NaN, so the bounds are selected instead.
    #[inline(always)]
    fn clamp(self, x: Self::f32s, low: f32, high: f32) -> Self::f32s {
        let (low, high) = (self.splat_f32s(low), self.splat_f32s(high));
        let x = self.select_f32s(self.less_than_f32s(x, low), low, x);
        self.select_f32s(self.greater_than_f32s(x, high), high, x)
    }
}
