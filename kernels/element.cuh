// Element types: how activations are stored, and pairs of neighbouring elements.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest, ties to even.
template <typename T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// `COUNT` neighbouring elements, 2 or 4, in the whole registers they are loaded into.
template <int BYTES> struct Registers;
template <> struct Registers<4> { using type = uint32_t; };
template <> struct Registers<8> { using type = uint2; };
template <> struct Registers<16> { using type = uint4; };

template <typename T, int COUNT> struct Pack {
    typename Registers<sizeof(T) * COUNT>::type raw;

    __device__ __forceinline__ uint32_t word(int i) const { return reinterpret_cast<const uint32_t *>(&raw)[i]; }
    __device__ __forceinline__ uint32_t &word(int i) { return reinterpret_cast<uint32_t *>(&raw)[i]; }

    // Element `i`, which must be known to the compiler.
    __device__ __forceinline__ float operator[](int i) const;
};

__device__ __forceinline__ float low(uint32_t both, __half) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(both)));
}
__device__ __forceinline__ float high(uint32_t both, __half) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(both >> 16)));
}
// A bf16 is the upper half of an f32: shifting beats converting.
__device__ __forceinline__ float low(uint32_t both, __nv_bfloat16) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float high(uint32_t both, __nv_bfloat16) { return __uint_as_float(both & 0xffff0000u); }

template <typename T, int COUNT> __device__ __forceinline__ float Pack<T, COUNT>::operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
        return __uint_as_float(word(i));
    } else {
        return i % 2 ? high(word(i / 2), T()) : low(word(i / 2), T());
    }
}

// Two elements, rounded to nearest with ties to even, in one register.
__device__ __forceinline__ uint32_t narrow_pair(float x, float y, __half) {
    const __half2 both = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t *>(&both);
}
__device__ __forceinline__ uint32_t narrow_pair(float x, float y, __nv_bfloat16) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t *>(&both);
}

// The first `count` of the elements at `p` and `stride` apart behind it, zero beyond. `WHOLE` says that there are all or
// none of them, side by side and aligned.
template <typename T, int COUNT, bool WHOLE>
__device__ __forceinline__ Pack<T, COUNT> load(const T *p, int64_t stride, int count) {
    Pack<T, COUNT> pack = {};
    if constexpr (WHOLE) {
        if (count > 0) pack.raw = *reinterpret_cast<const decltype(pack.raw) *>(p);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (i >= count) break;
            if constexpr (sizeof(T) == 4) {
                pack.word(i) = __float_as_uint(p[i * stride]);
            } else {
                const uint32_t bits = *reinterpret_cast<const uint16_t *>(p + i * stride);
                pack.word(i / 2) |= i % 2 ? bits << 16 : bits;
            }
        }
    }
    return pack;
}

// Rounds and writes the first `count` of four neighbouring elements.
template <typename T, bool WHOLE> __device__ __forceinline__ void store(T *p, const float (&value)[4], int count) {
    if constexpr (WHOLE) {
        if (count <= 0) return;
        if constexpr (sizeof(T) == 4) {
            *reinterpret_cast<float4 *>(p) = {value[0], value[1], value[2], value[3]};
        } else {
            *reinterpret_cast<uint2 *>(p) = {narrow_pair(value[0], value[1], T()), narrow_pair(value[2], value[3], T())};
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i < count) p[i] = narrow<T>(value[i]);
        }
    }
}
