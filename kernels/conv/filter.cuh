// The filters of the causal convolution, in registers.
#pragma once
#include "../common/lane_map.cuh"
#include "../common/math.cuh"
#include "../common/tensor.cuh"
#include "params.cuh"

namespace conv {

// The lanes of a row of threads lie along the channels, rows along the runs or the batch.
static_assert(is_bijection_in_rows<THREADS>());

// `COUNT` neighbouring channels. Kernels are made for widths from `LEAST` to `MOST`: a narrower filter's weights are the
// last of `weight`, after `gap` that are not to be used (a product with zero would spread NaN).
template <int LEAST, int MOST, int COUNT> struct Filter {
    float weight[MOST][COUNT], bias[COUNT];
    int gap;

    __device__ __forceinline__ Filter(const Matrix &weights, const Vector &biases, int64_t width, int64_t d, int count)
        : gap(LEAST == MOST ? 0 : MOST - static_cast<int>(width)) {
        // The weights of a channel contiguous and aligned, as they usually are.
        const bool whole = LEAST == MOST && MOST == 4 && weights.state == 1 && weights.channel % 4 == 0 &&
                           reinterpret_cast<uint64_t>(weights.data) % 16 == 0;
#pragma unroll
        for (int c = 0; c < COUNT; c++) {
            bias[c] = c < count ? element_or(biases, d + c, 0.0f) : 0.0f;
            const float *at = weights.data + (d + c) * weights.channel;
            if (whole) {
                const Pack<float, 4> all = load_vec<float, 4, true>(at, 1, c < count ? 4 : 0);
#pragma unroll
                for (int k = 0; k < MOST; k++) weight[k][c] = all[k % 4];
            } else {
#pragma unroll
                for (int k = 0; k < MOST; k++) {
                    weight[k][c] = c < count && has(k) ? at[(k - gap) * weights.state] : 0.0f;
                }
            }
        }
    }

    // Whether there is such a weight.
    __device__ __forceinline__ bool has(int k) const { return k >= MOST - LEAST || k >= gap; }

    // bias + Σ weight_k window_k
    __device__ __forceinline__ float apply(const float (*window)[COUNT], int c) const {
        float sum = bias[c];
#pragma unroll
        for (int k = 0; k < MOST; k++) {
            if (has(k)) sum = fmaf(weight[k][c], window[k][c], sum);
        }
        return sum;
    }
};

}
