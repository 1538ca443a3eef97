// One step of a channel: what it reads, and what a state makes of it. All arithmetic is f64, so that errors do not add up over
// the steps.
#pragma once
#include "../common/number.cuh"
#include "../common/tensor.cuh"
#include "params.cuh"

namespace complex_scan {

__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// ln(1 + e^x), the identity above 20.
__device__ __forceinline__ double softplus(double x) { return x > 20.0 ? x : log1p(exp(x)); }
__device__ __forceinline__ double softplus_slope(double x) { return x > 20.0 ? 1.0 : sigmoid(x); }

// Where a step of a channel lies.
struct Place {
    int64_t row, step, channel, group;
};

template <typename T> __device__ __forceinline__ double element(const Activation &from, const Place &at) {
    return widen(static_cast<const T *>(from.data)[at.row * from.batch + at.step * from.step + at.channel * from.channel]);
}

// The `n`-th complex number from `at` on.
template <typename E> __device__ __forceinline__ Number<double> number_at(const E *at, int64_t n, int64_t stride) {
    at += 2 * n * stride;
    return {widen(at[0]), widen(at[stride])};
}
__device__ __forceinline__ Number<double> number_of(const Matrix &from, int64_t channel, int64_t n) {
    return number_at(from.data + channel * from.channel, n, from.state);
}
// A state, or zero if there are none.
__device__ __forceinline__ Number<double> number_of(const States &from, int64_t sequence, int64_t channel, int64_t n) {
    if (!from.data) return {0, 0};
    return number_at(from.data + sequence * from.sequence + channel * from.channel, n, from.state);
}
// B or C.
template <typename T> __device__ __forceinline__ Number<double> number_of(const Projection &from, const Place &at, int64_t n) {
    if (from.constant) return number_at(static_cast<const float *>(from.data) + at.channel * from.channel, n, from.state);
    const T *const data = static_cast<const T *>(from.data) + at.row * from.batch + at.step * from.step + at.group * from.group;
    return number_at(data, n, from.state);
}
__device__ __forceinline__ void write(float *to, Number<double> x) {
    to[0] = static_cast<float>(x.re), to[1] = static_cast<float>(x.im);
}

// What a step does to the states of its channel.
struct Step {
    double delta, u;

    // exp(ΔA)
    __device__ __forceinline__ Number<double> decay(Number<double> a) const { return exponential(a * delta); }
    __device__ __forceinline__ Number<double> advance(Number<double> decay, Number<double> h, Number<double> b) const {
        return multiply_add(decay, h, b * (delta * u));
    }
};

// A step of a channel as it is read, of any operator with these inputs.
struct Read {
    Step step;
    // The slope of Δ by what it was before softplus.
    double slope;

    template <typename T, typename Inputs>
    static __device__ __forceinline__ Read of(const Inputs &p, const Place &at) {
        const double raw = element<T>(p.delta, at) + static_cast<double>(element_or(p.delta_bias, at.channel, 0.0f));
        const bool plus = p.flags & FLAG_SOFTPLUS;
        return {{plus ? softplus(raw) : raw, element<T>(p.u, at)}, plus ? softplus_slope(raw) : 1.0};
    }
};

// Re(x y)
__device__ __forceinline__ double real_product(Number<double> x, Number<double> y) { return fma(-x.im, y.im, x.re * y.re); }

// y of a step, from its sum over the states. Without D nothing goes past the states, not even the NaN of zero times infinity.
__device__ __forceinline__ double with_skip(double sum, const Vector &d, int64_t channel, double u) {
    return d.data ? fma(static_cast<double>(element_or(d, channel, 0.0f)), u, 2.0 * sum) : 2.0 * sum;
}

}
