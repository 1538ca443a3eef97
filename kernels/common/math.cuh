// Exponentials and the functions made of them.
//
// Everything is written with explicit roundings (`fmaf` and compiled without contraction), so that two kernels that
// spell the same expression get the same bits.
#pragma once
#include "types.cuh"

namespace common {

constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LN_2 = 0.69314718055994530942f;

// 2^x within a relative 2^-22; subnormal results are zero. (Without `.ftz` each one drags in a compare and two
// multiplications.)
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1/x within a relative 2^-23; zero where that is subnormal.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Whether 2^x is so near 1 that a rounded decay drifts: it is multiplied in at every step, always with the same error where
// the step size is constant, and after 65,536 steps the third digit would be wrong. (Where it is not, a state is forgotten
// before 2^-22 for each step has added up to more than 2^-17.)
__device__ __forceinline__ bool is_near_one(float x) { return fabsf(x) < 0.0625f; }

// 2^x - 1 for an x whose power is near 1: a polynomial (tests/vectors/minimax.py) whose relative error is 2^-20 and vanishes
// with x.
__device__ __forceinline__ float exp2_minus_one_near(float x) {
    return x * fmaf(fmaf(0.055509318f, x, 0.2402544f), x, LN_2);
}

// 2^x - 1 without cancellation for small x.
__device__ __forceinline__ float exp2_minus_one(float x) {
    const float near = exp2_minus_one_near(x), far = exp2_fast(x) - 1.0f;
    return is_near_one(x) ? near : far;
}

// ln(1 + e^x), exact to the type that it is computed for: a minimax polynomial of ln(1 + e)/e on [0, 1] with a relative
// error of 2^-25 (f32) or 2^-19.6 (f16, bf16), which saves the special-function unit a logarithm. Above 20 it is the
// identity to the last bit.
template <typename T> __device__ __forceinline__ float softplus(float x) {
    const float e = exp2_fast(fabsf(x) * -LOG2_E);
    float p;
    if constexpr (sizeof(T) == 4) {
        p = fmaf(0.005232694f, e, -0.029505238f);
        p = fmaf(p, e, 0.07822595f);
        p = fmaf(p, e, -0.13663246f);
        p = fmaf(p, e, 0.19106007f);
        p = fmaf(p, e, -0.24842982f);
        p = fmaf(p, e, 0.33319098f);
        p = fmaf(p, e, -0.49999493f);
        p = fmaf(p, e, 0.99999994f);
    } else {
        p = fmaf(0.014141021f, e, -0.066401795f);
        p = fmaf(p, e, 0.14922386f);
        p = fmaf(p, e, -0.2350386f);
        p = fmaf(p, e, 0.3310945f);
        p = fmaf(p, e, -0.49986964f);
        p = fmaf(p, e, 0.99999875f);
    }
    return fmaf(e, p, fmaxf(x, 0.0f));
}

// The slope of softplus where its value is `y`: 1/(1 + e^-x) = 1 - e^-y.
template <typename T> __device__ __forceinline__ float softplus_slope(float y) {
    if constexpr (sizeof(T) == 4) return -exp2_minus_one(y * -LOG2_E);
    // Below 2^-6, where the difference would lose six bits, the series to y²/2: the next term is 2^-14.6 of it.
    const float near = fmaf(y * y, -0.5f, y), far = 1.0f - exp2_fast(y * -LOG2_E);
    return y < 0x1p-6f ? near : far;
}

// 1/(1 + e^-x)
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(x * -LOG2_E)); }

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// 1/A, which zero-order hold divides by: zero where A is as good as zero, and never zero where it is not.
__device__ __forceinline__ float hold_inverse(float a) {
    if (fabsf(a) < 1e-30f) return 0.0f;
    return fabsf(a) == INFINITY ? copysignf(0x1p-126f, a) : 1.0f / a;
}

// The slope of silu at `x`, whose sigmoid is `s`.
__device__ __forceinline__ float silu_slope(float x, float s) { return s * fmaf(x, 1.0f - s, 1.0f); }

// What a state is multiplied by in a step, from x = log2(e) Δ A. `Accurate` keeps it less 1 where it is near 1, and as it is
// elsewhere: less 1, a decay near zero would have no digits left.
//
// `Rest` is how it is known which of them it is: as a number, 1 or 0, where decays wait for states, for predicates are few;
// else as a bool, which takes no register.
template <bool Accurate, typename Rest = float> struct Decay {
    float value;
    // Whether `value` is less 1.
    Rest one;

    __device__ __forceinline__ explicit Decay(float x) : Decay(x, exp2_fast(x)) {}
    // The same where 2^x is known.
    __device__ __forceinline__ Decay(float x, float power) : value(power), one(0) {
        if constexpr (Accurate) {
            // Before the choice, which then needs no branch.
            const float near = exp2_minus_one_near(x);
            value = is_near_one(x) ? near : power;
            one = is_near_one(x) ? Rest(1) : Rest(0);
        }
    }

    // What is added to value · x for decay · x.
    __device__ __forceinline__ float rest(float x) const {
        if constexpr (sizeof(Rest) == 1) return one ? x : 0.0f;
        return one * x;
    }
    // decay · h
    __device__ __forceinline__ float of(float h) const { return Accurate ? fmaf(value, h, rest(h)) : value * h; }
    // decay · h + input, h rounded once.
    __device__ __forceinline__ float advance(float h, float input) const {
        const float change = fmaf(value, h, input);
        if constexpr (!Accurate) return change;
        if constexpr (sizeof(Rest) == 1) return rest(h) + change;
        return fmaf(one, h, change);
    }
    // The same, and what rounding takes from h is given back the next time: all of it where little is forgotten, else none.
    __device__ __forceinline__ void advance(float &h, float &lost, float input) const {
        const float unchanged = rest(h), change = fmaf(value, h, input + rest(lost));
        h = unchanged + change;
        lost = change - (h - unchanged);
    }
    // decay - 1
    __device__ __forceinline__ float minus_one() const { return value + (static_cast<float>(one) - 1.0f); }
};

}
