// Sums over the first dimension of (parts, m) f32, in an order that follows from the shape alone.
#include "params.cuh"
#include "vector_io.cuh"

namespace common::reduce_partials {

using Partial = float[QUAD][THREADS];
template <typename T, bool VECTOR> __device__ __forceinline__ void sum(const Sum &p, Partial &partial) {
    const int rows = 1 << p.row_shift, columns = THREADS >> p.row_shift;
    const int row = threadIdx.x / columns, column = threadIdx.x % columns;
    for (int64_t first = (blockIdx.x - p.first_block) * columns * QUAD; first < p.m; first += p.blocks * columns * QUAD) {
        const int64_t i = first + column * QUAD;
        const int count = static_cast<int>(max(int64_t(0), min(p.m - i, int64_t(QUAD))));
        float total[QUAD] = {};
        for (int64_t part = row; part < p.parts; part += AHEAD * rows) {
            Pack<float, QUAD> next[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                const bool there = part + k * rows < p.parts;
                next[k] = load_vec<float, QUAD, VECTOR>(p.from + (part + k * rows) * p.stride + i, 1, there ? count : 0);
            }
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
#pragma unroll
                for (int c = 0; c < QUAD; c++) total[c] += next[k][c];
            }
        }
        for (int half = rows >> 1; half > 0; half >>= 1) {
            // The upper half hands its sums to the lower.
            if (row >= half && row < 2 * half) {
#pragma unroll
                for (int c = 0; c < QUAD; c++) partial[c][threadIdx.x] = total[c];
            }
            __syncthreads();
            if (row < half) {
#pragma unroll
                for (int c = 0; c < QUAD; c++) total[c] += partial[c][threadIdx.x + half * columns];
            }
            __syncthreads();
        }
        if (row == 0) {
            store_vec<T, QUAD, VECTOR>(static_cast<T *>(p.to) + i, 1, narrow_pack<T>(total), count);
        }
    }
}

template <typename T> __device__ __forceinline__ void sums(const Sums &p) {
    __shared__ Partial partial;
    int k = 0;
    while (k + 1 < p.count && blockIdx.x >= p.sums[k + 1].first_block) k++;
    const Sum &of = p.sums[k];
    if (of.flags & FLAG_F32) {
        of.flags & FLAG_VECTOR ? sum<float, true>(of, partial) : sum<float, false>(of, partial);
    } else {
        of.flags & FLAG_VECTOR ? sum<T, true>(of, partial) : sum<T, false>(of, partial);
    }
}

#define INSTANCE(SUFFIX, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) reduce_partials_##SUFFIX(const __grid_constant__ Sums params) {\
        sums<T>(params);                                                                                               \
    }

INSTANCE(f32, float)
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)

}
