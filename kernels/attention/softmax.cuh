// The softmax of rows whose scores come a tile of keys at a time.
#pragma once
#include "../common/math.cuh"
#include "sequences.cuh"

namespace attention {

// The most, and the sum, of what the four lanes have that share a row.
__device__ __forceinline__ float max_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float sum_of_row(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// Rows g and g + 8 of each tile of 16, as the tensor cores hold results.
template <int TILES> struct Softmax {
    // The most of the scores so far, in units of log2, and this lane's part of the sum of what was made of them.
    float most[TILES][2], sum[TILES][2];

    __device__ __forceinline__ Softmax() {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int i = 0; i < 2; i++) most[tile][i] = -INFINITY, sum[tile][i] = 0.0f;
        }
    }

    // Makes weights of scores, which are multiplied by `exponent`, and brings `out` beside the same most. A row sees the keys of
    // columns less than its limit.
    template <bool IS_CUT, int COLUMNS, int PARTS>
    __device__ __forceinline__ void advance(float (&scores)[TILES][COLUMNS][4], float (&out)[TILES][PARTS][4],
                                            const int (&limits)[TILES][2], float exponent) {
        const int column_of_lane = threadIdx.x % 4 * 2;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float top = -INFINITY;
#pragma unroll
                for (int column = 0; column < COLUMNS; column++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float &score = scores[tile][column][2 * i + j];
                        if (IS_CUT && 8 * column + column_of_lane + j >= limits[tile][i]) score = -INFINITY;
                        top = fmaxf(top, score);
                    }
                }
                const float most_now = fmaxf(most[tile][i], max_of_row(top) * exponent);
                // Of a row that has seen nothing yet all weights are zero.
                const float from = most_now == -INFINITY ? 0.0f : most_now;
                const float decay = exp2_fast(most[tile][i] - from);
                most[tile][i] = most_now;
                float more = 0.0f;
#pragma unroll
                for (int column = 0; column < COLUMNS; column++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float &score = scores[tile][column][2 * i + j];
                        score = exp2_fast(fmaf(score, exponent, -from));
                        more += score;
                    }
                }
                sum[tile][i] = fmaf(sum[tile][i], decay, more);
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
#pragma unroll
                    for (int j = 0; j < 2; j++) out[tile][part][2 * i + j] *= decay;
                }
            }
        }
    }
};

// The logarithm of a sum of exponentials of which the most, in units of log2, was divided out.
__device__ __forceinline__ float log_of_sum(float most, float sum) { return fmaf(most, LN_2, logf(sum)); }

}
