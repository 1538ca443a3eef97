// Sums over the first dimension of (parts, m) f32, in an order that follows from the shape alone.
#include "pool.cuh"

struct Sum {
    const float *from;
    void *to;
    // `stride` lies between the parts. Each row of blocks sums `slice` parts and leaves m sums.
    int64_t parts, m, stride, slice;
    // Threads of a block that share a column's parts, a power of two up to THREADS, as a shift.
    int64_t row_shift;
};
static_assert(sizeof(Sum) == 56, "as in src/cuda/params.rs");

constexpr int THREADS = 256;
constexpr int QUAD = 4;
// Loads that are in flight together.
constexpr int AHEAD = 4;

template <typename T, bool WHOLE> __device__ __forceinline__ void sum(const Sum &p) {
    const int rows = 1 << p.row_shift, columns = THREADS >> p.row_shift;
    const int row = threadIdx.x / columns, column = threadIdx.x % columns;
    __shared__ float partial[QUAD][THREADS];
    const int64_t end = min(p.parts, (int64_t(blockIdx.y) + 1) * p.slice);
    for (int64_t first = int64_t(blockIdx.x) * columns * QUAD; first < p.m; first += int64_t(gridDim.x) * columns * QUAD) {
        const int64_t i = first + column * QUAD;
        const int count = static_cast<int>(max(int64_t(0), min(p.m - i, int64_t(QUAD))));
        float total[QUAD] = {};
        for (int64_t part = int64_t(blockIdx.y) * p.slice + row; part < end; part += AHEAD * rows) {
            Pack<float, QUAD> next[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                const bool there = part + k * rows < end;
                next[k] = load<float, QUAD, WHOLE>(p.from + (part + k * rows) * p.stride + i, 1, there ? count : 0);
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
            T *to = static_cast<T *>(p.to) + int64_t(blockIdx.y) * p.m + i;
            put<T, QUAD, WHOLE>(to, 1, pack<T, QUAD>(total), count);
        }
    }
}

#define INSTANCES(SUFFIX, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) sum_whole_##SUFFIX(const __grid_constant__ Sum params) {     \
        sum<T, true>(params);                                                                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) sum_strided_##SUFFIX(const __grid_constant__ Sum params) {   \
        sum<T, false>(params);                                                                                         \
    }

INSTANCES(f32, float)
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)
