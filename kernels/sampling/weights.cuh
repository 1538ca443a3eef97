// The arithmetic that processors and GPUs share, bit for bit: src/sampling/weights.rs and random.rs are the same in
// Rust; what one changes, the other must. (Products and sums are rounded one by one, as everything is compiled without
// contraction.)
#pragma once
#include "params.cuh"
#include <float.h>

namespace sampling {

// The weight of the likeliest token is 2^WEIGHT_BITS.
constexpr int WEIGHT_BITS = 40;

// 2^t, in units of 2^-40, for a t that is at most 0: within a relative 2^-20, and rounded down.
__device__ __forceinline__ uint64_t weight(float t) {
    // 1.5·2^23: adding it leaves no bits for a fraction.
    constexpr float MAGIC = 12582912.0f;
    // From 2^-41 on all are zero.
    t = fmaxf(t, -60.0f);
    const float shifted = t + MAGIC, whole = shifted - MAGIC, f = t - whole;
    float sum = 0.0013298347f;
    sum = sum * f + 0.009669283f;
    sum = sum * f + 0.055505637f;
    sum = sum * f + 0.2402229f;
    sum = sum * f + 0.69314718055994530942f;
    const float power = 1.0f + sum * f;
    // From 0.7 to 1.42, so that the product fits 31 bits.
    const uint64_t fixed = static_cast<uint32_t>(__float2int_rz(power * 0x1p30f));
    return (fixed << (WEIGHT_BITS - 30)) >> ((__float_as_uint(MAGIC) - __float_as_uint(shifted)) & 63);
}

// What distances from the highest logit are multiplied by: log2(e) over the temperature. Finite, so that a distance of
// zero stays zero.
__device__ __forceinline__ float scale_of(float temperature) {
    return fminf(__fdiv_rn(1.44269504088896340736f, temperature), FLT_MAX);
}

// A logit after the penalty of a token that has occurred. What is finite stays so.
__device__ __forceinline__ float penalised(float x, float penalty) {
    const float y = x > 0.0f ? __fdiv_rn(x, penalty) : x * penalty;
    return x == -INFINITY ? x : fminf(fmaxf(y, -FLT_MAX), FLT_MAX);
}

// A number that is greater for a greater logit, and the same for 0 and -0; and the logit again.
__device__ __forceinline__ uint32_t key_of(float y) {
    const uint32_t bits = __float_as_uint(y + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(uint32_t key) {
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// The least sum of weights that the likeliest tokens must have by top-p, of `total` for all.
__device__ __forceinline__ uint64_t nucleus(float top_p, uint64_t total) {
    const uint64_t part = static_cast<uint64_t>(top_p * 0x1p32f);
    const uint64_t least = (__umul64hi(part, total) << 32) | ((part * total) >> 32);
    return least > 1 ? least : 1;
}

// The least weight of a token by min-p.
__device__ __forceinline__ uint64_t least_weight(float min_p) { return static_cast<uint64_t>(min_p * 0x1p40f); }

// Whether the settings are numbers by which tokens can be chosen.
__device__ __forceinline__ bool is_valid(const Settings &s) {
    return s.temperature >= 0 && s.temperature < INFINITY && s.top_p > 0 && s.top_p <= 1 && s.min_p >= 0 &&
           s.min_p <= 1 && s.repetition_penalty > 0 && s.repetition_penalty < INFINITY;
}

// The random number of a sequence at a position, 64 bits of Philox 4x32-10.
__device__ __forceinline__ uint64_t uniform(uint64_t seed, uint64_t position) {
    uint32_t a = static_cast<uint32_t>(position), b = static_cast<uint32_t>(position >> 32), c = 0, d = 0;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t product0 = uint64_t(0xd2511f53u) * a, product1 = uint64_t(0xcd9e8d57u) * c;
        a = static_cast<uint32_t>(product1 >> 32) ^ b ^ key0, b = static_cast<uint32_t>(product1);
        c = static_cast<uint32_t>(product0 >> 32) ^ d ^ key1, d = static_cast<uint32_t>(product0);
        key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
    }
    return uint64_t(b) << 32 | a;
}

}
