// The filters of the causal convolution, in registers.
#pragma once
#include "math.cuh"
#include "tensor.cuh"

// `COUNT` neighbouring channels. Kernels are made for widths up to `MOST`: a narrower filter's weights are the last of
// `weight`, behind `gap` that are not to be used (a product with zero would spread NaN).
template <int MOST, int COUNT> struct Filter {
    float weight[MOST][COUNT], bias[COUNT];
    int gap;

    __device__ __forceinline__ Filter(const Matrix &weights, const Vector &biases, int64_t width, int64_t d, int count)
        : gap(MOST - static_cast<int>(width)) {
#pragma unroll
        for (int c = 0; c < COUNT; c++) {
            bias[c] = c < count ? biases.at(d + c, 0.0f) : 0.0f;
            const float *at = weights.data + (d + c) * weights.channel;
#pragma unroll
            for (int k = 0; k < MOST; k++) {
                weight[k][c] = c < count && k >= gap ? at[(k - gap) * weights.state] : 0.0f;
            }
        }
    }

    // Whether there is such a weight; the last two there always are.
    __device__ __forceinline__ bool has(int k) const { return k >= MOST - 2 || k >= gap; }

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
