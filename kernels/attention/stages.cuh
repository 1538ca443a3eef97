// A block's shared memory, the loop over what its rows meet, and where results go.
#pragma once
#include "tile.cuh"

namespace attention {

extern __shared__ uint4 shared_memory[];

// Of half types all registers are wanted, rather than room for one more block; of f32, what ptxas chooses by itself spills less.
#define BOUNDS_half(THREADS) __launch_bounds__(THREADS, 1)
#define BOUNDS_full(THREADS) __launch_bounds__(THREADS)

// A kernel for each type of elements and each width that d_head is filled up to: `INSTANCE` takes the type's suffix, the type, the
// width, and `half` or `full`, by itself and with the width, which name the bounds above and the tiles in params.cuh.
#define FOR_ALL_WIDTHS(INSTANCE, SUFFIX, T, KIND)                                                                       \
    INSTANCE(SUFFIX, T, 32, KIND, KIND##_32)                                                                           \
    INSTANCE(SUFFIX, T, 64, KIND, KIND##_64)                                                                           \
    INSTANCE(SUFFIX, T, 128, KIND, KIND##_128)                                                                         \
    INSTANCE(SUFFIX, T, 256, KIND, KIND##_256)
#define FOR_ALL_SHAPES(INSTANCE)                                                                                       \
    FOR_ALL_WIDTHS(INSTANCE, f32, float, full)                                                                         \
    FOR_ALL_WIDTHS(INSTANCE, f16, __half, half)                                                                        \
    FOR_ALL_WIDTHS(INSTANCE, bf16, __nv_bfloat16, half)

// Tiles of so many tensors of ROWS rows, then stages of STEPS rows of two others, then numbers that go with these.
template <typename T, int D, int TENSORS, int ROWS, int STEPS, int STAGES> struct Memory {
    Tile<T, D> rows[TENSORS], stages[2];

    __device__ __forceinline__ Memory() {
        const Tile<T, D> all = {reinterpret_cast<Chunk<T> *>(shared_memory)};
#pragma unroll
        for (int i = 0; i < TENSORS; i++) rows[i] = all.stage(i, ROWS);
#pragma unroll
        for (int i = 0; i < 2; i++) stages[i] = all.stage(1, TENSORS * ROWS).stage(i, STAGES * STEPS);
    }
    __device__ __forceinline__ float *numbers() const { return reinterpret_cast<float *>(stages[1].stage(STAGES, STEPS).chunks); }
};

// Goes through the rows of two tensors from `begin` to `end`, STEPS at a time, the next ones on their way meanwhile. All threads
// call `advance` with the first row, the two tiles and the number of the stage; what was copied before is there, too.
// `load_more(start, stage)` may begin to copy what goes with the rows.
template <int STEPS, int STAGES, int THREADS, typename T, int D, typename LoadMore, typename Advance>
__device__ __forceinline__ void for_each_tile(const Tile<T, D> (&stages)[2], const RowsOf<T> (&from)[2], int rows, int group, int d_head,
                                              int begin, int end, LoadMore load_more, Advance advance) {
    const auto load = [&](int start, int stage) {
        const Tile<T, D> to[2] = {stages[0].stage(stage, STEPS), stages[1].stage(stage, STEPS)};
        load_rows<T, D, STEPS, THREADS>(to, from, start, rows, group, d_head);
        load_more(start, stage);
        commit_copies();
    };
    if (begin < end) load(begin, 0);
    int stage = 0;
    for (int start = begin; start < end; start += STEPS) {
        wait_for_copies<0>();
        // What was read in the turn before may be overwritten, too.
        __syncthreads();
        if (STAGES > 1 && start + STEPS < end) load(start + STEPS, stage ^ 1);
        advance(start, stages[0].stage(stage, STEPS), stages[1].stage(stage, STEPS), stage);
        if (STAGES > 1) {
            stage ^= 1;
        } else if (start + STEPS < end) {
            __syncthreads();
            load(start + STEPS, 0);
        }
    }
}

// Writes two neighbouring elements of a dense row.
template <typename T>
__device__ __forceinline__ void store_pair(const Inputs &p, void *to, int64_t row, int d, float x, float y) {
    const float pair[2] = {x, y};
    T *at = static_cast<T *>(to) + row * p.d_head + d;
    store_vec_if<2, false>(at, 1, narrow_pack<T>(pair), static_cast<int>(p.d_head) - d, p.flags & FLAG_PAIRS);
}

}
