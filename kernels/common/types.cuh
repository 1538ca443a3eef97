// Element types: how activations are stored, and pairs of neighbouring elements.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace common {

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

// Element `i` of both, interleaved.
template <typename T, int COUNT>
__device__ __forceinline__ Pack<T, 2> pair_up(const Pack<T, COUNT> &x, const Pack<T, COUNT> &y, int i) {
    Pack<T, 2> both;
    if constexpr (sizeof(T) == 4) {
        both.raw = {x.word(i), y.word(i)};
    } else {
        both.raw = __byte_perm(x.word(i / 2), y.word(i / 2), i % 2 ? 0x7632 : 0x5410);
    }
    return both;
}

// Eight elements, as they are moved: 16 bytes at a time.
template <typename T> struct alignas(16) Pack<T, 8> {
    Pack<T, 4> halves[2];
    __device__ __forceinline__ const Pack<T, 4> &half(int i) const { return halves[i]; }
};

// Four elements of two pairs.
template <typename T> __device__ __forceinline__ Pack<T, 4> join(const Pack<T, 2> &x, const Pack<T, 2> &y) {
    Pack<T, 4> both;
    constexpr int WORDS = sizeof(T) / 2;
#pragma unroll
    for (int i = 0; i < WORDS; i++) both.word(i) = x.word(i), both.word(WORDS + i) = y.word(i);
    return both;
}

// Rounds neighbouring elements.
template <typename T, int COUNT> __device__ __forceinline__ Pack<T, COUNT> narrow_pack(const float (&value)[COUNT]) {
    Pack<T, COUNT> packed;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) packed.word(i) = __float_as_uint(value[i]);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) packed.word(i / 2) = narrow_pair(value[i], value[i + 1], T());
    }
    return packed;
}

}
