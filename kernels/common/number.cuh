// Complex numbers.
#pragma once

namespace common {

template <typename R> struct Number {
    R re, im;

    __device__ __forceinline__ Number conj() const { return {re, -im}; }
};

__device__ __forceinline__ float multiply_add(float x, float y, float z) { return fmaf(x, y, z); }
__device__ __forceinline__ double multiply_add(double x, double y, double z) { return fma(x, y, z); }

// x y + z
template <typename R> __device__ __forceinline__ Number<R> multiply_add(Number<R> x, Number<R> y, Number<R> z) {
    return {multiply_add(-x.im, y.im, multiply_add(x.re, y.re, z.re)), multiply_add(x.im, y.re, multiply_add(x.re, y.im, z.im))};
}
template <typename R> __device__ __forceinline__ Number<R> operator*(Number<R> x, Number<R> y) {
    return multiply_add(x, y, Number<R>{0, 0});
}
template <typename R> __device__ __forceinline__ Number<R> operator*(Number<R> x, R y) { return {x.re * y, x.im * y}; }
template <typename R> __device__ __forceinline__ Number<R> operator+(Number<R> x, Number<R> y) {
    return {x.re + y.re, x.im + y.im};
}
template <typename R> __device__ __forceinline__ Number<R> operator-(Number<R> x, Number<R> y) {
    return {x.re - y.re, x.im - y.im};
}
// The quotient by parts of y's size, which no square overflows.
__device__ __forceinline__ Number<double> operator/(Number<double> x, Number<double> y) {
    const double size = fmax(fabs(y.re), fabs(y.im));
    const Number<double> unit = {y.re / size, y.im / size};
    const double norm = unit.re * unit.re + unit.im * unit.im;
    const Number<double> product = x * unit.conj();
    return {product.re / norm / size, product.im / norm / size};
}

__device__ __forceinline__ Number<double> exponential(Number<double> z) {
    double sin, cos;
    sincos(z.im, &sin, &cos);
    const double size = exp(z.re);
    return {size * cos, size * sin};
}

}
