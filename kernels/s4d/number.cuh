// What becomes of a pair's parameters with its step size.
#pragma once
#include "../common/compiler.cuh"
#include "../common/number.cuh"
#include "params.cuh"

namespace s4d {

// A power that states are carried by: in f64, or in f32 with what rounding took from it, which would add up over the chunks.
template <typename R> struct Power;
template <> struct Power<double> {
    Number<double> value;

    __device__ __forceinline__ explicit Power(Number<double> value) : value(value) {}
    __device__ __forceinline__ Power conj() const { return Power(value.conj()); }
    __device__ __forceinline__ Number<double> advance(Number<double> x, Number<float> input) const {
        return multiply_add(value, x, Number<double>{input.re, input.im});
    }
};
template <> struct Power<float> {
    Number<float> value, rest;

    __device__ __forceinline__ explicit Power(Number<double> x)
        : value{static_cast<float>(x.re), static_cast<float>(x.im)},
          rest{static_cast<float>(x.re - value.re), static_cast<float>(x.im - value.im)} {}
    __device__ __forceinline__ Power(Number<float> value, Number<float> rest) : value(value), rest(rest) {}
    __device__ __forceinline__ Power conj() const { return {value.conj(), rest.conj()}; }
    __device__ __forceinline__ Number<float> advance(Number<float> x, Number<float> input) const {
        return multiply_add(value, x, multiply_add(rest, x, input));
    }
};

// The n-th power, for a whole n.
__device__ __forceinline__ Number<double> power(Number<double> x, uint64_t n) {
    Number<double> result = {1, 0};
    for (; n > 0; n >>= 1) {
        if (n & 1) result = result * x;
        x = x * x;
    }
    return result;
}

// (e^z - 1)/z, which is 1 at 0, without cancellation.
__device__ __forceinline__ Number<double> exp_m1_over(Number<double> z) {
    if (z.re == 0.0 && z.im == 0.0) return {1, 0};
    double sin, cos;
    sincos(z.im, &sin, &cos);
    const double half = ::sin(0.5 * z.im);
    return Number<double>{expm1(z.re) * cos - 2.0 * half * half, exp(z.re) * sin} / z;
}

// Its derivative, (e^z (z - 1) + 1)/z², which is 1/2 at 0. Below 1/4 the series is exact to 2^-53.
__device__ __forceinline__ Number<double> exp_m1_over_slope(Number<double> z) {
    if (z.re * z.re + z.im * z.im < 0.0625) {
        Number<double> sum = {0, 0}, power = {1, 0};
        double factorial = 2;
        for (int k = 0; k < 12; k++) {
            sum = sum + power * ((k + 1) / factorial);
            power = power * z;
            factorial *= k + 3;
        }
        return sum;
    }
    return (exponential(z) - exp_m1_over(z)) / z;
}

// A pair: its parameters, and A̅ with the weight of B.
struct Pair {
    double delta;
    Number<double> a, b, c, power, weight;

    __device__ __forceinline__ Pair(const Inputs &p, int64_t channel, int64_t pair) {
        const auto read = [&](const Matrix &from) {
            const float *at = from.data + channel * from.channel + 2 * pair * from.state;
            return Number<double>{at[0], at[from.state]};
        };
        delta = exp(static_cast<double>(p.log_delta.data[channel * p.log_delta.channel]));
        a = read(p.a), b = read(p.b), c = {0, 0};
        if (p.c.data) c = read(p.c);
        const Number<double> z = a * delta, one = {1, 0};
        if (p.rule == RULE_HOLD) {
            // What rounding takes from the angle is turned by as well.
            const double rest = fma(delta, a.im, -z.im);
            power = exponential(z) * Number<double>{1, rest};
            weight = exp_m1_over(z) * delta;
        } else if (p.rule == RULE_BILINEAR) {
            const Number<double> inverse = one / (one - z * 0.5);
            power = (one + z * 0.5) * inverse;
            weight = inverse * delta;
        } else {
            power = one + z;
            weight = {delta, 0};
        }
    }
};

}
