// Begins a step, in one block: the norm of all gradients, whether the step is taken, and what it multiplies by. All of it stays
// on the device.
#include "params.cuh"

namespace optimizer::begin {

// `base` to the power `n`, by the products that the processor's path takes, and so with its bits.
__device__ __forceinline__ double power(double base, int64_t n) {
    double result = 1;
    for (; n > 0; n /= 2) {
        if (n % 2 == 1) result *= base;
        base *= base;
    }
    return result;
}

__device__ __forceinline__ void finish(const Begin &p, double total) {
    const bool is_taken = isfinite(total);
    const float scale = *p.scale;
    const double divisor = scale * p.divisor, norm = sqrt(total) / divisor;
    const int64_t taken = p.counts[COUNT_TAKEN] + is_taken;
    int64_t streak = is_taken ? p.counts[COUNT_STREAK] + 1 : 0;
    float next = scale;
    if (p.interval > 0 && !is_taken) {
        next = fmaxf(scale * 0.5f, 1.0f);
    } else if (p.interval > 0 && streak >= p.interval) {
        next = fminf(scale * 2.0f, static_cast<float>(MOST_SCALE));
        streak = 0;
    }
    const double clipped = p.clip > 0 && norm > p.clip ? p.clip / norm : 1;
    p.factors->gradient = static_cast<float>(clipped / divisor);
    p.factors->root = static_cast<float>(1 / sqrt(1 - power(p.beta2, taken)));
    p.factors->correction = 1 - power(p.beta1, taken);
    p.factors->is_taken = is_taken;
    *p.norm = static_cast<float>(norm);
    *p.scale = next;
    p.counts[COUNT_TAKEN] = taken;
    p.counts[COUNT_SKIPPED] += !is_taken;
    p.counts[COUNT_STREAK] = streak;
}

extern "C" __global__ void __launch_bounds__(TOTAL_THREADS) optimizer_begin(const __grid_constant__ Begin p) {
    __shared__ double shares[TOTAL_THREADS];
    double sum = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < p.count; i += TOTAL_THREADS) sum += p.partials[i];
    shares[threadIdx.x] = sum;
    for (int half = TOTAL_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shares[threadIdx.x] += shares[threadIdx.x + half];
    }
    if (threadIdx.x == 0) finish(p, shares[0]);
}

}
