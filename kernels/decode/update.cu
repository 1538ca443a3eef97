// The state update of one token with the projection of its step sizes: what comes from x_proj is normed, the step size of each channel
// projected, its state carried on, read and gated.
#include "../common/launch.cuh"
#include "update.cuh"

namespace decode::update {

// The lanes of a row of threads share the states of a channel; rows are channels.
static_assert(is_bijection_in_rows<THREADS>());

// Stages the projections of `count` channels from `first` on, the vectors of all of them together, `pitch` apart: lanes that read those
// of channels of their own would read from a cache line each.
template <typename T>
__device__ __forceinline__ void stage_weights(Pack<T, QUAD> *to, int pitch, const Update &p, int first, int count) {
    const int vectors = static_cast<int>(p.dt_rank) / QUAD;
#pragma unroll 4
    for (int i = threadIdx.x; i < vectors * count; i += THREADS) {
        const int channel = i / vectors, vector = i % vectors;
        const T *from = static_cast<const T *>(p.dt_weight.data) + (first + channel) * p.dt_weight.row + vector * QUAD;
        copy_async(to[vector * pitch + channel], from, first + channel < p.d_inner);
    }
    commit_copies();
}

template <typename T, typename St, int COUNT, bool WHOLE> __device__ __forceinline__ void run_on(const Update &p, float *staged) {
    const int lane_shift = static_cast<int>(p.part_shift) - (COUNT == PARTS ? 2 : 0);
    const RowMap map(threadIdx.x, lane_shift);
    const int of_block = THREADS >> lane_shift;
    const int channels = static_cast<int>(p.d_inner), index = blockIdx.x * of_block + map.row;
    const bool exists = index < channels;
    // (A vector between the rows of vectors, so that those of a channel lie in different banks.)
    const int pitch = of_block + 1;
    Pack<T, QUAD> *weights = nullptr;
    if (COUNT == PARTS && p.flags & FLAG_WEIGHTS) {
        weights = reinterpret_cast<Pack<T, QUAD> *>(staged + p.weights);
        stage_weights(weights, pitch, p, blockIdx.x * of_block, of_block);
        weights += map.row;
    }
    // What no kernel of a recording writes is read before those before this one have ended. All lanes of a warp take part in its sums,
    // those without a channel for the last one.
    const Channel<T, COUNT, WHOLE> channel(p, min(index, channels - 1), map, weights, pitch);
    using RowUpdateOf = RowUpdate<T, St, COUNT, WHOLE>;
    RowUpdateOf update(p, channel, exists, blockIdx.y);
    wait_for_last();
    if (weights) wait_for_copies<0>();
#pragma unroll 1
    for (int row = blockIdx.y; row < static_cast<int>(p.rows); row += gridDim.y) {
        if (row > static_cast<int>(blockIdx.y)) update = RowUpdateOf(p, channel, exists, row);
        update.read_inputs(p, channel, row);
        if (row + gridDim.y < p.rows) prefetch_states<St>(p, row + gridDim.y, channel.index, channel.place(0));
        // Nobody reads the columns of the row before any more.
        __syncthreads();
        stage<T>(staged, p, row);
        __syncthreads();
        update.run(p, channel, exists, staged, row);
    }
}

template <typename T, typename St> __device__ __forceinline__ void run(const Update &p) {
    extern __shared__ __align__(16) float staged[];
    begin_next();
    if (!(p.flags & FLAG_VECTOR)) {
        run_on<T, St, 1, false>(p, staged);
    } else if (p.flags & FLAG_PARTS) {
        run_on<T, St, PARTS, true>(p, staged);
    } else {
        run_on<T, St, 1, true>(p, staged);
    }
}

// Three blocks to a processor, by their registers.
#define INSTANCE(NAME, T, St)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) decode_update_##NAME(const __grid_constant__ Update params) { \
        run<T, St>(params);                                                                                            \
    }

#define POOLS(NAME, T)                                                                                                 \
    INSTANCE(NAME##_f32, T, float)                                                                                     \
    INSTANCE(NAME##_f16, T, __half)                                                                                    \
    INSTANCE(NAME##_bf16, T, __nv_bfloat16)

POOLS(f32, float)
POOLS(f16, __half)
POOLS(bf16, __nv_bfloat16)

}
