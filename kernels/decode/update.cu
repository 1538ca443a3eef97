// The state update of one token with the projection of its step sizes: what comes from x_proj is normed, the step size of each channel
// projected, its state carried on, read and gated.
#include "../common/launch.cuh"
#include "many_rows.cuh"

namespace decode::update {

// The lanes of a row of threads share the states of a channel; rows are channels.
static_assert(is_bijection_in_rows<THREADS>());

template <typename T, typename St, bool WHOLE> __device__ __forceinline__ void run_few_rows(const Update &p, const Slots &slots, float *columns) {
    const RowMap map(threadIdx.x, p.part_shift);
    const int channels = static_cast<int>(p.d_inner), index = blockIdx.x * (THREADS / map.lanes) + map.row;
    const bool exists = index < channels;
    // What no kernel of a recording writes is read before those before this one have ended. All lanes of a warp take part in its sums,
    // those without a channel for the last one.
    using RowUpdate = RowUpdate<T, St, WHOLE, MANY_HELD<T>>;
    const typename RowUpdate::ChannelOf channel(p, min(index, channels - 1), map);
    RowUpdate update(p, slot_of(slots, blockIdx.y), channel, exists);
    wait_for_last();
#pragma unroll 1
    for (int row = blockIdx.y; row < static_cast<int>(p.rows); row += gridDim.y) {
        if (row > static_cast<int>(blockIdx.y)) update = RowUpdate(p, slot_of(slots, row), channel, exists);
        update.read_inputs(p, channel, row);
        if (row + gridDim.y < p.rows) prefetch_states<St>(p, slots, row + gridDim.y, channel.index, channel.place(0));
        // Nobody reads the columns of the row before any more.
        __syncthreads();
        stage_columns<T>(columns, p, row);
        __syncthreads();
        const float output = update.run(p, channel, columns);
        if (map.lane == 0 && exists) write_output<T>(p, row, index, output);
    }
}

template <typename T, typename St> __device__ __forceinline__ void run(const UpdateCall &call) {
    extern __shared__ __align__(16) unsigned char memory[];
    const Update &p = call.update;
    begin_next();
    if (p.flags & FLAG_PARTS) {
        ManyRows<T, St>(p, call.slots, memory).run();
    } else if (p.flags & FLAG_VECTOR) {
        run_few_rows<T, St, true>(p, call.slots, reinterpret_cast<float *>(memory));
    } else {
        run_few_rows<T, St, false>(p, call.slots, reinterpret_cast<float *>(memory));
    }
}

// Three blocks to a processor, by their registers.
#define INSTANCE(NAME, T, St)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) decode_update_##NAME(const __grid_constant__ UpdateCall params) { \
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
