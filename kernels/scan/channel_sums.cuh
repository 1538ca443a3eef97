// Sums over channels on the tensor cores.
#pragma once
#include "../common/mma.cuh"
#include "../common/types.cuh"
#include "params.cuh"

namespace scan {

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

// The sums over a warp's channels of what each step of a tile of 8 adds to ∂B and ∂C, for the states of a group of lanes.
//
// Lanes that differ in the lowest two bits meet in a sum of the tensor cores, those that differ in the third in neighbouring
// columns of it. So a lane's sums are those of its state group, in two rows, one for each half of the warp's channels; the
// halves' lanes share the steps. Columns are the steps, first of ∂B and then of ∂C:
//
//   lane % 4       0      1      2      3
//   d[half][pair]  steps  steps  steps  steps     of this half of the tile:
//   [0], [2]       ∂B 0   ∂B 2   ∂C 0   ∂C 2      of the lower half of the channels, of the upper
//   [1], [3]       ∂B 1   ∂B 3   ∂C 1   ∂C 3
template <typename T> struct ChannelSums {
    // Of each half of the tile and each pair of states.
    float d[2][2][4] = {};

    // Adds the terms of step `t`: of each pair of states two of ∂B and two of ∂C.
    __device__ __forceinline__ void add(int lane, int t, const float (&terms)[2][4]) {
        const float first = lane / 4 == t % 4 ? 1.0f : 0.0f;
        const float second = lane / 4 == 4 + t % 4 ? 1.0f : 0.0f;
        sum_channels<T>(d[t / 4][0], terms[0], first, second);
        sum_channels<T>(d[t / 4][1], terms[1], first, second);
    }

    // Puts sums of the terms of step `t` alone in the place of those that there are: where a product of zero and infinity has
    // spread over the columns.
    __device__ __forceinline__ void replace(int lane, int t, const float (&terms)[2][4]) {
        const float first = lane / 4 == t % 4 ? 1.0f : 0.0f;
        const float second = lane / 4 == 4 + t % 4 ? 1.0f : 0.0f;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            float of_b[4] = {}, of_c[4] = {};
            sum_channels<T>(of_b, {terms[k][0], terms[k][1], 0.0f, 0.0f}, first, second);
            sum_channels<T>(of_c, {0.0f, 0.0f, terms[k][2], terms[k][3]}, first, second);
            // Into the column that the step has: its lanes, and the even or the odd of their two.
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const bool has = lane % 2 == t % 4 / 2 && j % 2 == t % 2 && j / 4 == t / 4;
                const float one = lane % 4 < 2 ? of_b[j % 4] : of_c[j % 4];
                if (has) d[j / 4][k][j % 4] = one;
            }
        }
    }

    // The sums over both halves of the channels: of step sum_step(lane) in each half of the tile, for the 4 states.
    __device__ __forceinline__ void total(int lane, float (&totals)[2][STATE_VEC]) const {
        const int upper = lane / 4 % 2;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const float(&pair)[4] = d[k / 4][k / 2 % 2];
            const float even = pair[k % 2 * 2], odd = pair[k % 2 * 2 + 1];
            totals[k / 4][k % 4] = (upper ? odd : even) + __shfl_xor_sync(~0u, upper ? even : odd, 4);
        }
    }

    // Whether `totals` has no infinity and no NaN.
    static __device__ __forceinline__ bool are_finite(const float (&totals)[2][STATE_VEC]) {
        float zero = 0.0f;
#pragma unroll
        for (int k = 0; k < 8; k++) zero = fmaf(totals[k / 4][k % 4], 0.0f, zero);
        return zero == 0.0f;
    }
};

// The step of each half of a tile whose totals a lane gets, and whether they are ∂C's.
__device__ __forceinline__ int sum_step(int lane) { return lane % 2 * 2 + lane / 4 % 2; }
__device__ __forceinline__ int sum_of_c(int lane) { return lane / 2 % 2; }

}
