// Sums over channels on the tensor cores.
#pragma once
#include "../common/mma.cuh"
#include "../common/types.cuh"

namespace scan {

using namespace common;

// Whether terms are summed in two parts, see sum_channels.
template <typename T> constexpr bool TWO_PARTS = true;
template <> constexpr bool TWO_PARTS<__nv_bfloat16> = false;

// Adds `terms`, summed over the lanes that differ in the lowest two bits, to D on the tensor cores, rounded to 10-bit
// mantissas. The terms are A, of which those lanes hold columns; a row of D gets their sum. B chooses D's column: `first` that
// of the first two of `terms`, `second` that of the other two; 1 in the lanes that hold the column, else 0.
__device__ __forceinline__ void add_selected(float (&d)[4], const float (&terms)[4], float first, float second) {
    mma_tf32(d, terms, first, second);
}

// add_selected, exact enough for the type that the result is rounded to: a truncated term is off by less than 2^-10, which
// rounding to bf16 hides; for f16 and f32 the rest of each term is summed as well.
template <typename T>
__device__ __forceinline__ void sum_channels(float (&d)[4], const float (&terms)[4], float first, float second) {
    if constexpr (TWO_PARTS<T>) {
        float upper[4], lower[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            upper[i] = __uint_as_float(__float_as_uint(terms[i]) & 0xffffe000u);
            lower[i] = terms[i] - upper[i];
        }
        add_selected(d, upper, first, second);
        add_selected(d, lower, first, second);
    } else {
        add_selected(d, terms, first, second);
    }
}

}
