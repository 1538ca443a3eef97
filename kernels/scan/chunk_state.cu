// Chunk states: the state that each segment of a split sequence reaches from a zero state, and its ΣΔ.
#include "forward.cuh"

namespace scan::chunk_state {

#define INSTANCE(NAME, T, KERNEL, TILE, CLASS, BLOCKS)                                                                 \
    extern "C" __global__ void __launch_bounds__(KERNEL::THREADS, BLOCKS)                                              \
        scan_chunk_state_##NAME(const __grid_constant__ Forward params) {                                              \
        forward::run<T, 1, KERNEL::THREADS, KERNEL::TILE, forward::Takes::CLASS, true>(params);                        \
    }

// Sequences that are split have one channel to a lane.
#define INSTANCES(SUFFIX, T, ONE_BLOCKS)                                                                               \
    INSTANCE(one_##SUFFIX, T, forward, ONE_TILE, MAMBA, ONE_BLOCKS)                                                    \
    INSTANCE(many_states_##SUFFIX, T, forward, ONE_TILE, MANY_STATES, 4)                                               \
    INSTANCE(general_##SUFFIX, T, forward_general, TILE, ALL, 2)

INSTANCES(f32, float, 4)
INSTANCES(f16, __half, 5)
INSTANCES(bf16, __nv_bfloat16, 5)

}
