// The squares of many gradients, summed: each block leaves a partial sum, which `begin` adds up, all in a fixed order.
// Sums are f64, in which no square of a finite gradient overflows or vanishes.
#include "../common/entries.cuh"
#include "params.cuh"

namespace optimizer::squares {

// The thread's share of a block's elements. `VECTOR` says that they are aligned quads.
template <typename G, bool VECTOR> __device__ __forceinline__ double share(const G *from, int count) {
    double sum = 0;
#pragma unroll 4
    for (int i = threadIdx.x * QUAD; i < count; i += THREADS * QUAD) {
        const Pack<G, QUAD> quad = load_vec<G, QUAD, VECTOR>(from + i, 1, min(count - i, QUAD));
#pragma unroll
        for (int k = 0; k < QUAD; k++) {
            const double x = quad[k];
            sum += x * x;
        }
    }
    return sum;
}

template <typename G> __device__ __forceinline__ double share(const Gradient &of) {
    const int64_t first = int64_t(static_cast<int>(blockIdx.x) - of.first_block) * SUM_CHUNK;
    const G *from = static_cast<const G *>(of.data) + first;
    const int count = static_cast<int>(min(of.count - first, int64_t(SUM_CHUNK)));
    return is_aligned(from) && count % QUAD == 0 ? share<G, true>(from, count) : share<G, false>(from, count);
}

extern "C" __global__ void __launch_bounds__(THREADS) optimizer_squares(const __grid_constant__ Squares p) {
    __shared__ double shares[THREADS];
    const Gradient &of = entry_of_block(p.gradients, p.count);
    double sum;
    switch (of.dtype) {
    case TYPE_F16: sum = share<__half>(of); break;
    case TYPE_BF16: sum = share<__nv_bfloat16>(of); break;
    default: sum = share<float>(of);
    }
    shares[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shares[threadIdx.x] += shares[threadIdx.x + half];
    }
    if (threadIdx.x == 0) p.partials[blockIdx.x] = shares[0];
}

}
